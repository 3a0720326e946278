// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Marks as files: their text, the gate, the dead, and the flock on the image. That the protocol works over them is told
// by the protocol tests, which run on both media.

#include "tests/support/unit_actor.hpp"
#include "tests/support/unit_faults.hpp"

#include "core/lease/file_index.hpp"
#include "core/os/error.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <list>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::lease {
namespace {

using namespace unit;
using os::LockOutcome;
using os::LockType;

constexpr Incarnation kFirst{kWeb, 11}, kOther{kMail, 22};
constexpr Mark kPresent = presentMark(Mode::exclusive, kFirst);

std::string page(const std::string& text) {
    std::string whole = text;
    whole.resize(511, ' ');
    return whole + "\n";
}

TEST(MarksText, ReadsBackAsItWasWritten) {
    const std::vector<std::vector<Placed>> sets{
        {},
        {{kOwner, LockType::write}},
        {{kOwner, LockType::read}, {presentMark(Mode::readOnly, kFirst)}},
        {{{MarkKind::sharedOwner, kWeb, 0}}, {presentMark(Mode::shared, kFirst)}},
        {{kOwner},
         {kPresent},
         {{MarkKind::leaving, kWeb, kFirst.id}},
         {{MarkKind::handoff, kWeb, (1u << 30) - 1}},
         {{MarkKind::taken, kWeb, 1}}}};
    for (const auto& set : sets) {
        std::string text = encodeMarks(set);
        EXPECT_EQ(text.size(), 512u) << "a shorter text would leave the end of a longer one behind";
        EXPECT_EQ(text.back(), '\n');
        EXPECT_EQ(decodeMarks(text, kFirst), set) << text;
    }
}

TEST(MarksText, KeepsEightTokensAndRefusesWhatDoesNotFit) {
    std::vector<Placed> marks{{kOwner}, {kPresent}, {{MarkKind::leaving, kWeb, kFirst.id}}};
    for (std::uint32_t token = 1; token <= 8; token++)
        marks.push_back({{MarkKind::taken, kWeb, token}});
    EXPECT_EQ(decodeMarks(encodeMarks(marks), kFirst), marks);
    marks.insert(marks.end(), 40, {{MarkKind::handoff, kWeb, 1}});
    EXPECT_THROW(encodeMarks(marks), Error);
}

TEST(MarksText, OfAnythingElseIsForeign) {
    const std::string good = page("leasehold-marks1 owner");
    ASSERT_EQ(decodeMarks(good, kFirst), std::vector<Placed>{{kOwner}});
    for (const std::string& text : {std::string(),
                                    std::string(512, '\0'),
                                    std::string(512, '\n'),
                                    good.substr(1),
                                    good.substr(0, 511),
                                    good + "\n",
                                    page("leasehold-marks2 owner"),
                                    page("leasehold-marks1 owners"),
                                    page("leasehold-marks1 Owner"),
                                    page("leasehold-marks1\towner"),
                                    page("leasehold-marks1 owner\n"),
                                    page("leasehold-marks1 handoff"),
                                    page("leasehold-marks1 handoff="),
                                    page("leasehold-marks1 handoff=1"),
                                    page("leasehold-marks1 taken=0000000g"),
                                    page("leasehold-marks1 taken=-0000001"),
                                    page("leasehold-marks1 taken=000000001"),
                                    page("leasehold-marks1 owner foreign"),
                                    page(std::string("leasehold-marks1 owner\0", 23)),
                                    std::string("leasehold-marks1 ") + std::string(495, 'x')})
        EXPECT_EQ(decodeMarks(text, kFirst), std::vector<Placed>{Placed{}}) << text;
}

TEST(MarkFileName, TellsWhoseItIs) {
    EXPECT_EQ(encodeMarkFileName({0x1a, 0x2fffffff}), "0000001a-2fffffff");
    for (const Incarnation& who : {kFirst, kOther, Incarnation{(1u << 29) - 1, (1u << 30) - 1}})
        EXPECT_EQ(parseMarkFileName(encodeMarkFileName(who)), who);
    for (const char* name : {"", ".", "..", kGateName, "0000001a", "0000001a-", "0000001a-0000001", "0000001a_00000001",
                             "0000001a-00000001 ", "0000001a-000000011", "000001a-000000011", "0x00001a-00000001",
                             "-000001a-00000001", "0000001g-00000001", "0000001a-0000001~"})
        EXPECT_EQ(parseMarkFileName(name), std::nullopt) << name;
}

const std::string kImage = "disk.img";

// One incarnation's file in the directory, kept as its QEMU keeps it.
struct Member {
    Member(int directory, const Incarnation& who, int image = -1)
        : self(who), file(openMarkFile(directory, who, "the image", kImage)),
          medium(file.get(), directory, image, who, kImage) {}

    Incarnation self;
    os::Fd file;
    FileSetMedium medium;
};

class FileSet : public ProtocolTest {
protected:
    std::vector<std::string> files() const {
        std::vector<std::string> names;
        for (const auto& entry : std::filesystem::directory_iterator(folder))
            names.push_back(entry.path().filename());
        std::sort(names.begin(), names.end());
        return names;
    }

    bool place(Member& member, const Mark& mark, LockType type = LockType::write) {
        return member.medium.tryPlace(mark, type) == LockOutcome::granted;
    }

    std::string make() const {
        std::filesystem::create_directory(dir.path("lease"));
        return dir.path("lease");
    }

    std::string folder = make();
    os::Fd directory = os::openFile(folder, O_RDONLY | O_DIRECTORY);
};

TEST_F(FileSet, MarksOfTheLivingShowAndThoseOfTheDeadAreSwept) {
    Member living(directory.get(), kFirst);
    ASSERT_TRUE(place(living, kOwner));
    ASSERT_TRUE(place(living, kPresent));
    Member other(directory.get(), kOther);
    EXPECT_EQ(other.medium.look(), (std::vector{kOwner, kPresent}));
    EXPECT_FALSE(place(other, kOwner));
    living.file.reset();
    EXPECT_EQ(other.medium.look(), std::vector<Mark>());
    EXPECT_TRUE(place(other, kOwner));
    EXPECT_EQ(files(), (std::vector{encodeMarkFileName(kOther), std::string(kGateName)}));
}

TEST_F(FileSet, WhatIsNoMarkFileIsLeftAlone) {
    std::ofstream(folder + "/notes.txt") << "the administrator's";
    std::ofstream(folder + "/" + encodeMarkFileName({9, 9}) + "~") << "an editor's";
    Member member(directory.get(), kFirst);
    EXPECT_EQ(member.medium.look(), std::vector<Mark>());
    EXPECT_TRUE(std::filesystem::exists(folder + "/notes.txt"));
    EXPECT_EQ(files().size(), 4u);
}

TEST_F(FileSet, LivingFileWithATextOfAnotherVersionKeepsEverybodyOut) {
    Member later(directory.get(), kOther), member(directory.get(), kFirst);
    ASSERT_EQ(pwrite(later.file.get(), "leasehold-marks9", 16, 0), 16);
    EXPECT_EQ(member.medium.look(), std::vector<Mark>{Mark{}});
    EXPECT_FALSE(place(member, kOwner));
}

// Its own text is damaged: to write it anew would drop marks that others rely on.
TEST_F(FileSet, DamagedMarksOfOnesOwnAreNotWrittenOver) {
    Member member(directory.get(), kFirst), other(directory.get(), kOther);
    ASSERT_TRUE(place(member, kOwner));
    ASSERT_TRUE(place(member, kPresent));
    for (const std::string& text : {std::string(512, '\0'), page("leasehold-marks1 nonsense")}) {
        ASSERT_EQ(pwrite(member.file.get(), text.data(), text.size(), 0), 512);
        for (const auto& call : std::initializer_list<std::function<void()>>{
                 [&] { (void)place(member, kOwner); }, [&] { member.medium.remove(kOwner); },
                 [&] { member.medium.removeHandoff(); }, [&] { member.medium.removeAll(); }}) {
            std::string error = errorOf(call);
            EXPECT_NE(error.find("'disk.img'"), std::string::npos) << error;
            EXPECT_NE(error.find("damaged"), std::string::npos) << error;
        }
        EXPECT_FALSE(place(other, kOwner)) << "the lease is lost";
    }
}

TEST_F(FileSet, FileDeletedUnderALivingGuestIsNoticedAtItsNextStep) {
    Member member(directory.get(), kFirst);
    ASSERT_TRUE(place(member, kOwner));
    std::filesystem::remove(folder + "/" + encodeMarkFileName(kFirst));
    for (bool replaced : {false, true}) {
        std::optional<Member> thief;
        if (replaced)
            thief.emplace(directory.get(), kFirst);
        for (const auto& call : std::initializer_list<std::function<void()>>{[&] { (void)place(member, kOwner); },
                                                                             [&] { member.medium.remove(kOwner); }}) {
            std::string error = errorOf(call);
            EXPECT_NE(error.find("deleted from its lockspace"), std::string::npos) << error;
        }
    }
}

// It came out of QEMU, and reading another file might never end. Here it would be an error of its own.
TEST_F(FileSet, WhatIsNotTheListedFileOfMarksIsNotRead) {
    Member member(directory.get(), kFirst);
    FileSetMedium medium(directory.get(), directory.get(), -1, kFirst, kImage);
    for (const auto& call : std::initializer_list<std::function<void()>>{
             [&] { (void)medium.tryPlace(kOwner, LockType::write); }, [&] { medium.removeHandoff(); }}) {
        std::string error = errorOf(call);
        EXPECT_NE(error.find("deleted from its lockspace"), std::string::npos) << error;
    }
}

TEST_F(FileSet, OneImageTwiceInOneGuestIsRefusedAndOneThatWasDetachedIsNot) {
    std::optional<Member> member(std::in_place, directory.get(), kFirst);
    ASSERT_TRUE(place(*member, kPresent));
    std::string error = errorOf([&] { Member twin(directory.get(), kFirst); });
    EXPECT_NE(error.find("twice"), std::string::npos) << error;
    Member other(directory.get(), kOther);
    EXPECT_EQ(other.medium.look(), std::vector{kPresent}) << "the refused one has overwritten the marks";
    member.reset(); // closed, and nobody has swept
    Member again(directory.get(), kFirst);
    EXPECT_EQ(other.medium.look(), std::vector<Mark>()) << "the marks of its former lease";
    EXPECT_TRUE(place(again, kOwner));
}

TEST_F(FileSet, NobodyPassesTheGateWhileAnotherIsInside) {
    Member member(directory.get(), kFirst);
    Child waiting([&](Line& line) {
        line.hear();
        member.medium.look();
        line.say();
    });
    os::Fd gate = os::openFile(folder + "/" + kGateName, O_RDWR);
    ASSERT_EQ(os::tryFlock(gate.get(), LockType::write, "gate"), LockOutcome::granted);
    waiting.line().say();
    EXPECT_FALSE(waiting.line().hasWord(std::chrono::milliseconds(100)));
    gate.reset();
    waiting.line().hear();
    EXPECT_EQ(waiting.join(), "");
}

// libvirtd has many threads, and forks in some of them: a child has copies of all descriptors until it executes.
TEST_F(FileSet, GateIsFreeAgainThoughAProcessWasForkedInTheMiddleOfAStep) {
    Member member(directory.get(), kFirst);
    std::atomic<bool> stop{false};
    std::atomic<int> steps{0};
    std::string error;
    std::thread busy([&] {
        for (; !stop && error.empty(); steps++)
            error = errorOf([&] { member.medium.look(); });
    });
    std::list<Child> children;
    for (int i = 0; i < 40; i++) {
        int before = steps;
        while (steps == before)
            std::this_thread::yield();
        children.emplace_back([](Line& line) { line.hear(); });
    }
    stop = true;
    busy.join();
    EXPECT_EQ(error, "");
    os::Fd gate = os::openFile(folder + "/" + kGateName, O_RDWR);
    EXPECT_EQ(os::tryFlock(gate.get(), LockType::write, "gate"), LockOutcome::granted);
}

TEST_F(FileSet, DeathAtAnySystemCallOfAStepLeavesWholeMarksAndAFreeGate) {
    Member qemu(directory.get(), kFirst), other(directory.get(), kOther);
    // The marks that the steps go through. Others must never see anything else.
    const std::vector<std::vector<Mark>> states{{},
                                                {kOwner},
                                                {kOwner, kPresent},
                                                {kOwner, kPresent, {MarkKind::handoff, kWeb, 5}},
                                                {kPresent, {MarkKind::handoff, kWeb, 5}},
                                                {kPresent}};
    int deaths = killAtEverySystemCall(
        [&] {
            // As the next libvirtd would find it, and go on.
            qemu.medium.removeAll();
            demand(place(qemu, kOwner) && place(qemu, kPresent) && place(qemu, {MarkKind::handoff, kWeb, 5}), "busy");
            qemu.medium.remove(kOwner);
            qemu.medium.removeHandoff();
        },
        [&](int stop) {
            auto seen = other.medium.look();
            EXPECT_NE(std::find(states.begin(), states.end(), seen), states.end()) << "stop " << stop;
            bool owned = std::find(seen.begin(), seen.end(), kOwner) != seen.end();
            EXPECT_NE(place(other, kOwner), owned) << "stop " << stop;
            other.medium.removeAll();
        });
    if (deaths < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(deaths, 40);
    EXPECT_EQ(other.medium.look(), std::vector{kPresent});
}

TEST_F(FileSet, DeathAtAnySystemCallOfAnEntryLeavesNothing) {
    Member other(directory.get(), kOther);
    int deaths = killAtEverySystemCall(
        [&] {
            Member starting(directory.get(), kFirst);
            demand(place(starting, kOwner), "busy");
            demand(place(starting, kPresent), "busy");
        },
        [&](int stop) {
            EXPECT_EQ(other.medium.look(), std::vector<Mark>()) << "stop " << stop;
            EXPECT_EQ(files().size(), 2u) << "stop " << stop;
        });
    if (deaths < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(deaths, 20);
}

TEST_F(FileSet, DeathAtAnySystemCallOfASweepLosesNoLivingMark) {
    Member living(directory.get(), kFirst), other(directory.get(), kOther);
    ASSERT_TRUE(place(living, kOwner));
    auto leaveDead = [&] {
        for (std::uint32_t i = 1; i <= 3; i++)
            Member(directory.get(), {7, i});
    };
    leaveDead();
    int deaths = killAtEverySystemCall([&] { other.medium.look(); },
                                       [&](int stop) {
                                           EXPECT_EQ(other.medium.look(), std::vector{kOwner}) << "stop " << stop;
                                           EXPECT_EQ(files().size(), 3u) << "stop " << stop;
                                           leaveDead();
                                       });
    if (deaths < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(deaths, 15);
}

// A disk that cannot be read for a moment is no reason to destroy a guest.
TEST_F(FileSet, ReadErrorAtTheGateIsNotCalledDamage) {
    Member living(directory.get(), kOther);
    ASSERT_TRUE(place(living, presentMark(Mode::exclusive, kOther)));
    Member looking(directory.get(), kFirst);
    int faults = failAtEverySystemCall(
        {"look", "FileSet"}, 5, 1, [] {},
        [&] {
            (void)looking.medium.look();
            return std::string();
        },
        [](const InjectedFault& fault) {
            if (fault.what.find("EIO") != std::string::npos) {
                EXPECT_EQ(fault.outcome.find("damaged"), std::string::npos) << fault.what << ": " << fault.outcome;
            }
        });
    if (faults < 0)
        GTEST_SKIP() << "tracing is forbidden here";
}

TEST_F(FileSet, StartsBesideTwoSweepersLoseNothing) {
    auto sweep = [&](const Incarnation& who) {
        return [this, who](Line& line) {
            os::Fd own = os::openFile(folder, O_RDONLY | O_DIRECTORY);
            Member sweeper(own.get(), who);
            line.say();
            while (!line.hasWord(std::chrono::milliseconds(0)))
                for (const Mark& mark : sweeper.medium.look())
                    demand(mark.kind != MarkKind::foreign, "half a mark was seen");
        };
    };
    Child one(sweep({7, 1})), two(sweep({7, 2}));
    one.line().hear();
    two.line().hear();
    Member witness(directory.get(), kOther);
    for (std::uint32_t i = 1; i <= 500; i++) {
        Member starting(directory.get(), {kWeb, i});
        ASSERT_TRUE(place(starting, kOwner)) << i; // throws if its file was swept
        ASSERT_TRUE(place(starting, presentMark(Mode::exclusive, starting.self))) << i;
        ASSERT_EQ(witness.medium.look(), (std::vector{kOwner, presentMark(Mode::exclusive, starting.self)})) << i;
    }
    for (Child* child : {&one, &two}) {
        child->line().say();
        EXPECT_EQ(child->join(), "");
    }
    EXPECT_EQ(witness.medium.look(), std::vector<Mark>());
    EXPECT_EQ(files().size(), 2u);
}

TEST_F(FileSet, HundredsOfGuestsShareOneDirectory) {
    if (!mayOpen(1024))
        GTEST_SKIP() << "may not open enough files";
    std::list<Member> members;
    for (std::uint32_t i = 0; i < 200; i++) {
        Member& member = members.emplace_back(directory.get(), Incarnation{i % 50, 1000 + i});
        ASSERT_TRUE(place(member, presentMark(Mode::shared, member.self)));
    }
    std::size_t before = countDescriptors();
    EXPECT_EQ(members.front().medium.look().size(), 199u);
    EXPECT_FALSE(place(members.front(), presentMark(Mode::shared, members.back().self)));
    members.front().medium.removeAll();
    EXPECT_EQ(members.back().medium.look().size(), 198u);
    EXPECT_EQ(countDescriptors(), before);
    Member last(directory.get(), kOther);
    members.clear();
    EXPECT_EQ(last.medium.look(), std::vector<Mark>());
    EXPECT_EQ(files().size(), 2u) << "the dead are swept";
}

const std::string kIndexName = encodeMarkFileName(kIndexIncarnation);

TEST(IndexText, ReadsBackAsItWasWrittenAndNothingElseIsOne) {
    using Marks = Index::Marks;
    for (const Index& index :
         {Index{}, Index{{}, true, 1000},
          Index{{{kFirst, Marks::anything}, {kOther, Marks::shared}, {{3, 4}, Marks::none}}, false, 3}}) {
        std::string text = encodeIndex(index);
        EXPECT_EQ(text.size(), 32 * (1 + index.lines.size())) << "no line may lie in two pages";
        EXPECT_EQ(parseIndex(text), index);
        for (std::size_t cut : {std::size_t{1}, text.size() - 1, text.size() - 31})
            EXPECT_EQ(parseIndex(text.substr(0, cut)), std::nullopt) << cut;
        for (std::size_t at = 0; at < text.size(); at++) {
            std::string damaged = text;
            damaged[at] = '~';
            EXPECT_EQ(parseIndex(damaged), std::nullopt) << at;
        }
    }
    EXPECT_EQ(parseIndex(""), std::nullopt);
    EXPECT_EQ(parseIndex(std::string(64, '\0')), std::nullopt);
}

// Many guests, and so an index.
class Crowd : public FileSet {
protected:
    Member& join(Mode mode) {
        Member& member = members.emplace_back(directory.get(), Incarnation{next % 7, 64 * next + 1}); // sweeps nothing
        next++;
        demand(place(member, kOwner, mode == Mode::readOnly ? LockType::read : LockType::write), "busy");
        demand(place(member, presentMark(mode, member.self)), "busy");
        if (mode == Mode::shared)
            member.medium.remove(kOwner);
        return member;
    }
    bool indexed() const { return std::filesystem::exists(folder + "/" + kIndexName); }
    std::string textOfIndex() const { return os::readFile(folder + "/" + kIndexName, 1 << 20); }

    std::list<Member> members;
    std::uint32_t next = 1;
};

// What versions before the index do whenever they look, and before they place a mark.
void sweepAsBefore(const std::string& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (!parseMarkFileName(entry.path().filename().string()))
            continue;
        os::Fd file = os::openFile(entry.path(), O_RDONLY);
        if (os::tryFlock(file.get(), LockType::read, "") == LockOutcome::granted)
            std::filesystem::remove(entry.path());
    }
}

TEST_F(Crowd, OfFewIsNotIndexedAndOneOfManyIs) {
    for (int i = 0; i < 5; i++)
        join(Mode::readOnly);
    EXPECT_FALSE(indexed());
    join(Mode::readOnly);
    EXPECT_TRUE(indexed());
    EXPECT_EQ(parseIndex(textOfIndex())->lines, std::vector<Index::Line>()) << "all of them read";
}

TEST_F(Crowd, ReaderSeesAWriterAndAWriterSeesReaders) {
    for (int i = 0; i < 8; i++)
        join(Mode::readOnly);
    Member writer(directory.get(), kFirst), reader(directory.get(), kOther);
    EXPECT_TRUE(writer.medium.any(MarkKind::owner, MarkKind::taken));
    EXPECT_TRUE(writer.medium.any(MarkKind::presentReadOnly, MarkKind::presentReadOnly));
    EXPECT_FALSE(reader.medium.any(MarkKind::presentExclusive, MarkKind::presentShared));
    EXPECT_FALSE(place(writer, kOwner));
    ASSERT_TRUE(place(writer, kPresent));
    EXPECT_TRUE(reader.medium.any(MarkKind::presentExclusive, MarkKind::presentShared));
    writer.medium.remove(kPresent);
    EXPECT_FALSE(reader.medium.any(MarkKind::presentExclusive, MarkKind::presentShared));
    members.clear();
    EXPECT_FALSE(writer.medium.any(MarkKind::owner, MarkKind::taken)) << "nobody is left";
    EXPECT_TRUE(place(writer, kOwner));
    EXPECT_FALSE(place(reader, kOwner, LockType::read));
    EXPECT_EQ(files().size(), 4u) << "two guests, the gate, and the index: the dead are swept";
}

TEST_F(Crowd, WriterOfAVersionThatKnowsOfNoIndexIsSeen) {
    for (int i = 0; i < 8; i++)
        join(Mode::readOnly);
    ASSERT_TRUE(indexed());
    // It was made by this version, and the plugin is one of before since.
    Member older(directory.get(), kFirst), reader(directory.get(), kOther);
    sweepAsBefore(folder);
    std::string text = encodeMarks({{kPresent}});
    ASSERT_EQ(pwrite(older.file.get(), text.data(), text.size(), 0), ssize_t(text.size()));
    EXPECT_TRUE(reader.medium.any(MarkKind::presentExclusive, MarkKind::presentShared));
    EXPECT_EQ(members.size(), 8u);
    EXPECT_EQ(reader.medium.look().size(), 17u) << "of nobody who lives the marks are lost";
    ASSERT_TRUE(place(reader, kOwner, LockType::read));
    EXPECT_TRUE(indexed()) << "made anew by who has looked at all";
    EXPECT_TRUE(join(Mode::readOnly).medium.any(MarkKind::presentExclusive, MarkKind::presentShared));
}

TEST_F(Crowd, DamagedIndexIsReadPastAndMadeAnew) {
    for (int i = 0; i < 8; i++)
        join(Mode::shared);
    for (const std::string& text : {std::string(), std::string(3, '\0'), textOfIndex() + "half a line"}) {
        std::ofstream(folder + "/" + kIndexName) << text;
        Member reader(directory.get(), kOther);
        EXPECT_TRUE(reader.medium.any(MarkKind::presentShared, MarkKind::presentShared));
        join(Mode::shared);
        EXPECT_TRUE(parseIndex(textOfIndex()));
        EXPECT_TRUE(reader.medium.any(MarkKind::presentShared, MarkKind::presentShared));
    }
}

// Whatever comes and goes: with the index the answers are those of a look at all.
TEST_F(Crowd, IndexNeverHidesAMark) {
    std::uint32_t random = 12345;
    auto draw = [&](std::uint32_t below) { return (random = random * 1664525 + 1013904223) / 65536 % below; };
    Member witness(directory.get(), {100, 1});
    for (int round = 0; round < 250; round++) {
        if (members.size() < 6 || draw(4) == 0)
            members.emplace_back(directory.get(), Incarnation{draw(5), next++});
        auto chosen = std::next(members.begin(), draw(static_cast<std::uint32_t>(members.size())));
        const Incarnation& self = chosen->self;
        const Mark marks[] = {kOwner,
                              kOwner,
                              {MarkKind::sharedOwner, self.domain, 0},
                              presentMark(Mode::exclusive, self),
                              presentMark(Mode::shared, self),
                              presentMark(Mode::readOnly, self),
                              {MarkKind::handoff, self.domain, self.id}};
        const Mark& mark = marks[draw(7)];
        switch (draw(6)) {
        case 0:
            chosen->medium.removeAll();
            break;
        case 1:
            members.erase(chosen); // dies
            break;
        case 2:
            chosen->medium.remove(mark);
            break;
        default:
            (void)chosen->medium.tryPlace(mark, draw(2) ? LockType::read : LockType::write);
        }
        if (draw(20) == 0)
            sweepAsBefore(folder);
        auto kinds = [&](auto all) {
            std::vector<MarkKind> seen;
            for (int kind = 0; kind < 8; kind++)
                if (all(static_cast<MarkKind>(kind)))
                    seen.push_back(static_cast<MarkKind>(kind));
            return seen;
        };
        auto asked = kinds([&](MarkKind kind) { return witness.medium.any(kind, kind); });
        std::vector<Mark> at = witness.medium.lookAt(2, Mode::shared);
        std::vector<Mark> looked = witness.medium.look();
        EXPECT_EQ(asked, kinds([&](MarkKind kind) {
                      return std::any_of(looked.begin(), looked.end(), [&](const Mark& m) { return m.kind == kind; });
                  }))
            << round;
        for (const Mark& seen : looked)
            if (seen.domain == 2 && seen.kind == MarkKind::presentShared) {
                EXPECT_NE(std::find(at.begin(), at.end(), seen), at.end()) << round;
            }
    }
    EXPECT_TRUE(indexed());
}

TEST_F(Crowd, DeathAtAnySystemCallHidesNoMark) {
    for (int i = 0; i < 6; i++)
        join(Mode::readOnly);
    Member qemu(directory.get(), kFirst), reader(directory.get(), kOther);
    int deaths = killAtEverySystemCall(
        [&] {
            qemu.medium.removeAll();
            demand(place(qemu, kPresent), "busy");
            qemu.medium.remove(kPresent);
            demand(place(qemu, presentMark(Mode::shared, kFirst)) && place(qemu, kOwner, LockType::read), "busy");
        },
        [&](int stop) {
            auto seen = reader.medium.look();
            bool writes = std::any_of(seen.begin(), seen.end(), [](const Mark& mark) {
                return mark.kind == MarkKind::presentExclusive || mark.kind == MarkKind::presentShared;
            });
            EXPECT_EQ(reader.medium.any(MarkKind::presentExclusive, MarkKind::presentShared), writes)
                << "stop " << stop;
        });
    if (deaths < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(deaths, 30);
    EXPECT_TRUE(indexed());
}

// What flock(1) says of the image: busy, free for readers, or free.
class ImageFlock : public FileSet {
protected:
    std::string state() const {
        auto may = [&](const char* how) {
            return system(("flock -n " + std::string(how) + " " + image + " true").c_str()) == 0;
        };
        return may("-x") ? "free" : may("-s") ? "read" : "busy";
    }

    os::Fd opened = os::openFile(image, O_RDWR), strangers = os::openFile(image, O_RDWR);
    Member member{directory.get(), kFirst, opened.get()};
};

TEST_F(ImageFlock, FollowsTheOwnerMarkAndNoOther) {
    ASSERT_TRUE(place(member, kPresent));
    EXPECT_EQ(state(), "free");
    ASSERT_TRUE(place(member, kOwner));
    EXPECT_EQ(state(), "busy");
    member.medium.remove(kPresent);
    member.medium.removeHandoff();
    EXPECT_EQ(state(), "busy");
    ASSERT_TRUE(place(member, kOwner, LockType::read)) << "a downgrade";
    EXPECT_EQ(state(), "read");
    ASSERT_TRUE(place(member, kOwner)) << "an upgrade";
    EXPECT_EQ(state(), "busy");
    member.medium.remove(kOwner);
    EXPECT_EQ(state(), "free");
    ASSERT_TRUE(place(member, kOwner));
    member.medium.removeAll();
    EXPECT_EQ(state(), "free");
}

TEST_F(ImageFlock, OfSomebodyElseKeepsTheOwnerMarkDownAndShowsAsForeign) {
    ASSERT_EQ(os::tryFlock(strangers.get(), LockType::read, image), LockOutcome::granted);
    EXPECT_FALSE(place(member, kOwner));
    EXPECT_EQ(member.medium.look(), std::vector<Mark>{Mark{}});
    Member other(directory.get(), kOther);
    EXPECT_EQ(other.medium.look(), std::vector<Mark>()) << "no mark is left";
    EXPECT_TRUE(place(member, kOwner, LockType::read)) << "two readers";
    EXPECT_EQ(member.medium.look(), std::vector<Mark>());
}

TEST_F(ImageFlock, RefusedUpgradeKeepsTheLockForReading) {
    ASSERT_TRUE(place(member, kOwner, LockType::read));
    ASSERT_EQ(os::tryFlock(strangers.get(), LockType::read, image), LockOutcome::granted);
    EXPECT_FALSE(place(member, kOwner));
    os::unflock(strangers.get(), image);
    EXPECT_EQ(state(), "read");
    EXPECT_TRUE(place(member, kOwner));
}

TEST_F(ImageFlock, EndsWithTheLastCopyOfTheDescriptor) {
    ASSERT_TRUE(place(member, kOwner));
    os::Fd copy(fcntl(opened.get(), F_DUPFD_CLOEXEC, 0)); // the one in QEMU
    opened.reset();
    EXPECT_EQ(state(), "busy");
    copy.reset();
    EXPECT_EQ(state(), "free");
}

} // namespace
} // namespace leasehold::lease

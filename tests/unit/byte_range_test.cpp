// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/lease/byte_range.hpp"
#include "core/os/error.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>
#include <set>

#include <fcntl.h>
#include <sys/stat.h>

namespace leasehold::lease {
namespace {

using os::Fd;
using os::LockOutcome;
using os::LockType;

constexpr Mark kOwner{MarkKind::owner, 0, 0};
constexpr std::int64_t kLast = INT64_MAX;
constexpr std::uint32_t kMaxDomain = (1u << kDomainBits) - 1;
constexpr std::uint32_t kMaxId = (1u << kIdBits) - 1;

TEST(MarkOffsets, LieBeyondAllDataAndQemusAndLibvirtsBytes) {
    EXPECT_EQ(encodeOffset(kOwner), std::int64_t{1} << 62);
    EXPECT_EQ(encodeOffset({MarkKind::taken, kMaxDomain, kMaxId}), kLast);
}

TEST(MarkOffsets, ComeBackAsTheirMark) {
    for (int kind = 0; kind < 8; kind++)
        for (std::uint32_t domain : {0u, 1u, 0x12345678u & kMaxDomain, kMaxDomain})
            for (std::uint32_t id : {0u, 1u, 0x2345678u, kMaxId}) {
                Mark mark{static_cast<MarkKind>(kind), domain, id};
                EXPECT_EQ(decodeRange({encodeOffset(mark), 1}), std::vector{mark});
            }
}

TEST(MarkOffsets, OfNeighboursThatTheKernelMergedComeBackOneByOne) {
    Mark one{MarkKind::handoff, 7, kMaxId}, next{MarkKind::handoff, 8, 0};
    EXPECT_EQ(decodeRange({encodeOffset(one), 2}), (std::vector{one, next}));
    Mark edge{MarkKind::owner, kMaxDomain, kMaxId}, other{MarkKind::sharedOwner, 0, 0};
    EXPECT_EQ(decodeRange({encodeOffset(edge), 2}), (std::vector{edge, other}));
    EXPECT_EQ(decodeRange({kLast, 1}), (std::vector{Mark{MarkKind::taken, kMaxDomain, kMaxId}}));
}

TEST(MarkOffsets, OfLocksThatAreNoMarksAreForeign) {
    const std::vector foreign{Mark{MarkKind::foreign, 0, 0}};
    for (os::Range range : {os::Range{0, 0}, os::Range{0, 1}, os::Range{100, 1}, os::Range{kMarkArea - 1, 1},
                            os::Range{kMarkArea - 1, 2}, os::Range{kMarkArea, 0}, os::Range{kMarkArea, 5},
                            os::Range{kMarkArea, kLast - kMarkArea}, os::Range{-1, 1}, os::Range{kMarkArea, -1}})
        EXPECT_EQ(decodeRange(range), foreign) << range.start << "+" << range.length;
}

class ByteRange : public unit::LeavesNoDescriptor {
protected:
    // One open file description with its view of the marks.
    struct Party {
        explicit Party(const std::string& path, int flags = O_RDWR)
            : fd(os::openFile(path, flags)), medium(fd.get(), (flags & O_ACCMODE) == O_RDWR, path) {}
        bool place(const Mark& mark, LockType type = LockType::write) {
            return medium.tryPlace(mark, type) == LockOutcome::granted;
        }
        Fd fd;
        ByteRangeMedium medium;
    };

    static bool contains(const std::vector<Mark>& marks, const Mark& mark) {
        return std::find(marks.begin(), marks.end(), mark) != marks.end();
    }

    unit::TempDir dir;
    std::string image = dir.file("disk.img", "data");
};

TEST_F(ByteRange, ShowsOthersMarksAndNotOnesOwn) {
    Party one(image), other(image);
    Mark present = presentMark(Mode::exclusive, {5, 6});
    ASSERT_TRUE(one.place(kOwner));
    ASSERT_TRUE(one.place(present));
    EXPECT_TRUE(one.medium.look().empty());
    auto seen = other.medium.look();
    EXPECT_EQ(seen.size(), 2u);
    EXPECT_TRUE(contains(seen, kOwner));
    EXPECT_TRUE(contains(seen, present));
    one.medium.remove(kOwner);
    EXPECT_EQ(other.medium.look(), std::vector{present});
    one.fd.reset();
    EXPECT_TRUE(other.medium.look().empty());
}

TEST_F(ByteRange, ShowsTheMarksOfAnotherProcess) {
    unit::Child holder([&](unit::Line& line) {
        Party party(image);
        unit::demand(party.place(presentMark(Mode::shared, {1, 2})), "not placed");
        line.say();
        line.hear();
    });
    holder.line().hear();
    Party party(image);
    EXPECT_EQ(party.medium.look(), (std::vector{presentMark(Mode::shared, {1, 2})}));
    holder.kill();
    EXPECT_TRUE(party.medium.look().empty());
}

TEST_F(ByteRange, FindsEveryOneOfManyMarks) {
    Party holders[3] = {Party(image), Party(image), Party(image)};
    Party party(image);
    std::set<std::int64_t> placed;
    // Scattered as hashes are, with neighbours of other holders and of one's own among them.
    for (std::uint32_t i = 0; i < 600; i++) {
        std::uint32_t scattered = (i * 2654435761u) & kMaxDomain;
        Mark mark{static_cast<MarkKind>(2 + i % 6), scattered, (scattered * 40503u) & (kMaxId - 4)};
        for (std::uint32_t neighbour = 0; neighbour < (i % 10 == 0 ? 3u : 1u); neighbour++) {
            mark.id += neighbour;
            ASSERT_TRUE(holders[(i + neighbour * (i % 20 == 0)) % 3].place(mark));
            placed.insert(encodeOffset(mark));
        }
    }
    std::set<std::int64_t> seen;
    for (const Mark& mark : party.medium.look())
        seen.insert(encodeOffset(mark));
    EXPECT_EQ(seen, placed);
}

TEST_F(ByteRange, FindsTheMarksAtBothEndsOfTheArea) {
    Party holder(image), party(image);
    Mark last{MarkKind::taken, kMaxDomain, kMaxId - 1};
    ASSERT_TRUE(holder.place(kOwner));
    ASSERT_TRUE(holder.place(last));
    auto seen = party.medium.look();
    EXPECT_EQ(seen.size(), 2u);
    EXPECT_TRUE(contains(seen, last));
}

TEST_F(ByteRange, ShowsALockOfTheWholeFileAsForeign) {
    for (LockType type : {LockType::read, LockType::write}) {
        Fd program = os::openFile(image, O_RDWR);
        ASSERT_EQ(os::tryLock(program.get(), type, {0, 0}, image), LockOutcome::granted);
        Party party(image);
        EXPECT_EQ(party.medium.look(), (std::vector{Mark{MarkKind::foreign, 0, 0}}));
        EXPECT_FALSE(party.place(kOwner));
    }
}

TEST_F(ByteRange, DoesNotMindQemusAndLibvirtsLocks) {
    Fd qemu = os::openFile(image, O_RDWR);
    for (std::int64_t byte : {0, 1, 100, 101, 103, 201, 203})
        ASSERT_EQ(os::tryLock(qemu.get(), LockType::read, {byte, 1}, image), LockOutcome::granted);
    Party party(image);
    EXPECT_TRUE(party.medium.look().empty());
    EXPECT_TRUE(party.place(kOwner));
    for (std::int64_t byte : {0, 1, 100, 104, 163, 200, 203, 263})
        EXPECT_TRUE(unit::isFree(image, byte) || byte < 204) << byte;
}

TEST_F(ByteRange, GivesUpOnMoreMarksThanGuestsCanHave) {
    Party attacker(image), party(image);
    for (std::uint32_t i = 0; i < 4200; i++)
        ASSERT_TRUE(attacker.place({MarkKind::handoff, 1, 2 * i + 1}));
    try {
        (void)party.medium.look();
        FAIL() << "looked at everything";
    } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::invalid);
        EXPECT_NE(std::string(error.what()).find(image), std::string::npos);
    }
}

TEST_F(ByteRange, PlacesAMarkTwiceWithoutHarm) {
    Party one(image), other(image);
    EXPECT_TRUE(one.place(kOwner));
    EXPECT_TRUE(one.place(kOwner));
    EXPECT_FALSE(other.place(kOwner));
    one.medium.remove(kOwner);
    one.medium.remove(kOwner);
    EXPECT_TRUE(other.place(kOwner));
}

TEST_F(ByteRange, SharesTheOwnerMarkAmongReadersOnly) {
    Party one(image), other(image), writer(image);
    EXPECT_TRUE(one.place(kOwner, LockType::read));
    EXPECT_TRUE(other.place(kOwner, LockType::read));
    EXPECT_FALSE(writer.place(kOwner, LockType::write));
}

TEST_F(ByteRange, MarksForReadingOnAReadOnlyDescriptorStopWritersAndAreSeen) {
    Party reader(image, O_RDONLY), writer(image);
    Mark present = presentMark(Mode::readOnly, {5, 6});
    EXPECT_TRUE(reader.place(kOwner, LockType::read));
    EXPECT_TRUE(reader.place(present));
    EXPECT_FALSE(writer.place(kOwner));
    EXPECT_TRUE(contains(writer.medium.look(), present));
    EXPECT_THROW((void)reader.place(kOwner, LockType::write), SystemError);
}

TEST_F(ByteRange, MarksADirectoryForReading) {
    Party reader(dir.path(), O_RDONLY), other(dir.path(), O_RDONLY);
    EXPECT_TRUE(reader.place(kOwner, LockType::read));
    EXPECT_TRUE(reader.place(presentMark(Mode::readOnly, {5, 6})));
    EXPECT_EQ(other.medium.look().size(), 2u);
}

TEST_F(ByteRange, NotesBelongToTheOpenFileDescription) {
    Party party(image), other(image);
    EXPECT_EQ(party.medium.note(), Note{}) << "nothing is noted at first";
    const Note notes[] = {{.owner = true},
                          {.token = 1},
                          {.owner = true, .leaving = true, .token = kMaxId},
                          {.leaving = true, .token = 77},
                          {}};
    for (const Note& note : notes) {
        party.medium.setNote(note);
        os::Fd copy(fcntl(party.fd.get(), F_DUPFD_CLOEXEC, 0));
        EXPECT_EQ(ByteRangeMedium(copy.get(), true, image).note(), note) << "a duplicate knows it too";
        EXPECT_EQ(other.medium.note(), Note{}) << "another description does not";
    }
}

TEST_F(ByteRange, APositionThatIsNoNoteSaysNothing) {
    Party party(image);
    ASSERT_EQ(lseek(party.fd.get(), off_t{1} << 40, SEEK_SET), off_t{1} << 40);
    EXPECT_EQ(party.medium.note(), Note{});
}

TEST_F(ByteRange, DropsHandoffAndLeavingAndNothingElse) {
    Party party(image), other(image);
    ASSERT_TRUE(party.place(kOwner));
    ASSERT_TRUE(party.place({MarkKind::leaving, kMaxDomain, kMaxId}));
    ASSERT_TRUE(party.place({MarkKind::handoff, 0, 1}));
    ASSERT_TRUE(party.place({MarkKind::taken, 0, 0}));
    ASSERT_TRUE(party.place({MarkKind::presentReadOnly, kMaxDomain, kMaxId}));
    ASSERT_TRUE(other.place({MarkKind::handoff, 1, 1}));
    party.medium.removeHandoff();
    Party witness(image);
    EXPECT_EQ(witness.medium.look().size(), 4u);
    EXPECT_TRUE(contains(witness.medium.look(), {MarkKind::handoff, 1, 1})) << "somebody else's";
    party.medium.removeAll();
    EXPECT_EQ(witness.medium.look(), (std::vector{Mark{MarkKind::handoff, 1, 1}}));
    EXPECT_TRUE(os::inspectOwnLocks(party.fd.get()).empty());
}

TEST_F(ByteRange, LeavesLocksBelowItsAreaAlone) {
    Party party(image);
    ASSERT_EQ(os::tryLock(party.fd.get(), LockType::read, {201, 1}, image), LockOutcome::granted);
    ASSERT_TRUE(party.place(kOwner));
    party.medium.removeAll();
    EXPECT_FALSE(unit::isFree(image, 201));
    EXPECT_TRUE(unit::isFree(image, kMarkArea));
}

TEST_F(ByteRange, WritesNothingIntoTheImage) {
    Party party(image);
    ASSERT_TRUE(party.place(kOwner));
    ASSERT_TRUE(party.place({MarkKind::taken, kMaxDomain, kMaxId - 1}));
    EXPECT_EQ(os::readFile(image, 100), "data");
    struct stat status;
    ASSERT_EQ(stat(image.c_str(), &status), 0);
    EXPECT_EQ(status.st_size, 4);
}

} // namespace
} // namespace leasehold::lease

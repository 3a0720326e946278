// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Each change of what a guest holds is one transaction: libvirtd is killed at every system call of it, and every system
// call of it fails, in turn. Afterwards the next call finds what was, or what is to be, and makes it whole. Which of
// the two is told by what QEMU has open.
//
// Default: every death on the image, and one error for each system call; elsewhere, and under the sanitizers, a part.
// LEASEHOLD_LONG=1: all. Each prints a table of what was made to
// fail; the long one with a line for each system call and error.

#include "core/os/error.hpp"
#include "tests/support/unit_faults.hpp"
#include "tests/support/unit_media.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold {
namespace {

using lease::Mode;
using Answer = std::string;
using Leases = std::map<std::string, std::string>; // path -> EngineWithMedia::leaseOf

class EngineChanges : public unit::EngineWithMedia {
protected:
    // In memory: files of marks are written through to the disk, thousands of times here.
    EngineChanges() : EngineWithMedia("/dev/shm") {}
    static void TearDownTestSuite() { std::printf("%s\n", unit::tellFaults().c_str()); }

    // One call of libvirt that changes what the guest holds.
    struct Change {
        const char* name;
        std::function<void()> scene;               // a guest before it
        std::function<Answer(const Engine&)> call; // the change
        std::vector<Resource> before, after; // what libvirt calls the guest's disks; without a released one, always
        Leases was, becomes;                 // what holds before it; after it, when QEMU did its part
        std::function<void()> qemu = [] {};  // that part, if it comes after the call
    };

    void boot(const std::vector<Resource>& disks, const std::vector<std::string>& lower = {}) {
        qemu.reset();
        qemu.emplace(engine, web, disks);
        for (const std::string& path : lower)
            qemu->reads(path);
        unit::demand(!engine.acquire(web, disks, ""), "the guest does not start");
    }

    Leases leases() const {
        Leases found;
        for (const std::string& path : {image, second, base})
            found[path] = leaseOf(*qemu, web, path);
        return found;
    }

    static Answer tryCall(const Change& change, const Engine& engine) {
        try {
            return change.call(engine);
        } catch (const Error& error) {
            return std::string("thrown: ") + error.what();
        }
    }

    // A snapshot: the guest writes to `second` from now on, and reads `image` below it.
    void takeSnapshot() {
        boot(disk);
        unit::demand(!engine.acquire(web, added, ""), "no new top");
        qemu->writes(second);
        qemu->closes(image);
        qemu->reads(image);
    }
    void finishSnapshot() {
        takeSnapshot();
        engine.detach(web, disk);
    }
    void beginCommit() {
        finishSnapshot();
        unit::demand(!engine.acquire(web, disk, ""), "no commit");
        qemu->writes(image);
    }

    std::vector<Change> changes() {
        auto acquire = [this](std::vector<Resource> what) {
            return [this, what](const Engine& by) { return answerOf(by.acquire(web, what, "")); };
        };
        auto detach = [this](std::vector<Resource> what) {
            return [this, what](const Engine& by) { return by.detach(web, what), Answer(); };
        };
        const std::vector<Resource> both{disk[0], added[0]}, reading{{image, Mode::readOnly}};
        const Leases one{{image, "exclusive"}, {second, "free"}, {base, "free"}};
        const Leases two{{image, "exclusive"}, {second, "exclusive"}, {base, "free"}};
        const Leases chain{{image, "reading"}, {second, "exclusive"}, {base, "free"}};
        const Leases linked{{image, "exclusive"}, {second, "free"}, {base, "reading"}};
        return {
            {"plug", [this] { boot(disk); }, acquire(added), disk, both, one, two, [this] { qemu->writes(second); }},
            {"unplug",
             [this, both] {
                 boot(both);
                 qemu->closes(second);
             },
             detach(added), disk, disk, one, one},
            {"unplug of a disk with a lower file",
             [this, both] {
                 boot(both, {base});
                 qemu->closes(second);
                 qemu->closes(base);
             },
             detach(added), disk, disk, one, one},
            {"snapshot", [this] { takeSnapshot(); }, detach(disk), added, added, chain, chain},
            {"begin of a commit", [this] { finishSnapshot(); }, acquire(disk), added, added, chain, two,
             [this] { qemu->writes(image); }},
            {"end of a commit",
             [this] {
                 beginCommit();
                 qemu->closes(image); // the highest descriptor: the one for writing
             },
             acquire(reading), added, added, chain, chain},
            {"first run over a lower file",
             [this] {
                 qemu.reset();
                 qemu.emplace(engine, web, disk);
                 qemu->reads(base);
             },
             acquire(disk),
             disk,
             disk,
             {},
             linked},
            {"suspend", [this] { boot(disk); }, givingAState(&Engine::release), disk, disk, one, one},
            {"begin of a migration", [this] { boot(disk); }, givingAState(&Engine::inquire), disk, disk, one, one},
            {"resume",
             [this] {
                 boot(disk);
                 state = engine.release(web, disk);
             },
             [this](const Engine& by) { return answerOf(by.acquire(web, disk, state)); }, disk, disk, one, one},
        };
    }

    using StateCall = std::string (Engine::*)(const Guest&, const std::vector<Resource>&) const;
    std::function<Answer(const Engine&)> givingAState(StateCall call) {
        return [this, call](const Engine& by) { return (by.*call)(web, disk).empty() ? "no state" : Answer(); };
    }

    // What every change must come to, when QEMU has what it has open.
    void expectWhole(const Change& change, const Leases& expected, const std::vector<Resource>& disks,
                     const char* when) {
        EXPECT_EQ(pauseAndRun(engine, web, disks), "") << change.name << ' ' << when;
        Leases found = leases();
        EXPECT_EQ(found, expected) << change.name << ' ' << when;
    }

    static unit::Entry entry(const std::string& name) { return {name, GetParam().name}; }

    // Of the system calls that die and fail: all on the image, a part where there are two or three times as many.
    int step() const {
        return unit::placesPerTry() * (unit::isLongRun() || std::string(GetParam().name) == "OnTheImage" ? 1 : 5);
    }

    std::optional<Qemu> qemu;
    std::string state;
    std::string base = dir.file("base.img");
    const std::vector<Resource> disk{{image, Mode::exclusive}}, added{{second, Mode::exclusive}};
};

TEST_P(EngineChanges, LibvirtdKilledAtAnySystemCallOfAChangeIsHealedByTheNextOne) {
    for (const Change& change : changes()) {
        change.scene();
        int deaths = unit::killAtEverySystemCall(
            [&] { unit::demand(change.call(engine).empty(), "refused"); },
            [&](int stop) {
                SCOPED_TRACE(testing::Message() << change.name << " killed at stop " << stop);
                EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return pauseAndRun(fresh, web, change.before); }),
                          "");
                Leases found = leases();
                bool first = change.was.empty();
                EXPECT_EQ(found, first ? change.becomes : change.was);
                // And the change can be made again.
                EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return tryCall(change, fresh); }), "");
                change.qemu();
                EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return pauseAndRun(fresh, web, change.after); }),
                          "");
                EXPECT_EQ(leases(), change.becomes);
                unit::demand(!HasFailure(), "what is above does not hold"); // hundreds of times is no clearer
                change.scene();
            },
            step());
        if (deaths < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(deaths * step(), 10) << change.name;
        unit::countDeaths(entry(change.name), deaths);
    }
    qemu.reset();
}

TEST_P(EngineChanges, ASystemCallThatFailsLeavesWhatWasOrWhatIsToBe) {
    for (const Change& change : changes()) {
        int faults = unit::failAtEverySystemCall(
            entry(change.name), unit::isLongRun() ? 5 : 1, step(), change.scene, [&] { return change.call(engine); },
            [&](const unit::InjectedFault& fault) {
                SCOPED_TRACE(testing::Message() << change.name << ", " << fault.what << ", gave: " << fault.outcome);
                EXPECT_EQ(fault.outcome.find("CRASH"), std::string::npos);
                EXPECT_TRUE(fault.outcome.empty() || fault.what.find(strerror(EINTR)) == std::string::npos)
                    << "a signal is no answer";
                unit::demand(!HasFailure(), "what is above does not hold"); // hundreds of times is no clearer
                bool first = change.was.empty();
                if (fault.outcome.empty()) {
                    change.qemu();
                    // Without a look at QEMU there is no lease of a lower file: the guest runs all the same.
                    if (!first || leaseOf(*qemu, web, base) != "free")
                        expectWhole(change, change.becomes, change.after, "granted");
                    return;
                }
                expectWhole(change, first ? change.becomes : change.was, change.before, "refused");
                EXPECT_EQ(tryCall(change, engine), "") << "once more";
                change.qemu();
                expectWhole(change, change.becomes, change.after, "refused, and granted when tried again");
            });
        if (faults < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(faults * step(), 10) << change.name;
    }
    qemu.reset();
}

// In doubt whoever is new is refused.
TEST_P(EngineChanges, WhateverFailsNobodyGetsWhatAnotherGuestHas) {
    boot(disk);
    Qemu other = start(mail, added);
    ASSERT_EQ(engine.acquire(mail, added, ""), std::nullopt);
    constexpr int kNaming = 61;            // a refusal looks at all processes, to name the holder: thousands of calls
    const std::string granted = "GRANTED"; // and "" is the answer that must come
    auto refused = [&](const std::function<Engine::Answer()>& call) {
        return [call, granted] { return call() ? Answer() : granted; };
    };
    const std::pair<const char*, std::function<Answer()>> entries[] = {
        {"start", refused([&] { return engine.registerGuest(db, disk); })},
        {"plug", refused([&] { return engine.acquire(mail, disk, ""); })},
        {"run", refused([&] {
             return engine.acquire(mail, {added[0], disk[0]}, "");
         })},
    };
    for (const auto& [name, call] : entries) {
        int faults = unit::failAtEverySystemCall(
            entry(std::string(name) + " of what is taken"), 1, unit::isLongRun() ? 1 : kNaming * step(), [] {}, call,
            [&, name = name](const unit::InjectedFault& fault) {
                EXPECT_NE(fault.outcome, granted) << name << ", " << fault.what;
                EXPECT_EQ(fault.outcome.find("CRASH"), std::string::npos) << name << ", " << fault.what;
                EXPECT_EQ(leaseOf(*qemu, web, image), "exclusive") << name << ", " << fault.what;
            });
        if (faults < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(faults, 0) << name;
    }
    EXPECT_EQ(pauseAndRun(engine, web, disk), "");
    EXPECT_EQ(pauseAndRun(engine, mail, added), "");
    qemu.reset();
}

TEST_P(EngineChanges, AStartThatFailsOrDiesLeavesTheImageFree) {
    // The ends of its vessel are left to QEMU, which is none here.
    auto firstFree = [](int from) { return os::Fd(fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, from)).get(); };
    const int in = firstFree(250), out = firstFree(in + 1);
    auto expectFree = [&](const std::string& when) { EXPECT_EQ(refusalOf(mail, disk), "granted") << when; };
    auto startAndEnd = [&] {
        Answer answer = answerOf(engine.registerGuest(web, disk));
        close(in);
        close(out);
        return answer;
    };
    int faults = unit::failAtEverySystemCall(
        entry("start"), unit::isLongRun() ? 5 : 1, step(), [] {}, startAndEnd,
        [&](const unit::InjectedFault& fault) {
            // or they are elsewhere, or still open
            bool ours = fault.what.find("close") == std::string::npos && fault.what.find("fcntl") == std::string::npos;
            EXPECT_FALSE(ours && fault.outcome.starts_with("CRASH")) << fault.what << ": " << fault.outcome;
            expectFree(fault.what);
        });
    if (faults < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    int deaths =
        unit::killAtEverySystemCall([&] { (void)engine.registerGuest(web, disk); },
                                    [&](int stop) { expectFree("killed at stop " + std::to_string(stop)); }, step());
    // Where this host has mounts that may hang, most of a start happens in a helper, which is another process.
    EXPECT_GT(faults, 0);
    EXPECT_GT(deaths, 0);
    unit::countDeaths(entry("start"), deaths);
}

TEST_P(EngineChanges, TheBaseOfACommitIsOfferedWhenTheGuestStopsAndTakenBackWhenItRuns) {
    beginCommit();
    std::string first = engine.release(web, added);
    ASSERT_EQ(engine.acquire(web, added, first), std::nullopt);
    EXPECT_EQ(leaseOf(*qemu, web, image), "exclusive");
    // A handoff that stays up would lend its token to the next one, and an old state would be as good as a new one.
    EXPECT_NE(engine.release(web, added), first);
    qemu.reset();
}

TEST_P(EngineChanges, AGuestThatStopsByItselfInTheMiddleOfTheBeginOfACommitKeepsTheBase) {
    finishSnapshot();
    ASSERT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    state = engine.release(web, added); // before QEMU has opened it for writing
    qemu->writes(image);
    engine.inquire(web, added);
    EXPECT_EQ(engine.acquire(web, added, engine.release(web, added)), std::nullopt);
    EXPECT_EQ(leaseOf(*qemu, web, image), "exclusive");
    qemu.reset();
}

TEST_P(EngineChanges, ACommitThatNeverBeganIsUndoneWhenTheGuestRunsAgain) {
    finishSnapshot();
    ASSERT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    EXPECT_EQ(pauseAndRun(engine, web, added), "");
    EXPECT_EQ(leaseOf(*qemu, web, image), "reading");
    qemu.reset();
}

INSTANTIATE_TEST_SUITE_P(Everywhere, EngineChanges, unit::everywhere(), unit::nameOfWhere);

// A live migration of `web` to another QEMU of it, as libvirt makes it, and what its last call comes to: whichever call
// fails or dies, one of the two has the image then, and after the next call it is the one that is to have it.
class EngineMigrations : public EngineChanges {
protected:
    struct End {
        const char* name;
        std::function<void()> scene;
        std::function<Answer(const Engine&)> call;
        bool arrives; // `there` has the image then, and the source must not
    };

    // Up to where the destination takes over: it has joined, and the source has stopped.
    void migrate() {
        arrived.reset();
        boot(disk);
        state = engine.inquire(web, disk);
        there = web;
        arrived.emplace(engine, there, disk);
        unit::demand(engine.release(web, disk) == state, "the source gives another state");
    }

    std::vector<End> ends() {
        auto taking = [this](Guest& guest) {
            return [this, &guest](const Engine& by) { return answerOf(by.acquire(guest, disk, state)); };
        };
        return {
            {"arrival", [this] { migrate(); }, taking(there), true},
            {"arrival after the source has ended",
             [this] {
                 migrate();
                 qemu.reset();
             },
             taking(there), true},
            {"return to the source",
             [this] {
                 migrate();
                 arrived.reset();
             },
             taking(web), false},
            {"return of a guest that has arrived already",
             [this] {
                 migrate();
                 unit::demand(!engine.acquire(there, disk, state), "it does not arrive");
                 arrived.reset();
             },
             taking(web), false},
        };
    }

    static Answer tryCall(const End& end, const Engine& by) {
        try {
            return end.call(by);
        } catch (const Error& error) {
            return std::string("thrown: ") + error.what();
        }
    }

    void expectOneHasIt(const End& end) {
        // A refused source waits for half a second, in which nothing happens.
        if (end.arrives && qemu && (unit::isLongRun() || looks_++ % 8 == 0)) {
            EXPECT_NE(engine.acquire(web, disk, state), std::nullopt) << "the source runs, too";
        }
        if (end.arrives)
            qemu.reset();
        Guest& winner = end.arrives ? there : web;
        EXPECT_EQ(pauseAndRun(engine, winner, disk), "");
        // A successor keeps the mark that its source's state is used up. Where it was told that there is no source
        // (ENOENT of a file that is a mark) it has put none up: `owner` keeps the source out, too.
        std::string marks = marksOf(image);
        // Whoever looked at the leases of the source as it died has them an instant longer.
        for (int tries = 0; tries < 2000 && marks.find("handoff") != std::string::npos; tries++) {
            usleep(5000);
            marks = marksOf(image);
        }
        EXPECT_TRUE(marks == "exclusive owner" || (end.arrives && marks.starts_with("exclusive owner"))) << marks;
        unit::demand(!HasFailure(), "what is above does not hold");
    }

    void endAll() {
        arrived.reset();
        qemu.reset();
    }

    // Each takes two QEMUs of its own.
    int sampled() const { return unit::isLongRun() ? 1 : 3 * step(); }

    std::optional<Qemu> arrived;
    Guest there;

private:
    int looks_ = 0;
};

TEST_P(EngineMigrations, ASystemCallThatFailsAtTheirEndLeavesTheImageToOne) {
    for (const End& end : ends()) {
        int faults = unit::failAtEverySystemCall(
            entry(end.name), unit::isLongRun() ? 5 : 1, sampled(), end.scene, [&] { return end.call(engine); },
            [&](const unit::InjectedFault& fault) {
                SCOPED_TRACE(testing::Message() << end.name << ", " << fault.what << ", gave: " << fault.outcome);
                EXPECT_EQ(fault.outcome.find("CRASH"), std::string::npos);
                if (!fault.outcome.empty()) {
                    EXPECT_EQ(tryCall(end, engine), "") << "once more";
                }
                expectOneHasIt(end);
            });
        if (faults < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(faults, 0) << end.name;
    }
    endAll();
}

TEST_P(EngineMigrations, LibvirtdKilledAtAnySystemCallOfTheirEndIsHealedByTheNextOne) {
    for (const End& end : ends()) {
        end.scene();
        int deaths = unit::killAtEverySystemCall(
            [&] { unit::demand(end.call(engine).empty(), "refused"); },
            [&](int stop) {
                SCOPED_TRACE(testing::Message() << end.name << " killed at stop " << stop);
                EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return tryCall(end, fresh); }), "");
                expectOneHasIt(end);
                end.scene();
            },
            sampled());
        if (deaths < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(deaths, 0) << end.name;
        unit::countDeaths(entry(end.name), deaths);
    }
    endAll();
}

TEST_P(EngineMigrations, ADestinationThatFailsOrDiesAtItsStartLeavesTheSourceTheImage) {
    boot(disk);
    auto offer = [&] { state = engine.inquire(web, disk); };
    // What it left to QEMU, which is none here.
    auto firstFree = [](int from) { return os::Fd(fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, from)).get(); };
    const int in = firstFree(250), out = firstFree(in + 1);
    auto goesOn = [&](const std::string& when) {
        EXPECT_EQ(answerOf(engine.acquire(web, disk, engine.release(web, disk))), "") << when;
        EXPECT_EQ(leaseOf(*qemu, web, image), "exclusive") << when;
        unit::demand(!HasFailure(), "what is above does not hold");
    };
    int faults = unit::failAtEverySystemCall(
        entry("start of a destination"), unit::isLongRun() ? 5 : 1, step(), offer,
        [&] {
            Answer answer = answerOf(engine.registerGuest(web, disk));
            close(in);
            close(out);
            return answer;
        },
        [&](const unit::InjectedFault& fault) { goesOn(fault.what); });
    if (faults < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    offer();
    int deaths = unit::killAtEverySystemCall([&] { (void)engine.registerGuest(web, disk); },
                                             [&](int stop) {
                                                 goesOn("killed at stop " + std::to_string(stop));
                                                 offer();
                                             },
                                             step());
    EXPECT_GT(faults, 0);
    EXPECT_GT(deaths, 0);
    unit::countDeaths(entry("start of a destination"), deaths);
    endAll();
}

// Whoever looks at a QEMU's leases has copies of them, which outlive it, until he has looked. He stands still here in
// each of his system calls while the destination dies.
TEST_P(EngineMigrations, WhoLooksAtADestinationThatDiesKeepsItsSourceOutUntilHeHasLookedAndNoLonger) {
    const auto begin = [this] {
        migrate();
        unit::demand(!engine.acquire(there, disk, state), "it does not arrive");
    };
    begin();
    int stop = 0, refused = 0;
    int looks = unit::meddleAtEverySystemCall(
        [&] {
            try {
                (void)qemu::Vessel::retrieve(arrived->process(), there.uuid);
            } catch (const Error&) { // it has died
            }
        },
        [&] {
            arrived->kill();
            if (stop++ % (unit::isLongRun() ? 1 : 6) != 0)
                return; // the source waits for half a second
            Answer answer = answerOf(engine.acquire(web, disk, state));
            refused += !answer.empty();
            EXPECT_TRUE(answer.empty() || answer.find("try again") != std::string::npos) << answer;
        },
        [&](int, bool) {
            EXPECT_EQ(answerOf(engine.acquire(web, disk, state)), "") << "stop " << stop;
            EXPECT_EQ(pauseAndRun(engine, web, disk), "") << "stop " << stop;
            unit::demand(!HasFailure(), "what is above does not hold");
            begin();
        });
    if (looks < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(looks, 5);
    std::printf("%s: a destination died in each of %d system calls of a look, its source was refused %d times\n",
                GetParam().name, looks, refused);
    endAll();
}

INSTANTIATE_TEST_SUITE_P(Everywhere, EngineMigrations, unit::everywhere(), unit::nameOfWhere);

} // namespace
} // namespace leasehold

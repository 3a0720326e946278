// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// One guest's life as libvirt's calls: from the cold start to the end of its QEMU, with everything that stops it in
// between. The question is always the same: may a stranger have the image now?

#include "tests/plugin/libvirtd.hpp"

#include <algorithm>
#include <cctype>
#include <thread>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::plugin_test {
namespace {

constexpr long long kOwnerByte = 1LL << 62; // where leasehold's locks begin

class Lifecycle : public PluginTest {
protected:
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
    Libvirtd host_;
};

TEST_F(Lifecycle, ColdStartLeasesTheImageBeforeQemuRuns) {
    const Started started = host_.start(guest_, disks_);
    ASSERT_TRUE(granted(started));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(host_.acquire(guest_, started.pid(), disks_)));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Lifecycle, RefusalNamesTheImageTheOtherGuestItsHostAndWhatToDo) {
    const Started running = boot(host_, guest_, disks_);
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    EXPECT_TRUE(refused(stranger().start(rival_, disks_), kBusy,
                        {disk_, "'web'", "6c656173-6568-4f6c-8400-000000000001", "pid " + std::to_string(running.pid()),
                         name, "'rival'", "shut the other guest down"}));
}

TEST_F(Lifecycle, RefusedStartLeavesNothingBehind) {
    {
        const Started running = boot(host_, guest_, disks_);
        EXPECT_FALSE(stranger().start(rival_, disks_));
        EXPECT_FALSE(stranger().start(rival_, disks_));
    }
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Lifecycle, ImageIsFreeTheMomentQemuIsDead) {
    for (int round = 0; round < 20; round++) {
        Started running = boot(host_, guest_, disks_);
        ASSERT_FALSE(kernelLocksOn(disk_).empty());
        running.qemu->kill();
        ASSERT_TRUE(kernelLocksOn(disk_).empty()) << "round " << round;
    }
    EXPECT_TRUE(free(disk_));
}

TEST_F(Lifecycle, NothingIsLeftOpenInLibvirtd) {
    const std::size_t before = host_.descriptors();
    Started running = boot(host_, guest_, disks_);
    EXPECT_EQ(host_.descriptors(), before);
    const StateOutcome released = host_.release(guest_, running.pid(), disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_, {.state = released.state})));
    EXPECT_TRUE(granted(host_.inquire(guest_, running.pid(), disks_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_EQ(host_.descriptors(), before);
    EXPECT_FALSE(host_.acquire(guest_, running.pid(), {{path("missing")}}));
    running.qemu->kill();
    EXPECT_FALSE(host_.acquire(guest_, running.pid(), disks_));
    EXPECT_EQ(host_.descriptors(), before);
}

TEST_F(Lifecycle, LocksAreFarFromTheBytesOfQemuAndLibvirt) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_GE(locksOnByte(disk_, kOwnerByte), 1u);
    // QEMU's are 100-104 and 200-204, libvirt's 0 and 1.
    for (long long byte : {0, 1, 100, 101, 103, 200, 201, 203})
        EXPECT_EQ(locksOnByte(disk_, byte), 0u) << byte;
}

TEST_F(Lifecycle, ChildLabelsNoDescriptor) {
    const Started started = host_.start(guest_, disks_);
    EXPECT_EQ(started.fdForLabelling, -1);
}

// --paused: no Acquire before the resume, and that one without a state.
TEST_F(Lifecycle, GuestStartedPausedKeepsItsImageAndResumes) {
    const Started paused = host_.start(guest_, disks_);
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(host_.acquire(guest_, paused.pid(), disks_)));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Lifecycle, GuestStartedPausedMayBeReleasedBeforeItEverRan) {
    const Started paused = host_.start(guest_, disks_);
    const StateOutcome state = host_.release(guest_, paused.pid(), disks_);
    EXPECT_TRUE(granted(state));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(host_.acquire(guest_, paused.pid(), disks_, {.state = state.state})));
}

// Suspend: at the STOP event and after the QMP reply. The second finds our first string.
TEST_F(Lifecycle, SuspendReleasesTwiceAndKeepsTheImage) {
    const Started running = boot(host_, guest_, disks_);
    const StateOutcome first = host_.release(guest_, running.pid(), disks_);
    ASSERT_TRUE(granted(first));
    ASSERT_TRUE(first.state);
    const StateOutcome second = host_.release(guest_, running.pid(), disks_, {.state = first.state});
    ASSERT_TRUE(granted(second));
    EXPECT_EQ(second.state, first.state);
    EXPECT_TRUE(leased(disk_)) << "a suspended guest's image was given away";
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_, {.state = second.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Lifecycle, StateIsMadeOfLettersThatXmlDoesNotKnow) {
    const Started running = boot(host_, guest_, disks_);
    const StateOutcome state = host_.release(guest_, running.pid(), disks_);
    ASSERT_TRUE(state.state);
    EXPECT_FALSE(state.state->empty());
    EXPECT_TRUE(std::all_of(state.state->begin(), state.state->end(), [](unsigned char c) {
        return std::isalnum(c) || c == ':' || c == '.' || c == '_' || c == '-';
    })) << *state.state;
}

TEST_F(Lifecycle, ResumeWithoutStateWorksToo) {
    const Started running = boot(host_, guest_, disks_);
    host_.release(guest_, running.pid(), disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_)));
}

// I/O error, watchdog, guest panic: any number of them, Release once or twice.
TEST_F(Lifecycle, GuestMayBeStoppedAndResumedAsOftenAsItTakes) {
    const Started running = boot(host_, guest_, disks_);
    std::optional<std::string> state;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i <= round % 2; i++) {
            const StateOutcome outcome = host_.release(guest_, running.pid(), disks_, {.state = state});
            ASSERT_TRUE(granted(outcome));
            state = outcome.state;
        }
        ASSERT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_, {.state = state})));
        state.reset();
    }
    EXPECT_TRUE(leased(disk_));
    EXPECT_LE(kernelLocksOn(disk_).size(), 2u) << "locks pile up";
}

// Poweroff turned into a restart, or `cont` behind libvirt's back and then a resume.
TEST_F(Lifecycle, RestartAcquiresWithoutARelease) {
    const Started running = boot(host_, guest_, disks_);
    const std::size_t before = kernelLocksOn(disk_).size();
    for (int i = 0; i < 10; i++)
        EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_)));
    EXPECT_EQ(kernelLocksOn(disk_).size(), before);
    EXPECT_TRUE(leased(disk_));
}

// Suspend, destroy, start: the Acquire carries what the dead QEMU's Release gave.
TEST_F(Lifecycle, StaleStateOfADeadQemuIsNoObstacle) {
    Started first = boot(host_, guest_, disks_);
    const StateOutcome stale = host_.release(guest_, first.pid(), disks_);
    first.qemu->kill();
    const Started second = host_.start(guest_, disks_);
    ASSERT_TRUE(granted(second));
    EXPECT_TRUE(granted(host_.acquire(guest_, second.pid(), disks_, {.state = stale.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Lifecycle, SavedGuestFreesItsImageAndRestoresOnAnotherHost) {
    Started first = boot(host_, guest_, disks_);
    StateOutcome state = host_.release(guest_, first.pid(), disks_);
    EXPECT_TRUE(leased(disk_)) << "while QEMU writes the memory to the file";
    first.qemu->kill();
    EXPECT_TRUE(free(disk_));
    Libvirtd elsewhere;
    const Started second = elsewhere.start(guest_, disks_);
    ASSERT_TRUE(granted(second));
    EXPECT_TRUE(granted(elsewhere.acquire(guest_, second.pid(), disks_, {.state = state.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Lifecycle, FailedStartFreesTheImageWithItsQemu) {
    Started started = host_.start(guest_, disks_);
    started.qemu->kill(); // no Release: libvirt just kills
    EXPECT_TRUE(free(disk_));
    EXPECT_TRUE(granted(boot(host_, guest_, disks_)));
}

TEST_F(Lifecycle, SameGuestDoesNotStartASecondTimeElsewhere) {
    const Started running = boot(host_, guest_, disks_);
    Libvirtd elsewhere;
    EXPECT_TRUE(refused(elsewhere.start(guest_, disks_), kBusy,
                        {"'web'", disk_, "pid " + std::to_string(running.pid()), "already runs on this host"}));
}

// Its Register joins, as a migration's would; but nothing ever lets it run.
TEST_F(Lifecycle, SuspendedGuestStartedElsewhereNeverRuns) {
    const Started suspended = boot(host_, guest_, disks_);
    const StateOutcome state = host_.release(guest_, suspended.pid(), disks_);
    Libvirtd elsewhere;
    const Started second = elsewhere.start(guest_, disks_);
    ASSERT_TRUE(granted(second));
    EXPECT_TRUE(refused(elsewhere.acquire(guest_, second.pid(), disks_), kBusy, {"'web'", disk_}));
    EXPECT_TRUE(granted(host_.acquire(guest_, suspended.pid(), disks_, {.state = state.state})));
}

TEST_F(Lifecycle, TwoColdStartsAtOnceLetExactlyOneWin) {
    Libvirtd hosts[4];
    for (int round = 0; round < 15; round++) {
        std::vector<Started> starts(4);
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; i++)
            threads.emplace_back([&, i] { starts[i] = hosts[i].start(support::makeGuest("guest", 10 + i), disks_); });
        for (std::thread& thread : threads)
            thread.join();
        ASSERT_EQ(std::count_if(starts.begin(), starts.end(), [](const Started& start) { return start.ok; }), 1);
    }
}

TEST_F(Lifecycle, TwoColdStartsWithTheSameTwoImagesInOtherOrderLetExactlyOneWin) {
    Libvirtd hosts[2];
    const std::string second = image("second.img");
    const std::vector<Disk> orders[2] = {{{disk_}, {second}}, {{second}, {disk_}}};
    for (int round = 0; round < 15; round++) {
        std::vector<Started> starts(2);
        std::vector<std::thread> threads;
        for (int i = 0; i < 2; i++)
            threads.emplace_back(
                [&, i] { starts[i] = hosts[i].start(support::makeGuest("guest", 10 + i), orders[i]); });
        for (std::thread& thread : threads)
            thread.join();
        ASSERT_NE(starts[0].ok, starts[1].ok) << starts[0].message() << " / " << starts[1].message();
    }
}

// A guest from before leasehold was enabled: its QEMU has no vessel.
class Unprotected : public PluginTest {
protected:
    // A QEMU that no plugin has ever seen: leasehold knows nothing of this guest's disks when it is started.
    Started startUnprotected() {
        Libvirtd other({.config = "auto_disk_leases = 0\nrequire_lease_for_disks = 0\n"});
        return other.start(support::makeGuest("web", 12345), {{disk_}});
    }
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
};

TEST_F(Unprotected, MayBeSuspended) {
    Libvirtd host;
    const Started running = startUnprotected();
    const StateOutcome state = host.release(guest_, running.pid(), disks_);
    EXPECT_TRUE(granted(state));
    EXPECT_FALSE(state.state) << *state.state;
    EXPECT_TRUE(granted(host.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(granted(host.inquire(guest_, running.pid(), disks_)));
}

TEST_F(Unprotected, IsRefusedItsResumeAndToldWhatToDo) {
    Libvirtd host;
    const Started running = startUnprotected();
    const Outcome resume = host.acquire(guest_, running.pid(), disks_);
    EXPECT_TRUE(refused(resume, kBusy,
                        {"'web'", "without leasehold", "shut it down and start it again",
                         "guests_without_lease = \"allow\"", "qemu-leasehold.conf"}));
}

TEST_F(Unprotected, ResumesWhereTheOptionAllowsIt) {
    Libvirtd host({.config = "guests_without_lease = \"allow\"\n"});
    const Started running = startUnprotected();
    EXPECT_TRUE(granted(host.acquire(guest_, running.pid(), disks_)));
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Unprotected, OptionDoesNotWeakenGuestsThatHaveLeases) {
    Libvirtd host({.config = "guests_without_lease = \"allow\"\n"});
    const Started running = boot(host, guest_, disks_);
    EXPECT_TRUE(leased(disk_));
    EXPECT_FALSE(host.acquire(rival_, boot(host, rival_, {}).pid(), disks_));
}

TEST_F(Unprotected, GuestWithDisksButNoLeaseIsRefusedWhereLeasesAreRequired) {
    Libvirtd host({.config = "auto_disk_leases = 0\n"});
    EXPECT_TRUE(refused(host.start(guest_, disks_), kUnsupported,
                        {"'web'", "auto_disk_leases = 1", "require_lease_for_disks = 0", "qemu-leasehold.conf"}));
    EXPECT_TRUE(granted(host.start(guest_, {{disk_, LOCK_RESOURCE_READONLY}})));
    EXPECT_TRUE(granted(host.start(guest_, {{disk_, LOCK_RESOURCE_SHARED}})));
    EXPECT_TRUE(granted(host.start(guest_, {})));
}

} // namespace
} // namespace leasehold::plugin_test

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// libvirt's calls of a migration, between two processes that play the libvirtds of two hosts. At every step a third
// party tries to get the image: DESIGN.md, "The promises", knows no unprotected moment.

#include "tests/plugin/libvirtd.hpp"

#include <chrono>
#include <future>

namespace leasehold::plugin_test {
namespace {

class Migration : public PluginTest {
protected:
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
    Libvirtd source_, target_;
};

TEST_F(Migration, LiveMigrationNeverLeavesTheImageToAStranger) {
    Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    ASSERT_TRUE(granted(cookie));
    ASSERT_TRUE(cookie.state);
    EXPECT_TRUE(leased(disk_)) << "Begin";
    const Started there = target_.start(guest_, disks_);
    ASSERT_TRUE(granted(there));
    EXPECT_TRUE(leased(disk_)) << "Prepare";
    const StateOutcome stopped = source_.release(guest_, here.pid(), disks_);
    ASSERT_TRUE(granted(stopped));
    EXPECT_TRUE(leased(disk_)) << "STOP: the source's QEMU still drains";
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = cookie.state})));
    EXPECT_TRUE(leased(disk_)) << "Finish";
    here.qemu->kill();
    EXPECT_TRUE(leased(disk_)) << "Confirm";
}

TEST_F(Migration, OnceTakenOverTheSourceNeverResumes) {
    Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    const StateOutcome stopped = source_.release(guest_, here.pid(), disks_);
    ASSERT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = cookie.state})));
    EXPECT_TRUE(
        refused(source_.acquire(guest_, here.pid(), disks_, {.state = stopped.state}), kBusy, {"'web'", disk_}));
    EXPECT_TRUE(refused(source_.acquire(guest_, here.pid(), disks_), kBusy, {"'web'", disk_}));
    // And after a pause of the guest over there, which puts a handoff up again.
    const StateOutcome paused = target_.release(guest_, there.pid(), disks_);
    EXPECT_TRUE(refused(source_.acquire(guest_, here.pid(), disks_, {.state = stopped.state}), kBusy,
                        {"'web'", disk_, "pid " + std::to_string(there.pid())}));
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = paused.state})));
}

// Its guest wants to go on to a third host while the first host's old QEMU is still there, with a state that was good
// once: with two others present nobody could tell whose memory is the newest.
TEST_F(Migration, NextMigrationHasToWaitForTheEndOfTheOldSource) {
    Libvirtd third;
    Started first = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, first.pid(), disks_);
    const Started second = target_.start(guest_, disks_);
    const StateOutcome stopped = source_.release(guest_, first.pid(), disks_);
    ASSERT_TRUE(granted(target_.acquire(guest_, second.pid(), disks_, {.state = cookie.state})));
    const StateOutcome next = target_.inquire(guest_, second.pid(), disks_);
    EXPECT_TRUE(refused(third.start(guest_, disks_), kBusy, {"'web'", disk_, "pid " + std::to_string(first.pid())}));
    EXPECT_TRUE(refused(source_.acquire(guest_, first.pid(), disks_, {.state = stopped.state}), kBusy,
                        {"'web'", disk_, "taken over"}));
    first.qemu->kill();
    const Started last = third.start(guest_, disks_);
    ASSERT_TRUE(granted(target_.release(guest_, second.pid(), disks_)));
    EXPECT_TRUE(granted(third.acquire(guest_, last.pid(), disks_, {.state = next.state})));
}

// libvirt makes no call on the source when a suspended guest migrates.
TEST_F(Migration, SuspendedGuestTakesADiskAlongThatItGotMeanwhile) {
    const Disk added{image("added.img")};
    const std::vector<Disk> all{disks_[0], added};
    Started here = boot(source_, guest_, disks_);
    const StateOutcome stopped = source_.release(guest_, here.pid(), disks_);
    ASSERT_TRUE(granted(source_.acquire(guest_, here.pid(), std::vector<Disk>{added})));
    const Started there = target_.start(guest_, all);
    EXPECT_TRUE(granted(there));
    here.qemu->kill();
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), all, {.state = stopped.state})));
}

TEST_F(Migration, TargetDoesNotRunBeforeTheSourceHasStopped) {
    Libvirtd impatient({.config = "handoff_wait = 0\n"});
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = impatient.start(guest_, disks_);
    EXPECT_TRUE(refused(impatient.acquire(guest_, there.pid(), disks_, {.state = cookie.state}), kBusy, {"'web'"}));
    EXPECT_TRUE(granted(source_.acquire(guest_, here.pid(), disks_))) << "the source was disturbed";
}

TEST_F(Migration, TargetWaitsForTheReleaseThatIsUnderWay) {
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    auto taking = std::async(std::launch::async,
                             [&] { return target_.acquire(guest_, there.pid(), disks_, {.state = cookie.state}); });
    EXPECT_EQ(taking.wait_for(std::chrono::milliseconds(30)), std::future_status::timeout);
    EXPECT_TRUE(granted(source_.release(guest_, here.pid(), disks_)));
    EXPECT_TRUE(granted(taking.get()));
}

TEST_F(Migration, WaitEndsWhenTheTargetsQemuDies) {
    Libvirtd patient({.config = "handoff_wait = 60\n"});
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    Started there = patient.start(guest_, disks_);
    auto taking = std::async(std::launch::async,
                             [&] { return patient.acquire(guest_, there.pid(), disks_, {.state = cookie.state}); });
    EXPECT_EQ(taking.wait_for(std::chrono::milliseconds(30)), std::future_status::timeout);
    there.qemu->kill();
    ASSERT_EQ(taking.wait_for(std::chrono::seconds(60)), std::future_status::ready);
    EXPECT_FALSE(taking.get());
    EXPECT_TRUE(granted(source_.acquire(guest_, here.pid(), disks_)));
}

// The target is killed before Finish: no call tells us.
TEST_F(Migration, AbortedMigrationLeavesTheGuestWhereItWas) {
    Started here = boot(source_, guest_, disks_);
    source_.inquire(guest_, here.pid(), disks_);
    {
        const Started there = target_.start(guest_, disks_);
        EXPECT_TRUE(granted(there));
    }
    EXPECT_TRUE(leased(disk_));
    // It lives on: suspended and resumed it still has the image.
    const StateOutcome state = source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(leased(disk_));
    EXPECT_EQ(locksOnByte(disk_, 1LL << 62), 1u) << "the owner mark was given up, but nobody is there to take it";
    EXPECT_TRUE(granted(source_.acquire(guest_, here.pid(), disks_, {.state = state.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Migration, SucceedsAfterOneThatWasAborted) {
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome first = source_.inquire(guest_, here.pid(), disks_);
    EXPECT_TRUE(granted(target_.start(guest_, disks_)));
    const StateOutcome second = source_.inquire(guest_, here.pid(), disks_);
    EXPECT_NE(first.state, second.state);
    const Started there = target_.start(guest_, disks_);
    source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = second.state})));
}

TEST_F(Migration, StateOfAnAbortedMigrationIsWorthNothing) {
    Libvirtd impatient({.config = "handoff_wait = 0\n"});
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome first = source_.inquire(guest_, here.pid(), disks_);
    EXPECT_TRUE(granted(target_.start(guest_, disks_)));
    source_.inquire(guest_, here.pid(), disks_);
    const Started there = impatient.start(guest_, disks_);
    source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(refused(impatient.acquire(guest_, there.pid(), disks_, {.state = first.state}), kBusy, {"'web'"}));
}

// The target could not run the guest: the source resumes with what its Release gave.
TEST_F(Migration, SourceResumesWhenTheTargetFails) {
    const Started here = boot(source_, guest_, disks_);
    source_.inquire(guest_, here.pid(), disks_);
    Started there = target_.start(guest_, disks_);
    const StateOutcome stopped = source_.release(guest_, here.pid(), disks_);
    there.qemu->kill();
    EXPECT_TRUE(granted(source_.acquire(guest_, here.pid(), disks_, {.state = stopped.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Migration, SourceResumesWhileTheFailedTargetIsStillThere) {
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    const StateOutcome stopped = source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(granted(source_.acquire(guest_, here.pid(), disks_, {.state = stopped.state})));
    Libvirtd impatient({.config = "handoff_wait = 0\n"});
    EXPECT_TRUE(refused(impatient.acquire(guest_, there.pid(), disks_, {.state = cookie.state}), kBusy, {"'web'"}))
        << "both run";
}

TEST_F(Migration, TargetWithoutTheStateIsRefused) {
    const Started here = boot(source_, guest_, disks_);
    source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(refused(target_.acquire(guest_, there.pid(), disks_), kBusy, {"'web'", disk_}));
}

// No Inquire, no Release; the target acquires when the source's QEMU is dead.
TEST_F(Migration, SuspendedGuestMigratesAndResumesThere) {
    Started here = boot(source_, guest_, disks_);
    const StateOutcome suspended = source_.release(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    ASSERT_TRUE(granted(there));
    EXPECT_TRUE(leased(disk_));
    here.qemu->kill();
    EXPECT_TRUE(leased(disk_)) << "the suspended guest lost its image on the way";
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = suspended.state})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Migration, GuestGoesThereAndBackAgain) {
    Started here = boot(source_, guest_, disks_);
    Libvirtd *from = &source_, *to = &target_;
    for (int round = 0; round < 6; round++) {
        const StateOutcome cookie = from->inquire(guest_, here.pid(), disks_);
        Started there = to->start(guest_, disks_);
        ASSERT_TRUE(granted(there)) << round;
        ASSERT_TRUE(granted(from->release(guest_, here.pid(), disks_)));
        ASSERT_TRUE(granted(to->acquire(guest_, there.pid(), disks_, {.state = cookie.state}))) << round;
        ASSERT_TRUE(leased(disk_));
        here.qemu->kill();
        here = std::move(there);
        std::swap(from, to);
    }
    here.qemu->kill();
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Migration, ManyDisksOfAllKindsMoveTogether) {
    const std::string shared = image("shared.img"), cd = image("cd.iso");
    std::vector<Disk> disks = images(20);
    disks.push_back({shared, LOCK_RESOURCE_SHARED});
    disks.push_back({cd, LOCK_RESOURCE_READONLY});
    Started here = boot(source_, guest_, disks);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks);
    const Started there = target_.start(guest_, disks);
    ASSERT_TRUE(granted(there));
    ASSERT_TRUE(granted(source_.release(guest_, here.pid(), disks)));
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), disks, {.state = cookie.state})));
    here.qemu->kill();
    EXPECT_TRUE(leased(disks[0].path));
    EXPECT_TRUE(leased(disks[19].path));
    EXPECT_TRUE(free(shared, LOCK_RESOURCE_SHARED));
    EXPECT_TRUE(leased(shared));
    EXPECT_TRUE(free(cd, LOCK_RESOURCE_READONLY));
    EXPECT_TRUE(leased(cd));
}

TEST_F(Migration, GuestWithoutDisksMigrates) {
    const Started here = boot(source_, guest_, {});
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), {});
    const Started there = target_.start(guest_, {});
    EXPECT_TRUE(granted(source_.release(guest_, here.pid(), {})));
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), {}, {.state = cookie.state})));
}

TEST_F(Migration, DiskMayBeHotPluggedAfterTheMigration) {
    Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, disks_);
    source_.release(guest_, here.pid(), disks_);
    ASSERT_TRUE(granted(target_.acquire(guest_, there.pid(), disks_, {.state = cookie.state})));
    here.qemu->kill();
    const std::string next = image("next.img");
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), {{next}})));
    EXPECT_TRUE(leased(next));
    EXPECT_TRUE(granted(target_.detach(guest_, there.pid(), disks_)));
    EXPECT_TRUE(free(disk_));
}

// --copy-storage-*: the images are different files, and NBD writes to the target's from the start.
TEST_F(Migration, CopiedImagesAreLeasedOnTheTargetFromRegisterOn) {
    const std::vector<Disk> copy{{image("copy.img")}};
    const Started here = boot(source_, guest_, disks_);
    const StateOutcome cookie = source_.inquire(guest_, here.pid(), disks_);
    const Started there = target_.start(guest_, copy);
    EXPECT_TRUE(leased(copy[0].path));
    source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(target_.acquire(guest_, there.pid(), copy, {.state = cookie.state})));
    EXPECT_TRUE(leased(copy[0].path));
}

TEST_F(Migration, RefusedWhileTheOtherHostStartsAnotherGuestOnTheImage) {
    const Started rival = boot(target_, rival_, disks_);
    EXPECT_TRUE(refused(source_.start(guest_, disks_), kBusy, {"'rival'", "'web'"}));
    EXPECT_TRUE(granted(target_.acquire(rival_, rival.pid(), disks_)));
}

TEST_F(Migration, StateOfAnotherGuestOpensNothing) {
    const Guest mail = support::makeGuest("mail", 2);
    const std::vector<Disk> otherDisks{{image("mail.img")}};
    const Started here = boot(source_, guest_, disks_), other = boot(source_, mail, otherDisks);
    source_.inquire(guest_, here.pid(), disks_);
    const StateOutcome foreign = source_.inquire(mail, other.pid(), otherDisks);
    const Started there = target_.start(guest_, disks_);
    source_.release(guest_, here.pid(), disks_);
    EXPECT_TRUE(refused(target_.acquire(guest_, there.pid(), disks_, {.state = foreign.state}), kBusy, {"'web'"}));
}

} // namespace
} // namespace leasehold::plugin_test

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// What shows that a lease was lost. What each storage shows is in tests/lab.

#include "core/lease/byte_range.hpp"
#include "core/loss.hpp"
#include "tests/support/unit_support.hpp"

#include <atomic>
#include <thread>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold {
namespace {

using lease::Mark;
using lease::MarkKind;

class Loss : public unit::LeavesNoDescriptor {
protected:
    // An exclusive lease in a lease file, as if on storage that may forget it.
    qemu::StoredLease store(const std::string& path) {
        qemu::StoredLease stored;
        stored.lease = os::openFile(path, O_RDWR);
        stored.leaseFile = os::identify(stored.lease.get(), path);
        stored.file = {stored.leaseFile.device, stored.leaseFile.inode + 1};
        stored.image = os::openFile(path, O_RDONLY);
        stored.mode = lease::Mode::exclusive;
        stored.writable = stored.remote = true;
        stored.path = path;
        return stored;
    }

    static void own(const qemu::StoredLease& stored) {
        lease::ByteRangeMedium medium(stored.lease.get(), true, stored.path);
        ASSERT_EQ(medium.tryPlace({MarkKind::owner, 0, 0}, os::LockType::write), os::LockOutcome::granted);
        medium.setNote({.owner = true});
    }

    unit::TempDir dir{"/var/tmp"}; // a tmpfs knows no O_DIRECT before Linux 6.6
    lease::Incarnation self{1, 2};
};

TEST_F(Loss, ALeaseThatIsHeldIsNotLost) {
    qemu::StoredLease stored = store(dir.file("lease"));
    own(stored);
    EXPECT_EQ(findLossOrTaker(stored, self), std::nullopt);
    EXPECT_EQ(fcntl(stored.lease.get(), F_GETFL) & O_DIRECT, 0) << "what writes the owner record is not aligned";
}

TEST_F(Loss, ALeaseFileThatWasRemovedIsALoss) {
    qemu::StoredLease stored = store(dir.file("lease"));
    own(stored);
    ASSERT_EQ(unlink(dir.path("lease").c_str()), 0);
    EXPECT_EQ(findLoss(stored, self), "was deleted from its lockspace");
}

TEST_F(Loss, WhoFindsAnotherOwnerHasLostIt) {
    qemu::StoredLease stored = store(dir.file("lease")), thief = store(dir.path("lease"));
    // The storage forgot our mark; the note is ours and still there.
    lease::ByteRangeMedium(stored.lease.get(), true, stored.path).setNote({.owner = true});
    own(thief);
    EXPECT_EQ(findLossOrTaker(stored, self), "has gone to another guest");
    EXPECT_EQ(findLoss(stored, self), std::nullopt) << "whoever is about to run asks the lock itself";
}

TEST_F(Loss, WhoHasHandedItOverHasNotLostIt) {
    qemu::StoredLease stored = store(dir.file("lease")), successor = store(dir.path("lease"));
    own(successor);
    EXPECT_EQ(findLossOrTaker(stored, self), std::nullopt);
}

TEST_F(Loss, WhoIsHandingItOverMeanwhileHasNotLostIt) {
    qemu::StoredLease stored = store(dir.file("lease")), next = store(dir.path("lease"));
    lease::ByteRangeMedium mine(stored.lease.get(), true, stored.path), theirs(next.lease.get(), true, next.path);
    const Mark owner{MarkKind::owner, 0, 0};
    auto handOver = [&] {
        mine.setNote({});
        mine.remove(owner);
        ASSERT_EQ(theirs.tryPlace(owner, os::LockType::write), os::LockOutcome::granted);
    };
    own(stored);
    int stops = unit::meddleAtEverySystemCall(
        [&] { unit::demand(!findLossOrTaker(stored, self), "it counts as taken"); }, handOver,
        [&](int stop, bool good) {
            EXPECT_TRUE(good) << "handed over at stop " << stop;
            theirs.remove(owner);
            own(stored);
        });
    if (stops < 0)
        GTEST_SKIP() << "may not trace here";
    EXPECT_GT(stops, 3);
}

TEST_F(Loss, TwoThatAskAtOnceBothReadPastTheCacheAndLeaveTheDescriptionAsItWas) {
    qemu::StoredLease stored = store(dir.file("lease"));
    own(stored);
    std::atomic<int> wrong{0};
    auto ask = [&] {
        for (int i = 0; i < 2000; i++)
            if (unit::errorOf([&] { wrong += findLossOrTaker(stored, self).has_value(); }) != "")
                wrong++;
    };
    std::thread one(ask), two(ask);
    one.join();
    two.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(fcntl(stored.lease.get(), F_GETFL) & O_DIRECT, 0);
}

} // namespace
} // namespace leasehold

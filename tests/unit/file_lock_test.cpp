// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/os/file_lock.hpp"
#include "tests/support/unit_support.hpp"

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::os {
namespace {

using unit::Child;
using unit::isFree;
using unit::Line;

constexpr Range kByte{std::int64_t{1} << 62, 1};

class OfdLock : public unit::LeavesNoDescriptor {
protected:
    Fd open(int flags = O_RDWR) const { return openFile(image, flags); }
    LockOutcome lock(const Fd& fd, LockType type = LockType::write, Range range = kByte) const {
        return tryLock(fd.get(), type, range, image);
    }

    unit::TempDir dir;
    std::string image = dir.file("disk.img");
};

TEST_F(OfdLock, StopsAnotherProcessAndEndsWithIt) {
    Child holder([&](Line& line) {
        Fd fd = open();
        unit::demand(lock(fd) == LockOutcome::granted, "the first lock was refused");
        line.say();
        line.hear();
    });
    holder.line().hear();
    Fd fd = open();
    EXPECT_EQ(lock(fd), LockOutcome::contended);
    holder.kill();
    EXPECT_EQ(lock(fd), LockOutcome::granted);
}

TEST_F(OfdLock, SurvivesClosingAnUnrelatedDescriptor) {
    Fd fd = open();
    ASSERT_EQ(lock(fd), LockOutcome::granted);
    open().reset(); // ends every POSIX lock of the process on the file
    EXPECT_FALSE(isFree(image, kByte.start));
}

TEST_F(OfdLock, BelongsToTheDescriptionAndEndsWithItsLastDuplicate) {
    Fd fd = open();
    ASSERT_EQ(lock(fd), LockOutcome::granted);
    Fd copy(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
    EXPECT_EQ(lock(copy), LockOutcome::granted) << "a duplicate is the same holder";
    fd.reset();
    EXPECT_FALSE(isFree(image, kByte.start));
    copy.reset();
    EXPECT_TRUE(isFree(image, kByte.start));
}

TEST_F(OfdLock, IsKeptByACopyInAnotherProcess) {
    Fd fd = open();
    ASSERT_EQ(lock(fd), LockOutcome::granted);
    Child heir([](Line& line) { line.hear(); });
    fd.reset();
    EXPECT_FALSE(isFree(image, kByte.start));
    heir.kill();
    EXPECT_TRUE(isFree(image, kByte.start));
}

TEST_F(OfdLock, ContendsWithAnotherDescriptionOfTheSameProcess) {
    Fd one = open(), other = open();
    ASSERT_EQ(lock(one), LockOutcome::granted);
    EXPECT_EQ(lock(other), LockOutcome::contended);
    unlock(one.get(), kByte, image);
    EXPECT_EQ(lock(other), LockOutcome::granted);
}

TEST_F(OfdLock, IsContendedByAPosixLockToo) {
    Child holder([&](Line& line) {
        Fd fd = open();
        struct flock posix {};
        posix.l_type = F_WRLCK;
        posix.l_start = kByte.start;
        posix.l_len = 1;
        unit::demand(fcntl(fd.get(), F_SETLK, &posix) == 0, "the POSIX lock was refused");
        line.say();
        line.hear();
    });
    holder.line().hear();
    Fd fd = open();
    EXPECT_EQ(lock(fd), LockOutcome::contended);
    auto found = findConflict(fd.get(), LockType::write, kByte, image);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->pid, holder.pid());
}

TEST_F(OfdLock, LetsReadersShareAndNoWriterIn) {
    Fd one = open(), other = open(), writer = open();
    EXPECT_EQ(lock(one, LockType::read), LockOutcome::granted);
    EXPECT_EQ(lock(other, LockType::read), LockOutcome::granted);
    EXPECT_EQ(lock(writer, LockType::write), LockOutcome::contended);
}

TEST_F(OfdLock, ThatCannotBeUpgradedStaysAReadLock) {
    Fd one = open(), other = open();
    ASSERT_EQ(lock(one, LockType::read), LockOutcome::granted);
    ASSERT_EQ(lock(other, LockType::read), LockOutcome::granted);
    EXPECT_EQ(lock(one, LockType::write), LockOutcome::contended);
    other.reset();
    EXPECT_FALSE(isFree(image, kByte.start)) << "the refused upgrade has cost the read lock";
    EXPECT_EQ(lock(one, LockType::write), LockOutcome::granted);
}

// A rival in a second process tries to get between the two halves that an upgrade or downgrade must not have.
TEST_F(OfdLock, ChangesItsTypeWithoutAGapForARival) {
    Child rival([&](Line& line) {
        Fd fd = open();
        line.hear();
        line.say();
        for (;;)
            if (lock(fd) == LockOutcome::granted)
                throw std::runtime_error("a rival got the lock during a change of its type");
    });
    Fd fd = open();
    ASSERT_EQ(lock(fd), LockOutcome::granted);
    rival.line().say();
    rival.line().hear();
    for (int i = 0; i < 5'000; i++)
        ASSERT_EQ(lock(fd, i % 2 ? LockType::write : LockType::read), LockOutcome::granted);
    EXPECT_FALSE(Process(rival.pid()).diedWithin(std::chrono::milliseconds(0)));
}

TEST_F(OfdLock, ForWritingOnAReadOnlyDescriptorIsAnErrorNotContention) {
    Fd fd = open(O_RDONLY);
    EXPECT_EQ(lock(fd, LockType::read), LockOutcome::granted);
    try {
        (void)lock(fd, LockType::write);
        FAIL() << "locked for writing through a read-only descriptor";
    } catch (const SystemError& error) {
        EXPECT_EQ(error.error(), EBADF);
        EXPECT_NE(std::string(error.what()).find(image), std::string::npos);
    }
}

TEST_F(OfdLock, WhereThereAreNoneIsAnErrorNotContention) {
    Fd path = openFile(image, O_PATH);
    EXPECT_THROW((void)tryLock(path.get(), LockType::read, kByte, image), SystemError);
    EXPECT_THROW(unlock(path.get(), kByte, image), SystemError);
    EXPECT_THROW(findConflict(path.get(), LockType::read, kByte, image), SystemError);
}

TEST_F(OfdLock, IsFoundWithTypeAndRangeByOthersAndNotByItsOwnHolder) {
    Fd holder = open(), other = open();
    ASSERT_EQ(lock(holder, LockType::write, {kByte.start, 3}), LockOutcome::granted);
    EXPECT_EQ(findConflict(holder.get(), LockType::write, {0, 0}, image), std::nullopt);
    auto found = findConflict(other.get(), LockType::write, {0, 0}, image);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->type, LockType::write);
    EXPECT_EQ(found->range, (Range{kByte.start, 3}));
    EXPECT_EQ(found->pid, -1);
    EXPECT_EQ(findConflict(other.get(), LockType::write, {0, 100}, image), std::nullopt);
}

TEST_F(OfdLock, OfOnesOwnIsInTheDescriptorsInformation) {
    Fd holder = open(), other = open();
    EXPECT_TRUE(inspectOwnLocks(holder.get()).empty());
    ASSERT_EQ(lock(other, LockType::write, {7, 1}), LockOutcome::granted);
    ASSERT_EQ(lock(holder, LockType::read, {100, 2}), LockOutcome::granted);
    ASSERT_EQ(lock(holder, LockType::write, {kByte.start, 0}), LockOutcome::granted);
    auto own = inspectOwnLocks(holder.get());
    ASSERT_EQ(own.size(), 2u) << "only those of this description";
    EXPECT_EQ(own[0].type, LockType::read);
    EXPECT_EQ(own[0].range, (Range{100, 2}));
    EXPECT_EQ(own[1].type, LockType::write);
    EXPECT_EQ(own[1].range, (Range{kByte.start, 0})) << "to the end of the file";
}

TEST(FdinfoLocks, AreReadFromTheTextOfTheKernel) {
    auto locks = parseFdinfoLocks("pos:\t0\nflags:\t02100002\nmnt_id:\t25\nino:\t131\n"
                                  "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:131 4611686018427387904 "
                                  "4611686018427387904\n"
                                  "lock:\t2: POSIX  ADVISORY  WRITE 12 fe:00:131 5 6\n"
                                  "lock:\t3: FLOCK  ADVISORY  WRITE 12 fe:00:131 0 EOF\n"
                                  "lock:\t4: OFDLCK  ADVISORY  READ -1 fe:00:131 100 EOF\n");
    ASSERT_EQ(locks.size(), 3u) << "a flock has no bytes; NFS calls our kind POSIX";
    EXPECT_EQ(locks[0].type, LockType::write);
    EXPECT_EQ(locks[0].range, kByte);
    EXPECT_EQ(locks[1].range, (Range{5, 2}));
    EXPECT_EQ(locks[2].type, LockType::read);
    EXPECT_EQ(locks[2].range, (Range{100, 0}));
}

TEST(FdinfoLocks, AreNoneInGarbage) {
    for (const char* text : {"", "lock:", "lock:\n", "lock:\t1: OFDLCK", "lock:\t1: OFDLCK  ADVISORY  WRITE -1 x y z\n",
                             "\nlock:\nlock:\nlock:\n",
                             // no bytes that a lock can have
                             "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:131 -9 9223372036854775807\n",
                             "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:131 6 5\n",
                             "lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:131 5 99999999999999999999\n"})
        EXPECT_TRUE(parseFdinfoLocks(text).empty()) << text;
}

} // namespace
} // namespace leasehold::os

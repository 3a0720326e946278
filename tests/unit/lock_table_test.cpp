// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Lines of /proc/locks as kernels print them, and lines that none should; then the locks of a real second process.

#include "core/os/lock_table.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold::os {
namespace {

using unit::Child;
using unit::Line;

TEST(LockTable, EveryKindOfLockIsRead) {
    struct Row {
        const char* line;
        TableLock lock;
    };
    const std::uint64_t disk = makedev(0xfe, 0), nfs = makedev(0, 0x2d);
    const Row rows[] = {
        {"1: POSIX  ADVISORY  WRITE 24191 fe:00:10953723 1 1",
         {LockClass::posix, LockType::write, {1, 1}, 24191, false, disk, 10953723}},
        {"1: -> POSIX  ADVISORY  WRITE 24233 fe:00:10953723 0 EOF",
         {LockClass::posix, LockType::write, {0, 0}, 24233, true, disk, 10953723}},
        {"12:     -> FLOCK  ADVISORY  READ 7 00:2d:5 0 EOF",
         {LockClass::flock, LockType::read, {0, 0}, 7, true, nfs, 5}},
        {"3: OFDLCK ADVISORY  READ -1 fe:00:77 100 101",
         {LockClass::ofd, LockType::read, {100, 2}, -1, false, disk, 77}},
        {"lock:\t3: OFDLCK  ADVISORY  WRITE -1 fe:00:77 4611686018427387904 4611686018427387904",
         {LockClass::ofd, LockType::write, {INT64_C(1) << 62, 1}, -1, false, disk, 77}},
        {"1: LEASE  ACTIVE    READ 24191 fe:00:77 0 EOF",
         {LockClass::lease, LockType::read, {0, 0}, 24191, false, disk, 77}},
        {"1: LEASE  BREAKING  UNLCK 24191 fe:00:77 0 EOF",
         {LockClass::lease, LockType::write, {0, 0}, 24191, false, disk, 77}},
        {"1: DELEG  ACTIVE    WRITE 9 fe:00:77 0 EOF",
         {LockClass::delegation, LockType::write, {0, 0}, 9, false, disk, 77}},
        {"1: OFDLCK ADVISORY  WRITE -1 fe:00:18446744073709551615 0 9223372036854775806",
         {LockClass::ofd, LockType::write, {0, INT64_MAX}, -1, false, disk, UINT64_MAX}},
    };
    for (const Row& row : rows)
        EXPECT_EQ(parseLockTable(row.line), std::vector{row.lock}) << row.line;
}

TEST(LockTable, LinesThatAreNoLocksArePassedOver) {
    for (const char* line : {"",
                             "\n\n",
                             "lock:",
                             "1:",
                             "1: ->",
                             "1: POSIX",
                             "1: POSIX  ADVISORY  WRITE",
                             "1: UNKNOWN UNKNOWN UNKNOWN",
                             "1: POSIX  ADVISORY  WRITE 1 <none>:0 0 EOF",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00 0 EOF",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00:x 0 EOF",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00:7 0",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00:7 -3 5",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00:7 9 5",
                             "1: POSIX  ADVISORY  WRITE 1 fe:00:7 0 99999999999999999999",
                             "1: POSIX  ADVISORY  MAYBE 1 fe:00:7 0 EOF",
                             "1: POSIX  ADVISORY  WRITE 99999999999 fe:00:7 0 EOF",
                             "pos:\t0",
                             "flags:\t02100002",
                             "x POSIX"})
        EXPECT_TRUE(parseLockTable(line).empty()) << line;
}

TEST(LockTable, ASpoiledLineDoesNotHideTheNext) {
    EXPECT_EQ(parseLockTable("nonsense\n1: FLOCK  ADVISORY  WRITE 5 fe:00:7 0 EOF\n1: FLOCK\n").size(), 1u);
}

TEST(LockTable, RangesOverlapUpToTheEndOfTheAddressSpace) {
    EXPECT_TRUE(overlap({0, 0}, {INT64_MAX, 1}));
    EXPECT_TRUE(overlap({100, 4}, {103, 1}));
    EXPECT_FALSE(overlap({100, 4}, {104, 0}));
    EXPECT_FALSE(overlap({104, 1}, {100, 4}));
}

class OpenersOfAFile : public unit::LeavesNoDescriptor {
protected:
    // The child of the test that has the file open; nobody else can.
    std::optional<Opener> find(pid_t pid) {
        Fd fd = openFile(image, O_RDONLY);
        for (Opener& opener :
             OpenTable(std::chrono::steady_clock::time_point::max()).openersOf(identify(fd.get(), image), std::nullopt))
            if (opener.pid == pid)
                return std::move(opener);
        return std::nullopt;
    }

    unit::TempDir dir;
    std::string image = dir.file("disk.img", "data");
};

TEST_F(OpenersOfAFile, AreNotLookedForWhenThereIsNoTimeLeft) {
    EXPECT_FALSE(OpenTable(std::chrono::steady_clock::now() - std::chrono::seconds(1)).complete());
    EXPECT_TRUE(OpenTable(std::chrono::steady_clock::time_point::max()).complete());
}

TEST_F(OpenersOfAFile, AreFoundWithTheirLocksOfEveryKind) {
    Child child([&](Line& line) {
        Fd fd = openFile(image, O_RDWR), copy(dup(fd.get())), other = openFile(image, O_RDONLY);
        unit::demand(tryLock(fd.get(), LockType::read, {100, 2}, image) == LockOutcome::granted, "OFD lock");
        unit::demand(flock(other.get(), LOCK_SH) == 0, "flock");
        line.say();
        line.hear();
    });
    child.line().hear();
    auto opener = find(child.pid());
    ASSERT_TRUE(opener);
    EXPECT_TRUE(opener->writes);
    ASSERT_EQ(opener->locks.size(), 2u) << "a duplicate of a descriptor has no locks of its own";
    auto has = [&](LockClass kind, Range range) {
        return std::any_of(opener->locks.begin(), opener->locks.end(), [&](const TableLock& lock) {
            return lock.kind == kind && lock.range == range && lock.type == LockType::read;
        });
    };
    EXPECT_TRUE(has(LockClass::ofd, {100, 2}));
    EXPECT_TRUE(has(LockClass::flock, {0, 0}));
    child.line().say();
    EXPECT_EQ(child.join(), "");
    EXPECT_FALSE(find(child.pid())) << "who is gone has nothing open";
}

TEST_F(OpenersOfAFile, WithoutALockAreFoundToo) {
    Child child([&](Line& line) {
        Fd fd = openFile(image, O_RDONLY);
        line.say();
        line.hear();
    });
    child.line().hear();
    auto opener = find(child.pid());
    ASSERT_TRUE(opener);
    EXPECT_FALSE(opener->writes);
    EXPECT_TRUE(opener->locks.empty());
    child.line().say();
    EXPECT_EQ(child.join(), "");
}

TEST_F(OpenersOfAFile, AskedThroughTheKernelShowEachLockOnce) {
    Child child([&](Line& line) {
        Fd fd = openFile(image, O_RDWR);
        for (Range range : {Range{0, 1}, Range{100, 2}, Range{201, 1}, Range{INT64_C(1) << 62, 1}, Range{INT64_MAX, 1}})
            unit::demand(tryLock(fd.get(), LockType::write, range, image) == LockOutcome::granted, "lock");
        line.say();
        line.hear();
    });
    child.line().hear();
    Fd fd = openFile(image, O_RDONLY);
    std::vector<std::int64_t> starts;
    for (const FoundLock& lock : findConflicts(fd.get(), image, 100))
        starts.push_back(lock.range.start);
    EXPECT_EQ(starts, (std::vector<std::int64_t>{0, 100, 201, INT64_C(1) << 62, INT64_MAX}));
    EXPECT_EQ(findConflicts(fd.get(), image, 2).size(), 2u);
    child.line().say();
    EXPECT_EQ(child.join(), "");
}

} // namespace
} // namespace leasehold::os

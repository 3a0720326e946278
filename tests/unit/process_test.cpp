// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/os/open_files.hpp"
#include "core/os/process.hpp"
#include "core/os/socket_pairs.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::os {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using unit::Child;
using unit::Line;

class OtherProcess : public unit::LeavesNoDescriptor {
protected:
    unit::TempDir dir;
    std::string image = dir.file("disk.img", "content");
};

// The number of a process that has been.
pid_t deadPid() {
    pid_t pid = fork();
    if (pid == 0)
        _exit(0);
    waitpid(pid, nullptr, 0);
    return pid;
}

TEST_F(OtherProcess, ThatIsNotThereIsAnError) {
    try {
        Process process(deadPid());
        FAIL() << "opened a process that has ended";
    } catch (const SystemError& error) {
        EXPECT_EQ(error.error(), ESRCH);
    }
}

TEST_F(OtherProcess, IsWaitedForNoLongerThanAsked) {
    Child child([](Line& line) { line.hear(); });
    Process process(child.pid());
    auto start = steady_clock::now();
    EXPECT_FALSE(process.diedWithin(milliseconds(20)));
    EXPECT_GE(steady_clock::now() - start, milliseconds(19));
    EXPECT_FALSE(process.diedWithin(milliseconds(0)));
    start = steady_clock::now();
    kill(child.pid(), SIGKILL);
    EXPECT_TRUE(process.diedWithin(milliseconds(60'000)));
    EXPECT_LT(steady_clock::now() - start, milliseconds(30'000)) << "the death ends the wait";
    EXPECT_TRUE(process.diedWithin(milliseconds(0)));
}

TEST_F(OtherProcess, HoldsNoLockAnyMoreWhenItsDeathIsTold) {
    for (int i = 0; i < 50; i++) {
        Child child([&](Line& line) {
            Fd fd = openFile(image, O_RDWR);
            unit::demand(tryLock(fd.get(), LockType::write, {5, 1}, image) == LockOutcome::granted, "not locked");
            line.say();
            line.hear();
        });
        Process process(child.pid());
        child.line().hear();
        kill(child.pid(), SIGKILL);
        ASSERT_TRUE(process.diedWithin(milliseconds(60'000)));
        ASSERT_TRUE(unit::isFree(image, 5));
    }
}

TEST_F(OtherProcess, GivesADuplicateOfItsDescriptorNotASecondDescription) {
    Child child([&](Line& line) {
        Fd fd = openFile(image, O_RDWR);
        unit::demand(tryLock(fd.get(), LockType::write, {5, 1}, image) == LockOutcome::granted, "not locked");
        unit::demand(dup2(fd.get(), 200) == 200, "not duplicated");
        line.say();
        line.hear();
    });
    child.line().hear();
    Process process(child.pid());
    auto taken = process.takeDescriptor(200);
    ASSERT_TRUE(taken);
    EXPECT_EQ(tryLock(taken->get(), LockType::write, {5, 1}, image), LockOutcome::granted);
    EXPECT_NE(fcntl(taken->get(), F_GETFD) & FD_CLOEXEC, 0);
    Fd reopened = openFile("/proc/" + std::to_string(child.pid()) + "/fd/200", O_RDWR);
    EXPECT_EQ(tryLock(reopened.get(), LockType::write, {5, 1}, image), LockOutcome::contended);
    child.kill();
    EXPECT_FALSE(unit::isFree(image, 5)) << "our duplicate keeps it";
}

TEST_F(OtherProcess, HasNoDescriptorWhereNoneIs) {
    Child child([](Line& line) { line.hear(); });
    Process process(child.pid());
    EXPECT_FALSE(process.takeDescriptor(777));
    EXPECT_FALSE(process.takeDescriptor(-1));
    child.kill();
    EXPECT_FALSE(process.takeDescriptor(0)) << "nor when it is dead";
    EXPECT_TRUE(process.descriptors().empty());
}

TEST_F(OtherProcess, ListsItsDescriptorsInOrder) {
    unit::StandIn qemu([&] {
        for (int number : {300, 17, 5})
            unit::demand(dup2(STDIN_FILENO, number) == number, "not duplicated");
    });
    EXPECT_EQ(qemu.process().descriptors(), (std::vector<int>{0, 1, 2, 5, 17, 300}));
}

TEST_F(OtherProcess, IsNamedWithoutControlCharacters) {
    Child child([](Line& line) {
        prctl(PR_SET_NAME, "qe\nmu\x1b\xff-x");
        line.say();
        line.hear();
    });
    child.line().hear();
    EXPECT_EQ(commandName(child.pid()), "qemu-x");
    EXPECT_EQ(commandName(deadPid()), "");
}

TEST_F(OtherProcess, IsListed) {
    Child child([](Line& line) { line.hear(); });
    auto all = listProcesses();
    EXPECT_NE(std::find(all.begin(), all.end(), child.pid()), all.end());
    EXPECT_NE(std::find(all.begin(), all.end(), getpid()), all.end());
}

class HoldersOfALock : public OtherProcess {
protected:
    static std::vector<pid_t> holders(const FileId& file, std::int64_t first, std::int64_t last) {
        auto found = findLockHolders(file, first, last, std::chrono::steady_clock::now() + std::chrono::minutes(1));
        EXPECT_TRUE(found.complete);
        return found.pids;
    }
};

TEST_F(HoldersOfALock, AreNotLookedForWhenThereIsNoTimeLeft) {
    Fd fd = openFile(image, O_RDWR);
    ASSERT_EQ(tryLock(fd.get(), LockType::read, {100, 1}, image), LockOutcome::granted);
    auto found = findLockHolders(identify(fd.get(), image), 100, 100, std::chrono::steady_clock::now());
    EXPECT_FALSE(found.complete) << "that nobody else is there has not been seen";
}

TEST_F(HoldersOfALock, AreThoseWithALockOnOneOfTheBytes) {
    auto hold = [&](Range range, LockType type) {
        return [this, range, type](Line& line) {
            Fd unlocked = openFile(image, O_RDWR), fd = openFile(image, O_RDWR);
            unit::demand(tryLock(fd.get(), type, range, image) == LockOutcome::granted, "not locked");
            line.say();
            line.hear();
        };
    };
    Child inside(hold({100, 1}, LockType::read)), below(hold({99, 1}, LockType::read)),
        above(hold({104, 0}, LockType::read)), across(hold({90, 12}, LockType::read));
    for (Child* child : {&inside, &below, &above, &across})
        child->line().hear();
    FileId file = identify(openFile(image, O_RDONLY).get(), image);
    std::vector<pid_t> expected{inside.pid(), across.pid()};
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(holders(file, 100, 103), expected);
    EXPECT_EQ(holders(file, 104, 104), std::vector<pid_t>{above.pid()});
    EXPECT_EQ(holders(file, std::int64_t{1} << 62, std::int64_t{1} << 62), std::vector<pid_t>{above.pid()});
    EXPECT_TRUE(holders(file, 1, 50).empty());
    EXPECT_TRUE(holders({file.device, file.inode + 1}, 100, 103).empty());
}

TEST_F(OtherProcess, HasOpenWhatItMayReadOrWriteAndNotWhatItOnlyHasAPathTo) {
    const FileId file = identify(openFile(image, O_PATH).get(), image);
    auto use = [&] {
        OpenFiles open = OpenFiles::read(Process(getpid()));
        EXPECT_TRUE(open.complete()) << open.gap();
        return open.useOf(file);
    };
    Fd path = openFile(image, O_PATH);
    EXPECT_EQ(use(), OpenFiles::Use::none) << "what QEMU may not read it must not get from us";
    Fd reader = openFile(image, O_RDONLY);
    EXPECT_EQ(use(), OpenFiles::Use::reads);
    Fd writer = openFile(image, O_WRONLY);
    EXPECT_EQ(use(), OpenFiles::Use::writes);
}

TEST(UnixTable, TellsThePairsWithoutAName) {
    const char* text = "Num       RefCount Protocol Flags    Type St Inode Path\n"
                       "0000000000000000: 00000002 00000000 00010000 0001 01 100 /run/listens\n"
                       "0000000000000000: 00000003 00000000 00000000 0005 03 101\n"
                       "ffff8ead43a1c000: 00000003 00000000 00000000 0005 03   102\n"
                       "0000000000000000: 00000003 00000000 00000000 0005 03 103 /run/has a name\n"
                       "0000000000000000: 00000003 00000000 00000000 0005 03 104 @abstract\n"
                       "0000000000000000: 00000003 00000000 00000000 0001 03 105\n"
                       "0000000000000000: 00000002 00000000 00000000 0005 01 106\n"
                       "0000000000000000: 00000003 00000000 00000000 0005 03 none\n"
                       "0000000000000000: 00000003 0000";
    EXPECT_EQ(parseUnixTable(text), (std::vector<std::uint64_t>{101, 102}));
    EXPECT_TRUE(parseUnixTable("").empty());
}

} // namespace
} // namespace leasehold::os

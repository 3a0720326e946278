// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// QEMU's lock bytes, against the locks that QEMU's own tools take. They are run for real; where they are not installed,
// the tests that need them are skipped.

#include "core/os/file_lock.hpp"
#include "core/os/process.hpp"
#include "core/qemu/image_locks.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>
#include <memory>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::qemu {
namespace {

// As virtlockd takes it, from another process.
TEST(ImageLocks, TheByteOfVirtlockdIsInTheWayOfWhoeverWouldNotShareIt) {
    unit::TempDir dir;
    std::string image = dir.file("disk.img", "x");
    for (short type : {short{F_WRLCK}, short{F_RDLCK}}) {
        unit::Child daemon([&](unit::Line& line) {
            os::Fd fd = os::openFile(image, O_RDWR);
            struct flock lock {};
            lock.l_type = type;
            lock.l_whence = SEEK_SET;
            lock.l_len = 1;
            unit::demand(fcntl(fd.get(), F_SETLK, &lock) == 0, "no lock");
            line.say();
            line.hear();
        });
        daemon.line().hear();
        os::Fd fd = os::openFile(image, O_RDWR);
        for (Use use : {Use::exclusive, Use::shared, Use::readOnly}) {
            auto conflict = findImageConflict(fd.get(), use, false, image);
            EXPECT_EQ(conflict.has_value(), type == F_WRLCK || use == Use::exclusive);
            EXPECT_TRUE(!conflict || unit::says(conflict->words, "as virtlockd does"));
        }
    }
}

using std::chrono::milliseconds;
using unit::Child;
using unit::Line;

constexpr Use kUses[] = {Use::exclusive, Use::shared, Use::readOnly};

class QemusLocks : public unit::LeavesNoDescriptor {
protected:
    std::optional<ImageConflict> conflict(Use use) const {
        return findImageConflict(os::openFile(image, use == Use::readOnly ? O_RDONLY : O_RDWR).get(), use, false,
                                 image);
    }

    unit::TempDir dir;
    std::string image = dir.file("disk.img", std::string(1 << 20, '\0'));
};

TEST_F(QemusLocks, ThatAreNotThereStopNobody) {
    for (Use use : kUses)
        EXPECT_EQ(conflict(use), std::nullopt);
}

TEST_F(QemusLocks, StopEachUseByTheBytesThatQemuItselfTests) {
    struct Row {
        std::int64_t byte;
        bool exclusive, shared, readOnly;
    };
    const Row rows[] = {{1, false, false, false},   {99, false, false, false},
                        {100, false, false, false}, {101, true, false, true},
                        {102, false, false, false}, {103, true, false, false},
                        {104, false, false, false}, {200, true, true, true},
                        {201, true, true, false},   {202, false, false, false},
                        {203, true, false, false},  {204, false, false, false},
                        {263, false, false, false}, {INT64_C(1) << 62, false, false, false}};
    for (const Row& row : rows)
        for (os::LockType type : {os::LockType::read, os::LockType::write}) {
            os::Fd holder = os::openFile(image, O_RDWR);
            ASSERT_EQ(os::tryLock(holder.get(), type, {row.byte, 1}, image), os::LockOutcome::granted);
            EXPECT_EQ(conflict(Use::exclusive).has_value(), row.exclusive) << row.byte;
            EXPECT_EQ(conflict(Use::shared).has_value(), row.shared) << row.byte;
            EXPECT_EQ(conflict(Use::readOnly).has_value(), row.readOnly) << row.byte;
        }
}

TEST_F(QemusLocks, AreToldInWords) {
    os::Fd holder = os::openFile(image, O_RDWR);
    for (std::int64_t byte : {100, 101, 201})
        ASSERT_EQ(os::tryLock(holder.get(), os::LockType::read, {byte, 1}, image), os::LockOutcome::granted);
    auto found = conflict(Use::exclusive);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->byte, 101);
    EXPECT_EQ(found->words, "writes to it, lets nobody else write to it");
    EXPECT_EQ(conflict(Use::shared)->words, "lets nobody else write to it");
}

TEST_F(QemusLocks, OfTheWholeFileStopEveryUse) {
    os::Fd holder = os::openFile(image, O_RDWR);
    ASSERT_EQ(os::tryLock(holder.get(), os::LockType::read, {0, 0}, image), os::LockOutcome::granted);
    for (Use use : kUses)
        EXPECT_TRUE(conflict(use));
}

TEST_F(QemusLocks, AreOnlyLookedAtNeverTaken) {
    for (Use use : kUses)
        (void)conflict(use);
    for (std::int64_t byte = 95; byte < 210; byte++)
        ASSERT_TRUE(unit::isFree(image, byte));
}

TEST_F(QemusLocks, OfOnesOwnDescriptionAreNotSeen) {
    os::Fd fd = os::openFile(image, O_RDWR);
    ASSERT_EQ(os::tryLock(fd.get(), os::LockType::read, {201, 1}, image), os::LockOutcome::granted);
    EXPECT_EQ(findImageConflict(fd.get(), Use::exclusive, false, image), std::nullopt);
}

// A tool of QEMU's that keeps the image open until it is killed.
class RealTool : public QemusLocks {
protected:
    static bool installed(const std::string& tool) { return access(("/usr/bin/" + tool).c_str(), X_OK) == 0; }

    // Started, and at the point where it holds locks (or has ended).
    std::unique_ptr<Child> start(const std::vector<std::string>& command) const {
        auto child = std::make_unique<Child>([&](Line&) {
            std::vector<char*> arguments;
            for (const std::string& word : command)
                arguments.push_back(const_cast<char*>(word.c_str()));
            arguments.push_back(nullptr);
            // Its standard input stays open and silent: qemu-io waits there for commands.
            int pipes[2];
            unit::demand(pipe(pipes) == 0 && dup2(pipes[0], STDIN_FILENO) == 0, "no pipe");
            int null = open("/dev/null", O_WRONLY);
            dup2(null, STDOUT_FILENO);
            dup2(null, STDERR_FILENO);
            execv(arguments[0], arguments.data());
            throw std::runtime_error("exec failed");
        });
        // Wait for the event: the locks are in the tool's fdinfo.
        os::Process process(child->pid());
        os::FileId file = os::identify(os::openFile(image, O_RDONLY).get(), image);
        for (int tries = 0; tries < 3000 && !process.diedWithin(milliseconds(10)); tries++) {
            std::vector<pid_t> holders = holdersOf(file, kUsesBase, kDeniesBase + 10);
            if (std::find(holders.begin(), holders.end(), child->pid()) != holders.end())
                return child;
        }
        return nullptr;
    }

    static std::vector<pid_t> holdersOf(const os::FileId& file, std::int64_t first, std::int64_t last) {
        return os::findLockHolders(file, first, last, std::chrono::steady_clock::now() + std::chrono::minutes(1)).pids;
    }

    void expectStops(bool exclusive, bool shared, bool readOnly) const {
        EXPECT_EQ(conflict(Use::exclusive).has_value(), exclusive);
        EXPECT_EQ(conflict(Use::shared).has_value(), shared);
        EXPECT_EQ(conflict(Use::readOnly).has_value(), readOnly);
    }
};

TEST_F(RealTool, QemuIoThatWritesStopsWhoDoesNotShareWriting) {
    if (!installed("qemu-io"))
        GTEST_SKIP() << "qemu-io is not installed";
    auto tool = start({"/usr/bin/qemu-io", "-f", "raw", image});
    ASSERT_TRUE(tool) << "qemu-io took no locks";
    expectStops(true, false, true); // it shares writing: 100, 101 and nothing from 200 on
    tool.reset();
    expectStops(false, false, false);
}

TEST_F(RealTool, QemuIoThatOnlyReadsStopsNobody) {
    if (!installed("qemu-io"))
        GTEST_SKIP() << "qemu-io is not installed";
    auto tool = start({"/usr/bin/qemu-io", "-r", "-f", "raw", image});
    ASSERT_TRUE(tool) << "qemu-io took no locks";
    expectStops(false, false, false); // 100 alone
}

TEST_F(RealTool, QemuNbdThatServesTheImageIsSeen) {
    if (!installed("qemu-nbd"))
        GTEST_SKIP() << "qemu-nbd is not installed";
    auto tool = start({"/usr/bin/qemu-nbd", "-t", "-f", "raw", "-k", dir.path("socket"), image});
    ASSERT_TRUE(tool) << "qemu-nbd took no locks";
    // It opens the image before it knows what its clients may do with it.
    for (int tries = 0; access(dir.path("socket").c_str(), F_OK) != 0; tries++) {
        ASSERT_LT(tries, 3000) << "qemu-nbd does not serve";
        usleep(10000);
    }
    auto found = conflict(Use::exclusive);
    ASSERT_TRUE(found);
    os::FileId file = os::identify(os::openFile(image, O_RDONLY).get(), image);
    EXPECT_EQ(holdersOf(file, found->byte, found->byte), std::vector<pid_t>{tool->pid()});
}

TEST_F(RealTool, QemuIoIsNotDisturbedByTheLookNorByMarks) {
    if (!installed("qemu-io"))
        GTEST_SKIP() << "qemu-io is not installed";
    os::Fd guest = os::openFile(image, O_RDWR);
    ASSERT_EQ(os::tryLock(guest.get(), os::LockType::write, {INT64_C(1) << 62, 0}, image), os::LockOutcome::granted);
    EXPECT_EQ(findImageConflict(guest.get(), Use::exclusive, false, image), std::nullopt);
    EXPECT_TRUE(start({"/usr/bin/qemu-io", "-f", "raw", image})) << "qemu-io could not open the image";
}

} // namespace
} // namespace leasehold::qemu

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Lockspaces: which directories are one, what is found in them, and two who come at once.

#include "core/storage/lockspace.hpp"

#include "core/os/error.hpp"
#include "tests/support/unit_support.hpp"

#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::storage {
namespace {

using unit::Child;
using unit::demand;
using unit::errorOf;
using unit::Line;
using unit::says;

namespace fs = std::filesystem;

constexpr uid_t kNobody = 65534;

class LockspaceTest : public unit::LeavesNoDescriptor {
protected:
    std::string folder(const std::string& name, mode_t mode = 0700) const {
        fs::create_directory(dir.path(name));
        EXPECT_EQ(chmod(dir.path(name).c_str(), mode), 0);
        return dir.path(name);
    }

    static Lockspace open(const std::string& path, bool create = false) {
        return openLockspace(path, "file_lockspace_dir", {}, create ? Missing::made : Missing::refused);
    }

    // The error names the directory and who told us of it.
    static void expectRefused(const std::string& path, const std::string& reason) {
        std::string error = errorOf([&] { open(path); });
        EXPECT_TRUE(says(error, "'" + path + "' (file_lockspace_dir)"));
        EXPECT_TRUE(says(error, reason));
    }

    static void expectNoLeaseIn(const Lockspace& lockspace, const std::string& reason) {
        std::string error = errorOf([&] { openLeaseFile(lockspace, "lease", "disk A"); });
        EXPECT_TRUE(says(error, "lease"));
        EXPECT_TRUE(says(error, lockspace.path));
        EXPECT_TRUE(says(error, reason));
    }

    unit::TempDir dir;
};

TEST_F(LockspaceTest, DirectoryOfOurOwnIsOneAndTellsItsStorage) {
    Lockspace lockspace = open(folder("good"));
    EXPECT_EQ(lockspace.storage.lock, LockKind::byteRange);
    EXPECT_EQ(open(folder("readable", 0755)).path, dir.path("readable"));
    EXPECT_EQ(open(dir.path("good/")).storage.name, lockspace.storage.name);
}

TEST_F(LockspaceTest, IsMadeWhereThatIsWantedButNotItsParents) {
    open(dir.path("new"), true);
    struct stat status;
    ASSERT_EQ(stat(dir.path("new").c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, 0700u);
    open(dir.path("new"), true);
    EXPECT_TRUE(says(errorOf([&] { open(dir.path("a/b"), true); }), dir.path("a/b")));
    EXPECT_FALSE(fs::exists(dir.path("a")));
}

TEST_F(LockspaceTest, WhatIsNoSafeDirectoryIsRefused) {
    expectRefused(dir.path("missing"), "does not exist; make it on storage that all hosts share");
    expectRefused(dir.file("file"), "not a directory");
    expectRefused(dir.path("file/below"), "not a directory");
    fs::create_directory_symlink(folder("good"), dir.path("link"));
    expectRefused(dir.path("link"), "symbolic link");
    fs::create_directory_symlink(dir.path("gone"), dir.path("dangling"));
    expectRefused(dir.path("dangling"), "symbolic link");
    ASSERT_EQ(mkfifo(dir.path("fifo").c_str(), 0600), 0);
    expectRefused(dir.path("fifo"), "not a directory");
    expectRefused(folder("of-the-group", 0770), "mode 0770");
    expectRefused(folder("of-all", 01777), "mode 1777");
}

TEST_F(LockspaceTest, OfAnotherUserIsRefused) {
    std::string path = folder("theirs");
    if (chown(path.c_str(), kNobody, kNobody) < 0)
        GTEST_SKIP() << "may not give files away";
    expectRefused(path, "user 65534");
}

TEST_F(LockspaceTest, OnStorageWithoutATrustworthyLockIsRefused) {
    expectRefused("/proc/sys", "it is on proc");
    std::string path = folder("told");
    std::vector<Override> refuse{{path, LockKind::none, Scope::thisHost}};
    EXPECT_TRUE(says(errorOf([&] { openLockspace(path, "file_lockspace_dir", refuse, Missing::refused); }),
                     "the administrator refuses"));
}

TEST_F(LockspaceTest, ThatMayNotBeWrittenToIsRefusedWithWhatToDo) {
    std::string path = folder("good", 0755);
    ASSERT_EQ(chmod(dir.path().c_str(), 0755), 0);
    Child user([&](Line&) {
        demand(setgid(kNobody) == 0 && setuid(kNobody) == 0, "SKIP");
        Lockspace lockspace = open(path);
        for (const auto& call :
             std::initializer_list<std::function<void()>>{[&] { openLeaseFile(lockspace, "lease", "disk A"); },
                                                          [&] { openLeaseDirectory(lockspace, "lease"); }}) {
            std::string error = errorOf(call);
            for (const std::string& part : {path, std::string("file_lockspace_dir"), std::string("allowed to write")})
                demand(error.find(part) != error.npos, part + " is not in: " + error);
        }
    });
    std::string problem = user.join();
    if (problem == "SKIP")
        GTEST_SKIP() << "may not become another user";
    EXPECT_EQ(problem, "");
}

TEST_F(LockspaceTest, OnAReadOnlyMountIsRefusedWithWhatToDo) {
    std::string path = folder("good");
    Child host([&](Line&) {
        demand(unit::hasMountsOfItsOwn() && mount(path.c_str(), path.c_str(), nullptr, MS_BIND, nullptr) == 0 &&
                   mount("none", path.c_str(), nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY, nullptr) == 0,
               "SKIP");
        Lockspace lockspace = open(path);
        std::string error = errorOf([&] { openLeaseFile(lockspace, "lease", "disk A"); });
        demand(error.find("allowed to write") != error.npos && error.find(path) != error.npos, error);
    });
    std::string problem = host.join();
    if (problem == "SKIP")
        GTEST_SKIP() << "may not mount here";
    EXPECT_EQ(problem, "");
}

TEST_F(LockspaceTest, LeaseFileIsMadeOnceAndSaysWhatItBelongsTo) {
    Lockspace lockspace = open(folder("good"));
    os::Fd first = openLeaseFile(lockspace, "lease", "disk A"), again = openLeaseFile(lockspace, "lease", "disk A");
    EXPECT_EQ(os::identify(first.get(), "lease"), os::identify(again.get(), "lease"));
    EXPECT_EQ(os::readFile(dir.path("good/lease"), 100), "leasehold lease of disk A\n");
    struct stat status;
    ASSERT_EQ(fstat(first.get(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, 0600u);
}

TEST_F(LockspaceTest, LeaseFileThatSomebodyPreparedIsRefused) {
    Lockspace lockspace = open(folder("good"));
    std::string lease = dir.path("good/lease");
    auto expectThenRemove = [&](const std::string& reason) {
        expectNoLeaseIn(lockspace, reason);
        fs::remove(lease);
    };
    fs::create_symlink(dir.file("victim"), lease);
    expectThenRemove("another kind");
    EXPECT_EQ(fs::file_size(dir.path("victim")), 0u);
    fs::create_symlink(dir.path("made"), lease);
    expectThenRemove("another kind");
    EXPECT_FALSE(fs::exists(dir.path("made")));
    fs::create_hard_link(dir.path("victim"), lease);
    expectThenRemove("a regular file of one name");
    EXPECT_EQ(fs::file_size(dir.path("victim")), 0u) << "written to";
    ASSERT_EQ(mkfifo(lease.c_str(), 0600), 0);
    expectThenRemove("not a regular file");
    fs::create_directory(lease);
    expectThenRemove("another kind");
    std::ofstream(lease).flush();
    ASSERT_EQ(chmod(lease.c_str(), 0620), 0);
    expectThenRemove("only its owner may write");
    std::ofstream(lease) << "leasehold lease of disk B\n";
    expectThenRemove("'leasehold lease of disk B'");
    std::ofstream(lease) << "leasehold lease of disk A and more\n";
    expectThenRemove("belongs to something else");
    std::ofstream(lease) << "leasehold lease of disk";
    expectThenRemove("belongs to something else");
    std::ofstream(lease) << std::string(1 << 20, '\n');
    expectThenRemove("belongs to something else");
    EXPECT_NO_THROW(openLeaseFile(lockspace, "lease", "disk A"));
}

TEST_F(LockspaceTest, LeaseDirectoryThatSomebodyPreparedIsRefused) {
    Lockspace lockspace = open(folder("good"));
    std::string lease = dir.path("good/lease");
    auto expectThenRemove = [&](const std::string& reason) {
        std::string error = errorOf([&] { openLeaseDirectory(lockspace, "lease"); });
        EXPECT_TRUE(says(error, lockspace.path + "' (file_lockspace_dir)"));
        EXPECT_TRUE(says(error, reason));
        fs::remove_all(lease);
    };
    fs::create_directory_symlink(folder("elsewhere"), lease);
    expectThenRemove("another kind");
    std::ofstream(lease).flush();
    expectThenRemove("another kind");
    fs::create_directory(lease);
    ASSERT_EQ(chmod(lease.c_str(), 0777), 0);
    expectThenRemove("others than its owner may write");
    os::Fd made = openLeaseDirectory(lockspace, "lease"), again = openLeaseDirectory(lockspace, "lease");
    EXPECT_EQ(os::identify(made.get(), "lease"), os::identify(again.get(), "lease"));
}

TEST_F(LockspaceTest, InscriptionOfAnyLengthAndContentIsOneShortLine) {
    Lockspace lockspace = open(folder("good"));
    for (const std::string& about :
         {std::string(100'000, 'x'), std::string("a\nb\0c\x1b[31m", 10), std::string(), std::string("\xff\xfe")}) {
        std::string name = hashName(about);
        openLeaseFile(lockspace, name, about);
        EXPECT_NO_THROW(openLeaseFile(lockspace, name, about));
        std::string text = os::readFile(dir.path("good/" + name), 1 << 20);
        EXPECT_LT(text.size(), static_cast<std::size_t>(kRecordOffset));
        EXPECT_EQ(text.find('\n'), text.size() - 1);
    }
}

TEST_F(LockspaceTest, RecordBehindTheInscriptionDoesNotChangeIt) {
    Lockspace lockspace = open(folder("good"));
    os::Fd lease = openLeaseFile(lockspace, "lease", "disk A");
    ASSERT_EQ(pwrite(lease.get(), "domain=web\n", 11, kRecordOffset), 11);
    EXPECT_NO_THROW(openLeaseFile(lockspace, "lease", "disk A"));
}

TEST_F(LockspaceTest, TwoWhoMakeOneLeaseAtOnceGetTheSameAndBothTheInscription) {
    std::string path = folder("good");
    auto make = [&](int round) {
        Lockspace lockspace = open(path);
        std::string name = std::to_string(round);
        openLeaseDirectory(lockspace, "directory-" + name);
        return os::identify(openLeaseFile(lockspace, name, "disk " + name).get(), name);
    };
    Child other([&](Line& line) {
        for (int round = 0; round < 500; round++) {
            line.hear();
            auto file = make(round);
            line.say();
            demand(findLease(path, std::to_string(round)) == file, "another file");
        }
    });
    for (int round = 0; round < 500; round++) {
        other.line().say();
        ASSERT_EQ(findLease(path, std::to_string(round)).value_or(make(round)), make(round));
        other.line().hear();
    }
    EXPECT_EQ(other.join(), "");
}

TEST_F(LockspaceTest, FindingALeaseMakesNothing) {
    std::string path = folder("good");
    EXPECT_EQ(findLease(path, "lease"), std::nullopt);
    EXPECT_EQ(findLease(dir.path("missing"), "lease"), std::nullopt);
    EXPECT_EQ(findLease(dir.file("file"), "lease"), std::nullopt);
    EXPECT_TRUE(fs::is_empty(path));
    Lockspace lockspace = open(path);
    const auto made = os::identify(openLeaseDirectory(lockspace, "lease").get(), "lease");
    EXPECT_EQ(findLease(path, "lease"), made);
    fs::create_symlink(dir.path("file"), dir.path("good/link"));
    EXPECT_NE(findLease(path, "link"), findLease(dir.path(), "file")) << "followed a link";
}

TEST_F(LockspaceTest, OnlyWhatNobodyElseCanHaveMadeIsTrusted) {
    Lockspace lockspace = open(folder("good"));
    auto trusted = [](const std::string& path, int flags = O_RDWR) {
        return isTrusted(os::openFile(path, flags).get(), path);
    };
    openLeaseFile(lockspace, "lease", "disk A");
    std::string lease = dir.path("good/lease");
    EXPECT_TRUE(trusted(lease));
    EXPECT_TRUE(trusted(lockspace.path, O_RDONLY));
    EXPECT_FALSE(trusted(dir.file("empty")));
    EXPECT_FALSE(trusted(dir.file("other", "a file that is no lease")));
    EXPECT_FALSE(trusted("/dev/null"));
    EXPECT_FALSE(trusted(folder("of-all", 0777), O_RDONLY));
    ASSERT_EQ(chmod(lease.c_str(), 0606), 0);
    EXPECT_FALSE(trusted(lease));
    ASSERT_EQ(chmod(lease.c_str(), 0600), 0);
    if (chown(lease.c_str(), kNobody, kNobody) == 0) {
        EXPECT_FALSE(trusted(lease));
    }
}

TEST(LeaseName, IsTheSameOnEveryHost) {
    EXPECT_EQ(hashName(""), "cbf29ce484222325") << "FNV-1a, 64 bits";
    EXPECT_EQ(hashName("a"), "af63dc4c8601ec8c");
    EXPECT_EQ(hashName("foobar"), "85944171f73967e8");
}

} // namespace
} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Storage that does not answer, and that no mount table shows: it was unmounted lazily, as administrators do when a
// server is dead. The lease itself knows that it may hang. A real file system that can be stopped: bindfs.

#include "core/os/deadline.hpp"
#include "core/storage/mount.hpp"
#include "tests/support/unit_media.hpp"

#include <filesystem>
#include <fstream>
#include <functional>

#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold {

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Calls are given up after this.
constexpr milliseconds kTimeout{1500};

class SilentStorage : public unit::EngineTest {
protected:
    explicit SilentStorage(const unit::Configure& configure = [](const unit::TempDir&) { return Settings{}; })
        : EngineTest([&](const unit::TempDir& d) {
              Settings s = configure(d);
              s.storageTimeout = kTimeout;
              s.handoffWait = milliseconds(0);
              s.singleHost = true;
              if (s.storageLocks.empty() || !s.fileLockspaceDir.empty())
                  s.storageLocks.push_back(*storage::parseOverride(d.path("mount") + "=ofd"));
              return s;
          }) {}

    void SetUp() override {
        if (access("/dev/fuse", R_OK | W_OK) != 0 || access("/usr/bin/bindfs", X_OK) != 0)
            GTEST_SKIP() << "bindfs, or /dev/fuse, is missing";
        // Mounts of the test, and of nobody else: those of this machine would answer for the lease.
        if (!unit::hasMountsOfItsOwn())
            GTEST_SKIP() << "no mount namespace may be made here";
        std::filesystem::create_directories(dir.path("real"));
        std::filesystem::create_directories(dir.path("mount"));
        std::ofstream(dir.path("real/disk.img")) << "data";
        server_ = fork();
        if (server_ == 0) {
            execl("/usr/bin/bindfs", "bindfs", "-f", dir.path("real").c_str(), dir.path("mount").c_str(), nullptr);
            _exit(127);
        }
        for (int tries = 0; access(distant.c_str(), F_OK) != 0; tries++) {
            ASSERT_LT(tries, 3000) << "bindfs does not mount";
            usleep(10000);
        }
    }

    void TearDown() override {
        if (server_ <= 0)
            return;
        goOn();
        (void)umount2(dir.path("mount").c_str(), MNT_DETACH);
        ::kill(server_, SIGKILL);
        waitpid(server_, nullptr, 0);
        for (int tries = 0; !os::stuckHelpers().empty() && tries < 1000; tries++)
            usleep(10000);
    }

    void vanish() const { ASSERT_EQ(umount2(dir.path("mount").c_str(), MNT_DETACH), 0); }
    void stop() const {
        ::kill(server_, SIGSTOP);
        waitpid(server_, nullptr, WUNTRACED);
    }
    void goOn() const { ::kill(server_, SIGCONT); }

    // While the server is silent; and once more when its file system is mounted nowhere any more.
    void inEachSilence(const std::function<void(bool gone)>& body) const {
        for (bool gone : {false, true}) {
            if (gone)
                vanish();
            stop();
            body(gone);
            goOn();
        }
    }

    std::string distant = dir.path("mount/disk.img");
    std::vector<Resource> disks{{.path = distant}};

private:
    pid_t server_ = 0;
};

TEST_F(SilentStorage, IsNotWaitedForWhenItsMountIsGoneFromTheTable) {
    Qemu qemu = start(web, disks);
    EXPECT_EQ(engine.acquire(web, disks, "").value_or("granted"), "granted");
    vanish();
    if (storage::hostHasRemoteMounts())
        GTEST_SKIP() << "this machine has other network storage, and calls go to a helper anyway";
    EXPECT_EQ(engine.acquire(web, disks, "").value_or("granted"), "granted");
    stop();
    // The lock is this host's, so the answer comes; what is closed afterwards waits for the server.
    std::string state;
    EXPECT_EQ(unit::errorOf([&] { state = engine.release(web, disks); }), "");
    EXPECT_NE(state, "");
    goOn();
    EXPECT_EQ(engine.acquire(web, disks, state).value_or("granted"), "granted");
    stop();
    // Before a guest runs, its lease is read from the storage.
    std::string problem = unit::errorOf([&] { (void)engine.acquire(web, disks, state); });
    EXPECT_TRUE(unit::says(problem, "did not answer for 1 s"));
    EXPECT_TRUE(unit::says(problem, distant));
    goOn();
    EXPECT_EQ(engine.acquire(web, disks, state).value_or("granted"), "granted");
}

TEST_F(SilentStorage, DoesNotKeepAnAnswerBackThatHasBeenFound) {
    std::vector<Resource> both{{.path = distant}, {.path = image}}, plugged{{.path = second}};
    Qemu qemu = start(web, both);
    EXPECT_EQ(engine.acquire(web, both, "").value_or("granted"), "granted");
    inEachSilence([&](bool gone) {
        EXPECT_EQ(unit::errorOf([&] { EXPECT_NE(engine.release(web, both), ""); }), "") << gone;
        EXPECT_EQ(unit::errorOf([&] { EXPECT_NE(engine.inquire(web, both), ""); }), "") << gone;
        EXPECT_EQ(unit::errorOf([&] { engine.detach(web, plugged); }), "") << gone;
    });
}

// Wherever leases are.
class SilentCd : public SilentStorage, public testing::WithParamInterface<unit::Where> {
protected:
    SilentCd() : SilentStorage(GetParam().configure) {}
};

TEST_P(SilentCd, CostsASuspendedGuestNothing) {
    const std::vector<Resource> all{{.path = image}, {.path = distant, .mode = Mode::readOnly}};
    Qemu qemu = start(web, all);
    ASSERT_EQ(engine.acquire(web, all, "").value_or("granted"), "granted");
    inEachSilence([&](bool) {
        std::string state;
        EXPECT_EQ(unit::errorOf([&] { state = engine.release(web, all); }), "");
        EXPECT_NE(state, "");
        EXPECT_EQ(unit::errorOf([&] { EXPECT_EQ(engine.acquire(web, all, state), std::nullopt); }), "");
        EXPECT_NE(refusalOf(mail, {{.path = image}}), "granted");
    });
}

INSTANTIATE_TEST_SUITE_P(Everywhere, SilentCd, unit::everywhere(), unit::nameOfWhere);

} // namespace

} // namespace leasehold

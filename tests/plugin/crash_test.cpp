// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// libvirtd dies, at any moment and in the middle of anything. Its guests and their leases must not notice, and the
// next libvirtd must be able to go on.

#include "tests/plugin/libvirtd.hpp"
#include "tests/support/sanitizers.hpp"

#include <atomic>
#include <random>
#include <thread>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::plugin_test {
namespace {

constexpr long long kOwnerByte = 1LL << 62;

// With AddressSanitizer each libvirtd takes ten times as long to start, and what is looked for is in its memory: a part
// of the deaths, and leaves a processor to others.
constexpr bool kSlow = support::kAddressSanitizer;

// Looks all the time whether the lease is still there, as a thief would.
class Watcher {
public:
    explicit Watcher(const std::string& image) : fd_(open(image.c_str(), O_RDWR | O_CLOEXEC)) {
        thread_ = std::thread([this] {
            while (!stop_) {
                struct flock lock {};
                lock.l_type = F_WRLCK;
                lock.l_start = kOwnerByte;
                lock.l_len = 1;
                if (fcntl(fd_, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK)
                    gaps_++;
                looks_++;
                if (kSlow)
                    std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        });
    }
    ~Watcher() {
        stop_ = true;
        thread_.join();
        close(fd_);
        EXPECT_GT(looks_.load(), 0);
        EXPECT_EQ(gaps_.load(), 0) << "of " << looks_ << " looks found the image without a lease";
    }

private:
    int fd_;
    std::atomic<bool> stop_{false};
    std::atomic<int> gaps_{0}, looks_{0};
    std::thread thread_;
};

class Crash : public PluginTest {
protected:
    // Kills a libvirtd some time after it was told to do something, again and again; `check` looks with a new one.
    void killAtRandom(int rounds, std::chrono::microseconds longest, const std::function<void(Libvirtd&, int)>& begin,
                      const std::function<void(Libvirtd&)>& check) {
        std::mt19937 random(4711); // the moments differ all the same: nobody knows where the other process is
        for (int round = 0; round < (kSlow ? rounds / 5 : rounds) && !HasFailure(); round++) {
            Libvirtd victim(setup_);
            victim.descriptors(); // it has started
            begin(victim, round);
            const auto moment = std::chrono::steady_clock::now() +
                                std::chrono::microseconds(random() % static_cast<unsigned>(longest.count()));
            while (std::chrono::steady_clock::now() < moment)
                continue;
            victim.kill();
            Libvirtd next(setup_);
            check(next);
        }
    }

    std::string disk_ = image("disk.img"), other_ = image("other.img");
    std::vector<Disk> disks_{{disk_}}, others_{{other_}};
    Libvirtd::Setup setup_{};
};

TEST_F(Crash, LeaseOutlivesLibvirtd) {
    Libvirtd first;
    const Started running = boot(first, guest_, disks_);
    first.kill();
    EXPECT_TRUE(running.qemu->alive());
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Crash, NextLibvirtdGoesOnWithTheGuest) {
    Libvirtd first;
    Started running = boot(first, guest_, disks_);
    const StateOutcome state = first.release(guest_, running.pid(), disks_);
    first.kill();
    Libvirtd second;
    EXPECT_TRUE(granted(second.acquire(guest_, running.pid(), disks_, {.state = state.state})));
    EXPECT_TRUE(granted(second.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(granted(second.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(free(disk_));
    running.qemu->kill();
    EXPECT_TRUE(kernelLocksOn(other_).empty());
}

TEST_F(Crash, StateThatDiedWithLibvirtdIsNotMissed) {
    Libvirtd first;
    const Started running = boot(first, guest_, disks_);
    first.release(guest_, running.pid(), disks_);
    first.kill();
    Libvirtd second;
    EXPECT_TRUE(granted(second.acquire(guest_, running.pid(), disks_)));
}

TEST_F(Crash, InTheMiddleOfHotPlugLosesAndDoublesNothing) {
    Libvirtd first;
    Started running = boot(first, guest_, disks_);
    const Watcher watcher(disk_);
    killAtRandom(
        120, std::chrono::microseconds(700),
        [&](Libvirtd& victim, int round) {
            round % 2 == 0 ? victim.beginAcquire(guest_, running.pid(), others_)
                           : victim.beginDetach(guest_, running.pid(), others_);
        },
        [&](Libvirtd& next) {
            ASSERT_TRUE(granted(next.acquire(guest_, running.pid(), others_)));
            ASSERT_TRUE(leased(other_));
            ASSERT_EQ(kernelLocksOn(other_).size(), 2u) << "owner and present";
            ASSERT_TRUE(granted(next.detach(guest_, running.pid(), others_)));
            ASSERT_TRUE(kernelLocksOn(other_).empty());
            ASSERT_TRUE(leased(disk_));
        });
}

TEST_F(Crash, InTheMiddleOfHotPlugOfAVeryLargeGuestLosesNothing) {
    const std::vector<Disk> many = images(300);
    Libvirtd first;
    Started running = boot(first, guest_, many);
    const Watcher front(many.front().path), back(many.back().path);
    killAtRandom(
        40, std::chrono::microseconds(2500),
        [&](Libvirtd& victim, int) { victim.beginAcquire(guest_, running.pid(), others_); },
        [&](Libvirtd& next) {
            ASSERT_TRUE(granted(next.acquire(guest_, running.pid(), others_)));
            ASSERT_TRUE(granted(next.detach(guest_, running.pid(), others_)));
            ASSERT_TRUE(kernelLocksOn(other_).empty());
        });
    EXPECT_TRUE(leased(many[150].path));
}

TEST_F(Crash, InTheMiddleOfSuspendAndResumeKeepsTheImage) {
    Libvirtd first;
    Started running = boot(first, guest_, disks_);
    const Watcher watcher(disk_);
    killAtRandom(
        60, std::chrono::microseconds(500),
        [&](Libvirtd& victim, int) { victim.beginAcquire(guest_, running.pid(), disks_); },
        [&](Libvirtd& next) {
            const StateOutcome state = next.release(guest_, running.pid(), disks_);
            ASSERT_TRUE(granted(state));
            ASSERT_TRUE(leased(disk_));
            ASSERT_TRUE(granted(next.acquire(guest_, running.pid(), disks_, {.state = state.state})));
        });
}

// The same where the marks are files: there a step is several system calls.
TEST_F(Crash, InTheMiddleOfAnythingLosesNothingWhereMarksAreFiles) {
    setup_.config = "storage_locks = [ \"" + path("") + "=flock\" ]\n";
    Libvirtd first(setup_), other(setup_);
    Started running = boot(first, guest_, disks_);
    ASSERT_TRUE(granted(running));
    killAtRandom(
        60, std::chrono::microseconds(3000),
        [&](Libvirtd& victim, int round) {
            if (round % 3 == 0)
                victim.beginDetach(guest_, running.pid(), others_);
            else
                victim.beginAcquire(guest_, running.pid(), round % 3 == 1 ? disks_ : others_);
        },
        [&](Libvirtd& next) {
            ASSERT_TRUE(refused(other.start(rival_, disks_), kBusy, {disk_, "'web'"}));
            const StateOutcome state = next.release(guest_, running.pid(), disks_);
            ASSERT_TRUE(granted(state));
            ASSERT_TRUE(granted(next.acquire(guest_, running.pid(), disks_, {.state = state.state})));
            ASSERT_TRUE(granted(next.acquire(guest_, running.pid(), others_)));
            ASSERT_TRUE(refused(other.start(rival_, others_), kBusy, {other_, "'web'"}));
            ASSERT_TRUE(granted(next.detach(guest_, running.pid(), others_)));
            ASSERT_TRUE(granted(other.start(rival_, others_)));
        });
    running.qemu->kill();
    EXPECT_TRUE(granted(other.start(rival_, disks_)));
}

TEST_F(Crash, SecondLibvirtdMayAskWhileTheFirstOneIsStopped) {
    Libvirtd first;
    const Started running = boot(first, guest_, disks_);
    // Wherever it is stopped, the answer comes in bounded time, and is either yes or says what is in the way.
    for (int round = 0; round < 5; round++) {
        first.descriptors(); // it has started
        first.beginAcquire(guest_, running.pid(), disks_);
        ::kill(first.pid(), SIGSTOP);
        Libvirtd second;
        const Outcome outcome = second.acquire(guest_, running.pid(), disks_);
        EXPECT_TRUE(outcome.ok || !outcome.message().empty());
        EXPECT_LT(outcome.elapsed, std::chrono::seconds(60));
        ::kill(first.pid(), SIGCONT);
        first.kill();
        first = Libvirtd();
    }
    EXPECT_TRUE(leased(disk_));
}

} // namespace
} // namespace leasehold::plugin_test

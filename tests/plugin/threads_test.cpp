// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// libvirtd works for several guests at once, each in a thread of its own, and forks while all of them run.

#include "tests/plugin/libvirtd.hpp"
#include "tests/support/sanitizers.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <ctime>
#include <fstream>
#include <functional>
#include <mutex>
#include <thread>

#include <dirent.h>
#include <features.h>
#include <unistd.h>

namespace leasehold::plugin_test {
namespace {

// A sanitizer's allocator does not survive the fork of a process with several threads; glibc's does.
constexpr bool kThreadsMayFork = !support::kAddressSanitizer && !support::kThreadSanitizer;

class Threads : public PluginTest {
protected:
    static std::size_t countDescriptors() {
        std::size_t count = 0;
        DIR* directory = opendir("/proc/self/fd");
        while (readdir(directory))
            count++;
        closedir(directory);
        return count;
    }
};

// Keeps the first complaint of many threads.
class Complaint {
public:
    void expect(const Outcome& outcome, const std::string& what) {
        if (!outcome.ok)
            add(what + ": " + outcome.message());
    }
    void add(const std::string& text) {
        std::lock_guard lock(mutex_);
        if (text_.empty())
            text_ = text;
    }
    std::string text() {
        std::lock_guard lock(mutex_);
        return text_;
    }

private:
    std::mutex mutex_;
    std::string text_;
};

TEST_F(Threads, LiveTheirGuestsLivesWithoutMeeting) {
    constexpr int kThreads = 6, kRounds = 12;
    std::vector<std::vector<Disk>> disks, added;
    for (int i = 0; i < kThreads; i++) {
        disks.push_back(images(4, "disk" + std::to_string(i) + "-"));
        added.push_back(images(1, "added" + std::to_string(i) + "-"));
    }
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  Complaint complaint;
                  const std::size_t before = countDescriptors();
                  const auto makeGuest = [](int i) {
                      return support::makeGuest("guest" + std::to_string(i), 100 + static_cast<unsigned>(i));
                  };
                  std::vector<support::Registration> starts(kThreads);
                  for (int i = 0; !kThreadsMayFork && i < kThreads; i++)
                      starts[i] = host.registerGuest(makeGuest(i), disks[i]);
                  std::vector<std::thread> threads;
                  for (int i = 0; i < kThreads; i++)
                      threads.emplace_back([&, i] {
                          const Guest guest = makeGuest(i);
                          for (int round = 0; round < kRounds; round++) {
                              auto& started = starts[i];
                              if (kThreadsMayFork) {
                                  started.process.reset();
                                  started = host.registerGuest(guest, disks[i]);
                                  // Another thread's child, just forked, may still have what libvirtd had open for
                                  // the guest that has died: for the moment until it closes it.
                                  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
                                  while (!started && std::chrono::steady_clock::now() < end)
                                      started = host.registerGuest(guest, disks[i]);
                              }
                              if (!started)
                                  return complaint.expect(started, "start");
                              const pid_t pid = started.process->pid();
                              complaint.expect(host.acquire(guest, pid, disks[i]), "acquire");
                              complaint.expect(host.acquire(guest, pid, added[i]), "attach");
                              const StateOutcome state = host.release(guest, pid, disks[i]);
                              complaint.expect(state, "suspend");
                              complaint.expect(host.acquire(guest, pid, disks[i], {.state = state.state}), "resume");
                              complaint.expect(host.detach(guest, pid, added[i]), "detach");
                              // Some other thread may just be forking: its child has our duplicates for a moment.
                              complaint.expect(host.acquire(guest, pid, added[i]), "attach again");
                          }
                      });
                  for (std::thread& thread : threads)
                      thread.join();
                  starts.clear();
                  if (countDescriptors() != before)
                      complaint.add("descriptors are left open");
                  return complaint.text();
              }),
              "");
}

TEST_F(Threads, WhoWantOneImageAtOnceGetItOneAtATime) {
    constexpr int kThreads = 6;
    const std::vector<Disk> disk{{image("disk.img")}};
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  Complaint complaint;
                  std::atomic<int> holders{0}, granted{0};
                  std::vector<Guest> guests;
                  std::vector<support::Registration> starts;
                  for (unsigned i = 0; i < kThreads; i++) {
                      guests.push_back(support::makeGuest("guest" + std::to_string(i), 100 + i));
                      starts.push_back(host.registerGuest(guests.back(), {}));
                      if (!starts.back())
                          return starts.back().message();
                  }
                  std::vector<std::thread> threads;
                  for (int i = 0; i < kThreads; i++)
                      threads.emplace_back([&, i] {
                          const Guest& guest = guests[i];
                          const pid_t pid = starts[i].process->pid();
                          for (int round = 0; round < 30; round++) {
                              const Outcome attach = host.acquire(guest, pid, disk);
                              if (!attach) {
                                  if (attach.message().find(disk[0].path) == std::string::npos)
                                      complaint.expect(attach, "attach");
                                  continue;
                              }
                              if (++holders > 1)
                                  complaint.add("two guests have the image");
                              granted++;
                              holders--;
                              complaint.expect(host.detach(guest, pid, disk), "detach");
                          }
                      });
                  for (std::thread& thread : threads)
                      thread.join();
                  if (granted == 0)
                      complaint.add("nobody ever got it");
                  return complaint.text();
              }),
              "");
}

TEST_F(Threads, TwoThatServeTheSameGuestDoNotSpoilItsVessel) {
    const std::vector<Disk> disks = images(4), added = images(8, "added");
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  Complaint complaint;
                  auto started = host.registerGuest(guest_, disks);
                  if (!started)
                      return started.message();
                  std::vector<std::thread> threads;
                  for (std::size_t i = 0; i < 4; i++)
                      threads.emplace_back([&, i] {
                          const std::vector<Disk> mine{added[2 * i], added[2 * i + 1]};
                          for (int round = 0; round < 15; round++) {
                              complaint.expect(host.acquire(guest_, started.process->pid(), mine), "attach");
                              complaint.expect(host.detach(guest_, started.process->pid(), mine), "detach");
                          }
                      });
                  for (std::thread& thread : threads)
                      thread.join();
                  for (const Disk& disk : added)
                      if (!kernelLocksOn(disk.path).empty())
                          complaint.add("still leased: " + disk.path);
                  for (const Disk& disk : disks)
                      if (kernelLocksOn(disk.path).empty())
                          complaint.add("lost: " + disk.path);
                  return complaint.text();
              }),
              "");
}

// Two threads of libvirtd that do nothing else, for as long as this lives.
class Busy {
public:
    explicit Busy(const std::function<void()>& work) {
        for (std::thread& thread : threads_)
            thread = std::thread([this, work] {
                while (!stop_)
                    work();
            });
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;
    ~Busy() {
        stop_ = true;
        for (std::thread& thread : threads_)
            thread.join();
    }

private:
    std::atomic<bool> stop_{false};
    std::array<std::thread, 2> threads_;
};

// The forked child has one thread. A lock of the C library that another one held at the fork is held for ever: neither
// a grant nor a refusal with all its words may need one.
TEST_F(Threads, ForkedChildWaitsForNoLockOfAThreadThatItDoesNotHave) {
    if (support::kThreadSanitizer)
        GTEST_SKIP() << "ThreadSanitizer's own locks do not survive this fork";
    const std::vector<Disk> disk{{image("disk.img")}};
    Libvirtd other;
    const Started running = boot(other, rival_, disk);
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  const Busy busy([] {
                      std::time_t now = 0;
                      std::tm parts{};
                      localtime_r(&now, &parts);
                      gmtime_r(&now, &parts);
                  });
                  std::string problem;
                  for (int round = 0; round < 40 && problem.empty(); round++)
                      if (const auto started = host.registerGuest(guest_, disk);
                          started || started.message().find("'rival'") == std::string::npos)
                          problem = "not refused: " + started.message();
                  return problem;
              }),
              "");
}

// With older C libraries a child that was forked while a thread threw cannot throw: then it has to end all the same.
TEST_F(Threads, ForkedChildEndsThoughOtherThreadsThrow) {
    constexpr bool kMayHang = !__GLIBC_PREREQ(2, 35);
    std::ofstream(path("impatient.conf")) << "storage_timeout = 1\nhandoff_wait = 0\n";
    const std::vector<Disk> missing{{path("missing.img")}};
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("impatient.conf"));
                  const Busy busy([] {
                      try {
                          throw std::runtime_error("in another thread");
                      } catch (const std::runtime_error&) {
                      }
                  });
                  std::string problem;
                  for (int round = 0; round < (kMayHang ? 2 : 40) && problem.empty(); round++)
                      try {
                          const auto started = host.registerGuest(guest_, missing);
                          if (started || started.message().find("there is no such file") == std::string::npos)
                              problem = "not refused: " + started.message();
                      } catch (const std::exception& error) { // it ended without an answer
                          problem = kMayHang ? "" : error.what();
                      }
                  return problem;
              }),
              "");
}

} // namespace
} // namespace leasehold::plugin_test

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/deadline.hpp"
#include "core/os/error.hpp"
#include "core/os/file_lock.hpp"
#include "tests/support/unit_support.hpp"

#include <array>
#include <csignal>
#include <new>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::os {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

class Deadline : public unit::LeavesNoDescriptor {
protected:
    // No child of ours is left, neither running nor as a zombie.
    void TearDown() override { EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1); }
};

TEST_F(Deadline, GivesWhatTheWorkReturns) {
    EXPECT_EQ(runWithDeadline(seconds(60), {}, [] { return std::string(); }), "");
    std::string large(300000, 'x'); // more than a pipe holds
    EXPECT_EQ(runWithDeadline(seconds(60), {}, [&] { return large; }), large);
}

TEST_F(Deadline, PassesAnErrorOnWithItsFaultAndText) {
    try {
        (void)runWithDeadline(seconds(60), {},
                              []() -> std::string { throw Error(Fault::unsupported, "no lock to trust"); });
        ADD_FAILURE() << "nothing thrown";
    } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::unsupported);
        EXPECT_STREQ(error.what(), "no lock to trust");
    }
    EXPECT_THROW((void)runWithDeadline(seconds(60), {}, []() -> std::string { throw std::bad_alloc(); }), Error);
}

TEST_F(Deadline, EndsAWorkThatHangs) {
    auto begin = steady_clock::now();
    EXPECT_EQ(runWithDeadline(milliseconds(50), {},
                              []() -> std::string {
                                  for (;;)
                                      pause();
                              }),
              std::nullopt);
    EXPECT_GE(steady_clock::now() - begin, milliseconds(50));
    EXPECT_LT(steady_clock::now() - begin, seconds(60));
}

TEST_F(Deadline, AHelperThatDiesIsAnError) {
    EXPECT_THROW((void)runWithDeadline(seconds(60), {}, []() -> std::string { _exit(0); }), Error);
    EXPECT_THROW((void)runWithDeadline(seconds(60), {},
                                       []() -> std::string {
                                           raise(SIGKILL);
                                           return "";
                                       }),
                 Error);
}

TEST_F(Deadline, TheHelperHoldsOnToNothingButWhatItNeeds) {
    unit::TempDir dir;
    Fd kept = openFile(dir.file("kept"), O_RDWR), other = openFile(dir.file("other"), O_RDWR);
    std::array<int, 1> keep{kept.get()};
    EXPECT_EQ(runWithDeadline(seconds(60), keep,
                              [&] {
                                  return std::to_string(fcntl(kept.get(), F_GETFD) >= 0) +
                                         std::to_string(fcntl(other.get(), F_GETFD) >= 0);
                              }),
              "10");
}

int handlersPipe = -1;

// libvirtd's handler writes to a descriptor by number; in the helper that number may be an image by now.
TEST_F(Deadline, NoHandlerOfTheCallersRunsInTheHelper) {
    unit::TempDir dir;
    std::string image = dir.file("image");
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    Fd reader(ends[0]), writer(ends[1]);
    handlersPipe = writer.get();
    auto before = signal(SIGTERM, [](int) { (void)!write(handlersPipe, "overwritten", 11); });
    EXPECT_EQ(runWithDeadline(milliseconds(200), {},
                              [&]() -> std::string {
                                  Fd own[4]; // one of them gets the number
                                  for (Fd& fd : own)
                                      fd = openFile(image, O_RDWR);
                                  raise(SIGTERM);
                                  for (;;)
                                      pause();
                              }),
              std::nullopt);
    signal(SIGTERM, before);
    char byte = 0;
    Fd fd = openFile(image, O_RDONLY);
    EXPECT_TRUE(read(fd.get(), &byte, 1) == 0 || byte == 0) << "the image was written to";
}

TEST_F(Deadline, WhatIsLockedThroughASharedDescriptionStaysLocked) {
    unit::TempDir dir;
    std::string image = dir.file("image");
    Fd shared = openFile(image, O_RDWR), rival = openFile(image, O_RDWR);
    std::array<int, 1> keep{shared.get()};
    EXPECT_EQ(runWithDeadline(
                  seconds(60), keep,
                  [&] {
                      bool granted = tryLock(shared.get(), LockType::write, {7, 1}, image) == LockOutcome::granted;
                      return std::string(granted ? "granted" : "contended");
                  }),
              "granted");
    EXPECT_EQ(tryLock(rival.get(), LockType::write, {7, 1}, image), LockOutcome::contended);
}

TEST_F(Deadline, WhatOnlyTheHelperHeldIsGoneWithIt) {
    unit::TempDir dir;
    std::string image = dir.file("image");
    EXPECT_EQ(runWithDeadline(milliseconds(50), {},
                              [&]() -> std::string {
                                  Fd own = openFile(image, O_RDWR);
                                  (void)tryLock(own.get(), LockType::write, {7, 1}, image);
                                  for (;;)
                                      pause();
                              }),
              std::nullopt);
    Fd rival = openFile(image, O_RDWR);
    EXPECT_EQ(tryLock(rival.get(), LockType::write, {7, 1}, image), LockOutcome::granted);
}

} // namespace
} // namespace leasehold::os

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What all unit tests share: real files, real second processes, a stand-in for QEMU, and a fixture that notices a
// descriptor left open. Knows core/os only.

#include "core/os/fd.hpp"
#include "core/os/file_lock.hpp"
#include "core/os/process.hpp"

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <sys/types.h>

namespace leasehold::unit {

// A directory that goes with the object. `parent` decides the file system.
class TempDir {
public:
    explicit TempDir(const std::string& parent = "/tmp");
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    ~TempDir();

    std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }
    // Creates the file and gives its path.
    std::string file(const std::string& name, const std::string& content = "") const;

private:
    std::string path_;
};

std::size_t countDescriptors();

// For leases by the hundred: raises the soft limit, or gives false.
bool mayOpen(std::size_t descriptors);

// Every test of a suite derived from this closes what it opened.
class LeavesNoDescriptor : public ::testing::Test {
protected:
    LeavesNoDescriptor() : before_(countDescriptors()) {}
    ~LeavesNoDescriptor() override { EXPECT_EQ(countDescriptors(), before_) << "descriptors were leaked"; }

private:
    std::size_t before_;
};

// What the call throws, in its words; "" where it throws no Error.
std::string errorOf(const std::function<void()>& call);

// EXPECT_TRUE(says(text, part)) prints the text.
::testing::AssertionResult says(const std::string& text, const std::string& part);

// What has to hold in a second process, where EXPECT would not be heard.
void demand(bool condition, const std::string& what);

// One end of a wire between the test and its child. Waiting is bounded; nobody there throws.
class Line {
public:
    explicit Line(os::Fd fd) : fd_(std::move(fd)) {}
    void say(char word = '.');
    char hear();
    bool hasWord(std::chrono::milliseconds within);
    void close() { fd_.reset(); }

private:
    os::Fd fd_;
};

// A forked second process. It has copies of all descriptors of the test, so a test that counts on the end of a lock
// forks before it opens. Killed and reaped with the object.
class Child {
public:
    explicit Child(const std::function<void(Line&)>& body);
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    ~Child() { kill(); }

    pid_t pid() const { return pid_; }
    Line& line() { return line_; }
    // Waits until the body is through. Gives what went wrong, or nothing.
    std::string join();
    void kill();

private:
    pid_t pid_ = -1;
    Line line_{os::Fd()};
    os::Fd verdict_;
};

// Mounts from here on are this process's alone. False where it may make no mount namespace.
bool hasMountsOfItsOwn();

// A QEMU: a child that closes all descriptors but the standard ones, as libvirt does, runs `before`, where libvirt
// calls the plugin, and becomes tests/support/fake_qemu by exec. Throws what `before` threw as std::runtime_error.
class StandIn {
public:
    explicit StandIn(const std::function<void()>& before);
    StandIn(const StandIn&) = delete;
    StandIn& operator=(const StandIn&) = delete;
    ~StandIn() { kill(); }

    pid_t pid() const { return pid_; }
    const os::Process& process() const { return *process_; }
    void kill(); // SIGKILL, and returns when it is reaped

    // It has the file open when this returns, or no longer, as QEMU would.
    void reads(const std::string& path) const { order('r', path); }
    void writes(const std::string& path) const { order('w', path); }
    void closes(const std::string& path) const { order('c', path); }

private:
    void order(char what, const std::string& path) const;

    pid_t pid_ = -1;
    os::Fd lifeline_;
    std::optional<os::Process> process_;
};

// Runs `body` in a child process and kills that with SIGKILL after its first system call, in another child after its
// second, and so on, until one gets to its end; after each death calls `check` with a number that names it. Gives the
// number of deaths, or -1 where tracing is forbidden. Only after each `every`th, where all take too long.
int killAtEverySystemCall(const std::function<void()>& body, const std::function<void(int)>& check, int every = 1);

// The same without the killing: `meddle` is called here while the child stands between two system calls, and the child
// goes on. `check` hears whether the body got to its end without throwing.
int meddleAtEverySystemCall(const std::function<void()>& body, const std::function<void()>& meddle,
                            const std::function<void(int, bool)>& check);

// What takes minutes is run where somebody asks for it.
bool isLongRun();

// How many system calls `body` makes, in a child process; -1 where tracing is forbidden.
int countSystemCalls(const std::function<void()>& body);

// Would somebody else get the byte for writing? Asked through a descriptor of one's own, and given back at once.
bool isFree(const std::string& path, std::int64_t byte);

} // namespace leasehold::unit

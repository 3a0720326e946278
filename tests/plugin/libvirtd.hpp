// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The cast of the plugin tests. Libvirtd is a process of its own that has loaded the built plugin and does what the
// test tells it, so that it can be killed, run beside another one ("another host"), or run out of descriptors. Qemu is
// what it started: a process that was really exec'ed and that outlives its libvirtd. Both end with the test, however
// that ends. Knows nothing of core/: what is asserted here is what a user can see.

#include "tests/support/orders.hpp"
#include "tests/support/plugin_host.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace leasehold::plugin_test {

using support::CallOptions;
using support::Disk;
using support::Guest;
using support::Outcome;
using support::StateOutcome;

// A running QEMU. Killed when the object goes; by pidfd, so that it hits nobody else.
class Qemu {
public:
    explicit Qemu(pid_t pid);
    Qemu(Qemu&& other) noexcept;
    Qemu& operator=(Qemu&& other) noexcept;
    ~Qemu();

    pid_t pid() const { return pid_; }
    bool alive() const;
    // SIGKILL; returns the moment it is dead, which may be before anybody has reaped it.
    void kill();
    void signal(int number) const;

    // It has the file open when this returns, or no longer.
    void reads(const std::string& path) const { support::order(pid_, 'r', path); }
    void writes(const std::string& path) const { support::order(pid_, 'w', path); }
    void closes(const std::string& path) const { support::order(pid_, 'c', path); }

private:
    pid_t pid_;
    int pidfd_;
};

struct Started : Outcome {
    std::optional<Qemu> qemu; // set if ok
    int fdForLabelling = -1;

    pid_t pid() const { return qemu ? qemu->pid() : -1; }
};

class Libvirtd {
public:
    struct Setup {
        std::string config{};  // contents of qemu-leasehold.conf; none: there is no such file
        bool hostile = false;  // its QEMUs are hostile_qemu instead of fake_qemu
        std::string control{}; // where those connect to
    };

    Libvirtd() : Libvirtd(Setup()) {}
    explicit Libvirtd(Setup setup);
    Libvirtd(Libvirtd&& other) noexcept;
    Libvirtd& operator=(Libvirtd&& other) noexcept;
    // Expects it to end in good order, unless it was killed.
    ~Libvirtd();

    Started start(const Guest& guest, const std::vector<Disk>& disks, const CallOptions& options = {});
    Outcome acquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks, const CallOptions& options = {});
    StateOutcome release(const Guest& guest, pid_t pid, const std::vector<Disk>& disks,
                         const CallOptions& options = {});
    StateOutcome inquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks,
                         const CallOptions& options = {});
    Outcome detach(const Guest& guest, pid_t pid, const std::vector<Disk>& disks, const CallOptions& options = {});

    // How many descriptors it has open.
    std::size_t descriptors();
    // From now on it can open just so many more; nothing: as many as it likes.
    void limitFreeDescriptors(std::optional<unsigned> free);

    pid_t pid() const { return pid_; }
    void kill(); // SIGKILL, whatever it is doing

    // For one who kills it at a random moment: sends the request, does not wait for the answer.
    void beginAcquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks);
    void beginDetach(const Guest& guest, pid_t pid, const std::vector<Disk>& disks);

private:
    struct Reply;
    Reply ask(const std::string& request);
    void tell(const std::string& request);

    pid_t pid_ = -1;
    int socket_ = -1;
    bool hostile_ = false;
};

// Runs the body in a process of its own, with a plugin of its own that nobody has initialised yet, for calls that a
// libvirtd would not make. gtest's expectations do not cross processes: the body says what is wrong, or nothing.
using Body = std::function<std::string(support::PluginHost&)>;
std::string inOwnProcess(const Body& body);

// Where a hostile QEMU takes its orders: the test's end of the wire.
class Puppeteer {
public:
    explicit Puppeteer(const std::string& path); // for Libvirtd::Setup::control
    Puppeteer(const Puppeteer&) = delete;
    Puppeteer& operator=(const Puppeteer&) = delete;
    ~Puppeteer();

    // Waits until the QEMU that was started last has called. From here on it obeys.
    void takeOver();
    // The answer: "ok", or what went wrong. hostile_qemu.c has the list of commands.
    std::string command(const std::string& line);

private:
    int listener_, connection_ = -1;
};

// gtest's assertions on what a user sees.
testing::AssertionResult granted(const Outcome& outcome);
// Refused, as libvirt's code number says (87 busy, 67 unsupported, 38 system, 9 failed), with all these words.
testing::AssertionResult refused(const Outcome& outcome, int code, const std::vector<std::string>& words);

constexpr int kBusy = 87, kUnsupported = 67, kSystem = 38, kFailed = 9;

// A folder of its own for each test, with images in it and two hosts that share it.
class PluginTest : public testing::Test {
protected:
    PluginTest();
    ~PluginTest() override;

    std::string path(const std::string& name) const { return directory_ + "/" + name; }
    // Creates it.
    std::string image(const std::string& name) const;
    std::vector<Disk> images(std::size_t count, const std::string& prefix = "disk") const;

    // Started and running, as far as a lock manager sees it: the child's call, then the Acquire before `cont`.
    Started boot(Libvirtd& host, const Guest& guest, const std::vector<Disk>& disks);

    // The main question: may a guest that has nothing to do with all this have this image now, on another host?
    testing::AssertionResult free(const std::string& image, unsigned flags = 0);
    testing::AssertionResult leased(const std::string& image, unsigned flags = 0) {
        auto result = free(image, flags);
        return result ? testing::AssertionFailure() << "a stranger may have " << image
                      : testing::AssertionSuccess() << result.message();
    }

    Libvirtd& stranger();

    Guest guest_ = support::makeGuest("web", 1);
    Guest rival_ = support::makeGuest("rival", 99);

private:
    std::string directory_;
    std::unique_ptr<Libvirtd> stranger_;
};

// The locks that others have on this file, whoever they are. Asked of the file itself: /proc/locks says the same, but
// whoever reads it while locks come and go elsewhere sees lines twice, or not at all.
struct LockedRange {
    long long first, last;
};
std::vector<LockedRange> kernelLocksOn(const std::string& path);
// Of these, how many cover this byte.
std::size_t locksOnByte(const std::string& path, long long byte);

} // namespace leasehold::plugin_test

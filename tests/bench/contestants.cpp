// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/contestants.hpp"

#include "tests/bench/report.hpp"
#include "tests/support/throw_errno.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace leasehold::bench {
namespace {

using support::throwErrno;
using Clock = std::chrono::steady_clock; // CLOCK_MONOTONIC

// Beyond any data, where leasehold's marks are too.
constexpr off_t kLockOffset = off_t{1} << 62;

Contestant::Time openLockClose(const std::vector<support::Disk>& disks) {
    const auto begin = Clock::now();
    for (const support::Disk& disk : disks) {
        const int fd = open(disk.path.c_str(), O_RDWR | O_CLOEXEC);
        if (fd < 0)
            throwErrno(disk.path);
        struct flock lock {};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = kLockOffset;
        lock.l_len = 1;
        if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
            throwErrno("lock of " + disk.path);
        close(fd);
    }
    return Clock::now() - begin;
}

} // namespace

PluginContestant::PluginContestant(const std::string& name, const std::string& plugin,
                                   const std::filesystem::path& config, const std::string& standIn,
                                   std::function<std::string()> errorSource)
    : Contestant(name), host_(plugin, standIn), guest_(support::makeGuest("bench-" + name, 1)) {
    host_.setErrorSource(std::move(errorSource));
    check(host_.init(config), "init");
}

Contestant::Time PluginContestant::check(const support::Outcome& outcome, const char* operation) const {
    if (!outcome) {
        const std::string message = outcome.message();
        throw std::runtime_error(name() + " refused " + operation + ": " +
                                 (message.empty() ? "see its messages above" : message));
    }
    return outcome.elapsed;
}

void PluginContestant::registerHere(const std::vector<support::Disk>& disks) {
    check(host_.registerHere(guest_, disks), "register");
}

Contestant::Time PluginContestant::registerGuest(const std::vector<support::Disk>& disks) {
    support::Registration registration = host_.registerGuest(guest_, disks);
    const Time elapsed = check(registration, "register");
    disks_ = disks;
    process_ = std::move(registration.process);
    return elapsed;
}

Contestant::Time PluginContestant::acquire(const std::vector<support::Disk>& disks) {
    return check(host_.acquire(guest_, process_->pid(), disks, {.state = state_}), "acquire");
}

Contestant::Time PluginContestant::release(const std::vector<support::Disk>& disks) {
    support::StateOutcome outcome = host_.release(guest_, process_->pid(), disks);
    state_ = outcome.state;
    return check(outcome, "release");
}

void PluginContestant::endGuest() {
    // sanlock's daemon notices a death when it looks, and keeps the leases until then.
    if (name() == kSanlock && process_)
        (void)host_.release(guest_, process_->pid(), disks_);
    process_.reset();
    state_.reset();
}

void BareContestant::registerHere(const std::vector<support::Disk>& disks) {
    (void)openLockClose(disks);
}

// Forked like the others' register: a fresh child pays for copying pages, and that is not the plugins' doing.
Contestant::Time BareContestant::registerGuest(const std::vector<support::Disk>& disks) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throwErrno("pipe2");
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid == 0) {
        try {
            const Time elapsed = openLockClose(disks);
            if (write(ends[1], &elapsed, sizeof elapsed) == sizeof elapsed)
                _exit(EXIT_SUCCESS);
        } catch (const std::exception& error) {
            dprintf(STDERR_FILENO, "bare: %s\n", error.what());
        }
        _exit(EXIT_FAILURE);
    }
    close(ends[1]);
    Time elapsed{};
    ssize_t got = 0;
    do
        got = read(ends[0], &elapsed, sizeof elapsed);
    while (got < 0 && errno == EINTR);
    close(ends[0]);
    while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
    }
    if (got != sizeof elapsed)
        throw std::runtime_error("the bare calls failed in the child");
    return elapsed;
}

Contestant::Time BareContestant::acquire(const std::vector<support::Disk>& disks) {
    return openLockClose(disks);
}

Contestant::Time BareContestant::release(const std::vector<support::Disk>& disks) {
    return openLockClose(disks);
}

std::function<std::string()> loadLibvirt() {
    void* libvirt = dlopen("libvirt.so.0", RTLD_NOW | RTLD_LOCAL);
    if (libvirt == nullptr)
        throw std::runtime_error(dlerror());
    const auto initialize = reinterpret_cast<int (*)()>(dlsym(libvirt, "virInitialize"));
    const auto lastError = reinterpret_cast<const char* (*)()>(dlsym(libvirt, "virGetLastErrorMessage"));
    if (initialize == nullptr || lastError == nullptr || initialize() < 0)
        throw std::runtime_error("libvirt.so.0 does not initialise");
    return [lastError] { return std::string(lastError()); };
}

} // namespace leasehold::bench

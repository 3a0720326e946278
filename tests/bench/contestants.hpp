// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_CONTESTANTS_HPP
#define LEASEHOLD_TESTS_BENCH_CONTESTANTS_HPP

// What the benchmark compares. Each contestant takes one guest through register, acquire, release, on images of its
// own: virtlockd holds POSIX locks and leasehold others, none of them shall meet. Throws when an operation is refused:
// a refusal has no time worth reporting.

#include "tests/support/plugin_host.hpp"

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace leasehold::bench {

class Contestant {
public:
    using Time = std::chrono::nanoseconds;

    explicit Contestant(std::string name) : name_(std::move(name)) {}
    virtual ~Contestant() = default;

    const std::string& name() const { return name_; }

    // The calls of register alone, in this process, which becomes no guest: for who counts them.
    virtual void registerHere(const std::vector<support::Disk>& disks) = 0;
    // In a child that was just forked, as libvirtd does it.
    virtual Time registerGuest(const std::vector<support::Disk>& disks) = 0;
    // In the calling process.
    virtual Time acquire(const std::vector<support::Disk>& disks) = 0;
    virtual Time release(const std::vector<support::Disk>& disks) = 0;
    // Not measured.
    virtual void endGuest() = 0;

private:
    std::string name_;
};

// Any lock-driver plugin, through its ABI.
class PluginContestant : public Contestant {
public:
    PluginContestant(const std::string& name, const std::string& plugin, const std::filesystem::path& config,
                     const std::string& standIn, std::function<std::string()> errorSource = {});

    void registerHere(const std::vector<support::Disk>& disks) override;
    Time registerGuest(const std::vector<support::Disk>& disks) override;
    Time acquire(const std::vector<support::Disk>& disks) override;
    Time release(const std::vector<support::Disk>& disks) override;
    void endGuest() override;
    pid_t pid() const { return process_->pid(); } // of its QEMU

private:
    Time check(const support::Outcome& outcome, const char* operation) const;

    support::PluginHost host_;
    support::Guest guest_;
    std::optional<support::GuestProcess> process_;
    std::vector<support::Disk> disks_; // that it has
    std::optional<std::string> state_; // that release gave
};

// The floor: per disk one open, one F_OFD_SETLK, one close; the same for all three operations.
class BareContestant : public Contestant {
public:
    BareContestant() : Contestant("bare") {}

    void registerHere(const std::vector<support::Disk>& disks) override;
    Time registerGuest(const std::vector<support::Disk>& disks) override;
    Time acquire(const std::vector<support::Disk>& disks) override;
    Time release(const std::vector<support::Disk>& disks) override;
    void endGuest() override {}
};

// Loads libvirt.so and initialises it as libvirtd would have done before it loads lockd.so. Returns what reads the
// calling thread's last libvirt error.
std::function<std::string()> loadLibvirt();

} // namespace leasehold::bench

#endif

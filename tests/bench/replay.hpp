// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_REPLAY_HPP
#define LEASEHOLD_TESTS_BENCH_REPLAY_HPP

// What leasehold cannot be faster than: the system calls of its acquire, release and resume, with the same arguments on
// the same kind of guest, and nothing else. No word of the vessel is read. DESIGN.md, "What grows with what", says what
// each call is for; bench says so aloud when leasehold makes more or fewer than are replayed here.

#include "tests/bench/contestants.hpp"
#include "tests/bench/report.hpp"

namespace leasehold::bench {

class Replay : public Contestant {
public:
    // Of a vessel of one message (core/qemu/vessel, kMaxDescriptorsPerMessage).
    static constexpr std::size_t kMostDisks = 240;

    // `leasehold` starts the guest. Register is not replayed: its times are leasehold's own.
    Replay(const std::string& plugin, const std::filesystem::path& config, const std::string& standIn);
    ~Replay() override;

    void registerHere(const std::vector<support::Disk>& disks) override { leasehold_.registerHere(disks); }
    Time registerGuest(const std::vector<support::Disk>& disks) override { return leasehold_.registerGuest(disks); }
    Time acquire(const std::vector<support::Disk>& disks) override;
    Time release(const std::vector<support::Disk>& disks) override;
    void endGuest() override;

private:
    Time firstAcquire(const std::vector<support::Disk>& disks);

    PluginContestant leasehold_;
    int mounts_;
    bool stopped_ = false;
};

} // namespace leasehold::bench

#endif

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Vessels for tests: honest ones, planted in a stand-in for QEMU as the plugin does it, and forged ones. The wire
// format is written down here a second time on purpose: it is what guests that run over an upgrade of leasehold rely
// on.

#include "core/qemu/vessel.hpp"
#include "tests/support/unit_support.hpp"

#include <sys/socket.h>

namespace leasehold::unit {

// The byte that stands for a lease in these tests: what a lease is to the protocol is opaque to the vessel.
constexpr std::int64_t kLeaseByte = std::int64_t{1} << 62;

qemu::GuestTag makeTag(unsigned number);

// Opens the images, and locks kLeaseByte of each where `locked`.
std::vector<qemu::StoredLease> openLeases(const std::vector<std::string>& images, bool locked = true);

// `count` images in the directory.
std::vector<std::string> makeImages(const TempDir& dir, int count);

// In a child that will become QEMU: makes the ends and puts the leases in.
void plantVessel(const qemu::GuestTag& tag, std::span<const qemu::StoredLease> leases);

// A QEMU with these leases.
StandIn plantedGuest(const qemu::GuestTag& tag, const std::vector<std::string>& images);

// Whose leases the process keeps, as everybody on this host is told.
std::optional<qemu::GuestTag> guestOf(pid_t pid);

struct WireHeader {
    char magic[8];
    std::uint32_t version;
    std::uint16_t headerSize, entrySize;
    unsigned char uuid[16];
    std::uint32_t incarnation, nameLength;
    std::uint64_t generation;
    std::uint32_t part, parts, leases, totalLeases;
    std::int32_t numbers[2];
    std::uint64_t socketInodes[2];
};
static_assert(sizeof(WireHeader) == 88);

struct WireEntry {
    std::uint64_t device, inode;
    std::uint8_t mode, flags, descriptors, reserved;
    std::uint32_t pathLength;
};
static_assert(sizeof(WireEntry) == 24);

// One message, any part of which a test may spoil.
struct Forgery {
    WireHeader header{};
    std::string name;
    std::vector<std::pair<WireEntry, std::string>> entries;
    std::vector<std::vector<os::FileId>> files; // of each entry: what its descriptors claim to be
    std::string tail;                           // after all that belongs there
    std::vector<int> fds;

    std::string bytes() const;
};

// A pair of sockets that QEMU inherits, and what is sent into it.
class ForgedVessel {
public:
    // The numbers that the ends get: where leasehold looks first.
    static constexpr int kIn = 250, kOut = 251;

    explicit ForgedVessel(int in = kIn, int out = kOut, int type = SOCK_SEQPACKET);
    int in() const { return ends_[0]; }
    int out() const { return ends_[1]; }

    // A message as leasehold would send it: a complete generation with these leases.
    Forgery message(const qemu::GuestTag& tag, const std::vector<qemu::StoredLease>& leases,
                    std::uint64_t generation = 1) const;
    void send(const Forgery& forgery) const { send(forgery.bytes(), forgery.fds); }
    void send(const std::string& bytes, const std::vector<int>& fds) const;

private:
    int ends_[2];
};

} // namespace leasehold::unit

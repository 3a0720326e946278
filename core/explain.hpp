// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The engine's words: why a guest was refused, who has the image, and what to do. Looks around (other processes'
// vessels, the owner record) only after something was refused. Each text is one line: libvirt shows it as it is.

#include "core/engine.hpp"

namespace leasehold {

// The guests of this host: looked for when somebody has to be named, once for each call of libvirt.
class Neighbours {
public:
    // Names take their time only where somebody was refused, and no more of it than this.
    explicit Neighbours(std::chrono::milliseconds limit = std::chrono::milliseconds(5000)) : limit_(limit) {}

    const qemu::HostGuests& all();

    // Until when one looks at processes for other reasons: as long, from the first time on, in the whole call.
    std::chrono::steady_clock::time_point deadline();

private:
    std::chrono::milliseconds limit_;
    std::optional<qemu::HostGuests> found_;
    std::optional<std::chrono::steady_clock::time_point> deadline_;
};

// `mode` is what the guest wanted, which is not always what it has.
std::string explainRefusal(const Guest& guest, const qemu::StoredLease& stored, lease::Mode mode,
                           const lease::Refusal& refusal, Neighbours& neighbours);

// Whether the marks in the way are those of a QEMU of this host that is dead. That passes at once: a process that
// libvirtd is just starting for another guest has inherited our copies of the leases, until it executes its program.
bool areLingering(const qemu::StoredLease& stored, const lease::Refusal& refusal, const std::string& bootId);

// For the guest's log, once for each start: the guest was let in beside another QEMU of it, which is right for a
// migration, and for nothing else. `stored` is one of `count` images that the other one has.
std::string explainJoin(const Guest& guest, const qemu::StoredLease& stored, std::size_t count);

// A program outside leasehold uses the image. `holders` are the processes of this host that do, `own` is the guest's.
std::string explainOutsider(const qemu::StoredLease& stored, const std::string& words, const os::LockHolders& holders,
                            pid_t own, Neighbours& neighbours);

// "exclusively", "shared with writers", "read-only".
const char* describeMode(lease::Mode mode);

// The guest's QEMU keeps no leases.
std::string explainNoVessel(const Guest& guest);

} // namespace leasehold

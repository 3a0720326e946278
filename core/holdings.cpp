// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/holdings.hpp"

#include "core/os/error.hpp"

#include <algorithm>

namespace leasehold {

using qemu::StoredLease;

Shares::Shares(const lease::Incarnation& self, const std::vector<const StoredLease*>& leases) {
    for (const StoredLease* lease : leases)
        visitParts(*lease, [&](const StoredLease& part) { parts_.push_back({&part, lease}); });
    std::sort(parts_.begin(), parts_.end(), [](const Part& one, const Part& other) {
        return std::pair(one.part->leaseFile.inode, one.part->leaseFile.device) <
               std::pair(other.part->leaseFile.inode, other.part->leaseFile.device);
    });
    media_.reserve(parts_.size());
    shares_.reserve(parts_.size());
    for (const Part& part : parts_) {
        media_.emplace_back(*part.part, self);
        shares_.push_back({&*media_.back(), part.whole->mode});
    }
}

std::size_t Shares::indexOf(const StoredLease& part) const {
    auto found = std::find_if(parts_.begin(), parts_.end(), [&](const Part& known) { return known.part == &part; });
    return static_cast<std::size_t>(found - parts_.begin());
}

Holdings::Holdings(const os::Process& process, qemu::Vessel vessel, std::uint64_t caller)
    : process_(&process),
      vessel_(std::move(vessel)), self_{lease::hashDomain(vessel_.tag().uuid), vessel_.tag().incarnation},
      caller_(caller) {}

std::optional<Holdings> Holdings::open(const os::Process& process, const lease::Uuid& uuid, std::uint64_t caller,
                                       qemu::Vessel::Remote remote, std::chrono::steady_clock::time_point deadline) {
    auto vessel = insist(deadline, [&]() -> std::optional<std::optional<qemu::Vessel>> {
        auto found = qemu::Vessel::retrieve(process, uuid, remote);
        if (found && found->disordered() && !found->tryReplace(found->caller()))
            return std::nullopt;
        return found;
    });
    if (!vessel)
        return std::nullopt;
    std::for_each(vessel->leases().begin(), vessel->leases().end(), checkOurs);
    return Holdings(process, std::move(*vessel), caller);
}

StoredLease* Holdings::findNamed(const std::string& name) {
    // libvirt names them in the order in which they are stored, nearly always: begin behind the last one.
    for (std::size_t i = 0; i < leases().size(); i++) {
        StoredLease& lease = leases()[(next_ + i) % leases().size()];
        if ((lease.lower && lease.mode != Mode::exclusive) || lease.isLayer() || !lease.isNamed(name))
            continue;
        next_ += i + 1;
        return &lease;
    }
    return nullptr;
}

StoredLease* Holdings::findFile(const os::FileId& file) {
    for (StoredLease& lease : leases())
        if (lease.file == file && !lease.isLayer())
            return &lease;
    return nullptr;
}

std::size_t Holdings::countTops() const {
    return static_cast<std::size_t>(
        std::count_if(leases().begin(), leases().end(), [](const StoredLease& lease) { return !lease.lower; }));
}

const os::OpenFiles& Holdings::opened() {
    return opened_ ? *opened_ : lookAgain();
}

const os::OpenFiles& Holdings::lookAgain() {
    return opened_.emplace(os::OpenFiles::read(*process_));
}

} // namespace leasehold

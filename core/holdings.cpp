// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/holdings.hpp"

#include "core/os/error.hpp"

#include <algorithm>

namespace leasehold {

using qemu::StoredLease;

namespace {

bool isAmong(const os::FileId& file, std::span<const os::FileId> files) {
    return std::find(files.begin(), files.end(), file) != files.end();
}

} // namespace

Shares::Shares(const lease::Incarnation& self, const std::vector<const StoredLease*>& leases,
               std::span<const os::FileId> held) {
    for (const StoredLease* lease : leases)
        visitParts(*lease, [&](const StoredLease& part) {
            if (!isAmong(part.leaseFile, held))
                parts_.push_back({&part, lease});
        });
    auto before = [](const Part& one, const Part& other) {
        return std::pair(one.part->leaseFile.inode, one.part->leaseFile.device) <
               std::pair(other.part->leaseFile.inode, other.part->leaseFile.device);
    };
    if (!std::is_sorted(parts_.begin(), parts_.end(), before)) // needs no memory
        std::stable_sort(parts_.begin(), parts_.end(), before);
    parts_.erase(
        std::unique(parts_.begin(), parts_.end(),
                    [](const Part& one, const Part& other) { return one.part->leaseFile == other.part->leaseFile; }),
        parts_.end());
    media_.reserve(parts_.size());
    shares_.reserve(parts_.size());
    for (const Part& part : parts_) {
        media_.emplace_back(*part.part, self);
        shares_.push_back({&*media_.back(), part.whole->mode});
    }
}

std::optional<std::size_t> Shares::findIndex(const StoredLease& part) const {
    auto found = std::find_if(parts_.begin(), parts_.end(), [&](const Part& known) { return known.part == &part; });
    return found == parts_.end() ? std::nullopt : std::optional(static_cast<std::size_t>(found - parts_.begin()));
}

Holdings::Holdings(const os::Process& process, std::unique_ptr<qemu::Vessel> vessel, std::uint64_t caller)
    : process_(&process),
      vessel_(std::move(vessel)), self_{lease::hashDomain(vessel_->tag().uuid), vessel_->tag().incarnation},
      caller_(caller) {}

std::unique_ptr<Holdings> Holdings::open(const os::Process& process, const lease::Uuid& uuid, std::uint64_t caller,
                                         const qemu::Vessel::Choice& choose,
                                         std::chrono::steady_clock::time_point deadline) {
    auto vessel = insist(deadline, [&]() -> std::optional<std::unique_ptr<qemu::Vessel>> {
        auto found = qemu::Vessel::retrieve(process, uuid, choose);
        if (found && found->disordered() && !found->tryReplace(found->caller()))
            return std::nullopt;
        return found;
    });
    if (!vessel)
        return nullptr;
    std::for_each(vessel->leases().begin(), vessel->leases().end(), checkOurs);
    return std::unique_ptr<Holdings>(new Holdings(process, std::move(vessel), caller));
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

std::vector<os::FileId> Holdings::leaseFiles(const StoredLease* without) const {
    std::vector<os::FileId> files;
    for (const StoredLease& lease : leases())
        if (&lease != without)
            visitParts(lease, [&](const StoredLease& part) { files.push_back(part.leaseFile); });
    return files;
}

bool Holdings::isShared(const StoredLease& lease) const {
    return !lease.onImage() && isAmong(lease.leaseFile, leaseFiles(&lease));
}

std::size_t Holdings::countTops() const {
    return static_cast<std::size_t>(
        std::count_if(leases().begin(), leases().end(), [](const StoredLease& lease) { return !lease.lower; }));
}

void Holdings::closeLater(os::ClosedTogether& closed) {
    closed.add(vessel_->takeEnd());
    for (StoredLease& lease : leases())
        qemu::closeLater(lease, closed);
}

const os::OpenFiles& Holdings::opened() {
    return opened_ ? *opened_ : lookAgain();
}

const os::OpenFiles& Holdings::lookAgain() {
    return opened_.emplace(os::OpenFiles::read(*process_));
}

} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What a running guest holds, as one call sees it: the leases in its vessel, and what its QEMU has open. These two
// facts say which lease belongs to which disk. A path is looked up by the engine, and only for what is new.
//
// Decides nothing and takes no lock. Called by the engine alone.

#include "core/lease/protocol.hpp"
#include "core/os/open_files.hpp"
#include "core/place.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <vector>

namespace leasehold {

// The marks of some leases as the protocol takes them: each with its companion, in the one order that all hosts keep,
// so that guests that share several images cannot refuse each other. By the inode number of what the marks are in,
// which is the same everywhere on a shared file system; device numbers are not.
//
// Two files of one name have one lease in a lockspace (Call::openNew): its marks are there once. Without those that are
// in `held`, which the guest has already.
class Shares {
public:
    Shares(const lease::Incarnation& self, const std::vector<const qemu::StoredLease*>& leases,
           std::span<const os::FileId> held = {});

    std::span<const lease::Share> all() const { return shares_; }
    // Of a share: what carries its marks, and the lease that this is part of.
    const qemu::StoredLease& partOf(std::size_t share) const { return *parts_[share].part; }
    const qemu::StoredLease& wholeOf(std::size_t share) const { return *parts_[share].whole; }
    // Nothing if the marks are none of these.
    std::optional<std::size_t> findIndex(const qemu::StoredLease& part) const;

private:
    struct Part {
        const qemu::StoredLease *part, *whole;
    };
    std::vector<Part> parts_;
    std::vector<AnyMedium> media_; // does not grow: shares point into it
    std::vector<lease::Share> shares_;
};

class Holdings {
public:
    // Null when the guest's QEMU has no vessel. `caller` is the number of this libvirtd. An interrupted change of
    // the vessel's queue is set right before anything else; the process must outlive what is returned. Throws when
    // somebody else changes the vessel all the time, until the deadline.
    static std::unique_ptr<Holdings> open(const os::Process& process, const lease::Uuid& uuid, std::uint64_t caller,
                                          const qemu::Vessel::Choice& choose,
                                          std::chrono::steady_clock::time_point deadline);

    const lease::Incarnation& self() const { return self_; }
    std::vector<qemu::StoredLease>& leases() { return vessel_->leases(); }
    const std::vector<qemu::StoredLease>& leases() const { return vessel_->leases(); }

    // Another libvirtd changed the vessel last: whatever that one was about to do is over.
    bool inherited() const { return vessel_->caller() != caller_; }

    // The lease that libvirt calls so: of a top image, or of the base of a block commit. Leases of other lower files
    // are never found by a path, which is only what somebody said once.
    qemu::StoredLease* findNamed(const std::string& name);
    qemu::StoredLease* findFile(const os::FileId& file);
    // What the marks of all leases are in; without one of them.
    std::vector<os::FileId> leaseFiles(const qemu::StoredLease* without = nullptr) const;
    // Another lease has its marks in the same file.
    bool isShared(const qemu::StoredLease& lease) const;
    // Of all that libvirt names when the guest runs: without lower files.
    std::size_t countTops() const;

    // Before a file decides something: that the leases are of the files that the vessel says.
    void compareFiles() { vessel_->compareFiles(); }

    // What QEMU has open: read when it is first asked for, and again by lookAgain.
    const os::OpenFiles& opened();
    const os::OpenFiles& lookAgain();

    // All that is open for it. Nothing can be asked of it afterwards.
    void closeLater(os::ClosedTogether& closed);

    // This libvirtd could not look at all that was to be looked at: the next call has to.
    void leaveInherited() { caller_ = vessel_->caller(); }

    // Makes the vessel say what leases() says. False when somebody else has changed it meanwhile.
    [[nodiscard]] bool tryStore() { return vessel_->tryReplace(caller_); }

private:
    Holdings(const os::Process& process, std::unique_ptr<qemu::Vessel> vessel, std::uint64_t caller);

    const os::Process* process_;
    std::unique_ptr<qemu::Vessel> vessel_;
    lease::Incarnation self_;
    std::uint64_t caller_;
    std::optional<os::OpenFiles> opened_;
    std::size_t next_ = 0; // findNamed
};

// libvirt makes one call at a time for a guest, but a libvirtd that was just replaced may still be at it: a change of
// the vessel that another one overtook starts anew. Not for ever: QEMU might play with us. So there is one deadline for
// all that a call begins anew; to be overtaken once is nothing, however late.
template <typename Work>
auto insist(std::chrono::steady_clock::time_point deadline, Work work) {
    for (int tries = 0; tries < 2 || (tries < 100 && std::chrono::steady_clock::now() < deadline); tries++)
        if (auto result = work())
            return *std::move(result);
    throw Error(Fault::system, "its leases are changed by somebody else all the time: see whether two libvirtd run on "
                               "this host");
}

} // namespace leasehold

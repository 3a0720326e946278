// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The one class that plugin/ and tools/ call: composes storage, lease and qemu. It opens images, keeps the leases in
// the guest's vessel, lets the protocol decide, and says in words what was decided. Has no state but the settings: all
// that is remembered between two calls is in QEMU and in the locks.
//
// An answer that refuses is a value; an Error that is thrown means that nothing was decided, and refuses as well.

#include "core/lease/protocol.hpp"
#include "core/os/process.hpp"
#include "core/place.hpp"
#include "core/settings.hpp"
#include "core/storage/mount.hpp"

#include <functional>
#include <string>
#include <vector>

namespace leasehold {

struct Guest {
    std::string name;
    lease::Uuid uuid{};
    pid_t pid = 0; // its QEMU
};

class Call;

class Engine {
public:
    // `warn` takes what an administrator should read although nothing is refused.
    using Warn = std::function<void(const std::string&)>;
    Engine(const Settings& settings, Warn warn);

    const Settings& settings() const { return settings_; }

    // What the refused person needs to know: the image, who has it and where, what to do. Granted when empty.
    using Answer = std::optional<std::string>;

    // In the child that is about to become QEMU, before it opens anything.
    Answer registerGuest(const Guest& guest, const std::vector<Resource>& resources) const;
    // The same for a program that runs at once, and that nobody migrates.
    Answer registerProgram(const Guest& guest, const std::vector<Resource>& resources) const;

    // Before the guest runs, with all its resources; or before QEMU opens an image that is added to a running one, or
    // writes to one below; or when the base of a block commit is given back to readers. DESIGN.md, "Whose lease it is",
    // says how these are told apart.
    Answer acquire(const Guest& guest, const std::vector<Resource>& resources, std::string_view state) const;

    // The guest has stopped. Gives the state for libvirt to keep; empty for a guest without leases.
    std::string release(const Guest& guest, const std::vector<Resource>& resources) const;

    // A live migration begins. Gives the state that travels to the destination.
    std::string inquire(const Guest& guest, const std::vector<Resource>& resources) const;

    // libvirt no longer calls these images the guest's. What QEMU still has open of them it keeps a lease of.
    void detach(const Guest& guest, const std::vector<Resource>& resources) const;

private:
    using Work = std::function<std::string(Call&)>;

    // Runs the work here, or, where the storage may hang, in a process that is given up after storage_timeout.
    std::string bounded(bool mayHang, Call& call, std::span<const int> keep, const Work& work) const;
    // The same, for a call that is about a running QEMU.
    std::string callFor(Call& call, const Work& work) const;
    Answer enter(const Guest& guest, const std::vector<Resource>& resources, lease::Entry entry) const;
    std::string changeHandoff(const Guest& guest, const std::vector<Resource>& resources,
                              std::uint32_t (*step)(const lease::Incarnation&, std::span<const lease::Share>)) const;

    Settings settings_;
    Warn warn_;
    std::string bootId_;
    std::uint64_t caller_; // the number of this libvirtd, which no other has
    mutable storage::MountTable mounts_;
};

} // namespace leasehold

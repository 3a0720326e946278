// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The one class that plugin/ and tools/ call: composes storage, lease and qemu. It opens images, keeps the leases in
// the guest's vessel, lets the protocol decide, and says in words what was decided. Has no state but the settings: all
// that is remembered between two calls is in QEMU and in the locks.
//
// An answer that refuses is a value; an Error that is thrown means that nothing was decided, and refuses as well.

#include "core/lease/protocol.hpp"
#include "core/place.hpp"
#include "core/qemu/vessel.hpp"
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

    // Before the guest runs, or before QEMU opens an image that is added to a running one.
    Answer acquire(const Guest& guest, const std::vector<Resource>& resources, std::string_view state) const;

    // The images stay attached, but the guest only reads them from now on.
    Answer acquireReadOnly(const Guest& guest, const std::vector<Resource>& resources) const;

    // The guest has stopped. Gives the state for libvirt to keep; empty for a guest without leases.
    std::string release(const Guest& guest, const std::vector<Resource>& resources) const;

    // A live migration begins. Gives the state that travels to the destination.
    std::string inquire(const Guest& guest, const std::vector<Resource>& resources) const;

    // QEMU has closed these images.
    void detach(const Guest& guest, const std::vector<Resource>& resources) const;

private:
    using Work = std::function<std::string()>;

    // Runs the work here, or, where the storage may hang, in a process that is given up after storage_timeout.
    std::string bounded(bool mayHang, const std::vector<Resource>& resources, std::span<const int> keep,
                        const Work& work) const;
    // The same, for a call that is about a running QEMU.
    std::string callFor(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources,
                        const Work& work) const;
    bool mayHang(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources) const;

    Answer registerHere(const Guest& guest, const std::vector<Resource>& resources, const qemu::VesselEnds& ends) const;
    // A refusal, or "" where it is granted. Nothing: the vessel or a lease file was changed by somebody else meanwhile.
    using Attempt = std::optional<std::string>;
    Attempt acquireHere(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources,
                        std::string_view state) const;
    Attempt acquireReadOnlyHere(const os::Process& process, const Guest& guest,
                                const std::vector<Resource>& resources) const;
    Attempt detachHere(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources) const;

    // Lets the guest in on freshly opened leases; `own` is the QEMU that may have them open already, or 0.
    Attempt admit(const Guest& guest, const lease::Incarnation& self, std::vector<Place>& places,
                  const lease::Pause& pause, pid_t own) const;
    Answer upgrade(const Guest& guest, const lease::Incarnation& self, qemu::StoredLease& stored) const;
    void recordOwner(const Guest& guest, const lease::Incarnation& self, const qemu::StoredLease& stored) const;

    Settings settings_;
    Warn warn_;
    std::string bootId_;
    mutable storage::MountTable mounts_;
};

} // namespace leasehold

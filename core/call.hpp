// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// One call of libvirt about one guest: which lease belongs to which disk, what has to change, and the change itself.
// DESIGN.md, "Whose lease it is", is the page to read first.
//
// A change is one transaction, whatever is changed, and with all companions: it counts from the instant at which the
// vessel says it. Whatever dies or fails before leaves what was, whatever dies after leaves what is to be; where marks
// of leases in the vessel have to change as well, these say `changing` meanwhile, and the next call makes the marks
// whole.
//
//     plug       marks on new descriptions     -> the vessel has them
//     upgrade    vessel: changing              -> marks -> the vessel says exclusive
//     downgrade  the vessel says reading       -> marks
//     give back  the vessel has it no longer   -> marks
//
// What a call has open lives as long as this object, which outlives the answer: closing may take as long as a storage
// likes. Called by the engine alone.

#include "core/engine.hpp"
#include "core/explain.hpp"
#include "core/holdings.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace leasehold {

// What does not change from call to call.
struct Surroundings {
    const Settings& settings;
    const Engine::Warn& warn;
    const std::string& bootId;
    std::uint64_t caller; // Holdings::open
    storage::MountTable& mounts;
    mutable Neighbours neighbours{};
};

class Call {
public:
    // `process` is the guest's QEMU, if it is there already.
    Call(const Surroundings& surroundings, const Guest& guest, const std::vector<Resource>& resources,
         std::optional<os::Process> process = std::nullopt);
    Call(const Call&) = delete;
    ~Call();

    // A refusal, or "" where it is granted. Each throws where nothing was decided.
    std::string enter(const qemu::VesselEnds& ends, lease::Entry entry);
    std::string acquire(std::string_view state);
    void detach();

    // `step` changes the marks of what the guest writes to, and gives a token; the state that names it.
    using HandoffStep = std::uint32_t (*)(const lease::Incarnation&, std::span<const lease::Share>);
    std::string changeHandoff(HandoffStep step);

    // It may wait for storage that does not answer, in a process that can be given up. Here it says whose it is waiting
    // for, while it does. Without this it does nothing where leases are on such storage, and throws
    // qemu::RemoteLeases.
    void reportTo(char* place, std::size_t size) { report_ = place, reportSize_ = size; }
    const Guest& guest() const { return guest_; }
    const std::vector<Resource>& resources() const { return resources_; }
    const os::Process& process() const { return *process_; }

private:
    using Leases = std::vector<qemu::StoredLease*>;
    // Nothing: the vessel or a lease file was changed by somebody else meanwhile, and the call begins anew.
    using Attempt = std::optional<std::string>;

    // What libvirt's call says about the guest's disks.
    enum class Naming {
        all,      // these are all of them: it runs, stops or migrates
        one,      // this one is new, or its use is changed; or it is the only one, and the guest runs
        released, // these are no longer the guest's own
    };

    // What is to be done for the resources that are named.
    struct Plan {
        Leases known;                  // the guest has them already
        Leases rising;                 // it reads them, and is about to write
        std::vector<Resource> written; // the resources of `rising`
        Leases falling;                // it wrote to them, and only reads from now on
        std::vector<Resource> added;
        std::optional<Resource> doubtful; // known, but its path leads to another file now
        bool runs = true;                 // not a plug

        // Whether anything becomes the guest's, or is used in another way.
        bool changes() const { return !rising.empty() || !falling.empty() || !added.empty() || doubtful; }
    };

    class Cursor;
    class Mentions;

    // What is to become of a lease.
    enum class Fate { stays, falls, goes };

    bool tryOpen();
    qemu::Taking choose(const std::vector<const qemu::StoredLease*>& leases) const;
    Attempt acquireHere(std::string_view state);
    Attempt detachHere();
    Attempt changeHandoffHere(HandoffStep step);

    // Marks, vessel, and what QEMU has open agree.
    bool agree(Naming naming, bool runs = false);
    bool mayDisagree(const Mentions& mentions) const;
    void lookAtQemu();
    bool heal();
    bool isOtherOfItsName(const qemu::StoredLease& lease);
    Fate fateOf(qemu::StoredLease& lease, const Mentions& mentions, bool over);
    Fate fateOfClosed(const qemu::StoredLease& lease, const Mentions& mentions, bool pending);
    Fate fateOfOpen(qemu::StoredLease& lease, const Mentions& mentions, bool pending);
    void lookAgain(Leases& closed);
    void drop(Leases closed);
    void giveBack(std::size_t number); // of dropped_
    Leases orphansOf(const Leases& closed);

    // What is to change.
    Plan plan(Naming naming);
    qemu::StoredLease* findHeld(const Resource& resource, Naming naming, Plan& plan);
    void planHeld(const Resource& resource, qemu::StoredLease& lease, Naming naming, Plan& plan);

    // What is new.
    void openAll(const std::vector<Resource>& resources);
    Place openNew(const Resource& resource) const;
    void openLayers(const Resource& resource, std::vector<Place>& places);
    std::vector<os::FileId> heldFiles() const;
    void checkNotThere() const;
    Attempt admit(std::span<Place> places, lease::Entry entry);
    lease::Registration registerPatiently(const Shares& shares, lease::Entry entry) const;
    Attempt confirm(Place& place) const;
    Attempt admitDoubtful(const Resource& resource);
    Attempt leaseLower(bool firstRun);
    Attempt admitLower(const Resource& resource, const os::FileId& file);

    // What is used in another way, and what changes hands.
    Attempt change(const Plan& plan, bool waiting);
    Attempt raise(const Plan& plan);
    Place openRising(const qemu::StoredLease& lease, const Resource& resource) const;
    std::string raiseMarks(const Plan& plan, std::span<const Place> places) const;
    void becomeExclusive(qemu::StoredLease& lease, Place& place, const Resource& resource);
    bool lower(const Leases& leases);
    std::string takeOver(const Leases& known, std::string_view state);
    void offerGained(const Plan& plan);
    void complete(qemu::StoredLease& lease);
    void leavePlanted();

    bool isFirstRun();
    std::optional<std::string> findOutsider(const qemu::StoredLease& stored, bool hidesQemu, Mode mode) const;
    std::optional<std::string> refuseOutsider(const qemu::StoredLease& stored, bool hidesQemu, Mode mode) const;
    void recordOwner(const qemu::StoredLease& whole, const qemu::StoredLease& part) const;
    void checkStillHeld(const qemu::StoredLease& part);
    void about(const std::string& path);
    bool mayWait() const { return report_ != nullptr; }
    bool pause(std::chrono::milliseconds time) const;
    void keepFresh();
    void restart();

    const Surroundings& surroundings_;
    const Settings& settings_;
    const Guest& guest_;
    const std::vector<Resource>& resources_;
    std::chrono::steady_clock::time_point deadline_; // insist
    char* report_ = nullptr;
    std::size_t reportSize_ = 0;

    std::optional<os::Process> process_;
    lease::Incarnation self_;
    std::unique_ptr<Holdings> holdings_;
    std::vector<Place> fresh_;               // not in the vessel yet
    std::vector<qemu::StoredLease> dropped_; // not in the vessel any more
    std::vector<os::Fd> replaced_;           // descriptors that others took the place of
    std::string kept_;                       // detached, but nothing tells whether QEMU has closed it
    bool looked_ = false;                    // at what QEMU has open
    bool changed_ = false;                   // the vessel does not say yet what leases() says
};

} // namespace leasehold

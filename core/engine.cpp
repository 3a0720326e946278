// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/engine.hpp"

#include "core/explain.hpp"
#include "core/lease/state.hpp"
#include "core/loss.hpp"
#include "core/os/deadline.hpp"
#include "core/os/error.hpp"
#include "core/os/text.hpp"
#include "core/qemu/image_locks.hpp"

#include <algorithm>
#include <ctime>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold {

namespace {

using lease::Incarnation;
using lease::Mode;
using lease::Share;
using os::FileId;
using qemu::StoredLease;
using std::chrono::milliseconds;

// How long a newcomer waits for somebody who is between two steps: microseconds, unless that somebody is stopped.
constexpr milliseconds kEntryWait{500};

[[noreturn]] void unusable(const std::string& path, const std::string& problem) {
    throw Error(Fault::unsupported, "cannot lease '" + path + "': " + problem);
}

// One order on every host, so that guests that share several images cannot refuse each other: by the inode number of
// what the marks are in, which is the same everywhere on a shared file system. Device numbers are not.
bool comesBefore(const StoredLease& one, const StoredLease& other) {
    return std::pair(one.leaseFile.inode, one.leaseFile.device) <
           std::pair(other.leaseFile.inode, other.leaseFile.device);
}

void sortForAllHosts(std::vector<StoredLease>& leases) {
    if (!std::is_sorted(leases.begin(), leases.end(), comesBefore))
        std::sort(leases.begin(), leases.end(), comesBefore);
}

[[noreturn]] void refuseTwice(const std::string& one, const std::string& other) {
    unusable(one, "the guest has it twice" + (one == other ? "" : ", the second time as '" + other + "'") +
                      "; detach one of them, or mark both disks <shareable/> or <readonly/> if they have one path");
}

// One lease for each resource, however many names lead to it.
std::vector<Place> openAll(const std::vector<Resource>& resources, const Incarnation& self, const Settings& settings) {
    std::vector<Place> places;
    places.reserve(resources.size());
    std::vector<std::optional<FileId>> files;
    for (const Resource& resource : resources) {
        // Before it is opened a second time: what is there by then would be in our own way.
        auto file = resources.size() > 1 ? identifyResource(resource, settings) : std::nullopt;
        auto twin = file ? std::find(files.begin(), files.end(), file) : files.end();
        if (twin == files.end()) {
            places.push_back(openPlace(resource, self, settings));
            if (auto companion = openCompanion(places.back(), self, settings))
                places.push_back(std::move(*companion));
        } else {
            const Resource& other = resources[static_cast<std::size_t>(twin - files.begin())];
            if (resource.mode != other.mode || resource.mode == Mode::exclusive)
                refuseTwice(other.path, resource.path);
        }
        files.push_back(file);
    }
    auto before = [](const Place& one, const Place& other) { return comesBefore(one.stored, other.stored); };
    std::sort(places.begin(), places.end(), before);
    for (std::size_t i = 1; i < places.size(); i++)
        if (places[i - 1].stored.leaseFile == places[i].stored.leaseFile)
            refuseTwice(places[i - 1].stored.path, places[i].stored.path);
    return places;
}

// The leases as the protocol sees them. The descriptors stay where they are.
class Shares {
public:
    Shares(const Incarnation& self, std::size_t count) : self_(self) { media_.reserve(count); } // never more

    void add(const StoredLease& stored) {
        media_.emplace_back(stored, self_);
        shares_.push_back({&*media_.back(), static_cast<Mode>(stored.mode)});
    }
    std::span<const Share> all() const { return shares_; }
    const Share& back() const { return shares_.back(); }

private:
    Incarnation self_;
    std::vector<AnyMedium> media_; // does not grow: shares point into it
    std::vector<Share> shares_;
};

void checkStillHeld(const StoredLease& stored, const Incarnation& self) {
    if (auto loss = findLoss(stored, self))
        throw Error(Fault::invalid, "the lease on '" + stored.path + "' " + *loss +
                                        ": another guest may have written to it; destroy this guest and start it "
                                        "again");
}

qemu::Use useOf(Mode mode) {
    return mode == Mode::exclusive ? qemu::Use::exclusive
           : mode == Mode::shared  ? qemu::Use::shared
                                   : qemu::Use::readOnly;
}

// A program outside leasehold that has the image: in words, or nothing. `own` is a QEMU that may have it (0: none);
// in a block commit the guest's own QEMU holds the base already.
std::optional<std::string> findOutsider(const Place& place, pid_t own) {
    const StoredLease& stored = place.stored;
    if (stored.named || stored.companion)
        return std::nullopt;
    auto conflict =
        qemu::findImageConflict(stored.imageFd(), useOf(static_cast<Mode>(stored.mode)), place.hidesQemu, stored.path);
    if (!conflict)
        return std::nullopt;
    std::vector<pid_t> holders = os::findLockHolders(stored.file, conflict->byte, conflict->byte);
    bool onlyOwn =
        !holders.empty() && std::all_of(holders.begin(), holders.end(), [&](pid_t pid) { return pid == own; });
    if (onlyOwn)
        return std::nullopt;
    return explainOutsider(stored.path, conflict->words, holders, own);
}

// The stored leases of this resource: one, or two with its companion.
std::vector<std::size_t> findLeases(const std::vector<StoredLease>& leases, const Resource& resource,
                                    const std::optional<FileId>& file) {
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < leases.size(); i++) {
        // A named lease whose file was deleted by hand is still this guest's.
        bool byName = !file && resource.named && leases[i].path == nameOf(resource);
        if (byName || (file && leases[i].file == *file))
            found.push_back(i);
    }
    return found;
}

// The stored leases of these resources; those that have none are passed over. Only what libvirt names is ever locked:
// whatever else a hostile QEMU put into its vessel stays untouched.
std::vector<std::size_t> findStored(const std::vector<StoredLease>& leases, const std::vector<Resource>& resources,
                                    const Settings& settings) {
    std::vector<std::size_t> found;
    for (const Resource& resource : resources)
        for (std::size_t i : findLeases(leases, resource, identifyResource(resource, settings)))
            found.push_back(i);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

// The token of the handoff that the guest has up on the leases it holds: it is suspended.
std::optional<std::uint32_t> handoffOf(const Incarnation& self, const std::vector<StoredLease>& leases) {
    for (const StoredLease& stored : leases) {
        if (stored.mode == static_cast<std::uint8_t>(Mode::readOnly))
            continue;
        lease::Note note = AnyMedium(stored, self)->note();
        if (note.owner && note.token != 0)
            return note.token;
    }
    return std::nullopt;
}

const std::string kGranted; // no refusal to tell

// libvirt makes one call at a time for a guest, but a libvirtd that was just replaced may still be at it: a change of
// the vessel that another one overtook starts anew. Not for ever: QEMU might play with us.
template <typename Work>
auto insist(Work work) {
    for (int tries = 0; tries < 100; tries++)
        if (auto result = work())
            return *std::move(result);
    throw Error(Fault::system, "its leases are changed by somebody else all the time: see whether two libvirtd run on "
                               "this host");
}

// The vessel of a guest that is told by libvirt to exist. An interrupted change is set right before anything else.
std::optional<qemu::Vessel> openVessel(const os::Process& process, const Guest& guest) {
    auto vessel = insist([&]() -> std::optional<std::optional<qemu::Vessel>> {
        auto found = qemu::Vessel::retrieve(process, guest.uuid);
        if (found && found->disordered() && !found->tryReplace())
            return std::nullopt;
        return found;
    });
    if (vessel)
        sortForAllHosts(vessel->leases());
    return vessel;
}

os::Process openQemu(const Guest& guest) {
    auto process = guest.pid > 0 ? os::Process::openIfExists(guest.pid) : std::nullopt;
    if (!process)
        throw Error(Fault::system, "it has no QEMU to keep its leases (there is no process " +
                                       std::to_string(guest.pid) + "): start the guest");
    return std::move(*process);
}

} // namespace

Engine::Engine(const Settings& settings, Warn warn)
    : settings_(settings), warn_(std::move(warn)),
      bootId_(os::readFileIfPossible("/proc/sys/kernel/random/boot_id", 36).value_or("")) {}

void Engine::recordOwner(const Guest& guest, const Incarnation& self, const StoredLease& stored) const {
    Mode mode = static_cast<Mode>(stored.mode);
    if (mode == Mode::readOnly)
        return; // read-only media are not written to, not even beside their data
    writeOwner(stored, {.domain = guest.name,
                        .uuid = guest.uuid,
                        .incarnation = self.id,
                        .host = os::hostName(),
                        .bootId = bootId_,
                        .pid = guest.pid,
                        .mode = mode,
                        .since = time(nullptr)});
}

Engine::Attempt Engine::admit(const Guest& guest, const Incarnation& self, std::vector<Place>& places,
                              const lease::Pause& pause, pid_t own) const {
    Shares shares(self, places.size());
    for (const Place& place : places)
        shares.add(place.stored);
    auto deadline = std::chrono::steady_clock::now() + kEntryWait;
    lease::Registration registration = lease::registerAll(self, shares.all(), {pause, kEntryWait});
    while (registration.refusal &&
           areLingering(places[registration.refusal->share].stored, *registration.refusal, bootId_) &&
           std::chrono::steady_clock::now() < deadline && pause(milliseconds(5)))
        registration = lease::registerAll(self, shares.all(), {pause, kEntryWait});
    if (registration.refusal) {
        const StoredLease& refused = places[registration.refusal->share].stored;
        return explainRefusal(guest, refused, static_cast<Mode>(refused.mode), *registration.refusal);
    }
    for (std::size_t i = 0; i < places.size(); i++) {
        const Place& place = places[i];
        StoredLease& stored = places[i].stored;
        if (!isListed(stored, self))
            return std::nullopt; // the lease file was swept between opening and locking it
        if (!place.caution.empty())
            warn_(place.caution);
        stored.joined = registration.joined[i];
        stored.guarded = place.guardable && stored.joined && !stored.named;
        if (stored.guarded)
            qemu::putUpGuard(stored.imageFd(), stored.path);
        // The source of a migration holds QEMU's locks rightfully until the guest runs here. If it is no migration QEMU
        // dies of them, and libvirt shows what the guest's log says since.
        if (stored.joined) {
            if (!stored.companion)
                warn_(explainJoin(guest, stored, shares.all()[i].medium->look()));
            continue;
        }
        if (settings_.outsiders != Settings::Outsiders::ignore) {
            if (auto outsider = findOutsider(place, own)) {
                if (settings_.outsiders == Settings::Outsiders::refuse)
                    return outsider;
                warn_(*outsider);
            }
        }
        recordOwner(guest, self, stored);
    }
    return kGranted;
}

std::string Engine::bounded(bool mayHang, const std::vector<Resource>& resources, std::span<const int> keep,
                            const Work& work) const {
    if (!mayHang)
        return work();
    // Waiting for a handoff is not waiting for the storage.
    if (auto result = os::runWithDeadline(settings_.storageTimeout + settings_.handoffWait, keep, work))
        return *result;
    throw Error(Fault::system,
                "the storage of its disks ('" + (resources.empty() ? "" : resources.front().path) + "'" +
                    (resources.size() > 1 ? " and others" : "") + ") did not answer for " +
                    std::to_string(settings_.storageTimeout.count() / 1000) +
                    " s: see whether its server and its cluster are up, and try again (option storage_timeout in "
                    "qemu-leasehold.conf)");
}

std::string Engine::callFor(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources,
                            const Work& work) const {
    return bounded(mayHang(process, guest, resources), resources, process.descriptor(), work);
}

bool Engine::mayHang(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources) const {
    if (!mounts_.hasRemote())
        return false;
    auto manifest = qemu::Vessel::readManifest(process, guest.uuid);
    if (!manifest)
        return true;
    std::vector<std::string> paths;
    for (StoredLease& lease : manifest->leases) {
        if (lease.remote)
            return true;
        paths.push_back(std::move(lease.path));
    }
    // A path that the vessel does not know may lead anywhere.
    std::sort(paths.begin(), paths.end());
    return !std::all_of(resources.begin(), resources.end(), [&](const Resource& resource) {
        return std::binary_search(paths.begin(), paths.end(), nameOf(resource));
    });
}

Engine::Answer Engine::registerGuest(const Guest& guest, const std::vector<Resource>& resources) const {
    qemu::VesselEnds ends;
    auto numbers = ends.numbers();
    bool remote = !resources.empty() && storage::hostHasRemoteMounts();
    std::string refusal =
        bounded(remote, resources, numbers, [&] { return registerHere(guest, resources, ends).value_or(""); });
    if (!refusal.empty())
        return refusal;
    ends.leaveToQemu();
    return std::nullopt;
}

Engine::Answer Engine::registerHere(const Guest& guest, const std::vector<Resource>& resources,
                                    const qemu::VesselEnds& ends) const {
    Incarnation self{lease::hashDomain(guest.uuid), lease::drawId()};
    auto sleep = [](milliseconds time) {
        std::this_thread::sleep_for(time);
        return true;
    };
    std::vector<Place> places;
    std::string refusal = insist([&] {
        places.clear();
        places = openAll(resources, self, settings_);
        return admit(guest, self, places, sleep, 0);
    });
    if (!refusal.empty())
        return refusal;
    std::vector<StoredLease> leases;
    leases.reserve(places.size());
    for (Place& place : places)
        leases.push_back(std::move(place.stored));
    ends.plant({guest.uuid, self.id, guest.name}, leases);
    return std::nullopt;
}

Engine::Answer Engine::acquire(const Guest& guest, const std::vector<Resource>& resources,
                               std::string_view state) const {
    os::Process process = openQemu(guest);
    std::string refusal = callFor(process, guest, resources, [&] {
        return insist([&] { return acquireHere(process, guest, resources, state); });
    });
    return refusal.empty() ? std::nullopt : Answer(refusal);
}

Engine::Attempt Engine::acquireHere(const os::Process& process, const Guest& guest,
                                    const std::vector<Resource>& resources, std::string_view state) const {
    auto vessel = openVessel(process, guest);
    if (!vessel && process.diedWithin(milliseconds(0)))
        throw Error(Fault::system, "its QEMU has ended: start the guest");
    if (!vessel)
        return settings_.guestsWithoutLease == Settings::Unleased::allow ? kGranted : explainNoVessel(guest);
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    auto pause = [&](milliseconds time) { return !process.diedWithin(time); };

    // What QEMU is about to open, as opposed to what it has.
    std::vector<Resource> added;
    std::vector<std::size_t> known;
    for (const Resource& resource : resources) {
        std::vector<std::size_t> found = findLeases(vessel->leases(), resource, identifyResource(resource, settings_));
        if (found.empty())
            added.push_back(resource);
        bool upgraded = false;
        for (std::size_t i : found) {
            StoredLease& stored = vessel->leases()[i];
            Mode held = static_cast<Mode>(stored.mode);
            if (resource.mode == Mode::exclusive && held == Mode::readOnly && stored.writable) {
                // The next block commit into the same base.
                if (Answer refusal = upgrade(guest, self, stored))
                    return refusal;
                upgraded = true;
            } else if (resource.mode != held && !(resource.mode == Mode::readOnly && held == Mode::exclusive)) {
                unusable(resource.path, std::string("the guest has it already, ") + describeMode(held) +
                                            ", and cannot have it " + describeMode(resource.mode) +
                                            " as well: detach the other disk first");
            }
            known.push_back(i);
        }
        if (upgraded && !vessel->tryReplace())
            return std::nullopt;
    }
    std::vector<Place> fresh = openAll(added, self, settings_);
    for (const Place& place : fresh)
        for (const StoredLease& stored : vessel->leases())
            if (stored.leaseFile == place.stored.leaseFile)
                refuseTwice(stored.path, place.stored.path);
    if (Attempt refusal = admit(guest, self, fresh, pause, guest.pid); refusal != kGranted)
        return refusal;

    std::vector<const StoredLease*> order;
    order.reserve(known.size() + fresh.size());
    for (std::size_t i : known)
        order.push_back(&vessel->leases()[i]);
    for (const Place& place : fresh)
        order.push_back(&place.stored);
    std::sort(order.begin(), order.end(),
              [](const StoredLease* one, const StoredLease* other) { return comesBefore(*one, *other); });
    order.erase(std::unique(order.begin(), order.end()), order.end());
    Shares shares(self, order.size());
    for (const StoredLease* stored : order) {
        checkStillHeld(*stored, self);
        shares.add(*stored);
    }
    auto begun = std::chrono::steady_clock::now();
    auto refusal =
        lease::acquireAll(self, shares.all(), lease::parseState(state, guest.uuid), {pause, settings_.handoffWait});
    if (refusal) {
        const StoredLease& refused = *order[refusal->share];
        std::string text = explainRefusal(guest, refused, static_cast<Mode>(refused.mode), *refusal);
        if (settings_.handoffWait > milliseconds(0) &&
            std::chrono::steady_clock::now() - begun >= settings_.handoffWait)
            text += "; waited " + std::to_string(settings_.handoffWait.count() / 1000) +
                    " s for the image to be handed over (option handoff_wait in qemu-leasehold.conf)";
        return text;
    }

    // A disk that is added to a suspended guest goes along when that guest migrates: libvirt calls nothing then.
    if (auto token = fresh.empty() ? std::nullopt : handoffOf(self, vessel->leases()))
        for (const Place& place : fresh) {
            Shares share(self, 1);
            share.add(place.stored);
            lease::offer(self, share.back(), *token);
        }

    bool changed = !fresh.empty();
    // The handoff is complete: the guard may go, and from now on the record names us.
    auto complete = [&](StoredLease& stored) {
        if (stored.guarded)
            qemu::takeDownGuard(stored.imageFd(), stored.path);
        if (stored.joined)
            recordOwner(guest, self, stored);
        stored.guarded = stored.joined = false;
    };
    for (std::size_t i : known) {
        StoredLease& stored = vessel->leases()[i];
        changed = changed || stored.joined;
        complete(stored);
    }
    for (Place& place : fresh) {
        complete(place.stored);
        vessel->leases().push_back(std::move(place.stored));
    }
    if (changed) {
        sortForAllHosts(vessel->leases());
        if (!vessel->tryReplace())
            return std::nullopt; // what is fresh vanishes with our descriptors
    }
    return kGranted;
}

Engine::Answer Engine::upgrade(const Guest& guest, const Incarnation& self, StoredLease& stored) const {
    Shares shares(self, 1);
    shares.add(stored);
    if (auto refusal = lease::upgrade(self, shares.back()))
        return explainRefusal(guest, stored, Mode::exclusive, *refusal);
    stored.mode = static_cast<std::uint8_t>(Mode::exclusive);
    return std::nullopt;
}

Engine::Answer Engine::acquireReadOnly(const Guest& guest, const std::vector<Resource>& resources) const {
    os::Process process = openQemu(guest);
    std::string refusal = callFor(process, guest, resources, [&] {
        return insist([&] { return acquireReadOnlyHere(process, guest, resources); });
    });
    return refusal.empty() ? std::nullopt : Answer(refusal);
}

Engine::Attempt Engine::acquireReadOnlyHere(const os::Process& process, const Guest& guest,
                                            const std::vector<Resource>& resources) const {
    auto vessel = openVessel(process, guest);
    std::vector<std::size_t> held;
    if (vessel)
        for (std::size_t i : findStored(vessel->leases(), resources, settings_))
            if (vessel->leases()[i].mode == static_cast<std::uint8_t>(Mode::exclusive) &&
                !os::hasOpen(process, vessel->leases()[i].file, os::Access::write))
                held.push_back(i);
    // Not held for writing, or QEMU still writes: a read-only image, or one that the guest has for writing as well.
    if (held.empty())
        return acquireHere(process, guest, resources, "");
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    // The vessel must never claim more than the marks hold: it says read-only first.
    for (std::size_t i : held)
        vessel->leases()[i].mode = static_cast<std::uint8_t>(Mode::readOnly);
    if (!vessel->tryReplace())
        return std::nullopt;
    Shares shares(self, held.size());
    for (std::size_t i : held)
        shares.add(vessel->leases()[i]);
    for (const Share& share : shares.all())
        lease::downgrade(self, share);
    return kGranted;
}

namespace {

// The marks of the guest's leases on these images are changed by `step`, which gives the token. No vessel: no state.
template <typename Step>
std::string changeHandoff(const os::Process& process, const Guest& guest, const std::vector<Resource>& resources,
                          const Settings& settings, Step step) {
    auto vessel = openVessel(process, guest);
    if (!vessel)
        return {};
    std::vector<std::size_t> stored = findStored(vessel->leases(), resources, settings);
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    Shares shares(self, stored.size());
    for (std::size_t i : stored)
        shares.add(vessel->leases()[i]);
    return lease::encodeState(guest.uuid, step(self, shares.all()));
}

} // namespace

// A QEMU that has died meanwhile holds nothing: there is nothing to do for it in the three calls that follow.

std::string Engine::release(const Guest& guest, const std::vector<Resource>& resources) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    return callFor(*process, guest, resources,
                   [&] { return changeHandoff(*process, guest, resources, settings_, lease::releaseAll); });
}

std::string Engine::inquire(const Guest& guest, const std::vector<Resource>& resources) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    return callFor(*process, guest, resources,
                   [&] { return changeHandoff(*process, guest, resources, settings_, lease::inquireAll); });
}

void Engine::detach(const Guest& guest, const std::vector<Resource>& resources) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return;
    callFor(*process, guest, resources, [&] { return insist([&] { return detachHere(*process, guest, resources); }); });
}

Engine::Attempt Engine::detachHere(const os::Process& process, const Guest& guest,
                                   const std::vector<Resource>& resources) const {
    auto vessel = openVessel(process, guest);
    if (!vessel)
        return kGranted;
    std::vector<StoredLease>& leases = vessel->leases();
    std::vector<StoredLease> dropped, vanished;
    for (const Resource& resource : resources) {
        auto file = identifyResource(resource, settings_);
        auto isIts = [&](const StoredLease& lease) {
            return file ? lease.file == *file : lease.path == nameOf(resource);
        };
        auto first = std::find_if(leases.begin(), leases.end(), isIts);
        if (first == leases.end())
            continue;
        // The guest has the image in another drive as well, or the attaching of a second one failed. A former top image
        // that became a backing file is open for reading only.
        bool reads = first->mode == static_cast<std::uint8_t>(Mode::readOnly);
        if (!first->named && os::hasOpen(process, first->file, reads ? os::Access::any : os::Access::write))
            continue;
        // A file that only this guest's vessel vouches for is let go, but nothing is done to it.
        for (StoredLease& lease : leases)
            if (isIts(lease))
                (file ? dropped : vanished).push_back(std::move(lease));
        std::erase_if(leases, [](const StoredLease& lease) { return !lease.lease.open(); });
    }
    if (dropped.empty() && vanished.empty())
        return kGranted;
    if (!vessel->tryReplace())
        return std::nullopt;
    // Whoever dies before this line leaves the lease to the next change of this vessel, or to QEMU's end.
    Shares shares({lease::hashDomain(guest.uuid), vessel->tag().incarnation}, dropped.size());
    for (const StoredLease& stored : dropped)
        shares.add(stored);
    for (const Share& share : shares.all())
        share.medium->removeAll();
    for (const StoredLease& stored : dropped)
        sweepLease(stored);
    return kGranted;
}

} // namespace leasehold

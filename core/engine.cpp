// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/engine.hpp"

#include "core/explain.hpp"
#include "core/lease/byte_range.hpp"
#include "core/lease/state.hpp"
#include "core/os/deadline.hpp"
#include "core/os/error.hpp"
#include "core/qemu/image_locks.hpp"
#include "core/storage/classify.hpp"

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

[[noreturn]] void unusable(const std::string& path, const std::string& problem, Fault fault = Fault::unsupported) {
    throw Error(fault, "cannot lease '" + path + "': " + problem);
}

struct stat statImage(const std::string& path) {
    struct stat status;
    if (stat(path.c_str(), &status) == 0)
        return status;
    int error = errno;
    struct stat link;
    if (error == ENOENT && lstat(path.c_str(), &link) == 0)
        unusable(path,
                 "the path is a symbolic link to a file that does not exist; restore the file or correct the link",
                 Fault::invalid);
    if (error == ENOENT || error == ENOTDIR)
        unusable(path, "there is no such file; restore it or correct the path in the guest's configuration",
                 Fault::invalid);
    throw SystemError(error, "stat", path);
}

// A hint for the errors that an administrator can do something about.
std::string hintFor(int error, Mode mode) {
    if (mode != Mode::readOnly && (error == EROFS || error == EACCES || error == EPERM))
        return "; a guest that writes needs it writable: change the storage, or mark the disk <readonly/>";
    if (error == EACCES || error == EPERM)
        return "; libvirtd must be allowed to read it";
    return "";
}

// Opens the image as this mode needs it, and refuses what has no lock to trust.
StoredLease openImage(const Image& image) {
    struct stat status = statImage(image.path);
    bool directory = S_ISDIR(status.st_mode);
    if (directory && image.mode != Mode::readOnly)
        unusable(image.path, "it is a directory, which can only be leased read-only: mark the disk <readonly/>");
    if (S_ISBLK(status.st_mode))
        unusable(image.path, "it is a block device; locks on those reach only this host, and this version has no "
                             "lockspace for them (a later one will: lvm_lockspace_dir, scsi_lockspace_dir)");
    if (!directory && !S_ISREG(status.st_mode))
        unusable(image.path, "it is neither a regular file nor a directory");

    bool writable = image.mode != Mode::readOnly;
    // Never waits for the other end of a FIFO, or for a lease (fcntl(2), F_SETLEASE) to be broken.
    StoredLease opened;
    int flags = (writable ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_NOCTTY;
    int error = os::tryOpen(image.path, flags, opened.fd);
    // A server that squashes root (exports(5)) lets only the image's owner open it. The descriptor can be locked and
    // read by root afterwards: permissions are checked at open.
    if (error == EACCES && geteuid() == 0) {
        os::FileSystemUser owner(status.st_uid, status.st_gid);
        error = os::tryOpen(image.path, flags, opened.fd);
    }
    if (error != 0)
        throw Error(Fault::system, std::string("cannot lease the image: ") +
                                       SystemError(error, "open", image.path).what() + hintFor(error, image.mode));
    opened.file = os::identify(opened.fd.get(), image.path);
    if (opened.file != FileId{status.st_dev, status.st_ino})
        unusable(image.path, "it was replaced while it was opened; try again", Fault::invalid);
    opened.mode = static_cast<std::uint8_t>(image.mode);
    opened.writable = writable;
    opened.path = image.path;

    storage::Storage found = storage::classify(opened.fd.get(), image.path);
    if (found.lock == storage::LockKind::none)
        unusable(image.path, "it is on " + found.name + ", and " + found.reason +
                                 " (a later version will take a lockspace directory instead: file_lockspace_dir)");
    opened.remote = found.remote;
    opened.guarded = found.hidesReadLocks; // QEMU's locks are not seen from here: admit decides
    return opened;
}

// One order on every host, so that guests that share several images cannot refuse each other: by inode number, which
// is the same everywhere on a shared file system. Device numbers are not.
bool comesBefore(const FileId& one, const FileId& other) {
    return std::pair(one.inode, one.device) < std::pair(other.inode, other.device);
}

void sortForAllHosts(std::vector<StoredLease>& leases) {
    auto before = [](const StoredLease& one, const StoredLease& other) { return comesBefore(one.file, other.file); };
    if (!std::is_sorted(leases.begin(), leases.end(), before))
        std::sort(leases.begin(), leases.end(), before);
}

// One lease for each file, however many names lead to it.
std::vector<StoredLease> openAll(const std::vector<Image>& images) {
    std::vector<StoredLease> leases;
    leases.reserve(images.size());
    for (const Image& image : images)
        leases.push_back(openImage(image));
    sortForAllHosts(leases);
    for (std::size_t i = 1; i < leases.size(); i++) {
        const StoredLease &one = leases[i - 1], &other = leases[i];
        if (one.file != other.file)
            continue;
        bool together = one.mode == other.mode && one.mode != static_cast<std::uint8_t>(Mode::exclusive);
        if (!together)
            unusable(one.path, one.path == other.path
                                   ? "the guest has it twice; mark both disks <shareable/> or <readonly/>"
                                   : "the guest has it twice, the second time as '" + other.path +
                                         "'; mark both disks <shareable/> or <readonly/>");
    }
    leases.erase(std::unique(leases.begin(), leases.end(),
                             [](const auto& one, const auto& other) { return one.file == other.file; }),
                 leases.end());
    return leases;
}

// The leases as the protocol sees them. The descriptors stay where they are.
class Shares {
public:
    explicit Shares(std::size_t count) { media_.reserve(count); } // never more: shares point into it

    void add(const StoredLease& stored) {
        media_.emplace_back(stored.fd.get(), stored.writable, stored.path);
        shares_.push_back({&media_.back(), static_cast<Mode>(stored.mode)});
    }
    std::span<const Share> all() const { return shares_; }
    const Share& back() const { return shares_.back(); }

private:
    std::vector<lease::ByteRangeMedium> media_;
    std::vector<Share> shares_;
};

// A server that has given the lock away while this host was cut off lets us have it again when the thief is gone, and
// somebody has written in between. NFSv4 tells by EIO on what goes past the cache, for good (Linux fs/nfs/nfs4state.c,
// NFS_LOCK_LOST; measured in tests/lab, with an empty file too).
void checkStillHeld(const StoredLease& stored) {
    alignas(4096) static thread_local char block[4096];
    int fd = stored.fd.get();
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) < 0)
        throw SystemError(errno, "prepare to read", stored.path);
    ssize_t got = pread(fd, block, sizeof block, 0);
    int error = got < 0 ? errno : 0;
    (void)fcntl(fd, F_SETFL, flags);
    if (error != 0)
        throw Error(Fault::system,
                    "the lease on image '" + stored.path + "' was lost, or its storage is broken (" +
                        SystemError(error, "read", stored.path).what() +
                        "): another guest may have written to it; destroy this guest and start it again");
}

qemu::Use useOf(Mode mode) {
    return mode == Mode::exclusive ? qemu::Use::exclusive
           : mode == Mode::shared  ? qemu::Use::shared
                                   : qemu::Use::readOnly;
}

// A program outside leasehold that has the image: in words, or nothing. `own` is a QEMU that may have it (0: none);
// in a block commit the guest's own QEMU holds the base already.
std::optional<std::string> findOutsider(const StoredLease& stored, bool hidden, pid_t own) {
    auto conflict =
        qemu::findImageConflict(stored.fd.get(), useOf(static_cast<Mode>(stored.mode)), hidden, stored.path);
    if (!conflict)
        return std::nullopt;
    std::vector<pid_t> holders = os::findLockHolders(stored.file, conflict->byte, conflict->byte);
    bool onlyOwn =
        !holders.empty() && std::all_of(holders.begin(), holders.end(), [&](pid_t pid) { return pid == own; });
    if (onlyOwn)
        return std::nullopt;
    return explainOutsider(stored.path, conflict->words, holders, own);
}

// Sorted leases: a guest may have hundreds.
std::vector<StoredLease>::iterator findByFile(std::vector<StoredLease>& leases, const FileId& file) {
    auto found = std::lower_bound(leases.begin(), leases.end(), file, [](const StoredLease& stored, const FileId& id) {
        return comesBefore(stored.file, id);
    });
    return found != leases.end() && found->file == file ? found : leases.end();
}

// Which file the path leads to. One that is gone leads nowhere; one that cannot be looked at is an error.
std::optional<FileId> identifyIfExists(const std::string& path) {
    struct stat status;
    if (stat(path.c_str(), &status) == 0)
        return FileId{status.st_dev, status.st_ino};
    if (errno == ENOENT || errno == ENOTDIR || errno == ELOOP)
        return std::nullopt;
    throw SystemError(errno, "stat", path);
}

// The stored leases of these images; those that have none are passed over. Only what libvirt names is ever locked:
// whatever else a hostile QEMU put into its vessel stays untouched.
std::vector<std::size_t> findStored(std::vector<StoredLease>& leases, const std::vector<Image>& images) {
    std::vector<std::size_t> found;
    for (const Image& image : images) {
        auto file = identifyIfExists(image.path);
        if (!file)
            continue;
        auto stored = findByFile(leases, *file);
        if (stored != leases.end())
            found.push_back(static_cast<std::size_t>(stored - leases.begin()));
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

// The token of the handoff that the guest has up on the leases it holds: it is suspended.
std::optional<std::uint32_t> handoffOf(const std::vector<StoredLease>& leases) {
    for (const StoredLease& stored : leases) {
        if (stored.mode == static_cast<std::uint8_t>(Mode::readOnly))
            continue;
        lease::Note note = lease::ByteRangeMedium(stored.fd.get(), stored.writable, stored.path).note();
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
    throw Error(Fault::system, "the leases in its QEMU are changed by somebody else all the time: see whether two "
                               "libvirtd run on this host");
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
    char host[256] = "";
    (void)gethostname(host, sizeof host - 1);
    lease::writeRecord(stored.fd.get(), {.domain = guest.name,
                                         .uuid = guest.uuid,
                                         .incarnation = self.id,
                                         .host = host,
                                         .bootId = bootId_,
                                         .pid = guest.pid,
                                         .mode = mode,
                                         .since = time(nullptr)});
}

Engine::Answer Engine::admit(const Guest& guest, const Incarnation& self, std::vector<StoredLease>& leases,
                             const lease::Pause& pause, pid_t own) const {
    Shares shares(leases.size());
    for (const StoredLease& stored : leases)
        shares.add(stored);
    auto deadline = std::chrono::steady_clock::now() + kEntryWait;
    lease::Registration registration = lease::registerAll(self, shares.all(), {pause, kEntryWait});
    while (registration.refusal && areLingering(leases[registration.refusal->share], *registration.refusal, bootId_) &&
           std::chrono::steady_clock::now() < deadline && pause(milliseconds(5)))
        registration = lease::registerAll(self, shares.all(), {pause, kEntryWait});
    if (registration.refusal) {
        const StoredLease& refused = leases[registration.refusal->share];
        return explainRefusal(guest, refused, static_cast<Mode>(refused.mode), *registration.refusal);
    }
    for (std::size_t i = 0; i < leases.size(); i++) {
        leases[i].joined = registration.joined[i];
        bool hidden = leases[i].guarded;
        leases[i].guarded = hidden && leases[i].joined;
        if (leases[i].guarded)
            qemu::putUpGuard(leases[i].fd.get(), leases[i].path);
        // The source of a migration holds QEMU's locks rightfully until the guest runs here. If it is no migration QEMU
        // dies of them, and libvirt shows what the guest's log says since.
        if (leases[i].joined) {
            warn_(explainJoin(guest, leases[i], shares.all()[i].medium->look()));
            continue;
        }
        if (settings_.outsiders != Settings::Outsiders::ignore) {
            if (auto outsider = findOutsider(leases[i], hidden, own)) {
                if (settings_.outsiders == Settings::Outsiders::refuse)
                    return outsider;
                warn_(*outsider);
            }
        }
        recordOwner(guest, self, leases[i]);
    }
    return std::nullopt;
}

std::string Engine::bounded(bool mayHang, const std::vector<Image>& images, std::span<const int> keep,
                            const Work& work) const {
    if (!mayHang)
        return work();
    // Waiting for a handoff is not waiting for the storage.
    if (auto result = os::runWithDeadline(settings_.storageTimeout + settings_.handoffWait, keep, work))
        return *result;
    throw Error(Fault::system,
                "the storage of its disks (image '" + (images.empty() ? "" : images.front().path) + "'" +
                    (images.size() > 1 ? " and others" : "") + ") did not answer for " +
                    std::to_string(settings_.storageTimeout.count() / 1000) +
                    " s: see whether its server and its cluster are up, and try again (option storage_timeout in "
                    "qemu-leasehold.conf)");
}

std::string Engine::callFor(const os::Process& process, const Guest& guest, const std::vector<Image>& images,
                            const Work& work) const {
    return bounded(mayHang(process, guest, images), images, process.descriptor(), work);
}

bool Engine::mayHang(const os::Process& process, const Guest& guest, const std::vector<Image>& images) const {
    if (!mounts_.hasRemote())
        return false;
    auto manifest = qemu::Vessel::inspectManifest(process, guest.uuid);
    if (!manifest || manifest->remote)
        return true;
    // A path that the vessel does not know may lead anywhere.
    std::sort(manifest->paths.begin(), manifest->paths.end());
    return !std::all_of(images.begin(), images.end(), [&](const Image& image) {
        return std::binary_search(manifest->paths.begin(), manifest->paths.end(), image.path);
    });
}

Engine::Answer Engine::registerGuest(const Guest& guest, const std::vector<Image>& images) const {
    qemu::VesselEnds ends;
    auto numbers = ends.numbers();
    bool remote = !images.empty() && storage::hostHasRemoteMounts();
    std::string refusal =
        bounded(remote, images, numbers, [&] { return registerHere(guest, images, ends).value_or(""); });
    if (!refusal.empty())
        return refusal;
    ends.leaveToQemu();
    return std::nullopt;
}

Engine::Answer Engine::registerHere(const Guest& guest, const std::vector<Image>& images,
                                    const qemu::VesselEnds& ends) const {
    Incarnation self{lease::hashDomain(guest.uuid), lease::drawId()};
    std::vector<StoredLease> leases = openAll(images);
    auto sleep = [](milliseconds time) {
        std::this_thread::sleep_for(time);
        return true;
    };
    if (Answer refusal = admit(guest, self, leases, sleep, 0))
        return refusal;
    ends.plant({guest.uuid, self.id, guest.name}, leases);
    return std::nullopt;
}

Engine::Answer Engine::acquire(const Guest& guest, const std::vector<Image>& images, std::string_view state) const {
    os::Process process = openQemu(guest);
    std::string refusal = callFor(process, guest, images,
                                  [&] { return insist([&] { return acquireHere(process, guest, images, state); }); });
    return refusal.empty() ? std::nullopt : Answer(refusal);
}

Engine::Attempt Engine::acquireHere(const os::Process& process, const Guest& guest, const std::vector<Image>& images,
                                    std::string_view state) const {
    auto vessel = openVessel(process, guest);
    if (!vessel && process.diedWithin(milliseconds(0)))
        throw Error(Fault::system, "its QEMU has ended: start the guest");
    if (!vessel)
        return settings_.guestsWithoutLease == Settings::Unleased::allow ? kGranted : explainNoVessel(guest);
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    auto pause = [&](milliseconds time) { return !process.diedWithin(time); };

    // What QEMU is about to open, as opposed to what it has.
    std::vector<Image> added;
    std::vector<std::size_t> known;
    for (const Image& image : images) {
        struct stat status = statImage(image.path);
        auto stored = findByFile(vessel->leases(), {status.st_dev, status.st_ino});
        if (stored == vessel->leases().end()) {
            added.push_back(image);
            continue;
        }
        Mode held = static_cast<Mode>(stored->mode);
        if (image.mode == Mode::exclusive && held == Mode::readOnly && stored->writable) {
            // The next block commit into the same base.
            if (Answer refusal = upgrade(guest, self, *stored))
                return refusal;
            if (!vessel->tryReplace())
                return std::nullopt;
        } else if (image.mode != held && !(image.mode == Mode::readOnly && held == Mode::exclusive)) {
            unusable(image.path, std::string("the guest has it already, ") + describeMode(held) +
                                     ", and cannot have it " + describeMode(image.mode) +
                                     " as well: detach the other disk first");
        }
        known.push_back(static_cast<std::size_t>(stored - vessel->leases().begin()));
    }
    std::vector<StoredLease> fresh = openAll(added);
    if (Answer refusal = admit(guest, self, fresh, pause, guest.pid))
        return refusal;

    std::vector<const StoredLease*> order;
    order.reserve(known.size() + fresh.size());
    for (std::size_t i : known)
        order.push_back(&vessel->leases()[i]);
    for (const StoredLease& stored : fresh)
        order.push_back(&stored);
    std::sort(order.begin(), order.end(),
              [](const StoredLease* one, const StoredLease* other) { return comesBefore(one->file, other->file); });
    order.erase(std::unique(order.begin(), order.end()), order.end());
    Shares shares(order.size());
    for (const StoredLease* stored : order) {
        if (stored->remote && stored->writable)
            checkStillHeld(*stored);
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
    if (auto token = fresh.empty() ? std::nullopt : handoffOf(vessel->leases()))
        for (const StoredLease& stored : fresh) {
            Shares share(1);
            share.add(stored);
            lease::offer(self, share.back(), *token);
        }

    bool changed = !fresh.empty();
    // The handoff is complete: the guard may go, and from now on the record names us.
    auto complete = [&](StoredLease& stored) {
        if (stored.guarded)
            qemu::takeDownGuard(stored.fd.get(), stored.path);
        if (stored.joined)
            recordOwner(guest, self, stored);
        stored.guarded = stored.joined = false;
    };
    for (std::size_t i : known) {
        StoredLease& stored = vessel->leases()[i];
        changed = changed || stored.joined;
        complete(stored);
    }
    for (StoredLease& stored : fresh) {
        complete(stored);
        vessel->leases().push_back(std::move(stored));
    }
    if (changed) {
        sortForAllHosts(vessel->leases());
        if (!vessel->tryReplace())
            return std::nullopt; // what is fresh vanishes with our descriptors
    }
    return kGranted;
}

Engine::Answer Engine::upgrade(const Guest& guest, const Incarnation& self, StoredLease& stored) const {
    Shares shares(1);
    shares.add(stored);
    if (auto refusal = lease::upgrade(self, shares.back()))
        return explainRefusal(guest, stored, Mode::exclusive, *refusal);
    stored.mode = static_cast<std::uint8_t>(Mode::exclusive);
    return std::nullopt;
}

Engine::Answer Engine::acquireReadOnly(const Guest& guest, const std::vector<Image>& images) const {
    os::Process process = openQemu(guest);
    std::string refusal = callFor(process, guest, images,
                                  [&] { return insist([&] { return acquireReadOnlyHere(process, guest, images); }); });
    return refusal.empty() ? std::nullopt : Answer(refusal);
}

Engine::Attempt Engine::acquireReadOnlyHere(const os::Process& process, const Guest& guest,
                                            const std::vector<Image>& images) const {
    auto vessel = openVessel(process, guest);
    std::vector<std::size_t> held;
    if (vessel)
        for (std::size_t i : findStored(vessel->leases(), images))
            if (vessel->leases()[i].mode == static_cast<std::uint8_t>(Mode::exclusive) &&
                !os::hasOpen(process, vessel->leases()[i].file, os::Access::write))
                held.push_back(i);
    // Not held for writing, or QEMU still writes: a read-only image, or one that the guest has for writing as well.
    if (held.empty())
        return acquireHere(process, guest, images, "");
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    // The vessel must never claim more than the marks hold: it says read-only first.
    for (std::size_t i : held)
        vessel->leases()[i].mode = static_cast<std::uint8_t>(Mode::readOnly);
    if (!vessel->tryReplace())
        return std::nullopt;
    Shares shares(held.size());
    for (std::size_t i : held)
        shares.add(vessel->leases()[i]);
    for (const Share& share : shares.all())
        lease::downgrade(self, share);
    return kGranted;
}

namespace {

// The marks of the guest's leases on these images are changed by `step`, which gives the token. No vessel: no state.
template <typename Step>
std::string changeHandoff(const os::Process& process, const Guest& guest, const std::vector<Image>& images, Step step) {
    auto vessel = openVessel(process, guest);
    if (!vessel)
        return {};
    std::vector<std::size_t> stored = findStored(vessel->leases(), images);
    Shares shares(stored.size());
    for (std::size_t i : stored)
        shares.add(vessel->leases()[i]);
    Incarnation self{lease::hashDomain(guest.uuid), vessel->tag().incarnation};
    return lease::encodeState(guest.uuid, step(self, shares.all()));
}

} // namespace

// A QEMU that has died meanwhile holds nothing: there is nothing to do for it in the three calls that follow.

std::string Engine::release(const Guest& guest, const std::vector<Image>& images) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    return callFor(*process, guest, images, [&] { return changeHandoff(*process, guest, images, lease::releaseAll); });
}

std::string Engine::inquire(const Guest& guest, const std::vector<Image>& images) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    return callFor(*process, guest, images, [&] { return changeHandoff(*process, guest, images, lease::inquireAll); });
}

void Engine::detach(const Guest& guest, const std::vector<Image>& images) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return;
    callFor(*process, guest, images, [&] { return insist([&] { return detachHere(*process, guest, images); }); });
}

Engine::Attempt Engine::detachHere(const os::Process& process, const Guest& guest,
                                   const std::vector<Image>& images) const {
    auto vessel = openVessel(process, guest);
    if (!vessel)
        return kGranted;
    std::vector<StoredLease>& leases = vessel->leases();
    std::vector<StoredLease> dropped, vanished;
    for (const Image& image : images) {
        auto file = identifyIfExists(image.path);
        auto stored = file ? findByFile(leases, *file)
                           : std::find_if(leases.begin(), leases.end(),
                                          [&](const StoredLease& lease) { return lease.path == image.path; });
        if (stored == leases.end())
            continue;
        // The guest has the image in another drive as well, or the attaching of a second one failed. A former top image
        // that became a backing file is open for reading only.
        bool reads = stored->mode == static_cast<std::uint8_t>(Mode::readOnly);
        if (os::hasOpen(process, stored->file, reads ? os::Access::any : os::Access::write))
            continue;
        // A file that only this guest's vessel vouches for is let go, but nothing is done to it.
        (file ? dropped : vanished).push_back(std::move(*stored));
        leases.erase(stored);
    }
    if (dropped.empty() && vanished.empty())
        return kGranted;
    if (!vessel->tryReplace())
        return std::nullopt;
    // Whoever dies before this line leaves the lease to the next change of this vessel, or to QEMU's end.
    Shares shares(dropped.size());
    for (const StoredLease& stored : dropped)
        shares.add(stored);
    for (const Share& share : shares.all())
        share.medium->removeAll();
    return kGranted;
}

} // namespace leasehold

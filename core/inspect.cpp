// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/inspect.hpp"

#include "core/lease/byte_range.hpp"
#include "core/lease/note.hpp"
#include "core/loss.hpp"
#include "core/os/error.hpp"
#include "core/os/open_files.hpp"
#include "core/os/process.hpp"
#include "core/os/socket_pairs.hpp"
#include "core/os/text.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold {

namespace {

using lease::Mark;
using lease::MarkKind;
using lease::Mode;
using os::LockClass;
using os::Range;
using os::TableLock;

constexpr std::size_t kMaxCommand = 4096;
constexpr std::size_t kMaxLocks = 4096; // as many as a person would ever read, and an end for a server that plays
constexpr Range kUses{qemu::kUsesBase, 5}, kDenies{qemu::kDeniesBase, 5};

std::vector<std::string> argumentsOf(pid_t pid) {
    std::string text =
        os::readFileIfPossible("/proc/" + std::to_string(pid) + "/cmdline", 64 * kMaxCommand).value_or("");
    std::vector<std::string> words;
    for (std::size_t at = 0; at < text.size(); at = text.find('\0', at) + 1) {
        words.push_back(os::printable(text.substr(at, text.find('\0', at) - at)));
        if (text.find('\0', at) == std::string::npos)
            break;
    }
    return words;
}

std::string commandLine(pid_t pid) {
    std::string line;
    for (const std::string& word : argumentsOf(pid)) {
        if (line.size() + word.size() > kMaxCommand)
            return line + " ...";
        line += (line.empty() ? "" : " ") + word;
    }
    return line.empty() ? os::commandName(pid) : line;
}

// For people, who wait for it.
constexpr std::chrono::milliseconds kGuestsLimit{10'000};

ProcessName nameOf(pid_t pid, const qemu::HostGuests& guests) {
    const qemu::RunningGuest* guest = guests.of(pid);
    return {pid, commandLine(pid), guest ? lease::cleanName(guest->tag.name) : ""};
}

// What is looked at, without having been opened for more than that.
struct Target {
    os::Fd path;  // O_PATH: leads to the file and does nothing to it
    os::Fd image; // open for reading, if that was possible
    struct stat status {};
    os::FileId file;
    std::optional<std::uint64_t> node; // the device number of a block device
    // As /proc/locks names it.
    std::uint64_t device = 0, inode = 0;
    std::optional<storage::Mount> mount;
};

Target openTarget(const std::string& path) {
    Target target;
    int error = os::tryOpen(path, O_PATH, target.path);
    if (error == ENOENT || error == ENOTDIR) {
        struct stat link;
        bool dangling = lstat(path.c_str(), &link) == 0;
        throw Error(Fault::invalid, dangling ? "it is a symbolic link to a file that does not exist; restore the file, "
                                               "or correct the link"
                                             : "there is no such file; correct the path, or mount its storage");
    }
    if (error != 0)
        throw SystemError(error, "look at", path);
    if (fstat(target.path.get(), &target.status) < 0)
        throw SystemError(errno, "look at", path);
    mode_t mode = target.status.st_mode;
    if (!S_ISREG(mode) && !S_ISBLK(mode) && !S_ISDIR(mode))
        throw Error(Fault::invalid, S_ISFIFO(mode) ? "it is a FIFO, which no guest has as a disk; correct the path"
                                                   : "it is neither a file, a block device nor a directory; correct "
                                                     "the path");
    if (S_ISBLK(mode))
        target.node = target.status.st_rdev;
    target.mount = storage::mountOf(target.path.get());
    target.device = target.mount && target.mount->device ? target.mount->device : target.status.st_dev;
    target.inode = target.status.st_ino;
    target.file = os::fileIdOf(target.status);
    return target;
}

std::vector<TableLock> locksOfThisHost(const Target& target) {
    auto locks = os::parseLockTable(os::readFileIfPossible("/proc/locks", 64 << 20).value_or(""));
    std::erase_if(locks,
                  [&](const TableLock& lock) { return lock.device != target.device || lock.inode != target.inode; });
    return locks;
}

// Opens for reading what can be opened without doing anything to anybody. Says why not.
std::string tryOpenImage(Target& target, const std::string& path, const std::vector<TableLock>& table) {
    // Opening would break the lease (fcntl(2), F_SETLEASE), O_NONBLOCK or not.
    if (std::any_of(table.begin(), table.end(), [](const TableLock& lock) {
            return lock.kind == LockClass::lease && lock.type == os::LockType::write && !lock.waiting;
        }))
        return "a program has a write lease (fcntl(2), F_SETLEASE) on it, which opening it would break";
    constexpr int kFlags = O_RDONLY | O_NONBLOCK | O_NOCTTY;
    int error = os::tryOpen(path, kFlags, target.image);
    if (error == EACCES && geteuid() == 0) { // root_squash, as in the engine
        os::FileSystemUser owner(target.status.st_uid, target.status.st_gid);
        error = os::tryOpen(path, kFlags, target.image);
    }
    if (error != 0)
        return SystemError(error, "open", "it").what() + nextStep(error);
    struct stat status;
    if (fstat(target.image.get(), &status) < 0 || status.st_ino != target.status.st_ino ||
        status.st_dev != target.status.st_dev)
        throw Error(Fault::system, "it was replaced while it was looked at; try again");
    return "";
}

// What a lease on it would be worth.
storage::Storage storageOf(const Target& target, const std::string& path,
                           std::span<const storage::Override> overrides) {
    if (target.node)
        return {.name = "block device",
                .reason = "locks on a device reach only this host; its lease is in a lockspace"};
    return storage::classify(target.path.get(), path, overrides);
}

bool isElsewhere(const Place* place) {
    return place && !place->stored.onImage();
}

// From the kernel of this host, and, on storage whose locks reach further, from everybody who can be seen.
std::vector<Mark> marksOn(const Target& target, const std::vector<TableLock>& table, const ImageView& view,
                          const Place* place) {
    std::vector<Mark> marks;
    auto add = [&](const Mark& mark) {
        if (std::find(marks.begin(), marks.end(), mark) == marks.end())
            marks.push_back(mark);
    };
    for (const TableLock& lock : table)
        if (!lock.waiting && (lock.kind == LockClass::ofd || lock.kind == LockClass::posix) &&
            lock.range.start >= lease::kMarkArea)
            for (const Mark& mark : lease::decodeRange(lock.range))
                add(mark);
    if (isElsewhere(place)) {
        if (place->stored.lease.open() || place->stored.directory.open())
            for (const Mark& mark : AnyMedium(place->stored, {})->look())
                add(mark);
    } else if (target.image.open() && view.storage.lock == storage::LockKind::byteRange) {
        for (const Mark& mark : lease::ByteRangeMedium(target.image.get(), false, view.path).look())
            add(mark);
    }
    return marks;
}

std::optional<lease::OwnerRecord> recordOn(const Target& target, const Place* place) {
    if (isElsewhere(place))
        return place->stored.lease.open() || place->stored.directory.open() ? readOwner(place->stored) : std::nullopt;
    return target.image.open() ? lease::readRecord(target.image.get()) : std::nullopt;
}

LeaseView viewOf(const Mark& present, const std::vector<Mark>& marks, const std::vector<qemu::RunningGuest>& guests,
                 const std::optional<lease::OwnerRecord>& record, const os::FileId& file, const os::FileId& leaseFile) {
    LeaseView view;
    view.mode = *lease::presentMode(present);
    view.state = stateOf(present, marks);
    view.incarnation = present.id;
    bool sameGuest = record && lease::hashDomain(record->uuid) == present.domain;
    bool current = sameGuest && record->incarnation == present.id;
    if (current)
        view.since = record->since;
    auto local = std::find_if(guests.begin(), guests.end(), [&](const qemu::RunningGuest& guest) {
        return guest.tag.incarnation == present.id && lease::hashDomain(guest.tag.uuid) == present.domain;
    });
    if (local != guests.end()) {
        view.source = LeaseView::Source::vessel;
        view.guest = lease::cleanName(local->tag.name);
        view.uuid = local->tag.uuid;
        view.host = os::hostName();
        view.pid = local->pid;
        qemu::BelowUse use = qemu::findBelowUse(*local, file, leaseFile);
        view.lower = view.mode == Mode::readOnly && use.reads;
        view.layer = lease::cleanName(use.layer);
    } else if (sameGuest) {
        view.source = current ? LeaseView::Source::record : LeaseView::Source::olderRecord;
        view.guest = record->domain;
        view.uuid = record->uuid;
        view.host = record->host;
        view.pid = record->pid;
        view.layer = current ? record->as : "";
    }
    return view;
}

// The bytes of a lock that QEMU may have taken; empty if it is none of QEMU's: those are read locks on single bytes,
// which the kernel merges with their neighbours.
std::vector<std::int64_t> qemuBytes(const TableLock& lock) {
    std::vector<std::int64_t> bytes;
    auto inside = [&](const Range& area) {
        return lock.range.start >= area.start && lock.range.length > 0 &&
               lock.range.start + lock.range.length <= area.start + area.length;
    };
    bool byteRange = lock.kind == LockClass::ofd || lock.kind == LockClass::posix;
    if (byteRange && !lock.waiting && lock.type == os::LockType::read && (inside(kUses) || inside(kDenies)))
        for (std::int64_t i = 0; i < lock.range.length; i++)
            bytes.push_back(lock.range.start + i);
    return bytes;
}

Purpose purposeOf(const TableLock& lock) {
    if (lock.kind != LockClass::posix || lock.range.length != 1)
        return Purpose::other;
    return lock.range.start == 1   ? Purpose::labels // libvirt security/security_util.c
           : lock.range.start == 0 ? Purpose::virtlockd
                                   : Purpose::other;
}

bool sameLock(const TableLock& one, const TableLock& other) {
    return one.kind == other.kind && one.type == other.type && one.range == other.range;
}

// Sorts what is there into QEMU's bytes and the rest.
class Collector {
public:
    Collector(ImageView& view, const qemu::HostGuests& guests) : view_(view), guests_(guests) {}

    void add(const TableLock& lock, pid_t pid, bool elsewhere) {
        if (lock.range.start >= lease::kMarkArea && !lock.waiting)
            return; // a mark
        ProcessName name = pid > 0 ? nameOf(pid, guests_) : ProcessName{};
        if (!lock.waiting)
            all_.push_back(lock);
        std::vector<std::int64_t> bytes = qemuBytes(lock);
        if (bytes.empty()) {
            view_.locks.push_back({lock, name, elsewhere, purposeOf(lock)});
            return;
        }
        auto known = std::find_if(view_.qemu.begin(), view_.qemu.end(), [&](const QemuView& qemu) {
            return qemu.who.pid == name.pid && qemu.elsewhere == elsewhere;
        });
        if (known == view_.qemu.end())
            known = view_.qemu.insert(known, {name, elsewhere, {}});
        for (std::int64_t byte : bytes)
            if (std::find(known->bytes.begin(), known->bytes.end(), byte) == known->bytes.end())
                known->bytes.push_back(byte);
        std::sort(known->bytes.begin(), known->bytes.end());
    }

    const std::vector<TableLock>& all() const { return all_; }

private:
    ImageView& view_;
    const qemu::HostGuests& guests_;
    std::vector<TableLock> all_;
};

void collectLocks(ImageView& view, const Target& target, const std::vector<TableLock>& table,
                  const Processes& processes) {
    Collector collector(view, processes.guests);
    std::vector<TableLock> attributed;
    os::FileId file{target.status.st_dev, target.status.st_ino};
    for (const os::Opener& opener : processes.open.openersOf(file, target.node)) {
        if (opener.pid == getpid())
            continue;
        for (const TableLock& lock : opener.locks) {
            collector.add(lock, opener.pid, false);
            attributed.push_back(lock);
        }
        if (opener.locks.empty())
            view.openers.push_back(nameOf(opener.pid, processes.guests));
    }
    auto isAttributed = [&](const TableLock& lock) {
        return std::any_of(attributed.begin(), attributed.end(),
                           [&](const TableLock& other) { return sameLock(lock, other); });
    };
    for (const TableLock& lock : table)
        if (lock.waiting || !isAttributed(lock))
            collector.add(lock, lock.pid, false);
    // SMB's client answers with what it was asked (tests/lab).
    bool tellsOthers = target.image.open() && view.storage.name != "SMB";
    if (tellsOthers) {
        std::vector<os::FoundLock> found = os::findConflicts(target.image.get(), view.path, kMaxLocks);
        if (found.size() == kMaxLocks)
            view.blindSpots.push_back("there are more than " + std::to_string(kMaxLocks) + " locks; not all are shown");
        for (const os::FoundLock& lock : found) {
            TableLock seen{.kind = LockClass::ofd, .type = lock.type, .range = lock.range};
            bool here = std::any_of(table.begin(), table.end(), [&](const TableLock& other) {
                return !other.waiting && other.type == seen.type && os::overlap(other.range, seen.range);
            });
            // On storage of this host that is a lock that was taken since we read the table. Of network storage the
            // pid is one of another host, or nothing (GFS2, OCFS2).
            if (!here)
                collector.add(seen, 0, view.storage.remote);
        }
    } else if (target.image.open()) {
        view.blindSpots.push_back("locks of other hosts: on " + view.storage.name + " they cannot be seen");
    }
    if (view.storage.hidesReadLocks)
        view.blindSpots.push_back("readers and QEMU's own locks on other hosts: " + view.storage.name +
                                  " does not show read locks; run this there");
    if (view.storage.qemuLocksStayLocal)
        view.blindSpots.push_back("QEMU's own locks on other hosts: on " + view.storage.name +
                                  " they stay there; run this there");
    if (!processes.guests.complete)
        view.blindSpots.push_back("some guests: there are more processes than could be looked at in time");
    if (!processes.open.complete())
        view.blindSpots.push_back("some processes: there are more descriptors than could be looked at in time");
    if (processes.open.hidden() > 0)
        view.blindSpots.push_back(std::to_string(processes.open.hidden()) +
                                  " processes of other users: what they have open, and their names; run this as root");
    view.reader = answerOfQemu(collector.all(), qemu::Use::readOnly);
    view.writer = answerOfQemu(collector.all(), qemu::Use::exclusive);
}

std::string serverOf(const std::optional<storage::Mount>& mount) {
    std::size_t colon = mount ? mount->source.rfind(":/") : std::string::npos;
    return colon == std::string::npos ? "" : os::printable(mount->source.substr(0, colon));
}

} // namespace

LeaseState stateOf(const Mark& present, const std::vector<Mark>& marks) {
    if (present.kind == MarkKind::presentReadOnly)
        return LeaseState::held; // readers hand nothing over
    bool shared = present.kind == MarkKind::presentShared;
    bool owned = false, handoff = false, leaving = false, taken = false;
    std::size_t peers = 0;
    for (const Mark& mark : marks) {
        bool same = mark.domain == present.domain;
        owned = owned || (shared ? mark.kind == MarkKind::sharedOwner && same : mark.kind == MarkKind::owner);
        handoff = handoff || (mark.kind == MarkKind::handoff && same);
        taken = taken || (mark.kind == MarkKind::taken && same);
        leaving = leaving || mark == Mark{MarkKind::leaving, present.domain, present.id};
        peers += mark.kind == present.kind && same;
    }
    if (leaving)
        return LeaseState::migrating;
    if (peers > 1)
        return taken ? LeaseState::held : handoff ? LeaseState::joined : LeaseState::unclear;
    if (owned)
        return handoff ? LeaseState::suspended : LeaseState::held;
    return handoff ? LeaseState::migrating : LeaseState::arrived;
}

std::string describe(LeaseState state) {
    switch (state) {
    case LeaseState::held:
        return "held";
    case LeaseState::suspended:
        return "suspended";
    case LeaseState::migrating:
        return "migrating";
    case LeaseState::joined:
        return "joined";
    case LeaseState::arrived:
        return "arrived";
    case LeaseState::unclear:
        break;
    }
    return "unclear";
}

std::string permissionOf(std::int64_t byte) {
    constexpr std::array kNames{"consistent read", "write", "write unchanged", "resize", "graph mod"};
    std::size_t number = static_cast<std::size_t>(byte % 100);
    return number < kNames.size() ? kNames[number] : "permission " + std::to_string(number);
}

std::string answerOfQemu(const std::vector<TableLock>& locks, qemu::Use use) {
    auto locked = [&](std::int64_t byte, bool forWriting) {
        return std::any_of(locks.begin(), locks.end(), [&](const TableLock& lock) {
            bool byteRange = lock.kind == LockClass::ofd || lock.kind == LockClass::posix;
            return byteRange && (!forWriting || lock.type == os::LockType::write) && os::overlap(lock.range, {byte, 1});
        });
    };
    std::vector<std::int64_t> takes{qemu::kUsesBase};
    if (use != qemu::Use::readOnly)
        takes.push_back(qemu::kUsesBase + 1);
    takes.push_back(qemu::kDeniesBase + 1);
    for (std::int64_t byte : takes)
        if (locked(byte, true))
            return "Failed to lock byte " + std::to_string(byte);
    std::vector<std::int64_t> asks = qemu::conflictingBytes(use);
    auto isDenial = [](std::int64_t byte) { return byte >= qemu::kDeniesBase; };
    std::stable_partition(asks.begin(), asks.end(), isDenial);
    for (std::int64_t byte : asks)
        if (locked(byte, false))
            return std::string("Failed to get ") + (isDenial(byte) ? "" : "shared ") + "\"" + permissionOf(byte) +
                   "\" lock";
    return "";
}

Processes lookAtProcesses() {
    return {os::OpenTable(std::chrono::steady_clock::now() + kGuestsLimit), qemu::findGuests(kGuestsLimit)};
}

ImageView inspectImage(const std::string& path, const Place* place, const Processes& processes,
                       std::span<const storage::Override> overrides) {
    Target target = openTarget(path);
    ImageView view;
    view.path = path;
    std::unique_ptr<char, decltype(&free)> real(realpath(path.c_str(), nullptr), free);
    view.target = real ? real.get() : path;
    view.kind = target.node                      ? ImageView::Kind::block
                : S_ISDIR(target.status.st_mode) ? ImageView::Kind::directory
                                                 : ImageView::Kind::file;
    std::vector<TableLock> table = locksOfThisHost(target);
    std::string closed = tryOpenImage(target, path, table);
    view.storage = storageOf(target, path, overrides);
    view.server = serverOf(target.mount);
    if (!closed.empty())
        view.blindSpots.push_back("what other hosts hold, and the owner record: " + closed);

    std::vector<Mark> marks = marksOn(target, table, view, place);
    if (isElsewhere(place)) {
        const os::Fd& opened = place->stored.directory.open() ? place->stored.directory : place->stored.lease;
        view.leaseFile = opened.open() ? os::pathOf(opened.get(), "") : "not made yet";
    }
    view.record = recordOn(target, place);
    for (const Mark& mark : marks) {
        view.foreignMark = view.foreignMark || mark.kind == MarkKind::foreign;
        if (!lease::presentMode(mark))
            continue;
        view.leases.push_back(viewOf(mark, marks, processes.guests.guests, view.record, target.file,
                                     isElsewhere(place) ? place->stored.leaseFile : target.file));
        view.recordCurrent = view.recordCurrent || (view.record && mark.id == view.record->incarnation &&
                                                    mark.domain == lease::hashDomain(view.record->uuid));
    }
    collectLocks(view, target, table, processes);
    return view;
}

storage::Storage classifyPath(const std::string& path, std::span<const storage::Override> overrides) {
    return storageOf(openTarget(path), path, overrides);
}

std::string mediumName(const qemu::StoredLease& stored) {
    return stored.directory.open() ? "file-set" : stored.onImage() ? "byte-range" : "lease-file";
}

std::vector<std::string> adviseOn(const ImageView& image) {
    std::vector<std::string> advice;
    bool distant = false;
    std::string host; // that would have to be dead
    for (const LeaseView& lease : image.leases) {
        bool named = lease.source != LeaseView::Source::nobody;
        std::string who = named                  ? "guest '" + lease.guest + "' on host '" + lease.host + "'"
                          : image.storage.remote ? "the guest on another host that has it"
                                                 : "the guest that has it, of a process that could not be looked at,";
        if (lease.source != LeaseView::Source::vessel && image.storage.remote) {
            distant = true;
            host = lease.host.empty() ? host : lease.host;
        }
        switch (lease.state) {
        case LeaseState::held:
            advice.push_back("shut " + who + " down, or detach the image from it");
            break;
        case LeaseState::suspended:
            advice.push_back(who + " is suspended: resume it or shut it down there");
            break;
        case LeaseState::migrating:
            advice.push_back(who + " is migrating: wait, or abort the migration there");
            break;
        case LeaseState::arrived:
            advice.push_back(who + " has arrived suspended and has the only copy of its memory: resume it or shut it "
                                   "down there");
            break;
        case LeaseState::joined:
            advice.push_back(who + " waits to take over from another QEMU of the same guest: see the migration, or "
                                   "abort it on its source");
            break;
        case LeaseState::unclear:
            advice.push_back("several QEMUs of " + who +
                             " are there: see with virsh on their hosts which one runs, and "
                             "destroy none before that is known");
            break;
        }
    }
    const std::string dead = lease::hostForCommand(host);
    if (distant && image.storage.hidesReadLocks)
        // On the server: living clients get their locks back in the grace period, because sm-notify tells them; the
        // dead one asks for none. unlock_ip and unlock_filesystem in /proc/fs/nfsd would take those of the living, too.
        advice.push_back(
            "if that host is dead: its locks stay until it boots again (its statd tells the server). Make sure that "
            "it is off, and run: leasehold fenced " +
            dead + "; or on the NFS server" + (image.server.empty() ? "" : " '" + image.server + "'") +
            ": systemctl restart nfs-server && sm-notify -f; living hosts get their locks back");
    else if (distant && storage::waitsForTheDead(image.storage))
        advice.push_back(
            "if that host is dead: its locks stay until its client is evicted, by itself when "
            "somebody asks after session_timeout (60 s). At once, when you have made sure that it is off: leasehold "
            "fenced " +
            dead + "; or find its client with ceph tell mds.0 client ls, and run: ceph tell mds.0 " +
            "client evict id=NUMBER. An evicted client can write no more");
    else if (distant)
        advice.push_back("if that host is dead: the storage gives its locks up by itself, on NFSv4 when somebody asks "
                         "after the lease time (90 s), on GlusterFS after server.tcp-user-timeout (42 s), on a cluster "
                         "file system after it was fenced");
    for (const QemuView& qemu : image.qemu)
        if (qemu.who.guest.empty())
            advice.push_back(qemu.elsewhere ? "a QEMU or qemu-img on another host uses it: run leasehold inspect there"
                             : qemu.who.pid ? "wait for process " + std::to_string(qemu.who.pid) + " to end, or end it"
                                            : "run this as root, outside containers, to see which process uses it");
    for (const LockView& lock : image.locks)
        if (lock.purpose == Purpose::other && !lock.lock.waiting && lock.holder.pid)
            advice.push_back("process " + std::to_string(lock.holder.pid) +
                             " has a lock that is not QEMU's: wait for "
                             "it to end, or end it");
    if (std::any_of(image.locks.begin(), image.locks.end(),
                    [](const LockView& lock) { return lock.purpose == Purpose::virtlockd; }))
        advice.push_back("virtlockd locks it for a guest of a host where it is still the lock manager: shut that guest "
                         "down, and enable leasehold there");
    if (image.foreignMark)
        advice.push_back("a program that is not leasehold locks the bytes from 2^62 on: no guest can have the image "
                         "until it is ended (/proc/locks on the host where it runs)");
    if (!image.unleasable.empty())
        advice.push_back("no guest can have it for writing: " + image.unleasable);
    std::sort(advice.begin(), advice.end());
    advice.erase(std::unique(advice.begin(), advice.end()), advice.end());
    return advice;
}

namespace {

// `-name guest=web,debug-threads=on`: what libvirt gives QEMU. Commas in names are doubled.
std::string guestNameIn(const std::vector<std::string>& arguments) {
    for (std::size_t i = 0; i + 1 < arguments.size(); i++) {
        if (arguments[i] != "-name")
            continue;
        std::string text = arguments[i + 1], name;
        if (text.starts_with("guest="))
            text.erase(0, 6);
        for (std::size_t at = 0; at < text.size(); at++) {
            if (text[at] == ',' && (at + 1 == text.size() || text[++at] != ','))
                break;
            name += text[at];
        }
        return lease::cleanName(name);
    }
    return "";
}

lease::Uuid uuidIn(const std::vector<std::string>& arguments) {
    for (std::size_t i = 0; i + 1 < arguments.size(); i++)
        if (arguments[i] == "-uuid")
            return lease::parseUuid(arguments[i + 1]).value_or(lease::Uuid{});
    return {};
}

// Its program if that may be read, its name otherwise (which set_process_name in libvirt's qemu.conf changes).
bool isQemu(pid_t pid) {
    std::string name = os::programName(pid).value_or(os::commandName(pid));
    return name.starts_with("qemu-system-") || name.starts_with("qemu-kvm");
}

// What libvirt calls its QEMUs: it writes that down where only root can (virPidFileBuildPath). No public API tells. A
// libvirtd that was killed may have left a file whose number is another guest's by now: of two, the later one counts.
std::map<pid_t, std::string> namesOfLibvirt() {
    std::map<pid_t, std::string> names;
    std::map<pid_t, timespec> written;
    const std::string folder = "/run/libvirt/qemu/", end = ".pid";
    std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(folder.c_str()), closedir);
    while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
        std::string file = entry->d_name;
        if (!file.ends_with(end) || file.size() == end.size())
            continue;
        auto pid = static_cast<pid_t>(
            std::strtol(os::readFileIfPossible(folder + file, 32).value_or("").c_str(), nullptr, 10));
        struct stat status;
        if (pid <= 0 || stat((folder + file).c_str(), &status) < 0)
            continue;
        const timespec& when = status.st_mtim;
        auto [known, first] = written.emplace(pid, when);
        if (!first && std::pair(when.tv_sec, when.tv_nsec) < std::pair(known->second.tv_sec, known->second.tv_nsec))
            continue;
        known->second = when;
        names[pid] = file.substr(0, file.size() - end.size());
    }
    return names;
}

// A QEMU that keeps no leases that we may see; nothing if it is a zombie.
std::optional<GuestView> viewOfQemu(pid_t pid, const std::map<pid_t, std::string>& libvirt) {
    std::vector<std::string> arguments = argumentsOf(pid);
    auto user = os::userOf(pid);
    if (arguments.empty() || !user)
        return std::nullopt;
    if (auto known = libvirt.find(pid); known != libvirt.end())
        return GuestView{{uuidIn(arguments), 0, lease::cleanName(known->second)}, pid};
    if (!os::isTrustedMaker(*user))
        return GuestView{{{}, 0, ""}, pid, *user};
    return GuestView{{uuidIn(arguments), 0, guestNameIn(arguments)}, pid};
}

// Whether another QEMU of the guest is there from which it could take over. Where marks are files a look sweeps, and
// that is nothing for who only looks.
bool hasPeer(const StoredView& lease, const qemu::GuestTag& tag) {
    if (lease.stored.directory.open())
        return true;
    const std::uint32_t domain = lease::hashDomain(tag.uuid);
    const std::vector<Mark> marks = AnyMedium(lease.stored, {domain, tag.incarnation})->look();
    return std::any_of(marks.begin(), marks.end(), [&](const Mark& mark) {
        return mark.domain == domain && mark.id != tag.incarnation && lease::presentMode(mark) == lease.mode;
    });
}

StoredView viewOf(qemu::StoredLease&& stored, const qemu::GuestTag& tag) {
    StoredView view{.path = os::printable(stored.path), .mode = stored.mode, .owned = true};
    view.lower = stored.lower;
    view.medium = mediumName(stored);
    view.stored = std::move(stored);
    if (view.mode == Mode::readOnly || !view.stored.lease.open())
        return view; // readers hand nothing over
    // Not by its medium, which asks the storage about a directory of marks first.
    lease::Note note = lease::readNote(view.stored.lease.get(), view.path);
    view.owned = note.owner;
    view.state = note.leaving      ? LeaseState::migrating
                 : !note.owner     ? (note.token != 0 ? LeaseState::migrating : LeaseState::joined)
                 : note.token != 0 ? LeaseState::suspended
                                   : LeaseState::held;
    if (view.state == LeaseState::joined && !hasPeer(view, tag))
        view.state = LeaseState::arrived;
    return view;
}

template <typename Read>
Protection fillIn(GuestView& guest, Read read) {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return Protection::gone;
    if (guest.stranger)
        return Protection::foreign;
    if (!process->mayTakeDescriptors())
        return process->diedWithin(std::chrono::milliseconds(0)) ? Protection::gone : Protection::hidden;
    std::optional<qemu::Manifest> found = read(*process, guest.tag.uuid);
    // That nothing protects a guest, which people shut it down for, is said after a second look: in one, a descriptor
    // may be what could not be looked at.
    if (!found)
        found = read(*process, guest.tag.uuid);
    if (!found)
        return process->diedWithin(std::chrono::milliseconds(0)) ? Protection::gone : Protection::none;
    guest.tag = std::move(found->tag);
    guest.leases.clear();
    guest.companions.clear();
    for (qemu::StoredLease& stored : found->leases) {
        if (stored.isLayer()) {
            guest.companions.push_back(std::move(stored));
            continue;
        }
        if (stored.companion)
            guest.companions.push_back(std::move(*stored.companion));
        guest.leases.push_back(viewOf(std::move(stored), guest.tag));
    }
    return Protection::leased;
}

} // namespace

HostView findGuests() {
    HostView host;
    const qemu::HostGuests found = qemu::findGuests(kGuestsLimit);
    const std::map<pid_t, std::string> libvirt = namesOfLibvirt();
    std::set<pid_t> holders;
    for (const qemu::RunningGuest& guest : found.guests) {
        host.guests.push_back({guest.tag, guest.pid});
        holders.insert(guest.holders.begin(), guest.holders.end());
    }
    for (pid_t pid : os::listProcesses())
        if (!holders.contains(pid) && isQemu(pid))
            if (auto qemu = viewOfQemu(pid, libvirt))
                host.guests.push_back(std::move(*qemu));
    if (os::areProcessesHidden())
        host.blindSpots.push_back("/proc hides the processes of other users (hidepid), and their guests: run this as "
                                  "root");
    else if (found.hidden > 0)
        host.blindSpots.push_back(geteuid() == 0
                                      ? "some processes, and the leases that they keep: they may not be looked at "
                                        "from here, in a container for instance, or looking failed; try again"
                                      : "processes of other users, and the leases that they keep: run this as root");
    if (!found.complete)
        host.blindSpots.push_back("some processes: there are more than could be looked at in time");
    return host;
}

Protection surveyLeases(GuestView& guest) {
    return fillIn(guest, [](const os::Process& process, const lease::Uuid& uuid) {
        return qemu::Vessel::readManifest(process, uuid);
    });
}

Protection readLeases(GuestView& guest) {
    return fillIn(guest, [](const os::Process& process, const lease::Uuid& uuid) {
        auto vessel = qemu::Vessel::retrieve(process, uuid);
        return vessel ? std::optional(qemu::Manifest{vessel->tag(), std::move(vessel->leases())}) : std::nullopt;
    });
}

std::vector<std::string> findUnleased(const GuestView& guest) {
    std::vector<std::string> names;
    auto process = isQemu(guest.pid) ? os::Process::openIfExists(guest.pid) : std::nullopt;
    if (!process)
        return names;
    const os::OpenFiles opened = os::OpenFiles::read(*process);
    for (const os::OpenFile& open : opened.all()) {
        bool leased = std::any_of(guest.leases.begin(), guest.leases.end(),
                                  [&](const StoredView& lease) { return lease.stored.file == open.file; });
        if (leased || opened.useOf(open.file) != os::OpenFiles::Use::reads)
            continue;
        const std::string path = os::targetOf(os::pathThrough(*process, open.number));
        if (!os::isOfKernel(open, path))
            names.push_back(os::printable(path));
    }
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    return names;
}

std::optional<std::string> findLoss(const qemu::StoredLease& lease, const qemu::GuestTag& tag) {
    return findLossOrTaker(lease, {lease::hashDomain(tag.uuid), tag.incarnation});
}

std::int64_t heldSince(const StoredView& lease, const qemu::GuestTag& tag) {
    auto record = readOwner(lease.stored);
    return record && record->uuid == tag.uuid && record->incarnation == tag.incarnation ? record->since : 0;
}

} // namespace leasehold

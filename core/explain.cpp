// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/explain.hpp"

#include "core/lease/byte_range.hpp"
#include "core/os/lock_table.hpp"
#include "core/os/text.hpp"
#include "core/storage/classify.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include <unistd.h>

namespace leasehold {

namespace {

using lease::Mark;
using lease::Mode;
using lease::Obstacle;

// More holders than this are counted, not listed.
constexpr std::size_t kMaxNamed = 3;

std::string quote(std::string_view text) {
    return "'" + lease::cleanName(text) + "'";
}

std::string subjectOf(const qemu::StoredLease& stored) {
    if (stored.isLayer())
        return lease::cleanName(stored.path);
    return (stored.named ? "lease " : stored.lower ? "backing file " : "image ") + quote(stored.path);
}

// Not gmtime(3): it takes a lock of the C library, which another thread of libvirtd may have held when this process was
// forked from it. Not the calendar of <chrono> either: GCC 10's library has none.
std::string formatTime(std::int64_t seconds) {
    if (seconds < 0 || seconds > 253402300799) // 9999-12-31
        return "an unknown time";
    const auto isLeap = [](int year) { return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0; };
    int year = 1970, month = 1;
    std::int64_t day = seconds / 86400;
    for (int length; day >= (length = isLeap(year) ? 366 : 365); year++)
        day -= length;
    constexpr int kDays[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    for (int length; day >= (length = kDays[month - 1] + (month == 2 && isLeap(year) ? 1 : 0)); month++)
        day -= length;
    const int second = static_cast<int>(seconds % 86400);
    char text[80];
    std::snprintf(text, sizeof text, "%04d-%02d-%02d %02d:%02d:%02d UTC", year, month, static_cast<int>(day) + 1,
                  second / 3600, second / 60 % 60, second % 60);
    return text;
}

std::string placeOf(pid_t pid, const std::string& host) {
    return "pid " + std::to_string(pid) + " on host " + quote(host.empty() ? "unknown" : host);
}

std::string describeGuest(const std::string& name, const lease::Uuid& uuid, const std::string& rest) {
    return "guest " + quote(name) + " (UUID " + lease::formatUuid(uuid) + ", " + rest + ")";
}

// Somebody of this host whom the search did not come to.
constexpr const char* kNotInTime = "of this host that could not be found in time, among very many processes";

// The holders of marks in words, from three sources: guests of this host say themselves who they are; the owner
// record names those of other hosts, if it is about one of the marks that are up; what is left is only a number.
class Namer {
public:
    Namer(const qemu::StoredLease& stored, Neighbours& neighbours)
        : file_(stored.file), leaseFile_(stored.leaseFile), remote_(stored.remote), neighbours_(neighbours.all()),
          record_(readOwner(stored)) {}

    std::string name(const Mark& mark, const std::string& more) const {
        Mode use = lease::presentMode(mark).value_or(Mode::exclusive);
        const qemu::RunningGuest* local = find(mark);
        const qemu::BelowUse below = local ? qemu::findBelowUse(*local, file_, leaseFile_)
                                           : qemu::BelowUse{isCurrent(mark) ? record_->as : "", false};
        const std::string& layer = below.layer;
        std::string mode = layer.empty() ? describeMode(use) : "using " + lease::cleanName(layer);
        if (isCurrent(mark) && record_->since > 0)
            mode += ", since " + formatTime(record_->since);
        if (use == Mode::readOnly && below.reads)
            mode += ", as a backing file";
        mode += more;
        if (local)
            return describeGuest(local->tag.name, local->tag.uuid, placeOf(local->pid, os::hostName()) + ", " + mode);
        if (isCurrent(mark))
            return describeGuest(record_->domain, record_->uuid, placeOf(record_->pid, record_->host) + ", " + mode);
        // It has moved since, and has not run yet where it is now.
        if (isRecorded(mark))
            return describeGuest(record_->domain, record_->uuid,
                                 mode + "; last recorded as " + placeOf(record_->pid, record_->host));
        return std::string("a guest ") +
               (!neighbours_.complete && remote_ ? "on another host, or one of this host that could not be found in "
                                                   "time among very many processes, that left no record"
                : !neighbours_.complete          ? kNotInTime
                : remote_                        ? "on another host, or of another user, that left no record"
                          : "of this host that may not be looked at, another user's or in a container") +
               " (incarnation " + os::hexadecimal(mark.id) + ", " + mode + ")";
    }

    const qemu::RunningGuest* find(const Mark& mark) const {
        const auto& guests = neighbours_.guests;
        auto local = std::find_if(guests.begin(), guests.end(), [&](const qemu::RunningGuest& guest) {
            return guest.tag.incarnation == mark.id && lease::hashDomain(guest.tag.uuid) == mark.domain;
        });
        return local == guests.end() ? nullptr : &*local;
    }

    // Of who is not on this host: his host, "" if that is not recorded. Nothing if all are here.
    std::optional<std::string> distantHost(const std::vector<Mark>& marks) const {
        std::optional<std::string> host;
        for (const Mark& mark : marks)
            if (!find(mark))
                host = isRecorded(mark) ? record_->host : host.value_or("");
        return host;
    }

    // Whether there was time for all processes of this host: who was not found may be one of them otherwise.
    bool foundAll() const { return neighbours_.complete; }

    // How well it is known: of several QEMUs of one guest the best known is named.
    int rank(const Mark& mark) const { return find(mark) ? 2 : isCurrent(mark) ? 1 : 0; }

    // Whose it is, if that is known.
    std::optional<lease::Uuid> uuidOf(const Mark& mark) const {
        if (const qemu::RunningGuest* local = find(mark))
            return local->tag.uuid;
        return isRecorded(mark) ? std::optional(record_->uuid) : std::nullopt;
    }

private:
    bool isRecorded(const Mark& mark) const { return record_ && lease::hashDomain(record_->uuid) == mark.domain; }
    bool isCurrent(const Mark& mark) const { return isRecorded(mark) && record_->incarnation == mark.id; }

    os::FileId file_, leaseFile_;
    bool remote_;
    const qemu::HostGuests& neighbours_;
    std::optional<lease::OwnerRecord> record_;
};

// One for each guest: while one migrates two QEMUs of it have the image.
std::string listNames(const Namer& namer, std::vector<Mark> marks) {
    std::stable_sort(marks.begin(), marks.end(),
                     [&](const Mark& one, const Mark& other) { return namer.rank(one) > namer.rank(other); });
    std::vector<std::pair<Mark, std::size_t>> guests; // and how many QEMUs
    for (const Mark& mark : marks) {
        auto known = std::find_if(guests.begin(), guests.end(),
                                  [&](const auto& guest) { return guest.first.domain == mark.domain; });
        if (known == guests.end())
            guests.emplace_back(mark, 1);
        else
            known->second++;
    }
    std::string list;
    std::size_t named = 0;
    for (const auto& [mark, count] : guests) {
        if (named == kMaxNamed)
            return list + " and " + std::to_string(guests.size() - named) + " more";
        std::string more = count > 1 ? ", with " + std::to_string(count) + " QEMUs, as in a migration" : "";
        list += (named++ ? ", " : "") + namer.name(mark, more);
    }
    return list;
}

// The programs of this host that lock what is meant for marks, and no mark of ours: who they are, or "".
std::string findForeigners(const qemu::StoredLease& stored, Neighbours& neighbours) {
    std::string names;
    for (const os::Opener& opener : os::OpenTable(neighbours.deadline()).openersOf(stored.leaseFile, std::nullopt)) {
        bool foreign = std::any_of(opener.locks.begin(), opener.locks.end(), [](const os::TableLock& lock) {
            if ((lock.kind != os::LockClass::ofd && lock.kind != os::LockClass::posix) ||
                !os::overlap(lock.range, {lease::kMarkArea, 0}))
                return false;
            std::vector<Mark> marks = lease::decodeRange(lock.range);
            return std::any_of(marks.begin(), marks.end(),
                               [](const Mark& mark) { return mark.kind == lease::MarkKind::foreign; });
        });
        if (foreign && opener.pid != getpid())
            names += (names.empty() ? "" : ", ") + quote(os::commandName(opener.pid)) + " (pid " +
                     std::to_string(opener.pid) + ")";
    }
    return names;
}

// The guests that stand in the way: those of this domain, or the others.
std::vector<Mark> blockers(const Guest& guest, const lease::Refusal& refusal, Mode mode) {
    std::vector<Mark> found;
    std::uint32_t domain = lease::hashDomain(guest.uuid);
    bool same = refusal.obstacle == Obstacle::sameGuest || refusal.obstacle == Obstacle::stateTaken;
    for (const Mark& mark : refusal.marks) {
        auto present = lease::presentMode(mark);
        if (present && (same ? mark.domain == domain : !lease::compatible(*present, mode)))
            found.push_back(mark);
    }
    return found;
}

bool areAll(const std::vector<Mark>& marks, Mode mode) {
    return !marks.empty() &&
           std::all_of(marks.begin(), marks.end(), [&](const Mark& mark) { return lease::presentMode(mark) == mode; });
}

// Where one side already reads or shares, the other one may have meant to. Two that write exclusively get no such idea:
// whoever marks their disk to be rid of the refusal destroys it.
const char* adviseSharing(Mode mode, const std::vector<Mark>& marks) {
    if (mode == Mode::exclusive && areAll(marks, Mode::readOnly))
        return " (if this guest only reads it too, mark the disk <readonly/>; one with <transient "
               "shareBacking='yes'/> counts as writing: give each guest an overlay instead)";
    if (mode == Mode::exclusive && areAll(marks, Mode::shared))
        return " (if what is in it is made for several writers, as a cluster file system is, mark the disk "
               "<shareable/> here, too)";
    if (mode == Mode::readOnly && areAll(marks, Mode::exclusive))
        return " (if the other guest only reads it too, mark its disk <readonly/>, too, and start it again)";
    if (mode == Mode::shared && areAll(marks, Mode::exclusive))
        return " (if what is in it is made for several writers, as a cluster file system is, mark the other guest's "
               "disk <shareable/>, too, and start it again)";
    if (mode != Mode::exclusive && !marks.empty() && !areAll(marks, Mode::exclusive))
        return " (guests that read it, <readonly/>, and guests that share it, <shareable/>, exclude each other: mark "
               "its disks alike)";
    return "";
}

} // namespace

bool areLingering(const qemu::StoredLease& stored, const lease::Refusal& refusal, const std::string& bootId) {
    if (refusal.obstacle != Obstacle::guestPresent && refusal.obstacle != Obstacle::sameGuest)
        return false;
    auto record = readOwner(stored);
    if (!record || record->bootId != bootId || lease::cleanName(record->host) != os::hostName())
        return false;
    bool named = std::any_of(refusal.marks.begin(), refusal.marks.end(), [&](const Mark& mark) {
        return mark.id == record->incarnation && mark.domain == lease::hashDomain(record->uuid);
    });
    return named && !os::Process::openIfExists(record->pid);
}

const qemu::HostGuests& Neighbours::all() {
    return found_ ? *found_ : found_.emplace(qemu::findGuests(limit_));
}

std::chrono::steady_clock::time_point Neighbours::deadline() {
    return deadline_ ? *deadline_ : deadline_.emplace(std::chrono::steady_clock::now() + limit_);
}

std::string explainJoin(const Guest& guest, const qemu::StoredLease& stored, std::size_t count) {
    auto record = readOwner(stored);
    bool known = record && record->uuid == guest.uuid;
    return "guest " + quote(guest.name) + " (UUID " + lease::formatUuid(guest.uuid) +
           ") starts beside another QEMU of it" + (known ? ", " + placeOf(record->pid, record->host) + "," : "") +
           " that has " + subjectOf(stored) + (count > 1 ? " and " + std::to_string(count - 1) + " more" : "") +
           ", and gets what that one hands over, as in a migration. Only if QEMU fails to get a lock: use the guest "
           "there, it cannot run twice. Any other reason why this start fails is told below";
}

namespace {

std::string explainGuest(const Guest& guest, const qemu::StoredLease& stored, Mode mode, const std::string& names,
                         const std::vector<Mark>& marks) {
    std::string subject = subjectOf(stored), self = quote(guest.name);
    if (stored.lower && mode == Mode::readOnly)
        return subject + " is in use by " + (names.empty() ? "a guest that writes to it" : names) + "; guest " + self +
               " reads it below its own image and cannot run meanwhile: shut the other guest down or detach it there, "
               "and try again";
    const char* nobody = stored.remote ? "a reader on another host" : "a reader that may not be looked at";
    return subject + " is in use by " + (names.empty() ? nobody : names) + "; guest " + self +
           " cannot have it: shut the other guest down or detach it there, and try again" + adviseSharing(mode, marks);
}

std::string explainTwin(const Guest& guest, const qemu::StoredLease& stored, const Namer& namer,
                        const std::vector<Mark>& marks) {
    std::string subject = subjectOf(stored), self = quote(guest.name), names = listNames(namer, marks);
    auto isOther = [&](const Mark& mark) { return namer.uuidOf(mark).value_or(guest.uuid) != guest.uuid; };
    // Marks have 29 bits of a UUID: one in 500 million pairs of guests cannot be told apart by them.
    if (std::any_of(marks.begin(), marks.end(), isOther))
        return subject + " is in use by " + names + "; guest " + self +
               " cannot have it, nor be told from that one by its leases, because their UUIDs meet in one hash: shut "
               "the other guest down, or give this one another UUID";
    bool here = std::any_of(marks.begin(), marks.end(), [&](const Mark& mark) { return namer.find(mark); });
    const char* where = here ? " on this host" : namer.foundAll() ? " elsewhere" : "";
    return "guest " + self + " already runs" + where + " with " + subject + ": " +
           (names.empty() ? "no name is known" : names) +
           "; it has not handed it over: use it there, migrate it, or shut it down there first";
}

// Where the storage waits for hosts that have died: what to do if that of another holder is one.
std::string adviseOnTheDead(const qemu::StoredLease& stored, const std::optional<std::string>& host) {
    if (!host || !stored.remote || !storage::waitsForTheDead(storage::classify(stored.lease.get(), stored.path)))
        return "";
    return "; if that host is dead: make sure that it is off, and run: leasehold fenced " +
           lease::hostForCommand(*host);
}

std::string explainForeigner(const Guest& guest, const qemu::StoredLease& stored, Neighbours& neighbours) {
    std::string who = findForeigners(stored, neighbours);
    return subjectOf(stored) + " is locked as a whole by " + (who.empty() ? "a program" : who) +
           (who.empty() ? " that is not leasehold; guest " : ", which is not leasehold; guest ") + quote(guest.name) +
           " cannot have it: " +
           (!who.empty()    ? "end it, or wait for it, and try again"
            : stored.remote ? "find the program (/proc/locks on the host where it runs) and end it"
                            : "find the program (/proc/locks) and end it");
}

} // namespace

std::string explainRefusal(const Guest& guest, const qemu::StoredLease& stored, Mode mode,
                           const lease::Refusal& refusal, Neighbours& neighbours) {
    std::string subject = subjectOf(stored), self = quote(guest.name);
    if (refusal.obstacle == Obstacle::beingTaken)
        return subject + " is just being taken or given up by another guest, for longer than guest " + self +
               " may wait; try again, and look for a stopped QEMU or libvirtd on " +
               (stored.remote ? "the hosts that share it" : "this host") + adviseOnTheDead(stored, "");
    if (refusal.obstacle == Obstacle::foreignLock)
        return explainForeigner(guest, stored, neighbours);
    std::vector<Mark> marks = blockers(guest, refusal, mode);
    if (marks.empty() && refusal.obstacle == Obstacle::guestPresent)
        return explainGuest(guest, stored, mode, "", marks) + adviseOnTheDead(stored, "");
    Namer namer(stored, neighbours);
    auto advice = [&] { return adviseOnTheDead(stored, namer.distantHost(marks)); };
    if (refusal.obstacle == Obstacle::guestPresent)
        return explainGuest(guest, stored, mode, listNames(namer, marks), marks) + advice();
    if (refusal.obstacle == Obstacle::sameGuest)
        return explainTwin(guest, stored, namer, marks) + advice();
    return "guest " + self + " was taken over with " + subject + " by " +
           (marks.empty() ? "another QEMU" : listNames(namer, marks)) +
           "; what is left here is older than that one: use the other, and destroy this guest; only if the other has "
           "ended just now, try again";
}

const char* describeMode(Mode mode) {
    return mode == Mode::exclusive ? "exclusively" : mode == Mode::shared ? "shared with writers" : "read-only";
}

std::string explainOutsider(const qemu::StoredLease& stored, const std::string& words, const os::LockHolders& holders,
                            pid_t own, Neighbours& neighbours) {
    std::string who;
    bool guests = false;
    for (pid_t pid : holders.pids) {
        if (pid == own)
            continue;
        const qemu::RunningGuest* guest = neighbours.all().of(pid);
        guests = guests || guest;
        who += (who.empty() ? "" : ", ") + (guest ? "guest " + quote(guest->tag.name) : quote(os::commandName(pid))) +
               " (pid " + std::to_string(pid) + ")";
    }
    std::string image = "image " + quote(stored.path);
    const std::string movesIn = ". If that is this guest itself, which migrates in from a host without leasehold, say "
                                "qemu_locks = \"warn\" in qemu-leasehold.conf until it is here";
    const bool byVirtlockd = words.find("virtlockd") != std::string::npos; // its daemon has the lock, on whichever host
    if (who.empty() && !holders.complete)
        who = std::string("a program ") + (stored.remote || byVirtlockd ? "on another host, or one " : "") + kNotInTime;
    else if (who.empty())
        who = stored.remote || byVirtlockd ? "a program on another host, or one that may not be looked at"
                                           : "a program that may not be looked at";
    if (byVirtlockd)
        return image + " is in use outside leasehold by " + who + ", which " + words +
               ": shut that guest down on the host where virtlockd is the lock manager, and let all hosts use "
               "leasehold" +
               movesIn;
    if (guests)
        return image + " is in use by " + who +
               " without a lease of its own, as a backing file for instance, and that one " + words +
               ": shut the guest down, or give this one an image of its own";
    return image + " is in use outside leasehold by " + who + ", which " + words +
           ": end it, or wait for it, and try again" + movesIn;
}

std::string explainNoVessel(const Guest& guest) {
    return "no leases of guest " + quote(guest.name) + " (UUID " + lease::formatUuid(guest.uuid) +
           ") were found in its QEMU (pid " + std::to_string(guest.pid) +
           "): it was started without leasehold, so nothing protects its images; shut it down and start it again, or "
           "set guests_without_lease = \"allow\" in qemu-leasehold.conf to let such guests go on unprotected";
}

} // namespace leasehold

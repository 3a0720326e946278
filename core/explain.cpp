// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/explain.hpp"

#include "core/os/text.hpp"

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

// The holders of marks in words, from three sources: guests of this host say themselves who they are; the owner
// record names those of other hosts, if it is about one of the marks that are up; what is left is only a number.
class Namer {
public:
    explicit Namer(const qemu::StoredLease& stored)
        : file_(stored.file), guests_(qemu::findGuests()), record_(readOwner(stored)) {}

    std::string name(const Mark& mark) const {
        Mode use = lease::presentMode(mark).value_or(Mode::exclusive);
        std::string mode = describeMode(use);
        bool sameDomain = record_ && lease::hashDomain(record_->uuid) == mark.domain;
        bool current = sameDomain && record_->incarnation == mark.id;
        if (current && record_->since > 0)
            mode += ", since " + formatTime(record_->since);
        auto local = std::find_if(guests_.begin(), guests_.end(), [&](const qemu::RunningGuest& guest) {
            return guest.tag.incarnation == mark.id && lease::hashDomain(guest.tag.uuid) == mark.domain;
        });
        if (local != guests_.end() && use == Mode::readOnly && qemu::readsBelow(*local, file_))
            mode += ", as a backing file";
        if (local != guests_.end())
            return describe(local->tag.name, local->tag.uuid, at(local->pid, os::hostName()) + ", " + mode);
        if (current)
            return describe(record_->domain, record_->uuid, at(record_->pid, record_->host) + ", " + mode);
        // It has moved since, and has not run yet where it is now.
        if (sameDomain)
            return describe(record_->domain, record_->uuid,
                            mode + "; last recorded as " + at(record_->pid, record_->host));
        return "a guest on another host that left no record (incarnation " + os::hexadecimal(mark.id) + ", " + mode +
               ")";
    }

private:
    static std::string at(pid_t pid, const std::string& host) {
        return "pid " + std::to_string(pid) + " on host " + quote(host.empty() ? "unknown" : host);
    }

    static std::string describe(const std::string& name, const lease::Uuid& uuid, const std::string& rest) {
        return "guest " + quote(name) + " (UUID " + lease::formatUuid(uuid) + ", " + rest + ")";
    }

    os::FileId file_;
    std::vector<qemu::RunningGuest> guests_;
    std::optional<lease::OwnerRecord> record_;
};

std::string listNames(const Namer& namer, const std::vector<Mark>& marks) {
    std::string list;
    std::size_t named = 0;
    for (const Mark& mark : marks) {
        if (named == kMaxNamed)
            return list + " and " + std::to_string(marks.size() - named) + " more";
        list += (named++ ? ", " : "") + namer.name(mark);
    }
    return list;
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

bool areReaders(const std::vector<Mark>& marks) {
    return !marks.empty() && std::all_of(marks.begin(), marks.end(),
                                         [](const Mark& mark) { return lease::presentMode(mark) == Mode::readOnly; });
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

std::string explainJoin(const Guest& guest, const qemu::StoredLease& stored, const std::vector<Mark>& marks) {
    std::vector<Mark> others;
    for (const Mark& mark : marks)
        if (lease::presentMode(mark) && mark.domain == lease::hashDomain(guest.uuid))
            others.push_back(mark);
    return subjectOf(stored) + " is expected from " +
           (others.empty() ? "another host" : listNames(Namer(stored), others)) +
           ". If this is not its migration, use the guest there: it cannot run here as well";
}

std::string explainRefusal(const Guest& guest, const qemu::StoredLease& stored, Mode mode,
                           const lease::Refusal& refusal) {
    std::string subject = subjectOf(stored), self = quote(guest.name);
    std::vector<Mark> marks = blockers(guest, refusal, mode);
    std::string names = marks.empty() ? "" : listNames(Namer(stored), marks);
    switch (refusal.obstacle) {
    case Obstacle::guestPresent:
        if (stored.lower && mode == Mode::readOnly)
            return subject + " is in use by " + (names.empty() ? "a guest that writes to it" : names) + "; guest " +
                   self + " reads it below its own image and cannot run meanwhile: shut the other guest down or " +
                   "detach it there, and try again";
        return subject + " is in use by " + (names.empty() ? "a reader on another host" : names) + "; guest " + self +
               " cannot have it: shut the other guest down or detach it there, and try again" +
               (mode == Mode::exclusive && areReaders(marks)
                    ? " (if this guest only reads it too, mark the disk <readonly/>; one with <transient "
                      "shareBacking='yes'/> counts as writing: give each guest an overlay instead)"
                    : "");
    case Obstacle::sameGuest:
        return "guest " + self + " already runs elsewhere with " + subject + ": " +
               (names.empty() ? "no name is known" : names) +
               "; it has not handed it over: use it there, migrate it, or shut it down there first";
    case Obstacle::stateTaken:
        return "guest " + self + " was taken over with " + subject + " by " + (names.empty() ? "another QEMU" : names) +
               "; what is left here is older than that one: destroy this guest, and use the other";
    case Obstacle::beingTaken:
        return subject + " is just being taken or given up by another guest, for longer than guest " + self +
               " may wait; try again, and look for a stopped QEMU or libvirtd on the hosts that share it";
    case Obstacle::foreignLock:
        return subject + " is locked as a whole by a program that is not leasehold; guest " + self +
               " cannot have it: find the program (/proc/locks on the host where it runs) and end it";
    }
    return subject + " cannot be leased for guest " + self;
}

const char* describeMode(Mode mode) {
    return mode == Mode::exclusive ? "exclusively" : mode == Mode::shared ? "shared with writers" : "read-only";
}

std::string explainOutsider(const std::string& path, const std::string& words, const std::vector<pid_t>& holders,
                            pid_t own) {
    std::string who;
    bool guests = false;
    for (pid_t pid : holders) {
        if (pid == own)
            continue;
        auto tag = qemu::inspectGuest(pid);
        guests = guests || tag;
        who += (who.empty() ? "" : ", ") + (tag ? "guest " + quote(tag->name) : quote(os::commandName(pid))) +
               " (pid " + std::to_string(pid) + ")";
    }
    std::string image = "image " + quote(path);
    if (guests)
        return image + " is in use by " + who +
               " without a lease of its own, as a backing file for instance, and that one " + words +
               ": shut the guest down, or give this one an image of its own";
    if (who.empty())
        who = "a program on another host, or one that may not be looked at";
    return image + " is in use outside leasehold by " + who + ", which " + words +
           ": end it, or wait for it, and try again (option qemu_locks in qemu-leasehold.conf)";
}

std::string explainNoVessel(const Guest& guest) {
    return "no leases of guest " + quote(guest.name) + " (UUID " + lease::formatUuid(guest.uuid) +
           ") were found in its QEMU (pid " + std::to_string(guest.pid) +
           "): it was started without leasehold, so nothing protects its images; shut it down and start it again, or "
           "set guests_without_lease = \"allow\" in qemu-leasehold.conf to let such guests go on unprotected";
}

} // namespace leasehold

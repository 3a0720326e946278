// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Who uses an image, and which leases the guests of this host have: facts for the leasehold command, which prints them.
// Looks and changes nothing: no image is opened for writing, no lock is taken. What it cannot see it says. Calls on
// storage that does not answer hang, and hostile vessels throw: the caller has a helper process and a wall.

#include "core/lease/record.hpp"
#include "core/os/lock_table.hpp"
#include "core/place.hpp"
#include "core/qemu/image_locks.hpp"

#include <span>
#include <string>
#include <vector>

namespace leasehold {

// A process as a person knows it. pid 0: not of this host, or one that may not be looked at.
struct ProcessName {
    pid_t pid = 0;
    std::string command; // printable
    std::string guest;   // its name, if it keeps a guest's leases

    bool operator==(const ProcessName&) const = default;
};

//   joined ───▶ held ◀──▶ suspended       unclear: several QEMUs of one guest are there, and the marks do not say
//     │          ▲ │                      which of them has it
//     ▼          │ └──────▶ migrating
//   arrived ─────┘                        arrived: its source has ended, and it has not run here yet: it is suspended
enum class LeaseState { held, suspended, migrating, joined, arrived, unclear };

// Pure: what the marks that are up say about the one that placed this `present`.
LeaseState stateOf(const lease::Mark& present, const std::vector<lease::Mark>& marks);

// A guest that has the image, on this host or another.
struct LeaseView {
    lease::Mode mode = lease::Mode::exclusive;
    LeaseState state = LeaseState::held;
    bool lower = false; // below an image of the guest's own: known of guests of this host
    std::string layer;  // or below or above a device of the guest's own, in words; the same
    std::uint32_t incarnation = 0;
    // Who knows the name: the guest's own QEMU, the owner record (about just this incarnation, or about another one of
    // the same guest), or nobody.
    enum class Source { vessel, record, olderRecord, nobody };
    Source source = Source::nobody;
    std::string guest, host;
    lease::Uuid uuid{};
    pid_t pid = 0;          // on that host
    std::int64_t since = 0; // seconds since the epoch; 0: not known
};

// One who has QEMU's own lock bytes.
struct QemuView {
    ProcessName who;
    bool elsewhere = false;          // on another host
    std::vector<std::int64_t> bytes; // 100..104, 200..204
};

enum class Purpose { labels, virtlockd, other }; // labels: libvirt, while it relabels the image

// Any lock that is neither a mark nor one of QEMU's bytes; and whoever waits.
struct LockView {
    os::TableLock lock;
    ProcessName holder;
    bool elsewhere = false;
    Purpose purpose = Purpose::other;
};

struct ImageView {
    std::string path, target; // as given; where it leads to
    enum class Kind { file, block, directory };
    Kind kind = Kind::file;
    storage::Storage storage;
    std::string unleasable; // why no guest can have it for writing, as `classify` says it; whoever asks fills it in
    std::string leaseFile;  // where the lease is, if not on the image
    std::string server;     // of network storage, if the mount names one
    std::vector<LeaseView> leases;
    bool foreignMark = false; // a lock in leasehold's area that is not leasehold's
    std::optional<lease::OwnerRecord> record;
    bool recordCurrent = false; // a mark that is up is that incarnation's
    std::vector<QemuView> qemu;
    std::vector<LockView> locks;
    std::vector<ProcessName> openers; // have it open, without any lock
    std::vector<std::string> blindSpots;
    // What QEMU would say now, "" if nothing.
    std::string reader, writer;
};

// What the processes of this host have open, and whose guests they are: one look serves many images.
struct Processes {
    os::OpenTable open;
    qemu::HostGuests guests;
};
Processes lookAtProcesses();

// Throws where there is no such image, or where it is nothing that a guest could have. `place` is where its lease is
// (findPlace); null if that cannot be told: then it is looked for on the image.
ImageView inspectImage(const std::string& path, const Place* place, const Processes& processes,
                       std::span<const storage::Override> overrides = {});

// What it is on. Throws like inspectImage.
storage::Storage classifyPath(const std::string& path, std::span<const storage::Override> overrides);

// "byte-range" (on the image), "lease-file", "file-set".
std::string mediumName(const qemu::StoredLease& stored);

// Pure. What QEMU says to somebody who opens the image like this: the bytes that it locks, then those that it asks for
// (QEMU block/file-posix.c, raw_apply_lock_bytes, raw_check_lock_bytes).
std::string answerOfQemu(const std::vector<os::TableLock>& locks, qemu::Use use);

// "consistent read", "write": the words of QEMU's messages (block.c, bdrv_perm_names).
std::string permissionOf(std::int64_t byte);

// What the user can do next, a sentence each.
std::vector<std::string> adviseOn(const ImageView& image);

struct StoredView {
    std::string path;
    lease::Mode mode = lease::Mode::exclusive;
    LeaseState state = LeaseState::held;
    bool owned = false;       // it, and not a successor, may run
    bool lower = false;       // below an image of the guest's own
    std::string medium;       // "byte-range", "lease-file", "file-set"
    qemu::StoredLease stored; // for the questions that may hang
};

// A process that keeps leases, a guest or a command of `leasehold run`; or a QEMU. Of one that keeps none libvirt says
// the name (its pid files, which only root can write) and the command line the UUID. Who runs as root, or as who asks,
// is believed its name as well. Of anybody else's only the user is told: a process may call itself whatever it likes.
struct GuestView {
    qemu::GuestTag tag;
    pid_t pid = 0;
    std::optional<uid_t> stranger = std::nullopt; // whose it is, where nobody says which guest it is
    std::vector<StoredView> leases = {};
    std::vector<qemu::StoredLease> companions = {}; // of some of them (openCompanion)
};

// Without their leases yet. Nothing here hangs.
struct HostView {
    std::vector<GuestView> guests;
    std::vector<std::string> blindSpots; // what who asks does not see: sentences
};
HostView findGuests();

// hidden: who asks may not look. foreign: another user's, who says himself what guest it is.
enum class Protection { leased, none, hidden, foreign, gone };

// Fills in the leases, without their descriptors and so without their state. Nothing here hangs. Throws when the vessel
// is damaged.
Protection surveyLeases(GuestView& guest);

// The same with duplicates of the descriptors, which is as good as having the leases: close them soon, lest a lease
// outlive its QEMU here. That may hang.
Protection readLeases(GuestView& guest);

// What the guest's QEMU reads without a lease, by the kernel's names for it: backing files that could not be leased, or
// that nobody wanted leased. Of other programs nothing, and nothing where that cannot be told. May hang.
std::vector<std::string> findUnleased(const GuestView& guest);

// How the guest has lost this lease, though it lives: "was deleted from its lockspace" (core/loss). May hang. Throws
// where it cannot be told.
std::optional<std::string> findLoss(const qemu::StoredLease& lease, const qemu::GuestTag& tag);

// What only the storage can tell about a lease; may hang.
std::int64_t heldSince(const StoredView& lease, const qemu::GuestTag& tag);

std::string describe(LeaseState state);

} // namespace leasehold

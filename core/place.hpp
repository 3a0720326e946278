// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Where the lease of a resource lives: on the image itself, or in a lockspace, and in which kind of marks. Opens it as
// a guest needs it, and refuses what has no lock to trust. The engine and the tools ask here and nowhere else, so that
// all of them come to the same lease. Takes no lock that counts, and knows nothing of libvirt.

#include "core/lease/byte_range.hpp"
#include "core/lease/file_set.hpp"
#include "core/lease/record.hpp"
#include "core/os/open_files.hpp"
#include "core/qemu/vessel.hpp"
#include "core/settings.hpp"
#include "core/storage/classify.hpp"

#include <optional>
#include <string>
#include <variant>

namespace leasehold {

// A <lease> element of a guest.
struct NamedLease {
    std::string lockspace;
    std::string key;
    std::uint64_t offset = 0;

    bool operator==(const NamedLease&) const = default;
};

// What a guest uses and others must not: an image by its path, or a named lease, whose path is that of its target.
struct Resource {
    std::string path;
    lease::Mode mode = lease::Mode::exclusive;
    std::optional<NamedLease> named = std::nullopt;
    // Opened through this (os::pathThrough), not by its path: a file that QEMU has open already.
    std::string through;
};

// The lease of a resource, opened, with its companion. Nothing is locked yet; a file set has an empty file in it.
struct Place {
    qemu::StoredLease stored;
    storage::Storage storage;   // that the marks are on
    bool hidesQemu = false;     // QEMU's locks of other hosts do not show in F_OFD_GETLK: bytes have to be tried
    bool tellsOutsiders = true; // QEMU's locks on the image mean something, and asking for them is no error
    bool guardable = false;     // QEMU's locks keep nobody out on another host: who joins puts up the guard
    bool ofThisHost = false;    // the lease itself is among those of this host
    bool shared = false;        // the lease is one that the guest has already, but not its companion: openBeside
    std::string partOf;         // of a layer: see Below
    std::string caution;        // what an administrator should know though the lease is given; or empty
};

// What people and the guest's vessel call it: the image's path, or key and target of a named lease.
std::string nameOf(const Resource& resource);

// A lease that goes by a path or by a name does not know an image again that is reached in another way: through a
// second mount, after it was moved, or as another node of one device. So it has a companion, a second lease of this
// host by device and inode, unless it is on the image itself, or a lease of this host already.
//
// Throws Error, naming the resource, what is wrong with it, and what to do.
Place openPlace(const Resource& resource, const lease::Incarnation& self, const Settings& settings);

// The same for a file that has taken the name of another one, by which its lease goes: the guest has that lease, as
// `known`, and it is the lease of both, through the same open file description.
Place openBeside(const qemu::StoredLease& known, const Resource& resource, const lease::Incarnation& self,
                 const Settings& settings);

// A lease that a guest has besides, of something below its device: two guests never have two layers of one disk. Who
// uses a layer as a whole has its own lease, in its own mode; who uses a part of it has that lease for reading, and a
// second one, of the parts, which who reads the whole has shared. So wholes keep out parts, and parts do not keep out
// parts. DESIGN.md, "Layers of a device".
struct Below {
    std::string lockspace, option, name, about; // the lease file; without an option it is of this host
    std::string file;                           // or the lease of this file, as of any image
    lease::Mode mode = lease::Mode::readOnly;
    std::string partOf; // the file that a part of a loop device is a part of
    std::string words;  // "SCSI disk sda, which '/dev/sda1' is on"
};

// `place` is that of the resource, opened. Throws Error like openPlace.
std::vector<Below> findBelow(const Resource& resource, const Place& place, const Settings& settings);
// Which lease file or file that is; nothing where it is not made yet.
std::optional<os::FileId> identifyBelow(const Below& below);
Place openBelow(const Below& below, const os::FileId& user, const lease::Incarnation& self, const Settings& settings);
// With the locks in hand: who has a part of a loop device's file has no lock of that file, and a guest may have had it
// before there was a loop device. A refusal, or nothing.
std::optional<std::string> findWholeUse(const Place& place, const Settings& settings);
// How a layer's aliases call the lease that it is there for.
std::string layerUser(const os::FileId& user);

// The same for looking: nothing is made, and `stored.lease` and `stored.directory` are open only where others have made
// them. The image is opened with O_PATH (open(2)).
Place findPlace(const Resource& resource, const Settings& settings);

// What the guest's vessel calls the resource (StoredLease::file); nothing when the path leads nowhere.
std::optional<os::FileId> identifyResource(const Resource& resource, const Settings& settings);
// The same where what cannot be told is as good as nothing.
std::optional<os::FileId> tryIdentifyResource(const Resource& resource, const Settings& settings);

// Whether no mount tells what storage one of the files is on: the mount is gone (umount -l), or is in another
// namespace. Told by the number of its file system: network storage has one that is no device's, and so has other
// storage, which is taken for unseen where mounts and files have different ones (btrfs, overlayfs). The storage is not
// asked.
bool anyOnUnseenMount(const os::OpenFiles& opened);

// Throws Error where a lease that came out of a QEMU is in a file or a directory that leasehold cannot have made: a
// QEMU that was broken into may name any file that it can open. Not for leases on images, which are QEMU's own files.
void checkOurs(const qemu::StoredLease& lease);

// The marks of a stored lease. The descriptors stay where they are.
class AnyMedium {
public:
    AnyMedium(const qemu::StoredLease& stored, const lease::Incarnation& self);
    lease::Medium& operator*();
    lease::Medium* operator->() { return &**this; }

private:
    std::variant<lease::ByteRangeMedium, lease::FileSetMedium> medium_;
};

// The owner record of a stored lease (lease/record.hpp). Best effort, both.
void writeOwner(const qemu::StoredLease& stored, const lease::OwnerRecord& record);
std::optional<lease::OwnerRecord> readOwner(const qemu::StoredLease& stored);

// Whether the lease file still has a name: one that was swept after we opened it, or deleted, keeps nobody out.
bool isListed(const qemu::StoredLease& stored, const lease::Incarnation& self);

// Removes the lease file, if nobody holds or takes the lease. For one that was just given up.
void sweepLease(const qemu::StoredLease& stored);

} // namespace leasehold

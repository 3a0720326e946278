// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What storage is behind an open file, and which lock can be trusted there. Found out by looking (fstatfs(2), the
// mount's type and options) unless the administrator says otherwise (override.hpp). Knows nothing of leases. DESIGN.md,
// "Media", has the table with the sources.

#include "core/storage/mount.hpp"
#include "core/storage/override.hpp"

#include <cstdint>
#include <span>
#include <string>

namespace leasehold::storage {

struct Storage {
    std::string name; // what an administrator calls it: "ext4", "NFSv4.2", "fuse.sshfs"
    LockKind lock = LockKind::none;
    Scope scope = Scope::thisHost;
    // Calls may hang for as long as a server or cluster does not answer, lock calls that never wait too.
    bool remote = false;
    // F_OFD_GETLK does not show read locks of other hosts (NFSv3): only trying a write lock finds them.
    bool hidesReadLocks = false;
    // QEMU's own image locks, which are byte-range locks, do not reach every host that can open the image.
    bool qemuLocksStayLocal = false;
    // flock on the image itself crosses hosts and does not collide with byte-range locks: who locks the image so as
    // well is respected by flock(1) on every host.
    bool flockImage = false;
    // Where there is no lock to trust: a guest that only reads may have a lease of this host. Not where others may
    // write under a lease, because the same files have a good lock by another path or mount option, and not where the
    // administrator refuses leases.
    bool readersMayStay = false;
    // Why there is no lock to trust, and what to do, as a clause. Or what even a good lock cannot promise here.
    std::string reason;
};

// `path` is for messages, and for the overrides where /proc does not tell the canonical path of `fd`.
Storage classify(int fd, const std::string& path, std::span<const Override> overrides = {});

// The pure parts. The file system's magic number (statfs(2)), and its mount if /proc tells.
Storage classifyMount(std::uint32_t magic, const std::optional<Mount>& mount);

// The locks of a host that has died stay there for long, or until it boots, unless the storage is told that it is dead
// (leasehold fenced).
bool waitsForTheDead(const Storage& storage);

// The directories that an overlay lies on, as its mount names them: upper, then lower and data-only ones. They are
// paths of the mount namespace in which it was mounted, which need not be this one.
std::vector<std::string> overlayLayers(const Mount& mount);

} // namespace leasehold::storage

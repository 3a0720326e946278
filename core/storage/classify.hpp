// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What storage is behind an open file, and which lock can be trusted there. Found out by looking (fstatfs(2), the
// mount's type and options), never by what somebody configured. Knows nothing of leases. DESIGN.md, "Media", has the
// table with the sources.

#include "core/storage/mount.hpp"
#include "core/storage/override.hpp"
#include <span>

#include <cstdint>
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
    bool qemuLocksStayLocal = false;
    bool flockImage = false;
    // Why there is no lock to trust, and what to do, as a clause. Or what even a good lock cannot promise here.
    std::string reason;
};

Storage classify(int fd, const std::string& path, std::span<const Override> overrides = {});

// The pure part: the file system's magic number (statfs(2)), and its mount if /proc tells.
Storage classifyMount(std::uint32_t magic, const std::optional<Mount>& mount);

} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What storage is behind an open file, and which lock can be trusted there. Found out by looking (fstatfs(2),
// mountinfo), never by what somebody configured. Knows nothing of leases.

#include <cstdint>
#include <string>

namespace leasehold::storage {

enum class LockKind {
    byteRange, // open-file-description locks on the file itself reach everybody who can open it
    none,      // not, or not known: a lease here would only pretend
};

struct Storage {
    std::string name; // what an administrator calls it: "ext4", "NFS", "fuse.sshfs"
    LockKind lock = LockKind::none;
    std::string reason; // why there is no lock to trust, as a clause; empty where there is one
};

Storage classify(int fd, const std::string& path);

// Pure parts of it, for tests and for `leasehold classify`.
Storage classifyByMagic(std::uint32_t magic, const std::string& mountType);

// The file system type of the mount with this id in a mountinfo text (proc(5)); empty when it is not listed.
std::string mountTypeOf(const std::string& mountinfo, int mountId);

} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// All locks on one file, from the three places where Linux shows them: /proc/locks (this host, mostly without the
// process), /proc/PID/fdinfo (with the process, if we may look), and F_OFD_GETLK (other hosts too, one at a time). Only
// for explanations. Knows nothing of what a lock is for.

#include "core/os/file_lock.hpp"

#include <chrono>
#include <optional>
#include <string_view>
#include <vector>

namespace leasehold::os {

// Linux fs/locks.c, lock_get_status(). NFS calls open-file-description locks POSIX ones.
enum class LockClass { ofd, posix, flock, lease, delegation };

struct TableLock {
    LockClass kind = LockClass::ofd;
    LockType type = LockType::write;
    Range range;              // a whole-file flock or lease is {0, 0}
    pid_t pid = -1;           // -1: an open-file-description lock, which no process owns
    bool waiting = false;     // is not granted: waits for the lock above it
    std::uint64_t device = 0; // of the file system, which is not always what stat(2) says (btrfs)
    std::uint64_t inode = 0;

    bool operator==(const TableLock&) const = default;
};

// Pure: the lines of /proc/locks, or the `lock:` lines of an fdinfo text, proc(5). What is no such line is passed over.
std::vector<TableLock> parseLockTable(std::string_view text);

// A process of this host that has the file open, and its locks.
struct Opener {
    pid_t pid = 0;
    bool writes = false; // through a descriptor that is open for writing
    std::vector<TableLock> locks;
};

// What all processes have open, looked at once, for as many files as one likes. Asks no server, so it cannot hang; and
// at the deadline it stops looking, since anybody can have very many descriptors.
class OpenTable {
public:
    explicit OpenTable(std::chrono::steady_clock::time_point deadline);

    // Who has the file open now, of what was seen then. `node` is the device number if the file is a block device: any
    // node of that device counts, a QEMU of libvirt's has nodes of its own.
    std::vector<Opener> openersOf(const FileId& file, std::optional<std::uint64_t> node) const;
    // The processes that may not be looked at.
    std::size_t hidden() const { return hidden_; }
    // False: there was no time to look at all.
    bool complete() const { return complete_; }

private:
    struct Entry {
        std::uint64_t device, inode; // of the node itself, or the device that it stands for and 0
        pid_t pid;
        int number;
    };
    void lookAt(pid_t pid, std::chrono::steady_clock::time_point deadline);

    std::vector<Entry> entries_; // by file, then as they came
    std::size_t hidden_ = 0;
    bool complete_ = true;
};

// All that F_OFD_GETLK finds. Of several read locks on one byte it shows one. Stops at the limit.
std::vector<FoundLock> findConflicts(int fd, const std::string& what, std::size_t limit);

bool overlap(const Range& one, const Range& other);

} // namespace leasehold::os

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Open-file-description locks (fcntl(2), "Open file description locks (non-POSIX)") and flock(2): the only place that
// calls F_OFD_* and decides by a flock. Both belong to the open file description: all duplicates of a descriptor, in
// whatever process, are one holder, and the lock ends when the last of them is closed. Knows nothing of what a lock
// means.

#include "core/os/fd.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace leasehold::os {

enum class LockType { read, write };

// Bytes from start on; length 0 means to the end of the file's address space, as in fcntl(2).
struct Range {
    std::int64_t start = 0;
    std::int64_t length = 0;

    bool operator==(const Range&) const = default;
};

// Two answers. A third thing, "cannot lock" (ENOLCK, EOPNOTSUPP, EIO, ...), is no answer and throws: a file system
// that promises nothing must be taken neither for a busy one nor for a free one.
enum class LockOutcome { granted, contended };

struct FoundLock {
    LockType type = LockType::write;
    Range range;
    pid_t pid = -1; // -1: an open-file-description lock, or a holder on another host
};

// Never waits. Both EAGAIN and EACCES mean contended (POSIX allows either; SMB says EACCES).
// An upgrade or downgrade of one's own lock is one atomic step.
[[nodiscard]] LockOutcome tryLock(int fd, LockType type, Range range, const std::string& what);

void unlock(int fd, Range range, const std::string& what);

// Some lock of another open file description that would stop a lock of this type (F_OFD_GETLK). Which one of several
// is up to the kernel. An explanation, never a decision: NFSv3 does not show read locks of other hosts.
std::optional<FoundLock> findConflict(int fd, LockType type, Range range, const std::string& what);

// The locks that one's own descriptor holds: F_OFD_GETLK only shows those of others. Not on every file system:
// GlusterFS lists none.
std::vector<FoundLock> inspectOwnLocks(int fd);

// flock(2) on the whole file; never waits. To convert one's own is no atomic step: another holder may come in between,
// and when that happens the lock is gone.
[[nodiscard]] LockOutcome tryFlock(int fd, LockType type, const std::string& what);
void unflock(int fd, const std::string& what);

// Pure: the byte-range locks among the `lock:` lines of a /proc/PID/fdinfo/N text, proc(5).
std::vector<FoundLock> parseFdinfoLocks(const std::string& text);

} // namespace leasehold::os

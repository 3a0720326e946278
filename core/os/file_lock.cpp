// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/file_lock.hpp"

#include "core/os/error.hpp"
#include "core/os/lock_table.hpp"

#include <fcntl.h>
#include <sys/file.h>

namespace leasehold::os {

namespace {

// An fcntl lock call with EINTR retried: 0, or the error number.
int callLock(int fd, int command, struct flock& lock) {
    while (fcntl(fd, command, &lock) < 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

struct flock describe(short type, Range range) {
    struct flock lock {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = range.start;
    lock.l_len = range.length;
    lock.l_pid = 0; // F_OFD_* demands 0
    return lock;
}

short toKernel(LockType type) {
    return type == LockType::write ? F_WRLCK : F_RDLCK;
}

} // namespace

LockOutcome tryLock(int fd, LockType type, Range range, const std::string& what) {
    struct flock lock = describe(toKernel(type), range);
    int error = callLock(fd, F_OFD_SETLK, lock);
    if (error == 0)
        return LockOutcome::granted;
    if (error == EAGAIN || error == EACCES)
        return LockOutcome::contended;
    throw SystemError(error, "lock", what);
}

void unlock(int fd, Range range, const std::string& what) {
    struct flock lock = describe(F_UNLCK, range);
    if (int error = callLock(fd, F_OFD_SETLK, lock))
        throw SystemError(error, "unlock", what);
}

std::optional<FoundLock> findConflict(int fd, LockType type, Range range, const std::string& what) {
    struct flock lock = describe(toKernel(type), range);
    if (int error = callLock(fd, F_OFD_GETLK, lock))
        throw SystemError(error, "query the locks of", what);
    if (lock.l_type == F_UNLCK)
        return std::nullopt;
    return FoundLock{lock.l_type == F_RDLCK ? LockType::read : LockType::write, {lock.l_start, lock.l_len}, lock.l_pid};
}

std::vector<FoundLock> parseFdinfoLocks(const std::string& text) {
    std::vector<FoundLock> locks;
    for (const TableLock& lock : parseLockTable(text))
        // The NFS client calls open-file-description locks POSIX ones.
        if (lock.kind == LockClass::ofd || lock.kind == LockClass::posix)
            locks.push_back({lock.type, lock.range});
    return locks;
}

std::vector<FoundLock> inspectOwnLocks(int fd) {
    return parseFdinfoLocks(readFile("/proc/self/fdinfo/" + std::to_string(fd), 1 << 20));
}

namespace {

int callFlock(int fd, int operation) {
    while (flock(fd, operation) < 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

} // namespace

LockOutcome tryFlock(int fd, LockType type, const std::string& what) {
    int error = callFlock(fd, (type == LockType::write ? LOCK_EX : LOCK_SH) | LOCK_NB);
    if (error == 0)
        return LockOutcome::granted;
    if (error == EWOULDBLOCK || error == EACCES)
        return LockOutcome::contended;
    throw SystemError(error, "flock", what);
}

void unflock(int fd, const std::string& what) {
    if (int error = callFlock(fd, LOCK_UN))
        throw SystemError(error, "unlock", what);
}

} // namespace leasehold::os

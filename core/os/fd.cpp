// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/fd.hpp"

#include "core/os/error.hpp"

#include <algorithm>
#include <climits>

#include <fcntl.h>
#include <sys/fsuid.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold::os {

void Fd::reset(int number) {
    // Never retried: on Linux the descriptor is gone whatever close(2) says, and another thread may already own the
    // number again.
    if (number_ >= 0)
        ::close(number_);
    number_ = number;
}

void ClosedTogether::add(Fd fd) {
    if (!fd.open())
        return;
    if (count_ == numbers_.size())
        closeAll();
    numbers_[count_++] = fd.release();
}

void ClosedTogether::closeAll() {
    const auto end = numbers_.begin() + static_cast<std::ptrdiff_t>(count_);
    if (!std::is_sorted(numbers_.begin(), end)) // they nearly always are
        std::sort(numbers_.begin(), end);
    for (std::size_t first = 0, next = 0; first < count_; first = next) {
        // All of the row are ours: another thread's descriptor has a number that is none of these.
        for (next = first + 1; next < count_ && numbers_[next] == numbers_[next - 1] + 1;)
            next++;
#ifndef __SANITIZE_THREAD__ // which does not know this call, and takes the next user of a number for a rival
        // Linux 5.9; the wrapper is younger than the glibc of Debian 11.
        if (next - first > 1 && syscall(__NR_close_range, numbers_[first], numbers_[next - 1], 0) == 0)
            continue;
#endif
        for (std::size_t i = first; i < next; i++)
            close(numbers_[i]);
    }
    count_ = 0;
}

namespace {

// 0, or the error number.
int identifyAt(int directory, const char* path, int flags, FileId& file, mode_t* type = nullptr) {
    struct stat known {};
    if (int error = tryStatAt(directory, path, flags, Wanted::identity, known))
        return error;
    file = fileIdOf(known);
    if (type)
        *type = known.st_mode & S_IFMT;
    return 0;
}

} // namespace

int tryStatAt(int directory, const char* path, int flags, Wanted wanted, struct stat& status) {
    constexpr unsigned kIdentity = STATX_TYPE | STATX_INO;
    constexpr unsigned kOwner = kIdentity | STATX_MODE | STATX_UID | STATX_GID | STATX_NLINK;
    struct statx found;
    status = {};
    // What a file is never changes.
    const bool known = wanted == Wanted::identity;
    if (statx(directory, path, flags | (known ? AT_STATX_DONT_SYNC : 0), known ? kIdentity : kOwner, &found) < 0)
        return errno;
    status.st_mode = found.stx_mode;
    status.st_uid = found.stx_uid;
    status.st_gid = found.stx_gid;
    status.st_nlink = found.stx_nlink;
    status.st_dev = makedev(found.stx_dev_major, found.stx_dev_minor);
    status.st_ino = found.stx_ino;
    status.st_rdev = makedev(found.stx_rdev_major, found.stx_rdev_minor);
    return 0;
}

FileId identify(int fd, const std::string& what, mode_t* type) {
    FileId file;
    if (int error = identifyAt(fd, "", AT_EMPTY_PATH, file, type))
        throw SystemError(error, "stat", what);
    return file;
}

int tryIdentify(const std::string& path, FileId& file, mode_t* type) {
    return identifyAt(AT_FDCWD, path.c_str(), 0, file, type);
}

int tryIdentifyAt(int directory, const std::string& path, FileId& file, mode_t* type) {
    return identifyAt(directory, path.c_str(), 0, file, type);
}

FileId fileIdOf(const struct stat& status) {
    constexpr std::uint64_t kNoInode = ~std::uint64_t{0};
    return S_ISBLK(status.st_mode) ? FileId{status.st_rdev, kNoInode} : FileId{status.st_dev, status.st_ino};
}

bool isMountRoot(int fd, const std::string& what) {
    struct statx status;
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &status) < 0)
        throw SystemError(errno, "stat", what);
    return (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0; // Linux 5.8
}

namespace {

// 0, or the error number. A path that fills the room may be longer than it (readlink(2)).
int tryPathOf(int fd, std::string& path) {
    char target[PATH_MAX];
    ssize_t length = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), target, sizeof target);
    if (length < 0)
        return errno;
    if (length == sizeof target || target[0] != '/')
        return ENAMETOOLONG;
    path.assign(target, static_cast<std::size_t>(length));
    return 0;
}

} // namespace

std::string pathOf(int fd) {
    std::string path;
    if (int error = tryPathOf(fd, path))
        throw SystemError(error, "find the path of", "/proc/self/fd/" + std::to_string(fd));
    return path;
}

std::string pathOf(int fd, const std::string& fallback) {
    std::string path;
    return tryPathOf(fd, path) == 0 ? path : fallback;
}

std::string targetOf(const std::string& link) {
    char target[PATH_MAX];
    ssize_t length = readlink(link.c_str(), target, sizeof target);
    return length > 0 ? std::string(target, static_cast<std::size_t>(length)) : link;
}

int tryOpen(const std::string& path, int flags, Fd& fd) {
    return tryOpenAt(AT_FDCWD, path, flags, 0, fd);
}

int tryOpenAt(int directory, const std::string& path, int flags, mode_t mode, Fd& fd) {
    do {
        fd = Fd(::openat(directory, path.c_str(), flags | O_CLOEXEC, mode));
    } while (!fd.open() && errno == EINTR);
    return fd.open() ? 0 : errno;
}

Fd openFile(const std::string& path, int flags) {
    Fd fd;
    if (int error = tryOpen(path, flags, fd))
        throw SystemError(error, "open", path);
    return fd;
}

Listing listAt(int directory) {
    Fd reader;
    if (int error = tryOpenAt(directory, ".", O_RDONLY | O_DIRECTORY, 0, reader)) {
        errno = error;
        return nullptr;
    }
    Listing list(fdopendir(reader.get()));
    if (list)
        reader.release();
    return list;
}

// The group first: without the privileges that setfsuid(2) takes away it could not be set.
FileSystemUser::FileSystemUser(uid_t user, gid_t group)
    : user_(static_cast<uid_t>(setfsuid(static_cast<uid_t>(-1)))),
      group_(static_cast<gid_t>(setfsgid(static_cast<gid_t>(-1)))) {
    (void)setfsgid(group);
    (void)setfsuid(user);
}

FileSystemUser::~FileSystemUser() {
    (void)setfsuid(user_);
    (void)setfsgid(group_);
}

namespace {

// 0, or the error number.
int tryRead(const std::string& path, std::size_t limit, std::string& text) {
    Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd.open())
        return errno;
    char buffer[4096];
    while (text.size() < limit) {
        ssize_t got = ::read(fd.get(), buffer, std::min(sizeof buffer, limit - text.size()));
        if (got == 0)
            break;
        if (got > 0)
            text.append(buffer, static_cast<std::size_t>(got));
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

} // namespace

std::string readFile(const std::string& path, std::size_t limit) {
    std::string text;
    if (int error = tryRead(path, limit, text))
        throw SystemError(error, "read", path);
    return text;
}

std::optional<std::string> readFileIfPossible(const std::string& path, std::size_t limit) {
    std::string text;
    if (tryRead(path, limit, text) != 0)
        return std::nullopt;
    return text;
}

} // namespace leasehold::os

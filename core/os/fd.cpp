// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/fd.hpp"

#include "core/os/error.hpp"

#include <algorithm>

#include <fcntl.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::os {

void Fd::reset(int number) {
    // Never retried: on Linux the descriptor is gone whatever close(2) says, and another thread may already own the
    // number again.
    if (number_ >= 0)
        ::close(number_);
    number_ = number;
}

FileId identify(int fd, const std::string& what) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        throw SystemError(errno, "stat", what);
    return {status.st_dev, status.st_ino};
}

int tryOpen(const std::string& path, int flags, Fd& fd) {
    do {
        fd = Fd(::open(path.c_str(), flags | O_CLOEXEC));
    } while (!fd.open() && errno == EINTR);
    return fd.open() ? 0 : errno;
}

Fd openFile(const std::string& path, int flags) {
    Fd fd;
    if (int error = tryOpen(path, flags, fd))
        throw SystemError(error, "open", path);
    return fd;
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

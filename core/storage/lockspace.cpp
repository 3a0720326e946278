// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/lockspace.hpp"

#include "core/os/error.hpp"
#include "core/os/hash.hpp"
#include "core/os/text.hpp"

#include <cstdio>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::storage {

namespace {

constexpr std::string_view kTitle = "leasehold lease of ";

[[noreturn]] void refuse(const std::string& path, const std::string& origin, const std::string& problem) {
    throw Error(Fault::unsupported, "lockspace '" + path + "' (" + origin + ") cannot be used: " + problem);
}

struct stat statOf(int fd, const std::string& path) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        throw SystemError(errno, "stat", path);
    return status;
}

// Nobody but root and ourselves may put anything into it or take anything out of it.
bool ownedByUs(const struct stat& status) {
    return status.st_uid == 0 || status.st_uid == geteuid();
}

bool changeableByOthers(const struct stat& status) {
    return (status.st_mode & (S_IWGRP | S_IWOTH)) != 0;
}

// A lockspace of a server that squashes root (exports(5)) belongs to another user; then that one has to be asked.
bool belongsToSquashed(const Storage& storage) {
    return storage.remote && geteuid() == 0;
}

// Runs `open`, which gives an error number, as ourselves and, where the server does not let root in, as the owner of
// the lockspace.
template <typename Open>
int openInside(const Lockspace& lockspace, Open open) {
    int error = open();
    if (error != EACCES && error != EPERM)
        return error;
    struct stat status = statOf(lockspace.directory.get(), lockspace.path);
    if (status.st_uid == geteuid() || geteuid() != 0)
        return error;
    os::FileSystemUser owner(status.st_uid, status.st_gid);
    return open();
}

[[noreturn]] void cannotMake(const Lockspace& lockspace, int error, const std::string& name) {
    if (error == EACCES || error == EPERM || error == EROFS)
        refuse(lockspace.path, lockspace.origin,
               "no lease can be made in it (" + std::string(SystemError(error, "make", name).what()) +
                   "); libvirtd must be allowed to write there");
    throw SystemError(error, "make the lease", lockspace.path + "/" + name);
}

} // namespace

Lockspace openLockspace(const std::string& path, const std::string& origin, std::span<const Override> overrides,
                        Missing missing) {
    Lockspace lockspace{path, origin, {}, {}};
    if (missing == Missing::made && mkdir(path.c_str(), 0700) < 0 && errno != EEXIST) {
        int error = errno;
        refuse(path, origin, SystemError(error, "make", path).what());
    }
    int error = os::tryOpen(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, lockspace.directory);
    if (error == ENOENT && missing == Missing::left)
        return lockspace;
    if (error == ENOENT)
        refuse(path, origin, "it does not exist; make it on storage that all hosts share");
    if (error == ENOTDIR || error == ELOOP) {
        struct stat status;
        bool link = lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
        refuse(path, origin,
               link ? "it is a symbolic link, which could lead another host elsewhere; name the directory itself"
                    : "it is not a directory");
    }
    if (error != 0)
        refuse(path, origin, SystemError(error, "open", path).what());
    struct stat status = statOf(lockspace.directory.get(), path);
    lockspace.storage = classify(lockspace.directory.get(), path, overrides);
    if (changeableByOthers(status) || (!ownedByUs(status) && !belongsToSquashed(lockspace.storage))) {
        char facts[64];
        std::snprintf(facts, sizeof facts, "user %u, mode %04o", status.st_uid, status.st_mode & 07777);
        refuse(path, origin,
               "others than root could remove leases from it (" + std::string(facts) +
                   "); make it root's, and writable for its owner only");
    }
    if (lockspace.storage.lock == LockKind::none)
        refuse(path, origin, "it is on " + lockspace.storage.name + ", and " + lockspace.storage.reason);
    return lockspace;
}

os::Fd openLeaseFile(const Lockspace& lockspace, const std::string& name, const std::string& about) {
    os::Fd fd;
    int error = openInside(lockspace, [&] {
        return os::tryOpenAt(lockspace.directory.get(), name, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY,
                             0600, fd);
    });
    std::string path = lockspace.path + "/" + name;
    if (error == ELOOP || error == EISDIR || error == ENXIO)
        refuse(lockspace.path, lockspace.origin,
               "'" + name +
                   "' in it is a lease of another kind, or no lease; give all hosts the same storage_locks, "
                   "or remove it when no guest uses it");
    if (error != 0)
        cannotMake(lockspace, error, name);
    struct stat status = statOf(fd.get(), path);
    if (!S_ISREG(status.st_mode) || status.st_nlink > 1 || changeableByOthers(status))
        refuse(lockspace.path, lockspace.origin,
               "'" + name + "' in it is not a regular file of one name that only its owner may write; remove it");
    inscribe(fd.get(), about, path);
    return fd;
}

os::Fd openLeaseDirectory(const Lockspace& lockspace, const std::string& name) {
    os::Fd fd;
    int error = openInside(lockspace, [&] {
        if (mkdirat(lockspace.directory.get(), name.c_str(), 0700) < 0 && errno != EEXIST)
            return errno;
        return os::tryOpenAt(lockspace.directory.get(), name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, fd);
    });
    if (error == ELOOP || error == ENOTDIR)
        refuse(lockspace.path, lockspace.origin,
               "'" + name +
                   "' in it is a lease of another kind; give all hosts the same storage_locks, or remove it when "
                   "no guest uses it");
    if (error != 0)
        cannotMake(lockspace, error, name);
    if (changeableByOthers(statOf(fd.get(), lockspace.path + "/" + name)))
        refuse(lockspace.path, lockspace.origin, "others than its owner may write to '" + name + "' in it; remove it");
    return fd;
}

os::Fd openLeaseIfExists(const Lockspace& lockspace, const std::string& name) {
    os::Fd fd;
    int error = openInside(lockspace, [&] {
        return os::tryOpenAt(lockspace.directory.get(), name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0, fd);
    });
    if (error != 0 && error != ENOENT)
        throw SystemError(error, "open the lease", lockspace.path + "/" + name);
    return fd;
}

bool isTrusted(int fd, const std::string& path) {
    struct stat status = statOf(fd, path);
    char title[kTitle.size()];
    bool lease =
        S_ISDIR(status.st_mode) ||
        (S_ISREG(status.st_mode) && TEMP_FAILURE_RETRY(pread(fd, title, sizeof title, 0)) == ssize_t{sizeof title} &&
         std::string_view(title, sizeof title) == kTitle && status.st_nlink == 1);
    return lease && !changeableByOthers(status) && (ownedByUs(status) || belongsToSquashed(classify(fd, path)));
}

std::optional<os::FileId> findLease(const std::string& lockspace, const std::string& name) {
    struct stat status;
    std::string path = lockspace + "/" + name;
    if (lstat(path.c_str(), &status) == 0)
        return os::fileIdOf(status);
    if (errno == ENOENT || errno == ENOTDIR)
        return std::nullopt;
    throw SystemError(errno, "stat", path);
}

void inscribe(int fd, const std::string& about, const std::string& name) {
    std::string text(kTitle);
    text += os::printable(about).substr(0, 3000);
    text += '\n';
    std::string found(text.size(), '\0');
    ssize_t length = TEMP_FAILURE_RETRY(pread(fd, found.data(), found.size(), 0));
    if (length < 0)
        throw SystemError(errno, "read the lease file of", name);
    found.resize(static_cast<std::size_t>(length));
    // All NUL: the host lost its power before the text was on the disk.
    if (found.find_first_not_of('\0') == found.npos) {
        // Two who come at once write the same.
        ssize_t written = TEMP_FAILURE_RETRY(pwrite(fd, text.data(), text.size(), 0));
        if (written != static_cast<ssize_t>(text.size()))
            throw SystemError(written < 0 ? errno : ENOSPC, "write the lease file of", name);
        return;
    }
    if (found != text)
        throw Error(Fault::invalid, "lease file '" + name + "' belongs to something else (it says '" +
                                        os::printable(found.substr(0, found.find('\n'))) + "', not '" +
                                        text.substr(0, text.size() - 1) +
                                        "'): two resources would share one lease; see what has put it there, and "
                                        "remove it when no guest uses it");
}

std::string hashName(std::string_view text) {
    char name[17];
    std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(os::fnv1a(text)));
    return name;
}

} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/lockspace.hpp"

#include "core/os/error.hpp"
#include "core/os/hash.hpp"
#include "core/os/text.hpp"

#include <chrono>
#include <cstdio>
#include <ctime>
#include <random>
#include <thread>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::storage {

namespace {

constexpr std::string_view kTitle = "leasehold lease of ";
constexpr std::size_t kLongest = 3000; // of what stands behind it

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

std::string inscriptionOf(const std::string& about) {
    return std::string(kTitle) + os::printable(about).substr(0, kLongest) + '\n';
}

std::string readInscription(int fd, const std::string& name) {
    std::string text(static_cast<std::size_t>(kRecordOffset), '\0');
    ssize_t length = TEMP_FAILURE_RETRY(pread(fd, text.data(), text.size(), 0));
    if (length < 0)
        throw SystemError(errno, "read the lease file of", name);
    text.resize(static_cast<std::size_t>(length));
    return text;
}

// A new one, or all NUL: the host lost its power before the text was on the disk.
bool isBlank(const std::string& inscription) {
    return inscription.find_first_not_of('\0') == inscription.npos;
}

// Two who come at once write the same.
void writeInscription(int fd, const std::string& text, const std::string& name) {
    ssize_t written = TEMP_FAILURE_RETRY(pwrite(fd, text.data(), text.size(), 0));
    if (written != static_cast<ssize_t>(text.size()))
        throw SystemError(written < 0 ? errno : ENOSPC, "write the lease file of", name);
}

// False where it says something else; written where it says nothing.
bool says(int fd, const std::string& about, const std::string& name) {
    std::string found = readInscription(fd, name), text = inscriptionOf(about);
    if (isBlank(found))
        writeInscription(fd, text, name);
    return isBlank(found) || found.starts_with(text);
}

// So many that they do not pile up, and so few that nobody waits for it: each is some ten round trips on a server.
constexpr std::size_t kSwept = 4, kSweptRemote = 2;
// Whoever has just made one may not have locked it yet, and would have to begin anew.
constexpr time_t kFresh = 60; // seconds

std::vector<std::string> drawSome(const Lockspace& lockspace) {
    const std::size_t most = lockspace.storage.remote ? kSweptRemote : kSwept;
    std::vector<std::string> drawn;
    os::Listing list = os::listAt(lockspace.directory.get());
    if (!list)
        return drawn;
    std::minstd_rand random(static_cast<unsigned>(getpid()));
    std::size_t count = 0;
    while (dirent* entry = readdir(list.get())) {
        if (entry->d_type != DT_REG)
            continue;
        // Each with the same chance (reservoir sampling).
        std::size_t at = count < most ? count : random() % (count + 1);
        count++;
        if (at == drawn.size())
            drawn.emplace_back(entry->d_name);
        else if (at < most)
            drawn[at] = entry->d_name;
    }
    return drawn;
}

void sweepSome(const Lockspace& lockspace, const WhileUnused& whileUnused) {
    for (const std::string& name : drawSome(lockspace)) {
        os::Fd lease;
        constexpr int kFlags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
        if (os::tryOpenAt(lockspace.directory.get(), name, kFlags, 0, lease) != 0 ||
            statOf(lease.get(), name).st_mtime + kFresh > time(nullptr))
            continue;
        if (isTrusted(lease.get(), name))
            whileUnused(lease.get(), [&] {
                struct stat listed;
                if (fstatat(lockspace.directory.get(), name.c_str(), &listed, AT_SYMLINK_NOFOLLOW) == 0 &&
                    os::fileIdOf(listed) == os::identify(lease.get(), name))
                    (void)unlinkat(lockspace.directory.get(), name.c_str(), 0);
            });
    }
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

os::Fd openLeaseFile(const Lockspace& lockspace, const std::string& name, const std::string& about,
                     const WhileUnused& whileUnused) {
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
    if (whileUnused && status.st_size == 0)
        sweepSome(lockspace, whileUnused);
    // Somebody else may be writing it anew.
    constexpr int kTries = 50;
    for (int tries = 1; !says(fd.get(), about, path); tries++) {
        auto write = [&] {
            if (!says(fd.get(), about, path))
                writeInscription(fd.get(), inscriptionOf(about), path);
        };
        if (whileUnused && whileUnused(fd.get(), write))
            break;
        if (!whileUnused || tries == kTries)
            inscribe(fd.get(), about, path); // throws
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
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

namespace {

bool isTrusted(int fd, const std::string& path, bool mayBeBlank) {
    struct stat status = statOf(fd, path);
    if (changeableByOthers(status) || (!ownedByUs(status) && !belongsToSquashed(classify(fd, path))))
        return false;
    if (!S_ISREG(status.st_mode))
        return S_ISDIR(status.st_mode);
    std::string inscription = readInscription(fd, path);
    return status.st_nlink <= 1 && (inscription.starts_with(kTitle) || (mayBeBlank && isBlank(inscription)));
}

} // namespace

bool isTrusted(int fd, const std::string& path) {
    return isTrusted(fd, path, false);
}

bool mayCarryLease(int fd, const std::string& path) {
    try {
        return isTrusted(fd, path, true);
    } catch (const SystemError&) { // a lease that was lost, which whoever asks for that is told in its own words
        return true;
    }
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
    if (says(fd, about, name))
        return;
    std::string found = readInscription(fd, name), text = inscriptionOf(about);
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

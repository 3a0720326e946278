// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// File descriptors: who owns one, and which file it is. Knows nothing of locks. Every descriptor made here is
// O_CLOEXEC from the first instant; only the vessel (core/qemu) makes exceptions.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <dirent.h>
#include <sys/stat.h>
#include <sys/types.h>

namespace leasehold::os {

class Fd {
public:
    Fd() = default;
    explicit Fd(int number) : number_(number) {}
    Fd(Fd&& other) noexcept : number_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept {
        if (this != &other)
            reset(other.release());
        return *this;
    }
    ~Fd() { reset(); }

    int get() const { return number_; }
    bool open() const { return number_ >= 0; }
    int release() { return std::exchange(number_, -1); }
    void reset(int number = -1);

private:
    int number_ = -1;
};

// Closes what it is given when it goes; those with neighbouring numbers, as the kernel gives them out, with one call.
// Needs no memory: it is for destructors.
class ClosedTogether {
public:
    ClosedTogether() = default;
    ClosedTogether(const ClosedTogether&) = delete;
    ~ClosedTogether() { closeAll(); }

    void add(Fd fd);

private:
    void closeAll();

    std::array<int, 256> numbers_; // more are closed in several goes
    std::size_t count_ = 0;
};

// Which file: the same for every path, link and bind mount that leads to it (stat(2): st_dev, st_ino). Of a block
// device it is the device itself (st_rdev), whichever of its nodes was opened: libvirt gives QEMU a /dev with nodes of
// its own.
struct FileId {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;

    auto operator<=>(const FileId&) const = default;
};

// What of stat(2) is filled in by tryStatAt: type, device and inode, for which no server is asked that the path does
// not need; or owner, permissions and number of names as well. Nothing else is asked for. On CephFS whoever wants a
// size or a time waits for clients that do not answer and have had the file open, and the guest that writes to it waits
// too (tests/lab/test_ceph.py).
enum class Wanted { identity, owner };

// `flags` are those of statx(2). 0, or the error number.
[[nodiscard]] int tryStatAt(int directory, const char* path, int flags, Wanted wanted, struct stat& status);

// `type` is what stat(2) calls S_IFMT, if it is wanted.
FileId identify(int fd, const std::string& what, mode_t* type = nullptr);
FileId fileIdOf(const struct stat& status);
// What is already known of it: no server is asked. 0, or the error number.
[[nodiscard]] int tryIdentify(const std::string& path, FileId& file, mode_t* type = nullptr);
[[nodiscard]] int tryIdentifyAt(int directory, const std::string& path, FileId& file, mode_t* type = nullptr);

// Whether the file is what a mount leads to: a bind mount of this very file, or the root of a file system.
bool isMountRoot(int fd, const std::string& what);

// Where the open file is now, without symbolic links. Throws where /proc does not tell all of it: what a lease is known
// by must not be a guess.
std::string pathOf(int fd);
// The same for people, with `fallback` where /proc does not tell.
std::string pathOf(int fd, const std::string& fallback);

// What a link of /proc/PID/fd says, for people: the path where the file was opened, however it is called now.
std::string targetOf(const std::string& link);

// open(2) with O_CLOEXEC added; EINTR retried.
Fd openFile(const std::string& path, int flags);

// The same without throwing: 0, or the error number. A relative path starts at `directory`.
[[nodiscard]] int tryOpen(const std::string& path, int flags, Fd& fd);
[[nodiscard]] int tryOpenAt(int directory, const std::string& path, int flags, mode_t mode, Fd& fd);

// What an open directory has in it (readdir(3)), from the beginning, whoever else reads it: the place where one reads
// belongs to the open file description. Null with errno where that fails.
struct CloseListing {
    void operator()(DIR* list) const { closedir(list); }
};
using Listing = std::unique_ptr<DIR, CloseListing>;
Listing listAt(int directory);

// This thread accesses files as this user and group while the object lives (setfsuid(2)); other threads are not
// touched. Supplementary groups stay.
class FileSystemUser {
public:
    FileSystemUser(uid_t user, gid_t group);
    FileSystemUser(const FileSystemUser&) = delete;
    ~FileSystemUser();

private:
    uid_t user_;
    gid_t group_;
};

// The whole content of a small file, at most `limit` bytes. For /proc and the like.
std::string readFile(const std::string& path, std::size_t limit);

// The same for things that may vanish or be forbidden while we look: nothing when it cannot be read.
std::optional<std::string> readFileIfPossible(const std::string& path, std::size_t limit);

} // namespace leasehold::os

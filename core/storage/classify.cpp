// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/classify.hpp"

#include "core/os/error.hpp"
#include "core/os/fd.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <sstream>

#include <sys/statfs.h>

namespace leasehold::storage {

namespace {

struct FileSystem {
    std::uint32_t magic;
    const char* name;
    LockKind lock;
    const char* reason;
};

// Magic numbers: statfs(2), linux/magic.h and the file systems' own sources. Reasons: DESIGN.md, "Media".
// A file system that is not listed here promises nothing.
constexpr std::array kFileSystems{
    FileSystem{0x0000ef53, "ext4", LockKind::byteRange, ""}, // ext2 and ext3 share the number
    FileSystem{0x58465342, "xfs", LockKind::byteRange, ""},
    FileSystem{0x9123683e, "btrfs", LockKind::byteRange, ""},
    FileSystem{0x2fc12fc1, "zfs", LockKind::byteRange, ""},
    FileSystem{0x01021994, "tmpfs", LockKind::byteRange, ""},
    FileSystem{0x858458f6, "ramfs", LockKind::byteRange, ""},
    FileSystem{0x794c7630, "overlay", LockKind::byteRange, ""},
    FileSystem{0xf2f52010, "f2fs", LockKind::byteRange, ""},
    // Read-only media: images of CDs that are mounted, not used as a disk.
    FileSystem{0x00009660, "iso9660", LockKind::byteRange, ""},
    FileSystem{0x15013346, "udf", LockKind::byteRange, ""},
    FileSystem{0x73717368, "squashfs", LockKind::byteRange, ""},
    FileSystem{0x00006969, "NFS", LockKind::none, "its locks depend on the protocol version and the mount options"},
    FileSystem{0x7461636f, "OCFS2", LockKind::none,
               "byte-range locks stay on the local node there unless a userspace cluster stack is used"},
    FileSystem{0x01161970, "GFS2", LockKind::none, "its locks depend on dlm_controld of the whole cluster"},
    FileSystem{0x00c36400, "CephFS", LockKind::none, "a lost client session drops locks without a word"},
    FileSystem{0x65735546, "FUSE", LockKind::none, "what a lock means there is up to the file system's own process"},
    FileSystem{0xfe534d42, "SMB", LockKind::none, "its locks depend on the server and the mount options"},
    FileSystem{0xff534d42, "SMB", LockKind::none, "its locks depend on the server and the mount options"},
    FileSystem{0x0bd00bd0, "Lustre", LockKind::none, "its locks depend on the mount option flock"},
    FileSystem{0x01021997, "9p", LockKind::none, "its server may grant every lock to everybody"},
    FileSystem{0x19830326, "BeeGFS", LockKind::none, "its locks are local unless tuneUseGlobalFileLocks is set"},
    FileSystem{0x47504653, "GPFS", LockKind::none, "its locks have not been tried"},
};

} // namespace

Storage classifyByMagic(std::uint32_t magic, const std::string& mountType) {
    auto known = std::find_if(kFileSystems.begin(), kFileSystems.end(),
                              [&](const FileSystem& candidate) { return candidate.magic == magic; });
    if (known == kFileSystems.end()) {
        char number[16];
        std::snprintf(number, sizeof number, "0x%08x", magic);
        return {mountType.empty() ? "an unknown file system (" + std::string(number) + ")" : mountType, LockKind::none,
                "how locks behave there is not known"};
    }
    Storage storage{known->name, known->lock, known->reason};
    // All FUSE file systems share one number; the mount says which it is. virtiofs is FUSE without the word.
    if (storage.name == "FUSE" && !mountType.empty())
        storage.name = mountType;
    return storage;
}

std::string mountTypeOf(const std::string& mountinfo, int mountId) {
    // 36 35 98:0 /root /mountpoint rw,noatime shared:1 - ext4 /dev/sda1 rw
    std::istringstream lines(mountinfo);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        int id = 0;
        if (!(words >> id) || id != mountId)
            continue;
        for (std::string word; words >> word;)
            if (word == "-")
                return (words >> word) ? word : std::string();
    }
    return {};
}

namespace {

// Only for the name in a refusal: nothing is decided by it.
std::string mountTypeOfDescriptor(int fd) {
    std::istringstream words(os::readFileIfPossible("/proc/self/fdinfo/" + std::to_string(fd), 1 << 16).value_or(""));
    for (std::string word; words >> word;)
        if (int id = 0; word == "mnt_id:" && words >> id)
            return mountTypeOf(os::readFileIfPossible("/proc/self/mountinfo", 4 << 20).value_or(""), id);
    return {};
}

} // namespace

Storage classify(int fd, const std::string& path) {
    struct statfs status;
    while (fstatfs(fd, &status) < 0)
        if (errno != EINTR)
            throw SystemError(errno, "look at the file system of", path);
    Storage storage = classifyByMagic(static_cast<std::uint32_t>(status.f_type), "");
    if (storage.lock == LockKind::none)
        storage = classifyByMagic(static_cast<std::uint32_t>(status.f_type), mountTypeOfDescriptor(fd));
    return storage;
}

} // namespace leasehold::storage

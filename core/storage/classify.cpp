// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/classify.hpp"

#include "core/os/error.hpp"

#include <array>
#include <cstdio>

#include <sys/statfs.h>

namespace leasehold::storage {

namespace {

Storage local(std::string name) {
    return {.name = std::move(name), .lock = LockKind::byteRange, .reason = ""};
}

Storage everywhere(std::string name, std::string reason = "") {
    return {.name = std::move(name),
            .lock = LockKind::byteRange,
            .scope = Scope::allHosts,
            .remote = true,
            .reason = std::move(reason)};
}

Storage untrusted(std::string name, std::string reason) {
    return {.name = std::move(name), .remote = true, .reason = std::move(reason)};
}

// Its locks are said to cross hosts, but nothing here has shown that a lease on it is safe.
constexpr const char* kNotTried = "leases there have not been tried in this version";

// NFS. Options: nfs(5).
Storage classifyNfs(const std::optional<Mount>& mount) {
    std::string version = mount ? mount->value("vers").value_or("") : "";
    if (version.empty())
        return untrusted("NFS",
                         "its protocol version cannot be told, and locks depend on it: see that /proc/self/mountinfo "
                         "can be read");
    if (version.starts_with("4"))
        return everywhere("NFSv" + version);
    // Version 3 locks go through lockd, unless somebody switched it off: then they are granted without asking anybody.
    std::string locks = mount->value("local_lock").value_or("none");
    if (mount->has("nolock") || locks == "all" || locks == "posix")
        return untrusted("NFSv" + version, "it is mounted with " +
                                               (mount->has("nolock") ? std::string("nolock") : "local_lock=" + locks) +
                                               ", which keeps locks on this host: mount it without, or with vers=4.2");
    Storage storage =
        everywhere("NFSv" + version, "the locks of a host that died stay until its statd, or the server's "
                                     "administrator, clears them");
    storage.hidesReadLocks = true;
    return storage;
}

// OCFS2: Linux fs/ocfs2/super.c (ocfs2_show_options), fs/ocfs2/locks.c.
Storage classifyOcfs2(const std::optional<Mount>& mount) {
    if (!mount)
        return untrusted("OCFS2", "its cluster stack cannot be told: see that /proc/self/mountinfo can be read");
    if (mount->has("localflocks"))
        return untrusted("OCFS2", "it is mounted with localflocks, which keeps locks on this host: mount it without");
    if (mount->value("heartbeat") == "none" && !mount->value("cluster_stack"))
        return local("OCFS2 (local)"); // not a cluster mount
    if (mount->value("cluster_stack").value_or("o2cb") == "o2cb")
        return untrusted("OCFS2 (o2cb)",
                         "byte-range locks stay on the local node with the o2cb stack, and this version "
                         "does not use flock yet");
    return untrusted("OCFS2 (" + *mount->value("cluster_stack") + ")", kNotTried);
}

// GFS2: gfs2(5), Linux fs/gfs2/ops_fstype.c.
Storage classifyGfs2(const std::optional<Mount>& mount) {
    if (!mount)
        return untrusted("GFS2", "its lock protocol cannot be told: see that /proc/self/mountinfo can be read");
    if (mount->has("localflocks"))
        return untrusted("GFS2", "it is mounted with localflocks, which keeps locks on this host: mount it without");
    if (mount->value("lockproto") == "lock_nolock")
        return local("GFS2 (lock_nolock)");
    return everywhere("GFS2", "when dlm_controld dies, every lock call of this host hangs");
}

// Measured (tests/lab): F_OFD_GETLK of the SMB client repeats the range that was asked about instead of the lock that
// is in the way, and meets the locks of the asker itself. Marks cannot be read there, and QEMU's own check fails.
Storage classifySmb(const std::optional<Mount>&) {
    return untrusted("SMB", "its client does not tell which lock is in the way: use NFS to share images");
}

// Lustre's mount.lustre(8).
Storage classifyLustre(const std::optional<Mount>& mount) {
    if (mount && mount->has("flock"))
        return untrusted("Lustre", kNotTried);
    return untrusted("Lustre", "it is mounted without the option flock, so its locks do not reach other hosts");
}

// All FUSE file systems share one magic number; the mount says which one it is. virtiofs is FUSE without the word.
Storage classifyFuse(const std::optional<Mount>& mount) {
    std::string name = mount ? mount->type : "FUSE";
    if (name == "fuse.glusterfs")
        return untrusted("GlusterFS", "after an interruption longer than ping-timeout its bricks give a lock away "
                                      "without a word to the holder");
    if (name == "fuse.ceph" || name == "fuse.ceph-fuse")
        return untrusted("CephFS (FUSE)", kNotTried);
    if (name == "fuseblk")
        return untrusted(name, "what a lock means there is up to the file system's own process");
    if (name == "virtiofs")
        return untrusted(name, "its locks stay in this guest unless virtiofsd was told otherwise");
    if (name == "fuse.sshfs")
        return untrusted(name, "its locks stay on this host: use NFS to share images");
    return untrusted(name, "what a lock means there is up to the file system's own process");
}

using Rule = Storage (*)(const std::optional<Mount>&);

struct FileSystem {
    std::uint32_t magic;
    Rule classify;
};

// Numbers: statfs(2), linux/magic.h and the file systems' own sources. What is not listed here promises nothing.
constexpr std::array kFileSystems{
    FileSystem{0x0000ef53, [](const std::optional<Mount>& mount) { return local(mount ? mount->type : "ext4"); }},
    FileSystem{0x58465342, [](const std::optional<Mount>&) { return local("xfs"); }},
    FileSystem{0x9123683e, [](const std::optional<Mount>&) { return local("btrfs"); }},
    FileSystem{0x2fc12fc1, [](const std::optional<Mount>&) { return local("zfs"); }},
    FileSystem{0x01021994, [](const std::optional<Mount>&) { return local("tmpfs"); }},
    FileSystem{0x858458f6, [](const std::optional<Mount>&) { return local("ramfs"); }},
    FileSystem{0x794c7630, [](const std::optional<Mount>&) { return local("overlay"); }},
    FileSystem{0xf2f52010, [](const std::optional<Mount>&) { return local("f2fs"); }},
    // Read-only media: images of CDs that are mounted, not used as a disk.
    FileSystem{0x00009660, [](const std::optional<Mount>&) { return local("iso9660"); }},
    FileSystem{0x15013346, [](const std::optional<Mount>&) { return local("udf"); }},
    FileSystem{0x73717368, [](const std::optional<Mount>&) { return local("squashfs"); }},
    FileSystem{0x00006969, classifyNfs},
    FileSystem{0x7461636f, classifyOcfs2},
    FileSystem{0x01161970, classifyGfs2},
    FileSystem{0x00c36400, [](const std::optional<Mount>&) { return untrusted("CephFS", kNotTried); }},
    FileSystem{0x65735546, classifyFuse},
    FileSystem{0xfe534d42, classifySmb},
    FileSystem{0xff534d42, classifySmb},
    FileSystem{0x0bd00bd0, classifyLustre},
    FileSystem{
        0x01021997,
        [](const std::optional<Mount>&) { return untrusted("9p", "its server may grant every lock to everybody"); }},
    FileSystem{0x19830326,
               [](const std::optional<Mount>&) {
                   return untrusted("BeeGFS", "its locks stay on this host unless tuneUseGlobalFileLocks is set");
               }},
    FileSystem{0x47504653,
               [](const std::optional<Mount>&) { return untrusted("GPFS", "its locks have not been tried"); }},
};

} // namespace

Storage classifyMount(std::uint32_t magic, const std::optional<Mount>& mount) {
    for (const FileSystem& candidate : kFileSystems)
        if (candidate.magic == magic)
            return candidate.classify(mount);
    char number[16];
    std::snprintf(number, sizeof number, "0x%08x", magic);
    return untrusted(mount ? mount->type : "an unknown file system (" + std::string(number) + ")",
                     "how locks behave there is not known");
}

Storage classify(int fd, const std::string& path, std::span<const Override>) {
    struct statfs status;
    while (fstatfs(fd, &status) < 0)
        if (errno != EINTR)
            throw SystemError(errno, "look at the file system of", path);
    auto magic = static_cast<std::uint32_t>(status.f_type);
    // The options matter for everything but the plain local ones, and reading them costs more than all else.
    Storage storage = classifyMount(magic, std::nullopt);
    return storage.remote || storage.lock == LockKind::none ? classifyMount(magic, mountOf(fd)) : storage;
}

} // namespace leasehold::storage

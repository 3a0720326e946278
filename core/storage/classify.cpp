// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/classify.hpp"

#include "core/os/error.hpp"
#include "core/os/text.hpp"
#include "core/storage/gluster.hpp"

#include <array>
#include <cstdio>
#include <utility>

#include <fcntl.h>
#include <sys/statfs.h>
#include <unistd.h>

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

// No guest of any host gets it for writing, unless somebody vouches for it.
Storage untrusted(std::string name, std::string reason) {
    return {.name = std::move(name), .remote = true, .readersMayStay = true, .reason = std::move(reason)};
}

// The same files have a lock to trust where they are mounted or reached otherwise.
Storage misused(std::string name, std::string reason) {
    return {.name = std::move(name), .remote = true, .reason = std::move(reason)};
}

// Nothing here has shown that a lease on it is safe.
constexpr const char* kNotTried = "its locks are said to cross hosts, but leases there have not been tried";

// NFS. Options: nfs(5); Linux fs/nfs/super.c, nfs_show_mount_options. Version 4 ignores both that keep locks local.
Storage classifyNfs(const std::optional<Mount>& mount) {
    std::string version = mount ? mount->value("vers").value_or("") : "";
    if (version.empty())
        return misused("NFS",
                       "its protocol version cannot be told, and locks depend on it: see that /proc/self/mountinfo "
                       "can be read");
    if (version.starts_with("4"))
        return everywhere("NFSv" + version);
    // Version 3 locks go through lockd, unless somebody switched it off: then they are granted without asking anybody.
    std::string locks = mount->value("local_lock").value_or("none");
    if (mount->has("nolock") || locks == "all" || locks == "posix")
        return misused("NFSv" + version, "it is mounted with " +
                                             (mount->has("nolock") ? std::string("nolock") : "local_lock=" + locks) +
                                             ", which keeps locks on this host: mount it without, or with vers=4.2");
    Storage storage =
        everywhere("NFSv" + version, "the locks of a host that died stay until its statd, or the server's "
                                     "administrator, clears them");
    storage.hidesReadLocks = true;
    return storage;
}

constexpr const char* kDlm = "when dlm_controld dies, every lock call of this host hangs";

// OCFS2: Linux fs/ocfs2/super.c (ocfs2_show_options); which locks cross hosts: inode.c (ocfs2_populate_inode), locks.c.
// A mount of one host has no cluster stack and heartbeat=none; tools that know of no stack leave it out for o2cb.
Storage classifyOcfs2(const std::optional<Mount>& mount) {
    if (!mount)
        return misused("OCFS2", "its cluster stack cannot be told: see that /proc/self/mountinfo can be read");
    if (mount->has("localflocks"))
        return misused("OCFS2", "it is mounted with localflocks, which keeps locks on this host: mount it without");
    if (mount->value("heartbeat") == "none" && !mount->value("cluster_stack"))
        return local("OCFS2 (local)"); // not a cluster mount
    std::string stack = mount->value("cluster_stack").value_or("o2cb");
    if (stack != "o2cb") // a userspace stack: locks go through dlm_controld, as on GFS2 (measured)
        return everywhere("OCFS2 (" + stack + ")", kDlm);
    return {.name = "OCFS2 (o2cb)",
            .lock = LockKind::flock,
            .scope = Scope::allHosts,
            .remote = true,
            .qemuLocksStayLocal = true,
            .flockImage = true,
            .reason = "byte-range locks, QEMU's own among them, stay on this host"};
}

// GFS2: gfs2(5); Linux fs/gfs2/super.c, gfs2_show_options: `lockproto` is shown only when it was given to mount(8). The
// kernel itself sets localflocks for lock_nolock (fs/gfs2/ops_fstype.c, gfs2_lm_mount), also where only the superblock
// says lock_nolock: that looks like localflocks on a cluster.
Storage classifyGfs2(const std::optional<Mount>& mount) {
    if (!mount)
        return misused("GFS2", "its lock protocol cannot be told: see that /proc/self/mountinfo can be read");
    if (mount->value("lockproto") == "lock_nolock")
        return local("GFS2 (lock_nolock)");
    if (mount->has("localflocks"))
        return misused("GFS2", "it is mounted with localflocks, which keeps locks on this host: mount it without, or "
                               "with lockproto=lock_nolock if only one host mounts it");
    return everywhere("GFS2", kDlm);
}

// Measured (tests/lab): F_OFD_GETLK of the SMB client repeats the range that was asked about instead of the lock that
// is in the way, and meets the locks of the asker itself. Marks cannot be read there, and QEMU's own check fails.
Storage classifySmb(const std::optional<Mount>& mount) {
    if (mount && mount->has("nobrl")) // mount.cifs(8)
        return untrusted("SMB", "it is mounted with nobrl, which keeps locks on this host: use NFS to share images");
    return untrusted("SMB", "its client does not tell which lock is in the way: use NFS to share images");
}

// mount.lustre(8); llite shows `flock` and `localflock` when they are set.
Storage classifyLustre(const std::optional<Mount>& mount) {
    if (mount && mount->has("flock"))
        return untrusted("Lustre", kNotTried);
    if (mount && mount->has("localflock"))
        return untrusted("Lustre", "it is mounted with localflock, which keeps locks on this host");
    return untrusted("Lustre", "it is mounted without the option flock, so it has no locks at all");
}

// Locks are kept by the metadata servers, the same for both kinds of client, and a client that is silent for too long
// loses them only when the OSDs take no more of its writes (measured, tests/lab).
constexpr const char* kCephFs = "the locks of a host that died stay until its client is evicted: by itself when "
                                "somebody asks after session_timeout (60 s), at once by leasehold fenced";

constexpr const char* kGluster = "fuse.glusterfs";

// All FUSE file systems share one magic number; the mount says which one it is. virtiofs is FUSE without the word.
Storage classifyFuse(const std::optional<Mount>& mount) {
    std::string name = mount ? mount->type : "FUSE";
    if (name == kGluster) // what it tells about itself decides (gluster.hpp)
        return misused("GlusterFS", "whether its volume option client.strict-locks is on cannot be told");
    if (name == "fuse.ceph" || name == "fuse.ceph-fuse") // Ceph src/client/fuse_ll.cc: "subtype=ceph-fuse"
        return everywhere("CephFS (ceph-fuse)", kCephFs);
    if (name == "virtiofs")
        return untrusted(name, "its locks stay in this guest unless virtiofsd was told otherwise");
    if (name == "fuse.sshfs")
        return untrusted(name, "its locks stay on this host: use NFS to share images");
    return untrusted(name, "what a lock means there is up to the file system's own process");
}

constexpr std::uint32_t kOverlay = 0x794c7630, kFuse = 0x65735546;

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
    FileSystem{kOverlay, [](const std::optional<Mount>&) { return local("overlay"); }},
    FileSystem{0xf2f52010, [](const std::optional<Mount>&) { return local("f2fs"); }},
    // Read-only media: images of CDs that are mounted, not used as a disk.
    FileSystem{0x00009660, [](const std::optional<Mount>&) { return local("iso9660"); }},
    FileSystem{0x15013346, [](const std::optional<Mount>&) { return local("udf"); }},
    FileSystem{0x73717368, [](const std::optional<Mount>&) { return local("squashfs"); }},
    FileSystem{0xe0f5e1e2, [](const std::optional<Mount>&) { return local("erofs"); }},
    FileSystem{0x00006969, classifyNfs},
    FileSystem{0x7461636f, classifyOcfs2},
    FileSystem{0x01161970, classifyGfs2},
    FileSystem{0x00c36400, [](const std::optional<Mount>&) { return everywhere("CephFS", kCephFs); }},
    FileSystem{kFuse, classifyFuse},
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
    FileSystem{0x47504653, [](const std::optional<Mount>&) { return untrusted("GPFS", kNotTried); }},
};

} // namespace

bool waitsForTheDead(const Storage& storage) {
    return storage.hidesReadLocks || storage.name.starts_with("CephFS");
}

Storage classifyMount(std::uint32_t magic, const std::optional<Mount>& mount) {
    for (const FileSystem& candidate : kFileSystems)
        if (candidate.magic == magic)
            return candidate.classify(mount);
    char number[16];
    std::snprintf(number, sizeof number, "0x%08x", magic);
    return untrusted(mount ? mount->type : "an unknown file system (" + std::string(number) + ")",
                     "how locks behave there is not known");
}

namespace {

// As whoever mounts an overlay writes a name: a backslash takes the meaning from what follows it.
std::string withoutBackslashes(std::string_view name) {
    std::string plain;
    for (std::size_t i = 0; i < name.size(); i++) {
        if (name[i] == '\\' && i + 1 < name.size())
            i++;
        plain += name[i];
    }
    return plain;
}

bool endsInBackslash(std::string_view name) {
    std::size_t last = name.find_last_not_of('\\'); // npos + 1 is 0
    return (name.size() - (last + 1)) % 2 == 1;
}

} // namespace

// Linux fs/overlayfs/params.c, ovl_show_options (before 6.5 in super.c). `upperdir` and `lowerdir` are shown as they
// were given, with backslashes; in `lowerdir` layers stand behind colons (two before data-only ones). 6.6 puts that
// list together from its layers and writes a colon that belongs to a name as \072. Since 6.8 each layer may have an
// option of its own, `lowerdir+` or `datadir+`, in which a backslash is a backslash. 6.5 as it was released escapes
// nothing: there a name with a colon or comma falls into parts that cannot be seen.
std::vector<std::string> overlayLayers(const Mount& mount) {
    std::vector<std::string> layers;
    for (const std::string& upper : mount.values("upperdir"))
        layers.push_back(withoutBackslashes(unescape(upper)));
    for (const std::string& list : mount.values("lowerdir")) {
        std::string layer;
        for (std::size_t start = 0, colon = 0; colon != std::string::npos; start = colon + 1) {
            colon = list.find(':', start);
            layer += unescape(std::string_view(list).substr(start, colon - start));
            if (colon != std::string::npos && endsInBackslash(layer))
                layer += ':'; // it belongs to the name
            else if (!layer.empty())
                layers.push_back(withoutBackslashes(std::exchange(layer, "")));
        }
    }
    for (const char* key : {"lowerdir+", "datadir+"})
        for (const std::string& layer : mount.values(key))
            layers.push_back(unescape(layer));
    return layers;
}

namespace {

Storage look(int fd, const std::string& path, int depth);

// Locks on an overlay are those of its own inodes and stay on this host, whatever its layers are on. That is good
// enough only where nobody but this host can reach the layers.
Storage classifyOverlay(int fd, int depth) {
    // Overlays nest twice at most (Linux FILESYSTEM_MAX_STACK_DEPTH); more is a path that leads somewhere else.
    constexpr int kDeepest = 2;
    const std::string kHidden = "cannot be seen from here: if it is on storage that other hosts share, a lease "
                                "does not reach them";
    auto mount = mountOf(fd);
    std::vector<std::string> layers = mount ? overlayLayers(*mount) : std::vector<std::string>();
    Storage overlay = local("overlay");
    if (layers.empty())
        overlay.reason = "what it lies on " + kHidden;
    for (const std::string& layer : layers) {
        os::Fd directory;
        // A relative path means another directory than it did when the overlay was mounted, a container's layers are
        // in its own mount namespace, and an overlay may have been mounted on one of its layers.
        if (!layer.starts_with('/') || depth == kDeepest || os::tryOpen(layer, O_PATH, directory) != 0) {
            overlay.reason = "its layer '" + os::printable(layer) + "' " + kHidden;
            continue;
        }
        Storage below = look(directory.get(), layer, depth + 1);
        if (below.lock != LockKind::byteRange || below.scope != Scope::thisHost)
            return misused("overlay", "its layer '" + os::printable(layer) + "' is on " + below.name +
                                          ", while locks on an overlay stay on this host: give the guest the image "
                                          "by its path there");
        if (!below.reason.empty())
            overlay.reason = below.reason;
    }
    return overlay;
}

Storage look(int fd, const std::string& path, int depth) {
    struct statfs status;
    while (fstatfs(fd, &status) < 0)
        if (errno != EINTR)
            throw SystemError(errno, "look at the file system of", path);
    auto magic = static_cast<std::uint32_t>(status.f_type);
    if (magic == kOverlay)
        return classifyOverlay(fd, depth);
    // The options matter for everything but the plain local ones, and reading them costs more than all else.
    Storage storage = classifyMount(magic, std::nullopt);
    if (!storage.remote && storage.lock != LockKind::none)
        return storage;
    std::optional<Mount> mount = mountOf(fd);
    return magic == kFuse && mount && mount->type == kGluster ? classifyGluster(*mount, fd)
                                                              : classifyMount(magic, mount);
}

} // namespace

Storage classify(int fd, const std::string& path, std::span<const Override> overrides) {
    Storage storage = look(fd, path, 0);
    const Override* told = overrides.empty() ? nullptr : findOverride(overrides, os::pathOf(fd));
    if (!told)
        return storage;
    storage.lock = told->lock;
    storage.scope = told->scope;
    // Where flock is called for, byte-range locks are not to be trusted. In doubt QEMU's are guarded.
    storage.qemuLocksStayLocal |= told->lock == LockKind::flock;
    storage.flockImage = storage.readersMayStay = false;
    storage.reason = told->lock == LockKind::none ? "the administrator refuses leases there (storage_locks)"
                                                  : "the administrator says so (storage_locks)";
    return storage;
}

} // namespace leasehold::storage

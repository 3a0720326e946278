// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/storage/classify.hpp"
#include "tests/support/unit_support.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/statfs.h>

namespace leasehold::storage {
namespace {

Mount mounted(const char* type, std::vector<std::string> options = {}) {
    return {.id = 1, .point = "/mnt", .type = type, .source = "there", .options = std::move(options)};
}

struct Row {
    std::uint32_t magic;
    Mount mount;
    const char* name;
};

// Numbers from linux/magic.h, or from the file systems' own sources where it has none.
constexpr std::uint32_t kZfs = 0x2fc12fc1, kGfs2 = 0x01161970, kLustre = 0x0bd00bd0, kCifs = 0xff534d42,
                        kBeegfs = 0x19830326, kGpfs = 0x47504653;

TEST(Classify, LocalFileSystemsCarryByteRangeLeasesOfThisHost) {
    const Row rows[] = {{EXT4_SUPER_MAGIC, mounted("ext4"), "ext4"},
                        {EXT4_SUPER_MAGIC, mounted("ext2"), "ext2"},
                        {XFS_SUPER_MAGIC, mounted("xfs"), "xfs"},
                        {BTRFS_SUPER_MAGIC, mounted("btrfs"), "btrfs"},
                        {kZfs, mounted("zfs"), "zfs"},
                        {TMPFS_MAGIC, mounted("tmpfs"), "tmpfs"},
                        {OVERLAYFS_SUPER_MAGIC, mounted("overlay"), "overlay"},
                        {F2FS_SUPER_MAGIC, mounted("f2fs"), "f2fs"},
                        {ISOFS_SUPER_MAGIC, mounted("iso9660"), "iso9660"},
                        {UDF_SUPER_MAGIC, mounted("udf"), "udf"},
                        {SQUASHFS_MAGIC, mounted("squashfs"), "squashfs"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"rw", "heartbeat=none"}), "OCFS2 (local)"},
                        {kGfs2, mounted("gfs2", {"rw", "lockproto=lock_nolock"}), "GFS2 (lock_nolock)"}};
    for (const Row& row : rows) {
        Storage storage = classifyMount(row.magic, row.mount);
        EXPECT_EQ(storage.name, row.name);
        EXPECT_EQ(storage.lock, LockKind::byteRange) << row.name;
        EXPECT_EQ(storage.scope, Scope::thisHost) << row.name;
        EXPECT_FALSE(storage.remote) << row.name;
        EXPECT_EQ(storage.reason, "") << row.name;
    }
}

TEST(Classify, SharedFileSystemsWhoseByteRangeLocksCrossHostsCarryLeasesOfAllHosts) {
    const Row rows[] = {
        {NFS_SUPER_MAGIC, mounted("nfs4", {"rw", "vers=4.2", "local_lock=none"}), "NFSv4.2"},
        {NFS_SUPER_MAGIC, mounted("nfs4", {"vers=4.0", "local_lock=all"}), "NFSv4.0"},
        {NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=none"}), "NFSv3"},
        {NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=flock"}), "NFSv3"},
        {kGfs2, mounted("gfs2", {"rw"}), "GFS2"},
    };
    for (const Row& row : rows) {
        Storage storage = classifyMount(row.magic, row.mount);
        EXPECT_EQ(storage.name, row.name);
        EXPECT_EQ(storage.lock, LockKind::byteRange) << row.name;
        EXPECT_EQ(storage.scope, Scope::allHosts) << row.name;
        EXPECT_TRUE(storage.remote) << row.name;
        EXPECT_EQ(storage.hidesReadLocks, std::string(row.name) == "NFSv3");
    }
}

TEST(Classify, StorageWithoutALockToTrustIsRefusedByNameWithAReason) {
    const Row rows[] = {{NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "nolock"}), "NFSv3"},
                        {NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=all"}), "NFSv3"},
                        {NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=posix"}), "NFSv3"},
                        {NFS_SUPER_MAGIC, mounted("nfs", {"rw"}), "NFS"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"cluster_stack=o2cb"}), "OCFS2 (o2cb)"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"_netdev", "heartbeat=local"}), "OCFS2 (o2cb)"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"cluster_stack=pcmk"}), "OCFS2 (pcmk)"},
                        {CEPH_SUPER_MAGIC, mounted("ceph"), "CephFS"},
                        {FUSE_SUPER_MAGIC, mounted("fuse.glusterfs"), "GlusterFS"},
                        {kLustre, mounted("lustre", {"rw", "flock"}), "Lustre"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"cluster_stack=pcmk", "localflocks"}), "OCFS2"},
                        {kGfs2, mounted("gfs2", {"localflocks"}), "GFS2"},
                        {FUSE_SUPER_MAGIC, mounted("fuse.sshfs"), "fuse.sshfs"},
                        {FUSE_SUPER_MAGIC, mounted("fuse.unheard-of"), "fuse.unheard-of"},
                        {FUSE_SUPER_MAGIC, mounted("fuseblk"), "fuseblk"},
                        {FUSE_SUPER_MAGIC, mounted("virtiofs"), "virtiofs"},
                        {SMB2_SUPER_MAGIC, mounted("cifs", {"vers=3.1.1"}), "SMB"},
                        {kCifs, mounted("cifs"), "SMB"},
                        {kLustre, mounted("lustre", {"rw"}), "Lustre"},
                        {kLustre, mounted("lustre", {"localflock"}), "Lustre"},
                        {V9FS_MAGIC, mounted("9p"), "9p"},
                        {kBeegfs, mounted("beegfs"), "BeeGFS"},
                        {kGpfs, mounted("gpfs"), "GPFS"},
                        {0x12345678, mounted("newfs"), "newfs"}};
    for (const Row& row : rows) {
        Storage storage = classifyMount(row.magic, row.mount);
        EXPECT_EQ(storage.name, row.name);
        EXPECT_EQ(storage.lock, LockKind::none) << row.name;
        EXPECT_NE(storage.reason, "") << row.name;
    }
}

TEST(Classify, WithoutMountinfoNothingThatDependsOnItIsTrusted) {
    for (std::uint32_t magic : {std::uint32_t{NFS_SUPER_MAGIC}, std::uint32_t{OCFS2_SUPER_MAGIC}, kGfs2,
                                std::uint32_t{FUSE_SUPER_MAGIC}, std::uint32_t{SMB2_SUPER_MAGIC}, kLustre})
        EXPECT_EQ(classifyMount(magic, std::nullopt).lock, LockKind::none) << std::hex << magic;
    EXPECT_EQ(classifyMount(XFS_SUPER_MAGIC, std::nullopt).lock, LockKind::byteRange);
    EXPECT_EQ(classifyMount(0x12345678, std::nullopt).name, "an unknown file system (0x12345678)");
}

TEST(Classify, AMountCannotCallItselfLocal) {
    EXPECT_EQ(classifyMount(FUSE_SUPER_MAGIC, mounted("ext4")).lock, LockKind::none);
    EXPECT_EQ(classifyMount(0x12345678, mounted("ext4")).lock, LockKind::none);
}

class ClassifyFile : public unit::LeavesNoDescriptor {
protected:
    static Storage look(const std::string& path) { return classify(os::openFile(path, O_RDONLY).get(), path); }
};

TEST_F(ClassifyFile, TmpfsIsFoundOut) {
    struct statfs status;
    if (statfs("/dev/shm", &status) < 0 || status.f_type != TMPFS_MAGIC)
        GTEST_SKIP() << "/dev/shm is no tmpfs here";
    unit::TempDir dir("/dev/shm");
    Storage storage = look(dir.file("disk.img"));
    EXPECT_EQ(storage.name, "tmpfs");
    EXPECT_EQ(storage.lock, LockKind::byteRange);
}

TEST_F(ClassifyFile, TheFileSystemOfTmpIsTheOneThatTheKernelNames) {
    unit::TempDir dir;
    struct statfs status;
    ASSERT_EQ(statfs(dir.path().c_str(), &status), 0);
    Storage storage = look(dir.file("disk.img"));
    EXPECT_EQ(storage.name, classifyMount(static_cast<std::uint32_t>(status.f_type), std::nullopt).name);
    EXPECT_EQ(look(dir.path()).name, storage.name) << "a directory is on the same";
}

TEST_F(ClassifyFile, ProcIsRefusedByItsMountsName) {
    Storage storage = look("/proc/self/status");
    EXPECT_EQ(storage.name, "proc");
    EXPECT_EQ(storage.lock, LockKind::none);
    EXPECT_NE(storage.reason, "");
}

TEST_F(ClassifyFile, SysfsIsRefusedByItsMountsName) {
    EXPECT_EQ(look("/sys/kernel").name, "sysfs");
    EXPECT_EQ(look("/sys/kernel").lock, LockKind::none);
}

TEST_F(ClassifyFile, ThatCannotBeLookedAtIsAnError) {
    EXPECT_THROW(classify(-1, "disk.img"), SystemError);
}

constexpr const char* kMountinfo =
    "25 1 254:0 / / rw,relatime - ext4 /dev/root rw\n"
    "36 25 98:0 /root /mnt\\040- rw,noatime shared:1 master:2 unbindable - xfs /dev/sda1 rw\n"
    "361 25 0:50 / /srv rw shared:7 - fuse.sshfs host:/x rw,user_id=0\n"
    "39 25 0:53 / /nfs ro - nfs4 server:/a\\040b rw,vers=4.2,local_lock=none\n"
    "40 25 0:54 / /nameless rw - tmpfs  rw,size=4k\n"
    "37 25 0:51 / /broken rw shared:7 -\n"
    "38 25 0:52 / /cut rw";

TEST(Mountinfo, MountIsFoundBehindAnyNumberOfOptionalFields) {
    EXPECT_EQ(findMount(kMountinfo, 25)->type, "ext4");
    EXPECT_EQ(findMount(kMountinfo, 36)->type, "xfs");
    EXPECT_EQ(findMount(kMountinfo, 36)->point, "/mnt -");
    EXPECT_EQ(findMount(kMountinfo, 361)->type, "fuse.sshfs");
    EXPECT_FALSE(findMount(kMountinfo, 37));
    EXPECT_FALSE(findMount(kMountinfo, 38));
    EXPECT_FALSE(findMount(kMountinfo, 3)) << "an id is not a prefix";
    EXPECT_FALSE(findMount("", 25));
    EXPECT_FALSE(findMount("garbage\n\n - \n", 25));
}

TEST(Mountinfo, OptionsOfTheMountAndOfTheFileSystemAreKnown) {
    auto mount = findMount(kMountinfo, 39);
    ASSERT_TRUE(mount);
    EXPECT_EQ(mount->source, "server:/a b");
    EXPECT_TRUE(mount->has("ro"));
    EXPECT_FALSE(mount->has("vers"));
    EXPECT_EQ(mount->value("vers"), "4.2");
    EXPECT_EQ(mount->value("ver"), std::nullopt);
    auto nameless = findMount(kMountinfo, 40);
    ASSERT_TRUE(nameless);
    EXPECT_EQ(nameless->source, "");
    EXPECT_EQ(nameless->value("size"), "4k");
}

TEST(Mountinfo, TellsWhetherAnyMountMayHang) {
    EXPECT_TRUE(anyRemote(kMountinfo));
    EXPECT_FALSE(anyRemote("25 1 254:0 / / rw - ext4 /dev/root rw\n26 1 0:1 / /p rw - proc proc rw\n"));
    EXPECT_FALSE(anyRemote("26 1 0:1 / /sys/fs/fuse rw - fusectl fusectl rw\n"));
    for (const char* type : {"nfs", "nfs4", "cifs", "ceph", "ocfs2", "gfs2", "fuse.glusterfs", "fuse", "9p", "lustre"})
        EXPECT_TRUE(anyRemote("1 1 0:1 / /a rw shared:3 - " + std::string(type) + " x rw\n")) << type;
}

} // namespace
} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/storage/classify.hpp"
#include "tests/support/unit_support.hpp"

#include <cstring>

#include <fcntl.h>
#include <linux/magic.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

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

// Numbers from linux/magic.h, or from the file systems' own sources where it has none, or not in Linux 5.10.
constexpr std::uint32_t kZfs = 0x2fc12fc1, kGfs2 = 0x01161970, kLustre = 0x0bd00bd0, kCifs = 0xff534d42,
                        kBeegfs = 0x19830326, kGpfs = 0x47504653, kErofs = 0xe0f5e1e2, kCeph = 0x00c36400,
                        kFuse = 0x65735546, kSmb2 = 0xfe534d42;

TEST(Classify, LocalFileSystemsCarryByteRangeLeasesOfThisHost) {
    const Row rows[] = {{EXT4_SUPER_MAGIC, mounted("ext4"), "ext4"},
                        {EXT4_SUPER_MAGIC, mounted("ext2"), "ext2"},
                        {XFS_SUPER_MAGIC, mounted("xfs"), "xfs"},
                        {BTRFS_SUPER_MAGIC, mounted("btrfs"), "btrfs"},
                        {kZfs, mounted("zfs"), "zfs"},
                        {TMPFS_MAGIC, mounted("tmpfs"), "tmpfs"},
                        {OVERLAYFS_SUPER_MAGIC, mounted("overlay"), "overlay"},
                        {kErofs, mounted("erofs"), "erofs"},
                        {F2FS_SUPER_MAGIC, mounted("f2fs"), "f2fs"},
                        {ISOFS_SUPER_MAGIC, mounted("iso9660"), "iso9660"},
                        {UDF_SUPER_MAGIC, mounted("udf"), "udf"},
                        {SQUASHFS_MAGIC, mounted("squashfs"), "squashfs"},
                        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"rw", "heartbeat=none"}), "OCFS2 (local)"},
                        {kGfs2, mounted("gfs2", {"rw", "lockproto=lock_nolock", "localflocks"}), "GFS2 (lock_nolock)"}};
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
        {OCFS2_SUPER_MAGIC, mounted("ocfs2", {"rw", "cluster_stack=pcmk"}), "OCFS2 (pcmk)"},
        {kCeph, mounted("ceph", {"rw", "name=admin", "acl"}), "CephFS"},
        {kFuse, mounted("fuse.ceph-fuse"), "CephFS (ceph-fuse)"},
    };
    for (const Row& row : rows) {
        Storage storage = classifyMount(row.magic, row.mount);
        EXPECT_EQ(storage.name, row.name);
        EXPECT_EQ(storage.lock, LockKind::byteRange) << row.name;
        EXPECT_EQ(storage.scope, Scope::allHosts) << row.name;
        EXPECT_TRUE(storage.remote) << row.name;
        EXPECT_EQ(storage.hidesReadLocks, std::string(row.name) == "NFSv3");
        EXPECT_EQ(waitsForTheDead(storage), storage.hidesReadLocks || std::string(row.name).starts_with("CephFS"));
        EXPECT_FALSE(storage.qemuLocksStayLocal) << row.name;
        EXPECT_FALSE(storage.flockImage) << row.name;
    }
}

TEST(Classify, ClusterStacksOfTheKernelAreServedByFlockAndTheirQemuLocksStayLocal) {
    for (const Mount& mount :
         {mounted("ocfs2", {"rw", "cluster_stack=o2cb"}), mounted("ocfs2", {"rw", "_netdev", "heartbeat=local"})}) {
        Storage storage = classifyMount(OCFS2_SUPER_MAGIC, mount);
        EXPECT_EQ(storage.name, "OCFS2 (o2cb)");
        EXPECT_EQ(storage.lock, LockKind::flock);
        EXPECT_EQ(storage.scope, Scope::allHosts);
        EXPECT_TRUE(storage.remote);
        EXPECT_TRUE(storage.qemuLocksStayLocal);
        EXPECT_TRUE(storage.flockImage);
    }
}

TEST(Classify, ALockThatCanHangSaysSo) {
    for (const char* stack : {"cluster_stack=pcmk", "cluster_stack=cman"})
        EXPECT_NE(classifyMount(OCFS2_SUPER_MAGIC, mounted("ocfs2", {stack})).reason.find("dlm_controld"),
                  std::string::npos);
    EXPECT_NE(classifyMount(kGfs2, mounted("gfs2")).reason.find("dlm_controld"), std::string::npos);
}

TEST(Classify, StorageWithoutALockToTrustIsRefusedByNameWithAReason) {
    struct Refusal {
        Row row;
        const char* reason; // a word of it
    };
    const Refusal rows[] = {
        {{NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "nolock"}), "NFSv3"}, "nolock"},
        {{NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=all"}), "NFSv3"}, "local_lock=all"},
        {{NFS_SUPER_MAGIC, mounted("nfs", {"vers=3", "local_lock=posix"}), "NFSv3"}, "local_lock=posix"},
        {{NFS_SUPER_MAGIC, mounted("nfs", {"rw"}), "NFS"}, "version"},
        {{OCFS2_SUPER_MAGIC, mounted("ocfs2", {"cluster_stack=o2cb", "localflocks"}), "OCFS2"}, "localflocks"},
        {{OCFS2_SUPER_MAGIC, mounted("ocfs2", {"cluster_stack=pcmk", "localflocks"}), "OCFS2"}, "localflocks"},
        {{kGfs2, mounted("gfs2", {"localflocks"}), "GFS2"}, "lock_nolock if only one host"},
        {{kFuse, mounted("fuse.glusterfs"), "GlusterFS"}, "client.strict-locks"},
        {{kFuse, mounted("fuse.sshfs"), "fuse.sshfs"}, "stay on this host"},
        {{kFuse, mounted("fuse.unheard-of"), "fuse.unheard-of"}, "own process"},
        {{kFuse, mounted("fuseblk"), "fuseblk"}, "own process"},
        {{kFuse, mounted("virtiofs"), "virtiofs"}, "virtiofsd"},
        {{kSmb2, mounted("cifs", {"vers=3.1.1"}), "SMB"}, "in the way"},
        {{kCifs, mounted("cifs"), "SMB"}, "in the way"},
        {{kSmb2, mounted("cifs", {"nobrl"}), "SMB"}, "nobrl"},
        {{kLustre, mounted("lustre", {"rw", "flock"}), "Lustre"}, "not been tried"},
        {{kLustre, mounted("lustre", {"rw", "localflock"}), "Lustre"}, "localflock"},
        {{kLustre, mounted("lustre", {"rw"}), "Lustre"}, "without the option flock"},
        {{V9FS_MAGIC, mounted("9p"), "9p"}, "every lock to everybody"},
        {{kBeegfs, mounted("beegfs"), "BeeGFS"}, "tuneUseGlobalFileLocks"},
        {{kGpfs, mounted("gpfs"), "GPFS"}, "not been tried"},
        {{0x12345678, mounted("newfs"), "newfs"}, "not known"},
    };
    for (const auto& [row, reason] : rows) {
        Storage storage = classifyMount(row.magic, row.mount);
        EXPECT_EQ(storage.name, row.name);
        EXPECT_EQ(storage.lock, LockKind::none) << row.name;
        EXPECT_TRUE(storage.remote) << row.name;
        // Where others may write under a lease a reader is not safe with one of this host.
        std::string_view name = row.name;
        bool good = name.starts_with("NFS") || name == "OCFS2" || name == "GFS2" || name == "GlusterFS";
        EXPECT_EQ(storage.readersMayStay, !good) << row.name;
        EXPECT_NE(storage.reason.find(reason), std::string::npos) << row.name << ": " << storage.reason;
    }
}

TEST(Classify, WithoutMountinfoNothingThatDependsOnItIsTrusted) {
    for (std::uint32_t magic :
         {std::uint32_t{NFS_SUPER_MAGIC}, std::uint32_t{OCFS2_SUPER_MAGIC}, kGfs2, kFuse, kSmb2, kLustre})
        EXPECT_EQ(classifyMount(magic, std::nullopt).lock, LockKind::none) << std::hex << magic;
    EXPECT_EQ(classifyMount(XFS_SUPER_MAGIC, std::nullopt).lock, LockKind::byteRange);
    EXPECT_EQ(classifyMount(0x12345678, std::nullopt).name, "an unknown file system (0x12345678)");
}

TEST(Classify, AMountCannotCallItselfLocal) {
    EXPECT_EQ(classifyMount(kFuse, mounted("ext4")).lock, LockKind::none);
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

using Layers = std::vector<std::string>;

TEST(Classify, LayersOfAnOverlayAreReadInEveryFormThatTheKernelWrites) {
    EXPECT_EQ(overlayLayers(mounted("overlay", {"rw", "lowerdir=/a:/b", "upperdir=/u", "workdir=/w"})),
              (Layers{"/u", "/a", "/b"}));
    // As they were given, with the backslashes of whoever mounted it.
    EXPECT_EQ(overlayLayers(mounted("overlay", {R"(lowerdir=/a\134:b:/c\134\134d:/e\134\134:/f\134\0542::/data)"})),
              (Layers{"/a:b", "/c\\d", "/e\\", "/f,2", "/data"}));
    EXPECT_EQ(overlayLayers(mounted("overlay", {"lowerdir=/a", R"(upperdir=/u\134:v\040w)"})),
              (Layers{"/u:v w", "/a"}));
    EXPECT_EQ(overlayLayers(mounted("overlay", {"lowerdir=/a", "upperdir=/u:v"})), (Layers{"/u:v", "/a"}));
    EXPECT_EQ(overlayLayers(mounted("overlay", {R"(lowerdir=/a\134)"})), (Layers{"/a\\"}));
    // Put together by the kernel.
    EXPECT_EQ(overlayLayers(mounted("overlay", {R"(lowerdir=/a\072b:/c\134\072d::/data)"})),
              (Layers{"/a:b", "/c:d", "/data"}));
    // An option for each.
    EXPECT_EQ(overlayLayers(mounted("overlay", {"lowerdir+=/a:b", R"(lowerdir+=/c\134d\072e)", "datadir+=/data"})),
              (Layers{"/a:b", "/c\\d:e", "/data"}));
    EXPECT_EQ(overlayLayers(mounted("overlay", {"rw", "lowerdir=", "lowerdir", "lowerdir=:"})), Layers{});
}

// Mounts of its own, which go with it. What `body` says in the other namespace is what it demands.
void inOwnMounts(const std::function<void()>& body) {
    unit::Child child([&](unit::Line& line) {
        if (unshare(CLONE_NEWNS) < 0 || mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0) {
            line.say('-');
            return;
        }
        line.say('+');
        body();
    });
    bool may = child.line().hear() == '+';
    EXPECT_EQ(child.join(), "");
    if (!may)
        GTEST_SKIP() << "no mount namespace may be made here";
}

void mountOverlay(const std::string& options, const std::string& point) {
    unit::demand(::mount("overlay", point.c_str(), "overlay", 0, options.c_str()) == 0,
                 "mount an overlay with " + options + ": " + std::strerror(errno));
}

void mountTmpfs(const std::string& point) {
    unit::demand(::mount("tmpfs", point.c_str(), "tmpfs", 0, "size=1m") == 0, "mount a tmpfs");
}

// Directories for an overlay, on a file system that can carry one.
class ClassifyMounted : public unit::LeavesNoDescriptor {
protected:
    ClassifyMounted() {
        for (const char* name : {"lower", "lower,2:\\", "upper", "up:per", "work", "merged", "twice"})
            EXPECT_EQ(mkdir(path(name).c_str(), 0755), 0);
        dir_.file("lower/disk.img");
    }
    std::string path(const std::string& name) const { return dir_.path(name); }
    std::string withLower(const std::string& lower) const {
        return "lowerdir=" + lower + ",upperdir=" + path("upper") + ",workdir=" + path("work");
    }
    static Storage look(const std::string& path, std::span<const Override> overrides = {}) {
        return classify(os::openFile(path, O_RDONLY).get(), path, overrides);
    }
    static void demandLocal(const Storage& storage, const std::string& reason) {
        unit::demand(storage.name == "overlay" && storage.lock == LockKind::byteRange && !storage.remote &&
                         storage.scope == Scope::thisHost,
                     "local, but it is refused: " + storage.reason);
        unit::demand(reason.empty() ? storage.reason.empty() : storage.reason.find(reason) != std::string::npos,
                     "the reason is: " + storage.reason);
    }
    static void demandRefused(const Storage& storage, const std::string& layer, const std::string& type) {
        unit::demand(storage.lock == LockKind::none, "it is leased");
        unit::demand(storage.reason.find("its layer '" + layer + "' is on " + type) != std::string::npos,
                     "the reason is: " + storage.reason);
    }

    unit::TempDir dir_;
};

TEST_F(ClassifyMounted, OverlayOfLocalLayersIsLocal) {
    inOwnMounts([&] {
        mountOverlay(withLower(path("lower")), path("merged"));
        demandLocal(look(path("merged/disk.img")), "");
        mountOverlay("lowerdir=" + path("merged") + ":" + path("lower"), path("twice"));
        demandLocal(look(path("twice/disk.img")), "");
    });
}

TEST_F(ClassifyMounted, LayersOfAnOverlayAreSeenWhateverTheirNamesAre) {
    inOwnMounts([&] {
        mountOverlay("lowerdir=" + path(R"(lower\,2\:\\)") + ":" + path("lower") + ",upperdir=" + path(R"(up\:per)") +
                         ",workdir=" + path("work"),
                     path("merged"));
        demandLocal(look(path("merged/disk.img")), "");
    });
}

// sysfs stands for storage that nothing is known of: it needs no server, and is a layer of no real overlay.
TEST_F(ClassifyMounted, OverlayWithOneLayerOfOtherStorageIsRefusedByThatLayer) {
    inOwnMounts([&] {
        mountOverlay(withLower(path("lower") + ":/sys/kernel"), path("merged"));
        demandRefused(look(path("merged/disk.img")), "/sys/kernel", "sysfs");
        mountOverlay("lowerdir=" + path("merged") + ":" + path("lower"), path("twice"));
        demandRefused(look(path("twice/disk.img")), path("merged"), "overlay");
    });
}

TEST_F(ClassifyMounted, OverlayWhoseLayersAreNotInThisNamespaceIsLocalAndSaysSo) {
    inOwnMounts([&] {
        mountOverlay(withLower(path("lower")), path("merged"));
        os::Fd image = os::openFile(path("merged/disk.img"), O_RDONLY);
        unit::demand(rename(path("lower").c_str(), path("gone").c_str()) == 0, "rename");
        demandLocal(classify(image.get(), "disk.img"), "its layer '" + path("lower") + "' cannot be seen");
    });
}

TEST_F(ClassifyMounted, OverlayThatHidesItsOwnLayerIsLocalAndSaysSo) {
    inOwnMounts([&] {
        mountOverlay(withLower(path("lower")), path("lower"));
        demandLocal(look(path("lower/disk.img")), "its layer '" + path("lower") + "' cannot be seen");
    });
}

TEST_F(ClassifyMounted, BindMountShowsWhatIsBehindIt) {
    inOwnMounts([&] {
        mountTmpfs(path("upper"));
        unit::demand(os::openFile(path("upper"), O_RDONLY).open(), "open");
        unit::demand(::mount(path("upper").c_str(), path("merged").c_str(), nullptr, MS_BIND, nullptr) == 0, "bind");
        unit::demand(look(path("merged")).name == "tmpfs", "a bind mount of tmpfs is " + look(path("merged")).name);
        unit::demand(::mount("/sys", path("twice").c_str(), nullptr, MS_BIND, nullptr) == 0, "bind");
        unit::demand(look(path("twice/kernel")).name == "sysfs", "a bind mount of sysfs");
        unit::demand(look(path("twice/kernel")).lock == LockKind::none, "it is leased");
    });
}

TEST_F(ClassifyMounted, OverrideIsFoundByThePathBehindLinksAndKeepsWhatWasSeen) {
    std::vector<Override> overrides{{path("lower"), LockKind::flock, Scope::allHosts}};
    Storage seen = look(path("lower/disk.img"));
    ASSERT_EQ(symlink(path("lower").c_str(), path("link").c_str()), 0);
    for (const char* name : {"lower/disk.img", "link/disk.img", "upper/../lower/disk.img"}) {
        Storage storage = look(path(name), overrides);
        EXPECT_EQ(storage.name, seen.name);
        EXPECT_EQ(storage.remote, seen.remote);
        EXPECT_EQ(storage.lock, LockKind::flock) << name;
        EXPECT_EQ(storage.scope, Scope::allHosts);
        EXPECT_TRUE(storage.qemuLocksStayLocal);
        EXPECT_FALSE(storage.flockImage);
        EXPECT_EQ(storage.reason, "the administrator says so (storage_locks)");
    }
    EXPECT_EQ(look(path("upper"), overrides).lock, seen.lock) << "not below it";
    dir_.file("upper/disk.img");
    ASSERT_EQ(symlink(path("upper/disk.img").c_str(), path("lower/away.img").c_str()), 0);
    EXPECT_EQ(look(path("lower/away.img"), overrides).reason, seen.reason) << "a link that leads out of it";
}

TEST_F(ClassifyMounted, OverrideMayTrustAndMayRefuse) {
    std::vector<Override> overrides{{"/", LockKind::none, Scope::thisHost},
                                    {"/sys", LockKind::byteRange, Scope::allHosts}};
    Storage refused = look(path("lower/disk.img"), overrides);
    EXPECT_EQ(refused.lock, LockKind::none);
    EXPECT_EQ(refused.reason, "the administrator refuses leases there (storage_locks)");
    Storage trusted = look("/sys/kernel", overrides);
    EXPECT_EQ(trusted.name, "sysfs");
    EXPECT_EQ(trusted.lock, LockKind::byteRange);
    EXPECT_EQ(trusted.scope, Scope::allHosts);
    EXPECT_TRUE(trusted.remote);
    EXPECT_FALSE(trusted.qemuLocksStayLocal);
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

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What the hosts of the lab boot: a Debian kernel, an initrd, and one read-only root image for all of them.

Everything comes from Debian through this machine's apt and is kept in a cache folder under a name made of the recipe:
this file and what it puts in. Change the recipe and the next run builds again (a minute).
"""

import concurrent.futures
import dataclasses
import fcntl
import gzip
import hashlib
import lzma
import os
import pathlib
import shutil
import stat
import struct
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
RECIPE = ("root_image.py", "guest_init.sh", "initrd_init.sh", "agent.c")

PACKAGES = """
linux-image-amd64 bash busybox-static coreutils findutils gawk grep sed kmod iproute2 iputils-ping procps psmisc
util-linux mount e2fsprogs keyutils strace libstdc++6 libglib2.0-0 attr
nfs-kernel-server nfs-common rpcbind
ocfs2-tools corosync dlm-controld gfs2-utils
samba cifs-utils
glusterfs-server glusterfs-client
ceph-mon ceph-osd ceph-mds ceph-common ceph-fuse
lvm2 dmsetup mdadm libvirt0 libaugeas0
""".split()

# Dependencies that only administration tools, hooks and package scripts use.
NOT_UNPACKED = ("perl", "libperl", "python3-samba", "initramfs-tools", "klibc", "usrmerge", "udev", "openssl",
                "ca-certificates", "debconf", "dpkg", "linux-base", "xsltproc")
NOT_KEPT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/zoneinfo",
            "usr/share/i18n", "usr/share/common-licenses", "usr/share/bash-completion", "usr/lib/modules", "boot")

BOOT_MODULES = "virtio_pci virtio_blk crc32c_generic ext4 overlay".split()
MODULES = """
virtio_net virtio_rng 9p 9pnet_virtio configfs
nfs nfsv3 nfsv4 nfs_layout_nfsv41_files nfsd rpcsec_gss_krb5 auth_rpcgss
ocfs2 ocfs2_dlmfs ocfs2_stack_o2cb ocfs2_stack_user gfs2 dlm sctp cifs fuse ceph ipvlan macvlan
virtio_scsi sd_mod dm_mod dm_multipath dm_round_robin md_mod raid1 nls_utf8
""".split()

USERS = """\
root:x:0:0:root:/root:/bin/bash
_rpc:x:106:65534::/run/rpcbind:/usr/sbin/nologin
statd:x:107:65534::/var/lib/nfs:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin
"""
GROUPS = "root:x:0:\ntty:x:5:\ndisk:x:6:\nnogroup:x:65534:\nlibvirt-qemu:x:64055:\n"
MOST_HOSTS = 4


@dataclasses.dataclass(frozen=True)
class RootImage:
    kernel: pathlib.Path
    initrd: pathlib.Path
    root: pathlib.Path


def cache_folder():
    base = os.environ.get("LEASEHOLD_LAB_CACHE")
    return pathlib.Path(base) if base else pathlib.Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "leasehold-lab")


def prepared(cache):
    """The image of the current recipe."""
    target = built(cache, [HERE / name for name in RECIPE], lambda work: Build(work).run())
    return RootImage(target / "vmlinux", target / "initrd.gz", target / "root.img")


def built(cache, recipe, build):
    """The folder that build(work) leaves as work/image, kept in the cache as long as the files of the recipe stay the
    same, and as long as the process lives that has asked for it. One process builds, others wait for it."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"image-{hashlib.sha256(b''.join(path.read_bytes() for path in recipe)).hexdigest()[:16]}"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in cache.glob("image-*"):
                remove_unused(old)
            work = cache / "building"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            build(work)
            (work / "image").rename(target)
            shutil.rmtree(work)
        in_use.append(os.open(target, os.O_RDONLY | os.O_DIRECTORY))
        fcntl.flock(in_use[-1], fcntl.LOCK_SH)
    return target


in_use = []  # the folders of images that this process has asked for, open and locked


def remove_unused(image):
    folder = os.open(image, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(image)
    except BlockingIOError:
        pass  # another run, of other sources, boots it
    finally:
        os.close(folder)


def command(*words, **options):
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


class Build:
    def __init__(self, work):
        self.packages, self.root, self.kernel, self.initrd, self.image = (
            work / name for name in ("packages", "root", "kernel", "initrd", "image"))

    def run(self):
        for folder in (self.packages / "partial", self.root, self.kernel, self.initrd / "modules", self.image):
            folder.mkdir(parents=True)
        self.fetch()
        self.unpack()
        self.version = next((self.kernel / "lib" / "modules").iterdir()).name
        self.extract_kernel()
        self.keep_modules()
        self.configure()
        self.make_initrd()
        self.make_root()

    def fetch(self):
        """The packages and all that they depend on, whatever is installed here: apt is shown an empty system."""
        nothing = self.packages / "empty-status"
        nothing.write_text("")
        command("apt-get", "update", "-qq")
        command("apt-get", "-y", "-qq", "--no-install-recommends", "--download-only",
                "-o", f"Dir::State::status={nothing}", "-o", f"Dir::Cache::archives={self.packages}",
                "install", *PACKAGES)

    def unpack(self):
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / "usr" / name).mkdir(parents=True)
            (self.root / name).symlink_to(f"usr/{name}")
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.unpack_one, sorted(self.packages.glob("*.deb"))))

    def unpack_one(self, package):
        name = package.name.split("_")[0]
        if name.startswith("linux-image-"):
            command("dpkg-deb", "-x", package, self.kernel)
        elif not name.startswith(NOT_UNPACKED):
            command("sh", "-c", 'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink '
                    + " ".join(f"--exclude=./{path}" for path in NOT_KEPT), "sh", package, self.root)

    def extract_kernel(self):
        extract_kernel(self.kernel / "boot" / f"vmlinuz-{self.version}", self.image / "vmlinux")

    def keep_modules(self):
        """Of all modules, those that the lab uses. kmod is the image's own: this machine may have none."""
        everything = self.root / "usr/lib/modules"
        (self.kernel / "lib/modules").rename(everything)
        command("chroot", self.root, "depmod", self.version)
        wanted = self.module_files(BOOT_MODULES + MODULES)
        for path in everything.rglob("*.ko"):
            # Algorithms are not dependencies: whoever needs one asks for it by name.
            if path not in wanted and "crypto" not in path.parts:
                path.unlink()
        command("chroot", self.root, "depmod", self.version)

    def module_files(self, names):
        """The modules and what they need, in the order in which they can be loaded."""
        files = []
        for name in names:
            lines = command("chroot", self.root, "modprobe", "-S", self.version, "--show-depends", name).splitlines()
            paths = [self.root / "usr" / line.split()[1].lstrip("/") for line in lines if line.startswith("insmod ")]
            files += [path for path in paths if path not in files]
        return files

    def configure(self):
        """What the packages' own scripts would have done, as far as the daemons miss it."""
        for path in ("proc", "sys", "dev", "tmp", "run", "mnt", "share", "root", "srv", "config", "var/lib/nfs",
                     "var/lib/corosync", "var/log/corosync", "var/log/cluster", "var/log/glusterfs", "var/log/samba",
                     "var/lib/samba/private", "var/cache/samba", "etc/ocfs2", "etc/corosync", "etc/samba"):
            (self.root / path).mkdir(parents=True, exist_ok=True)
        etc = self.root / "etc"
        (etc / "passwd").write_text(USERS)
        (etc / "group").write_text(GROUPS)
        databases = ("passwd", "group", "hosts", "services", "protocols", "rpc", "netgroup")
        (etc / "nsswitch.conf").write_text("".join(f"{database}: files\n" for database in databases))
        (etc / "hosts").write_text("127.0.0.1 localhost\n"
                                   + "".join(f"10.77.0.{number} h{number}\n" for number in range(1, MOST_HOSTS + 1)))
        for link, target in (("etc/mtab", "/proc/self/mounts"), ("usr/bin/awk", "gawk"), ("usr/bin/sh", "bash")):
            (self.root / link).unlink(missing_ok=True)
            (self.root / link).symlink_to(target)
        command("ldconfig", "-r", self.root)
        compile_agent(self.root / "usr/sbin/lab-agent")
        shutil.copy(HERE / "guest_init.sh", self.root / "usr/sbin/lab-init")
        (self.root / "usr/sbin/lab-init").chmod(0o755)

    def make_initrd(self):
        for path in ("bin", "proc", "sys", "dev", "image", "changes", "root"):
            (self.initrd / path).mkdir()
        shutil.copy(self.root / "usr/bin/busybox", self.initrd / "bin/busybox")
        shutil.copy(HERE / "initrd_init.sh", self.initrd / "init")
        (self.initrd / "init").chmod(0o755)
        files = self.module_files(BOOT_MODULES)
        for path in files:
            shutil.copy(path, self.initrd / "modules")
        (self.initrd / "modules" / "order").write_text("".join(f"{path.name}\n" for path in files))
        with gzip.open(self.image / "initrd.gz", "wb", compresslevel=1) as archive:
            write_cpio(archive, self.initrd)

    def make_root(self):
        size = int(command("du", "-sm", self.root).split()[0])
        root = self.image / "root.img"
        with open(root, "wb") as file:
            file.truncate((size * 5 // 4 + 64) << 20)
        command("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-d", self.root, root)


def extract_kernel(vmlinuz, vmlinux):
    """The bare vmlinux: QEMU enters it directly (PVH), which saves the emulated CPU the unpacking."""
    packed = vmlinuz.read_bytes()
    # The setup header says where the payload is (Documentation/x86/boot.rst: setup_sects, payload_offset, _length).
    offset, length = struct.unpack_from("<II", packed, 0x248)
    start = (packed[0x1F1] + 1) * 512 + offset
    vmlinux.write_bytes(lzma.LZMADecompressor().decompress(packed[start:start + length]))


def compile_agent(target):
    command("cc", "-O", "-Wall", "-Wextra", "-static", "-o", target, HERE / "agent.c")


def write_cpio(archive, folder):
    """The "newc" format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    def entry(name, mode, data, number):
        name = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        for part in (header, data):
            archive.write(part + b"\0" * (-len(part) % 4))

    for number, path in enumerate(sorted(folder.rglob("*")), 1):
        mode = path.lstat().st_mode
        entry(str(path.relative_to(folder)), mode, path.read_bytes() if stat.S_ISREG(mode) else b"", number)
    entry("TRAILER!!!", 0, b"", 0)


if __name__ == "__main__":
    print(prepared(cache_folder()))

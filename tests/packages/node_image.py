# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What a node boots: Debian of this machine's release as its installer would leave it, with its own kernel, initrd,
systemd, libvirt and security modules. tests/support/chroot fetches it; here it becomes a disk.

It differs from a node of flesh and blood in this only: an agent runs commands for the tests (tests/lab/agent.c), there
is no password and no network, and SELinux' labels are on all files, so that it can be booted with either security module.
Debian's SELinux policy does not let libvirt start guests even without leasehold; what it lacks for that is in
libvirt_on_debian.te.
"""

import dataclasses
import gzip
import os
import pathlib
import platform
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
for folder in ("lab", "e2e"):
    sys.path.insert(0, str(ROOT / "tests" / folder))

import root_image  # noqa: E402

CHROOT = ROOT / "tests" / "support" / "chroot"
LIBVIRT_ON_DEBIAN = ROOT / "tests" / "packages" / "libvirt_on_debian.te"
RECIPE = (pathlib.Path(__file__).resolve(), CHROOT, LIBVIRT_ON_DEBIAN, ROOT / "tests" / "lab" / "agent.c")

PACKAGES = """
systemd systemd-sysv udev dbus kmod iproute2 procps linux-image-amd64 apparmor
libvirt-daemon-system libvirt-clients qemu-system-x86 e2fsprogs
selinux-policy-default policycoreutils policycoreutils-python-utils selinux-utils semodule-utils setools
nfs-kernel-server libaugeas0 augeas-lenses
""".split()

AGENT = """\
[Unit]
Description=Runs the commands of leasehold's tests

[Service]
ExecStartPre=ip addr add 10.0.2.15/24 dev eth0
ExecStartPre=ip link set eth0 up
ExecStart=/usr/local/sbin/lab-agent
# As an administrator who has logged in, for SELinux; nothing where it is off.
SELinuxContext=-unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023

[Install]
WantedBy=multi-user.target
"""

# What tests share with a node, and what an administrator would have in fstab for storage of his own.
FSTAB = "share /share 9p trans=virtio,version=9p2000.L,cache=none,msize=131072,noauto 0 0\n"


@dataclasses.dataclass(frozen=True)
class NodeImage:
    kernel: pathlib.Path
    initrd: pathlib.Path
    root: pathlib.Path


def cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "leasehold-node")


def tree():
    """The folder that tests/support/chroot makes; for tests that need its programs and not its kernel, too."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    return pathlib.Path(root_image.command(CHROOT, "prepare", "node", release, " ".join(PACKAGES), "").strip())


def prepared():
    target = root_image.built(cache_folder(), RECIPE, make)
    return NodeImage(target / "vmlinux", target / "initrd", target / "root.img")


def make(work):
    root, image = work / "root", work / "image"
    image.mkdir()
    root_image.command("cp", "-a", tree(), root)
    make_bootable(root, image)
    configure(root)
    root_image.command("chroot", root, "semodule", "-n", "-s", "default", "-i",
                       "/" + str(libvirt_on_debian(root / "root").relative_to(root)))
    # setfiles works through /proc/self/fd; the mount ends with its namespace.
    root_image.command("unshare", "--mount", "sh", "-c", 'mount -t proc proc "$1/proc" && chroot "$1" setfiles -F -e /proc'
                       " /etc/selinux/default/contexts/files/file_contexts /", "sh", root)
    size = int(root_image.command("du", "-sm", root).split()[0])
    with open(image / "root.img", "wb") as file:
        file.truncate((size * 5 // 4 + 512) << 20)
    root_image.command("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-d", root, image / "root.img")


def libvirt_on_debian(folder):
    """The policy module, compiled into that folder."""
    compiled = folder / "libvirt_on_debian.mod"
    root_image.command("checkmodule", "-M", "-m", "-o", compiled, LIBVIRT_ON_DEBIAN)
    root_image.command("semodule_package", "-o", compiled.with_suffix(".pp"), "-m", compiled)
    return compiled.with_suffix(".pp")


def make_bootable(root, image):
    [vmlinuz] = (root / "boot").glob("vmlinuz-*")
    [initrd] = (root / "boot").glob("initrd.img-*")
    root_image.extract_kernel(vmlinuz, image / "vmlinux")
    # As it is, but unpacked: the emulated CPU would need seconds for that.
    with gzip.open(initrd) as packed:
        (image / "initrd").write_bytes(packed.read())


def configure(root):
    etc = root / "etc"
    (etc / "hostname").write_text("node\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node\n")
    (etc / "machine-id").write_text(f"{0x6e6f6465:032x}\n")
    (etc / "fstab").write_text(FSTAB)
    (etc / "resolv.conf").write_text("")
    (root / "share").mkdir()
    # Each guest has a profile of its own, which the emulated CPU compiles at each of its starts. Ubuntu's default: half as
    # much work, and the same profile.
    with open(etc / "apparmor" / "parser.conf", "a") as parser:
        parser.write("Optimize=no-expr-simplify\n")
    # From here on a package that wants a service started gets it.
    (root / "usr/sbin/policy-rc.d").unlink()
    root_image.compile_agent(root / "usr/local/sbin/lab-agent")
    (etc / "systemd/system/lab-agent.service").write_text(AGENT)
    root_image.command("systemctl", "--root", root, "enable", "lab-agent.service")
    root_image.command("systemctl", "--root", root, "disable", "nfs-server.service")  # until somebody wants one


if __name__ == "__main__":
    print(prepared())

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""OPERATIONS.md, "libguestfs": its tools on an image that is leased, in a system of their own. Each boots a machine."""

import os
import platform
import subprocess

import hosts
import pytest
from conftest import CHROOT
from documents import documented

PACKAGES = "guestfs-tools linux-image-amd64 qemu-system-x86 libvirt0 libaugeas0"
RELEASE = platform.freedesktop_os_release()["VERSION_CODENAME"]
REFUSED = 75

pytestmark = pytest.mark.skipif(not os.environ.get("LEASEHOLD_LONG"), reason="takes minutes: LEASEHOLD_LONG=1")


def test_with_the_backend_direct_its_tools_look_beside_a_lease_and_write_under_one(tmp_path):
    if not hosts.command().exists():
        pytest.skip(f"{hosts.command()} was not built")
    disk, raw, tools = tmp_path / "disk.qcow2", tmp_path / "disk.raw", hosts.command().parent
    raw.touch()
    os.truncate(raw, 64 << 20)
    hosts.ok("mkfs.ext4", "-q", raw)
    hosts.ok("qemu-img", "convert", "-O", "qcow2", raw, disk)
    look = documented("LIBGUESTFS_BACKEND=direct virt-df -a disk.qcow2", disk_qcow2=disk)
    write = documented("LIBGUESTFS_BACKEND=direct leasehold run disk.qcow2 -- virt-sparsify --in-place disk.qcow2", disk_qcow2=disk)
    tree = hosts.ok(CHROOT, "prepare", "libguestfs", RELEASE, PACKAGES, "", timeout=3600).strip()

    def typed(words):
        words = [str(tools / "leasehold") if word == "leasehold" else word for word in words]
        return hosts.run(CHROOT, "run", tree, f"{tmp_path}:{tmp_path}", f"{tools}:{tools}", "--",
                         "LIBGUESTFS_BACKEND_SETTINGS=force_tcg", *words, timeout=1800)
    with subprocess.Popen([hosts.command(), "run", disk, "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        hosts.wait_until(lambda: hosts.marks_on(disk), "the image is leased")
        seen, refused = typed(look), typed(write)
        assert seen and "disk.qcow2:/dev/sda" in seen.out, seen
        assert refused.rc == REFUSED and "leasehold run cat" in refused.err, refused
        holder.stdin.close()
    written = typed(write)
    assert written, written

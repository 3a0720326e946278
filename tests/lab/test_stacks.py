# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What stands on what, with real devices: partitions, device-mapper, LVM, md and multipath on one SCSI disk of one host.
Two guests never have two layers of it, the refusal names the layer, and what the host itself uses is nobody's.
(Stacks on loop devices are in tests/unit/place_test.cpp.)"""

import base64
import shlex
import struct

import pytest
from documents import documented

pytestmark = pytest.mark.needs("devices")

DISK = "/dev/sdb"
SECTORS = 56 << 10  # of each partition; the disk has 128 MiB
KNOWING = 'host_devices = "ignore"'  # the host's own stacks are what this is about


def partition_table(*starts):
    entries = b"".join(struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, start, SECTORS) for start in starts)
    return b"\0" * 446 + entries.ljust(64, b"\0") + b"\x55\xaa"


@pytest.fixture(scope="module")
def host(lab):
    """h1, with two partitions on its free disk."""
    host = lab.hosts[0]
    table = base64.b64encode(partition_table(2048, 2048 + SECTORS)).decode()
    host.ok(f"""modprobe -a dm_mod dm_multipath dm_round_robin md_mod raid1 && mkdir -p /run/lvm &&
        echo 'activation {{ udev_sync = 0 udev_rules = 0 }}' >/etc/lvm/lvm.conf &&
        echo {table} | base64 -d | dd of={DISK} bs=512 conv=notrunc,fsync status=none &&
        partx -a {DISK} && [ -b {DISK}1 ] && [ -b {DISK}2 ]""")
    yield host
    host.ok(f"partx -d {DISK} && dd if=/dev/zero of={DISK} bs=512 count=1 conv=notrunc,fsync status=none")


@pytest.fixture
def host_actor(host):
    """host_actor(conf): a new process there; it ends with the test."""
    made = []

    def make(conf=KNOWING):
        made.append(host.actor(host.lab.unique("stack"), conf))
        return made[-1]
    yield make
    for actor in made:
        actor.quit()


@pytest.fixture
def one(host_actor):
    return host_actor()


@pytest.fixture
def two(host_actor):
    return host_actor()


def exclude_each_other(one, two, upper, lower, words):
    """Whoever of them comes second is refused, and told which layer the other one has."""
    for first, then in ((upper, lower), (lower, upper)):
        one.ok("register", "db", 1, first)
        for mode in ("", ":ro", ":shared"):
            text = two.refused("register", "web", 2, f"{then}{mode}")
            assert "in use by guest 'db'" in text and words in text, text
        one.ok("kill", "db")
        two.ok("register", "web", 2, then)
        two.ok("kill", "web")


@pytest.fixture
def mapped(host):
    """mapped("name", "table", uuid): a device-mapper device; goes with the test."""
    made = []

    def make(name, table, uuid=""):
        host.ok(f"dmsetup create {name} {f'--uuid {uuid}' if uuid else ''} --table '{table}' && dmsetup mknodes {name}")
        made.append(name)
        return f"/dev/mapper/{name}"
    yield make
    for name in reversed(made):
        host.ok(f"for i in $(seq 100); do dmsetup remove {name} && exit 0; sleep 0.1; done; exit 1")


@pytest.fixture
def volume(host):
    """A logical volume on the first partition."""
    host.ok(f"pvcreate -qq -ff -y {DISK}1 && vgcreate -qq --physicalextentsize 1M stack {DISK}1 &&"
            " lvcreate -qq -Zn -Wn -L 4M -n one stack && lvcreate -qq -Zn -Wn -L 4M -n two stack")
    yield "/dev/stack/one"
    host.ok(f"vgchange -qq -an stack && vgremove -qq -ff -y stack && pvremove -qq -ff -y {DISK}1")


@pytest.fixture
def raid(host):
    host.ok(f"mdadm --create /dev/md0 --run --metadata=1.2 --level=1 --raid-devices=2 --assume-clean {DISK}1 {DISK}2"
            " </dev/null && until [ -b /dev/md0 ]; do sleep 0.1; done")
    yield "/dev/md0"
    host.ok(f"for i in $(seq 100); do mdadm --stop /dev/md0 && break; sleep 0.1; done;"
            f" mdadm --zero-superblock {DISK}1 {DISK}2")


# --- two guests


def test_a_partition_and_its_disk_are_one_resource_and_two_partitions_are_two(one, two):
    exclude_each_other(one, two, f"{DISK}1", DISK, f"{DISK}1")
    one.ok("register", "db", 1, f"{DISK}1")
    two.ok("register", "web", 2, f"{DISK}2")


def test_what_covers_a_device_is_one_resource_with_it(mapped, one, two):
    whole = mapped("whole", f"0 {SECTORS} linear {DISK}1 0")
    exclude_each_other(one, two, whole, f"{DISK}1", whole)
    exclude_each_other(one, two, whole, DISK, whole)
    one.ok("register", "db", 1, f"{DISK}2")
    two.ok("register", "web", 2, whole)


def test_slices_of_a_device_are_for_two_guests_and_the_whole_is_for_neither(mapped, one, two):
    slices = [mapped(f"slice{number}", f"0 8192 linear {DISK}1 {number * 8192}") for number in range(2)]
    exclude_each_other(one, two, slices[0], f"{DISK}1", slices[0])
    one.ok("register", "db", 1, slices[0])
    two.ok("register", "web", 2, slices[1])
    assert "in use by guest 'db'" in two.refused("register", "late", 3, slices[0])


def test_a_logical_volume_and_its_physical_volume_and_the_disk_are_one_resource(volume, one, two):
    for lower in (f"{DISK}1", DISK):
        exclude_each_other(one, two, volume, lower, volume)
    one.ok("register", "db", 1, volume)
    two.ok("register", "web", 2, "/dev/stack/two")
    two.ok("register", "late", 3, f"{DISK}2")


def test_a_copied_volume_group_is_another_one_when_it_has_uuids_of_its_own(host, volume, host_actor):
    one, two = (host_actor(f'{KNOWING}\nsingle_host = 1\nlvm_lockspace_dir = "/run/lvm-leases"') for _ in range(2))
    host.ok(f"mkdir -p -m 700 /run/lvm-leases && dd if={DISK}1 of={DISK}2 bs=1M conv=fsync status=none")
    one.ok("register", "db", 1, volume)
    words = documented("vgimportclone -n NEWVG DEVICE", NEWVG="copy", DEVICE=f"{DISK}2")
    host.ok(f"{shlex.join(words)} && vgchange -qq -ay copy")
    try:
        two.ok("register", "web", 2, "/dev/copy/one")
        assert len(host.ok("ls /run/lvm-leases").split()) == 2
        two.ok("kill", "web")
    finally:
        host.ok(f"vgchange -qq -an copy && vgremove -qq -ff -y copy && pvremove -qq -ff -y {DISK}2")


def test_an_md_device_and_its_members_and_their_disk_are_one_resource(raid, one, two):
    for lower in (f"{DISK}1", f"{DISK}2", DISK):
        exclude_each_other(one, two, raid, lower, raid)


def test_a_stack_of_all_of_them_is_one_resource(host, raid, one, two):
    host.ok(f"pvcreate -qq -ff -y {raid} && vgcreate -qq --physicalextentsize 1M tower {raid} &&"
            " lvcreate -qq -Zn -Wn -L 4M -n top tower")
    try:
        for lower in (raid, f"{DISK}1", f"{DISK}2", DISK):
            exclude_each_other(one, two, "/dev/tower/top", lower, "/dev/tower/top")
    finally:
        for actor in (one, two):
            actor.quit()
        host.ok(f"vgchange -qq -an tower && vgremove -qq -ff -y tower && pvremove -qq -ff -y {raid}")


@pytest.fixture
def unpartitioned(host):
    """As multipath has its paths: the partitions are devices above the multipath device."""
    host.ok(f"partx -d {DISK}")
    yield
    host.ok(f"partx -a {DISK}")


@pytest.mark.usefixtures("unpartitioned")
def test_a_multipath_device_of_the_kernel_and_its_path_and_their_partitions_are_one_resource(host, mapped, one, two):
    wwid = host.ok("cat /sys/class/block/sdb/device/wwid").strip().replace("naa.", "3")
    number, sectors = host.ok("cat /sys/class/block/sdb/dev /sys/class/block/sdb/size").split()
    path = mapped("mpathz", f"0 {sectors} multipath 0 0 1 1 round-robin 0 1 1 {number} 1", f"mpath-{wwid}")
    part = mapped("mpathz-part1", f"0 {SECTORS} linear {path} 2048", f"part1-mpath-{wwid}")
    exclude_each_other(one, two, part, path, part)
    exclude_each_other(one, two, part, DISK, part)
    one.ok("register", "db", 1, path)
    assert "in use by guest 'db'" in two.refused("register", "web", 2, DISK)


# --- the host itself


def refused_by_the_host(host_actor, device, words):
    text = host_actor("").refused("register", "db", 1, device)
    assert "in use by this host itself" in text and words in text and "host_devices" in text, text
    warned = host_actor('host_devices = "warn"')
    warned.ok("register", "db", 1, device)
    assert words in warned.said()
    warned.ok("kill", "db")
    knowing = host_actor(KNOWING)
    knowing.ok("register", "db", 1, device)
    knowing.ok("kill", "db")


def test_what_device_mapper_has_is_refused(mapped, host_actor):
    mapped("busy", f"0 8192 linear {DISK}1 0")
    refused_by_the_host(host_actor, f"{DISK}1", "device-mapper device busy is made of sdb1")


def test_the_disk_of_such_a_partition_is_refused_too(mapped, host_actor):
    mapped("busy", f"0 8192 linear {DISK}1 0")
    refused_by_the_host(host_actor, DISK, "device-mapper device busy is made of sdb1")


def test_a_physical_volume_of_an_active_group_is_refused(volume, host_actor):
    refused_by_the_host(host_actor, f"{DISK}1", "logical volume stack-")


def test_a_physical_volume_of_a_group_that_is_not_active_is_a_disk_like_any_other(host, volume, host_actor):
    host.ok(shlex.join([*documented("vgchange -an"), "-qq", "stack"]))
    host_actor("").ok("register", "db", 1, f"{DISK}1")


def test_a_member_of_md_is_refused(raid, host_actor):
    refused_by_the_host(host_actor, f"{DISK}2", "md0 is made of sdb2")


def test_what_is_mounted_is_refused(host, host_actor):
    host.ok(f"mkfs.ext4 -q -F {DISK}1 && mkdir -p /run/mounted && mount {DISK}1 /run/mounted")
    try:
        for device in (f"{DISK}1", DISK):
            refused_by_the_host(host_actor, device, "sdb1 is mounted")
        host_actor("").ok("register", "web", 2, f"{DISK}2")
    finally:
        host.ok("umount /run/mounted")


def test_what_the_host_swaps_to_is_refused(host, host_actor):
    host.ok(f"mkswap {DISK}2 && swapon {DISK}2")
    try:
        refused_by_the_host(host_actor, f"{DISK}2", "it swaps to sdb2")
    finally:
        host.ok(f"swapoff {DISK}2")


def test_a_device_that_has_gone_is_refused_in_words_and_its_number_may_be_another_one_later(host, mapped, one, two):
    """Names and numbers change: what counts is what is there now."""
    gone = mapped("first", f"0 8192 linear {DISK}1 0")
    host.ok("dmsetup remove first && dmsetup create first --table '0 8192 linear " + f"{DISK}2 0' && dmsetup mknodes first")
    exclude_each_other(one, two, gone, f"{DISK}2", gone)
    two.ok("register", "web", 2, f"{DISK}1")

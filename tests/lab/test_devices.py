# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Block devices: hosts that share one call it by different names, and locks on its node stay on their host. So the
lease is a file on storage that all hosts share, named after what the device says of itself. (That it behaves as a lease
is in test_leases.py, on logical volumes.)"""

import os

import pytest
import storage as storages

pytestmark = pytest.mark.needs("devices")


@pytest.fixture(params=["devices"], scope="session")
def storage_name(request):
    return request.param


@pytest.fixture
def disk(storage):
    """One SCSI disk, as h1 and as h2 calls it."""
    return storage.scsi_disk


def test_the_hosts_have_different_names_for_one_disk(hosts, disk):
    identities = [host.ok(f"cat /sys/class/block/$(basename {name})/device/wwid") for host, name in zip(hosts, disk)]
    assert disk[0] != disk[1] and identities[0] == identities[1]


def test_locks_on_a_device_node_stay_on_their_host(disk, one, two):
    for actor, name in zip((one, two), disk):
        actor.ok("open", "f", name, "rw")
        actor.ok("ofd", "f", "w", "2^62", 1)
        actor.ok("flock", "f", "ex")


# --- one device, several names


def test_one_disk_that_the_hosts_name_differently_has_one_lease(disk, one, two):
    one.ok("register", "db", 1, disk[0])
    assert f"'{disk[1]}' is in use by guest 'db'" in two.refused("register", "web", 2, disk[1])
    two.ok("register", "web", 2, disk[0])  # another disk there
    one.ok("kill", "db")
    two.ok("attach", "web", disk[1])


def test_a_guest_moves_to_a_host_that_names_its_disk_differently(disk, one, two):
    one.ok("register", "db", 1, disk[0])
    one.ok("acquire", "db")
    one.ok("qemu-locks", disk[0])
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, disk[1])
    one.ok("release", "db")
    two.ok("acquire", "db", state)
    one.refused("acquire", "db", state)
    one.ok("kill", "db")
    one.refused("register", "web", 2, disk[0])


def test_a_multipath_device_and_its_paths_have_one_lease(hosts, disk, one, two):
    wwid = hosts[1].ok(f"cat /sys/class/block/{os.path.basename(disk[1])}/device/wwid").strip().replace("naa.", "3")
    hosts[1].ok(f"dmsetup create mpatha --uuid mpath-{wwid} --table '0 8192 linear {disk[1]} 0' &&"
                " dmsetup mknodes mpatha")
    try:
        one.ok("register", "db", 1, disk[0])
        assert "in use by guest 'db'" in two.refused("register", "web", 2, "/dev/mapper/mpatha")
        one.ok("kill", "db")
        two.ok("register", "web", 2, "/dev/mapper/mpatha")
        one.refused("register", "db", 1, disk[0])
        two.refused("register", "late", 3, disk[1])
    finally:
        two.quit()
        hosts[1].ok("until dmsetup remove mpatha; do sleep 0.1; done")


def test_a_logical_volume_has_one_lease_under_each_of_its_names(hosts, storage, one, two):
    volume = storage.image()
    number = hosts[1].ok(f"stat -L -c '0x%t 0x%T' {volume}").split()
    hosts[1].ok(f"mknod /run/{os.path.basename(volume)} b {number[0]} {number[1]}")
    one.ok("register", "db", 1, volume)
    for name in (volume, f"/dev/mapper/lab-{os.path.basename(volume)}", f"/run/{os.path.basename(volume)}"):
        assert "in use by guest 'db'" in two.refused("register", "web", 2, name)


def test_the_node_of_a_leased_device_is_left_to_udev(hosts, disk, one):
    one.ok("register", "db", 1, disk[0])
    assert hosts[0].run(f"flock -n {disk[0]} true"), "udev takes a flock on whole disks while it looks at them"


# --- without a lockspace, or without an identity


def test_a_device_without_a_lockspace_is_leased_on_its_own_host_and_that_is_said(hosts, disk, actor):
    one, other, two = (actor(host, "") for host in (hosts[0], hosts[0], hosts[1]))
    one.ok("register", "db", 1, disk[0])
    said = one.said()
    assert "on this host only" in said and disk[0] in said and "scsi_lockspace_dir" in said, said
    other.refused("register", "web", 2, disk[0])
    two.ok("register", "web", 2, disk[1])


def test_a_lease_of_one_host_is_refused_where_leases_have_to_reach_all(hosts, storage, disk, actor):
    strict = "require_cluster_leases = 1"
    text = actor(hosts[0], strict).refused("register", "db", 1, disk[0])
    assert "scsi_lockspace_dir" in text and "require_cluster_leases" in text, text
    actor(hosts[0], f"{storage.plugin_conf}\n{strict}").ok("register", "db", 1, disk[0])


def test_a_device_without_an_identity_goes_by_its_path(hosts, storage, actor):
    """virtio disks have none."""
    one, two = (actor(host) for host in hosts)
    one.ok("register", "db", 1, storages.FREE_DISK)
    assert "on this host only" in one.said()
    two.ok("register", "web", 2, storages.FREE_DISK)
    one.ok("kill", "db")
    two.ok("kill", "web")
    conf = f'file_lockspace_dir = "{storage.lockspace}"'
    one, two = (actor(host, conf) for host in hosts)
    one.ok("register", "db", 1, storages.FREE_DISK)
    two.refused("register", "web", 2, storages.FREE_DISK)

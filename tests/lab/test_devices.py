# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Block devices: hosts that share one call it by different names, and locks on its node stay on their host. So the lease
is a file on storage that all hosts share, named after what the device says of itself. (That it behaves as a lease is in
test_leases.py, on logical volumes.)"""

import conftest
import pytest

pytestmark = pytest.mark.skipif("devices" not in conftest.KINDS, reason="devices were not asked for")


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

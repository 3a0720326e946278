# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What only CephFS does: its metadata servers change, and one of its clients counts a lock that was placed twice."""

import time

import conftest
import lab as labs
import pytest
import test_accidents as accidents

CEPH = [name for name in ("cephfs", "cephfuse") if name in conftest.KINDS]
pytestmark = pytest.mark.skipif(not CEPH, reason="CephFS was not asked for")


@pytest.fixture(params=CEPH, scope="session")
def storage_name(request):
    return request.param


# --- a lock that was placed twice


def test_a_lock_that_was_placed_twice_outlives_its_holder_on_ceph_fuse(storage, hosts, actor, two):
    """Why the protocol places none twice. If this fails on ceph-fuse, it has been mended there."""
    path, holder = storage.path(), actor(hosts[0])
    holder.ok("open", "f", path, "rw")
    for _ in range(2):
        holder.ok("ofd", "f", "w", accidents.MARK, 1)
    holder.quit()
    two.ok("open", "f", path, "rw")
    if storage.name == "cephfs":
        labs.wait_until(lambda: two.ask("ofd", "f", "w", accidents.MARK, 1), "the lock is free", 10)
    else:
        time.sleep(2)
        assert not two.ask("ofd", "f", "w", accidents.MARK, 1)


def test_a_handover_that_is_killed_before_its_note_and_repeated_leaves_no_lock_behind(storage, one, two):
    """The note is the file position (core/lease/note): the owner mark is up when it is set, and placed again by the next
    call."""
    for step in range(1, 20):
        image, state, acquired = labs.kill_a_handover(storage, one, two, "lseek", step)
        two.ok("acquire", "db", state)
        two.ok("acquire", "db", state)
        for actor in (one, two):
            actor.ok("kill", "db")
        labs.wait_until(lambda image=image: one.ask("register", "web", 2, image), "the image is free", 10)
        one.ok("kill", "web")
        if acquired:
            break
    assert step > 1, "no step was found to kill it at"


# --- metadata servers


def test_a_lease_survives_another_metadata_server(storage, one, two, table):
    image = storage.image()
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    storage.kill_active_mds()
    answer = two.ask("register", "web", 2, image, timeout=120)
    table.add(storage.name, "metadata server killed", f"a start is {answer.status} after {answer.seconds:.0f} s")
    labs.wait_until(lambda: one.ask("acquire", "db", timeout=60), "the guest can resume", 120)
    refused = labs.wait_until(lambda: "in use by guest 'db'" in two.ask("register", "web", 2, image, timeout=60).text,
                              "the other host sees the lease", 120)
    assert refused
    one.ok("kill", "db")
    labs.wait_until(lambda: two.ask("register", "web", 2, image, timeout=60), "the image is free", 30)

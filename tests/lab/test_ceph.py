# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What only CephFS does: its metadata servers change, and one of its clients counts a lock that was placed twice."""

import time

import conftest
import lab as labs
import pytest
import test_accidents as accidents

CEPH = [name for name in ("cephfs", "cephfuse") if name in conftest.KINDS]
pytestmark = pytest.mark.needs("cephfs", "cephfuse")


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
    else:
        pytest.fail("the handover never came to its end")
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


# --- quotas and layouts


@pytest.mark.long
@pytest.mark.parametrize("attributes", [{"quota.max_bytes": 1 << 20}, {"dir.layout.pool": "second"},
                                        {"dir.layout.stripe_unit": 1 << 16, "dir.layout.stripe_count": 2}],
                         ids=["quota", "pool", "stripes"])
def test_an_image_below_a_full_quota_or_with_a_layout_of_its_own_is_leased_as_any_other(storage, hosts, one, two,
                                                                                       attributes):
    directory = f"{storage.directory}/{storage.lab.unique('directory')}"
    image = f"{directory}/disk.img"
    storage.add_pool("second")
    hosts[0].ok(f"mkdir {directory} && " + " && ".join(
        f"setfattr -n ceph.{name} -v {value} {directory}" for name, value in attributes.items()))
    hosts[0].ok(f"dd if=/dev/zero of={image} bs=1M count=1 conv=fsync 2>&1")
    if "quota.max_bytes" in attributes:
        labs.wait_until(lambda: not hosts[0].run(f"echo more | dd of={directory}/more conv=fsync"), "the quota is full")
    hosts[1].ok(f"until [ -s {image} ]; do sleep 0.1; ls {directory} >/dev/null; done")
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    assert "guest 'db'" in two.refused("register", "web", 2, image)
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, image)
    one.ok("release", "db")
    two.ok("acquire", "db", state)
    one.refused("acquire", "db", state)
    two.ok("kill", "db")
    one.ok("kill", "db")
    one.ok("register", "web", 2, image)


# --- a client that was evicted

RECOVERING = "recover_session=clean"
CLIENTS = [*CEPH] + ([pytest.param(RECOVERING, marks=pytest.mark.long)] if "cephfs" in CEPH else [])
WAYS = "direct", "rw"  # past the page cache, with a lock; and through it, without one


@pytest.fixture(scope="module", params=["cut off", pytest.param("connected", marks=pytest.mark.long)])
def after_the_eviction(request, bring_up):
    """How h1 was when its clients were evicted, and {client: (what its late writes and the resume of its guest answered,
    what h2 reads there at last)}. h1 held a lock and a lease, h2 has taken both and written. What of h1 has not landed
    when h2 reads never does: h1 is off by then."""
    kinds = {name: bring_up(name) for name in CEPH}
    one, two = next(iter(kinds.values())).clients
    there = {name: (kind, kind.directory) for name, kind in kinds.items()}
    if request.config.getoption("--long") and "cephfs" in kinds:
        there[RECOVERING] = kinds["cephfs"], "/mnt/recovering"
        kinds["cephfs"].mount_at(one, "/mnt/recovering", RECOVERING)
    guests, writers, readers, thieves = {}, {}, {}, {}
    for name, (kind, directory) in there.items():
        path, image = kind.path(), kind.image()
        path_there, image_there = (file.replace(kind.directory, directory) for file in (path, image))
        guests[name], thieves[name] = kind.actor(one), (kind.actor(two), image)
        guests[name].ok("register", "db", 1, image_there)
        guests[name].ok("acquire", "db")
        writers[name] = [kind.actor(one) for _ in WAYS]
        for way, writer in zip(WAYS, writers[name]):
            writer.ok("open", "f", path_there, way)
        writers[name][0].ok(*accidents.lock_of(kind.name))
        readers[name] = kind.actor(two)
        readers[name].ok("open", "f", path, "direct")
        for place, writer in enumerate(writers[name]):
            writer.ok("write", "f", place * 4096, "early")
            assert readers[name].ok("read", "f", place * 4096) == "early"
    server = next(iter(kinds.values())).server
    if request.param == "cut off":
        one.cut(server)
    for kind in kinds.values():
        kind.evict(one)
    for name, (kind, _) in there.items():
        thief, image = thieves[name]
        for actor, order in ((readers[name], accidents.lock_of(kind.name)), (thief, ("register", "web", 2, image))):
            assert accidents.until_granted(actor, *order, seconds=labs.PATIENCE) is not None, str(order)
        for place in range(len(WAYS)):
            readers[name].ok("write", "f", place * 4096, "new")
    one.heal(server)
    late = [(name, writer, ("write", "f", place * 4096, "late"))
            for name in there for place, writer in enumerate(writers[name])]
    late += [(name, guest, ("acquire", "db")) for name, guest in guests.items()]
    answers = labs.together(lambda each: (each[0], each[1].ask(*each[2], timeout=30)), late)
    one.kill()
    yield request.param, {
        name: ([answer for of, answer in answers if of == name],
               [readers[name].ok("read", "f", place * 4096) for place in range(len(WAYS))]) for name in there}
    for reader, (thief, _) in zip(readers.values(), thieves.values()):
        reader.quit()
        thief.quit()


@pytest.mark.last
@pytest.mark.parametrize("client", CLIENTS)
def test_what_an_evicted_client_writes_late_never_lands_and_its_guest_does_not_resume(client, after_the_eviction, table):
    """The writes may have any answer, or none. (A client that recovers is a new one to who has no lock: that one's
    writes land.)"""
    how, clients = after_the_eviction
    (locked, unlocked, resume), content = clients[client]
    table.add(client, f"client evicted, {how}", f"late write: {locked.status}, without a lock: {unlocked.status}",
              f"resume: {resume.status}")
    assert content == ["new", "late" if client == RECOVERING and unlocked else "new"]
    assert resume.status in ("refused", "hung"), str(resume)

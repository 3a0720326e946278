# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What only CephFS does: its metadata servers change, its clients are evicted, and one of them counts a lock that was
placed twice."""

import time

import conftest
import lab as labs
import pytest
import storage as storages
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


@pytest.mark.parametrize("how", ["failed over", pytest.param("restarted", marks=pytest.mark.long)])
def test_a_lease_survives_its_metadata_server(storage, one, two, table, how):
    image = storage.image()
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    storage.restart_mds(fails_over=how == "failed over")
    answer = two.ask("register", "web", 2, image, timeout=120)
    table.add(storage.name, f"metadata server {how}", f"a start is {answer.status} after {answer.seconds:.0f} s")
    labs.wait_until(lambda: one.ask("acquire", "db", timeout=60), "the guest can resume", 120)
    refused = labs.wait_until(lambda: "in use by guest 'db'" in two.ask("register", "web", 2, image, timeout=60).text,
                              "the other host sees the lease", 120)
    assert refused
    one.ok("kill", "db")
    labs.wait_until(lambda: two.ask("register", "web", 2, image, timeout=60), "the image is free", 30)


@pytest.mark.parametrize("daemon, answers", [("ceph-mds", ["refused"]),
                                             pytest.param("ceph-mon", ["ok", "refused"], marks=pytest.mark.long)])
def test_a_cluster_that_does_not_answer_is_not_waited_for(storage, hosts, one, actor, daemon, answers):
    """What a client has been told by the monitor goes on without it."""
    taken, wanted = storage.image(), storage.image()
    one.ok("register", "db", 1, taken)
    two = actor(hosts[1], accidents.IMPATIENT)
    storage.server.ok(f"pkill -STOP {daemon}")
    try:
        for image, good in ((wanted, answers), (taken, ["refused"])):
            answer = two.ask("register", "web", 2, image, timeout=60)
            assert answer.status in good, str(answer)
            assert answer or image == taken or "not answer" in answer.text, str(answer)
            if answer:
                two.ok("kill", "web")
        if daemon == "ceph-mon" and labs.command().exists():
            said = hosts[1].run(f"{labs.GUEST_DIR}/leasehold fenced away --address 10.77.0.99 --i-made-sure-it-is-off")
            assert said.rc == 1 and "CephFS: ceph" in said.out, str(said)
    finally:
        storage.server.ok(f"pkill -CONT {daemon}")
    labs.wait_until(lambda: one.ask("acquire", "db", timeout=60), "the guest can resume", 120)
    labs.wait_until(lambda: two.ask("register", "web", 2, wanted, timeout=60), "the image can be had", 120)


# --- a client that does not answer


@pytest.mark.parametrize("stopped", [False, True], ids=["rebooted", "stopped"])
def test_a_guest_runs_on_beside_a_client_that_does_not_answer_and_has_its_image_open_too(storage, hosts, one, actor, stopped):
    """Who asks for the size of the image waits for that client, and so does who writes to it. A guest that is rebooted is
    its host's first call without a state; it looks a path up, which ceph-fuse does not do without asking for the size."""
    if storage.name == "cephfuse" and not stopped:
        pytest.skip("ceph-fuse asks for the size whenever a path is looked up")
    image, two = storage.image(), actor(hosts[1], "storage_timeout = 10\nhandoff_wait = 0\n")
    two.ok("register", "web", 2, image)
    two.ok("acquire", "web")
    two.ok("open", "f", image, "direct")
    one.refused("register", "db", 1, image)
    state = [two.ok("release", "web")] if stopped else []
    hosts[0].freeze()
    try:
        answers = [two.ask("acquire", "web", *state, timeout=25), two.ask("write", "f", 0, "late", timeout=25)]
    finally:
        hosts[0].thaw()
    assert all(answers), [*map(str, answers)]


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


def suffer(how, host, server):
    if how == "frozen":
        host.freeze()
    elif how != "connected":
        host.cut(server)


def recover(how, host, server):
    if how == "frozen":
        host.thaw()
    else:
        host.heal(server)


@pytest.fixture(scope="module", params=["cut off", *(pytest.param(how, marks=pytest.mark.long) for how in
                                                     ("connected", "silent", "frozen"))])
def after_the_eviction(request, bring_up, table):
    """{client of h1, evicted: (what its late writes and the resume of its guest answered, what the watcher said of its
    lease, what h2 reads there at last)}. h1 held a lock and a lease, h2 has taken both and written. What of h1 has not landed when h2
    reads never does: h1 is off by then."""
    how = request.param  # "silent" and "frozen": until session_autoclose is over
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
    suffer(how, one, server)
    if how in ("cut off", "connected"):
        for kind in kinds.values():
            kind.evict(one)

    def take(name):
        (thief, image), kind = thieves[name], there[name][0]
        seconds = [accidents.until_granted(actor, *order, seconds=labs.PATIENCE) for actor, order in (
            (readers[name], accidents.lock_of(kind.name)), (thief, ("register", "web", 2, image)))]
        assert None not in seconds, f"{name}: {seconds}"
        for place in range(len(WAYS)):
            readers[name].ok("write", "f", place * 4096, "new")
        table.add(name, f"client {how}", f"lock free after: {seconds[0]:.0f} s",
                  f"lease free after: {sum(seconds):.0f} s")
    labs.together(take, list(there))
    recover(how, one, server)
    late = [(name, writer, ("write", "f", place * 4096, "late"))
            for name in there for place, writer in enumerate(writers[name])]
    late += [(name, guest, ("acquire", "db")) for name, guest in guests.items()]
    answers = labs.together(lambda each: (each[0], each[1].ask(*each[2], timeout=30)), late)
    seen = accidents.watched(one) if labs.command().exists() else {}
    one.kill()
    after = {}
    for name, (kind, directory) in there.items():
        image = thieves[name][1].replace(kind.directory, directory)
        said = [event for event in ("lost", "silent", "unreadable") if f"'{image}'" in str(seen.get(event))]
        after[name] = ([answer for of, answer in answers if of == name], said if seen else None,
                       [readers[name].ok("read", "f", place * 4096) for place in range(len(WAYS))])
        late_write, unlocked, resume = (answer.status for answer in after[name][0])
        table.add(name, f"client {how}", f"late write: {late_write}, without a lock: {unlocked}",
                  f"resume: {resume}", f"watcher: {said}")
    yield after
    for reader, (thief, _) in zip(readers.values(), thieves.values()):
        reader.quit()
        thief.quit()


@pytest.mark.last
@pytest.mark.parametrize("client", CLIENTS)
def test_what_an_evicted_client_writes_late_never_lands_and_its_guest_does_not_resume(client, after_the_eviction):
    """The writes may have any answer, or none. (A client that recovers is a new one to who has no lock: that one's
    writes land.)"""
    (_, unlocked, resume), _, content = after_the_eviction[client]
    assert content == ["new", "late" if client == RECOVERING and unlocked else "new"]
    assert resume.status in ("refused", "hung"), str(resume)


@pytest.mark.last
@pytest.mark.parametrize("client", CLIENTS)
def test_the_watcher_says_that_the_lease_of_an_evicted_client_is_lost(client, after_the_eviction):
    _, said, _ = after_the_eviction[client]
    if said is None:
        pytest.skip(f"{labs.command()} was not built")
    assert said == ["lost"]


# --- how long a dead host keeps its images by default


# Each with a client of its own: whether another host has the image open, and when it is asked for.
DEATHS = {"by nobody else": (False, 0), "by another host, too": (True, 0), "by nobody else, asked for later": (False, 100)}


@pytest.fixture(scope="module")
def after_a_death(bring_up):
    """{by whom the image was open: seconds from the death of h1, which had it, to its lease elsewhere}"""
    cephfs = bring_up("cephfs")
    one, two = cephfs.clients
    images, takers = {}, {}
    for number, (what, (shared, _)) in enumerate(DEATHS.items()):
        directory, images[what], takers[what] = f"/mnt/dead{number}", cephfs.image(), cephfs.actor(two)
        cephfs.mount_at(one, directory, "noshare")
        cephfs.actor(one).ok("register", "db", 1, images[what].replace(cephfs.directory, directory))
        if shared:
            takers[what].ok("open", "f", images[what], "rw")
            takers[what].ok("read", "f", 0)
    cephfs.be_patient(storages.CEPH_DEFAULTS)
    one.kill()
    start = time.monotonic()

    def take(what):
        time.sleep(DEATHS[what][1])
        granted = accidents.until_granted(takers[what], "register", "web", 2, images[what], seconds=300 + labs.PATIENCE)
        return granted is not None and time.monotonic() - start
    seconds = labs.together(take, list(DEATHS))
    cephfs.be_patient()
    yield dict(zip(DEATHS, seconds))
    for taker in takers.values():
        taker.quit()


@pytest.mark.last
@pytest.mark.long
@pytest.mark.needs("cephfs")
@pytest.mark.parametrize("what", DEATHS)
def test_the_image_of_a_dead_host_is_free_after_the_default_times(what, after_a_death, table):
    table.add("cephfs", f"host killed, image open {what}", f"lease free after: {after_a_death[what]:.0f} s")
    assert after_a_death[what]

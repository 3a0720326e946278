# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""GlusterFS: leased where the mount says that a client which lost its locks cannot write any more (client.strict-locks),
and refused in words elsewhere. The facts stand beside what follows from them: what bricks, sharded and replicated
volumes do with locks. (That it behaves as a lease is in test_leases.py.)"""

import json
import shlex

import lab as labs
import pytest
import storage as storages
import test_accidents as accidents
from documents import documented

pytestmark = pytest.mark.needs("gluster")

LOCK = "ofd", "f", "w", accidents.MARK, 1


@pytest.fixture(params=["gluster"], scope="session")
def storage_name(request):
    return request.param


@pytest.fixture
def volume(lab, storage):
    """volume("name", {option: word}, layout, bricks): that volume, mounted on both hosts; its directory."""
    mounted = []

    def make(name, options=None, layout="", bricks=None):
        storage.create(name, options, layout, bricks)
        directory = f"/mnt/{name}"
        for host in storage.clients:
            storage.mount_at(host, name, directory)
            mounted.append((host, directory))
        return directory
    yield make
    for host, directory in mounted:
        host.run(f"umount -l {directory}")
    for name in {directory for _, directory in mounted}:
        storage.server.run(f"gluster --mode=script volume stop {name[5:]} force &&"
                           f" gluster --mode=script volume delete {name[5:]}")


@pytest.fixture
def lab(bring_up):
    return bring_up("gluster").lab


def new_file(storage, directory, size="1M"):
    path = f"{directory}/{storage.lab.unique('disk')}.img"
    storage.clients[0].ok(f"truncate -s {size} {path} && sync {path}")
    storage.clients[1].ok(f"until [ -s {path} ]; do sleep 0.1; ls {directory} >/dev/null; done")
    return path


def classified(host, path):
    if not labs.command().exists():
        pytest.skip(f"{labs.command()} was not built")
    return json.loads(host.ok(f"{labs.GUEST_DIR}/leasehold classify --json {path}"))


# --- what is refused


def test_a_volume_whose_clients_are_not_strict_is_refused_with_the_commands_that_make_it_so(
        storage, volume, hosts, one, two):
    directory = volume("lax", {"client.strict-locks": "off"})
    image = new_file(storage, directory)
    text = one.refused("register", "db", 1, image)
    for words in ("gluster volume set lax client.strict-locks on", f"umount {directory} && mount {directory}"):
        assert words in text, text
    storage.server.ok(shlex.join(documented("gluster volume set VOLUME client.strict-locks on", VOLUME="lax")), timeout=60)
    assert "client.strict-locks" in one.refused("register", "db", 1, image), "its mount was made before"
    for host in hosts:
        host.ok(shlex.join(documented("umount /mnt/volume", _mnt_volume=directory)))
        host.ok(f"echo {storage.server.name}:/lax {directory} glusterfs >>/etc/fstab")
        host.ok(shlex.join(documented("mount /mnt/volume", _mnt_volume=directory)), timeout=120)
    one.ok("register", "db", 1, image)
    assert "in use by guest 'db'" in two.refused("register", "web", 2, image)


@pytest.mark.parametrize("name, options, layout, words", [
    ("sharded", {"features.shard": "on"}, "", "sharded"),
    ("replicated", {}, "replica 3 arbiter 1", "replicated"),
    pytest.param("coded", {}, "disperse 3 redundancy 1", "cluster/disperse", marks=pytest.mark.long)])
def test_a_volume_on_which_locks_are_not_all_is_refused_by_what_it_is(storage, volume, one, name, options, layout, words):
    bricks = [f"{name}{number}" for number in range(3 if layout else 1)]
    directory = volume(name, {"client.strict-locks": "on"} | options, layout, bricks)
    assert words in one.refused("register", "db", 1, new_file(storage, directory))


def test_a_directory_of_the_volume_is_leased_as_its_root_is_as_long_as_that_is_mounted(storage, hosts, one, two):
    """`.meta` is in the root alone."""
    host, name = hosts[0], storage.lab.unique("sub")
    host.ok(f"mkdir {storage.directory}/{name} /mnt/{name} && mount --bind {storage.directory}/{name} /mnt/{name} &&"
            f" truncate -s 1M /mnt/{name}/disk.img")
    one.ok("register", "db", 1, f"/mnt/{name}/disk.img")
    labs.wait_until(lambda: hosts[1].run(f"[ -s {storage.directory}/{name}/disk.img ]"), "the other host sees it")
    assert "in use by guest 'db'" in two.refused("register", "web", 2, f"{storage.directory}/{name}/disk.img")
    one.ok("kill", "db")
    host.ok(f"mkdir /mnt/alone && unshare --mount sh -c 'mount --bind /mnt/{name} /mnt/alone && umount -l"
            f" {storage.directory} && {labs.GUEST_DIR}/leasehold classify /mnt/alone/disk.img >/run/alone 2>&1'; umount"
            f" /mnt/{name}")
    assert "the volume itself mounted" in host.ok("cat /run/alone")


def test_what_hides_the_mount_s_word_refuses_it(storage, hosts, one):
    host, meta = hosts[0], f"{storage.directory}/.meta"
    image = storage.image()
    host.ok(f"mount -t tmpfs tmpfs {meta}")
    try:
        assert "cannot be told" in one.refused("register", "db", 1, image)
        host.ok(f"mkdir -p {meta}/graphs/active && printf 'volume x\\n type protocol/client\\n option client-version 10.3\\n"
                f" option strict-locks on\\nend-volume\\n' >{meta}/graphs/active/volfile &&"
                f" chmod 0444 {meta}/graphs/active/volfile")
        assert "not GlusterFS's own" in one.refused("register", "db", 1, image)
    finally:
        host.ok(f"umount {meta}")
    one.ok("register", "db", 1, image)


def test_a_client_process_that_does_not_answer_refuses_in_bounded_time(storage, hosts, actor):
    host, image = hosts[0], storage.image()
    one = actor(host, accidents.IMPATIENT)
    client = f"$(pgrep -f 'process-name fuse.*{storage.directory}$')"
    host.ok(f"kill -STOP {client}")
    try:
        answer = one.ask("register", "db", 1, image, timeout=30)
        assert answer.status == "refused" and "not answer" in answer.text, str(answer)
    finally:
        host.ok(f"kill -CONT {client}")
    one.ok("register", "db", 1, image)


def test_classify_says_what_it_is_and_what_to_mind(storage, hosts):
    said = classified(hosts[0], storage.path())
    assert "GlusterFS" in str(said) and "all-hosts" in str(said) and "has to stay on" in str(said), said


# --- cut off for longer than the bricks wait


def lose(storage, how, host):
    """What makes the bricks forget the host's locks: its cable, its processor, or their own restart."""
    if how == "brick":
        storage.restart_brick("lab")
        return
    (host.freeze if how == "freeze" else host.cut)()


def recover(how, host):
    if how != "brick":
        (host.thaw if how == "freeze" else host.heal)()


@pytest.fixture(scope="module", params=["cut", "freeze", "brick"])
def after_the_loss(request, bring_up, table):
    """h1, which had a lock, the lease of a suspended guest and that of a running one when the brick forgot them; h2 took
    all, wrote, and gave the leases back. Another one has what a QEMU has, its read locks."""
    storage, how = bring_up("gluster"), request.param
    lock, bytes_, *leases = (storage.path() for _ in range(4))
    one, two = storage.clients
    holder, guest, runner, thief = (storage.actor(host) for host in (one, one, one, two))
    accidents.hold(holder, "gluster", lock, "direct")
    holder.ok("open", "bystander", lock, "direct")
    holder.ok("open", "qemu", bytes_, "direct")
    holder.ok("ofd", "qemu", "r", 100, 1)
    for number, (actor, name, image) in enumerate(zip((guest, runner), ("db", "web"), leases)):
        actor.ok("register", name, 1 + number, image)
        actor.ok("acquire", name)
    state = guest.ok("release", "db")
    thief.ok("open", "f", lock, "direct")
    thief.ok("open", "qemu", bytes_, "direct")
    for handle in ("f", "qemu"):
        thief.ok("read", handle, 0)
    lose(storage, how, one)
    try:
        seconds = accidents.until_granted(thief, *LOCK, seconds=storages.GLUSTER_PATIENCE + labs.PATIENCE)
        thief.ok("ofd", "qemu", "w", 100, 1)
        for handle in ("f", "qemu"):
            thief.ok("write", handle, 0)
        for number, image in enumerate(leases):
            assert accidents.until_granted(thief, "register", f"thief{number}", 3 + number, image,
                                           seconds=labs.PATIENCE)
            thief.ok("kill", f"thief{number}")
    finally:
        recover(how, one)
    if how != "brick":
        table.add("gluster", how, f"lock free after: {seconds:.0f} s")
    labs.wait_until(lambda: holder.ask("statfs", storage.directory), "the connection is back")
    yield holder, guest, state, leases
    for actor in (holder, guest, runner, thief):
        actor.quit()


@pytest.mark.long
def test_late_writes_of_a_client_that_lost_its_locks_do_not_land(after_the_loss):
    holder, *_ = after_the_loss
    for handle in ("f", "qemu"):
        assert [holder.ask(order, handle, 0).status for order in ("write", "read", "write")] == ["EBADFD"] * 3
    assert holder.ask(*LOCK).status == "EBADFD"


@pytest.mark.long
def test_a_descriptor_without_a_lock_is_not_kept_from_writing(after_the_loss):
    """So it matters that QEMU has locks, too."""
    holder, *_ = after_the_loss
    holder.ok("write", "bystander", 0)


@pytest.mark.long
def test_a_lease_that_was_lost_is_noticed_by_the_watcher_and_by_the_resume(after_the_loss):
    holder, guest, state, leases = after_the_loss
    lost = [event["text"] for event in accidents.watched(holder.host)["lost"]]
    assert all(any(image in text for text in lost) for image in leases), lost
    assert leases[0] in guest.refused("acquire", "db", state)


@pytest.mark.long
def test_a_client_that_gives_its_brick_up_before_the_brick_does_has_lost_its_leases_too(storage, volume, hosts, one, two):
    """Cut off for longer than network.ping-timeout, and connected again within the brick's own time."""
    directory = volume("pinged", {"client.strict-locks": "on", "network.ping-timeout": 5, "server.tcp-user-timeout": 42})
    image = new_file(storage, directory)
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    one.ok("open", "f", image, "direct")
    one.ok("ofd", "f", "r", 100, 1)
    one.ok("read", "f", 0)

    def connected():
        said = hosts[0].run(f"cat {directory}/.meta/graphs/active/pinged-client-*/private")
        return said.rc == 0 and "connected = 1" in said.out
    hosts[0].cut()
    try:
        labs.wait_until(lambda: not connected(), "the client has given up")
    finally:
        hosts[0].heal()
    labs.wait_until(connected, "the connection is back")
    assert one.ask("write", "f", 0).status == "EBADFD"
    lost = accidents.watched(hosts[0])["lost"]
    assert any(image in event["text"] for event in lost), lost
    assert image in one.refused("acquire", "db")
    labs.wait_until(lambda: two.ask("register", "web", 2, image), "the image is free")


@pytest.mark.long
def test_an_option_that_is_turned_off_while_the_volume_is_mounted_is_not_seen_and_the_watcher_finds_the_thief(
        storage, volume, hosts, actor):
    """Why the note of classify says that it has to stay on."""
    directory = volume("turned", {"client.strict-locks": "on"})
    image, other = new_file(storage, directory), new_file(storage, directory)
    guest, thief = actor(hosts[0]), actor(hosts[1])
    guest.ok("register", "db", 1, image)
    guest.ok("acquire", "db")
    storage.set("client.strict-locks", "off", "turned")
    guest.ok("register", "late", 3, other)
    hosts[0].cut()
    try:
        assert accidents.until_granted(thief, "register", "web", 2, image,
                                       seconds=storages.GLUSTER_PATIENCE + labs.PATIENCE)
    finally:
        hosts[0].heal()
    labs.wait_until(lambda: guest.ask("statfs", directory), "the connection is back")
    lost = labs.wait_until(lambda: accidents.watched(hosts[0]).get("lost"), "the watcher finds it", 60)
    assert any(image in event["text"] for event in lost)


# --- what administrators do with a volume under running guests


@pytest.mark.long
def test_leases_outlive_another_graph_and_stay_strict(storage, volume, hosts, one, two):
    directory = volume("switched", {"client.strict-locks": "on"})
    image = new_file(storage, directory)
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    one.ok("open", "f", image, "direct")
    one.ok("ofd", "f", "r", 100, 1)
    graph = hosts[0].ok(f"readlink {directory}/.meta/graphs/active")
    storage.set("performance.io-cache", "on", "switched")
    labs.wait_until(lambda: hosts[0].ok(f"ls {directory} >/dev/null; readlink {directory}/.meta/graphs/active") != graph,
                    "the client has another graph")
    assert "in use by guest 'db'" in two.refused("register", "web", 2, image)
    assert "lost" not in accidents.watched(hosts[0])
    one.ok("acquire", "db")
    storage.restart_brick("switched", "switched", directory)
    labs.wait_until(lambda: two.ask("register", "web", 2, image), "the brick is back")
    labs.wait_until(lambda: one.ask("write", "f", 0).status == "EBADFD", "the late write is refused")


@pytest.mark.long
def test_a_rebalance_leaves_images_that_are_leased_where_they_are(storage, volume, hosts, one, two):
    directory = volume("moved", {"client.strict-locks": "on"})
    images = [new_file(storage, directory) for _ in range(10)]
    for number, image in enumerate(images):
        one.ok("register", f"db{number}", 1 + number, image)
    bystanders = [new_file(storage, directory) for _ in range(10)]
    storage.server.ok(f"""gluster --mode=script volume add-brick moved {storage.server.name}:/srv/moved-more force &&
        gluster volume rebalance moved start force &&
        until gluster volume rebalance moved status | grep -q completed; do sleep 0.5; done""", timeout=120)
    moved = storage.server.ok("find /srv/moved-more -name '*.img' -not -perm 1000 -size +0").split()
    assert moved and not {path.rsplit("/")[-1] for path in moved} & {path.rsplit("/")[-1] for path in images}, moved
    assert len(moved) < len(bystanders) + len(images)
    for number, image in enumerate(images):
        assert f"in use by guest 'db{number}'" in two.refused("register", "web", 99, image)
    assert "lost" not in accidents.watched(hosts[0])


# --- why sharded and replicated volumes are refused


@pytest.mark.long
def test_on_a_sharded_volume_late_writes_land_behind_the_first_part(storage, volume, hosts, one, two):
    directory = volume("shards", {"client.strict-locks": "on", "features.shard": "on", "features.shard-block-size": "4MB"},
                       "", ["shards1", "shards2"])
    path = new_file(storage, directory, "32M")
    parts = [number << 22 for number in range(8)]
    for actor in (one, two):
        actor.ok("open", "f", path, "direct")
    two.ok("read", "f", 0)
    for part in parts:
        one.ok("write", "f", part)
    one.ok(*LOCK)
    [brick] = storage.server.ok(f"cd /srv && find shards? -name {path.rsplit('/')[-1]} -not -perm 1000").split()
    number = brick.split("/")[0]
    storage.restart_brick(number, "shards", directory)
    labs.wait_until(lambda: two.ask(*LOCK), "the lock is free")
    late = [one.ask("write", "f", part).status for part in parts]
    assert late[0] == "EBADFD"
    landed = storage.server.ok("cd /srv && ls shards?/.shard/*.* | wc -l")
    assert int(landed) == 7


@pytest.mark.long
def test_on_a_replicated_volume_a_brick_that_was_restarted_answers_for_all(bring_up, actor):
    """F_OFD_GETLK is answered by the last one."""
    storage = bring_up("gluster3")
    one, two = map(actor, storage.clients)
    answers = []
    for brick in storage.bricks:
        path = storage.path()
        for each in (one, two):
            each.ok("open", "f", path, "rw")
        one.ok(*LOCK)
        storage.restart_brick(brick)
        assert not two.ask(*LOCK), "a lock call asks all"
        answers.append(two.ok("get", "f", "w", accidents.MARK, 1) != "free")
    assert answers == [True, True, False]


# --- a replicated volume for who vouches for its flock


@pytest.mark.long
def test_a_lease_on_a_replicated_volume_outlives_one_brick_and_not_two(bring_up):
    storage = bring_up("gluster3")
    one, two = map(storage.actor, storage.clients)
    for brick in storage.bricks:
        image = storage.image()
        one.ok("register", "db", 1, image)
        one.ok("acquire", "db")
        state = one.ok("release", "db")
        storage.restart_brick(brick)
        assert "in use by guest 'db'" in two.refused("register", "web", 2, image)
        one.ok("acquire", "db", state)
        one.ok("kill", "db")
        two.ok("register", "web", 2, image)
        two.ok("kill", "web")
    for actor in (one, two):
        actor.quit()

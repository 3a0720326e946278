# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""leasehold across hosts, on each storage: one guest has the image, nobody else gets in, and it can be handed on."""

import conftest
import lab as labs
import pytest


@pytest.fixture
def image(leased):
    return leased.image()


def test_a_guest_on_another_host_is_refused_and_told_which_image(image, one, two):
    one.ok("register", "db", 1, image)
    text = two.refused("register", "web", 2, image)
    assert image in text and "in use" in text, text


def test_the_same_guest_on_another_host_is_refused(image, one, two):
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    assert image in two.refused("register", "db", 1, image)


def test_the_image_is_free_at_once_when_the_guest_is_killed(leased, image, one, two, table):
    one.ok("register", "db", 1, image)
    two.refused("register", "web", 2, image)
    one.ok("kill", "db")
    answer = two.ask("register", "web", 2, image)
    assert answer, str(answer)
    table.add(leased.name, "guest killed", "free at once")


def test_the_image_is_free_when_it_was_unplugged(image, one, two):
    one.ok("register", "db", 1, image)
    one.ok("detach", "db", image)
    two.ok("register", "web", 2, image)
    assert image in one.refused("attach", "db", image)


def test_readers_on_both_hosts_get_along_and_keep_the_writer_out(image, one, two):
    one.ok("register", "reader", 1, f"{image}:ro")
    two.ok("register", "other", 2, f"{image}:ro")
    two.refused("register", "writer", 3, image)
    one.ok("kill", "reader")
    two.refused("register", "writer", 3, image)
    two.ok("kill", "other")
    one.ok("register", "writer", 3, image)
    two.refused("register", "other", 2, f"{image}:ro")


def test_sharers_on_both_hosts_get_along_and_keep_the_writer_out(image, one, two):
    one.ok("register", "sharer", 1, f"{image}:shared")
    two.ok("register", "other", 2, f"{image}:shared")
    two.refused("register", "writer", 3, image)
    one.refused("register", "reader", 4, f"{image}:ro")


@pytest.mark.parametrize("name", [name for name in ("nfs42", "nfs3", "cephfs") if name in conftest.KINDS])
def test_lease_files_of_guests_that_have_ended_do_not_pile_up_in_a_lockspace_of_all_hosts(bring_up, actor, name):
    storage, count = bring_up(name), 16
    one, two = storage.clients
    lockspace = f"{storage.directory}/{one.lab.unique('lockspace')}"
    one.ok(f"mkdir -m 0700 {lockspace}")
    conf = f'file_lockspace_dir = "{lockspace}"'
    living, brief = actor(two, conf), actor(one, conf)
    kept = storage.image()
    living.ok("register", "db", 1, kept)
    for number in range(count):
        brief.ok("register", "brief", 2 + number, storage.image())
        brief.ok("kill", "brief")
        one.ok(f"touch -d '1 hour ago' {lockspace}/*")  # what is younger than a minute is left
    assert int(one.ok(f"ls {lockspace} | wc -l")) <= count // 2
    assert "guest 'db'" in brief.refused("register", "thief", 99, kept)


@pytest.mark.parametrize("name", [name for name in ("bindfs", "gluster3") if name in conftest.KINDS])
def test_storage_whose_locks_can_be_lost_is_refused_unless_the_administrator_insists(bring_up, actor, name):
    storage = bring_up(name)
    text = actor(storage.clients[0], "").refused("register", "db", 1, storage.path())
    assert "storage_locks" in text, text


# --- migration


def test_a_guest_is_handed_to_the_other_host_and_back(image, one, two):
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    source, target = one, two
    for _ in range(2):
        state = source.ok("inquire", "db")
        target.ok("register", "db", 1, image)
        target.refused("register", "web", 2, image)
        assert source.ok("release", "db") == state
        target.refused("register", "web", 2, image)
        target.ok("acquire", "db", state)
        source.refused("acquire", "db", state)
        source.refused("acquire", "db")
        source.ok("kill", "db")
        source.refused("register", "web", 2, image)
        target.ok("acquire", "db")
        source, target = target, source


def test_a_migration_that_fails_leaves_the_lease_at_the_source(image, one, two):
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, image)
    one.ok("release", "db")
    two.ok("kill", "db")
    one.ok("acquire", "db", state)
    two.refused("register", "db", 1, image)
    two.refused("register", "web", 2, image)


def test_a_suspended_guest_keeps_its_image(image, one, two):
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    one.ok("release", "db")
    two.refused("register", "web", 2, image)
    two.ok("register", "db", 1, image)  # it may be about to be handed over
    two.refused("acquire", "db")  # but this one has nothing to show for it
    one.ok("acquire", "db")


# --- beside QEMU


@pytest.fixture
def qemu_image(leased, image):
    if leased.name == "smb":
        pytest.skip("QEMU cannot lock images there at all (test_locks.py)")
    return image


def test_qemu_s_own_locks_and_the_lease_do_not_meet(leased, qemu_image, one, two):
    """In the order in which they come: the lease before QEMU opens the image, QEMU's bytes while it is in use."""
    one.ok("register", "db", 1, qemu_image)
    one.ok("qemu-locks", qemu_image)
    one.ok("acquire", "db")
    two.refused("register", "web", 2, qemu_image)
    one.ok("inquire", "db")
    two.ok("register", "db", 1, qemu_image)
    two.ok("kill", "db")
    one.ok("release", "db")
    one.ok("acquire", "db")
    one.ok("kill", "db")
    one.ok("qemu-unlocks", qemu_image)
    two.ok("register", "web", 2, qemu_image)
    two.ok("qemu-locks", qemu_image)
    one.refused("register", "db", 1, qemu_image)


def test_a_qemu_outside_leasehold_is_seen_on_its_own_host(qemu_image, one, actor):
    actor(one.host).ok("qemu-locks", qemu_image)
    assert "in use" in one.refused("register", "db", 1, qemu_image)


def test_a_qemu_outside_leasehold_is_seen_from_the_other_host(leased, qemu_image, one, two):
    if leased.name in ("ocfs2", "devices"):
        pytest.skip("byte-range locks stay on their host there (test_locks.py, test_devices.py)")
    one.ok("qemu-locks", qemu_image)
    assert "in use" in two.refused("register", "db", 1, qemu_image)
    one.ok("qemu-unlocks", qemu_image)
    two.ok("register", "db", 1, qemu_image)


def test_a_destination_does_not_let_a_second_start_of_its_guest_open_the_image(leased, qemu_image, one, two):
    """Until it has the lease, where QEMU's own locks do not reach the source (the guard)."""
    if leased.name not in ("nfs3", "ocfs2", "devices"):
        pytest.skip("QEMU's own locks of the source are seen here, or the storage is refused")
    one.ok("register", "db", 1, qemu_image)
    one.ok("acquire", "db")
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, qemu_image)
    started = two.ask("qemu-locks", qemu_image)
    assert not started and "byte 201" in str(started), str(started)
    one.ok("release", "db")
    two.ok("acquire", "db", state)
    two.ok("qemu-locks", qemu_image)


# --- under load


def test_of_many_starts_at_once_no_two_succeed(hosts, image, actor):
    actors = [actor(host) for host in hosts for _ in range(2)]
    for round_number in range(3):
        started = labs.together(lambda number: actors[number].ask("register", f"g{number}", number, image, timeout=60),
                                range(len(actors)))
        winners = [number for number, answer in enumerate(started) if answer]
        assert len(winners) <= 1 and {answer.status for answer in started} <= {"ok", "refused"}, [*map(str, started)]
        for number in winners:
            actors[number].ok("kill", f"g{number}")
        actors[round_number].ok("register", "late", 9, image)  # who was refused has left nothing behind
        actors[round_number].ok("kill", "late")

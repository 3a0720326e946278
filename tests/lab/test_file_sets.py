# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Leases as files with a flock, where byte-range locks do not reach every host: what test_leases.py does not ask for.
Their steps are not single system calls, so a process or a host may die in the middle of one."""

import conftest
import lab as labs
import pytest


@pytest.fixture(params=conftest.FILE_SETS, scope="session")
def storage_name(request):
    return request.param


@pytest.fixture
def image(storage):
    return storage.image()


def folder(storage, image):
    number = storage.clients[0].ok(f"stat -c %i {image}").strip()
    return f"{storage.directory}/.leasehold/{number}"


def files(storage, image):
    """What is in the lease of the image, but for the gate and the index (core/lease/file_index.hpp)."""
    return set(storage.clients[0].ok(f"ls {folder(storage, image)}").split()) - {"gate", "00000000-00000000"}


def living(storage, image):
    """Those of them that somebody holds. Where there is an index, what the dead have left is swept now and then only."""
    where = folder(storage, image)
    return {name for name in files(storage, image)
            if storage.clients[0].run(f"flock --nonblock --shared -E 9 {where}/{name} true").rc == 9}


# --- killed in the middle of it


@pytest.mark.parametrize("call", ["flock", "pwrite64", "unlinkat"])
def test_a_start_that_is_killed_at_any_step_keeps_nobody_out(storage, image, one, two, call):
    for step in range(1, 100):
        two.ok("register", "web", 2, image)
        two.ok("kill", "web")
        with one.accident(call, step, "KILL"):
            started = one.ask("register", "db", 1, image)
        if started:
            break
    else:
        pytest.fail("the start never came to its end")
    assert step > 1, "no step was found to kill it at"
    assert len(files(storage, image)) == 1, "what the dead have left is swept"
    two.refused("register", "web", 2, image)


@pytest.mark.parametrize("call", ["flock", "pwrite64"])
def test_a_handover_that_is_killed_at_any_step_lets_nobody_else_in_and_can_be_repeated(storage, one, two, call):
    if storage.lab_kind == "Lab" and call == "flock":
        pytest.skip("each step takes a second there; bindfs is quick")
    for step in range(1, 100):
        image, state, acquired = labs.kill_a_handover(storage, one, two, call, step)
        one.refused("register", "web", 2, image)
        two.ok("acquire", "db", state)
        one.refused("acquire", "db", state)
        for actor in (one, two):
            actor.ok("kill", "db")
        if acquired:
            break
    else:
        pytest.fail("the handover never came to its end")
    assert step > 1, "no step was found to kill it at"


def test_a_process_that_is_stopped_in_the_middle_keeps_others_out_for_no_longer_than_it_is_stopped(
        storage, hosts, image, actor, one, two):
    if storage.lab_kind == "Lab":
        pytest.skip("waits for ten seconds, and is the same on bindfs")
    stopped = actor(hosts[0])
    with stopped.accident("pwrite64", 2, "STOP"):
        answer = stopped.ask("register", "db", 1, image, timeout=1)
    assert answer.status == "hung", str(answer)
    assert "stopped" in two.refused("register", "web", 2, image)
    stopped.resume()
    stopped.ok("statfs", storage.directory)  # answered when the start is over
    assert "guest 'db'" in two.refused("register", "web", 2, image)
    stopped.ok("kill", "db")
    two.ok("register", "web", 2, image)


# --- many


def test_many_guests_of_both_hosts_come_and_go_in_one_directory(hosts, storage, actor):
    actors = [actor(host) for host in hosts for _ in range(2)]
    images = [storage.image() for _ in actors]

    def work(number):
        for _ in range(5):
            actors[number].ok("register", f"g{number}", number, images[number], timeout=60)
            actors[number].ok("acquire", f"g{number}", timeout=60)
            actors[number - 1].refused("register", f"x{number}", 10 + number, images[number], timeout=60)
            actors[number].ok("kill", f"g{number}")
    labs.together(work, range(len(actors)))
    for number, image in enumerate(images):
        actors[number].ok("register", "last", 9, image)
        assert len(files(storage, image)) == 1, "what the dead have left is swept"


def test_many_guests_of_both_hosts_share_one_image(hosts, storage, image, actor):
    actors = [actor(host) for host in hosts for _ in range(3)]

    def start(number):
        # Entering is one at a time; who has to wait for too long is told to try again.
        labs.wait_until(lambda: actors[number].ask("register", f"g{number}", number, f"{image}:shared", timeout=60),
                        f"guest g{number} has started")
    labs.together(start, range(len(actors)))
    assert len(living(storage, image)) == len(actors)
    actors[0].refused("register", "writer", 99, image)
    labs.together(lambda number: actors[number].ok("kill", f"g{number}"), range(len(actors)))
    actors[0].ok("register", "writer", 99, image)


# --- flock(1) on the image


@pytest.fixture
def flocked(storage):
    if storage.name != "ocfs2":
        pytest.skip("a flock on the image itself is for OCFS2, where nothing else of QEMU's or ours meets it")


@pytest.mark.usefixtures("flocked")
def test_an_administrator_s_flock_on_the_other_host_respects_a_guest(hosts, image, one, two):
    command = f"flock -n -E 9 {image} true"
    one.ok("register", "db", 1, image)
    assert hosts[1].run(command).rc == 9
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, image)
    one.ok("release", "db")
    two.ok("acquire", "db", state)
    one.ok("kill", "db")
    assert hosts[0].run(command).rc == 9, "the lease has moved, and the flock with it"
    two.ok("kill", "db")
    assert hosts[0].run(command).rc == 0


@pytest.mark.usefixtures("flocked")
def test_a_guest_respects_an_administrator_s_flock_on_the_other_host(image, one, two):
    two.ok("open", "f", image, "rw")
    two.ok("flock", "f", "ex")
    assert image in one.refused("register", "db", 1, image)
    two.ok("close", "f")
    one.ok("register", "db", 1, image)

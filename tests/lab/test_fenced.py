# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""leasehold fenced: storage that waits for a dead host is told that it is dead. It is told nothing about the living."""

import shlex
import time

import conftest
import lab as labs
import pytest
import storage as storages
import test_accidents as accidents
from documents import documented

WAITING = [name for name in ("nfs3", "cephfs", "cephfuse") if name in conftest.KINDS]
LOCKSPACE = "/mnt/nfs3/fenced"  # where leases are that say who has them, which images on NFSv3 cannot
SURE = "--i-made-sure-it-is-off"
CONF = f'file_lockspace_dir = "{LOCKSPACE}"\n'
pytestmark = [pytest.mark.needs(*WAITING),
              pytest.mark.last]


def fenced(host, dead, *options, rc=None, under=""):
    printed = {(): "leasehold fenced HOST", (SURE,): "leasehold fenced HOST --i-made-sure-it-is-off"}
    words = documented(printed[options], HOST=dead)
    for _ in range(3):  # the monitor's answer to who has just come may be EPERM, as in storage.persistently
        result = host.run(f"{under} {labs.GUEST_DIR}/{shlex.join(words)}", timeout=240)
        if "EPERM: problem getting command descriptions" not in result.out:
            break
    assert rc is None or result.rc == rc, str(result)
    return result


@pytest.fixture(scope="module")
def kinds(bring_up):
    if not labs.command().exists():
        pytest.skip(f"{labs.command()} was not built")
    made = {name: bring_up(name) for name in WAITING}
    for name, kind in made.items():
        if name.startswith("ceph"):
            kind.be_patient(storages.CEPH_DEFAULTS)
    yield made
    for name, kind in made.items():
        if name.startswith("ceph"):
            kind.be_patient()


SOME = 3  # calls that fail, spread over all; and one of those that take away what was needed


def with_faults(living, limit):
    """The dead host is told dead again, and a system call of that fails, in its helpers as well; with what is left behind."""
    report = "/run/injected"

    def told(number):
        said = fenced(living, "h1", SURE, under=f"{labs.GUEST_DIR}/inject {report} {number} 0")
        how = [line.partition(" ") for line in living.ok(f"cat {report}").splitlines()]
        left = living.ok("ls -d /run/leasehold-fenced-* 2>/dev/null; ip -o link | cut -d: -f2; ip -o addr show dev eth1")
        return said, how, left
    plain = told(0)
    yield plain
    calls = [text.split() for word, _, text in plain[1] if word == "fallible"]
    [*_, last_open] = [call for call in calls if call[1] == "openat"]
    for number, *_ in [*calls[len(calls) // limit // 2::len(calls) // limit], last_open]:
        yield told(number)


@pytest.fixture(scope="module")
def deaths(kinds, request):
    """h1 and h2 have a guest on each storage, and h1 dies. {what was asked before and after: answer}, the guests of h2,
    their images, for each storage the seconds from the order to the start of the dead guest's successor, what h1 was told
    when it lived, and {what was started before the order: answer}."""
    dying, living = next(iter(kinds.values())).clients
    guests = {name: (kind.actor(dying), kind.image(), kind.actor(living), kind.image()) for name, kind in kinds.items()}
    for holder, image, neighbour, other in guests.values():
        for actor, guest, number, path in ((holder, "db", 1, image), (neighbour, "web", 2, other)):
            actor.ok("register", guest, number, path)
            actor.ok("acquire", guest)
    said = {"alive": fenced(living, "h1", SURE)}
    after_that = {name: guests[name][0].ask("acquire", "db") for name in kinds}
    named = kinds["nfs3"].image() if "nfs3" in kinds else None
    if named:
        dying.ok(f"mkdir -m 0700 {LOCKSPACE}")
        dying.actor(dying.lab.unique("named"), CONF).ok("register", "db", 1, named)
        living.ok(f"printf '%s' '{CONF}' >/run/fenced.conf")
    dying.kill()
    takers = {name: kind.actor(living) for name, kind in kinds.items()}
    refused = {}
    for name in kinds:  # on CephFS a start waits until it is refused
        starter = takers[name] if name == "nfs3" else living.actor(living.lab.unique(name), accidents.IMPATIENT)
        refused[name] = starter.ask("register", "late", 3, guests[name][1], timeout=60)
    said["unsure"] = fenced(living, "h1")
    if named:
        refused["the same guest"] = takers["nfs3"].ask("register", "db", 1, guests["nfs3"][1])
        refused[LOCKSPACE] = living.actor(living.lab.unique("named"), CONF).ask("register", "late", 3, named)
        said["inspected"] = living.run(f"{labs.GUEST_DIR}/leasehold inspect --config /run/fenced.conf {named}")
    start = time.monotonic()
    said["sure"] = fenced(living, "h1", SURE)
    free = {}
    for name, taker in takers.items():
        labs.wait_until(lambda name=name, taker=taker: taker.ask("register", "late", 3, guests[name][1], timeout=60),
                        f"the image on {name} is free", 60)
        free[name] = time.monotonic() - start
    said["again"] = fenced(living, "h1", SURE)
    said["with faults"] = [*with_faults(living, 100 if request.config.getoption("--long") else SOME)] if labs.inject().exists() else []
    yield said, guests, free, after_that, refused
    for _, _, neighbour, _ in guests.values():
        neighbour.quit()
    for taker in takers.values():
        taker.quit()


def test_a_host_that_answers_is_not_told_dead(deaths):
    said, _, _, after_that, _ = deaths
    assert said["alive"].rc == 75 and "lives" in said["alive"].out, str(said["alive"])
    assert all(after_that.values()), [*map(str, after_that.values())]


def test_without_being_told_that_the_host_is_off_it_shows_what_would_be_done_and_does_nothing(deaths, kinds):
    said, _, _, _, refused = deaths
    assert said["unsure"].rc == 2 and "--i-made-sure-it-is-off" in said["unsure"].out, str(said["unsure"])
    assert said["unsure"].out.count("would") == ("nfs3" in kinds) + len([name for name in kinds if name != "nfs3"])
    assert all(answer.status == "refused" for answer in refused.values()), [*map(str, refused.values())]


@pytest.mark.needs("nfs3")
def test_the_dead_host_is_named_where_its_lease_can_say_so(deaths):
    said, _, _, _, refused = deaths
    start, look = refused[LOCKSPACE], said["inspected"].out
    for text in (start.text, look):
        assert "guest 'db'" in text and "host 'h1'" in text and "run: leasehold fenced h1" in text, f"{start}\n{look}"


@pytest.mark.needs("nfs3")
@pytest.mark.parametrize("what", ["nfs3", "the same guest"])
def test_a_refusal_names_the_order_where_the_host_is_not_known(deaths, what):
    answer = deaths[4][what]
    assert answer.status == "refused" and "run: leasehold fenced HOST" in answer.text, str(answer)


@pytest.mark.needs("cephfs", "cephfuse")
@pytest.mark.parametrize("name", [name for name in WAITING if name != "nfs3"])
def test_a_start_that_waits_for_a_dead_client_names_the_order(deaths, name):
    answer = deaths[4][name]
    assert answer.status == "refused" and "did not answer" in answer.text, str(answer)
    assert "run leasehold fenced HOST" in answer.text, str(answer)


@pytest.mark.parametrize("name", WAITING)
def test_the_guests_of_a_fenced_host_start_elsewhere_at_once(deaths, table, name):
    said, _, free, _, _ = deaths
    assert said["sure"].rc == 0, str(said["sure"])
    table.add(name, "host killed, leasehold fenced", f"lease free after: {free[name]:.0f} s")
    assert said["again"].rc == 0, str(said["again"])


@pytest.mark.parametrize("name", WAITING)
def test_nobody_else_s_lease_goes(deaths, kinds, actor, name):
    _, guests, *_ = deaths
    _, _, neighbour, other = guests[name]
    neighbour.ok("acquire", "web")
    assert "guest 'web'" in actor(kinds[name].clients[1], kinds[name].plugin_conf).refused("register", "thief", 4, other)


def test_the_living_host_keeps_its_own_number_and_addresses(deaths, kinds):
    living = next(iter(kinds.values())).clients[1]
    addresses = living.ok("ip -o addr show dev eth1")
    assert "10.77.0.1/" not in addresses
    if "nfs3" in kinds:
        assert int(living.ok("cat /proc/sys/fs/nfs/nsm_local_state")) < 1000


def test_whatever_fails_while_a_host_is_told_dead_it_is_told_or_it_says_that_it_is_not(deaths, table):
    """What a server is told counts, and nobody is left with the dead host's address."""
    if not deaths[0]["with faults"]:
        pytest.skip(f"{labs.inject()} was not built")
    (plain, _, left), *faults = deaths[0]["with faults"]
    assert plain.rc == 0, str(plain)
    for said, how, behind in faults:
        words = [word for word, _, _ in how]
        assert "hangs" not in words and said.rc in (0, 1, 75) and (said.rc or said.out == plain.out), f"{how} {said}"
        assert behind == left, f"{how} {said}"
    failed = [text for _, how, _ in faults for word, _, text in how if word == "failed"]
    table.add("fenced", f"{len(failed)} of its system calls fail", *failed)
    assert failed


def test_hosts_that_nobody_knows_and_the_host_itself_are_refused(deaths, kinds):
    living = next(iter(kinds.values())).clients[1]
    assert "nobody knows" in fenced(living, "stranger", SURE, rc=1).out
    assert "is this host" in fenced(living, living.name, SURE, rc=1).out
    assert "is this host" in fenced(living, living.address, SURE, rc=1).out

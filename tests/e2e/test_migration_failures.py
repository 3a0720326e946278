# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""A migration is stopped at each of its steps, and there somebody dies: either QEMU, either libvirtd, or virsh.

Whatever happens: exactly one host may run the guest, the image is never free while a QEMU of the guest lives, nothing
is left on the other host, and when the guest's QEMU is dead it starts again at once, anywhere.
"""

import contextlib
import re
import subprocess

import expect
import hosts
import pytest
from conftest import STOCK
from steps import begun, confirming, copying, finished, finishing, performed, prepared, switching


# The step of the thief needs to know leasehold's lock.
STEPS = (begun, prepared, copying, switching, performed, *([finishing] if expect.LEASEHOLD else []), finished,
         confirming)


# --- who dies

def source_qemu(source, target, guest, migration):
    source.kill_qemu(guest)


def target_qemu(source, target, guest, migration):
    target.kill_qemu(guest)


def source_libvirtd(source, target, guest, migration):
    source.kill_libvirtd()


def target_libvirtd(source, target, guest, migration):
    target.kill_libvirtd()


def virsh(source, target, guest, migration):
    migration.kill()
    migration.wait(timeout=hosts.PATIENCE)


# What must come of it: the guest stays, it has moved, or (where its QEMU was killed) it is gone.
STAYS, MOVES, GONE = "stays", "moves", "is gone"
BEFORE = dict(begun=STAYS, prepared=STAYS, copying=STAYS, switching=STAYS)
AFTER = dict(finished=MOVES, confirming=MOVES)
EXPECTED = {
    source_qemu: {**dict.fromkeys(BEFORE, GONE), "performed": MOVES, "finishing": MOVES, **AFTER},
    target_qemu: dict(prepared=STAYS, copying=STAYS, switching=STAYS, performed=STAYS, finishing=STAYS, finished=GONE,
                      confirming=GONE),
    source_libvirtd: {**BEFORE, "performed": MOVES, "finishing": MOVES, **AFTER},
    target_libvirtd: {**BEFORE, "performed": STAYS, "finishing": STAYS, **AFTER},
    virsh: {**BEFORE, "performed": STAYS, "finishing": MOVES, **AFTER},
}


def left_behind(host, *images):
    """What libvirtd on this host still has open of the images and of QEMUs: between two calls that is nothing."""
    mine = [str(image) for image in images]
    return [what for what in host.libvirtd_descriptors().values() if what in mine or "pidfd" in what]


def only_one_may_run(source, target, guest, outcome):
    """The guest runs where it should; what is left of it on the other side does not resume, and is got rid of."""
    here, there = {STAYS: (source, target), MOVES: (target, source), GONE: (None, None)}[outcome]
    def settled():
        return all(host.state(guest) in ("running", "paused", "absent", "shut off") for host in (source, target))
    hosts.wait_until(settled, "libvirt has come to a decision")
    if outcome == GONE:
        for host in (source, target):
            if host.state(guest) == "paused":  # libvirt leaves that decision to the administrator
                host.destroy(guest)
            hosts.wait_until(lambda: host.state(guest) in ("absent", "shut off"), f"{host.name} has no {guest.name}")
        return
    hosts.wait_until(lambda: here.state(guest) in ("running", "paused"), f"{guest.name} is on {here.name}")
    if here.state(guest) == "paused":
        here.virsh("resume", guest.name)
    here.wait_state(guest, "running")
    if there.state(guest) == "paused":
        error = there.refused("resume", guest.name)
        if there.state(guest) == "paused":  # libvirt did not get rid of it meanwhile
            assert not expect.LEASEHOLD or guest.name in error and here.name in error, error
            expect.runs(here, guest)
            there.kill_qemu(guest)
    hosts.wait_until(lambda: there.state(guest) in ("absent", "shut off"), f"{guest.name} is gone from {there.name}")
    expect.runs(here, guest)


def wait_for_the_end(migration, source, victim):
    """libvirtd 7.0 does not see that its QEMU has died while RAM is sent, and works on that migration for ever. It is
    restarted then, as an administrator would do; what happens to the guest and its image must be the same."""
    if victim is not source_qemu or hosts.libvirt_version() > (7, 0):
        migration.communicate(timeout=hosts.PATIENCE)
        return
    try:
        migration.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        source.kill_libvirtd()
        migration.communicate(timeout=hosts.PATIENCE)


def is_shown(parameters):
    """The stock QEMU's own image locks matter where a QEMU dies that has, or has just given up, the image."""
    return parameters["emulator"] != STOCK or (parameters["victim"] in (source_qemu, target_qemu)
                                               and parameters["step"] in (switching, performed, finished))


def depends_on_the_release(parameters):
    """What libvirt does when it breaks off a migration."""
    return parameters["emulator"] != STOCK and (parameters["victim"] in (target_qemu, virsh) or
                                                parameters["step"] is finishing)


@pytest.mark.parametrize("victim, step", [(victim, step) for victim, outcomes in EXPECTED.items() for step in STEPS
                                          if step.__name__ in outcomes],
                         ids=lambda function: function.__name__)
@pytest.mark.short(when=is_shown, other_release=depends_on_the_release)
def test_whoever_dies_at_whatever_step_exactly_one_host_may_run_the_guest(alpha, beta, image, guest, emulator, victim,
                                                                          step):
    disk = image()
    mover = guest(disk, emulator=emulator)
    alpha.boot(mover)
    with step(alpha, beta, mover) as (migration, go_on):
        expect.leased(disk)
        victim(alpha, beta, mover, migration)
        go_on()
        wait_for_the_end(migration, alpha, victim)
    came_to_a_good_end(alpha, beta, mover, EXPECTED[victim][step.__name__], disk)


def came_to_a_good_end(alpha, beta, mover, outcome, disk):
    for host in (alpha, beta):
        host.revive()
    only_one_may_run(alpha, beta, mover, outcome)
    for host in (alpha, beta):
        host.revive()
        assert not left_behind(host, disk)
    assert [len(host.qemus()) for host in (alpha, beta)] == {STAYS: [1, 0], MOVES: [0, 1], GONE: [0, 0]}[outcome]
    if outcome == GONE:
        expect.not_leased(disk)
    else:
        here, there = (alpha, beta) if outcome == STAYS else (beta, alpha)
        expect.taken(there, disk, by=(mover, here))
        here.kill_qemu(mover)
    expect.not_locked(disk)
    here, there = (alpha, beta) if outcome == MOVES else (beta, alpha)
    here.start_guest(mover)  # at once, on the host where it was not
    expect.taken(there, disk, by=(mover, here))


@pytest.mark.parametrize("victim, step, outcome",
                         [(source_libvirtd, performed, STAYS), (source_libvirtd, finished, MOVES),
                          (target_libvirtd, performed, STAYS), (target_libvirtd, finished, MOVES)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_peer_to_peer_too_exactly_one_host_may_run_the_guest(alpha, beta, lab, image, guest, victim, step, outcome):
    """The source's libvirtd drives the migration itself: when it dies the destination loses its peer as well."""
    disk = image()
    mover = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(mover)
    with step(alpha, beta, mover, "--p2p") as (migration, go_on):
        victim(alpha, beta, mover, migration)
        go_on()
        migration.communicate(timeout=hosts.PATIENCE)
    came_to_a_good_end(alpha, beta, mover, outcome, disk)


@pytest.mark.parametrize("victim, step, outcome",
                         [(source_qemu, prepared, GONE), (source_qemu, performed, MOVES),
                          (target_qemu, prepared, STAYS), (target_qemu, performed, STAYS),
                          (target_libvirtd, performed, STAYS)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_when_a_suspended_guest_migrates_too_exactly_one_host_may_run_it(alpha, beta, lab, image, guest, victim, step,
                                                                         outcome):
    disk = image()
    mover = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(mover)
    alpha.suspend(mover)
    with step(alpha, beta, mover) as (migration, go_on):
        victim(alpha, beta, mover, migration)
        go_on()
        migration.communicate(timeout=hosts.PATIENCE)
    came_to_a_good_end(alpha, beta, mover, outcome, disk)


def test_when_the_source_dies_in_post_copy_the_destination_keeps_the_image(alpha, beta, lab, image, guest):
    """Half of the guest's RAM died with the source. Nobody may start it before the administrator has ended it."""
    disk = image()
    mover = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(mover)
    migration = alpha.slow_migration(beta, mover, "--postcopy")
    alpha.ok("migrate-setspeed", mover.name, "1", "--postcopy")
    alpha.ok("migrate-postcopy", mover.name)
    hosts.wait_until(lambda: beta.state(mover) == "running" or migration.poll() is not None, "it runs over there")
    with contextlib.suppress(AssertionError, FileNotFoundError):
        alpha.kill_qemu(mover)
    try:
        migration.communicate(timeout=10 if hosts.libvirt_version() <= (7, 0) else hosts.PATIENCE)
    except subprocess.TimeoutExpired:
        if hosts.libvirt_version() > (7, 0):
            raise
        expect.taken(alpha, disk)
        for host in (alpha, beta):
            host.kill_libvirtd()
        migration.communicate(timeout=hosts.PATIENCE)
        pytest.skip("libvirtd 7.0 does not know QEMU's postcopy-paused and waits for ever; the image was taken")
    expect.taken(alpha, disk)
    alpha.refused("start", mover.name)
    assert len(beta.qemus()) == 1 and not alpha.qemus()
    beta.kill_qemu(mover)
    expect.not_leased(disk)
    alpha.ok("start", mover.name)


# --- refused, and waiting

@pytest.mark.skipif(not expect.LEASEHOLD, reason="about leasehold's wait")
def test_a_destination_that_is_refused_at_the_end_says_why_and_the_source_goes_on(alpha, beta, lab, image, guest,
                                                                                  emulator):
    """Somebody is quicker than the destination, which gives up after handoff_wait; the source resumes."""
    disk = image()
    mover = guest(disk, emulator=emulator)
    with beta.configured(plugin_conf="handoff_wait = 1\n"):
        alpha.boot(mover)
        with finishing(alpha, beta, mover) as (migration, let_go):
            hosts.wait_until(lambda: not beta.qemus(), "the destination has given up")
            let_go()
            _, error = migration.communicate(timeout=hosts.PATIENCE)
        assert migration.returncode != 0
        assert "resource busy" in error and str(disk) in error, error
        assert "waited 1 s" in error and "handoff_wait" in error, error
        came_to_a_good_end(alpha, beta, mover, STAYS, disk)


# --- the same guest twice

def lock_state(host, guest):
    """What the lock manager gave libvirtd to keep (libvirt keeps it in the guest's status file)."""
    found = re.search("<lockstate>(.*)</lockstate>", (host.dir / "run" / "qemu" / f"{guest.name}.xml").read_text())
    return found.group(1) if found else None


def forge_state(host, guest, state):
    """libvirtd finds this state when it comes back."""
    host.kill_libvirtd()
    path = host.dir / "run" / "qemu" / f"{guest.name}.xml"
    text = re.sub("\\s*<lockstate>.*</lockstate>", "", path.read_text())
    path.write_text(re.sub("(<monitor )", f"<lockstate>{state}</lockstate>\\1", text, count=1))
    host.start_libvirtd()


@pytest.mark.skipif(not expect.LEASEHOLD, reason="about leasehold's state")
def test_no_state_stale_or_forged_lets_a_second_one_run_beside_a_suspended_guest(alpha, beta, lab, image, guest):
    """Its QEMU can be started: nobody can tell it from the destination of a migration. It never runs."""
    disk = image()
    twin = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(twin)
    alpha.suspend(twin)
    stale = lock_state(alpha, twin)
    alpha.resume(twin)
    alpha.suspend(twin)
    true = lock_state(alpha, twin)
    assert stale and true and stale != true
    with beta.configured(plugin_conf="handoff_wait = 0\n"):
        beta.start_guest(twin, paused=True)
        expect.names_holder(beta.refused("resume", twin.name), disk, twin, alpha)
        for state in (stale, true, f"leasehold1:{twin.uuid}:00000001", "leasehold1:nonsense", "x" * 3000):
            forge_state(beta, twin, state)
            assert lock_state(beta, twin) == state
            error = beta.refused("resume", twin.name)
            assert twin.name in error, error
            assert beta.state(twin) == "paused" and alpha.state(twin) == "paused"
    expect.taken(beta, disk)
    alpha.resume(twin)
    beta.refused("resume", twin.name)
    expect.runs(alpha, twin)
    beta.destroy(twin)
    expect.taken(beta, disk, by=(twin, alpha))


@pytest.mark.skipif(not expect.LEASEHOLD, reason="about leasehold's state")
def test_a_guest_whose_qemu_died_suspended_and_that_runs_elsewhere_now_does_not_start_here(alpha, beta, lab, image,
                                                                                           guest):
    disk = image()
    twin = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(twin)
    alpha.suspend(twin)
    alpha.kill_libvirtd()
    for qemu in alpha.qemus():
        hosts.kill_and_wait(qemu)
    beta.start_guest(twin)
    alpha.start_libvirtd()
    expect.names_holder(alpha.refused("start", twin.name), disk, twin, beta)
    expect.runs(beta, twin)

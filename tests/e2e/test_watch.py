# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""leasehold watch beside a real libvirtd. A lease is lost here as an administrator loses one: its file is removed from
the lockspace under a running guest. What storage does by itself is in tests/lab."""

import contextlib
import json
import os
import signal
import socket
import time

import hosts
import pytest

COMMAND = hosts.command()

pytestmark = [pytest.mark.skipif(not COMMAND.exists(), reason=f"{COMMAND} was not built"),
              pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")]


@pytest.fixture(scope="module")
def lockspace(lab):
    directory = lab.dir / lab.unique("watched-lockspace")
    directory.mkdir(mode=0o700)
    text = f'file_lockspace_dir = "{directory}"\n'
    with lab.host("alpha").configured(plugin_conf=text), lab.host("beta").configured(plugin_conf=text):
        yield directory


@pytest.fixture
def running(alpha, lockspace, lab, image, guest):
    """running(on_lockfailure=...): a guest that runs under a lease in the lockspace."""
    def run(**options):
        made = guest(image(), emulator=lab.emulator_without_locks, **options)
        alpha.boot(made)
        return made
    return run


def lose_lease(lockspace, image):
    def file():
        return next((each for each in lockspace.glob("file-*") if str(image) in each.read_text(errors="replace")
                     and hosts.locks_on(each)), None)
    hosts.wait_until(file, f"{image} is leased").unlink()


def once(host, *options):
    """One look: exit status, and what happened."""
    result = host.inside(COMMAND, "watch", "--once", "--json", *options)
    return result.rc, [json.loads(line) for line in result.out.splitlines()]


def events(lines, guest):
    """{event: what was said about the guest, line by line}"""
    said = {}
    for line in lines:
        if line.get("uuid") == guest.uuid:
            said[line["event"]] = said.get(line["event"], "") + line["text"] + "\n"
    return said


class Watch:
    """The watcher in the background, as leasehold-watch.service runs it."""

    def __init__(self, host, *options, environment=None):
        self.host, self.log = host, host.dir / "log" / "watch.log"
        self.log.unlink(missing_ok=True)
        self.process = host.spawn(COMMAND, "watch", "--interval", "1", *options, env=environment, log="watch.log")

    def says(self, *parts):
        def said():
            return next((line for line in self.text().splitlines() if all(part in line for part in parts)), None)
        return hosts.wait_until(said, f"the watcher says {parts}; it said: {self.text()}")

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def stop(self):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(hosts.only_child(self.process.pid), signal.SIGKILL)
        self.process.wait(timeout=hosts.PATIENCE)


@pytest.fixture
def watch(alpha):
    made = []

    def start(*options, **keywords):
        made.append(Watch(alpha, *options, **keywords))
        return made[-1]
    yield start
    for each in made:
        each.stop()


def test_as_long_as_no_lease_is_lost_nothing_happens(alpha, beta, lockspace, lab, running):
    mover = running(on_lockfailure="poweroff")
    status, lines = once(alpha)
    assert status == 0 and events(lines, mover) == {}
    assert lines[-1]["event"] == "checked" and lines[-1]["guests"] == 1 and lines[-1]["leases"] == 1
    alpha.suspend(mover)
    assert once(alpha)[0] == 0
    alpha.resume(mover)
    assert alpha.migrate_to(beta, mover, "--live")
    assert once(alpha)[0] == 0 and once(beta)[0] == 0
    assert beta.state(mover) == "running"


@pytest.mark.parametrize("wish, state", [("", "paused"), ("pause", "paused"), ("poweroff", "shut off"),
                                         ("restart", "running"), ("ignore", "running")])
def test_a_guest_that_lost_its_lease_gets_what_its_on_lockfailure_says(alpha, lockspace, running, wish, state):
    victim = running(on_lockfailure=wish)
    pid = alpha.pid_here(victim)
    lose_lease(lockspace, victim.disks[0].path)
    status, lines = once(alpha)
    assert status == 3
    said = events(lines, victim)
    disk = victim.disks[0].path
    assert f"the lease on '{disk}' was deleted from its lockspace" in said["lost"] and "leasehold inspect" in said["lost"]
    assert (wish or "no on_lockfailure: pause") in said["acted"]
    alpha.wait_state(victim, state)
    if wish == "restart":
        assert alpha.pid_here(victim) != pid
        assert once(alpha)[0] == 0, "it has a lease again"
    if wish == "ignore":
        assert alpha.pid_here(victim) == pid
    if state == "paused":
        assert "was deleted from its lockspace" in alpha.refused("resume", victim.name)


def test_a_restart_into_another_guest_s_arms_leaves_the_guest_off(alpha, beta, lockspace, lab, running, guest):
    victim = running(on_lockfailure="restart")
    # Two leases of one lockspace and host would meet in the companion, so the thief is on another host.
    lose_lease(lockspace, victim.disks[0].path)
    thief = guest(victim.disks[0].path, emulator=lab.emulator_without_locks)
    beta.start_guest(thief)
    _, lines = once(alpha)
    said = events(lines, victim)["acted"]
    assert "was powered off" in said and f"in use by guest '{thief.name}'" in said, said
    assert alpha.state(victim) == "shut off" and beta.state(thief) == "running"


def test_a_transient_guest_is_restarted_too(alpha, lockspace, running):
    victim = running(on_lockfailure="restart")
    alpha.ok("undefine", victim.name)
    pid = alpha.pid_here(victim)
    lose_lease(lockspace, victim.disks[0].path)
    _, lines = once(alpha)
    assert "started anew" in events(lines, victim)["acted"], lines
    assert alpha.state(victim) == "running" and alpha.pid_here(victim) != pid


@pytest.mark.waits
def test_a_restart_comes_to_its_end_whatever_keeps_it_up(alpha, lockspace, running, watch):
    """libvirt takes longer to power the guest off than the watcher waits for an answer, which is told to end meanwhile."""
    slept, hook = alpha.dir / "slept", alpha.dir / "etc" / "hooks" / "qemu"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f'#!/bin/sh\n[ "$2" != stopped ] || [ -e {slept} ] || {{ touch {slept}; sleep 33; }}\n')
    hook.chmod(0o755)
    with alpha.configured(**alpha.configuration):  # libvirtd looks for hooks when it starts
        victim = running(on_lockfailure="restart")
        pid = alpha.pid_here(victim)
        watcher = watch()
        lose_lease(lockspace, victim.disks[0].path)
        hosts.wait_until(slept.exists, "the guest is being powered off")
        os.kill(hosts.only_child(watcher.process.pid), signal.SIGTERM)
        watcher.says(victim.name, "did not do within 30 s")
        watcher.says(victim.name, "it was started anew")
        watcher.process.wait(timeout=hosts.PATIENCE)
        alpha.wait_state(victim, "running")
        assert alpha.pid_here(victim) != pid
        hook.unlink()


def test_of_two_leases_the_lost_one_is_named(alpha, lockspace, lab, image, guest):
    first, second = image("first.img"), image("second.img")
    victim = guest(first, second, emulator=lab.emulator_without_locks)
    alpha.boot(victim)
    lose_lease(lockspace, second)
    _, lines = once(alpha)
    said = events(lines, victim)
    assert f"'{second}'" in said["lost"] and f"'{first}'" not in said["lost"]


def test_dry_run_only_reports(alpha, lockspace, running):
    victim = running(on_lockfailure="poweroff")
    lose_lease(lockspace, victim.disks[0].path)
    status, lines = once(alpha, "--dry-run")
    assert status == 3 and "poweroff" in events(lines, victim)["acted"]
    assert alpha.state(victim) == "running"


def test_the_default_is_for_guests_that_say_nothing(alpha, lockspace, running):
    victim = running()
    lose_lease(lockspace, victim.disks[0].path)
    once(alpha, "--default", "poweroff")
    assert alpha.state(victim) == "shut off"


def test_a_suspended_guest_that_lost_its_lease_is_left_alone_and_reported(alpha, lockspace, running):
    victim = running()
    alpha.suspend(victim)
    lose_lease(lockspace, victim.disks[0].path)
    _, lines = once(alpha)
    assert "does not run" in events(lines, victim)["acted"]
    assert alpha.state(victim) == "paused"


def test_other_guests_are_not_touched(alpha, lockspace, lab, running, image, guest):
    victim = running()
    lose_lease(lockspace, victim.disks[0].path)
    other = guest(image("other.img"), emulator=lab.emulator_without_locks)
    alpha.boot(other)
    _, lines = once(alpha)
    assert events(lines, other) == {} and alpha.state(other) == "running" and alpha.state(victim) == "paused"


def test_the_watcher_tells_once_and_acts_again_when_somebody_lets_the_guest_run(alpha, lockspace, running, watch):
    watcher = watch()
    victim = running()
    lose_lease(lockspace, victim.disks[0].path)
    watcher.says(victim.name, "was paused")
    alpha.wait_state(victim, "paused")
    alpha.hmp(victim, "cont")
    alpha.wait_state(victim, "running")
    alpha.wait_state(victim, "paused")
    assert watcher.text().count("was deleted from its lockspace") == 1, watcher.text()


def test_a_libvirtd_that_is_away_is_asked_until_it_is_back(alpha, lockspace, running, watch):
    victim = running()
    alpha.kill_libvirtd()
    watcher = watch()
    lose_lease(lockspace, victim.disks[0].path)
    watcher.says(victim.name, "libvirt does not answer")
    alpha.start_libvirtd()
    watcher.says(victim.name, "was paused")
    alpha.wait_state(victim, "paused")


def test_no_lease_outlives_its_qemu_in_the_watcher(alpha, beta, lockspace, lab, running, watch, guest):
    watch()
    for _ in range(5):
        mortal = running()
        time.sleep(0.3)
        alpha.kill_qemu(mortal)
        heir = guest(mortal.disks[0].path, emulator=lab.emulator_without_locks)
        beta.start_guest(heir)
        beta.kill_qemu(heir)


def test_a_guest_from_before_leasehold_is_named(alpha, lab, image, guest, watch):
    with alpha.configured(lock_manager="none"):
        old = guest(image())
        alpha.boot(old)
    status, lines = once(alpha)
    assert "started without leasehold" in events(lines, old)["unprotected"]
    assert alpha.state(old) == "running"


# Takes the vessel of the process out of it and keeps it where its own would be: who looks finds that guest here, too.
# Puts into a vessel of its own what another one's says. Numbers and inodes of the ends are where core/qemu/vessel.cpp has
# them in its header.
IMPOSTOR = """
import ctypes, os, socket, struct, sys, time
SYS_pidfd_getfd = 438
other = socket.socket(fileno=ctypes.CDLL(None).syscall(SYS_pidfd_getfd, os.pidfd_open(int(sys.argv[1])), 251, 0))
message, [(_, _, rights)], _, _ = other.recvmsg(1 << 16, socket.CMSG_SPACE(1000), socket.MSG_PEEK)
other.close()
ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
for number, end in zip((250, 251), ends):
    os.dup2(end.fileno(), number)
forged = bytearray(message)
struct.pack_into("=iiQQ", forged, 64, 250, 251, os.fstat(250).st_ino, os.fstat(251).st_ino)
ends[0].sendmsg([forged], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
print("ready", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def impostor_of(host, victim):
    """A process that has the victim's vessel where its own would be: its pid, as the host knows it."""
    log = host.dir / "log" / "impostor.log"
    log.unlink(missing_ok=True)
    impostor = host.spawn("/usr/bin/python3", "-c", IMPOSTOR, str(host.pid_here(victim)), log="impostor.log")
    try:
        hosts.wait_until(lambda: log.exists() and "ready" in log.read_text(), "the impostor has the vessel")
        yield hosts.inner_pid(hosts.only_child(impostor.pid))
    finally:
        os.kill(hosts.only_child(impostor.pid), signal.SIGKILL)
        impostor.wait()


def test_who_calls_itself_a_guest_s_qemu_does_not_get_that_guest_stopped(alpha, lockspace, running):
    """A QEMU that was broken into can write any UUID into its vessel. libvirt knows better whose QEMU it is."""
    victim = running(on_lockfailure="ignore")
    with impostor_of(alpha, victim) as pid:
        lose_lease(lockspace, victim.disks[0].path)
        _, lines = once(alpha)
        by_pid = {line["pid"]: line for line in lines if line["event"] in ("acted", "failed")}
        assert by_pid[pid]["event"] == "failed" and "libvirt does not know process" in by_pid[pid]["text"], lines
        assert by_pid[alpha.pid_here(victim)]["event"] == "acted"


def test_a_guest_that_is_off_is_not_started_for_who_has_its_old_pid(alpha, lockspace, running):
    """A libvirtd that was killed has left the guest's pid file, and the number is somebody else's by now."""
    off = running(on_lockfailure="restart")
    with impostor_of(alpha, off) as pid:
        alpha.destroy(off)
        (alpha.dir / "run" / "qemu" / f"{off.name}.pid").write_text(str(pid))
        lose_lease(lockspace, off.disks[0].path)
        _, lines = once(alpha)
        [line] = [line for line in lines if line["event"] in ("acted", "failed")]
        assert line["event"] == "failed" and "libvirt does not know process" in line["text"], lines
        assert alpha.state(off) == "shut off"


def test_systemd_is_told_that_it_is_ready_and_that_it_lives(alpha, lab, lockspace, running, watch):
    running()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = lab.dir / "notify"
        manager.bind(str(address))
        manager.settimeout(hosts.PATIENCE)
        watch(environment={"NOTIFY_SOCKET": str(address)})
        assert manager.recv(4096) == b"READY=1"
        heard = [manager.recv(4096) for _ in range(6)]
        assert set(heard) == {b"WATCHDOG=1", b"STATUS=1 guest, 1 lease, 0 lost"}, heard


def test_a_host_without_guests_is_alive_too(alpha, lab, watch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = lab.dir / "notify-idle"
        manager.bind(str(address))
        manager.settimeout(hosts.PATIENCE)
        watch(environment={"NOTIFY_SOCKET": str(address)})
        heard = [manager.recv(4096) for _ in range(5)]
        assert heard == [b"READY=1", *[b"STATUS=0 guests, 0 leases, 0 lost", b"WATCHDOG=1"] * 2]


@pytest.mark.parametrize("words, part", [(["--default", "explode"], "poweroff, restart, pause or ignore"),
                                         (["--interval", "0"], "at least 1"), (["--interval", "-1"], "at least 1"),
                                         (["guest"], "no operands")])
def test_wrong_usage_is_refused(words, part):
    result = hosts.run(COMMAND, "watch", "--once", *words)
    assert result.rc == 2 and part in result.err

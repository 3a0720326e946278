# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The steps at which a migration can be stopped, in their order.

Each is a context manager STEP(source, target, guest): inside the with block the migration stands there. It gives the
virsh that drives the migration, and a function that lets it go on.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import struct
import threading

import hosts
from gate import CALL, REPLY, Gate


@contextlib.contextmanager
def at_gate(source, target, guest, options, host, step, of=CALL):
    with Gate(host, step, of) as gate:
        words = source.migrate_words(target, guest, "--live", *options, to=gate.uri if host is target else None)
        migration = source.virsh_in_background(*words, through=gate.uri if host is source else None)
        gate.wait(migration)
        yield migration, gate.open


@contextlib.contextmanager
def copying(source, target, guest):
    """RAM flows, the guest runs."""
    migration = source.slow_migration(target, guest)
    yield migration, lambda: source.virsh("migrate-setspeed", guest.name, "1000")


def waiting_bytes(pid):
    """What waits in the TCP connections of a process's network, to be sent or to be read (proc(5), /proc/net/tcp)."""
    total = 0
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            state, queues = line.split()[3:5]
            if state == "01":  # established; of a listening one the queue is of callers
                total += sum(int(queue, 16) for queue in queues.split(":"))
    return total


@contextlib.contextmanager
def switching(source, target, guest):
    """The guest has stopped at the source, which has released its lease; the rest of its RAM is on the way."""
    migration = source.slow_migration(target, guest)
    qemu = target.qemu_pid(guest)
    ends = source.qemu_pid(guest), qemu

    def go_on():
        with contextlib.suppress(ProcessLookupError):
            os.kill(qemu, signal.SIGCONT)
    try:
        # A QEMU that waits because nothing more fits between the two does not look at its limits. So RAM trickles (a
        # page in 100 ms; 200 KiB fit), what was sent before is read first, and what is to be said is said by a virsh that
        # is there already.
        source.qmp(guest, '{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 4096}}')
        with source.connected_virsh() as virsh:
            hosts.wait_until(lambda: not any(map(waiting_bytes, ends)), "the destination has read what was sent")
            os.kill(qemu, signal.SIGSTOP)  # it does not read
            virsh.stdin.write(f"migrate-setmaxdowntime {guest.name} 1000000\n")
        source.wait_state(guest, "paused")
        yield migration, go_on
    finally:
        go_on()


def begun(source, target, guest, *options):
    """The source has been asked (Inquire), the destination does not know yet."""
    return at_gate(source, target, guest, options, target, "prepare")


def prepared(source, target, guest, *options):
    """The destination's QEMU is there and has joined."""
    return at_gate(source, target, guest, options, target, "prepare", REPLY)


def performed(source, target, guest, *options):
    """The destination's QEMU has all RAM, the source has stopped, nobody has told the destination to run."""
    return at_gate(source, target, guest, options, target, "finish")


class Thief:
    """Waits for the one lock that decides, and has it the moment the source gives it up, until it lets go."""

    def __init__(self, image):
        self.fd = os.open(image, os.O_RDWR)
        self.has_it = threading.Event()
        threading.Thread(target=self.wait, daemon=True).start()

    def wait(self):
        struct_flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, hosts.MARKS, 1, 0)
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW, struct_flock)
        self.has_it.set()

    def let_go(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextlib.contextmanager
def finishing(source, target, guest):
    """The destination's libvirtd asks for the lease that the source has released, and has to wait for it."""
    thief = Thief(guest.disks[0].path)
    with Gate(target, "finish") as gate:
        migration = source.virsh_in_background(*source.migrate_words(target, guest, "--live", to=gate.uri))
        try:
            gate.wait(migration)
            assert thief.has_it.wait(hosts.PATIENCE)
            gate.open()  # not before: the destination would be quicker than he
            status = target.dir / "run" / "qemu" / f"{guest.name}.xml"
            hosts.wait_until(lambda: "phase='finish3'" in status.read_text(), "the destination finishes")
            yield migration, thief.let_go
        finally:
            thief.let_go()


def finished(source, target, guest, *options):
    """The destination runs, and nobody else knows."""
    return at_gate(source, target, guest, options, target, "finish", REPLY)


def confirming(source, target, guest, *options):
    """The destination runs, the source does not know yet that it has to go."""
    return at_gate(source, target, guest, options, source, "confirm")

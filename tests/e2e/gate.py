# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""A door between virsh and a libvirtd, to stop a migration exactly between two of its steps.

virsh drives a migration with one remote call per step (libvirt, src/libvirt-domain.c, virDomainMigrateVersion3Full):
Begin at the source, Prepare at the destination, Perform at the source, Finish at the destination, and Confirm at the
source.
Everything passes the gate but one call, or the reply to it: that waits until the test has done what it wants to do
at this moment. Neither libvirtd knows of the gate.
"""

import contextlib
import socket
import struct
import threading
import time

# libvirt, src/remote/remote_protocol.x: REMOTE_PROGRAM, and REMOTE_PROC_DOMAIN_MIGRATE_*3_PARAMS
PROGRAM = 0x20008086
STEPS = {"begin": 302, "prepare": 303, "perform": 305, "finish": 306, "confirm": 307}
CALL, REPLY = 0, 1
PATIENCE = 120  # seconds


class Gate:
    def __init__(self, host, step, of=CALL):
        self.host, self.procedure, self.kind = host, STEPS[step], of
        self.path = host.lab.dir / f"{host.lab.unique('gate')}.sock"
        self.uri = f"qemu+unix:///system?socket={self.path}"
        self.somebody_waits, self.opened = threading.Event(), threading.Event()
        self.sockets = []
        self.passed = []  # (procedure, kind) of all messages, for whoever debugs a test

    def __enter__(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.opened.set()
        self.cut()
        self.listener.close()
        self.path.unlink(missing_ok=True)

    def open(self):
        """What waits may pass, and everything after it."""
        self.opened.set()

    def cut(self):
        """All connections through the gate break; what waits is lost."""
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.opened.set()

    def wait(self, migration):
        """Returns when the step has been reached."""
        deadline = time.monotonic() + PATIENCE
        while not self.somebody_waits.wait(0.02):
            assert migration.poll() is None, f"the migration ended early: {migration.communicate()}"
            assert time.monotonic() < deadline, "the migration does not come to this step"

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self.sockets += [client, server]
                with contextlib.suppress(OSError):
                    server.connect(str(self.host.socket))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source, sink):
        """Passes messages on, one by one: each begins with its length, and a header of six words."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = receive(source, 4)
                message = receive(source, struct.unpack(">I", head)[0] - 4)
                program, _, procedure, kind = struct.unpack_from(">IIII", message)
                self.passed.append((procedure, kind))
                if (program, procedure, kind) == (PROGRAM, self.procedure, self.kind):
                    self.somebody_waits.set()
                    self.opened.wait()
                    if hung_up(source):
                        break  # who sent it is dead: it shall have died before it sent it
                sink.sendall(head + message)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def hung_up(end):
    try:
        return end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def receive(source, length):
    data = b""
    while len(data) < length:
        more = source.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data

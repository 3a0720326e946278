# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""A file system that is mounted and works no more: a FUSE file system where every name is a file that cannot be opened, and
below "lost" nothing can even be looked up. Each such call fails with EIO, as on a disk that has died.

The protocol is that of <linux/fuse.h>: a header and the arguments of one call in, a header and its results out."""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading

LOOKUP, GETATTR, INIT = 1, 3, 26
ROOT, FILE, LOST = 1, 2, 3
FORGET, BATCH_FORGET, INTERRUPT = 2, 42, 36  # nobody waits for an answer


def attributes(node):
    mode = stat.S_IFREG | 0o644 if node == FILE else stat.S_IFDIR | 0o755
    return struct.pack("<6Q10I", node, 1 << 20, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(operation, node, arguments):
    """(error, results)"""
    if operation == INIT:
        return 0, struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 1, 1, 65536, 1, 1, 0, 0, *[0] * 7)
    if operation == GETATTR:
        return 0, struct.pack("<QII", 0, 0, 0) + attributes(node)
    if operation == LOOKUP and node == ROOT:
        found = LOST if arguments.rstrip(b"\0") == b"lost" else FILE
        return 0, struct.pack("<QQQQII", found, 0, 0, 0, 0, 0) + attributes(found)
    return -errno.EIO, b""


def serve(device):
    with contextlib.suppress(OSError):  # ENODEV: it is unmounted
        while True:
            call = os.read(device, 1 << 20)
            _, operation, number, node = struct.unpack_from("<IIQQ", call)
            if operation not in (FORGET, BATCH_FORGET, INTERRUPT):
                error, results = answer(operation, node, call[40:])
                os.write(device, struct.pack("<IiQ", 16 + len(results), error, number) + results)


@contextlib.contextmanager
def broken_fs(place):
    """Mounted on that directory inside the with block. OSError where that may not be done here."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"broken", os.fsencode(place), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        server = threading.Thread(target=serve, args=[device], daemon=True)
        server.start()
        try:
            yield
        finally:
            libc.umount2(os.fsencode(place), 2)  # MNT_DETACH
    finally:
        os.close(device)

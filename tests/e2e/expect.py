# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What tests say about images and messages, in one line each."""

import re

import hosts

# With another lock manager, for comparison, only the effects are asked for.
LEASEHOLD = hosts.lock_manager() == "leasehold"


def taken(host, *images, by=None, mode="exclusive"):
    """A stranger's guest on this host does not get the image; by=(guest, its host): and is told who has it."""
    for image in images:
        result = host.try_take(image, mode)
        assert not result, f"a stranger on {host.name} got {image} ({mode})"
        if by:
            names_holder(result.err, image, *by)


def free(host, *images, mode="exclusive"):
    """A stranger's guest on this host gets the image."""
    for image in images:
        result = host.try_take(image, mode)
        assert result, f"a stranger on {host.name} was refused {image} ({mode}): {result.err}"


def names_holder(message, image, guest, host):
    """The refusal says what is taken, and which guest has it, as which process, where."""
    if not LEASEHOLD:
        return
    for fact in (str(image), guest.name, guest.uuid, host.name):
        assert fact in message, f"{fact!r} is not in: {message}"
    names_pid(message, host.pid_here(guest))


def names_pid(message, pid):
    assert re.search(rf"\b{pid}\b", message), f"QEMU's pid {pid} is not in: {message}"


def runs(host, guest):
    assert host.state(guest) == "running"


def leased(*images):
    """leasehold's marks are on the image, far beyond its data, and nowhere else beside QEMU's lock bytes."""
    if not LEASEHOLD:
        return
    marks, locks = hosts.marks_on_each(images), hosts.locks_on_each(images)
    for image in images:
        assert marks[image], f"no lease on {image}: {locks[image]}"
        for lock in locks[image]:
            assert lock.is_mark or 100 <= lock.start <= lock.end < 300, f"a lock in the data of {image}: {lock}"


def not_leased(*images):
    left = [image for image, marks in hosts.marks_on_each(images).items() if marks]
    assert not left, f"still leased: {left}"

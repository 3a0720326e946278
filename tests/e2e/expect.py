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


# What QEMU had open lives as long as the last copy of its descriptors. Whoever looks for leases on this machine, a libvirtd
# of another test, too, has copies of what it looks at until it has run on, which on a busy machine is not at once.


def not_leased(*images):
    _none_left(hosts.marks_on_each, images, "still leased")


def not_locked(*images):
    """Nobody has any lock on them, of whatever kind."""
    _none_left(hosts.locks_on_each, images, "still locked")


def _none_left(found_on_each, images, what):
    def left():
        return {str(image): found for image, found in found_on_each(images).items() if found}
    try:
        hosts.wait_until(lambda: not left(), what)
    except AssertionError as late:
        raise AssertionError(f"{what}: {left()}") from late

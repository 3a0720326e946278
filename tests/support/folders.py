# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Folders for temporary files that do not stay when whoever made them is killed."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile


def remove_if_left(folder):
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


@contextlib.contextmanager
def folder_of_one_run(name, parent=None):
    """A folder NAME-... that is locked as long as this process lives, and is gone afterwards. Those of processes that were
    killed are removed first: nobody locks them any more."""
    parent = pathlib.Path(parent or tempfile.gettempdir())
    for left in parent.glob(f"{name}-*"):
        remove_if_left(left)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f"new-{name}-", dir=parent))  # nobody takes it for a left one
    lock = os.open(made, os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made.chmod(0o755)
        folder = made.rename(parent / made.name.removeprefix("new-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)

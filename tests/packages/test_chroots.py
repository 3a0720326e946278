# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What tests/support/chroot leaves on the machine that runs the tests."""

import os
import time

from conftest import machine_tree


def test_of_each_kind_only_the_newest_tree_is_kept(tmp_path, monkeypatch):
    made = machine_tree()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "leasehold-chroots"
    cache.mkdir()
    (cache / made.name).symlink_to(made)
    kind = made.name.rpartition("-")[0]
    yesterday = time.time() - 24 * 3600
    asked_for = {f"{kind}-old": yesterday, "building-what-was-killed": yesterday, "another-kind": yesterday,
                 f"{kind}-of-another-checkout": time.time()}
    for name, when in asked_for.items():
        (cache / name).mkdir()
        (cache / name / "file").touch()
        os.utime(cache / name, (when, when))
    assert machine_tree() == cache / made.name
    left = {path.name for path in cache.iterdir() if path.suffix != ".lock"}
    assert left == {made.name, "another-kind", f"{kind}-of-another-checkout"}

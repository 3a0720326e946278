# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What the tests leave on the machine that runs them."""

import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, machine_tree
from folders import folder_of_one_run


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


RUN = """import sys, time; sys.path.insert(0, sys.argv[1])
from folders import folder_of_one_run
with folder_of_one_run("built", sys.argv[2]) as folder:
    (folder / "built").touch()
    print(folder, flush=True)
    time.sleep(10000)"""


def test_the_next_run_removes_what_one_that_was_killed_has_built_and_no_other(tmp_path):
    runs, folders = [], []
    try:
        for _ in range(2):
            runs.append(subprocess.Popen([sys.executable, "-c", RUN, ROOT / "tests" / "support", tmp_path],
                                         stdout=subprocess.PIPE, text=True))
            folders.append(runs[-1].stdout.readline().strip())
        killed, living = folders
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait()
        assert os.path.exists(f"{killed}/built")
        with folder_of_one_run("built", tmp_path) as mine:
            assert not os.path.exists(killed)
            assert os.path.exists(f"{living}/built") and mine.exists()
        assert os.listdir(tmp_path) == [os.path.basename(living)]
    finally:
        for run in runs:
            run.kill()
            run.wait()
            run.stdout.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""Each path that a verb takes, in each way in which a path can be wrong: the command names it, and says what to do."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from test_tools import PLUGIN, PATIENCE, call, of_nobody  # noqa: F401

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))
from broken_fs import broken_fs  # noqa: E402

NEXT_STEP = re.compile("correct the |run this as root|mend it|restore |put it right|put that right|make it a file|make the file|install |"
                       "leasehold enable|name a command|mark the disk")

# {verb and what the path is: the words}; "good" is an image that nothing is wrong with.
WORDS = {
    "inspect": lambda path, good: ["inspect", path],
    "inspect --config": lambda path, good: ["inspect", "--config", path, good],
    "classify": lambda path, good: ["classify", path],
    "classify --config": lambda path, good: ["classify", "--config", path, good],
    "check --config": lambda path, good: ["check", "--json", "--config", path],
    "check --qemu-conf": lambda path, good: ["check", "--json", "--qemu-conf", path],
    "check --plugin": lambda path, good: ["check", "--json", "--plugin", path],
    "probe": lambda path, good: ["probe", "--wait", "1", path],
    "run": lambda path, good: ["run", path, "--", "true"],
    "run --read-only": lambda path, good: ["run", "--read-only", path, "--", "true"],
    "run --config": lambda path, good: ["run", "--read-only", "--config", path, good, "--", "true"],
    "run, the command": lambda path, good: ["run", "--read-only", good, "--", path],
    "watch --textfile": lambda path, good: ["watch", "--once", "--dry-run", "--textfile", path],
    "enable --qemu-conf": lambda path, good: ["enable", "--force", "--dry-run", "--qemu-conf", path, "--plugin", PLUGIN,
                                              "--config", "/nonexistent"],
    "enable --config": lambda path, good: ["enable", "--force", "--dry-run", "--qemu-conf", good, "--plugin", PLUGIN,
                                           "--config", path],
    "enable --plugin": lambda path, good: ["enable", "--force", "--dry-run", "--qemu-conf", good, "--plugin", path,
                                           "--config", "/nonexistent"],
    "disable --qemu-conf": lambda path, good: ["disable", "--force", "--dry-run", "--qemu-conf", path],
}
# What may be so: a configuration that is not there means the defaults, a directory may be looked at and read.
FINE = {
    "missing": {verb for verb in WORDS if verb.endswith("-conf") or verb.endswith("--config")} | {"watch --textfile"},
    "a directory": {"inspect", "classify", "probe", "run --read-only"},
    "a link to nothing": {"watch --textfile"},
    "not readable": {"inspect", "classify"},  # its locks are seen all the same
}
FINE["missing"] -= {"check --qemu-conf"}


def said_about(path, verb, result):
    """What the command says, and in findings what it says of that path."""
    if verb.startswith("check"):
        about = {"--config": "configuration", "--qemu-conf": "lock_manager", "--plugin": "plugin"}[verb.split()[1]]
        return "\n".join(finding["text"] + " -> " + (finding["remedy"] or "")
                         for finding in json.loads(result.stdout)["findings"] if finding["about"] == about)
    lines = (result.stdout + result.stderr).splitlines()
    # inspect has the path in a line of its own, and the error in the next one.
    return "\n".join(line for number, line in enumerate(lines)
                     if str(path) in line or (number and "error" in line and str(path) in lines[number - 1]))


def assert_told(path, verb, trouble, result):
    said = said_about(path, verb, result)
    assert str(path) in said, f"{verb} does not name a path that is {trouble}: {result}"
    assert NEXT_STEP.search(said), f"{verb} names no way out of a path that is {trouble}: {said}"
    assert result.returncode != 0 or verb == "watch --textfile", result


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good"
    path.touch()
    return path


@pytest.mark.parametrize("verb", WORDS)
@pytest.mark.parametrize("trouble", ["missing", "below a file", "a directory", "a link to nothing"])
def test_a_path_that_leads_nowhere_is_named_with_what_to_do(tmp_path, good, verb, trouble):
    path = tmp_path / "wrong"
    if trouble == "a directory":
        path.mkdir()
        (path / "x").touch()  # so that nothing is renamed to it
    elif trouble == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif trouble == "below a file":
        path.touch()
        path = path / "x"
    result = call(*WORDS[verb](path, good))
    if verb not in FINE.get(trouble, ()):
        assert_told(path, verb, trouble, result)


def test_a_directory_is_wanted_by_probe(good):
    assert_told(good, "probe", "a file", call("probe", good))


@pytest.mark.parametrize("verb", WORDS)
def test_a_path_that_a_user_may_not_read_is_named_with_what_to_do(of_nobody, tmp_path, verb):  # noqa: F811
    good, command = of_nobody
    path = good.parent / "secret"
    path.write_text("handoff_wait = 5\n")
    path.chmod(0)
    if verb == "watch --textfile":
        path = good.parent / "closed" / "x"
        path.parent.mkdir(mode=0o700)
    words = [good.parent / "leasehold.so" if word == PLUGIN else word for word in WORDS[verb](path, good)]
    (good.parent / "leasehold.so").write_bytes(PLUGIN.read_bytes())
    result = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE)
    if verb not in FINE["not readable"]:
        assert_told(path, verb, "not readable", result)


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    """Paths on storage that answers EIO: to who opens them, and to who looks at them."""
    place = tmp_path_factory.mktemp("dying")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here")
    with broken_fs(place):
        yield {"opened": place / "disk", "looked at": place / "lost" / "disk"}


@pytest.mark.parametrize("verb", WORDS)
@pytest.mark.parametrize("when", ["opened", "looked at"])
def test_a_path_on_storage_that_has_died_is_named_with_what_to_do(dying, good, verb, when):
    result = call(*WORDS[verb](dying[when], good))
    assert_told(dying[when], verb, f"broken when it is {when}", result)

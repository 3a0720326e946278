# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""README.md, OPERATIONS.md and the manuals: each command they print is run by a test, each message they explain exists."""

import ast
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from documents import commands, documented  # noqa: E402
from test_tools import LEASEHOLD, call  # noqa: E402

# Not run, and why. Keep it short.
NOT_RUN = {
    "dnf install ./build-packages/leasehold-*.rpm": "no Fedora here; tests/packages/test_rpm.py installs it with rpm",
    "tests/demo": "shows what tests/e2e asserts",
    "tests/run": "is running",
}

# Named in a sentence: what is typed has more words.
NAMED = ["leasehold fenced", "leasehold probe", "leasehold run", "leasehold watch"]


def calls(function, names):
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return any(getattr(each, "id", getattr(each, "attr", None)) in names for each in called)


@functools.cache
def commands_that_tests_run():
    """What stands as a text in functions that call documented(), or call one that does with the command it is given."""
    functions = [node for path in (ROOT / "tests").rglob("*.py")
                 for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    takes_command = {each.name: each for each in functions if "command" in [one.arg for one in each.args.args]}
    typing = {"documented"}
    while more := {name for name, each in takes_command.items() if calls(each, typing)} - typing:
        typing |= more
    return {node.value for each in functions if calls(each, typing) for node in ast.walk(each)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("command", sorted(set(commands()) - set(NOT_RUN) - set(NAMED)))
def test_what_is_printed_is_run(command):
    assert command in commands_that_tests_run(), f"{commands()[command]} print a command that no test runs: {command}"


@pytest.mark.parametrize("command", NAMED)
def test_what_is_named_exists(command):
    assert call("help", *documented(command)[1:]).returncode == 0


def test_nothing_is_excused_that_is_not_printed_or_is_run_after_all():
    assert not (set(NOT_RUN) | set(NAMED)) - set(commands())
    assert not set(NOT_RUN) & commands_that_tests_run()


def test_a_suite_that_is_named_is_one():
    program, suite = documented("tests/run lab")
    listed = subprocess.run([ROOT / program, "--list"], capture_output=True, text=True, check=True).stdout
    assert suite in listed.split()


def quoted():
    """Messages: what OPERATIONS.md explains, and what else stands in `...` there or in README.md and is a sentence."""
    operations = (ROOT / "OPERATIONS.md").read_text()
    explained = operations.split("\n## Messages")[1].split("\n## ")[0]
    found = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\*\*(.+?)\*\*", explained, re.MULTILINE | re.DOTALL)))
    assert found
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", operations + (ROOT / "README.md").read_text())]
    found += [span for span in spans if len(span.split()) > 2 and "=" not in span
              and not any(part in commands() for part in span.split(" && "))]
    return set(found) - {'Failed to get "write" lock'}  # QEMU's


def test_the_messages_that_are_quoted_are_those_that_are_said():
    said = "".join(path.read_text() for folder in ("core", "plugin", "tools") for path in sorted((ROOT / folder).rglob("*.cpp")))
    said = re.sub(r'"\s*"', "", said)  # texts that go on in the next line
    for message in quoted():
        text = message.replace("Operation not permitted", "").removeprefix("leasehold: ")
        for part in re.split(r"\.\.\.|\b[XYN]\b|'[^']*'|[;:()]", text):
            words = part.split()
            # One that is made of two pieces is in the source in two pieces.
            assert any(" ".join(words[:cut]).strip(", ") in said and " ".join(words[cut:]).strip(", ") in said
                       for cut in range(len(words) + 1)), f"nothing says {part!r}, of: {message}"


@pytest.mark.parametrize("command", ["systemctl disable --now virtlockd.socket virtlockd",
                                     "systemctl disable --now sanlock wdmd"])
def test_units_of_other_lock_managers_are_called_so(tmp_path, command):
    words = documented(command)
    words.remove("--now")  # that needs a systemd that runs
    units = tmp_path / "lib" / "systemd" / "system"
    units.mkdir(parents=True)
    for name in [*words[2:], words[2].split(".")[0]]:
        if not list(pathlib.Path("/lib/systemd/system").glob(f"{name}*")) or not shutil.which("systemctl"):
            pytest.skip(f"{name} or systemd is not installed")
        for unit in pathlib.Path("/lib/systemd/system").glob(f"{name}*"):
            shutil.copy(unit, units)
    systemctl = ["systemctl", f"--root={tmp_path}"]
    subprocess.run([*systemctl, "enable", *words[2:]], check=True)

    def wanted():
        return list((tmp_path / "etc").rglob("*.wants/*"))
    assert wanted()
    subprocess.run([*systemctl, *words[1:]], check=True)
    assert not wanted()


def test_what_setup_says_is_installed(tmp_path):
    build = pathlib.Path(LEASEHOLD).parent.parent
    if "no work to do" not in subprocess.run([*documented("ninja -C build", build=build), "-n"], capture_output=True,
                                             text=True).stdout:
        pytest.skip(f"{build} is not wholly built")
    subprocess.run(documented("ninja -C build install", build=build), env={**os.environ, "DESTDIR": str(tmp_path)}, check=True,
                   capture_output=True)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"leasehold.so", "leasehold", "qemu-leasehold.conf", "leasehold-watch.service", "leasehold.8",
            "libvirt_leasehold.aug", "OPERATIONS.md"} <= names, names

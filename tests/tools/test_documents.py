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
from test_tools import LEASEHOLD  # noqa: E402

# Run by a test that is older than documented(), or on a machine where that is not: the file, and what it has instead of the
# command.
RUN_BY = {
    "apt install ./build-packages/leasehold_*.deb": ("tests/packages/test_deb.py", 'machine.apt("install", deb'),
    "gluster volume set VOLUME client.strict-locks on": ("tests/lab/test_gluster.py",
                                                         "gluster volume set lax client.strict-locks on"),
    "journalctl -u leasehold-watch": ("tests/packages/node.py", '["journalctl", '),
    "journalctl -u libvirtd": ("tests/packages/node.py", '["journalctl", '),
    "leasehold classify PATH": ("tests/tools/test_tools.py", 'call("classify"'),
    "leasehold classify PATH...": ("tests/tools/test_watching.py", 'call("classify", "--json", image, '),
    "leasehold fenced": ("tests/tools/test_tools.py", 'call("fenced"'),
    "leasehold fenced HOST": ("tests/lab/test_fenced.py", 'fenced(living, "h1")'),
    "leasehold fenced HOST --i-made-sure-it-is-off": ("tests/lab/test_fenced.py",
                                                      'fenced(living, "h1", "--i-made-sure-it-is-off")'),
    "leasehold inspect IMAGE...": ("tests/tools/test_watching.py", 'call("inspect", "--json", image, stale'),
    "leasehold probe": ("tests/tools/test_tools.py", '"probe"'),
    "leasehold probe DIR": ("tests/tools/test_tools.py", '"probe"'),
    "leasehold run": ("tests/tools/test_tools.py", 'call("run"'),
    "leasehold run IMAGE... -- COMMAND": ("tests/tools/test_user.py", 'call("run", *disks, "--", "sh"'),
    "leasehold run --wait 60 disk.qcow2 -- qemu-img resize disk.qcow2 +10G": (
        "tests/tools/test_tools.py", '"qemu-img", "resize"'),
    "leasehold status [GUEST]": ("tests/tools/test_tools.py", 'call("status", guest["uuid"])'),
    "leasehold watch": ("tests/e2e/test_watch.py", '"watch"'),
    "leasehold watch --textfile /var/lib/prometheus/node-exporter/leasehold.prom": (
        "tests/tools/test_watching.py", 'call("watch", "--once", "--dry-run", "--textfile", path)'),
    "mount /mnt/volume": ("tests/lab/test_gluster.py", 'storage.mount_at(host, "lax", directory)'),
    "ninja -C build": ("tests/run", "build build-release -Dtests=false --buildtype=release"),
    "packaging/build-deb.sh": ("tests/packages/conftest.py", 'f"build-{kind}.sh"'),
    "packaging/build-rpm.sh": ("tests/packages/conftest.py", 'f"build-{kind}.sh"'),
    "restorecon -R /shared/leases": ("tests/packages/test_selinux.py", "restorecon -R /var/lib/leasehold"),
    "sm-notify -f": ("tests/lab/storage.py", '"sm-notify -f"'),
    "tests/run lab": ("tests/run", "run_lab()"),
    "umount /mnt/volume": ("tests/lab/test_gluster.py", 'host.ok(f"umount {directory}")'),
    "vgchange -an": ("tests/lab/test_stacks.py", 'host.ok("vgchange -qq -an stack")'),
    "virsh blockpull": ("tests/e2e/test_chain.py", '"blockpull"'),
    "virsh save": ("tests/e2e/test_lifecycle.py", '"save"'),
    "virsh start": ("tests/e2e/test_messages.py", '"start"'),
}

# Not run, and why. Keep it short.
NOT_RUN = {
    "LIBGUESTFS_BACKEND=direct leasehold run disk.qcow2 -- virt-customize -a disk.qcow2 --update": "libguestfs boots a kernel",
    "LIBGUESTFS_BACKEND=direct virt-df -a disk.qcow2": "libguestfs boots a kernel",
    "dnf install ./build-packages/leasehold-*.rpm": "no Fedora here; tests/packages/test_rpm.py installs it with rpm",
    "semanage fcontext -a -t leasehold_lockspace_t '/shared/leases(/.*)?'": "the emulated node has no semanage",
    "systemctl edit leasehold-watch": "opens an editor",
    "systemctl restart nfs-server": "the emulated servers have no systemd; tests/lab/storage.py restarts theirs",
    "tests/demo": "shows what tests/e2e asserts",
    "tests/run": "is running",
    "vgimportclone": "only a name",
}


@functools.cache
def commands_that_tests_run():
    """What stands as a text in the tests that use documented()."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        if "documented(" in text:
            tests = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            found |= {node.value for test in tests for node in ast.walk(test) if isinstance(node, ast.Constant)
                      and isinstance(node.value, str)}
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_what_is_printed_is_run(command):
    if command in commands_that_tests_run() or command in NOT_RUN:
        return
    assert command in RUN_BY, f"{commands()[command]} print a command that no test runs: {command}"
    file, text = RUN_BY[command]
    assert text in (ROOT / file).read_text(), f"{file} does not run {command} any more"


def test_nothing_is_excused_that_is_not_printed_or_is_run_after_all():
    printed, run = set(commands()), commands_that_tests_run()
    assert not (set(NOT_RUN) | set(RUN_BY)) - printed
    assert not (set(NOT_RUN) & set(RUN_BY)) | ((set(NOT_RUN) | set(RUN_BY)) & run)


def test_the_messages_that_are_explained_are_those_that_are_said():
    said = "".join(path.read_text() for folder in ("core", "plugin", "tools") for path in sorted((ROOT / folder).rglob("*.cpp")))
    said = re.sub(r'"\s*"', "", said)  # texts that go on in the next line
    explained = (ROOT / "OPERATIONS.md").read_text().split("\n## Messages")[1].split("\n## ")[0]
    messages = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\*\*(.+?)\*\*", explained, re.MULTILINE | re.DOTALL)))
    assert messages
    for message in set(messages) - {'Failed to get "write" lock'}:  # QEMU's
        for part in re.split(r"\.\.\.|\b[XYN]\b|'[^']*'|[;:()]", message.replace("Operation not permitted", "")):
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
    if "no work to do" not in subprocess.run(["ninja", "-n", "-C", build], capture_output=True, text=True).stdout:
        pytest.skip(f"{build} is not wholly built")
    words = [str(build) if word == "build" else word for word in documented("ninja -C build install")]
    subprocess.run(words, env={**os.environ, "DESTDIR": str(tmp_path)}, check=True, capture_output=True)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"leasehold.so", "leasehold", "qemu-leasehold.conf", "leasehold-watch.service", "leasehold.8",
            "libvirt_leasehold.aug", "OPERATIONS.md"} <= names, names

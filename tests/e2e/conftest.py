# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Fixtures: the lab lives for the whole run, a host from its first use on, guests and images for one test.

After every test all guests are destroyed, and then no image may carry a lock any more: a lease ends with its QEMU.

And the choice of tests (README.md, "Short and long"): --long runs everything, --other-release what depends on the
versions of libvirt and QEMU. Several processes share the work (python3-pytest-xdist): each has a lab of its own.
"""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import expect
import hosts
import pytest

sys.path.insert(0, str(hosts.ROOT / "tests" / "support"))  # documents


STOCK, WITHOUT_LOCKS = "stock QEMU", "QEMU without image locks"


def pytest_addoption(parser):
    group = parser.getgroup("leasehold")
    group.addoption("--long", action="store_true", default=bool(os.environ.get("LEASEHOLD_LONG")),
                    help="everything, with both kinds of QEMU (or LEASEHOLD_LONG=1)")
    group.addoption("--other-release", action="store_true", default=bool(os.environ.get("LEASEHOLD_OTHER_RELEASE")),
                    help="only what libvirt calls: the tests that README.md's table names (or "
                         "LEASEHOLD_OTHER_RELEASE=1)")


def pytest_configure(config):
    for marker in ("quick: shows the main job; what a person runs first",
                   "both_emulators: the image locks of the stock QEMU take part in this; the short run has both kinds",
                   "short(when, other_release): the parameters (a dictionary) with which this is in the short run",
                   "waits: for half a minute, and computes nothing; begins first",
                   "long: only in the long run"):
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """-n auto: the tests wait more than they compute."""
    return os.cpu_count() + 1


def tests_of_the_table():
    """Those that the table "What libvirt calls" in README.md names: (file, how the name begins)."""
    text = (hosts.HERE / "README.md").read_text().split("\n## What libvirt calls")[1].split("\n## ")[0]
    found, file = set(), None
    for line in text.splitlines():
        for word, name in re.findall(r"(\w+):|`(\w+)(?:\.\.\.)?`", line.split("|")[3] if line.startswith("|") else ""):
            file = word or file
            if name:
                found.add((f"test_{file}.py", f"test_{name}"))
    return found


def is_in_short_run(item, of_other_release, named):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    choice = item.get_closest_marker("short")
    file = pathlib.Path(item.fspath).name
    if of_other_release and not any(file == f and item.originalname.startswith(name) for f, name in named):
        return False
    if item.get_closest_marker("long"):
        return False
    if choice and of_other_release and "other_release" in choice.kwargs:
        return choice.kwargs["other_release"](parameters)
    if choice:
        return choice.kwargs["when"](parameters)
    if parameters.get("emulator") != STOCK:
        return True
    return bool(item.get_closest_marker("quick" if of_other_release else "both_emulators"))


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
    other = config.getoption("--other-release")
    if config.getoption("--long"):
        return
    named = tests_of_the_table() if other else ()
    mine = [item for item in items if hosts.HERE in pathlib.Path(item.fspath).parents]
    chosen = {item for item in mine if is_in_short_run(item, other, named)}
    left = set(mine) - chosen
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=list(left))


@pytest.fixture(scope="session")
def lab():
    try:
        lab = hosts.Lab()
    except hosts.Missing as missing:
        pytest.skip(str(missing))
    yield lab
    lab.close()


@pytest.fixture
def alpha(lab):
    return lab.host("alpha")


@pytest.fixture
def beta(lab):
    return lab.host("beta")


@pytest.fixture
def gamma(lab):
    return lab.host("gamma")


@pytest.fixture(autouse=True)
def images(lab, request):
    """A directory for this test's images, on storage that all hosts share."""
    directory = lab.dir / lab.unique("images")
    directory.mkdir()
    yield directory
    try:
        for host in lab.running_hosts():
            host.clean()
    except (AssertionError, subprocess.SubprocessError, OSError):
        for host in lab.running_hosts():
            host.stop()  # the next test gets fresh ones
        raise
    files = [path for path in directory.rglob("*") if path.is_file()]
    try:
        expect.not_locked(*files)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def image(lab, images):
    """image("name"): a raw image with the boot sector; format="qcow2", backing=... as qemu-img knows them."""
    return lambda name="disk.img", **options: lab.image(images / name, **options)


@pytest.fixture(params=[STOCK, WITHOUT_LOCKS])
def emulator(lab, request):
    """Twice: with the stock QEMU, whose own image locks leasehold must get along with, and with one whose image locks
    never refuse, so that the lease alone decides (QEMU's locks do not cross hosts on every storage)."""
    return hosts.QEMU if request.param == STOCK else lab.emulator_without_locks


@pytest.fixture(params=["on the image", "lease files", "flock"])
def medium(request, lab, alpha, beta):
    """Where alpha and beta have their leases."""
    lockspace = lab.dir / "lockspace"
    lockspace.mkdir(mode=0o700, exist_ok=True)
    text = {"on the image": None, "lease files": f'file_lockspace_dir = "{lockspace}"\n',
            "flock": f'storage_locks = [ "{lab.dir}=flock" ]\n'}[request.param]
    with contextlib.ExitStack() as stack:
        if text:
            for host in (alpha, beta):
                stack.enter_context(host.configured(plugin_conf=text))
        yield request.param
        for host in (alpha, beta):
            host.clean()


@pytest.fixture
def guest(lab, images):
    """guest(path or Disk, ...): a guest with these disks, vda, vdb, ... where only a path is given."""
    def make(*disks, **options):
        disks = [disk if isinstance(disk, hosts.Disk) else hosts.Disk(disk, f"vd{chr(ord('a') + number)}")
                 for number, disk in enumerate(disks)]
        name = lab.unique("guest")
        return hosts.Guest(name, disks, serial=images.parent / f"{name}.serial", **options)
    return make


def pytest_terminal_summary(terminalreporter):
    """What tests have counted (record_property), whichever process they ran in."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{name}: {value}")


def pytest_assertrepr_compare(op, left, right):
    if isinstance(left, hosts.Result):
        return [str(left)]
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what each libvirtd has logged last."""
    outcome = yield
    report = outcome.get_result()
    lab = item.funcargs.get("lab") if hasattr(item, "funcargs") else None
    if report.failed and lab:
        for host in lab.running_hosts():
            lines = [line for line in host.log().splitlines() if re.search("error|warning", line)]
            report.sections.append((f"libvirtd on {host.name}", "\n".join(lines[-15:])))

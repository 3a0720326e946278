# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Fixtures: the lab lives for the whole run, a host from its first use on, guests and images for one test.

After every test all guests are destroyed, and then no image may carry a lock any more: a lease ends with its QEMU.
"""

import pathlib
import re
import shutil
import subprocess

import hosts
import pytest


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
    left = {path.name: locks for path in directory.rglob("*") if path.is_file() and (locks := hosts.locks_on(path))}
    shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"locks outlived every guest: {left}"


@pytest.fixture
def image(lab, images):
    """image("name"): a raw image with the boot sector; format="qcow2", backing=... as qemu-img knows them."""
    return lambda name="disk.img", **options: lab.image(images / name, **options)


@pytest.fixture(params=["stock QEMU", "QEMU without image locks"])
def emulator(lab, request):
    """Twice: with the stock QEMU, whose own image locks leasehold must get along with, and with one whose image locks
    never refuse, so that the lease alone decides (QEMU's locks do not cross hosts on every storage)."""
    return hosts.QEMU if request.param == "stock QEMU" else lab.emulator_without_locks


@pytest.fixture
def guest(lab, images):
    """guest(path or Disk, ...): a guest with these disks, vda, vdb, ... where only a path is given."""
    def make(*disks, **options):
        disks = [disk if isinstance(disk, hosts.Disk) else hosts.Disk(disk, f"vd{chr(ord('a') + number)}")
                 for number, disk in enumerate(disks)]
        name = lab.unique("guest")
        return hosts.Guest(name, disks, serial=images.parent / f"{name}.serial", **options)
    return make


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

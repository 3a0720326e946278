# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""meson setup as somebody runs it who has no package: what goes where, and what is left out. Nothing is compiled."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from documents import documented  # noqa: E402


@pytest.fixture
def setup(tmp_path):
    def call(*options):
        if not shutil.which("meson"):
            pytest.skip("meson is not installed")
        build = tmp_path / "build"
        words = documented("meson setup build --buildtype=release -Dtests=false", build=build)
        result = subprocess.run([*words, *options], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:]
        plan = json.loads(subprocess.run(["meson", "introspect", "--installed", build], capture_output=True, text=True,
                                         check=True).stdout)
        options = json.loads(subprocess.run(["meson", "introspect", "--buildoptions", build], capture_output=True,
                                            text=True, check=True).stdout)
        return result.stdout, set(plan.values()), {each["name"]: each["value"] for each in options}
    return call


def test_without_options_all_is_where_libvirt_looks_and_setup_says_so(setup):
    said, installed, options = setup()
    libdir = subprocess.run(["pkg-config", "--variable=libdir", "libvirt"], capture_output=True, text=True,
                            check=True).stdout.strip()
    assert f"{libdir}/libvirt/lock-driver/leasehold.so" in installed
    assert "/etc/libvirt/qemu-leasehold.conf" in installed and "/usr/local/sbin/leasehold" in installed
    assert "/usr/share/augeas/lenses/libvirt_leasehold.aug" in installed
    for word in (f"{libdir}/libvirt/lock-driver", "/etc/libvirt", "/usr/local/sbin", "AppArmor", "SELinux"):
        assert word in said
    assert options["werror"] is False, "a warning of a later compiler is no reason not to build"


def test_a_packager_says_otherwise_and_what_is_left_out_is_named(setup):
    said, installed, _ = setup("--prefix=/usr", "-Dlock_driver_dir=/opt/lock-driver", "-Detc_dir=/opt/etc",
                               "-Dtools=disabled")
    assert "/opt/lock-driver/leasehold.so" in installed and "/opt/etc/libvirt/qemu-leasehold.conf" in installed
    assert "no (-Dtools=enabled)" in said and "/usr/sbin/leasehold" not in installed

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The packages as files: the same whoever builds them, and what the distributions' checkers say."""

import hashlib
import re

import hosts
import pytest
from conftest import ROOT, only


@pytest.mark.parametrize("kind, ends", [("deb", (".deb",)), ("rpm", (".rpm",))])
def test_two_builds_are_identical(builds, kind, ends):
    def sums(files):
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
                if name.endswith(ends)}
    once, again = map(sums, builds[kind])
    assert len(once) >= 2
    assert once == again


def test_the_version_is_mesons(builds):
    version = re.search(r"^  version: '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]
    once, _ = builds["deb"]
    assert f"leasehold_{version}-1_amd64.deb" in once
    once, _ = builds["rpm"]
    assert f"leasehold-{version}-1.x86_64.rpm" in once
    assert f"## {version}" in (ROOT / "NEWS.md").read_text()


def test_lintian_has_nothing_to_say(builds):
    changes = only(builds["deb"][0], "leasehold_", ".changes")
    said = hosts.run("lintian", "--allow-root", "--fail-on", "error,warning", changes, timeout=300)
    assert said, str(said)


def test_rpmlint_has_nothing_to_say(builds):
    packages = [path for name, path in builds["rpm"][0].items() if name.endswith(".rpm")]
    said = hosts.run("rpmlint", "-c", ROOT / "packaging" / "rpm" / "rpmlint.toml", *packages)
    assert said, str(said)
    assert "0 errors, 0 warnings" in said.out

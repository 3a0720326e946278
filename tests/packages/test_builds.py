# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The packages as files: the same whoever builds them, and what the distributions' checkers say."""

import datetime
import hashlib
import json
import re

import hosts
import pytest
from conftest import EPOCH, ROOT, only


@pytest.mark.parametrize("kind, ends", [("deb", (".deb", ".dsc", ".orig.tar.gz", ".debian.tar.xz")), ("rpm", (".rpm",))])
def test_two_builds_are_identical(builds, kind, ends):
    def sums(files):
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
                if name.endswith(ends)}
    once, again = map(sums, builds[kind])
    assert len(once) >= 2
    assert once == again


def test_the_release_s_tarball_builds_the_same_packages(released, builds):
    if released is None:
        pytest.skip("the tree has changes that are not committed, so a release is not what is here")
    version = re.search(r"^  version: '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]
    assert released.name == f"leasehold-{version}"
    assert not (released / ".git").exists()
    for kind in ("deb", "rpm"):  # test_two_builds_are_identical compares them
        assert set(builds[kind][0]) == set(builds[kind][1])


def test_the_bill_of_materials_names_all_that_the_programs_are_linked_to(deb, tmp_path):
    hosts.ok("dpkg-deb", "-x", deb, tmp_path)
    bill = json.loads((tmp_path / "usr/share/doc/leasehold/leasehold.spdx.json").read_text())
    assert bill["spdxVersion"] == "SPDX-2.3"
    built = datetime.datetime.fromtimestamp(int(EPOCH), datetime.timezone.utc)
    assert bill["creationInfo"]["created"] == built.strftime("%Y-%m-%dT%H:%M:%SZ")
    named = {word for package in bill["packages"] for word in package.get("comment", "").split()}
    programs = [tmp_path / "usr/sbin/leasehold", *tmp_path.rglob("leasehold.so")]
    assert len(programs) == 2
    for program in programs:
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", hosts.ok("readelf", "-d", program)))
        assert needed and needed <= named
    ids = {package["SPDXID"] for package in bill["packages"]}
    assert {each["relatedSpdxElement"] for each in bill["relationships"]} == ids
    for package in bill["packages"]:
        assert re.match(r"\d", package["versionInfo"]), package


def test_the_version_is_mesons(builds):
    version = re.search(r"^  version: '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]
    once, _ = builds["deb"]
    assert f"leasehold_{version}-1_amd64.deb" in once
    once, _ = builds["rpm"]
    assert f"leasehold-{version}-1.x86_64.rpm" in once
    assert f"## {version}" in (ROOT / "NEWS.md").read_text()


def test_both_say_where_leasehold_lives(builds, deb, rpm):
    home = re.search(r"^home = '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]
    assert hosts.ok("dpkg-deb", "-f", deb, "Homepage").strip() == home
    assert hosts.ok("rpm", "-qp", "--qf", "%{URL}", rpm) == home
    source = only(builds["deb"][0], "leasehold_", ".dsc").read_text()
    assert f"Vcs-Git: {home}.git" in source and "Testsuite: autopkgtest" in source


def test_nothing_is_below_a_link_of_the_merged_usr(deb):
    files = hosts.ok("dpkg-deb", "-c", deb)
    assert "./usr/lib/systemd/system/leasehold-watch.service" in files and " ./lib/" not in files


def test_lintian_has_nothing_to_say(builds):
    changes = only(builds["deb"][0], "leasehold_", ".changes")
    said = hosts.run("lintian", "--allow-root", "--fail-on", "error,warning", changes, timeout=300)
    assert said, str(said)


def test_rpmlint_has_nothing_to_say(builds):
    packages = [path for name, path in builds["rpm"][0].items() if name.endswith(".rpm")]
    said = hosts.run("rpmlint", "-c", ROOT / "packaging" / "rpm" / "rpmlint.toml", *packages)
    assert said, str(said)
    assert "0 errors, 0 warnings" in said.out

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The packages as files: the same whoever builds them, and what the distributions' checkers say."""

import datetime
import hashlib
import json
import re

import hosts
import pytest
from conftest import AS_NOBODY, CHROOT, KINDS, PROGRESS, ROOT, build, only


def version():
    return re.search(r"^  version: '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind, ends", [("deb", (".deb", ".dsc", ".orig.tar.gz", ".debian.tar.xz")), ("rpm", (".rpm", ".spec"))])
def test_two_builds_are_identical(builds, kind, ends):
    once, again = ({name: checksum(path) for name, path in files.items() if name.endswith(ends)}
                   for files in builds[kind])
    assert len(once) >= 2
    assert once == again


@pytest.mark.parametrize("kind", KINDS)
def test_who_builds_them_is_told_what_it_is_at(builds, kind):
    if not PROGRESS.get(kind):
        pytest.skip("these were built before")
    (begun, still_building), *steps = PROGRESS[kind]
    assert begun == f"building leasehold {version()}" and still_building
    # Each ten seconds: where it takes less there are none.
    assert all(re.fullmatch(r"  \d+ s: \S.*", step) for step, _ in steps), steps


def test_the_release_s_tarball_packs_itself(tarball, released, nobodys):
    assert released.name == f"leasehold-{version()}" and not (released / ".git").exists()
    [again] = build("tarball", released, nobodys / "tarball-again", *AS_NOBODY, TMPDIR=str(nobodys),
                    TZ="Pacific/Auckland").values()
    assert again.name == tarball.name and checksum(again) == checksum(tarball)


def test_it_is_the_source_of_the_debian_package(tarball, builds):
    assert checksum(only(builds["deb"][0], "leasehold_", ".orig.tar.gz")) == checksum(tarball)


def test_meson_dist_packs_the_same_files(released, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("meson dist needs a checkout")
    if changed := hosts.run("git", "-C", ROOT, "status", "--porcelain").out:
        pytest.skip(f"meson dist packs what is committed, and this is not:\n{changed}")
    hosts.ok("meson", "setup", "-Dtests=false", tmp_path / "build", ROOT)
    hosts.ok("meson", "dist", "-C", tmp_path / "build", "--no-tests", "--formats", "gztar")
    [dist] = (tmp_path / "build" / "meson-dist").glob("*.tar.gz")
    hosts.ok("tar", "-x", "-C", tmp_path, "-f", dist)
    hosts.ok("diff", "-r", tmp_path / released.name, released)


def test_the_bill_of_materials_names_all_that_the_programs_are_linked_to(deb, released, tmp_path):
    hosts.ok("dpkg-deb", "-x", deb, tmp_path)
    bill = json.loads((tmp_path / "usr/share/doc/leasehold/leasehold.spdx.json").read_text())
    assert bill["spdxVersion"] == "SPDX-2.3"
    changed = datetime.datetime.fromtimestamp((released / "meson.build").stat().st_mtime, datetime.timezone.utc)
    assert bill["creationInfo"]["created"] == changed.strftime("%Y-%m-%dT%H:%M:%SZ")
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
    assert f"leasehold_{version()}-1_amd64.deb" in builds["deb"][0]
    assert f"leasehold-{version()}-1.x86_64.rpm" in builds["rpm"][0]
    assert re.search(rf"^## {re.escape(version())} \(\d{{4}}-\d\d-\d\d\)$", (ROOT / "NEWS.md").read_text(), re.MULTILINE)


def test_both_say_where_leasehold_lives(builds, deb, rpm):
    home = re.search(r"^home = '(.*)'", (ROOT / "meson.build").read_text(), re.MULTILINE)[1]
    assert hosts.ok("dpkg-deb", "-f", deb, "Homepage").strip() == home
    assert hosts.ok("rpm", "-qp", "--qf", "%{URL}", rpm) == home
    source = only(builds["deb"][0], "leasehold_", ".dsc").read_text()
    assert f"Vcs-Git: {home}.git" in source and "Testsuite: autopkgtest" in source


def test_nothing_is_below_a_link_of_the_merged_usr(deb):
    files = hosts.ok("dpkg-deb", "-c", deb)
    assert "./usr/lib/systemd/system/leasehold-watch.service" in files and " ./lib/" not in files


@pytest.mark.parametrize("release", [None, "trixie"], ids=["of this machine", "of Debian 13"])
def test_lintian_has_nothing_to_say(builds, release):
    changes = only(builds["deb"][0], "leasehold_", ".changes")
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", changes]
    if release:
        tree = hosts.ok(CHROOT, "prepare", "lintian", release, "lintian", "", timeout=3600).strip()
        command = [CHROOT, "run", tree, f"{changes.parent}:{changes.parent}", "--", *command]
    said = hosts.run(*command, timeout=600)
    assert said and not said.out.strip(), str(said)


def test_rpmlint_has_nothing_to_say(builds):
    files = [path for name, path in builds["rpm"][0].items() if name.endswith((".rpm", ".spec"))]
    said = hosts.run("rpmlint", "-c", ROOT / "packaging" / "rpm" / "rpmlint.toml", *files)
    assert said, str(said)
    assert "1 specfiles checked; 0 errors, 0 warnings" in said.out


# What Fedora's selinux-policy-devel offers to packages, by name, options and operands (its macros.selinux-policy says so
# above each). Here each expands to a line that tells how it was called.
FEDORAS_MACROS = """
%selinux_requires Requires(post): asked-for-by-selinux-requires
%selinux_relabel_pre("s:") called relabel_pre type=%{-s*}
%selinux_modules_install("s:p:") called modules_install type=%{-s*} priority=%{-p*} %*
%selinux_modules_uninstall("s:p:") called modules_uninstall type=%{-s*} priority=%{-p*} %*
%selinux_relabel_post("s:") called relabel_post type=%{-s*}
"""


def test_on_fedora_its_own_macros_load_the_selinux_module(builds, tmp_path):
    (tmp_path / "macros").write_text(FEDORAS_MACROS)
    spec = hosts.ok("rpmspec", "--load", tmp_path / "macros", "-P", builds["rpm"][0]["leasehold.spec"])
    scripts = dict(re.findall(r"^%(\w+) selinux\n(.*?)(?=^%)", spec, re.MULTILINE | re.DOTALL))
    called = {name: re.findall("called (.*)", script) for name, script in scripts.items() if name != "package"}
    module = "/usr/share/selinux/packages/leasehold.pp"
    assert called["pre"] == ["relabel_pre type=targeted"]
    assert called["post"] == [f"modules_install type=targeted priority=200 {module}"]
    assert called["postun"] == ["modules_uninstall type=targeted priority=200 leasehold"]
    assert called["posttrans"] == ["relabel_post type=targeted"]
    assert "Requires(post): asked-for-by-selinux-requires" in scripts["package"]
    assert "semodule" not in spec

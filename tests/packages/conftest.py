# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Fixtures: the packages, built twice, and machines that are thrown away (tests/support/chroot)."""

import concurrent.futures
import contextlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
for folder in ("lab", "e2e", "support"):
    sys.path.insert(0, str(ROOT / "tests" / folder))

import hosts  # noqa: E402
from documents import documented  # noqa: E402
from folders import folder_of_one_run  # noqa: E402

NOBODY = 65534
AS_NOBODY = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups")
KINDS = ("deb", "rpm")
CHROOT = ROOT / "tests" / "support" / "chroot"
# What a node has before and beside leasehold. Fetched once; each run installs them as a newcomer would.
NODE = ["libvirt-daemon-system", "libvirt-clients", "qemu-system-x86"]
CONF = "/etc/libvirt/qemu-leasehold.conf"
PROGRESS = {}  # {kind: [(what its last build said, whether it was still building)]}


def build(kind, source, out, *user, **environment):
    """Runs packaging/build-KIND.sh of that source tree: {file name: path}. What it says meanwhile is in PROGRESS."""
    [script] = documented("packaging/build-rpm.sh") if kind == "rpm" else documented("packaging/build-deb.sh")
    script = source / script.replace("deb", kind)
    builder = subprocess.Popen([*map(str, user), script, out], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    said = PROGRESS[kind] = []
    for line in builder.stderr:
        said.append((line.rstrip("\n"), builder.poll() is None))
    printed, _ = builder.communicate()
    assert builder.returncode == 0, "\n".join(line for line, _ in said)
    return {pathlib.Path(line).name: pathlib.Path(line) for line in printed.splitlines()}


@pytest.fixture(scope="session")
def workplace():
    with folder_of_one_run("leasehold-packages") as folder:
        yield folder


@pytest.fixture(scope="session")
def nobodys(workplace):
    """A folder of the user nobody, in a place that this user reaches."""
    folder = workplace / "another-and-longer-folder-to-build-in"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.fixture(scope="session")
def tarball(workplace, nobodys):
    """The release's."""
    [tarball] = build("tarball", ROOT, nobodys / "tarball", TMPDIR=str(workplace)).values()
    return tarball


@pytest.fixture(scope="session")
def released(tarball, nobodys):
    """The tarball unpacked, as by somebody who has nothing else."""
    hosts.ok(*AS_NOBODY, "tar", "-x", "-C", nobodys, "-f", tarball)
    return nobodys / tarball.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def builds(tmp_path_factory, workplace, released, nobodys):
    """{kind: (files of one build, files of another one)}, which differ in what must not matter: one from here, the other
    one from the release's tarball, by an ordinary user. That one is compiled anew; what root's compiler cache has of the
    first is taken from there. Both kinds are compiled alike, so the second of each takes its objects from the first.
    LEASEHOLD_PACKAGES names a folder with packages for one who works on the tests: they are not built then."""
    if folder := os.environ.get("LEASEHOLD_PACKAGES"):
        files = {path.name: path for path in pathlib.Path(folder).iterdir()}
        return {"deb": (files, files), "rpm": (files, files)}
    for program in ("dpkg-buildpackage", "dh", "rpmbuild", "checkmodule", "ccache"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")

    def once():
        cache = hosts.ok("ccache", "-k", "cache_dir").strip()  # debhelper has another home
        return {kind: build(kind, ROOT, tmp_path_factory.mktemp(kind), CCACHE_DIR=cache, TMPDIR=str(workplace))
                for kind in KINDS}

    def again():
        return {kind: build(kind, released, nobodys / f"{kind}-again", *AS_NOBODY, CCACHE_DIR=str(nobodys / "ccache"),
                            TMPDIR=str(nobodys), TZ="Pacific/Auckland", LC_ALL="C", USER="somebody-else",
                            HOME=str(nobodys)) for kind in KINDS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = [each.result() for each in (pool.submit(once), pool.submit(again))]
    return {kind: (first[kind], second[kind]) for kind in KINDS}


def only(files, beginning, end):
    found = [path for name, path in files.items() if name.startswith(beginning) and name.endswith(end)]
    assert len(found) == 1, f"{beginning}...{end}: {sorted(files)}"
    return found[0]


@pytest.fixture(scope="session")
def deb(builds):
    return only(builds["deb"][0], "leasehold_", ".deb")


@pytest.fixture(scope="session")
def rpm(builds):
    return only(builds["rpm"][0], "leasehold-0", ".x86_64.rpm")


@pytest.fixture(scope="session")
def newer(deb, tmp_path_factory):
    """The same package, called a later version."""
    folder = tmp_path_factory.mktemp("newer")
    hosts.ok("dpkg-deb", "-R", deb, folder / "tree")
    control = folder / "tree" / "DEBIAN" / "control"
    control.write_text(re.sub("^Version: .*$", "Version: 99-1", control.read_text(), flags=re.MULTILINE))
    shipped = folder / "tree" / CONF.lstrip("/")
    shipped.write_text(shipped.read_text() + "# The next version explains more.\n")
    hosts.ok("dpkg-deb", "--root-owner-group", "-b", folder / "tree", folder / "leasehold_99-1_amd64.deb")
    return folder / "leasehold_99-1_amd64.deb"


def machine_tree():
    """What a machine is made of."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    return pathlib.Path(hosts.ok(CHROOT, "prepare", "machine", release, "rpm autopkgtest dpkg-dev",
                                 " ".join([*NODE, "libaugeas0"]), timeout=3600).strip())


class Machine:
    """A minimal Debian of this machine's release, with a folder that both sides see at the same place."""

    def __init__(self, shared):
        self.shared = shared
        # It lives until its standard input ends, and everything on it with it.
        self.process = subprocess.Popen([CHROOT, "run", machine_tree(), f"{shared}:{shared}", "--", "sh", "-c",
                                         "echo ready; read -r _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        assert self.process.stdout.readline() == "ready\n", "the machine did not come up"
        self.init = str(hosts.only_child(self.process.pid))

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=600)
        self.process.stdout.close()

    def run(self, *command, timeout=600):
        return hosts.run("nsenter", "-t", self.init, "-m", "-u", "-p", "-n", "env", "-i", "HOME=/root",
                         "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive",
                         *command, timeout=timeout)

    def ok(self, *command, **options):
        result = self.run(*command, **options)
        assert result, str(result)
        return result.out

    def path(self, name):
        """How this process reaches a file of the machine."""
        return pathlib.Path(f"/proc/{self.init}/root{name}")

    def apt(self, *words):
        """apt-get without a network: what is fetched is all there is. Changed configuration is kept without a question,
        as by everybody who upgrades many nodes."""
        return self.run("apt-get", "-y", "-q", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confdef",
                        "-o", "Dpkg::Options::=--force-confold", *words)

    def services_asked_for(self):
        log = self.path("/var/log/services-asked-for")
        return log.read_text() if log.exists() else ""


@contextlib.contextmanager
def machine_with(folder):
    try:
        hosts.requirements()
    except hosts.Missing as missing:
        pytest.skip(str(missing))
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.stop()

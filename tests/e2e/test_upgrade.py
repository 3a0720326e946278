# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Guests that are started under one build of the plugin and go on under another one, and hosts that have different ones.
The other build is this tree's with longer structures in the vessel (tests/next), or the first one whose vessels have to
be understood for ever."""

import contextlib
import fcntl
import shutil
import subprocess

import expect
import hosts
import pytest

pytestmark = pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")

# From here on the vessel's format is kept.
FIRST = "56e6824"


def build_of(commit):
    """The plugin as it was at that commit. It is built once: what a commit contains does not change."""
    folder = hosts.ROOT / "build" / f"plugin-{commit}"
    if not (hosts.ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git checkout, or no git: the first version cannot be built")
    if not hosts.run("git", "-C", hosts.ROOT, "cat-file", "-e", f"{commit}^{{commit}}"):
        pytest.skip(f"this git checkout has no commit {commit} (a shallow clone?)")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes share the tests
        if not (folder / "done").exists():
            archive = subprocess.run(["git", "-C", hosts.ROOT, "archive", commit], check=True,
                                     capture_output=True).stdout
            for part in ("source", "build"):
                shutil.rmtree(folder / part, ignore_errors=True)
            (folder / "source").mkdir()
            subprocess.run(["tar", "-x", "-C", folder / "source"], check=True, input=archive)
            # As one unit and not optimized: in an eighth of the time.
            hosts.ok("meson", "setup", "-Dtests=false", "-Dtools=disabled", "-Dbuildtype=plain", "-Dunity=on",
                     "-Dunity_size=100", "-Dwarning_level=0", folder / "build", folder / "source")
            hosts.ok("ninja", "-C", folder / "build", "plugin/leasehold.so", timeout=600)
            (folder / "done").touch()
    return folder / "build" / "plugin"


@pytest.fixture(scope="module", params=["a later version", "the first version"])
def other(request):
    """Where the other build is."""
    if request.param == "the first version":
        return build_of(FIRST)
    later = hosts.ROOT / "build" / "tests" / "next"
    if not (later / "leasehold.so").exists():
        pytest.skip(f"{later}/leasehold.so was not built")
    return later


@pytest.fixture(scope="module", params=["on the image", "lease files", "flock"])
def medium(request, lab):
    """The configuration of all hosts."""
    lockspace = lab.dir / "upgrade-lockspace"
    lockspace.mkdir(mode=0o700, exist_ok=True)
    return {"on the image": "", "lease files": f'file_lockspace_dir = "{lockspace}"\n',
            "flock": f'storage_locks = [ "{lab.dir}=flock" ]\n'}[request.param]


@pytest.fixture
def versions(alpha, beta, medium, other):
    """versions(alpha, "other"): its libvirtd is started again with that build."""
    builds = {"ours": hosts.plugin_dir(), "other": other}

    def switch(host, version):
        host.kill_libvirtd()
        host.configure(plugin_conf=medium, plugin_dir=builds[version])
        host.start_libvirtd()
    with contextlib.ExitStack() as stack:
        for host in (alpha, beta):
            stack.enter_context(host.configured(plugin_conf=medium))
        yield switch


# In the short run each of the two meets ours on the image and with one of the other media.
SHORT = {("a later version", "on the image"), ("a later version", "lease files"), ("the first version", "on the image"),
         ("the first version", "flock")}


def is_shown(parameters):
    return (parameters["other"], parameters["medium"]) in SHORT


@pytest.mark.short(when=is_shown)
@pytest.mark.parametrize("first, second", [("ours", "other"), ("other", "ours")])
def test_a_guest_goes_on_when_the_plugin_is_replaced(alpha, beta, lab, image, guest, versions, first, second):
    disk, extra = image(), image("extra.img")
    running = guest(disk, emulator=lab.emulator_without_locks, scsi_controllers=1)
    versions(alpha, first)
    alpha.boot(running)
    pid = alpha.pid_here(running)
    for version in (second, first):
        versions(alpha, version)
        expect.taken(beta, disk)
        alpha.suspend(running)
        expect.taken(beta, disk)
        alpha.resume(running)
        if version == second:  # the one that attached it is not the one that detaches it
            alpha.ok("attach-disk", running.name, extra, "sda", "--subdriver", "raw")
            expect.taken(beta, disk, extra)
        else:
            expect.taken(beta, disk, extra)
            alpha.ok("detach-disk", running.name, "sda")
            expect.free(beta, extra)
    assert alpha.pid_here(running) == pid
    alpha.kill_qemu(running)
    expect.free(beta, disk)


@pytest.mark.short(when=is_shown)
@pytest.mark.parametrize("here, there", [("ours", "other"), ("other", "ours")])
def test_a_guest_migrates_between_hosts_with_different_versions(alpha, beta, gamma, lab, image, guest, medium,
                                                                versions, here, there):
    disk = image()
    mover = guest(disk, emulator=lab.emulator_without_locks)
    versions(alpha, here)
    versions(beta, there)
    alpha.boot(mover)
    with gamma.configured(plugin_conf=medium):
        for source, target in ((alpha, beta), (beta, alpha)):
            assert (result := source.migrate_to(target, mover, "--live")), str(result)
            assert target.state(mover) == "running"
            expect.taken(gamma, disk)
        alpha.kill_qemu(mover)
        expect.free(gamma, disk)


def overlay_on(base):
    top = base.with_name("top.qcow2")
    hosts.ok("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    return top


def is_read(host, image):
    expect.taken(host, image)
    expect.free(host, image, mode="readonly")


@pytest.mark.short(when=is_shown)
def test_a_guest_of_the_other_version_has_leases_of_what_lies_below_its_image_after_a_call(alpha, beta, lab, image,
                                                                                           guest, versions):
    base, cd = image("base.img"), image("cd.iso")
    top = overlay_on(base)
    running = guest(hosts.Disk(top, "vda", format="qcow2"), hosts.Disk(cd, "hdc", "readonly", device="cdrom"),
                    emulator=lab.emulator_without_locks)
    versions(alpha, "other")
    alpha.boot(running)
    versions(alpha, "ours")
    cd.unlink()
    for _ in range(2):
        alpha.suspend(running)
        alpha.resume(running)
        expect.runs(alpha, running)
        expect.taken(beta, top)
        is_read(beta, base)
    alpha.kill_qemu(running)
    expect.free(beta, top, base)


@pytest.mark.short(when=is_shown)
def test_a_guest_with_leases_of_lower_files_goes_on_under_the_other_version_and_back(alpha, beta, lab, image, guest,
                                                                                     versions):
    base = image("base.img")
    top = overlay_on(base)
    running = guest(hosts.Disk(top, "vda", format="qcow2"), emulator=lab.emulator_without_locks)
    versions(alpha, "ours")
    alpha.boot(running)
    is_read(beta, base)
    for version in ("other", "ours"):
        versions(alpha, version)
        alpha.suspend(running)
        alpha.resume(running)
        expect.runs(alpha, running)
        expect.taken(beta, top)
    is_read(beta, base)
    alpha.kill_qemu(running)
    expect.free(beta, top, base)

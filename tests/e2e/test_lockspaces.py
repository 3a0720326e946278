# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Leases that are not on the image: files in a lockspace, flock'ed files beside the image, block devices, <lease>."""

import contextlib
import os
import shutil
import subprocess

import expect
import hosts
import pytest
from steps import finished, performed, prepared, switching
from test_migration_failures import (EXPECTED, came_to_a_good_end, source_libvirtd, source_qemu, target_libvirtd,
                                     target_qemu, wait_for_the_end)


@pytest.fixture(scope="module", params=["lease files", "flock"])
def elsewhere(request, lab):
    """alpha and beta keep their leases away from the images."""
    lockspace = lab.dir / "lockspace"
    lockspace.mkdir(mode=0o700, exist_ok=True)
    text = {"lease files": f'file_lockspace_dir = "{lockspace}"\n',
            "flock": f'storage_locks = [ "{lab.dir}=flock" ]\n'}[request.param]
    with contextlib.ExitStack() as stack:
        for name in ("alpha", "beta"):
            stack.enter_context(lab.host(name).configured(plugin_conf=text))
        yield request.param


@pytest.fixture
def unlocked(lab, guest, image):
    """A guest whose QEMU's own locks never refuse, so that the lease alone decides; with its image."""
    return guest(image(), emulator=lab.emulator_without_locks, scsi_controllers=1)


def disk_of(guest):
    return guest.disks[0].path


def test_the_lease_lives_as_long_as_its_qemu_and_not_on_the_image(elsewhere, alpha, beta, unlocked):
    alpha.boot(unlocked)
    assert not any(lock.is_mark or lock.kind == "FLOCK" for lock in hosts.locks_on(disk_of(unlocked)))
    expect.taken(beta, disk_of(unlocked), by=(unlocked, alpha))
    alpha.kill_libvirtd()
    expect.taken(beta, disk_of(unlocked), by=(unlocked, alpha))
    alpha.start_libvirtd()
    alpha.suspend(unlocked)
    expect.taken(beta, disk_of(unlocked), by=(unlocked, alpha))
    alpha.resume(unlocked)
    alpha.kill_qemu(unlocked)
    expect.free(beta, disk_of(unlocked))


def test_a_guest_migrates_there_and_back_and_once_more(elsewhere, alpha, beta, unlocked):
    alpha.boot(unlocked)
    for source, target in [(alpha, beta), (beta, alpha), (alpha, beta)]:
        assert (result := source.migrate_to(target, unlocked, "--live")), result
        expect.runs(target, unlocked)
        expect.taken(source, disk_of(unlocked), by=(unlocked, target))


# In the short run each of them dies once with each medium, and at each step. All of it, with leases on the images:
# test_migration_failures.py.
SHORT = {("lease files", source_qemu, switching), ("lease files", target_qemu, performed),
         ("lease files", source_libvirtd, finished), ("lease files", target_libvirtd, prepared),
         ("lease files", source_qemu, finished), ("flock", source_qemu, performed), ("flock", target_qemu, finished),
         ("flock", source_libvirtd, prepared), ("flock", target_libvirtd, switching),
         ("flock", target_libvirtd, finished)}


@pytest.mark.short(when=lambda parameters: tuple(parameters[name] for name in ("elsewhere", "victim", "step")) in SHORT)
@pytest.mark.parametrize("step", [prepared, switching, performed, finished], ids=lambda step: step.__name__)
@pytest.mark.parametrize("victim", [source_qemu, target_qemu, source_libvirtd, target_libvirtd],
                         ids=lambda victim: victim.__name__)
def test_whoever_dies_in_a_migration_exactly_one_host_may_run_the_guest(elsewhere, alpha, beta, unlocked, victim, step):
    alpha.boot(unlocked)
    with step(alpha, beta, unlocked) as (migration, go_on):
        expect.taken(alpha, disk_of(unlocked))
        victim(alpha, beta, unlocked, migration)
        go_on()
        wait_for_the_end(migration, alpha, victim)
    came_to_a_good_end(alpha, beta, unlocked, EXPECTED[victim][step.__name__], disk_of(unlocked))


def test_the_same_guest_does_not_start_twice(elsewhere, alpha, beta, unlocked):
    alpha.boot(unlocked)
    beta.define(unlocked)
    assert "already runs elsewhere" in beta.refused("start", unlocked.name)


def test_an_attached_disk_is_leased_and_a_detached_one_is_free(elsewhere, alpha, beta, image, unlocked):
    extra = image("extra.img")
    alpha.start_guest(unlocked)
    for _ in range(2):
        alpha.ok("attach-disk", unlocked.name, extra, "sda", "--subdriver", "raw")
        expect.taken(beta, extra, disk_of(unlocked), by=(unlocked, alpha))
        alpha.ok("detach-disk", unlocked.name, "sda")
        expect.free(beta, extra)


def test_readers_share_and_a_writer_is_refused(elsewhere, alpha, beta, lab, image, guest):
    disk = image()
    for host in (alpha, beta):
        host.start_guest(guest(hosts.Disk(disk, "vda", "readonly"), emulator=lab.emulator_without_locks))
    expect.taken(alpha, disk)
    expect.free(alpha, disk, mode="readonly")


def test_a_program_outside_leasehold_is_noticed(elsewhere, alpha, image, guest):
    disk = image()
    wanted = guest(disk)
    alpha.define(wanted)
    with hosts.foreign_qemu(alpha, disk) as pid:
        expect.names_pid(alpha.refused("start", wanted.name), pid)
    alpha.ok("start", wanted.name)


# --- the lockspace itself

@pytest.mark.parametrize("make, problem", [
    (lambda path: None, "does not exist"),
    (lambda path: path.symlink_to("/tmp"), "symbolic link"),
    (lambda path: path.write_text(""), "not a directory"),
    (lambda path: (path.mkdir(), path.chmod(0o777)), "others than root could remove leases"),
    (lambda path: (path.mkdir(), os.chown(path, 1000, 1000)), "others than root could remove leases"),
], ids=["missing", "symbolic link", "file", "writable for all", "somebody else's"])
def test_a_bad_lockspace_is_named_with_its_option_and_nothing_starts(lab, alpha, image, guest, make, problem):
    lockspace = lab.dir / lab.unique("bad")
    make(lockspace)
    wanted = guest(image())
    with alpha.configured(plugin_conf=f'file_lockspace_dir = "{lockspace}"\n'):
        alpha.define(wanted)
        message = alpha.refused("start", wanted.name)
    for fact in (str(lockspace), "file_lockspace_dir", problem, wanted.name):
        assert fact in message, f"{fact!r} is not in: {message}"


def test_a_lockspace_that_only_this_host_sees_does_not_pretend_for_shared_images(lab, alpha, images, image, guest):
    """The images' storage is said to be shared; the lockspace is a tmpfs of this host."""
    lockspace = lab.dir / lab.unique("local")
    lockspace.mkdir(mode=0o700)
    wanted = guest(image())
    alpha.mount("-t", "tmpfs", "-o", "mode=0700", "tmpfs", lockspace)
    try:
        with alpha.configured(plugin_conf=f'file_lockspace_dir = "{lockspace}"\n'
                                          f'storage_locks = [ "{images}=ofd" ]\n'):
            alpha.define(wanted)
            assert "only this host" in alpha.refused("start", wanted.name)
    finally:
        alpha.unmount(lockspace)


# --- storage without a lock to trust

@pytest.fixture
def fuse(lab, alpha, images):
    """The images once more on alpha, through a FUSE file system."""
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("no bindfs or no FUSE here")
    point = lab.dir / lab.unique("fuse")
    point.mkdir()
    with alpha.configured():  # of its own: `elsewhere` is the module's, and may be in force still
        alpha.ok_inside("bindfs", images, point)
        yield point
        alpha.clean()
        alpha.unmount(point)


def test_an_iso_without_locks_is_no_reason_not_to_start(alpha, fuse, image, guest):
    image("tools.iso")
    iso = fuse / "tools.iso"
    readers = [guest(image(f"disk{number}.img"), hosts.Disk(iso, "hdc", "readonly", device="cdrom"))
               for number in range(2)]
    alpha.forget_log()
    for reader in readers:
        alpha.start_guest(reader)
        alpha.ok("suspend", reader.name)
        alpha.ok("resume", reader.name)
    said = (alpha.dir / "log" / "qemu" / f"{readers[0].name}.log").read_text() + alpha.log()
    assert f"'{iso}' is leased for reading on this host only" in said
    expect.taken(alpha, iso)
    alpha.ok("change-media", readers[0].name, "hdc", "--eject")
    with alpha.configured(plugin_conf="require_cluster_leases = 1\n"):
        wanted = guest(hosts.Disk(iso, "hdc", "readonly", device="cdrom"))
        alpha.define(wanted)
        assert "require_cluster_leases" in alpha.refused("start", wanted.name)


# --- block devices

@pytest.fixture
def loop(image):
    """A block device over an image of its own."""
    file = image("device.img")
    found = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"no loop devices here: {found.stderr.strip()}")
    yield found.stdout.strip()
    subprocess.run(["losetup", "--detach", found.stdout.strip()], check=True)


@pytest.mark.parametrize("layers", ["", "device_layers = 0\n"], ids=["with its file", "alone"])
def test_a_block_device_is_leased_on_this_host_and_the_log_says_so(lab, alpha, beta, loop, guest, layers):
    """Its file is on storage that both hosts share."""
    with contextlib.ExitStack() as stack:
        for host in (alpha, beta):
            stack.enter_context(host.configured(plugin_conf=layers))
        block_device_is_leased(lab, alpha, beta, loop, guest, layers)


def block_device_is_leased(lab, alpha, beta, loop, guest, layers):
    wanted = guest(loop, emulator=lab.emulator_without_locks)
    alpha.forget_log()
    alpha.boot(wanted)
    expect.taken(alpha, loop)
    if "device_layers" in layers:
        expect.free(beta, loop)
    said = (alpha.dir / "log" / "qemu" / f"{wanted.name}.log").read_text() + alpha.log()
    assert "on this host only" in said and loop in said
    alpha.kill_qemu(wanted)
    expect.free(alpha, loop)


def test_a_loop_device_and_its_file_are_one_resource(alpha, images, loop, guest):
    file = images / "device.img"
    for one, other in ((loop, file), (file, loop)):
        has, wants = guest(one), guest(other)
        alpha.boot(has)
        alpha.ok("suspend", has.name)
        alpha.ok("resume", has.name)
        alpha.define(wants)
        expect.names_holder(alpha.refused("start", wants.name), file if one == loop else one, has, alpha)
        expect.taken(alpha, one, other)
        alpha.kill_qemu(has)
        alpha.ok("start", wants.name)
        alpha.ok("destroy", wants.name)


def test_a_device_that_the_host_uses_itself_is_refused(alpha, loop, guest):
    wanted = guest(loop)
    alpha.define(wanted)
    claim = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        assert "in use by this host itself" in alpha.refused("start", wanted.name)
        with alpha.configured(plugin_conf='host_devices = "warn"\n'):
            alpha.ok("start", wanted.name)
    finally:
        os.close(claim)


def test_a_block_device_is_refused_where_the_cluster_has_to_respect_it(alpha, loop, guest):
    wanted = guest(loop)
    with alpha.configured(plugin_conf="require_cluster_leases = 1\n"):
        alpha.define(wanted)
        message = alpha.refused("start", wanted.name)
    assert "require_cluster_leases" in message and loop in message


# --- <lease>

@pytest.fixture
def leased_guest(lab, guest, image, images):
    """leased_guest(key, ...): a guest with a disk of its own and a <lease>."""
    target = images / "leases"
    target.touch()

    def make(key="somekey", offset=0, lockspace="area", path=target, **options):
        return guest(image(f"{lab.unique('own')}.img"), devices=lease_xml(key, offset, lockspace, path), **options)
    return make


def lease_xml(key, offset, lockspace, path):
    return (f"<lease><lockspace>{lockspace}</lockspace><key>{key}</key>"
            f"<target path='{path}' offset='{offset}'/></lease>")


def test_two_guests_with_one_lease_exclude_each_other_on_all_hosts(alpha, beta, leased_guest):
    holder, other = leased_guest(), leased_guest()
    alpha.boot(holder)
    for host in (alpha, beta):
        host.define(other)
        message = host.refused("start", other.name)
        for fact in (holder.name, "somekey"):
            assert fact in message, f"{fact!r} is not in: {message}"
    alpha.kill_qemu(holder)
    beta.ok("start", other.name)


def test_leases_with_other_keys_offsets_or_lockspaces_are_others(alpha, leased_guest):
    for options in ({}, {"key": "other"}, {"offset": 512}, {"lockspace": "elsewhere"}):
        alpha.start_guest(leased_guest(**options))


def test_a_guest_with_a_lease_migrates_and_keeps_it(alpha, beta, lab, leased_guest):
    holder, other = leased_guest(emulator=lab.emulator_without_locks), leased_guest()
    alpha.boot(holder)
    for source, target in [(alpha, beta), (beta, alpha)]:
        assert (result := source.migrate_to(target, holder, "--live")), result
        source.define(other)
        assert holder.name in source.refused("start", other.name)


def test_a_lease_is_attached_and_detached(alpha, beta, lab, images, leased_guest, unlocked):
    if hosts.libvirt_version() <= (7, 0):
        pytest.skip("libvirtd 7.0 aborts when a <lease> is attached (virDomainDefFree), without a lock manager as well")
    alpha.boot(unlocked)
    other = leased_guest()
    beta.define(other)
    device = images / "lease.xml"
    device.write_text(lease_xml("somekey", 0, "area", images / "leases"))
    alpha.ok("attach-device", unlocked.name, device)
    assert unlocked.name in beta.refused("start", other.name)
    alpha.ok("detach-device", unlocked.name, device)
    beta.ok("start", other.name)


def test_a_lease_without_its_target_is_refused(alpha, images, leased_guest):
    wanted = leased_guest(path=images / "nowhere")
    alpha.define(wanted)
    assert str(images / "nowhere") in alpha.refused("start", wanted.name)


def test_where_disks_are_not_leased_by_themselves_a_lease_is_enough(alpha, beta, image, guest, leased_guest):
    with alpha.configured(plugin_conf="auto_disk_leases = 0\nrequire_lease_for_disks = 1\n"):
        bare, holder = guest(image("bare.img")), leased_guest()
        alpha.define(bare)
        assert "no lease" in alpha.refused("start", bare.name)
        alpha.start_guest(holder)
        expect.not_leased(disk_of(holder))
        other = leased_guest()
        alpha.define(other)
        assert holder.name in alpha.refused("start", other.name)

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What virsh prints when leasehold says no: what, who, where, and what to do. Bad input and bad configuration."""

import os

import expect
import hosts
import pytest
from documents import documented

pytestmark = pytest.mark.skipif(not expect.LEASEHOLD, reason="these are leasehold's messages")


# --- the refusal

@pytest.mark.quick
def test_the_refusal_of_a_start_comes_from_the_lock_manager_and_names_the_holder(alpha, beta, image, guest):
    disk = image()
    owner, late = guest(disk), guest(disk)
    alpha.start_guest(owner)
    beta.define(late)
    error = beta.refused(*documented("virsh start")[1:], late.name)
    assert "Lock Driver error" in error and "resource busy" in error
    expect.names_holder(error, disk, owner, alpha)


def test_the_refusal_of_an_attach_comes_from_the_lock_manager_and_names_the_holder(alpha, beta, image, guest):
    disk = image("wanted.img")
    owner, late = guest(disk), guest(image("own.img"), scsi_controllers=1)
    alpha.start_guest(owner)
    beta.start_guest(late)
    error = beta.refused("attach-disk", late.name, disk, "sda", "--subdriver", "raw")
    assert "resource busy" in error
    expect.names_holder(error, disk, owner, alpha)


def test_the_refusal_of_the_same_guest_says_where_it_is(alpha, beta, image, guest):
    disk = image()
    owner = guest(disk)
    alpha.start_guest(owner)
    beta.define(owner)
    expect.names_holder(beta.refused("start", owner.name), disk, owner, alpha)


def test_the_refusal_names_the_pid_of_a_qemu_that_libvirt_does_not_know(alpha, image, guest):
    disk = image()
    with hosts.foreign_qemu(alpha, disk) as pid:
        late = guest(disk)
        alpha.define(late)
        error = alpha.refused("start", late.name)
        assert "resource busy" in error and str(disk) in error
        expect.names_pid(error, pid)


def test_an_image_without_room_for_a_record_is_protected_all_the_same(alpha, beta, image, guest):
    disk = image()
    with pytest.raises(OSError):
        for number in range(64):  # until the file's extended attributes are full
            os.setxattr(disk, f"user.filler{number}", b"x" * 1500)
            os.setxattr(disk, f"user.small{number}", b"x" * 20)
    with pytest.raises(OSError):
        for number in range(4096):
            os.setxattr(disk, f"user.{number}", b"x")
    owner = guest(disk)
    alpha.start_guest(owner)
    refusal = beta.try_take(disk)
    assert not refusal
    assert str(disk) in refusal.err and "resource busy" in refusal.err
    alpha.destroy(owner)
    expect.free(beta, disk)


# --- bad input

def start_refused(host, guest, *facts):
    """virsh start says no with these facts, and nothing of it stays: no guest, no descriptor in libvirtd."""
    host.define(guest)
    host.virsh("start", guest.name)  # what libvirtd opens at first use is no leak
    before = host.settled_descriptors()
    for _ in range(3):
        error = host.refused("start", guest.name)
    for fact in facts:
        assert str(fact) in error, f"{fact!r} is not in: {error}"
    assert "cause is unknown" not in error
    assert host.state(guest) == "shut off"
    host.comes_down_to(before)
    return error


def test_a_missing_image_is_refused(alpha, images, guest):
    start_refused(alpha, guest(images / "nothing.img"), images / "nothing.img", "No such file")


def test_an_image_that_is_a_dangling_link_is_refused(alpha, images, guest):
    link = images / "link.img"
    link.symlink_to(images / "nothing.img")
    start_refused(alpha, guest(link), link, "No such file")


def test_a_directory_in_place_of_an_image_is_refused(alpha, images, guest, image):
    directory = images / "directory"
    directory.mkdir()
    first = image()
    start_refused(alpha, guest(first, directory), directory)
    expect.not_leased(first)


def test_an_image_on_a_readonly_filesystem_is_refused_for_writing_and_fine_for_reading(alpha, image, images, guest):
    disk, readonly = image(), images / "readonly"
    readonly.mkdir()
    alpha.mount("-o", "bind,ro", images, readonly)
    try:
        start_refused(alpha, guest(readonly / disk.name), readonly / disk.name, "Read-only")
        expect.not_leased(disk)
        alpha.start_guest(guest(hosts.Disk(readonly / disk.name, "vda", "readonly")))
        expect.taken(alpha, disk)
    finally:
        alpha.clean()
        alpha.unmount(readonly)


def test_a_fuse_filesystem_is_recognised_and_refused_with_the_way_out(alpha, image, images, guest):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here")
    disk, fuse = image(), images / "fuse.img"
    fuse.touch()
    daemon = alpha.spawn("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={disk}",
                         "--export", f"type=fuse,id=export,node-name=disk,mountpoint={fuse},writable=on,growable=off",
                         log="fuse.log")
    try:
        hosts.wait_until(lambda: alpha.inside("mountpoint", "-q", fuse) or daemon.poll() is not None,
                         "the export is mounted")
        if daemon.poll() is not None:
            pytest.skip(f"no FUSE export here: {(alpha.dir / 'log' / 'fuse.log').read_text()}")
        error = start_refused(alpha, guest(fuse), fuse)
        assert "fuse" in error.lower() and "lockspace" in error.lower(), error
    finally:
        if daemon.poll() is None:
            hosts.kill_and_wait(hosts.only_child(daemon.pid))
        alpha.unmount(fuse)
        daemon.wait(timeout=hosts.PATIENCE)


# --- configuration

@pytest.mark.parametrize("line, option", [("no_such_option = 1", "no_such_option"),
                                          ('auto_disk_leases = "yes"', "auto_disk_leases"),
                                          ("auto_disk_leases = 7", "auto_disk_leases"),
                                          ("require_lease_for_disks = [ 1 ]", "require_lease_for_disks"),
                                          ('guests_without_lease = "perhaps"', "guests_without_lease"),
                                          ("auto_disk_leases 1", "auto_disk_leases")])
def test_a_mistake_in_the_configuration_stops_the_driver_and_says_where(gamma, line, option):
    gamma.kill_libvirtd()
    gamma.forget_log()
    gamma.configure(plugin_conf=f"# a comment\n\n{line}\n")
    gamma.start_libvirtd(expect_failure=True)
    try:
        hosts.wait_until(lambda: "qemu-leasehold.conf" in gamma.log(), "libvirtd says what it dislikes")
        [complaint] = [l for l in gamma.log().splitlines() if "qemu-leasehold.conf" in l][:1]
        assert "/etc/libvirt/qemu-leasehold.conf:3" in complaint and option in complaint, complaint
        assert not gamma.virsh("list"), "libvirtd serves guests without the configuration it was given"
    finally:
        gamma.kill_libvirtd()
        gamma.configure()
        gamma.start_libvirtd()


def test_a_configuration_of_comments_and_defaults_is_accepted(gamma, image, guest):
    with gamma.configured(plugin_conf="# nothing but\n\nauto_disk_leases = 1\n"):
        disk = image()
        gamma.start_guest(guest(disk))
        expect.taken(gamma, disk)


def test_without_automatic_leases_a_guest_with_writable_disks_needs_a_lease(gamma, image, guest):
    with gamma.configured(plugin_conf="auto_disk_leases = 0\nrequire_lease_for_disks = 1\n"):
        disk = image()
        naked = guest(disk)
        gamma.define(naked)
        assert str(disk) in (error := gamma.refused("start", naked.name)) or "lease" in error
        gamma.start_guest(guest(hosts.Disk(disk, "vda", "readonly")))


def test_without_automatic_leases_images_are_left_alone(gamma, image, guest):
    with gamma.configured(plugin_conf="auto_disk_leases = 0\nrequire_lease_for_disks = 0\n"):
        disk = image()
        gamma.start_guest(guest(disk))
        expect.not_leased(disk)
        gamma.clean()


# --- a guest that was started before leasehold was enabled

@pytest.fixture
def older(gamma, image, guest, emulator):
    """Runs on gamma without a lease: libvirtd had no lock manager when it started."""
    older = guest(image(), emulator=emulator, scsi_controllers=1)
    gamma.kill_libvirtd()
    gamma.configure(lock_manager="none")
    gamma.start_libvirtd()
    gamma.start_guest(older)
    gamma.kill_libvirtd()
    yield older
    gamma.clean()
    gamma.kill_libvirtd()
    gamma.configure()
    gamma.start_libvirtd()


def test_a_guest_started_before_leasehold_runs_on_but_does_not_resume(gamma, image, older):
    gamma.configure(plugin_conf='guests_without_lease = "refuse"\n')
    gamma.start_libvirtd()
    expect.runs(gamma, older)
    error = gamma.refused("attach-disk", older.name, image("more.img"), "sda", "--subdriver", "raw")
    assert "guests_without_lease" in error, error
    gamma.suspend(older)
    error = gamma.refused("resume", older.name)
    for fact in (older.name, "guests_without_lease"):
        assert fact in error, f"{fact!r} is not in: {error}"
    assert gamma.state(older) == "paused"
    gamma.destroy(older)
    gamma.ok("start", older.name)
    expect.taken(gamma, older.disks[0].path, by=(older, gamma))


def test_a_guest_started_before_leasehold_resumes_where_the_administrator_allows_it(gamma, older):
    gamma.configure(plugin_conf='guests_without_lease = "allow"\n')
    gamma.start_libvirtd()
    gamma.suspend(older)
    gamma.resume(older)
    expect.runs(gamma, older)
    gamma.destroy(older)
    gamma.ok("start", older.name)
    expect.taken(gamma, older.disks[0].path, by=(older, gamma))


# --- a host after the other

def test_a_guest_migrates_in_from_a_host_without_leasehold_and_is_protected_afterwards(alpha, beta, image, guest):
    disk = image()
    mover = guest(disk)
    with alpha.configured(lock_manager="none"):
        alpha.boot(mover)
        refused = alpha.migrate_to(beta, mover, "--live")
        assert not refused and 'qemu_locks = "warn"' in refused.err, refused
        assert alpha.state(mover) == "running"
        expect.not_leased(disk)
        with beta.configured(plugin_conf='qemu_locks = "warn"\n'):
            assert (result := alpha.migrate_to(beta, mover, "--live")), result
            expect.runs(beta, mover)
        expect.taken(beta, disk, by=(mover, beta))
        beta.destroy(mover)

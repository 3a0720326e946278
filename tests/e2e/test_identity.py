# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Whose lease it is: a running guest has the files that its QEMU has open, wherever their paths lead by now. What was
deleted, renamed, replaced or mounted over does not keep it from running, and what has taken the old name is not its."""

import os
import shutil
import time

import expect
import hosts
import pytest

RESTARTS = hosts.libvirt_version() > (7, 0)  # 7.0 ends a guest that powers off, whatever its on_poweroff says


# --- what makes libvirt ask for a running guest's leases again

def resumes(host, guest):
    host.suspend(guest)
    host.resume(guest)


def restarts(host, guest):
    """By on_poweroff; what `virsh reboot --mode acpi` comes to as well."""
    pid, times = host.pid_here(guest), guest.serial.read_text().count("R")
    host.press(guest, "p")
    hosts.wait_until(lambda: guest.serial.read_text().count("R") > times or host.state(guest) == "shut off",
                     "the guest was restarted, or has ended")
    assert host.state(guest) != "shut off", host.log()[-1000:]
    host.wait_state(guest, "running")
    assert host.pid_here(guest) == pid


def is_dumped(host, guest):
    core = host.dir / "core"
    host.ok("dump", "--memory-only", guest.name, core)
    core.unlink()


def is_not_saved(host, guest):
    assert "no-such-directory" in host.refused("save", guest.name, host.dir / "no-such-directory" / "ram")


def goes_through(host, guest, *events):
    """All of them; after each the guest runs."""
    for event in events or (resumes, is_dumped, is_not_saved, *([restarts] if RESTARTS else [])):
        event(host, guest)
        assert host.state(guest) == "running", f"{event.__name__}: {host.log()[-1000:]}"


def replace(path, kept):
    """A copy takes the name of a file, which goes on under another one."""
    os.link(path, kept)
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    os.rename(copy, path)
    return kept


# In a lockspace the lease of a file goes by its path, so that old and new one are the same there.
by_file = pytest.mark.parametrize("medium", ["on the image", "flock"], indirect=True)
by_path = pytest.mark.parametrize("medium", ["lease files"], indirect=True)


# --- the CD

@pytest.fixture
def listener(image, guest, emulator):
    """A guest with a CD in its drive: (guest, its disk, its CD)."""
    disk, cd = image(), image("cd.iso")
    return guest(disk, hosts.Disk(cd, "hdc", "readonly", device="cdrom"), emulator=emulator,
                 on_poweroff="restart"), disk, cd


def test_a_guest_runs_on_when_the_cd_in_its_drive_was_deleted(medium, alpha, beta, listener):
    owner, disk, cd = listener
    alpha.boot(owner)
    cd.unlink()
    goes_through(alpha, owner)
    expect.taken(beta, disk, by=(owner, alpha))


def test_a_snapshot_with_memory_leaves_a_guest_running_whose_cd_was_deleted(alpha, beta, images, listener):
    owner, disk, cd = listener
    alpha.boot(owner)
    cd.unlink()
    overlay = images / "overlay.qcow2"
    alpha.ok("snapshot-create-as", owner.name, "s1", "--memspec", f"file={images / 'ram'},snapshot=external",
             "--diskspec", f"vda,file={overlay}")
    expect.runs(alpha, owner)
    expect.taken(beta, disk, overlay)


def test_a_cd_that_took_the_name_of_a_deleted_one_is_not_the_guests(alpha, beta, lab, images, guest, listener):
    owner, disk, cd = listener
    alpha.boot(owner)
    old = replace(cd, images / "old.iso")
    writer = guest(cd, emulator=lab.emulator_without_locks)
    beta.start_guest(writer)
    goes_through(alpha, owner)
    expect.taken(beta, disk, by=(owner, alpha))
    expect.taken(beta, old)
    expect.free(beta, old, mode="readonly")
    expect.runs(beta, writer)


def test_a_new_cd_of_the_same_name_is_leased_and_the_old_one_is_free(medium, alpha, beta, images, listener):
    """libvirt takes a medium of the same name for the same one, unless the drive was empty in between."""
    owner, _, cd = listener
    alpha.boot(owner)  # a BIOS that resets the drive closes its tray under libvirt
    old = replace(cd, images / "old.iso")
    alpha.ok("change-media", owner.name, "hdc", "--eject", "--live", "--force")
    expect.free(beta, cd, old)
    alpha.ok("change-media", owner.name, "hdc", cd, "--insert", "--live", "--force")
    expect.taken(beta, cd)
    expect.free(beta, cd, mode="readonly")
    expect.free(beta, old)
    goes_through(alpha, owner, resumes)
    expect.taken(beta, cd)
    expect.free(beta, old)


def test_a_cd_that_is_changed_for_the_file_that_replaced_it_by_another_name(alpha, beta, images, listener):
    """The old one and the new one share the file, or the name, and never the lease."""
    owner, _, cd = listener
    alpha.boot(owner)
    old = replace(cd, images / "old.iso")
    link = images / "link.iso"
    link.symlink_to(cd)
    alpha.ok("change-media", owner.name, "hdc", link, "--update", "--live", "--force")
    expect.taken(beta, cd)
    expect.free(beta, cd, mode="readonly")
    expect.free(beta, old)
    alpha.ok("change-media", owner.name, "hdc", "--eject", "--live", "--force")
    expect.free(beta, cd, old)


@by_path
def test_in_a_lockspace_a_cd_is_changed_for_the_file_that_replaced_it(medium, alpha, beta, images, listener):
    owner, _, cd = listener
    alpha.boot(owner)
    replace(cd, images / "old.iso")
    link = images / "link.iso"
    link.symlink_to(cd)
    alpha.ok("change-media", owner.name, "hdc", link, "--update", "--live", "--force")
    for event in (resumes, is_dumped):
        expect.taken(beta, cd)
        expect.free(beta, cd, mode="readonly")
        goes_through(alpha, owner, event)
    alpha.ok("change-media", owner.name, "hdc", "--eject", "--live", "--force")
    expect.free(beta, cd)


def test_a_cd_that_is_changed_for_itself_under_another_name_stays_leased(alpha, beta, images, listener):
    owner, _, cd = listener
    alpha.boot(owner)
    link = images / "link.iso"
    link.symlink_to(cd)
    alpha.ok("change-media", owner.name, "hdc", link, "--update", "--live", "--force")
    expect.taken(beta, cd)
    for event in (is_dumped, resumes):
        goes_through(alpha, owner, event)
        expect.taken(beta, cd)
        expect.free(beta, cd, mode="readonly")
    alpha.ok("change-media", owner.name, "hdc", "--eject", "--live", "--force")
    expect.free(beta, cd)


def test_a_guest_stopped_by_an_io_error_resumes_when_its_cd_was_deleted(lab, alpha, image, images, guest, emulator):
    small, cd = images / "small", image("cd.iso")
    small.mkdir()
    alpha.mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    try:
        disk, filler = small / "disk.img", alpha.seen(small / "filler")
        lab.image(alpha.seen(disk))
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        full = guest(hosts.Disk(disk, "vda", error_policy="stop"),
                     hosts.Disk(cd, "hdc", "readonly", device="cdrom"), emulator=emulator)
        alpha.boot(full)
        cd.unlink()
        alpha.press(full, "w")
        alpha.wait_state(full, "paused")
        filler.unlink()
        alpha.resume(full)
        hosts.wait_until(lambda: full.said("W"), "the write has succeeded")
        expect.taken(alpha, disk, by=(full, alpha))
        alpha.destroy(full)
    finally:
        alpha.unmount(small)


# --- the disk itself

@pytest.mark.parametrize("beside", [False, True], ids=["the only disk", "one of two"])
@pytest.mark.parametrize("loss", ["deleted", "moved", "its directory renamed", "mounted over", "unmounted"])
def test_a_guest_runs_on_whatever_happened_to_the_path_of_its_disk(alpha, beta, image, images, guest, emulator, loss,
                                                                   beside):
    directory = images / "directory"
    directory.mkdir()
    disk = image("directory/disk.img")
    path = images / "mounted" / disk.name if loss == "unmounted" else disk
    if loss == "unmounted":
        path.parent.mkdir()
        alpha.mount("--bind", directory, path.parent)
    owner = guest(path, *([image("second.img")] if beside else []), emulator=emulator, on_poweroff="restart")
    alpha.boot(owner)
    if loss == "deleted":
        disk.unlink()
    elif loss == "moved":
        disk = disk.rename(images / "moved.img")
    elif loss == "its directory renamed":
        directory.rename(images / "renamed")
        disk = images / "renamed" / disk.name
    elif loss == "mounted over":
        alpha.mount("-t", "tmpfs", "tmpfs", directory)
    else:
        alpha.unmount(path.parent)
    try:
        goes_through(alpha, owner)
        if loss != "deleted":
            expect.taken(beta, disk, by=(owner, alpha) if disk == path else None)
        alpha.destroy(owner)
        if loss != "deleted":
            expect.free(beta, disk)
    finally:
        if loss == "mounted over":
            alpha.unmount(directory)


@by_file
@pytest.mark.parametrize("beside", [False, True], ids=["the only disk", "one of two"])
def test_a_file_that_took_the_name_of_a_guests_disk_stays_free(medium, alpha, beta, lab, image, images, guest, beside):
    """At the latest after the next call: of a restart libvirt says no more than of a hot-plug."""
    disk = image()
    owner = guest(disk, *([image("second.img")] if beside else []), emulator=lab.emulator_without_locks,
                  on_poweroff="restart")
    alpha.boot(owner)
    old = replace(disk, images / "old.img")
    for event in (resumes, is_dumped, is_not_saved, *([restarts, resumes] if RESTARTS else [])):
        goes_through(alpha, owner, event)
        if event is not restarts:
            expect.free(beta, disk)
        expect.taken(beta, old)


@by_path
@pytest.mark.parametrize("beside", [False, True], ids=["the only disk", "one of two"])
def test_in_a_lockspace_a_path_is_a_guests_as_long_as_it_has_what_was_there(medium, alpha, beta, lab, image, images,
                                                                            guest, beside):
    disk = image()
    owner = guest(disk, *([image("second.img")] if beside else []), emulator=lab.emulator_without_locks,
                  on_poweroff="restart")
    alpha.boot(owner)
    replace(disk, images / "old.img")
    goes_through(alpha, owner)
    expect.taken(beta, disk, by=(owner, alpha))
    alpha.destroy(owner)
    expect.free(beta, disk)


@pytest.mark.parametrize("which", ["the only disk", "one of two"])
def test_a_link_that_was_turned_to_the_disk_of_another_guest(alpha, beta, lab, image, images, guest, which):
    """An only disk has the stock QEMU: of a restart libvirt says no more than of the hot-plug of that disk, and it is
    QEMU's own locks that would refuse a second writer."""
    old, new, link = image("old.img"), image("new.img"), images / "current.img"
    link.symlink_to(old)
    only = which == "the only disk"
    emulator = hosts.QEMU if only else lab.emulator_without_locks
    owner = guest(link, *([] if only else [image("second.img")]), emulator=emulator, on_poweroff="restart")
    alpha.boot(owner)
    link.unlink()
    link.symlink_to(new)
    other = guest(new, emulator=emulator)
    beta.start_guest(other)
    goes_through(alpha, owner)
    expect.runs(beta, other)
    expect.taken(beta, old)
    expect.taken(alpha, new, by=(other, beta))
    goes_through(beta, other, resumes)
    beta.destroy(other)
    expect.free(beta, new)
    expect.taken(beta, old)


def test_an_only_disk_replaced_by_one_that_another_guest_writes_to_does_not_stop_a_resume(alpha, beta, lab, image,
                                                                                          images, guest):
    """Where QEMU's locks would not refuse, a restart cannot be told from a hot-plug of that disk; a resume can."""
    disk = image()
    owner = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(owner)
    old = replace(disk, images / "old.img")
    other = guest(disk, emulator=lab.emulator_without_locks)
    beta.start_guest(other)
    goes_through(alpha, owner, resumes, is_dumped, is_not_saved)
    expect.taken(beta, old)
    expect.runs(beta, other)


def test_a_suspended_guest_whose_disk_was_deleted_is_given_its_lease_again_by_a_new_libvirtd(alpha, beta, listener,
                                                                                             images):
    owner, disk, cd = listener
    alpha.boot(owner)
    alpha.suspend(owner)
    moved = disk.rename(images / "moved.img")
    cd.unlink()
    alpha.kill_libvirtd()
    alpha.start_libvirtd()
    expect.taken(beta, moved)
    alpha.resume(owner)
    expect.runs(alpha, owner)
    expect.taken(beta, moved)
    goes_through(alpha, owner)


# --- disks that come and go

@pytest.fixture
def scsi(image, guest, lab):
    return guest(image(), emulator=lab.emulator_without_locks, scsi_controllers=1, on_poweroff="restart")


def attach(host, guest, path, target):
    host.ok("attach-disk", guest.name, path, target, "--subdriver", "raw")


def attach_and_replace(host, guest, image, images):
    """The guest runs and has a file as sda, whose name a copy has taken: (the copy, the file as it is called now)."""
    extra = image("extra.img")
    host.start_guest(guest)
    attach(host, guest, extra, "sda")
    return extra, replace(extra, images / "old.img")


@by_file
def test_a_hot_plugged_disk_that_was_replaced_by_a_copy_leaves_both_free_when_it_goes(medium, alpha, beta, image,
                                                                                      images, scsi):
    extra, old = attach_and_replace(alpha, scsi, image, images)
    expect.taken(beta, old)
    expect.free(beta, extra)
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, old, extra)
    goes_through(alpha, scsi, resumes)
    expect.free(beta, old, extra)


def test_a_hot_plugged_disk_and_the_copy_that_replaced_it_are_two(alpha, beta, image, images, scsi):
    extra, old = attach_and_replace(alpha, scsi, image, images)
    attach(alpha, scsi, extra, "sdb")
    expect.taken(beta, old, extra)
    goes_through(alpha, scsi, resumes)
    expect.taken(beta, old, extra)
    alpha.ok("detach-disk", scsi.name, "sdb")
    expect.taken(beta, old)
    expect.free(beta, extra)
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, old, extra)


@by_path
@pytest.mark.parametrize("order", [("sda", "sdb"), ("sdb", "sda")], ids=["the old one goes first", "the new one"])
def test_in_a_lockspace_a_disk_and_the_copy_that_replaced_it_have_one_lease(medium, alpha, beta, image, images, scsi,
                                                                           order):
    """That of the name, until both are gone. On their own host each is known by its number as well."""
    extra, old = attach_and_replace(alpha, scsi, image, images)
    attach(alpha, scsi, extra, "sdb")
    there = {"sda": old, "sdb": extra}
    for target in order:
        expect.taken(beta, extra)
        expect.taken(alpha, extra, *there.values())
        goes_through(alpha, scsi, resumes)
        alpha.kill_libvirtd()
        alpha.start_libvirtd()
        alpha.ok("detach-disk", scsi.name, target)
        there.pop(target)
    expect.free(beta, extra)
    expect.free(alpha, old)
    goes_through(alpha, scsi, resumes)
    expect.free(beta, extra)


def test_the_old_one_of_two_of_the_same_name_goes_first(alpha, beta, image, images, scsi):
    extra, old = attach_and_replace(alpha, scsi, image, images)
    attach(alpha, scsi, extra, "sdb")
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, old)
    expect.taken(beta, extra)


def test_a_detached_disk_whose_path_is_gone_is_free(alpha, beta, image, images, scsi):
    extra = image("extra.img")
    alpha.start_guest(scsi)
    attach(alpha, scsi, extra, "sda")
    moved = extra.rename(images / "moved.img")
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, moved)
    attach(alpha, scsi, moved, "sda")
    expect.taken(beta, moved, by=(scsi, alpha))


def test_a_copy_that_another_guest_has_cannot_be_attached_under_the_old_name(alpha, beta, lab, image, images, guest,
                                                                             scsi):
    extra, old = attach_and_replace(alpha, scsi, image, images)
    other = guest(extra, emulator=lab.emulator_without_locks)
    beta.start_guest(other)
    error = alpha.refused("attach-disk", scsi.name, extra, "sdb", "--subdriver", "raw")
    expect.names_holder(error, extra, other, beta)
    goes_through(alpha, scsi)
    expect.taken(beta, old)
    expect.runs(beta, other)


def test_a_readers_disk_attached_for_writing_too_is_refused_and_the_reader_keeps_it(medium, alpha, beta, image, guest,
                                                                                    lab):
    tools = image("tools.img")
    reader = guest(hosts.Disk(image(), "vda"), hosts.Disk(tools, "vdb", "readonly"),
                   emulator=lab.emulator_without_locks, scsi_controllers=1, on_poweroff="restart")
    alpha.boot(reader)
    assert str(tools) in alpha.refused("attach-disk", reader.name, tools, "sda", "--subdriver", "raw")
    expect.taken(beta, tools)
    expect.free(beta, tools, mode="readonly")
    goes_through(alpha, reader)
    expect.taken(beta, tools)


def test_disks_that_moved_are_the_guests_however_often_libvirtd_dies(alpha, beta, image, images, scsi):
    extra = image("extra.img")
    alpha.boot(scsi)
    attach(alpha, scsi, extra, "sda")
    moved = extra.rename(images / "moved.img")
    first = scsi.disks[0].path.rename(images / "first.img")
    for _ in range(2):
        alpha.kill_libvirtd()
        alpha.start_libvirtd()
        goes_through(alpha, scsi)
        expect.taken(beta, moved, first)
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, moved)
    expect.taken(beta, first)


# --- a libvirtd that dies in the middle

@pytest.mark.parametrize("plug", ["attach", "detach"])
def test_after_a_libvirtd_killed_in_a_hot_plug_the_next_call_leaves_what_qemu_has_open(alpha, beta, image, images,
                                                                                       guest, lab, plug):
    for milliseconds in (2, 6, 10, 14, 20, 28):
        disk, extra = image(f"disk{milliseconds}.img"), image(f"extra{milliseconds}.img")
        plugged = guest(disk, emulator=lab.emulator_without_locks, scsi_controllers=1)
        alpha.start_guest(plugged)
        command = f"attach-disk {plugged.name} {extra} sda --subdriver raw"
        if plug == "detach":
            alpha.ok(*command.split())
            command = f"detach-disk {plugged.name} sda"
        with alpha.connected_virsh() as virsh:
            virsh.stdin.write(command + "\n")
            virsh.stdin.flush()
            time.sleep(milliseconds / 1000)
            alpha.kill_libvirtd()
        alpha.start_libvirtd()
        if alpha.state(plugged) == "shut off":
            continue  # QEMU 5.2 and a libvirtd that was killed: test_disks.py, given_up()
        alpha.hmp(plugged, "info block")  # which waits until libvirtd has found out what is there
        resumes(alpha, plugged)
        if hosts.access_to(extra, alpha.qemu_pid(plugged)):
            expect.taken(beta, extra)
        else:
            expect.free(beta, extra)
        expect.taken(beta, disk)
        alpha.kill_qemu(plugged)

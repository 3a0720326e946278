# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Which images are leased: disks that come and go, chains of images, many disks, one image under many names."""

import os
import time

import expect
import hosts
import pytest

MODES = ("exclusive", "shared", "readonly")


# --- who may share an image with whom

ADVICE = {("readonly", "exclusive"): "mark the disk <readonly/>", ("exclusive", "readonly"): "mark its disk <readonly/>, too",
          ("shared", "exclusive"): "<shareable/> here, too", ("exclusive", "shared"): "<shareable/>, too, and start it again",
          ("readonly", "shared"): "exclude each other", ("shared", "readonly"): "exclude each other"}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_an_image_is_shared_only_by_readers_or_by_guests_that_declare_it_shareable(alpha, beta, lab, image, guest,
                                                                                   first, second):
    disk = image()
    alpha.start_guest(guest(hosts.Disk(disk, "vda", first), emulator=lab.emulator_without_locks))
    if first == second != "exclusive":
        expect.free(beta, disk, mode=second)
    else:
        refused = beta.try_take(disk, second)
        assert not refused and (not expect.LEASEHOLD or ADVICE.get((first, second), "try again") in refused.err), refused


def test_the_last_of_several_readers_frees_the_image(alpha, beta, image, guest, emulator):
    disk = image()
    readers = [guest(hosts.Disk(disk, "vda", "readonly"), emulator=emulator) for _ in range(2)]
    alpha.start_guest(readers[0])
    beta.start_guest(readers[1])
    expect.taken(alpha, disk)
    alpha.destroy(readers[0])
    expect.taken(alpha, disk)
    beta.destroy(readers[1])
    expect.free(alpha, disk)


# --- hot-plug

@pytest.fixture
def scsi(image, guest, emulator):
    """A guest whose disks can be unplugged without its help (PCI needs an operating system that agrees)."""
    return guest(image(), emulator=emulator, scsi_controllers=1)


def attach(host, guest, disk, target="sda", *options):
    return host.virsh("attach-disk", guest.name, disk, target, "--subdriver", "raw", *options)


@pytest.mark.both_emulators
@pytest.mark.quick
def test_an_attached_disk_is_leased_and_a_detached_one_is_free(alpha, beta, image, scsi):
    extra = image("extra.img")
    alpha.start_guest(scsi)
    expect.free(beta, extra)
    assert attach(alpha, scsi, extra)
    expect.taken(beta, extra, scsi.disks[0].path, by=(scsi, alpha))
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, extra)
    expect.taken(beta, scsi.disks[0].path, by=(scsi, alpha))


def test_a_disk_of_another_guest_cannot_be_attached(alpha, beta, image, guest, scsi):
    extra = image("extra.img")
    owner = guest(extra)
    beta.start_guest(owner)
    alpha.start_guest(scsi)
    for _ in range(3):
        refusal = attach(alpha, scsi, extra)
        assert not refusal
        expect.names_holder(refusal.err, extra, owner, beta)
    expect.runs(alpha, scsi)
    beta.destroy(owner)
    assert attach(alpha, scsi, extra)
    expect.taken(beta, extra, by=(scsi, alpha))


def test_disks_come_and_go_while_the_guest_is_suspended(alpha, beta, image, scsi):
    extra = image("extra.img")
    alpha.start_guest(scsi)
    alpha.suspend(scsi)
    assert attach(alpha, scsi, extra)
    expect.taken(beta, extra, by=(scsi, alpha))
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, extra)
    assert attach(alpha, scsi, extra)
    alpha.resume(scsi)
    expect.taken(beta, extra, scsi.disks[0].path, by=(scsi, alpha))


def test_disks_attached_before_libvirtd_died_can_be_detached_after_it_came_back(alpha, beta, image, scsi):
    extra, second = image("extra.img"), image("second.img")
    alpha.start_guest(scsi)
    assert attach(alpha, scsi, extra)
    alpha.kill_libvirtd()
    alpha.start_libvirtd()
    expect.taken(beta, extra, by=(scsi, alpha))
    assert attach(alpha, scsi, second, "sdb")
    alpha.ok("detach-disk", scsi.name, "sda")
    expect.free(beta, extra)
    expect.taken(beta, second, scsi.disks[0].path, by=(scsi, alpha))


def test_many_disks_come_and_go_in_one_guest(alpha, beta, image, scsi):
    extras = [image(f"extra{number}.img") for number in range(6)]
    alpha.start_guest(scsi)
    for round_ in range(3):
        for number, extra in enumerate(extras):
            assert attach(alpha, scsi, extra, f"sd{chr(ord('a') + number)}")
        expect.leased(*extras)
        for number in range(len(extras)):
            alpha.ok("detach-disk", scsi.name, f"sd{chr(ord('a') + (number + round_) % len(extras))}")
        expect.not_leased(*extras)
    expect.taken(beta, scsi.disks[0].path, by=(scsi, alpha))


def given_up(host, guest):
    """QEMU 5.2 answers the last order of a libvirtd that was killed to the next one, which takes QEMU for broken and kills
    it: there is nothing to protect any more."""
    if hosts.libvirt_version() > (7, 0) or host.state(guest) != "shut off":
        return False
    errors = [line for line in host.log().splitlines() if "error" in line][-5:]
    assert any("qemuMonitorJSON" in line for line in errors), errors
    assert not host.qemus()
    return True


def test_a_libvirtd_killed_in_the_middle_of_hot_plugging_loses_no_lease(alpha, beta, image, scsi):
    alpha.start_guest(scsi)
    for number in range(2):
        extra = image(f"extra{number}.img")
        plug = alpha.virsh_in_background("attach-disk", scsi.name, extra, "sda", "--subdriver", "raw")
        hosts.wait_until(lambda: hosts.locks_on(extra) or plug.poll() is not None, "the image is locked")
        alpha.kill_libvirtd()
        plug.communicate(timeout=hosts.PATIENCE)
        alpha.start_libvirtd()
        if not given_up(alpha, scsi):
            expect.taken(beta, scsi.disks[0].path, by=(scsi, alpha))
            if "sda" in alpha.ok("domblklist", scsi.name):
                expect.taken(beta, extra, by=(scsi, alpha))
            # libvirtd itself forgets the block device that it had half added, and cannot add another under its name.
            alpha.destroy(scsi)
        expect.not_locked(extra)
        alpha.ok("start", scsi.name)
        assert attach(alpha, scsi, extra)
        expect.taken(beta, extra, by=(scsi, alpha))
        alpha.ok("detach-disk", scsi.name, "sda")
        expect.free(beta, extra)


@pytest.mark.parametrize("plug", ["attach", "detach"])
def test_whenever_libvirtd_is_killed_what_qemu_has_open_is_leased(alpha, beta, lab, image, guest, plug):
    """Both take some 20 ms; libvirtd dies at moments spread over that time. Every time with another guest: libvirtd
    forgets the block device that it had half added, and cannot add another one under its name."""
    for milliseconds in range(2, 34, 4):
        disk, extra = image(f"disk{milliseconds}.img"), image(f"extra{milliseconds}.img")
        plugged = guest(disk, emulator=lab.emulator_without_locks, scsi_controllers=1)
        alpha.start_guest(plugged)
        qemu = alpha.qemu_pid(plugged)
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
        if given_up(alpha, plugged):
            expect.not_locked(disk, extra)
            continue
        listed = alpha.hmp(plugged, "info block")  # which waits until libvirtd has found out what is there
        for path in (disk, extra):
            # In this order: libvirtd may still be about to remove what it had begun to detach.
            marks, access = hosts.marks_on(path), hosts.access_to(path, qemu)
            assert marks or not access, f"{milliseconds} ms: {path} is open ({access}) and not leased: {listed}"
            assert access or str(path) not in alpha.hmp(plugged, "info block")
            if marks:
                expect.leased(path)
                expect.taken(beta, path)
        assert hosts.access_to(disk, qemu)
        alpha.suspend(plugged)
        alpha.resume(plugged)
        alpha.kill_qemu(plugged)
        expect.not_locked(disk, extra)


def test_a_cd_is_leased_while_it_is_in_the_drive(alpha, beta, lab, image, guest, emulator):
    first, second = image("first.iso"), image("second.iso")
    listener = guest(hosts.Disk(image(), "vda"), hosts.Disk(first, "hdc", "readonly", device="cdrom"),
                     emulator=emulator)
    alpha.start_guest(listener)
    expect.taken(beta, first)
    expect.free(beta, first, mode="readonly")
    alpha.ok("change-media", listener.name, "hdc", second, "--update", "--live", "--force")
    expect.taken(beta, second)
    expect.free(beta, first)
    alpha.ok("change-media", listener.name, "hdc", "--eject", "--live", "--force")
    expect.free(beta, second)
    writer = guest(second, emulator=lab.emulator_without_locks)
    beta.start_guest(writer)
    error = alpha.refused("change-media", listener.name, "hdc", second, "--insert", "--live")
    expect.names_holder(error, second, writer, beta)


# --- chains of images

@pytest.fixture
def chained(alpha, image, guest, emulator):
    """Runs on alpha with a qcow2 overlay on its raw base: (guest, base, overlay)."""
    base = image("base.img")
    chained = guest(base, emulator=emulator)
    alpha.start_guest(chained)
    overlay = base.with_name("overlay.qcow2")
    alpha.ok("snapshot-create-as", chained.name, "s1", "--disk-only", "--no-metadata",
             "--diskspec", f"vda,file={overlay}")
    return chained, base, overlay


@pytest.mark.both_emulators
def test_a_snapshot_moves_the_lease_to_the_overlay(alpha, beta, chained):
    owner, _, overlay = chained
    expect.taken(beta, overlay, by=(owner, alpha))
    alpha.suspend(owner)
    expect.taken(beta, overlay, by=(owner, alpha))
    alpha.resume(owner)
    expect.taken(beta, overlay, by=(owner, alpha))


def test_a_snapshot_of_a_suspended_guest_moves_the_lease_too(alpha, beta, image, guest, emulator):
    base = image("base.img")
    owner = guest(base, emulator=emulator)
    alpha.start_guest(owner)
    alpha.suspend(owner)
    overlay = base.with_name("overlay.qcow2")
    alpha.ok("snapshot-create-as", owner.name, "s1", "--disk-only", "--no-metadata",
             "--diskspec", f"vda,file={overlay}")
    alpha.resume(owner)
    expect.taken(beta, overlay, by=(owner, alpha))


def test_a_snapshot_with_memory_pauses_the_guest_but_not_its_lease(alpha, beta, image, guest, emulator, images):
    base = image("base.img")
    owner = guest(base, emulator=emulator)
    alpha.start_guest(owner)
    overlay = base.with_name("overlay.qcow2")
    alpha.ok("snapshot-create-as", owner.name, "s1", "--memspec", f"file={images / 'ram'},snapshot=external",
             "--diskspec", f"vda,file={overlay}")
    expect.runs(alpha, owner)
    expect.taken(beta, overlay, by=(owner, alpha))


def test_an_internal_snapshot_and_the_way_back_to_it_keep_the_lease(alpha, beta, image, guest, emulator):
    disk = image("disk.qcow2", format="qcow2")
    owner = guest(hosts.Disk(disk, "vda", format="qcow2"), emulator=emulator)
    alpha.start_guest(owner)
    alpha.ok("snapshot-create-as", owner.name, "s1")
    expect.taken(beta, disk, by=(owner, alpha))
    alpha.ok("snapshot-revert", owner.name, "s1")
    expect.runs(alpha, owner)
    expect.taken(beta, disk, by=(owner, alpha))


@pytest.mark.both_emulators
def test_an_active_block_commit_moves_the_lease_back_to_the_base(alpha, beta, chained):
    owner, base, overlay = chained
    alpha.ok("blockcommit", owner.name, "vda", "--active", "--pivot", "--wait")
    expect.taken(beta, base, by=(owner, alpha))
    expect.free(beta, overlay)
    alpha.suspend(owner)
    expect.taken(beta, base, by=(owner, alpha))
    alpha.resume(owner)


@pytest.mark.both_emulators
def test_an_inactive_block_commit_leaves_the_base_to_readers(alpha, beta, lab, chained):
    owner, base, middle = chained
    top = base.with_name("top.qcow2")
    alpha.ok("snapshot-create-as", owner.name, "s2", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={top}")
    alpha.ok("blockcommit", owner.name, "vda", "--base", base, "--top", middle, "--wait")
    expect.taken(beta, top, by=(owner, alpha))
    expect.taken(beta, base)
    expect.free(beta, base, mode="readonly")
    expect.runs(alpha, owner)


@pytest.mark.both_emulators
def test_a_block_copy_leases_the_copy_and_its_pivot_frees_the_original(alpha, beta, image, guest, emulator):
    disk = image()
    owner = guest(disk, emulator=emulator)
    alpha.start_guest(owner)
    copy = disk.with_name("copy.img")
    alpha.ok("blockcopy", owner.name, "vda", copy, "--format", "raw", "--transient-job", "--wait")
    expect.taken(beta, disk, copy, by=(owner, alpha))
    alpha.ok("blockjob", owner.name, "vda", "--pivot")
    expect.taken(beta, copy, by=(owner, alpha))
    expect.free(beta, disk)


def test_an_aborted_block_copy_frees_the_copy(alpha, beta, image, guest, emulator):
    disk = image()
    owner = guest(disk, emulator=emulator)
    alpha.start_guest(owner)
    copy = disk.with_name("copy.img")
    alpha.ok("blockcopy", owner.name, "vda", copy, "--format", "raw", "--transient-job", "--wait")
    alpha.ok("blockjob", owner.name, "vda", "--abort")
    expect.taken(beta, disk, by=(owner, alpha))
    expect.free(beta, copy)


def test_a_block_copy_onto_the_image_of_another_guest_is_refused(alpha, beta, lab, image, guest):
    disk, victim = image(), image("victim.img")
    owner, other = (guest(path, emulator=lab.emulator_without_locks) for path in (disk, victim))
    alpha.start_guest(owner)
    beta.start_guest(other)
    error = alpha.refused("blockcopy", owner.name, "vda", victim, "--format", "raw", "--reuse-external",
                          "--transient-job", "--wait")
    expect.names_holder(error, victim, other, beta)
    expect.taken(beta, disk, by=(owner, alpha))


# --- many disks

def test_three_hundred_disks_are_leased_and_freed_together(alpha, beta, image, images, guest):
    first = image()
    disks = [hosts.Disk(first, "vda")]
    for number in range(300):
        path = images / f"{number}.img"
        path.touch()
        os.truncate(path, 4096)
        digits = (number // 676 - 1, number // 26 % 26 - (number < 676), number % 26)
        letters = "".join(chr(ord("a") + digit) for digit in digits
                          if digit >= 0)
        address = f"<address type='drive' controller='0' bus='0' target='0' unit='{number}'/>"
        disks.append(hosts.Disk(path, f"sd{letters}", address=address))
    paths = [disk.path for disk in disks]
    big = guest(*disks, scsi_controllers=1)
    alpha.start_guest(big)
    expect.leased(*paths)
    expect.taken(beta, paths[0], paths[1], paths[150], paths[300], by=(big, alpha))
    alpha.suspend(big)
    expect.leased(*paths)
    alpha.resume(big)
    alpha.ok("detach-disk", big.name, disks[7].target)
    expect.not_leased(paths[7])
    expect.leased(paths[6], paths[8], paths[300])
    alpha.kill_qemu(big)
    expect.not_leased(*paths)


def test_a_guest_gets_all_its_images_or_none(alpha, beta, image, guest, emulator):
    mine, theirs, also_mine = image("mine.img"), image("theirs.img"), image("also.img")
    owner = guest(theirs, emulator=emulator)
    beta.start_guest(owner)
    greedy = guest(mine, theirs, also_mine, emulator=emulator)
    alpha.define(greedy)
    expect.names_holder(alpha.refused("start", greedy.name), theirs, owner, beta)
    expect.not_leased(mine, also_mine)
    expect.free(beta, mine, also_mine)
    beta.destroy(owner)
    alpha.ok("start", greedy.name)
    expect.taken(beta, mine, theirs, also_mine, by=(greedy, alpha))


def test_a_guest_without_disks_gets_its_first_one_by_hot_plug(alpha, beta, image, guest, emulator):
    disk = image()
    bare = guest(emulator=emulator, scsi_controllers=1)
    alpha.start_guest(bare)
    assert attach(alpha, bare, disk)
    expect.taken(beta, disk, by=(bare, alpha))
    alpha.ok("detach-disk", bare.name, "sda")
    expect.free(beta, disk)


# --- one image, many names

def test_a_symbolic_link_is_the_image_it_leads_to(alpha, beta, lab, image, images, guest):
    disk, link = image(), images / "link.img"
    link.symlink_to(disk)
    owner = guest(link, emulator=lab.emulator_without_locks)
    alpha.start_guest(owner)
    expect.taken(beta, disk, link)


def test_a_hard_link_is_the_same_image(alpha, beta, lab, image, images, guest):
    disk, link = image(), images / "link.img"
    os.link(disk, link)
    alpha.start_guest(guest(disk, emulator=lab.emulator_without_locks))
    expect.taken(beta, disk, link)


def test_a_bind_mount_shows_the_same_image(alpha, beta, lab, image, images, guest):
    disk, elsewhere = image(), images / "elsewhere"
    elsewhere.mkdir()
    beta.mount("--bind", images, elsewhere)
    try:
        alpha.start_guest(guest(disk, emulator=lab.emulator_without_locks))
        expect.taken(beta, elsewhere / disk.name)
    finally:
        beta.unmount(elsewhere)


def test_one_guest_may_name_the_same_readonly_image_twice(alpha, beta, image, guest, emulator):
    disk, tools = image(), image("tools.img")
    twice = guest(hosts.Disk(disk, "vda"), hosts.Disk(tools, "vdb", "readonly"), hosts.Disk(tools, "vdc", "readonly"),
                  emulator=emulator)
    alpha.start_guest(twice)
    expect.taken(beta, tools)
    expect.free(beta, tools, mode="readonly")
    alpha.suspend(twice)
    alpha.resume(twice)
    expect.taken(beta, tools)


def test_one_guest_may_not_write_to_one_image_through_two_disks(alpha, lab, image, guest):
    disk = image()
    confused = guest(disk, disk, emulator=lab.emulator_without_locks)
    alpha.define(confused)
    assert str(disk) in alpha.refused("start", confused.name)
    expect.not_leased(disk)


# --- users of the image that libvirt does not know

def test_an_image_that_a_qemu_outside_libvirt_writes_to_is_refused_before_the_guest_starts(alpha, lab, image, guest):
    disk = image()
    with hosts.foreign_qemu(alpha, disk):
        stranger = guest(disk, emulator=lab.emulator_without_locks)
        alpha.define(stranger)
        error = alpha.refused("start", stranger.name)
        assert str(disk) in error and "resource busy" in error
    alpha.ok("start", stranger.name)


def test_qemu_img_cannot_change_the_image_of_a_running_guest(alpha, image, guest):
    disk = image()
    alpha.start_guest(guest(disk))
    assert not hosts.run("qemu-io", "-f", "raw", "-c", "write 0 512", disk)


# --- what lies on the disk

def test_the_lease_does_not_change_a_byte_of_the_image(alpha, image, guest, emulator):
    disk = image()
    before = disk.read_bytes()
    owner = guest(disk, emulator=emulator)
    alpha.boot(owner)
    alpha.suspend(owner)
    alpha.resume(owner)
    alpha.destroy(owner)
    assert disk.read_bytes() == before

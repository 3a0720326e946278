# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Migration between two libvirtd with stock QEMU: before, while and after, no third party gets the image; whatever
fails on the way, exactly one host may run the guest, and nothing is left on the other."""

import expect
import hosts
import pytest
from steps import prepared


@pytest.fixture
def disk(image):
    return image()


@pytest.fixture
def movable(guest, disk, emulator):
    return guest(disk, emulator=emulator)


def moved(source, target, guest, *images):
    """The guest runs on the target, with its images; the source has forgotten it."""
    expect.runs(target, guest)
    assert source.state(guest) in ("absent", "shut off")
    expect.taken(source, *images, by=(guest, target))


def stayed(source, target, guest, *images):
    """The guest runs on the source as if nothing had been; nothing is left on the target, and it can migrate again."""
    source.wait_state(guest, "running")
    hosts.wait_until(lambda: target.state(guest) in ("absent", "shut off"), f"{guest.name} is gone from {target.name}")
    expect.taken(target, *images, by=(guest, source))
    source.hurry(guest)
    assert (result := source.migrate_to(target, guest, "--live")), result
    moved(source, target, guest, *images)


def finish(source, guest, migration):
    source.hurry(guest)
    out, err = migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode == 0, err


# --- what works

@pytest.mark.both_emulators
@pytest.mark.quick
def test_a_guest_migrates_there_and_back_again_with_its_lease(alpha, beta, disk, movable):
    alpha.boot(movable)
    for source, target in [(alpha, beta), (beta, alpha)] * 2:
        assert (result := source.migrate_to(target, movable, "--live")), result
        moved(source, target, movable, disk)
    alpha.suspend(movable)
    expect.taken(beta, disk, by=(movable, alpha))
    alpha.resume(movable)
    alpha.destroy(movable)
    expect.free(beta, disk)


def test_a_guest_migrates_peer_to_peer(alpha, beta, disk, movable):
    alpha.boot(movable)
    for source, target in [(alpha, beta), (beta, alpha)]:
        assert (result := source.migrate_to(target, movable, "--live", "--p2p")), result
        moved(source, target, movable, disk)


def test_a_guest_migrates_without_live(alpha, beta, disk, movable):
    alpha.boot(movable)
    assert (result := alpha.migrate_to(beta, movable)), result
    moved(alpha, beta, movable, disk)


@pytest.mark.both_emulators
def test_a_guest_migrates_by_post_copy(alpha, beta, disk, movable):
    alpha.boot(movable)
    migration = alpha.slow_migration(beta, movable, "--postcopy")
    alpha.ok("migrate-postcopy", movable.name)
    expect.taken(alpha, disk)
    alpha.virsh("migrate-setspeed", movable.name, "1000")  # it may have come to its end by itself
    _, err = migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode == 0, err
    moved(alpha, beta, movable, disk)


@pytest.mark.both_emulators
def test_a_suspended_guest_migrates_and_resumes_on_the_other_side(alpha, beta, disk, movable):
    alpha.boot(movable)
    alpha.suspend(movable)
    assert (result := alpha.migrate_to(beta, movable, "--live")), result
    assert beta.state(movable) == "paused"
    refusal = alpha.try_take(disk)  # the guest is known; its record says where it last ran, until it runs here
    assert not refusal and str(disk) in refusal.err
    if expect.LEASEHOLD:
        assert movable.name in refusal.err and movable.uuid in refusal.err, refusal.err
    beta.resume(movable)
    moved(alpha, beta, movable, disk)


def started_paused(host, guest, images):
    host.start_guest(guest, paused=True)


def restored_paused(host, guest, images):
    host.boot(guest)
    host.ok("save", guest.name, images / "ram")
    host.ok("restore", "--paused", images / "ram")


def started_from_the_save_of_a_suspended_guest(host, guest, images):
    host.boot(guest)
    host.suspend(guest)
    host.ok("managedsave", guest.name)
    host.ok("start", guest.name)


def reverted_paused(host, guest, images):
    host.boot(guest)
    host.ok("snapshot-create-as", guest.name, "s1")
    host.destroy(guest)
    host.ok("snapshot-revert", guest.name, "s1", "--paused")
    host.ok("snapshot-delete", guest.name, "s1", "--metadata")  # libvirt migrates no guest that has snapshots


@pytest.mark.skipif(not expect.LEASEHOLD, reason="virtlockd does not tell a migration from a second start")
@pytest.mark.both_emulators
@pytest.mark.parametrize("begin", [started_paused, restored_paused, started_from_the_save_of_a_suspended_guest,
                                   reverted_paused], ids=lambda begin: begin.__name__)
def test_a_guest_that_has_not_run_yet_migrates(alpha, beta, image, images, guest, emulator, begin):
    """libvirt calls nothing at the source of a guest that never ran in its QEMU."""
    disk = image("disk.qcow2", format="qcow2", backing=image("base.img"))
    movable = guest(hosts.Disk(disk, "vda", format="qcow2"), emulator=emulator)
    begin(alpha, movable, images)
    assert alpha.state(movable) == "paused"
    expect.taken(beta, disk, by=(movable, alpha))
    assert (result := alpha.migrate_to(beta, movable, "--live")), result
    assert beta.state(movable) == "paused"
    expect.taken(alpha, disk)
    beta.resume(movable)
    hosts.wait_until(lambda: movable.said("R"), f"{movable.name} runs")
    moved(alpha, beta, movable, disk)
    assert (result := beta.migrate_to(alpha, movable, "--live")), result
    moved(beta, alpha, movable, disk)


@pytest.mark.both_emulators
def test_a_guest_that_has_not_run_yet_and_is_started_on_a_second_host_runs_once(alpha, beta, disk, movable):
    """Beside it a second start may live, as beside a suspended guest; but only one of the two runs."""
    started_paused(alpha, movable, None)
    beta.define(movable)
    expect.names_holder(beta.refused("start", movable.name), disk, movable, alpha)
    alpha.resume(movable)
    hosts.wait_until(lambda: movable.said("R"), f"{movable.name} runs")
    expect.taken(beta, disk, by=(movable, alpha))


@pytest.mark.both_emulators
def test_a_guest_with_disks_of_all_modes_migrates_also_with_one_hot_plugged(alpha, beta, image, guest, emulator):
    mine, ours, tools, cd, extra = (image(name) for name in ("mine", "ours", "tools", "cd", "extra"))
    mixed = guest(hosts.Disk(mine, "vda"), hosts.Disk(ours, "vdb", "shared"), hosts.Disk(tools, "vdc", "readonly"),
                  hosts.Disk(cd, "hdc", "readonly", device="cdrom"), emulator=emulator, scsi_controllers=1)
    reader = guest(hosts.Disk(cd, "vda", "readonly"), hosts.Disk(ours, "vdb", "shared"), emulator=emulator)
    alpha.boot(mixed)
    beta.start_guest(reader)
    alpha.ok("attach-disk", mixed.name, extra, "sda", "--subdriver", "raw")
    for source, target in [(alpha, beta), (beta, alpha)]:
        assert (result := source.migrate_to(target, mixed, "--live")), result
        moved(source, target, mixed, mine, extra)
        expect.taken(source, ours, tools, cd)
        for path, mode in ((ours, "shared"), (tools, "readonly"), (cd, "readonly")):
            expect.free(source, path, mode=mode)
    alpha.ok("detach-disk", mixed.name, "sda")
    expect.free(beta, extra)


@pytest.fixture
def local(alpha, beta, lab, images):
    """The path of an image that is another file on each host."""
    directory = images / "local"
    directory.mkdir()
    for host in (alpha, beta):
        (images / host.name).mkdir()
        lab.image(images / host.name / "disk.img")
        host.mount("--bind", images / host.name, directory)
    yield directory / "disk.img"
    for host in (alpha, beta):
        host.clean()
        host.unmount(directory)


@pytest.mark.both_emulators
def test_a_migration_with_storage_leases_the_copy_from_the_first_moment(alpha, beta, local, guest, emulator):
    mover = guest(local, emulator=emulator)
    alpha.boot(mover)
    expect.free(beta, local)
    with prepared(alpha, beta, mover, "--copy-storage-all") as (migration, go_on):
        for host in (alpha, beta):  # at the destination NBD may write from now on
            expect.taken(host, local)
        go_on()
        _, error = migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode == 0, error
    expect.runs(beta, mover)
    expect.taken(beta, local, by=(mover, beta))
    expect.free(alpha, local)
    beta.destroy(mover)
    expect.free(beta, local)


def test_the_copy_is_leased_while_storage_and_ram_are_copied(alpha, beta, local, guest, emulator):
    mover = guest(local, emulator=emulator)
    alpha.boot(mover)
    migration = alpha.slow_migration(beta, mover, "--copy-storage-all")
    for host in (alpha, beta):
        expect.taken(host, local)
    finish(alpha, mover, migration)
    expect.taken(beta, local, by=(mover, beta))
    expect.free(alpha, local)


def test_a_migration_with_storage_that_fails_frees_the_copy(alpha, beta, local, guest, emulator):
    mover = guest(local, emulator=emulator)
    alpha.boot(mover)
    with prepared(alpha, beta, mover, "--copy-storage-all") as (migration, go_on):
        beta.kill_qemu(mover)
        go_on()
        migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode != 0
    alpha.wait_state(mover, "running")
    expect.taken(alpha, local, by=(mover, alpha))
    expect.free(beta, local)


def test_the_same_guest_started_on_a_third_host_during_a_migration_is_refused(alpha, beta, gamma, disk, movable):
    alpha.boot(movable)
    gamma.define(movable)
    migration = alpha.slow_migration(beta, movable)
    error = gamma.refused("start", movable.name)
    assert str(disk) in error and movable.name in error
    finish(alpha, movable, migration)
    gamma.refused("start", movable.name)
    moved(alpha, beta, movable, disk)


def test_migrations_leave_no_descriptor_open_in_either_libvirtd(alpha, beta, movable):
    def there_and_back():
        for source, target in [(alpha, beta), (beta, alpha)]:
            assert (result := source.migrate_to(target, movable, "--live")), result

    alpha.boot(movable)
    there_and_back()
    before = {host: host.settled_descriptors() for host in (alpha, beta)}
    there_and_back()
    there_and_back()
    for host in (alpha, beta):
        host.comes_down_to(before[host])


# --- what fails

@pytest.mark.both_emulators
def test_an_aborted_migration_leaves_the_guest_where_it_was(alpha, beta, disk, movable):
    alpha.boot(movable)
    migration = alpha.slow_migration(beta, movable)
    alpha.ok("domjobabort", movable.name)
    assert "canceled" in migration.communicate(timeout=hosts.PATIENCE)[1]
    alpha.suspend(movable)
    expect.taken(beta, disk, by=(movable, alpha))
    alpha.resume(movable)
    stayed(alpha, beta, movable, disk)


def test_a_destination_whose_image_is_taken_refuses_at_once_and_the_guest_stays(alpha, beta, local, guest, emulator):
    """The destination sees another file under the same path (a storage mistake), and somebody uses that."""
    mover, other = (guest(local, emulator=emulator) for _ in range(2))
    alpha.boot(mover)
    beta.start_guest(other)
    result = alpha.migrate_to(beta, mover, "--live")
    assert not result
    expect.names_holder(result.err, local, other, beta)
    expect.runs(alpha, mover)
    expect.runs(beta, other)
    expect.taken(alpha, local, by=(mover, alpha))

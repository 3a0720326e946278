# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""From start to death of one guest: at every moment a stranger is refused, and from the death on no longer."""

import expect
import hosts
import pytest
from documents import documented


@pytest.fixture
def disk(image):
    return image()


@pytest.fixture
def protected(guest, disk, emulator):
    return guest(disk, emulator=emulator)


@pytest.mark.both_emulators
@pytest.mark.quick
def test_a_running_guest_has_its_image_on_every_host(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    expect.taken(alpha, disk, by=(protected, alpha))
    expect.taken(beta, disk, by=(protected, alpha))
    expect.leased(disk)
    expect.runs(alpha, protected)


def test_a_guest_started_paused_has_its_image_before_it_ever_ran(alpha, beta, disk, protected):
    alpha.start_guest(protected, paused=True)
    expect.taken(beta, disk, by=(protected, alpha))
    alpha.resume(protected)
    expect.taken(beta, disk, by=(protected, alpha))


@pytest.mark.both_emulators
@pytest.mark.quick
def test_a_suspended_guest_keeps_its_image_however_often_it_is_suspended(alpha, beta, disk, protected):
    alpha.boot(protected)
    for _ in range(3):
        alpha.suspend(protected)
        expect.taken(alpha, disk)
        expect.taken(beta, disk, by=(protected, alpha))
        alpha.resume(protected)
        expect.taken(beta, disk)
    expect.runs(alpha, protected)


def test_suspending_and_resuming_in_the_monitor_leaves_the_lease_alone(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    alpha.hmp(protected, "stop")
    alpha.wait_state(protected, "paused")
    expect.taken(beta, disk)
    alpha.hmp(protected, "cont")
    alpha.wait_state(protected, "running")
    expect.taken(beta, disk)
    alpha.suspend(protected)
    alpha.resume(protected)
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_destroyed_guest_leaves_its_image_free_at_once(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    alpha.destroy(protected)
    expect.not_locked(disk)
    expect.free(beta, disk)


@pytest.mark.quick
def test_the_image_is_free_the_moment_qemu_is_dead_without_any_libvirtd(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    pid = alpha.qemu_pid(protected)
    alpha.kill_libvirtd()
    expect.leased(disk)
    hosts.kill_and_wait(pid)
    expect.not_locked(disk)
    expect.free(beta, disk)
    alpha.start_libvirtd()
    alpha.ok("start", protected.name)
    expect.taken(beta, disk, by=(protected, alpha))


@pytest.mark.quick
def test_killing_libvirtd_changes_nothing(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    alpha.kill_libvirtd()
    expect.leased(disk)
    expect.taken(beta, disk, by=(protected, alpha))
    alpha.start_libvirtd()
    expect.taken(alpha, disk, by=(protected, alpha))
    alpha.suspend(protected)
    expect.taken(beta, disk)
    alpha.resume(protected)
    expect.taken(beta, disk)
    expect.runs(alpha, protected)


def test_a_guest_suspended_before_libvirtd_died_resumes_after_it_came_back(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    alpha.suspend(protected)
    alpha.kill_libvirtd()
    expect.taken(beta, disk, by=(protected, alpha))
    alpha.start_libvirtd()
    alpha.resume(protected)
    expect.taken(beta, disk)


@pytest.mark.both_emulators
def test_a_saved_guest_gives_its_image_away_and_is_restored_only_when_it_is_free(alpha, beta, disk, images, protected):
    alpha.boot(protected)
    alpha.ok(*documented("virsh save")[1:], protected.name, images / "ram")
    expect.free(beta, disk)
    other = hosts.Guest("in-between", [hosts.Disk(disk, "vda")])
    beta.start_guest(other)
    error = alpha.refused("restore", images / "ram")
    if protected.emulator != hosts.QEMU:
        expect.names_holder(error, disk, other, beta)
    assert (images / "ram").exists()
    expect.runs(beta, other)
    beta.destroy(other)
    alpha.ok("restore", images / "ram")
    expect.runs(alpha, protected)
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_managed_save_and_the_start_from_it_take_the_lease_again(alpha, beta, disk, protected):
    alpha.boot(protected)
    alpha.ok("managedsave", protected.name)
    expect.not_leased(disk)
    alpha.ok("start", protected.name)
    expect.runs(alpha, protected)
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_guest_saved_while_suspended_comes_back_suspended_with_its_lease(alpha, beta, disk, images, protected):
    alpha.boot(protected)
    alpha.suspend(protected)
    alpha.ok("save", protected.name, images / "ram")
    alpha.ok("restore", images / "ram")
    assert alpha.state(protected) == "paused"
    expect.taken(beta, disk, by=(protected, alpha))
    alpha.resume(protected)
    expect.taken(beta, disk)


def test_a_core_dump_pauses_the_guest_but_not_its_lease(alpha, beta, disk, images, protected):
    alpha.start_guest(protected)
    alpha.ok("dump", "--memory-only", protected.name, images / "core")
    expect.runs(alpha, protected)
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_reboot_inside_the_guest_keeps_the_lease(alpha, beta, disk, protected):
    alpha.boot(protected)
    alpha.press(protected, "r")
    hosts.wait_until(lambda: protected.serial.read_text().count("R") == 2, "the guest has rebooted")
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_guest_that_powers_off_is_restarted_under_its_lease(alpha, beta, disk, guest, emulator):
    again = guest(disk, emulator=emulator, on_poweroff="restart")
    alpha.boot(again)
    pid = alpha.pid_here(again)
    alpha.press(again, "p")
    if hosts.libvirt_version() <= (7, 0):
        alpha.wait_state(again, "shut off")
        expect.free(beta, disk)
        pytest.skip("libvirt 7.0 ends a guest that powers off, whatever its on_poweroff says")
    hosts.wait_until(lambda: again.serial.read_text().count("R") == 2, "the guest was restarted")
    alpha.wait_state(again, "running")
    assert alpha.pid_here(again) == pid
    expect.taken(beta, disk, by=(again, alpha))


def test_a_guest_that_powers_off_leaves_its_image_free(alpha, beta, disk, protected):
    alpha.boot(protected)
    alpha.press(protected, "p")
    alpha.wait_state(protected, "shut off")
    expect.free(beta, disk)


def test_a_start_that_fails_in_qemu_leaves_no_lease(alpha, beta, disk, guest):
    broken = guest(disk, qemu_args=("-device", "no-such-device"))
    alpha.define(broken)
    assert "no-such-device" in alpha.refused("start", broken.name)
    expect.not_locked(disk)
    expect.free(beta, disk)


def test_the_stale_state_of_a_dead_qemu_does_not_stop_the_next_start(alpha, beta, disk, protected):
    alpha.start_guest(protected)
    alpha.suspend(protected)
    alpha.destroy(protected)
    expect.free(beta, disk)
    alpha.ok("start", protected.name)
    expect.runs(alpha, protected)
    expect.taken(beta, disk, by=(protected, alpha))


def test_a_guest_stopped_by_an_io_error_keeps_its_lease_and_resumes(lab, alpha, images, guest, emulator):
    small = images / "small"
    small.mkdir()
    alpha.mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    try:
        disk, filler = small / "disk.img", alpha.seen(small / "filler")
        lab.image(alpha.seen(disk))
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        full = guest(hosts.Disk(disk, "vda", error_policy="stop"), emulator=emulator)
        alpha.boot(full)
        alpha.press(full, "w")
        alpha.wait_state(full, "paused")
        assert "I/O error" in alpha.ok("domstate", "--reason", full.name)
        expect.taken(alpha, disk, by=(full, alpha))
        filler.unlink()
        alpha.resume(full)
        hosts.wait_until(lambda: full.said("W"), "the write has succeeded")
        expect.taken(alpha, disk, by=(full, alpha))
        alpha.destroy(full)
    finally:
        alpha.unmount(small)


@pytest.mark.parametrize("key, device, state", [("c", "<panic model='isa'/>", "crashed"),
                                                ("b", "<watchdog model='ib700' action='pause'/>", "paused")],
                         ids=["panic", "watchdog"])
def test_a_guest_stopped_by_its_panic_or_its_watchdog_keeps_its_lease(alpha, beta, lab, disk, guest, key, device,
                                                                      state):
    """QEMU is still there and has the image open."""
    stopped = guest(disk, emulator=lab.emulator_without_locks, devices=device, on_crash="preserve")
    alpha.boot(stopped)
    alpha.press(stopped, key)
    alpha.wait_state(stopped, state)
    expect.taken(beta, disk, by=(stopped, alpha))
    if state == "paused":
        alpha.resume(stopped)
        expect.taken(beta, disk, by=(stopped, alpha))
    alpha.destroy(stopped)
    expect.not_locked(disk)


@pytest.mark.both_emulators
def test_of_two_simultaneous_cold_starts_on_two_hosts_exactly_one_wins(alpha, beta, disk, guest, emulator):
    rivals = {alpha: guest(disk, emulator=emulator), beta: guest(disk, emulator=emulator)}
    for host, rival in rivals.items():
        host.define(rival)
    for _ in range(8):
        starts = {host: host.virsh_in_background("start", rival.name) for host, rival in rivals.items()}
        for process in starts.values():
            process.communicate(timeout=hosts.PATIENCE)
        winners = [host for host, process in starts.items() if process.returncode == 0]
        assert len(winners) == 1, f"{len(winners)} winners"
        winners[0].destroy(rivals[winners[0]])
        expect.not_leased(disk)


@pytest.mark.both_emulators
def test_the_same_guest_defined_on_a_second_host_is_refused_while_it_runs_or_is_suspended(alpha, beta, disk,
                                                                                          protected):
    alpha.start_guest(protected)
    beta.define(protected)
    expect.names_holder(beta.refused("start", protected.name), disk, protected, alpha)
    alpha.suspend(protected)
    error = beta.refused("start", protected.name)
    # A suspended guest would let a successor in, and when QEMU starts nobody knows yet whether it is one: the stock
    # QEMU meets the image locks of the other before libvirtd asks leasehold. Who has the image is told all the same.
    expect.names_holder(error, disk, protected, alpha)
    alpha.resume(protected)
    expect.runs(alpha, protected)
    expect.taken(beta, disk, by=(protected, alpha))
    alpha.destroy(protected)
    beta.ok("start", protected.name)


def test_lifecycles_leave_no_descriptor_open_in_libvirtd(alpha, image, disk, guest, emulator):
    extra = image("extra.img")
    protected = guest(disk, emulator=emulator, scsi_controllers=1)

    def lifecycle():
        alpha.ok("start", protected.name)
        alpha.suspend(protected)
        alpha.resume(protected)
        alpha.ok("attach-disk", protected.name, extra, "sda", "--subdriver", "raw")
        alpha.ok("detach-disk", protected.name, "sda")
        alpha.refused("start", rival.name)
        alpha.destroy(protected)

    rival = hosts.Guest("rival", [hosts.Disk(disk, "vda")], emulator=protected.emulator)
    alpha.define(rival)
    alpha.define(protected)
    lifecycle()  # libvirtd opens some of its own at first use
    before = alpha.settled_descriptors()
    for _ in range(5):
        lifecycle()
    alpha.comes_down_to(before)

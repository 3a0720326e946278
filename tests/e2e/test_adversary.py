# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""A third host tries to get the image as fast as it can while the guest migrates, mostly in the switch-over."""

import os

import expect
import hosts
from steps import switching

TRIES = 25  # in each switch-over, which lasts as long as they take


def test_nobody_gets_the_image_while_its_guest_migrates(alpha, beta, gamma, image, guest, emulator, pytestconfig,
                                                        record_property):
    """With another lock manager (LEASEHOLD_E2E_LOCK_MANAGER) this counts, and judges nothing."""
    migrations = int(os.environ.get("LEASEHOLD_E2E_MIGRATIONS", 12 if pytestconfig.getoption("long") else 4))
    disk = image()
    mover = guest(disk, emulator=emulator)
    stolen = lost = 0
    alpha.boot(mover)
    with hosts.Adversary(gamma, disk) as adversary:
        source, target = alpha, beta
        for _ in range(migrations):
            with switching(source, target, mover) as (migration, go_on):
                before = adversary.tries(), adversary.successes()
                hosts.wait_until(lambda: adversary.tries() >= before[0] + TRIES
                                 or adversary.successes() > before[1], "the adversary tries")
                stolen += adversary.successes() > before[1]
                go_on()
                out, err = migration.communicate(timeout=hosts.PATIENCE)
            if expect.LEASEHOLD:
                assert migration.returncode == 0, err
            if target.state(mover) == "running":
                source, target = target, source
            elif source.state(mover) != "running":
                lost += 1
                for host in (source, target):
                    host.clean()
                mover.serial.unlink()
                source.define(mover)
                hosts.wait_until(lambda: source.virsh("start", mover.name), "the adversary lets the guest start again")
                hosts.wait_until(lambda: mover.said("R"), "it has booted")
    record_property(f"{hosts.lock_manager()}, {migrations} migrations",
                    f"the adversary tried {adversary.tries()} times; it had the image {adversary.successes()} times, "
                    f"in {stolen} switch-overs; {lost} guests were lost")
    if expect.LEASEHOLD:
        assert adversary.successes() == 0
        assert adversary.tries() >= migrations * TRIES
        expect.runs(source, mover)
        expect.taken(gamma, disk, by=(mover, source))

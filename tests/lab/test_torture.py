# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Guests of two hosts start, suspend, migrate and die at random on few images, while hosts are cut off from their storage
for a moment or for longer than it waits, and libvirtds are killed.

Each image is written to by whoever has it, and read again before he gives it up: what somebody else has written
meanwhile is the end of the test. A host that was cut off for long is in doubt: it may have lost its leases, which the
next resume of its guests has to notice. What it writes until then has to be kept out by the storage: as a QEMU would,
each writer holds a lock on the image, too, with which the server throws the write away. So that leases are lost a guest
of the other host asks for the images of one that is cut off for long, writes there, and reads when that one is back.

LEASEHOLD_LAB_TORTURE=SECONDS runs it, so long on each storage, with the short lease times of the lab (--long has long
ones: there are few cuts then). LEASEHOLD_LAB_SEED=N what to do. Both are printed.
"""

import collections
import contextlib
import os
import random
import threading
import time

import conftest
import lab as labs
import pytest
import storage as storages

SECONDS = int(os.environ.get("LEASEHOLD_LAB_TORTURE", 300))
SEED = int(os.environ.get("LEASEHOLD_LAB_SEED", random.randrange(1 << 32)))
GUESTS, IMAGES = 5, 3
# On CephFS nobody is cut off for long: such a client is evicted, and its host has to mount it anew (test_ceph.py).
KINDS = [kind for kind in ("nfs42", "nfs3", "cephfs") if kind in conftest.KINDS]


class Qemu:
    """One QEMU: a guest on a host. It may have lost its lease, and not know it, since its host was cut off for long."""

    def __init__(self, guest, side, image, word):
        self.guest, self.side, self.image, self.word = guest, side, image, word
        self.doubtful = self.was_doubtful = self.witnessed = False

    def doubt(self):
        self.doubtful = self.was_doubtful = True

    def __str__(self):
        return f"{self.word} ({self.guest.name}@{self.side.host}{', in doubt' if self.doubtful else ''})"


class Side:
    """A host, as the guests see it."""

    def __init__(self, host):
        self.host, self.cut_off = host, False


class Ledger:
    """Who may write to which image by what leasehold has answered, and all that must not be."""

    def __init__(self, fenced):
        self.fenced = fenced  # no write of a host that has lost its lease comes through
        self.lock = threading.Lock()
        self.owners, self.known, self.living = {}, {}, set()
        self.wrong, self.counts = [], collections.Counter()

    def add(self, qemu):
        with self.lock:
            self.known[qemu.word] = qemu
            self.living.add(qemu)
            if qemu.side.cut_off:
                qemu.doubt()

    def granted(self, qemu):
        """leasehold has said that this one may run."""
        with self.lock:
            self.counts["granted"] += 1
            qemu.doubtful = qemu.side.cut_off
            owner = self.owners.get(qemu.image)
            if owner not in (None, qemu) and not owner.doubtful and not qemu.doubtful:
                self.wrong.append(f"{qemu.image}: granted to {qemu} while {owner} has it")
            self.owners[qemu.image] = qemu

    def gives_up(self, qemu, dies=True):
        """Before it does."""
        with self.lock:
            if dies:
                self.living.discard(qemu)
            if self.owners.get(qemu.image) is qemu:
                del self.owners[qemu.image]

    def found(self, qemu, word):
        """What was read where this one has written its word."""
        writer = self.known.get(word)
        with self.lock:
            if writer is qemu or qemu.was_doubtful:
                self.counts["looks"] += 1
            elif writer and writer.was_doubtful and not self.fenced:
                self.counts["late writes"] += 1
            else:
                self.wrong.append(f"{qemu.image}: {qemu} found {word!r}, which {writer} has written")

    def cut(self, side, for_long):
        with self.lock:
            self.counts["long cuts" if for_long else "short cuts"] += 1
            side.cut_off = for_long
            for qemu in self.living if for_long else ():
                if qemu.side is side:
                    qemu.doubt()

    def possessions(self, side):
        """The images of those who run there."""
        with self.lock:
            return [image for image, owner in self.owners.items() if owner.side is side]

    def failed(self, what):
        with self.lock:
            self.wrong.append(what)


class Guest:
    """A thread that plays one guest's life, and what libvirtd does for it on both hosts."""

    def __init__(self, number, storage, sides, images, ledger):
        self.name, self.number, self.storage, self.ledger = f"g{number}", number, storage, ledger
        self.sides, self.images = sides, images
        self.random = random.Random(f"{SEED}-{storage.name}-{number}")
        self.actors, self.incarnations = {}, 0
        self.state = ""

    # Orders. Who does not answer is killed, with all that it had.

    def actor(self, side, role):
        if (side, role) not in self.actors:
            self.actors[side, role] = self.storage.actor(side.host)
        return self.actors[side, role]

    def forget(self, side, role):
        if old := self.actors.pop((side, role), None):
            with contextlib.suppress(AssertionError, OSError):
                old.quit()

    def order(self, qemu, *words):
        answer = self.actor(qemu.side, "libvirtd").ask(*words, timeout=120)
        self.ledger.counts[words[0]] += 1
        if answer.status in ("hung", "gone"):
            self.ledger.counts["no answer"] += 1
            self.end(qemu)
        return answer

    def witness(self, qemu, *words):
        answer = self.actor(qemu.side, "witness").ask(*words, timeout=60)
        if answer.status in ("hung", "gone"):
            qemu.was_doubtful = True  # what it writes may come later
            self.forget(qemu.side, "witness")
        return answer

    def writes(self, qemu):
        """Its word is in the image, where it has a lock; nobody else's may come there until it gives it up. Nor may anybody
        else have that lock, as those of two QEMUs: whoever was cut off between its lease and this one gets none."""
        word = qemu.word
        qemu.witnessed = all(self.witness(qemu, *words) for words in (
            ("open", word, qemu.image, "direct"), ("ofd", word, "w", 90, 1), ("write", word, 0, word)))

    def writes_again(self, qemu):
        """If its host is cut off the answer comes when that is over, and may be that its lease was lost."""
        if qemu.witnessed and not self.witness(qemu, "write", qemu.word, 0, qemu.word):
            self.ledger.counts["writes refused"] += 1
            if not qemu.was_doubtful:
                self.ledger.failed(f"{qemu} may not write")
        return qemu

    def looks(self, qemu):
        if qemu.witnessed:
            answer = self.witness(qemu, "read", qemu.word, 0)
            if answer:
                self.ledger.found(qemu, answer.text)

    def closes(self, qemu):
        if qemu.witnessed and (qemu.side, "witness") in self.actors:
            self.witness(qemu, "close", qemu.word)
        qemu.witnessed = False

    # What befalls it.

    def end(self, qemu):
        """libvirtd and QEMU are killed."""
        self.ledger.gives_up(qemu)
        self.forget(qemu.side, "libvirtd")
        self.closes(qemu)

    def kill(self, qemu):
        self.ledger.gives_up(qemu)
        if not self.actor(qemu.side, "libvirtd").ask("kill", self.name, timeout=120):
            self.forget(qemu.side, "libvirtd")
        self.closes(qemu)

    def make(self, side, image):
        self.incarnations += 1
        qemu = Qemu(self, side, image, f"{self.name}.{self.incarnations}")
        self.ledger.add(qemu)
        return qemu

    def start(self, side=None, image=None):
        qemu = self.make(side or self.random.choice(self.sides), image or self.random.choice(self.images))
        if self.order(qemu, "register", self.name, self.number, qemu.image):
            self.ledger.granted(qemu)
            if self.resume(qemu):
                self.writes(qemu)
                return qemu
            return None
        self.ledger.gives_up(qemu)
        return None

    def resume(self, qemu, patience=60):
        """It runs; or it is dead, because its lease was lost, which only one in doubt may hear."""
        deadline = time.monotonic() + patience
        while True:
            was_doubtful = qemu.doubtful
            answer = self.order(qemu, "acquire", self.name, *([self.state] if self.state else []))
            if answer:
                self.ledger.granted(qemu)
                self.state = ""
                return True
            if answer.status != "refused":
                return False  # dead already
            lost = "lost" in answer.text
            if not qemu.was_doubtful and lost:
                self.ledger.failed(f"{qemu} was told that its lease is lost: {answer.text}")
            if lost or (was_doubtful and time.monotonic() > deadline):
                self.ledger.counts["lost"] += 1
                self.kill(qemu)
                return False
            if time.monotonic() > deadline + 120:
                self.ledger.failed(f"{qemu} cannot go on: {answer}")
                self.kill(qemu)
                return False
            self.ledger.counts["tried again"] += 1
            time.sleep(0.5)

    def suspend(self, qemu):
        self.looks(qemu)
        answer = self.order(qemu, "release", self.name)
        if answer:
            self.state = answer.text
        elif answer.status != "refused":
            return None
        time.sleep(self.random.random() * 2)
        return qemu if self.resume(qemu) else None

    def migrate(self, qemu):
        [there] = [side for side in self.sides if side is not qemu.side]
        self.looks(qemu)
        state = self.order(qemu, "inquire", self.name)
        if not state:
            return qemu if state.status == "refused" else None
        target = self.make(there, qemu.image)
        if not self.order(target, "register", self.name, self.number, qemu.image):
            self.ledger.gives_up(target)
            return qemu
        released = self.order(qemu, "release", self.name)
        if not released and released.status != "refused":
            self.kill(target)
            return None
        self.state = released.text if released else ""
        if released and self.random.random() < 0.9:
            self.ledger.gives_up(qemu, dies=False)
            arrived = self.order(target, "acquire", self.name, self.state)
            if arrived:
                self.ledger.granted(target)
                self.state = ""
                self.kill(qemu)
                self.writes(target)
                return target
            if arrived.status == "refused":
                self.kill(target)
        else:
            self.kill(target)
        # Back: the source has it still, or nobody.
        return qemu if self.resume(qemu) else None

    def live(self, until):
        qemu = None
        while time.monotonic() < until:
            if qemu is None:
                self.state = ""
                qemu = self.start()
            else:
                what = self.random.choices((self.suspend, self.migrate, self.writes_again, self.kill, self.end),
                                           (4, 4, 4, 1, 1))[0]
                qemu = what(qemu)
            time.sleep(self.random.random())
        return qemu

    def close(self):
        for side, role in list(self.actors):
            self.forget(side, role)


def run(guest, until, left):
    """A thread: what goes wrong in it is a fault of the test's own, and ends it."""
    try:
        left[guest] = guest.live(until)
    except Exception as error:
        guest.ledger.failed(f"{guest.name}: {type(error).__name__}: {error}")


def steal(thieves, image, sides, until):
    """The image of a host that is cut off is asked for on the other one. The QEMU that got it."""
    side = next(side for side in sides if not side.cut_off)
    thief = thieves.pop()
    while time.monotonic() < until:
        if qemu := thief.start(side, image):
            thief.ledger.counts["stolen"] += 1
            return thief, qemu
        time.sleep(0.5)
    thieves.append(thief)
    return None


def cut_at_random(storage, sides, ledger, thieves, until):
    """At most one long cut at a time; the two hosts always reach each other."""
    chance = random.Random(f"{SEED}-{storage.name}-cuts")
    lease = storages.SERVER_LEASE  # of NFSv4; NFSv3 has none, and loses none
    while time.monotonic() < until:
        time.sleep(2 + 8 * chance.random())
        side, for_long = chance.choice(sides), chance.random() < 0.3 and storage.name != "cephfs"
        ledger.cut(side, for_long)
        end = time.monotonic() + (lease * (1.5 + chance.random()) if for_long else 2 * chance.random())
        images, stolen = ledger.possessions(side) if for_long else [], None
        side.host.cut(storage.server)
        try:
            if images and len(thieves) > 0:
                stolen = steal(thieves, chance.choice(images), sides, end)
            time.sleep(max(0, end - time.monotonic()))
        finally:
            side.host.heal(storage.server)
        with ledger.lock:
            side.cut_off = False
        if stolen:
            thief, qemu = stolen
            for _ in range(5):  # what is late comes now
                time.sleep(1)
                thief.looks(qemu)
            thief.kill(qemu)
            thieves.append(thief)


@(lambda test: test if "LEASEHOLD_LAB_TORTURE" in os.environ else pytest.mark.long(test))
@pytest.mark.parametrize("name", KINDS)
def test_guests_at_random_on_hosts_that_are_cut_off(bring_up, actor, table, name):
    storage = bring_up(name)
    ledger = Ledger(fenced=name != "nfs3")
    sides, images = [Side(host) for host in storage.clients], [storage.image() for _ in range(IMAGES)]
    guests = [Guest(number, storage, sides, images, ledger) for number in range(1, GUESTS + 1)]
    thieves = [Guest(GUESTS + 1, storage, sides, images, ledger)]
    print(f"LEASEHOLD_LAB_SEED={SEED} LEASEHOLD_LAB_TORTURE={SECONDS}")
    for side in sides:
        side.host.ready_actors()  # before many want it
    until, left = time.monotonic() + SECONDS, {}
    threads = [threading.Thread(target=run, args=(guest, until, left)) for guest in guests]
    try:
        for thread in threads:
            thread.start()
        cut_at_random(storage, sides, ledger, list(thieves), until)
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive(), "a guest hangs"
        # Who is left runs on or has lost its lease, and when all are gone each image is free.
        for guest, qemu in left.items():
            if qemu:
                guest.suspend(qemu)
    finally:
        for guest in guests + thieves:
            guest.close()
    for number, image in enumerate(images, start=100):
        for host in storage.clients:
            fresh = actor(host, storage.plugin_conf)
            labs.wait_until(lambda: fresh.ask("register", "fresh", number, image), f"{image} is free on {host}",
                            seconds=2 * labs.PATIENCE)
            fresh.ok("kill", "fresh")
    print(dict(ledger.counts), *ledger.wrong, sep="\n")
    table.add(name, f"torture, {SECONDS} s, seed {SEED}",
              ", ".join(f"{count} {what}" for what, count in sorted(ledger.counts.items())))
    assert not ledger.wrong, "\n".join(ledger.wrong)
    for what in ("granted", "looks", "acquire"):
        assert ledger.counts[what] > 0, f"no {what}: nothing was tried"
    assert ledger.counts["long cuts"] + ledger.counts["short cuts"] > 0, "nobody was cut off"
    # NFSv3 never takes a lease from a host that is cut off, and on CephFS nobody is for long.
    assert (ledger.counts["stolen"] > 0) == (name == "nfs42") or ledger.counts["long cuts"] < 3, ledger.counts

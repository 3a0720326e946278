# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""leasehold watch acts on a lost lease while its system calls fail, one after the other, in its helpers as well. It ends
by itself; what it says that it has done it has done; a guest that it has powered off is on again, or it says that it is
off; no other guest notices; and the next round does what this one could not.

From the first call on that has to do with libvirt; how it looks is in tests/unit/command_test.cpp. Default: some of them.
All, with each of their errors: LEASEHOLD_LONG=1.
"""

import collections
import json
import os
import pathlib

import hosts
import pytest
from test_watch import lockspace, lose_lease, running  # noqa: F401

INJECT = pathlib.Path(os.environ.get("LEASEHOLD_INJECT", hosts.plugin_dir().parent / "tests" / "unit" / "inject"))
LONG = bool(os.environ.get("LEASEHOLD_LONG"))
SOME = 6  # calls, spread over all that can fail

pytestmark = [pytest.mark.skipif(not hosts.command().exists(), reason=f"{hosts.command()} was not built"),
              pytest.mark.skipif(not INJECT.exists(), reason=f"{INJECT} was not built"),
              pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")]


class Round:
    """One round of the watcher, in which a call fails (0: none)."""

    def __init__(self, host, number=0, choice=0):
        report = host.dir / "log" / "injected"
        report.unlink(missing_ok=True)
        self.result = host.inside(INJECT, report, number, choice, hosts.command(), "watch", "--once", "--json")
        if self.result.rc == 77:
            pytest.skip("tracing is forbidden here")
        lines = [line.partition(" ") for line in report.read_text().splitlines()]
        self.hangs = any(word == "hangs" for word, _, _ in lines)
        self.failed = next((text for word, _, text in lines if word == "failed"), "")
        self.fallible = [text.partition(" ")[::2] for word, _, text in lines if word == "fallible"]
        self.events = [json.loads(line) for line in self.result.out.splitlines()]

    def said_of(self, guest):
        return [(event["event"], event["text"]) for event in self.events if event.get("uuid") == guest.uuid]

    def __str__(self):
        return f"{self.failed or 'nothing failed'}: {self.result}"


def faults(plain):
    """(call, which of its errors) of those to try."""
    first = next(place for place, (_, name) in enumerate(plain.fallible) if name == "connect")
    numbers = [int(number) for number, _ in plain.fallible[first:]]
    for number in numbers[:: 1 if LONG else max(1, len(numbers) // SOME)]:
        yield from ((number, choice) for choice in range(5 if LONG else 1))


# {wish: (what it says when it has done that, the state of the guest then)}
WISHES = {"pause": ("it was paused", "paused"), "poweroff": ("it was powered off", "shut off"),
          "restart": ("it was started anew", "running")}


@pytest.mark.parametrize("wish", ["pause", "restart", pytest.param("poweroff", marks=[] if LONG else pytest.mark.skip(
    reason="as restart, without the start: LEASEHOLD_LONG=1"))])
def test_what_fails_while_it_acts_is_said_and_the_next_round_does_it(alpha, lab, lockspace, image, guest, running,  # noqa: F811
                                                                     record_property, wish):
    word, state = WISHES[wish]
    victim = running(on_lockfailure=wish)
    neighbour = guest(image("neighbour.img"), emulator=lab.emulator_without_locks)
    alpha.boot(neighbour)
    untouched = alpha.pid_here(neighbour)

    def begin():
        """The guest runs, and its lease is lost."""
        now = alpha.state(victim)
        if now == "shut off":
            alpha.start_guest(victim)
        elif now == "paused":
            alpha.hmp(victim, "cont")
        alpha.wait_state(victim, "running")
        if now != "paused":
            lose_lease(lockspace, victim.disks[0].path)
        return alpha.pid_here(victim)

    def has_acted(before):
        now = alpha.state(victim)
        return now == state and (wish != "restart" or alpha.pid_here(victim) != before)

    def check(made, before):
        said = made.said_of(victim)
        assert not made.hangs and made.result.rc < 128, str(made)
        assert made.result.rc != 0 or wish == "restart" and has_acted(before), f"all is well, it says\n{made}"
        for event, text in said:
            if event == "acted" and word in text:
                alpha.wait_state(victim, state)
                assert has_acted(before), str(made)
        if alpha.state(victim) == "shut off" and wish == "restart":
            assert any("could not be started again" in text or "see to both" in text for _, text in said), str(made)
        assert alpha.state(neighbour) == "running" and alpha.pid_here(neighbour) == untouched, str(made)
        assert made.said_of(neighbour) == [] or made.failed, str(made)

    before = begin()
    plain = Round(alpha)
    check(plain, before)
    assert has_acted(before), str(plain)
    kinds, acted = collections.Counter(), 0
    for number, choice in faults(plain):
        before = begin()
        made = Round(alpha, number, choice)
        check(made, before)
        if made.failed:
            kinds[made.failed.partition(", ")[2]] += 1
            acted += has_acted(before)
        rounds = [made]  # on a very busy machine the next one may have no answer in time
        while not has_acted(before) and alpha.state(victim) == "running":
            rounds.append(Round(alpha))
            check(rounds[-1], before)
            assert len(rounds) < 5, "\n".join(map(str, rounds))
    assert kinds, "nothing failed"
    record_property(f"watch acts, {wish}",
                    f"{sum(kinds.values())} faults of {len(kinds)} kinds, {acted} times it acted at once")
    if LONG:
        for kind, times in sorted(kinds.items()):
            record_property(f"watch acts, {wish}, {kind}", times)

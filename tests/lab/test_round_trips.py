# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What a guest's life asks of the storage's server, for each disk: requests, counted where they are sent (NFS: the kernel's
tracepoint of each RPC, which shows NFSv3's lock protocol too) or where they arrive (CephFS: the metadata server's counters)."""

import collections
import json
import re

import conftest
import pytest

NETWORK = [name for name in ("nfs42", "nfs3", "cephfs") if name in conftest.KINDS]
pytestmark = pytest.mark.needs(*NETWORK)

# Of the guests that are compared: what more of them asks for more is of the disks.
FEW, MANY = 1, 5

LOCK_CALLS = {"LOCK", "LOCKT", "LOCKU", "TEST", "UNLOCK", "setfilelock", "getfilelock"}
RENEWALS = {"SEQUENCE", "RENEW"}  # what a client says whoever does what

# For each disk, the most of them in what a guest waits for. DESIGN.md, "What grows with what", says what each is for.
MOST = {"suspend": 1, "resume": 1, "handoff, source": 2, "handoff, destination": 12, "stop, source": 4,
        "go on, destination": 10}


@pytest.fixture(params=NETWORK, scope="session")
def storage_name(request):
    return request.param


class NfsRequests:
    """Of one host. Others' do not count: each is a kernel of its own."""

    TRACE = "/sys/kernel/tracing"

    def __init__(self, host):
        self.host = host
        host.ok(f"mountpoint -q {self.TRACE} || mount -t tracefs tracefs {self.TRACE};"
                f" echo 1 >{self.TRACE}/events/sunrpc/rpc_request/enable")

    def count(self, work):
        self.host.ok(f"echo >{self.TRACE}/trace")
        work()
        trace = self.host.ok(f"grep rpc_request: {self.TRACE}/trace || true")
        return collections.Counter(name for name in re.findall(r" (?:nfs|lockd)v\d (\w+)", trace) if name not in RENEWALS)


class CephRequests:
    """Of all clients. The metadata server counts what it has answered."""

    def __init__(self, storage):
        self.storage = storage

    def now(self):
        counters = json.loads(self.storage.cluster("--format json tell mds.lab:0 perf dump mds_server"))["mds_server"]
        return {name[len("req_"):-len("_latency")]: value["avgcount"] for name, value in counters.items()
                if name.startswith("req_")}

    def count(self, work):
        before = self.now()
        work()
        return collections.Counter({name: count - before[name] for name, count in self.now().items()
                                    if count > before[name]})


def life_of(number, disks, counter_of, one, two):
    """What each step of one guest asks for: {step: {request: how many}}."""
    guest = f"guest{number}"
    said = {}

    def state(actor, verb):
        said["state"] = actor.ok(verb, guest)
    steps = {
        "start": lambda: (one.ok("register", guest, number, *disks), one.ok("acquire", guest)),
        "suspend": lambda: state(one, "release"),
        "resume": lambda: one.ok("acquire", guest, said["state"]),
        "handoff, source": lambda: state(one, "inquire"),
        "handoff, destination": lambda: two.ok("register", guest, number, *disks),
        "stop, source": lambda: one.ok("release", guest),
        "go on, destination": lambda: two.ok("acquire", guest, said["state"]),
    }
    counts = {}
    for step, work in steps.items():
        counts[step] = counter_of(two if "destination" in step else one).count(work)
    one.ok("kill", guest)
    two.ok("kill", guest)
    return counts


def test_what_each_disk_asks_of_the_server_is_counted(leased, hosts, one, two, table):
    if leased.name == "cephfs":
        counters = dict.fromkeys(hosts, CephRequests(leased))
    else:
        counters = {host: NfsRequests(host) for host in hosts}

    def counter_of(actor):
        return counters[actor.host]
    life_of(1, [leased.image()], counter_of, one, two)  # what is asked once for each mount
    few, many = (life_of(number, [leased.image() for _ in range(number)], counter_of, one, two) for number in (FEW, MANY))
    for step, counted in many.items():
        each = {name: (count - few[step][name]) / (MANY - FEW) for name, count in sorted(counted.items())}
        each = {name: count for name, count in each.items() if count > 0}
        table.add(leased.name, f"{step}, each disk",
                  ", ".join(f"{count:g} {name}" for name, count in each.items()) or "nothing")
        locks = sum(count for name, count in each.items() if name in LOCK_CALLS)
        assert locks <= MOST.get(step, locks), f"{step} asks the server more for each disk than it did: {each}"
    assert many["suspend"], "nothing was counted"

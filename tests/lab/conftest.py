# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Fixtures: one lab for the whole run, each storage from its first use on, actors and images for one test."""

import contextlib
import os
import pathlib

import lab as labs
import pytest
import storage as storages

# Storage that this version of the plugin refuses. A test that leases an image there must fail until the line is gone.
REFUSED = {
    "smb": "SMB is refused: its F_OFD_GETLK does not tell which lock is in the way",
}

# Which kinds to run on, for one who works on a few of them. A kernel has one cluster stack of OCFS2. Leases on a
# replicated volume are not given by themselves.
EVERYTHING = ",".join(kind for kind in storages.KINDS if kind not in ("ocfs2pcmk", "gluster3"))
KINDS = [kind for kind in os.environ.get("LEASEHOLD_LAB_STORAGE", EVERYTHING).split(",") if kind]

# Where a lease is made of files with a flock.
FILE_SETS = [kind for kind in ("ocfs2", "bindfs", "gluster3") if kind in KINDS]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also what takes minutes: Linux' own lease times, fencing")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs with --long only")
    config.addinivalue_line("markers", "last: runs after all others")
    config.addinivalue_line("markers", "needs(kind...): about these kinds of storage, at least one of which was asked for")
    if config.getoption("--long"):
        storages.SERVER_LEASE = 90


# What is quick and tells most comes first.
FILES = ("test_locks", "test_leases", "test_file_sets", "test_devices", "test_stacks", "test_inspect", "test_gluster",
         "test_accidents", "test_fenced", "test_ceph", "test_round_trips", "test_torture")


def is_wanted(item):
    """What nobody asked for is no skipped test."""
    needs, skip = item.get_closest_marker("needs"), item.get_closest_marker("skip")
    if needs and not set(needs.args).intersection(KINDS):
        return False
    return not (skip and skip.kwargs["reason"].startswith("got empty parameter set"))


@pytest.hookimpl(trylast=True)  # after pytest's own sorting by parameter
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --long"))
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = filter(is_wanted, items)
    items.sort(key=lambda item: (item.get_closest_marker("last") is not None, FILES.index(item.path.stem)))


@pytest.fixture(scope="session")
def lab_of():
    """lab_of(labs.Lab): that lab, started when it is first asked for."""
    made = {}

    def start(kind):
        if kind not in made:
            try:
                made[kind] = stack.enter_context(kind())
            except labs.Missing as missing:
                pytest.skip(str(missing))
            made[kind].start()
        return made[kind]
    with contextlib.ExitStack() as stack:
        yield start


@pytest.fixture(scope="session")
def lab(lab_of):
    return lab_of(labs.Lab)


@pytest.fixture(scope="session")
def bring_up(lab_of):
    """bring_up("nfs42"): that storage, ready to use."""
    kinds = {}

    def ready(name):
        if name not in kinds:
            kind = storages.KINDS[name]
            kinds[name] = kind(lab_of(getattr(labs, kind.lab_kind)))
        try:
            return kinds[name].ready()
        except labs.Missing as missing:
            return pytest.skip(str(missing))
    return ready


@pytest.fixture(params=KINDS, scope="session")
def storage_name(request):
    return request.param


@pytest.fixture
def storage(bring_up, storage_name):
    """Every test that asks for it runs once for each kind."""
    return bring_up(storage_name)


@pytest.fixture
def leased(request, bring_up, storage_name):
    """The same, for tests in which the plugin leases images there."""
    expect_refusal(request, storage_name)
    return bring_up(storage_name)


@pytest.fixture
def nfs42(bring_up):
    return bring_up("nfs42")


def expect_refusal(request, name):
    if name in REFUSED:
        request.applymarker(pytest.mark.xfail(strict=True, reason=REFUSED[name]))


@pytest.fixture
def used_storage(request, bring_up):
    """The one that the test runs on, if it runs once for each."""
    return bring_up(request.getfixturevalue("storage_name")) if "storage_name" in request.fixturenames else None


@pytest.fixture
def actor(used_storage):
    """actor(host): a new process on that host; it ends with the test."""
    made = []

    def make(host, plugin_conf=used_storage and used_storage.plugin_conf):
        made.append(host.actor(host.lab.unique("actor"), plugin_conf))
        return made[-1]
    yield make
    if made:
        labs.together(labs.Actor.quit, made)


@pytest.fixture
def hosts(request, used_storage):
    """The two that use the test's storage."""
    return used_storage.clients if used_storage else request.getfixturevalue("lab").hosts[:2]


@pytest.fixture
def one_and_two(request, hosts, actor):
    """Those of them that the test asks for, started at the same time."""
    host_of = {name: host for name, host in zip(("one", "two"), hosts) if name in request.fixturenames}
    return dict(zip(host_of, labs.together(actor, host_of.values())))


@pytest.fixture
def one(one_and_two):
    return one_and_two["one"]


@pytest.fixture
def two(one_and_two):
    return one_and_two["two"]


class Table:
    """Lines for people, printed at the end of the run and kept in LEASEHOLD_LAB_TABLE if that is set."""

    rows = []

    @classmethod
    def add(cls, *cells):
        cls.rows.append(cells)


@pytest.fixture(scope="session")
def table():
    return Table


def pytest_terminal_summary(terminalreporter):
    if not Table.rows:
        return
    lines = [f"| {' | '.join(map(str, row))} |" for row in Table.rows]
    terminalreporter.section("measured")
    terminalreporter.write("\n".join(lines) + "\n")
    if target := os.environ.get("LEASEHOLD_LAB_TABLE"):
        pathlib.Path(target).write_text("\n".join(lines) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows what each host's kernel has said last."""
    outcome = yield
    report = outcome.get_result()
    arguments = getattr(item, "funcargs", {}).values()
    lab = next((lab for value in arguments if isinstance(lab := getattr(value, "lab", value), labs.Lab)), None)
    if report.failed and lab:
        for host in lab.hosts:
            report.sections.append((f"console of {host}", host.log()[-1500:]))

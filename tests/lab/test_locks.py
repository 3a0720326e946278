# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What locks do on each storage, without leasehold: the facts that it is built on. If one of these fails, a kernel or a
file system has changed, and core/storage has to be looked at again."""

import dataclasses

import conftest
import lab as labs
import pytest

MARK = "2^62"


@dataclasses.dataclass(frozen=True)
class Facts:
    magic: str
    byte_ranges_cross: bool = True  # does a byte-range lock count on the other host?
    one_table: bool = True  # do flock and byte-range locks meet?
    flock_needs_write: bool = False  # flock EX through a descriptor opened for reading
    reads_visible: bool = True  # does F_OFD_GETLK show the other host's read lock?
    ranges_visible: bool = True  # does it say which bytes are locked, or just repeat the question?
    remote_pid: bool = False  # does it give the pid that the holder has there, or -1?
    asking_is_blind_to_own: bool = True  # is F_OFD_GETLK about others only, as fcntl(2) says?
    per_description: bool = True  # does the holder's host tell byte-range locks of its descriptors from each other?
    flock_per_description: bool = True  # and flocks?
    survives_dup: bool = True  # does a byte-range lock outlast the close of one of two descriptors of its description?
    listed_as: tuple = ("OFDLCK",)  # what an open-file-description lock may be called in fdinfo and /proc/locks


FACTS = {
    "nfs42": Facts("0x6969", flock_needs_write=True, listed_as=("OFDLCK", "POSIX")),
    "nfs3": Facts("0x6969", reads_visible=False, listed_as=("POSIX",)),
    "ocfs2": Facts("0x7461636f", byte_ranges_cross=False, one_table=False),
    "ocfs2pcmk": Facts("0x7461636f", one_table=False, remote_pid=True),
    "gfs2": Facts("0x1161970", one_table=False, remote_pid=True),
    "cephfs": Facts("0xc36400", one_table=False),
    "cephfuse": Facts("0x65735546", one_table=False, listed_as=("nothing",)),
    # Its process takes all locks of a mount as its own POSIX locks: they do not exclude each other, and end with any
    # close.
    "bindfs": Facts("0x65735546", one_table=False, per_description=False, survives_dup=False, listed_as=("nothing",)),
    "smb": Facts("0xfe534d42", ranges_visible=False, flock_per_description=False, survives_dup=False,
                 asking_is_blind_to_own=False),
    "gluster": Facts("0x65735546", listed_as=("nothing",)),
    "gluster3": Facts("0x65735546", listed_as=("nothing",)),
}

BUSY = ("EAGAIN", "EACCES")


@pytest.fixture(params=[kind for kind in conftest.KINDS if kind in FACTS], scope="session")
def storage_name(request):
    return request.param


@pytest.fixture
def facts(storage_name):
    return FACTS[storage_name]


@pytest.fixture
def opened(storage, one, two):
    """The same file, open for writing on both hosts as "f"."""
    path = storage.path()
    for actor in (one, two):
        actor.ok("open", "f", path, "rw")
    return path


def busy(answer):
    assert answer.status in (*BUSY, "ok"), str(answer)
    return answer.status in BUSY


def test_the_file_system_says_what_it_is(storage, facts, one):
    assert one.ok("statfs", storage.directory) == facts.magic


def test_flock_crosses_hosts(opened, one, two):
    one.ok("flock", "f", "ex")
    assert busy(two.ask("flock", "f", "ex")) and busy(two.ask("flock", "f", "sh"))
    one.ok("flock", "f", "un")
    assert two.ask("flock", "f", "ex")


def test_byte_range_locks_cross_hosts_or_are_known_not_to(opened, facts, one, two):
    one.ok("ofd", "f", "w", MARK, 1)
    assert busy(two.ask("ofd", "f", "w", MARK, 1)) == facts.byte_ranges_cross
    assert two.ask("ofd", "f", "w", f"{MARK}+1", 1), "only the byte that is locked is busy"


def test_the_end_of_the_offsets_can_be_locked(opened, one):
    one.ok("ofd", "f", "w", "2^62+4611686018427387902", 1)


def test_flock_and_byte_range_locks_meet_or_are_known_not_to(opened, facts, one, two):
    one.ok("ofd", "f", "r", 100, 1)
    assert busy(two.ask("flock", "f", "ex")) == facts.one_table
    two.ok("flock", "f", "un")
    one.ok("ofd", "f", "u", 0, 0)
    one.ok("flock", "f", "ex")
    assert busy(two.ask("ofd", "f", "r", 100, 1)) == facts.one_table


def test_a_descriptor_for_reading_takes_no_write_locks(opened, storage, facts, one):
    one.ok("open", "readonly", opened, "ro")
    assert one.ask("ofd", "readonly", "w", MARK, 1).status == "EBADF"
    assert one.ask("flock", "readonly", "ex").status == ("EBADF" if facts.flock_needs_write else "ok")


def test_asking_shows_the_other_host_s_write_lock(opened, facts, one, two):
    one.ok("ofd", "f", "w", f"{MARK}+7", 1)
    answer = two.ok("get", "f", "w", MARK, 1 << 61)
    if not facts.byte_ranges_cross:
        assert answer == "free"
        return
    kind, start, length, _, pid = answer.split()
    wanted = (1 << 62) + 7, 1
    assert (kind, int(start), int(length)) == ("write", *(wanted if facts.ranges_visible else (1 << 62, 1 << 61)))
    assert (int(pid) > 0) == facts.remote_pid


def test_asking_shows_the_other_host_s_read_lock_or_is_known_not_to(opened, facts, one, two):
    one.ok("ofd", "f", "r", MARK, 1)
    answer = two.ok("get", "f", "w", MARK, 1)
    assert (answer != "free") == (facts.byte_ranges_cross and facts.reads_visible), answer
    assert busy(two.ask("ofd", "f", "w", MARK, 1)) == facts.byte_ranges_cross, "a trial write lock always tells"


def test_a_holder_finds_its_own_lock_in_fdinfo_or_is_known_not_to(opened, facts, one):
    one.ok("ofd", "f", "w", MARK, 1)
    assert one.ok("listed", "f") in facts.listed_as


def test_a_lock_goes_with_the_process_that_holds_it(hosts, opened, facts, actor, two):
    holder = actor(hosts[0])
    holder.ok("open", "f", opened, "rw")
    lock, wanted = (("ofd", "f", "w", MARK, 1),) * 2 if facts.byte_ranges_cross else (("flock", "f", "ex"),) * 2
    holder.ok(*lock)
    assert busy(two.ask(*wanted))
    holder.quit()
    labs.wait_until(lambda: two.ask(*wanted), "the lock is free")


def test_byte_range_locks_of_one_host_exclude_each_other_and_outlive_a_neighbour_or_are_known_not_to(
        hosts, opened, facts, actor, one, two):
    neighbour = actor(hosts[0])
    neighbour.ok("open", "f", opened, "rw")
    one.ok("ofd", "f", "w", MARK, 1)
    assert busy(neighbour.ask("ofd", "f", "w", MARK, 1)) == facts.per_description
    neighbour.ok("close", "f")
    assert busy(two.ask("ofd", "f", "w", MARK, 1)) == (facts.byte_ranges_cross and facts.per_description)


def test_flocks_of_one_host_exclude_each_other_and_outlive_a_neighbour_or_are_known_not_to(
        hosts, opened, facts, actor, one, two):
    neighbour = actor(hosts[0])
    neighbour.ok("open", "f", opened, "rw")
    one.ok("flock", "f", "ex")
    assert busy(neighbour.ask("flock", "f", "ex"))
    neighbour.ok("close", "f")
    assert busy(two.ask("flock", "f", "ex")) == facts.flock_per_description


@pytest.mark.parametrize("kind", ["ofd", "flock"])
def test_a_lock_whose_descriptor_is_only_in_flight_lasts_as_long_as_the_socket_or_is_known_not_to(
        hosts, opened, facts, actor, two, kind):
    """As a guest's leases do: they are in flight in a socket of its QEMU."""
    if kind == "ofd" and not facts.byte_ranges_cross:
        pytest.skip("byte-range locks stay on their host there")
    lock = ("ofd", "f", "w", MARK, 1) if kind == "ofd" else ("flock", "f", "ex")
    holder = actor(hosts[0])
    holder.ok("open", "f", opened, "rw")
    holder.ok(*lock)
    holder.ok("park", "f")
    lasts = busy(two.ask(*lock))
    assert lasts == (kind == "flock" or facts.survives_dup)
    holder.quit()
    if lasts:
        labs.wait_until(lambda: two.ask(*lock), "the lock is free")


@pytest.mark.parametrize("kind", ["r", "w"])
def test_asking_does_not_meet_the_locks_of_its_own_descriptor_or_is_known_to(opened, facts, one, two, kind):
    one.ok("ofd", "f", kind, MARK, 1)
    answer = one.ok("get", "f", "w", MARK, 1)
    # cifs asks by locking and unlocking on the server (fs/smb/client/file.c, cifs_getlk), and meets itself there.
    assert answer == "free" if facts.asking_is_blind_to_own else answer.startswith("read"), answer
    assert busy(two.ask("ofd", "f", "w", MARK, 1)) == facts.byte_ranges_cross, "the lock is still there"


def test_qemu_s_locks_refuse_a_second_qemu_or_are_known_not_to(hosts, opened, facts, actor, one, two):
    """QEMU takes read locks and then asks with F_OFD_GETLK whether somebody else has the opposite ones."""
    if not facts.asking_is_blind_to_own:
        assert one.ask("qemu-locks", opened).status == "EAGAIN", "QEMU meets its own locks and does not start"
        return
    one.ok("qemu-locks", opened)
    assert busy(actor(hosts[0]).ask("qemu-locks", opened)), "on the same host"
    crosses = facts.byte_ranges_cross and facts.reads_visible and facts.per_description
    assert busy(two.ask("qemu-locks", opened)) == crosses, "on the other host"

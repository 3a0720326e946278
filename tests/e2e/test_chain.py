# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What lies below a guest's images: it is leased for reading while a guest reads it, and for writing while a block job
writes to it. The emulator has no image locks of its own where nothing else is said: the lease alone decides."""

import time

import expect
import hosts
import pytest
from documents import documented
from steps import finished, performed, prepared
from test_identity import goes_through, resumes


@pytest.fixture
def overlay(images):
    """overlay(name, base): a qcow2 image over another one."""
    def make(name, base):
        form = "qcow2" if base.suffix == ".qcow2" else "raw"
        hosts.ok("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", form, images / name)
        return images / name
    return make


@pytest.fixture
def clone(guest, lab, overlay):
    """clone(name, base): a guest on an overlay over that base."""
    def make(name, base, **options):
        options.setdefault("emulator", lab.emulator_without_locks)
        return guest(hosts.Disk(overlay(f"{name}.qcow2", base), "vda", format="qcow2"), **options)
    return make


@pytest.fixture
def template(image):
    return image("template.img")


def top_of(guest):
    return guest.disks[0].path


def is_read(host, *images):
    """Readers share it, and nobody writes to it."""
    for path in images:
        expect.taken(host, path)
        expect.free(host, path, mode="readonly")


def is_exclusive(host, *images):
    for path in images:
        expect.taken(host, path)
        expect.taken(host, path, mode="readonly")


def is_leased_as_opened(host, guest, other, *images):
    """Each as QEMU has it open, asked from another host."""
    qemu = host.qemu_pid(guest)
    before = None
    while before != (before := {path: hosts.access_to(path, qemu) for path in images}):
        resumes(host, guest)  # a block job that ends meanwhile is the next call's
    disks = host.ok("domblklist", guest.name)
    for path, access in before.items():
        # A libvirtd that died in a snapshot takes the base for the guest's image all its life.
        if "writing" in access or (access and str(path) in disks):
            is_exclusive(other, path)
        elif access:
            is_read(other, path)
        else:
            expect.free(other, path)
    return before


# --- linked clones

@pytest.mark.parametrize("form", ["img", "qcow2"])
def test_a_template_is_not_written_to_while_clones_of_it_run(alpha, beta, image, clone, form):
    template = image(f"template.{form}", format="raw" if form == "img" else form)
    clones = {alpha: clone("one", template), beta: clone("two", template)}
    for host, one in clones.items():
        host.start_guest(one)
    for host, one in clones.items():
        expect.taken(host, template, by=(one, host))
        expect.free(host, template, mode="readonly")
        expect.taken(host, *(top_of(each) for each in clones.values()))
    alpha.destroy(clones[alpha])
    is_read(alpha, template)
    beta.destroy(clones[beta])
    expect.free(alpha, template)


def test_clones_of_one_template_run_on_two_hosts(medium, alpha, beta, template, clone):
    one, two = clone("one", template), clone("two", template)
    alpha.boot(one)
    beta.boot(two)
    is_read(alpha, template)
    goes_through(alpha, one, resumes)
    alpha.destroy(one)
    is_read(alpha, template)
    beta.kill_qemu(two)
    expect.free(alpha, template)


def test_many_clones_run_beside_each_other(alpha, beta, template, clone):
    clones = [clone(f"clone{number}", template) for number in range(8)]
    for number, one in enumerate(clones):
        (alpha, beta)[number % 2].start_guest(one)
    for number, one in enumerate(clones):
        expect.runs((alpha, beta)[number % 2], one)
    refusal = alpha.try_take(template)
    assert not refusal and "and 5 more" in refusal.err, refusal.err
    for number, one in enumerate(clones):
        expect.taken(alpha, template)
        (alpha, beta)[number % 2].kill_qemu(one)
    expect.free(alpha, template)


@pytest.mark.both_emulators
def test_a_clone_with_the_locks_of_the_stock_qemu(alpha, beta, template, clone, emulator):
    one = clone("one", template, emulator=emulator, on_poweroff="restart")
    alpha.boot(one)
    is_read(beta, template)
    goes_through(alpha, one)
    is_read(beta, template)
    alpha.destroy(one)
    expect.free(beta, template)


def test_a_clone_does_not_start_while_somebody_writes_to_its_template(medium, alpha, beta, lab, template, clone,
                                                                      guest):
    writer, one = guest(template, emulator=lab.emulator_without_locks), clone("one", template)
    beta.start_guest(writer)
    alpha.define(one)
    error = alpha.refused("start", one.name)
    expect.names_holder(error, template, writer, beta)
    assert "backing file" in error, error
    assert not one.said("R")
    assert alpha.state(one) == "shut off"
    expect.free(beta, top_of(one))
    expect.runs(beta, writer)
    beta.destroy(writer)
    alpha.ok("start", one.name)
    is_read(beta, template)


def test_a_clone_that_was_started_paused_gets_its_template_when_it_first_runs(alpha, beta, lab, template, clone,
                                                                              guest):
    writer, one = guest(template, emulator=lab.emulator_without_locks), clone("one", template)
    alpha.start_guest(one, paused=True)
    beta.start_guest(writer)
    error = alpha.refused("resume", one.name)
    expect.names_holder(error, template, writer, beta)
    assert "backing file" in error, error
    assert not one.said("R")
    beta.destroy(writer)
    alpha.resume(one)
    is_read(beta, template)


def test_a_saved_clone_is_restored_when_nobody_writes_to_its_template(alpha, beta, lab, images, template, clone,
                                                                      guest):
    writer, one = guest(template, emulator=lab.emulator_without_locks), clone("one", template)
    alpha.boot(one)
    alpha.ok("save", one.name, images / "ram")
    beta.start_guest(writer)
    expect.names_holder(alpha.refused("restore", images / "ram"), template, writer, beta)
    beta.destroy(writer)
    alpha.ok("restore", images / "ram")
    is_read(beta, template)


def test_a_clone_runs_on_when_its_template_was_deleted_or_renamed(alpha, beta, images, template, clone):
    one = clone("one", template, on_poweroff="restart")
    alpha.boot(one)
    moved = template.rename(images / "moved.img")
    goes_through(alpha, one)
    is_read(beta, moved)
    moved.unlink()
    goes_through(alpha, one)
    expect.taken(beta, top_of(one), by=(one, alpha))


def test_a_guest_may_read_as_a_disk_what_lies_below_another_one(alpha, beta, lab, template, guest, overlay):
    both = guest(hosts.Disk(overlay("top.qcow2", template), "vda", format="qcow2"),
                 hosts.Disk(template, "vdb", "readonly"), emulator=lab.emulator_without_locks)
    alpha.boot(both)
    is_read(beta, template)
    goes_through(alpha, both, resumes)
    is_read(beta, template)


def test_two_disks_over_one_template_keep_it_until_both_are_gone(alpha, beta, image, template, guest, overlay, lab):
    owner = guest(image(), emulator=lab.emulator_without_locks, scsi_controllers=1)
    alpha.start_guest(owner)
    for target in ("sda", "sdb"):
        alpha.ok("attach-disk", owner.name, overlay(f"{target}.qcow2", template), target, "--subdriver", "qcow2")
    goes_through(alpha, owner, resumes)
    is_read(beta, template)
    alpha.ok("detach-disk", owner.name, "sda")
    is_read(beta, template)
    alpha.ok("detach-disk", owner.name, "sdb")
    expect.free(beta, template)


@pytest.mark.short(when=lambda parameters: parameters["medium"] == "on the image")
def test_a_hot_plugged_clone_has_its_template_leased_at_the_latest_after_the_next_call(medium, alpha, beta, image,
                                                                                       template, guest, overlay, lab):
    owner, extra = guest(image(), emulator=lab.emulator_without_locks, scsi_controllers=1), overlay("e.qcow2", template)
    alpha.start_guest(owner)
    alpha.ok("attach-disk", owner.name, extra, "sda", "--subdriver", "qcow2")
    goes_through(alpha, owner, resumes)
    is_read(beta, template)
    is_exclusive(beta, extra)
    alpha.ok("detach-disk", owner.name, "sda")
    expect.free(beta, template, extra)


def test_a_base_that_guests_are_to_share_by_transient_overlays_is_protected_and_not_shared(alpha, beta, lab, template,
                                                                                        guest):
    """libvirt names the base as the disk of each of them when it starts, for writing."""
    one, two = (guest(hosts.Disk(template, "vda", address="<transient shareBacking='yes'/>"),
                      emulator=lab.emulator_without_locks) for _ in range(2))
    alpha.boot(one)
    is_read(beta, template)
    beta.define(two)
    error = beta.refused("start", two.name)
    expect.names_holder(error, template, one, alpha)
    assert "shareBacking" in error, error
    goes_through(alpha, one, resumes)
    is_read(beta, template)
    alpha.destroy(one)
    beta.ok("start", two.name)
    is_read(alpha, template)


# --- snapshots, commits, pulls, copies

@pytest.fixture
def snapshot(images):
    """snapshot(host, guest, name): the guest goes on in a new overlay; that one."""
    def make(host, guest, name):
        path = images / f"{name}.qcow2"
        host.ok("snapshot-create-as", guest.name, name, "--disk-only", "--no-metadata",
                "--diskspec", f"vda,file={path}")
        return path
    return make


@pytest.fixture
def owner(guest, template, lab):
    return guest(template, emulator=lab.emulator_without_locks, on_poweroff="restart")


def commit(host, guest, *words):
    return host.virsh("blockcommit", guest.name, "vda", *words, "--wait", "--verbose")


def test_a_snapshot_leaves_its_base_to_readers_and_to_no_writer(medium, alpha, beta, template, owner, snapshot, clone):
    alpha.boot(owner)
    top = snapshot(alpha, owner, "top")
    is_read(beta, template)
    is_exclusive(beta, top)
    other = clone("other", template)
    beta.boot(other)
    goes_through(alpha, owner, resumes)
    is_read(beta, template)
    alpha.destroy(owner)
    is_read(beta, template)
    beta.destroy(other)
    expect.free(beta, template, top)


def test_a_snapshot_of_a_suspended_guest_leaves_its_base_to_readers(alpha, beta, template, owner, snapshot):
    alpha.boot(owner)
    alpha.suspend(owner)
    top = snapshot(alpha, owner, "top")
    is_read(beta, template)
    alpha.resume(owner)
    is_read(beta, template)
    is_exclusive(beta, top)


def test_a_snapshot_with_memory_leaves_its_base_to_readers(alpha, beta, images, template, owner):
    alpha.boot(owner)
    top = images / "top.qcow2"
    alpha.ok("snapshot-create-as", owner.name, "s1", "--memspec", f"file={images / 'ram'},snapshot=external",
             "--diskspec", f"vda,file={top}")
    is_read(beta, template)
    is_exclusive(beta, top)


@pytest.mark.parametrize("where", ["the same host", "another host"])
def test_an_active_commit_is_refused_while_another_clone_reads_the_base(alpha, beta, template, owner, snapshot, clone,
                                                                        where):
    reader, its_host = clone("reader", template), alpha if where == "the same host" else beta
    alpha.boot(owner)
    top = snapshot(alpha, owner, "top")
    its_host.boot(reader)
    refusal = commit(alpha, owner, "--active", "--pivot")
    assert not refusal and str(template) in refusal.err and "in use by" in refusal.err, refusal
    if its_host is alpha:
        expect.names_holder(refusal.err, template, reader, alpha)
    expect.runs(alpha, owner)
    is_read(beta, template)
    is_exclusive(beta, top)
    goes_through(alpha, owner, resumes)
    its_host.destroy(reader)
    assert (result := commit(alpha, owner, "--active", "--pivot")), result
    expect.taken(beta, template, by=(owner, alpha))
    is_exclusive(beta, template)
    expect.free(beta, top)
    goes_through(alpha, owner)
    expect.taken(beta, template, by=(owner, alpha))


def test_an_active_commit_goes_on_in_the_base(medium, alpha, beta, template, owner, snapshot):
    alpha.boot(owner)
    top = snapshot(alpha, owner, "top")
    assert (result := commit(alpha, owner, "--active")), result
    is_exclusive(beta, template, top)
    goes_through(alpha, owner, resumes)
    is_exclusive(beta, template, top)
    alpha.ok("blockjob", owner.name, "vda", "--pivot")
    is_exclusive(beta, template)
    expect.free(beta, top)
    goes_through(alpha, owner, resumes)
    expect.taken(beta, template, by=(owner, alpha))


def test_an_active_commit_that_is_aborted_leaves_the_base_as_qemu_has_it_open(medium, alpha, beta, template, owner,
                                                                              snapshot):
    """At the latest after the next call: of the end of an aborted commit libvirt says nothing. QEMU 7.2 opens the base
    for reading again. QEMU 10.0 keeps it open for writing (query-named-block-nodes: "ro": false), and libvirt 11.3 does
    not ask it to let go: then nobody else may have it."""
    alpha.boot(owner)
    top = snapshot(alpha, owner, "top")
    assert (result := commit(alpha, owner, "--active")), result
    is_exclusive(beta, template)
    alpha.ok("blockjob", owner.name, "vda", "--abort")
    goes_through(alpha, owner, resumes)
    opened = is_leased_as_opened(alpha, owner, beta, template, top)
    assert hosts.libvirt_version() >= (10, 0) or opened[template] == {"reading"}
    is_exclusive(beta, top)
    assert (result := commit(alpha, owner, "--active", "--pivot")), result
    is_exclusive(beta, template)


@pytest.mark.both_emulators
def test_an_inactive_commit_needs_the_base_alone_and_leaves_it_to_readers(alpha, beta, template, guest, snapshot,
                                                                          clone, emulator):
    owner = guest(template, emulator=emulator, on_poweroff="restart")
    alpha.boot(owner)
    middle, top = snapshot(alpha, owner, "middle"), snapshot(alpha, owner, "top")
    is_read(beta, template, middle)
    reader = clone("reader", template)
    alpha.boot(reader)
    refusal = commit(alpha, owner, "--base", template, "--top", middle)
    assert not refusal
    expect.names_holder(refusal.err, template, reader, alpha)
    is_read(beta, template, middle)
    alpha.destroy(reader)
    assert (result := commit(alpha, owner, "--base", template, "--top", middle)), result
    is_read(beta, template)
    expect.free(beta, middle)
    is_exclusive(beta, top)
    beta.boot(reader)
    goes_through(alpha, owner)
    is_read(beta, template)
    expect.free(beta, middle)


def test_a_commit_into_the_middle_of_a_chain_leaves_the_base_to_its_other_readers(alpha, beta, template, owner,
                                                                                  snapshot, clone):
    reader = clone("reader", template)
    alpha.boot(owner)
    lower, upper, top = (snapshot(alpha, owner, name) for name in ("lower", "upper", "top"))
    beta.boot(reader)
    is_read(beta, template, lower, upper)
    assert (result := commit(alpha, owner, "--base", lower, "--top", upper)), result
    is_read(beta, template, lower)
    expect.free(beta, upper)
    assert (result := commit(alpha, owner, "--active", "--pivot", "--base", lower)), result
    is_read(beta, template)
    is_exclusive(beta, lower)
    expect.free(beta, top)
    goes_through(alpha, owner, resumes)
    is_leased_as_opened(alpha, owner, beta, template, lower, upper, top)


def test_a_suspended_guest_commits_and_migrates_with_its_base(alpha, beta, template, owner, snapshot, clone):
    alpha.boot(owner)
    top = snapshot(alpha, owner, "top")
    alpha.suspend(owner)
    reader = clone("reader", template)
    alpha.boot(reader)
    refusal = commit(alpha, owner, "--active", "--pivot")
    assert not refusal
    expect.names_holder(refusal.err, template, reader, alpha)
    alpha.destroy(reader)
    assert (result := commit(alpha, owner, "--active", "--pivot")), result
    is_exclusive(beta, template)
    expect.free(beta, top)
    assert (result := alpha.migrate_to(beta, owner, "--live")), result
    expect.taken(alpha, template)
    beta.resume(owner)
    expect.runs(beta, owner)
    expect.taken(alpha, template, by=(owner, beta))


def test_a_snapshot_of_a_guest_that_has_not_run_yet_leaves_the_base_to_readers_when_it_runs(alpha, beta, template,
                                                                                            owner, snapshot):
    alpha.start_guest(owner, paused=True)
    top = snapshot(alpha, owner, "top")
    expect.taken(beta, template, top)
    alpha.resume(owner)
    is_read(beta, template)
    is_exclusive(beta, top)


@pytest.mark.both_emulators
def test_a_pull_frees_what_lies_below(alpha, beta, template, guest, snapshot, emulator):
    owner = guest(template, emulator=emulator)
    alpha.boot(owner)
    middle, top = snapshot(alpha, owner, "middle"), snapshot(alpha, owner, "top")
    alpha.ok("blockpull", owner.name, "vda", "--base", template, "--wait")
    goes_through(alpha, owner, resumes)
    expect.free(beta, middle)
    is_read(beta, template)
    is_exclusive(beta, top)
    alpha.ok(*documented("virsh blockpull")[1:], owner.name, "vda", "--wait")
    goes_through(alpha, owner, resumes)
    expect.free(beta, template, middle)
    is_exclusive(beta, top)


@pytest.mark.short(when=lambda parameters: parameters["medium"] == "on the image")
def test_a_copy_of_a_whole_chain_frees_it_at_the_pivot(medium, alpha, beta, images, template, clone):
    one, copy = clone("one", template), images / "copy.img"
    alpha.boot(one)
    alpha.ok("blockcopy", one.name, "vda", copy, "--format", "raw", "--transient-job", "--wait")
    is_read(beta, template)
    is_exclusive(beta, copy, top_of(one))
    alpha.ok("blockjob", one.name, "vda", "--pivot")
    is_exclusive(beta, copy)
    expect.free(beta, top_of(one))
    goes_through(alpha, one, resumes)
    expect.free(beta, template)


def test_a_shallow_copy_keeps_the_template(alpha, beta, images, template, clone, overlay):
    one, copy = clone("one", template), overlay("copy.qcow2", template)
    alpha.boot(one)
    alpha.ok("blockcopy", one.name, "vda", copy, "--format", "qcow2", "--shallow", "--reuse-external",
             "--transient-job", "--wait")
    alpha.ok("blockjob", one.name, "vda", "--pivot")
    is_exclusive(beta, copy)
    expect.free(beta, top_of(one))
    goes_through(alpha, one, resumes)
    is_read(beta, template)


def test_snapshots_of_a_linked_clone_pile_up_and_go(alpha, beta, template, clone, snapshot):
    one = clone("one", template)
    alpha.boot(one)
    first = top_of(one)
    second, third = snapshot(alpha, one, "second"), snapshot(alpha, one, "third")
    is_read(beta, template, first, second)
    is_exclusive(beta, third)
    assert (result := commit(alpha, one, "--active", "--pivot", "--base", first)), result
    is_read(beta, template)
    is_exclusive(beta, first)
    expect.free(beta, second, third)
    alpha.destroy(one)
    expect.free(beta, template, first)


# --- migration

@pytest.mark.both_emulators
def test_a_clone_migrates_there_and_back_with_its_template(alpha, beta, gamma, template, clone, emulator):
    one = clone("one", template, emulator=emulator)
    alpha.boot(one)
    for source, target in [(alpha, beta), (beta, alpha)]:
        assert (result := source.migrate_to(target, one, "--live")), result
        expect.runs(target, one)
        is_read(gamma, template)
        expect.taken(target, template, by=(one, target))
        expect.taken(source, top_of(one), by=(one, target))
    alpha.destroy(one)
    expect.free(gamma, template)


@pytest.mark.parametrize("step", [prepared, performed, finished], ids=lambda step: step.__name__)
def test_nobody_gets_the_template_of_a_clone_at_any_step_of_its_migration(alpha, beta, gamma, template, clone, step):
    one = clone("one", template)
    alpha.boot(one)
    with step(alpha, beta, one) as (migration, go_on):
        is_read(gamma, template)
        expect.taken(gamma, top_of(one))
        go_on()
        _, error = migration.communicate(timeout=hosts.PATIENCE)
    assert migration.returncode == 0, error
    is_read(gamma, template)
    beta.destroy(one)
    expect.free(gamma, template)


@pytest.mark.short(when=lambda parameters: parameters["medium"] == "on the image")
def test_a_clone_migrates_beside_others_of_its_template(medium, alpha, beta, template, clone):
    one, other = clone("one", template), clone("other", template)
    alpha.boot(one)
    beta.boot(other)
    for source, target in [(alpha, beta), (beta, alpha)]:
        assert (result := source.migrate_to(target, one, "--live")), result
        is_read(source, template)
        expect.runs(target, one)
    expect.runs(beta, other)


def test_a_suspended_clone_that_migrated_has_its_template_again_when_it_runs(alpha, beta, gamma, template, owner,
                                                                             snapshot):
    """Not before: between the start of the destination's QEMU and the first resume there libvirt calls nothing."""
    alpha.boot(owner)
    alpha.suspend(owner)
    top = snapshot(alpha, owner, "top")
    is_read(gamma, template)
    assert (result := alpha.migrate_to(beta, owner, "--live")), result
    expect.taken(gamma, top)
    beta.resume(owner)
    is_read(gamma, template)
    expect.taken(gamma, top)
    assert (result := commit(beta, owner, "--active", "--pivot")), result
    is_exclusive(gamma, template)
    expect.free(gamma, top)


def test_a_suspended_clone_that_migrated_does_not_run_beside_a_writer_of_its_template(alpha, beta, gamma, lab,
                                                                                      template, clone, guest):
    one, writer = clone("one", template), guest(template, emulator=lab.emulator_without_locks)
    alpha.boot(one)
    alpha.suspend(one)
    assert (result := alpha.migrate_to(beta, one, "--live")), result
    gamma.start_guest(writer)
    expect.names_holder(beta.refused("resume", one.name), template, writer, gamma)
    assert beta.state(one) == "paused"
    gamma.destroy(writer)
    beta.resume(one)
    is_read(gamma, template)


# --- a libvirtd that dies in the middle

JOBS = {
    "a snapshot": ("snapshot-create-as {guest} s --disk-only --no-metadata --diskspec vda,file={new}", 1),
    "an active commit": ("blockcommit {guest} vda --active --pivot --wait", 2),
    "an inactive commit": ("blockcommit {guest} vda --base {base} --top {middle} --wait", 2),
    "a pull": ("blockpull {guest} vda --wait", 2),
    "attaching a clone": ("attach-disk {guest} {extra} sda --subdriver qcow2", 1),
    "detaching a clone": ("detach-disk {guest} sda", 1),
}


@pytest.mark.short(when=lambda parameters: "commit" in parameters["job"] or "snapshot" in parameters["job"])
@pytest.mark.parametrize("job", JOBS)
def test_a_libvirtd_killed_in_the_middle_leaves_leases_of_what_qemu_has_open(alpha, beta, lab, image, images, guest,
                                                                             overlay, snapshot, job):
    command, depth = JOBS[job]
    for number, milliseconds in enumerate((4, 9, 15, 25)):
        alpha.revive()  # that of libvirt 9.0 may crash when a QEMU dies whose commit it has half forgotten
        base = image(f"base{number}.img")
        owner = guest(base, emulator=lab.emulator_without_locks, scsi_controllers=1)
        alpha.start_guest(owner)
        chain = [base, *(snapshot(alpha, owner, f"{number}-{level}") for level in range(depth))]
        extra, new = overlay(f"extra{number}.qcow2", base), images / f"new{number}.qcow2"
        if job == "detaching a clone":
            alpha.ok("attach-disk", owner.name, extra, "sda", "--subdriver", "qcow2")
        with alpha.connected_virsh() as virsh:
            virsh.stdin.write(command.format(guest=owner.name, base=base, middle=chain[1], extra=extra, new=new) + "\n")
            virsh.stdin.flush()
            time.sleep(milliseconds / 1000)
            alpha.kill_libvirtd()
        alpha.start_libvirtd()
        if alpha.state(owner) == "shut off":
            continue  # QEMU 5.2 and a libvirtd that was killed: test_disks.py, given_up()
        alpha.hmp(owner, "info block")  # which waits until libvirtd has found out what is there
        files = [path for path in (*chain, extra, new) if path.exists()]
        is_leased_as_opened(alpha, owner, beta, *files)
        alpha.kill_qemu(owner)
        expect.free(beta, *files)

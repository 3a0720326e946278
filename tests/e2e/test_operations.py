# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""What README.md and OPERATIONS.md tell people to type, typed, and what README.md says that virsh prints, printed."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess

import expect
import hosts
import pytest
from documents import documented
from test_command import inspect

COMMAND = hosts.command()
SANLOCK = pathlib.Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "libvirt" / "lock-driver" / "sanlock.so"
LOCKD = SANLOCK.with_name("lockd.so")

pytestmark = [pytest.mark.skipif(not COMMAND.exists(), reason=f"{COMMAND} was not built"),
              pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")]


def words_on(host, command, **places):
    words = documented(command, **places)
    if words[0] == "leasehold":
        words[0] = COMMAND
    if words[1] in ("enable", "check"):
        words += ["--plugin", host.lab.plugin_dir / "leasehold.so"]
    return words


def typed(host, command, **places):
    """A printed command, typed on that host."""
    words = words_on(host, command, **places)
    return host.virsh(*words[1:]) if words[0] == "virsh" else host.inside(*words)


def restart(host):
    """systemctl restart libvirtd, where there is no systemd: the manager may be another one by now."""
    host.kill_libvirtd()
    named = re.search('^lock_manager = "(.*)"', (host.dir / "etc" / "qemu.conf").read_text(), re.MULTILINE)
    host.manager = named[1] if named else "none"
    host.start_libvirtd()


def test_what_the_readme_shows_is_what_virsh_prints(alpha, beta, image):
    disk = image("db.img")
    db, copy = hosts.Guest("db", [hosts.Disk(disk, "vda")]), hosts.Guest("copy-of-db", [hosts.Disk(disk, "vda")])
    alpha.start_guest(db)
    beta.define(copy)
    printed = typed(beta, "virsh start copy-of-db").err
    assert db.uuid in printed and f"pid {alpha.pid_here(db)} " in printed
    shown = re.search(r"^    beta\$ virsh start.*\n((?:    .*\n)*)", (hosts.ROOT / "README.md").read_text(), re.MULTILINE)[1]

    def of_any_run(text):
        text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text.replace(str(disk.parent), "/shared"))
        return re.sub(r"pid \d+", "PID", re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "TIME", text)).split()
    assert of_any_run(shown) == of_any_run(printed)


# --- bringing it in

def moves_in_and_the_old_host_follows(old, new, disk, mover, manager):
    """OPERATIONS.md, "Rolling out": a guest of that lock manager moves to a host of leasehold; then its host gets it, too."""
    assert f'lock_manager = "{manager}"' in typed(old, "grep lock_manager /etc/libvirt/qemu.conf").out
    refused = typed(old, "leasehold enable")
    assert refused.rc == 75 and mover.name in refused.err, refused
    without = typed(old, "leasehold status")
    assert without.rc == 3 and f"guest '{mover.name}'" in without.err, without
    assert re.search(f"^{mover.name}\t.*\tnone$", without.out, re.MULTILINE), without
    refused = old.migrate_to(new, mover, "--live")
    assert not refused and 'qemu_locks = "warn"' in refused.err, refused
    with new.configured(plugin_conf='qemu_locks = "warn"\n'):
        assert (result := old.migrate_to(new, mover, "--live")), result
    expect.taken(new, disk, by=(mover, new))
    assert typed(new, "leasehold status").rc == 0
    enabled = typed(old, "leasehold enable")
    assert enabled and f'- lock_manager = "{manager}"' in enabled.out and '+ lock_manager = "leasehold"' in enabled.out, enabled
    restart(old)
    assert (result := new.migrate_to(old, mover, "--live")), result
    expect.taken(new, disk, by=(mover, old))


@pytest.mark.skipif(not LOCKD.exists(), reason="libvirt's driver of virtlockd (Debian 13: libvirt-daemon-plugin-lockd) "
                                               "is not installed")
def test_guests_of_virtlockd_move_in(alpha, beta, image, guest):
    disk = image()
    mover, stranger = guest(disk), guest(disk)
    with alpha.configured(lock_manager="lockd"):
        alpha.boot(mover)
        beta.define(stranger)
        refused = beta.refused("start", stranger.name)
        assert "in use outside leasehold by" in refused and "as virtlockd does for each guest" in refused, refused
        moves_in_and_the_old_host_follows(alpha, beta, disk, mover, "lockd")
        alpha.clean()


@contextlib.contextmanager
def sanlock_on(host):
    """The daemon of sanlock, without the watchdog that would reset this machine; and what libvirt has to know. It raises a
    limit that it does not need here and that not every machine lets be raised."""
    folder = host.lab.dir / "sanlock"
    folder.mkdir()
    shim = folder / "limit.so"
    (folder / "limit.c").write_text("".join(
        f"int {name}(int which, const void *limit) {{ (void)which; (void)limit; return 0; }}\n"
        for name in ("setrlimit", "setrlimit64")))
    hosts.ok("cc", "-shared", "-fPIC", "-o", shim, folder / "limit.c")
    (host.dir / "etc" / "qemu-sanlock.conf").write_text(
        f'auto_disk_leases = 1\ndisk_lease_dir = "{folder}"\nhost_id = 1\nio_timeout = 1\nuser = "root"\ngroup = "root"\n')
    environment = {"SANLOCK_RUN_DIR": str(folder)}
    daemon = host.spawn("sanlock", "daemon", "-D", "-w", "0", "-h", "0", "-l", "0", "-U", "root", "-G", "root",
                        "-e", host.name, env={**environment, "LD_PRELOAD": str(shim)}, log="sanlock.log")
    try:
        hosts.wait_until((folder / "sanlock.sock").exists, "sanlock answers")
        os.environ.update(environment)  # libvirtd's, from its next start on
        yield
    finally:
        os.environ.pop("SANLOCK_RUN_DIR", None)
        with contextlib.suppress(ProcessLookupError, ValueError):
            hosts.kill_and_wait(hosts.only_child(daemon.pid))
        daemon.wait(timeout=hosts.PATIENCE)
        shutil.rmtree(folder)


@pytest.mark.skipif(not shutil.which("sanlock") or not SANLOCK.exists(),
                    reason="libvirt's driver of sanlock (Debian: libvirt-sanlock) is not installed")
def test_guests_of_sanlock_move_in(alpha, beta, image, guest):
    with sanlock_on(alpha):
        disk = image()
        mover = guest(disk)
        with alpha.configured(lock_manager="sanlock"):
            alpha.boot(mover)
            moves_in_and_the_old_host_follows(alpha, beta, disk, mover, "sanlock")
            alpha.clean()


# --- every day

def test_a_backup_is_read_below_an_overlay_while_the_guest_runs(alpha, image, images, guest):
    disk, copy = image("disk.qcow2", format="qcow2"), images / "copy.qcow2"
    runs = guest(hosts.Disk(disk, "vda", format="qcow2"))

    def names():
        # For a moment a lease has no record of its guest yet, and none is null.
        return sorted(str(lease["guest"]) for lease in inspect(alpha, disk)["leases"])
    read = ("leasehold run --read-only disk.qcow2 -- qemu-img convert -O qcow2 disk.qcow2 /backup/disk.qcow2",
            dict(disk_qcow2=disk, _backup_disk_qcow2=copy))
    alpha.start_guest(runs)
    refused = typed(alpha, read[0], **read[1])
    assert refused.rc == 75 and "virsh backup-begin" in refused.err, refused
    assert typed(alpha, "virsh snapshot-create-as GUEST backup --disk-only --no-metadata", GUEST=runs.name)
    words = words_on(alpha, read[0], **read[1])
    blocker = alpha.spawn(*words[:words.index("--") + 1], "sleep", "60", log="run.log")
    try:
        hosts.wait_until(lambda: names() == sorted(["leasehold run sleep", runs.name]), "the command reads beside the guest")
        merged = typed(alpha, "virsh blockcommit GUEST vda --active --pivot", GUEST=runs.name)
        assert not merged and "leasehold run sleep" in merged.err, merged
    finally:
        hosts.kill_and_wait(hosts.only_child(blocker.pid))
        blocker.wait()
    assert (result := typed(alpha, read[0], **read[1])), result
    hosts.wait_until(lambda: names() == [runs.name], "only the guest has its lease")
    assert (result := typed(alpha, "virsh blockcommit GUEST vda --active --pivot", GUEST=runs.name)), result
    [lease] = inspect(alpha, disk)["leases"]
    assert lease["mode"] == "exclusive" and hosts.ok("qemu-img", "compare", "-U", disk, copy), lease


def test_who_asks_nobody_is_not_stopped(alpha, image, images, guest):
    """README.md, "What it does not protect"."""
    disk, copy = image("disk.qcow2", format="qcow2"), images / "copy.qcow2"
    runs = guest(hosts.Disk(disk, "vda", format="qcow2"))
    alpha.start_guest(runs)
    assert "format: qcow2" in typed(alpha, "qemu-img info -U disk.qcow2", disk_qcow2=disk).out
    assert not alpha.inside("qemu-img", "convert", disk, copy) and alpha.inside("qemu-img", "convert", "-U", disk, copy)
    first = disk.read_bytes()[:512]
    written = alpha.inside(*documented("dd"), f"if={disk}", f"of={disk}", "bs=512", "count=1", "conv=notrunc")
    assert written and disk.read_bytes()[:512] == first, written
    expect.leased(disk)


def test_what_no_guest_uses_is_committed_under_a_lease(alpha, image, images, guest):
    """What OPERATIONS.md says to do on NFSv3, and README.md instead of shareBacking."""
    base, overlay = image("base.qcow2", format="qcow2"), images / "overlay.qcow2"
    made = alpha.inside(*documented("qemu-img create -b"), base, "-F", "qcow2", "-f", "qcow2", overlay)
    assert made, made
    commit = [COMMAND, "run", base, overlay, "--", *documented("qemu-img commit"), overlay]
    reader = guest(hosts.Disk(base, "vda", "readonly", format="qcow2"))
    alpha.start_guest(reader)
    refused = alpha.inside(*commit)
    assert refused.rc == 75 and reader.name in refused.err, refused
    alpha.destroy(reader)
    assert (result := alpha.inside(*commit)), result


def test_a_guest_makes_its_own_backup(alpha, image, guest):
    disk = image("disk.qcow2", format="qcow2")
    runs = guest(hosts.Disk(disk, "vda", format="qcow2"))
    alpha.start_guest(runs)
    result = typed(alpha, "virsh backup-begin GUEST", GUEST=runs.name)
    if hosts.libvirt_version() <= (7, 0) and "not supported" in result.err:
        expect.leased(disk)
        pytest.skip("libvirt 7.0 makes no backups")
    assert result, result
    hosts.wait_until(lambda: "Completed" in alpha.ok("domjobinfo", runs.name, "--completed", "--keep-completed"), "it is made")
    [copy] = disk.parent.glob("disk.qcow2.*")
    assert hosts.ok("qemu-img", "compare", "-U", disk, copy)
    expect.leased(disk)


def test_what_a_host_is_asked_every_day_it_answers(alpha, image, guest):
    disk = image()
    runs = guest(disk)
    alpha.start_guest(runs)
    for command in ("leasehold inspect IMAGE", "leasehold inspect X", "leasehold inspect /shared/db.img"):
        result = typed(alpha, command, **{re.sub(r"\W", "_", command.split()[-1]): disk})
        assert result and f"guest '{runs.name}'" in result.out and "host 'alpha'" in result.out, result
    assert "on the image" in typed(alpha, "leasehold classify IMAGE", IMAGE=disk).out
    assert f"{runs.name}\t" in typed(alpha, "leasehold status").out
    assert (result := typed(alpha, "leasehold watch --once --dry-run")), result
    assert typed(alpha, "leasehold check").rc in (0, 3), typed(alpha, "leasehold check")
    assert typed(alpha, "uname -n").out == "alpha\n"
    alpha.suspend(runs)
    assert f":{disk.stat().st_ino} {hosts.MARKS}" in typed(alpha, "grep OFDLCK /proc/locks").out
    assert typed(alpha, "virsh destroy GUEST", GUEST=runs.name)
    assert "leases" in typed(alpha, "leasehold inspect IMAGE", IMAGE=disk).out
    expect.free(alpha, disk)


def test_what_libguestfs_starts_looks_beside_a_running_guest_and_is_kept_from_it(alpha, beta, image, images, guest):
    """Its appliance needs a kernel; QEMU and the domain that it would start with --ro do not. (lib/launch-direct.c and
    lib/launch-libvirt.c of libguestfs 1.48: an overlay on the image, in the first one without QEMU's locks on the image.)"""
    disk, overlay = image(), images / "overlay"
    runs = guest(disk)
    alpha.start_guest(runs)
    hosts.ok("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
    direct = subprocess.run(
        [hosts.QEMU, "-nodefaults", "-display", "none", "-S", "-accel", "tcg", "-monitor", "stdio", "-device", "virtio-scsi-pci",
         "-drive", f"file.file.filename={overlay},file.driver=qcow2,file.backing.file.locking=off,cache=unsafe,id=hd0,if=none",
         "-device", "scsi-hd,drive=hd0"], input="info block\nquit\n", capture_output=True, text=True, timeout=hosts.PATIENCE)
    assert direct.returncode == 0 and str(overlay) in direct.stdout, direct
    expect.taken(beta, disk, by=(runs, alpha))
    domain = guest(hosts.Disk(overlay, "vda", format="qcow2"))
    alpha.define(domain)
    refused = alpha.refused("start", domain.name)
    # libvirt names only the overlay: QEMU meets the writer before leasehold can see what it reads.
    assert str(disk) in refused and ('Failed to get shared "write" lock' in refused or f"'{runs.name}'" in refused), refused


# --- leaving

def test_a_host_goes_without_leasehold_again(alpha, image, guest):
    last, later = guest(image("last.img")), guest(image("later.img"))
    with alpha.configured():
        alpha.start_guest(last)
        assert typed(alpha, "leasehold disable").rc == 75
        alpha.destroy(last)
        assert (result := typed(alpha, "leasehold disable")), result
        restart(alpha)
        alpha.start_guest(later)
        expect.not_leased(later.disks[0].path)
        alpha.clean()


def test_guests_keep_their_leases_when_leasehold_is_turned_off_in_an_emergency(alpha, beta, image, guest):
    disk = image()
    mover = guest(disk)
    with alpha.configured():
        alpha.boot(mover)
        assert (result := typed(alpha, "leasehold disable --force")), result
        restart(alpha)
        alpha.suspend(mover)
        alpha.resume(mover)
        expect.taken(beta, disk, by=(mover, alpha))
        refused = alpha.migrate_to(beta, mover, "--live")
        assert not refused and "already runs elsewhere" in refused.err, refused
        alpha.destroy(mover)
        expect.free(beta, disk)
        alpha.clean()

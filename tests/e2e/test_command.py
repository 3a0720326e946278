# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The leasehold command on hosts that run guests."""

import json
import os
import pathlib
import shutil

import hosts
import pytest

COMMAND = hosts.command()

pytestmark = [pytest.mark.skipif(not COMMAND.exists(), reason=f"{COMMAND} was not built"),
              pytest.mark.skipif(hosts.lock_manager() != "leasehold", reason="about leasehold's leases")]


def ask(host, *words):
    """What the command says on this host, as JSON. It finds the host's own configuration and libvirtd."""
    result = host.inside(COMMAND, words[0], "--json", "--config", "/etc/libvirt/qemu-leasehold.conf", *words[1:])
    return result, json.loads(result.out) if result.out else None


def status_of(host, guest):
    result = host.inside(COMMAND, "status", "--json", guest.name)
    assert result, str(result)
    [found] = json.loads(result.out)["guests"]
    return found


def inspect(host, image):
    result, answer = ask(host, "inspect", image)
    assert result, str(result)
    return answer["images"][0]


@pytest.fixture(scope="module", params=["on the image", "lease files", "flock"])
def anywhere(request, lab):
    lockspace = lab.dir / "status-lockspace"
    lockspace.mkdir(mode=0o700, exist_ok=True)
    text = {"on the image": "", "lease files": f'file_lockspace_dir = "{lockspace}"\n',
            "flock": f'storage_locks = [ "{lab.dir}=flock" ]\n'}[request.param]
    with lab.host("alpha").configured(plugin_conf=text), lab.host("beta").configured(plugin_conf=text):
        yield request.param


def test_status_follows_a_guest_through_its_life(anywhere, alpha, beta, lab, image, guest):
    disk = image()
    mover = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(mover)
    found = status_of(alpha, mover)
    [lease] = found["leases"]
    assert lease["path"] == str(disk) and lease["state"] == "held" and lease["mode"] == "exclusive", found
    alpha.suspend(mover)
    assert status_of(alpha, mover)["leases"][0]["state"] == "suspended"
    alpha.resume(mover)
    assert (result := alpha.migrate_to(beta, mover, "--live")), result
    assert status_of(beta, mover)["leases"][0]["state"] == "held"
    assert not alpha.inside(COMMAND, "status", mover.name)


def test_inspect_names_the_guest_of_another_host(anywhere, alpha, beta, lab, image, guest):
    disk = image()
    holder = guest(disk, emulator=lab.emulator_without_locks)
    assert inspect(beta, disk)["leases"] == []
    alpha.boot(holder)
    for host in (alpha, beta):
        [lease] = inspect(host, disk)["leases"]
        assert (lease["guest"], lease["uuid"], lease["host"]) == (holder.name, holder.uuid, "alpha"), lease
        assert lease["pid"] == alpha.pid_here(holder), lease
    alpha.kill_qemu(holder)
    assert inspect(beta, disk)["leases"] == []


def test_status_and_inspect_tell_a_backing_file_from_a_disk(anywhere, alpha, image, guest):
    base = image("base.img")
    clone = guest(hosts.Disk(image("clone.qcow2", format="qcow2", backing=base), "vda", format="qcow2"))
    alpha.boot(clone)
    found = status_of(alpha, clone)
    assert {lease["path"]: (lease["mode"], lease["backing"]) for lease in found["leases"]} == {
        str(base): ("read-only", True), str(clone.disks[0].path): ("exclusive", False)}, found
    assert found["unleased"] == [], found
    [lease] = inspect(alpha, base)["leases"]
    assert lease["guest"] == clone.name and lease["backing"], lease
    assert "read-only, as a backing file" in alpha.inside(COMMAND, "status", clone.name).out


def test_status_names_a_backing_file_without_a_lease(alpha, image, guest):
    base = image("base.img")
    clone = guest(hosts.Disk(image("clone.qcow2", format="qcow2", backing=base), "vda", format="qcow2"))
    with alpha.configured(plugin_conf="lease_backing_files = 0\n"):
        alpha.boot(clone)
        found = status_of(alpha, clone)
        assert [lease["backing"] for lease in found["leases"]] == [False] and found["unleased"] == [str(base)], found
        assert f"{base}\tbacking file\tno lease" in alpha.inside(COMMAND, "status", clone.name).out
        assert inspect(alpha, base)["leases"] == []


def test_run_is_kept_from_a_guest_s_image_and_keeps_guests_from_its_own(anywhere, alpha, lab, image, guest):
    disk, other = image(), image("other.img")
    holder = guest(disk, emulator=lab.emulator_without_locks)
    alpha.boot(holder)
    conf = ("--config", "/etc/libvirt/qemu-leasehold.conf")
    refused = alpha.inside(COMMAND, "run", *conf, disk, "--", "true")
    assert refused.rc == 75 and holder.name in refused.err, str(refused)
    assert alpha.inside(COMMAND, "run", *conf, other, "--", "true")
    blocker = alpha.spawn(COMMAND, "run", *conf, other, "--", "sleep", "60", log="run.log")
    try:
        hosts.wait_until(lambda: inspect(alpha, other)["leases"], "the command has its lease")
        wanted = guest(other)
        alpha.define(wanted)
        assert "leasehold run sleep" in alpha.refused("start", wanted.name)
    finally:
        os.kill(hosts.only_child(blocker.pid), 9)
        blocker.wait()
    alpha.ok("start", wanted.name)


def test_check_looks_at_the_guests_of_a_real_libvirtd(alpha, image, guest):
    alpha.start_guest(guest(image()))
    result = alpha.inside(COMMAND, "check", "--json", "--config", "/etc/libvirt/qemu-leasehold.conf", "--qemu-conf",
                          "/etc/libvirt/qemu.conf", "--plugin", pathlib.Path(alpha.plugin_dir) / "leasehold.so")
    findings = json.loads(result.out)["findings"]
    worst = [finding for finding in findings if finding["level"] == "problem"]
    assert not worst and result.rc in (0, 3), str(result)


@pytest.fixture
def switch(alpha):
    """switch("enable"): the command changes the host's own qemu.conf."""
    def call(verb, *words):
        more = ["--plugin", pathlib.Path(alpha.plugin_dir) / "leasehold.so", "--config",
                "/etc/libvirt/qemu-leasehold.conf"] if verb == "enable" else []
        return alpha.inside(COMMAND, verb, "--qemu-conf", "/etc/libvirt/qemu.conf", *more, *words)
    return call


def test_enable_waits_for_guests_without_leases_and_disable_for_those_with(alpha, image, guest, switch):
    conf = alpha.dir / "etc" / "qemu.conf"
    old, new = guest(image("old.img")), guest(image("new.img"))
    with alpha.configured(lock_manager="none"):
        before = conf.read_text()
        alpha.start_guest(old)
        refused = switch("enable")
        assert refused.rc == 75 and f"1 guest ('{old.name}')" in refused.err and "--force" in refused.err, str(refused)
        assert conf.read_text() == before
        alpha.kill_qemu(old)
        alpha.wait_state(old, "shut off")
        done = switch("enable")
        assert done and "systemctl restart libvirtd" in done.out, str(done)
        alpha.kill_libvirtd()
        alpha.manager = "leasehold"  # where its plugin is
        alpha.start_libvirtd()
        alpha.start_guest(new)
        assert hosts.marks_on(new.disks[0].path)
        refused = switch("disable")
        assert refused.rc == 75 and f"1 guest ('{new.name}')" in refused.err, str(refused)
        assert switch("disable", "--force")
        assert conf.read_text() == before
        alpha.kill_libvirtd()
        alpha.start_libvirtd()
        assert hosts.marks_on(new.disks[0].path), "it keeps its lease until it ends"
        alpha.destroy(new)


def test_check_and_enable_say_whether_libvirtd_has_loaded_the_plugin(alpha, switch, tmp_path):
    """A libvirtd that was not restarted goes on as before, whatever its configuration says."""
    def daemon():
        found = alpha.inside(COMMAND, "check", "--json", "--qemu-conf", "/etc/libvirt/qemu.conf").out
        [finding] = [each for each in json.loads(found)["findings"] if each["about"] == "daemon"]
        return finding
    assert daemon()["level"] == "ok" and "has loaded leasehold" in daemon()["text"]
    folder = tmp_path / "plugins"
    shutil.copytree(alpha.plugin_dir, folder)
    with alpha.configured(plugin_dir=folder):
        # As package managers do it.
        shutil.copy(folder / "leasehold.so", folder / "new")
        (folder / "new").rename(folder / "leasehold.so")
        assert daemon()["level"] == "warning" and "systemctl restart libvirtd" in daemon()["remedy"], daemon()
        assert "has not loaded this version of it" in switch("enable").out
    with alpha.configured(lock_manager="none"):
        assert switch("enable")
        assert daemon()["level"] == "problem" and "systemctl restart libvirtd" in daemon()["remedy"], daemon()
        again = switch("enable")
        assert again and "already" in again.out and "systemctl restart libvirtd" in again.out, str(again)


def test_of_two_lock_managers_in_qemu_conf_libvirt_takes_the_first(alpha, image, guest):
    """What check says and enable leaves relies on it."""
    protected = guest(image())
    with alpha.configured(qemu_conf='lock_manager = "nop"\n'):
        assert (alpha.dir / "etc" / "qemu.conf").read_text().count("lock_manager") == 2
        alpha.start_guest(protected)
        assert hosts.marks_on(protected.disks[0].path)
        found = alpha.inside(COMMAND, "check", "--json", "--qemu-conf", "/etc/libvirt/qemu.conf").out
        [finding] = [each for each in json.loads(found)["findings"] if each["about"] == "lock_manager"]
        assert finding["level"] == "ok", finding

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The Debian package as its users meet it: on a machine without libvirt it is installed, enabled, upgraded under a
running guest, downgraded, and removed. The tests are that story, in this order, on one machine; each asserts what
stands when it begins through the fixture it asks for."""

import re
import shutil

import hosts
import pytest
from conftest import CONF, NODE, machine_with, only
from documents import documented

PLUGIN = "/usr/lib/x86_64-linux-gnu/libvirt/lock-driver/leasehold.so"
LINE = 'lock_manager = "leasehold"'

# No systemd runs on this machine: no cgroups, no virtlogd that could be activated.
WITHOUT_SYSTEMD = 'cgroup_controllers = []\nstdio_handler = "file"\n'


class Node:
    """A machine with the package, its libvirtd, and two guests that want one image."""

    def __init__(self, machine, deb, newer):
        self.machine, self.deb, self.newer = machine, deb, newer
        self.image = machine.shared / "disk.img"
        self.image.write_bytes(b"\0" * (1 << 20))
        self.image.chmod(0o666)
        machine.shared.chmod(0o755)
        self.guests = [hosts.Guest(name, [hosts.Disk(self.image, "vda")]) for name in ("first", "second")]
        self.installation = machine.apt(
            *documented("apt install ./build-packages/leasehold_*.deb", __build_packages_leasehold___deb=deb)[1:], *NODE)
        assert self.installation, str(self.installation)

    def virsh(self, *words):
        return self.machine.run("virsh", "-q", "-c", "qemu:///system", *words)

    def restart_libvirtd(self):
        pid = self.machine.path("/run/libvirtd.pid")
        if pid.exists():
            self.machine.ok("sh", "-c", f"kill {pid.read_text().strip()}; while pidof libvirtd; do sleep 0.1; done")
        self.machine.ok("libvirtd", "--daemon", "--pid-file", "/run/libvirtd.pid")
        hosts.wait_until(lambda: self.virsh("list"), "libvirtd answers")

    def enable(self):
        conf = self.machine.path("/etc/libvirt/qemu.conf")
        conf.write_text(conf.read_text() + WITHOUT_SYSTEMD)
        assert "+ " + LINE in self.machine.ok("leasehold", "enable")
        self.restart_libvirtd()
        for guest in self.guests:
            xml = self.machine.shared / f"{guest.name}.xml"
            xml.write_text(guest.xml())
            assert self.virsh("define", xml)
        started = self.virsh("start", "first")
        assert started, str(started)

    def guest_is_protected(self):
        """The first guest runs, and the second is refused and told why."""
        assert self.virsh("domstate", "first").out.strip() == "running"
        assert hosts.marks_on(self.image)
        refusal = self.virsh("start", "second")
        assert not refusal
        assert f"image '{self.image}' is in use by guest 'first'" in refusal.err

    def version(self):
        return self.machine.ok("dpkg-query", "-W", "-f", "${Version}", "leasehold")

    def qemu(self):
        return self.machine.path("/run/libvirt/qemu/first.pid").read_text()


@pytest.fixture(scope="module")
def node(deb, newer, tmp_path_factory):
    shared = tmp_path_factory.mktemp("node")
    for package in (deb, newer):
        (shared / package.name).write_bytes(package.read_bytes())
    with machine_with(shared) as machine:
        yield Node(machine, shared / deb.name, shared / newer.name)


def said_by_leasehold(result):
    """What the package's own scripts printed, in apt's output."""
    text = re.search(r"^Setting up leasehold .*\n((?:(?!Setting up |Processing ).*\n?)*)", result.out, re.MULTILINE)
    assert text, str(result)
    return text[1].strip().splitlines()


def test_installing_it_enables_nothing_and_says_how(node):
    assert node.machine.path(PLUGIN).exists()
    assert said_by_leasehold(node.installation)[-1] == LINE
    assert any("leasehold enable" in line for line in said_by_leasehold(node.installation))
    assert not list(node.machine.path("/etc/systemd/system").rglob("leasehold-watch.service"))
    assert not re.search("^lock_manager", node.machine.path("/etc/libvirt/qemu.conf").read_text(), re.MULTILINE)
    assert "leasehold" not in node.machine.services_asked_for()


def test_the_distribution_s_own_test_passes(node, builds):
    """debian/tests, out of the source package, by Debian's runner."""
    source = node.machine.shared / "source"
    source.mkdir()
    for path in builds["deb"][0].values():
        shutil.copy(path, source)
    changes = source / only(builds["deb"][0], "leasehold_", ".changes").name
    said = node.machine.run("autopkgtest", changes, "--", "null")
    assert said, str(said)
    assert re.search(r"^guest +PASS$", said.out, re.MULTILINE), str(said)
    assert "is in use by guest 'leasehold-first'" in said.out + said.err


def test_enabled_it_protects_a_guest(node):
    node.enable()
    node.guest_is_protected()


def test_the_watcher_watches_it(node):
    """The service's command; tests/node runs the service itself."""
    unit = node.machine.path("/lib/systemd/system/leasehold-watch.service").read_text()
    assert "ExecStart=/usr/sbin/leasehold watch\n" in unit
    result = node.machine.run("/usr/sbin/leasehold", "watch", "--once")
    assert result and result.out == "1 guest, 1 lease, 0 lost\n", str(result)
    assert node.machine.path("/usr/lib/tmpfiles.d/leasehold.conf").exists()


def test_an_upgrade_under_a_running_guest_keeps_its_lease_and_the_configuration(node):
    conf = node.machine.path(CONF)
    conf.write_text(conf.read_text() + "handoff_wait = 7\n")
    before, services = node.qemu(), node.machine.services_asked_for()
    upgraded = node.machine.apt("install", node.newer)
    assert upgraded, str(upgraded)
    assert node.version() == "99-1"
    assert "restart libvirtd" in said_by_leasehold(upgraded)[-1]
    assert conf.read_text().endswith("handoff_wait = 7\n")
    assert node.machine.services_asked_for() == services
    node.guest_is_protected()
    node.restart_libvirtd()
    node.guest_is_protected()
    assert node.virsh("suspend", "first") and node.virsh("resume", "first")
    assert node.qemu() == before


def test_a_downgrade_under_a_running_guest_keeps_its_lease(node):
    before = node.qemu()
    downgraded = node.machine.apt("install", "--allow-downgrades", node.deb)
    assert downgraded, str(downgraded)
    node.restart_libvirtd()
    node.guest_is_protected()
    assert node.qemu() == before


@pytest.mark.parametrize("verb", ["remove", "purge"])
def test_it_does_not_go_while_it_is_the_lock_manager(node, verb):
    refused = node.machine.apt(verb, "leasehold")
    assert not refused
    assert "NOT removed: it is the lock_manager in /etc/libvirt/qemu.conf" in refused.out + refused.err  # apt mixes them
    assert node.machine.path(PLUGIN).exists()
    node.restart_libvirtd()
    node.guest_is_protected()


def test_disabled_it_goes_without_a_trace_and_running_guests_keep_their_leases(node):
    before, services = node.qemu(), node.machine.services_asked_for()
    in_the_way = node.machine.run("leasehold", "disable")
    assert in_the_way.rc == 75 and "1 guest ('first')" in in_the_way.err, str(in_the_way)
    assert "- " + LINE in node.machine.ok("leasehold", "disable", "--force")
    node.restart_libvirtd()
    purged = node.machine.apt("purge", "leasehold")
    assert purged, str(purged)
    assert not node.machine.path(PLUGIN).exists() and not node.machine.path(CONF).exists()
    assert node.machine.services_asked_for() == services
    node.restart_libvirtd()
    assert node.qemu() == before
    assert hosts.marks_on(node.image)
    # While libvirtd still finds its guests again it may say "not running" of one that it has just ended.
    ended = node.virsh("destroy", "first")
    assert node.virsh("domstate", "first").out.strip() == "shut off", str(ended)
    assert not hosts.locks_on(node.image)

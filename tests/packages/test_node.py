# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The Debian package where it is meant to be: on a whole Debian with its own kernel, systemd, and an AppArmor that
confines libvirtd and every guest (node.py). Nothing is configured but the lock manager. The tests are one story, in
this order; what ours does on a machine without all that, a removal above all, is in test_deb.py."""

import json
import shlex

import lab as labs
import node as nodes
import pytest
from conftest import CONF
from documents import documented
from node import ANOTHER, IMAGE


def denials(node):
    """What AppArmor has forbidden to anybody since the machine was started."""
    return [line for line in node.journal("-b").splitlines() if 'apparmor="DENIED"' in line]


@pytest.fixture(scope="module")
def node(deb, newer):
    try:
        with nodes.booted("apparmor", deb, newer) as node:
            yield node
    except labs.Missing as missing:
        pytest.skip(str(missing))


def test_apt_installs_it_and_restarts_nothing(node, deb):
    # By itself it ends when it has had nothing to do for two minutes, and has no pid then.
    started = node.ok("systemctl show -P ExecMainStartTimestampMonotonic libvirtd")
    installed = node.apt("install", f"/share/{deb.name}")
    assert installed, str(installed)
    assert 'lock_manager = "leasehold"' in installed.out
    assert node.ok("systemctl show -P ExecMainStartTimestampMonotonic libvirtd") == started
    assert node.run("systemctl is-enabled leasehold-watch").out == "disabled\n"
    assert node.run("systemctl is-active leasehold-watch").out == "inactive\n"


def test_a_guest_that_apparmor_confines_holds_its_lease(node):
    node.enable()
    started = node.virsh("start", "first")
    assert started, str(started)
    assert node.runs()
    uuid = node.virsh("domuuid", "first").out.strip()
    assert node.ok(f"cat /proc/{node.qemu()}/attr/current").strip() == f"libvirt-{uuid} (enforce)"
    assert node.ok(f"cat /proc/{node.daemon()}/attr/current").strip() == "libvirtd (enforce)"
    assert node.lease()


def test_another_guest_is_refused_and_told_who_has_the_image(node):
    node.second_is_refused()
    assert node.runs()
    assert "is in use by guest 'first'" in node.journal(*documented("journalctl -u libvirtd")[1:])


def test_it_is_suspended_with_its_lease_and_resumed(node):
    lease = node.lease()
    assert node.virsh("suspend", "first")
    assert node.lease()[0] == lease[0]
    assert node.virsh("resume", "first")
    assert node.lease() == lease


def test_a_hot_plugged_disk_is_leased_until_it_is_unplugged(node):
    lease = node.lease()
    plugged = node.virsh("attach-disk", "first", ANOTHER, "sda", "--targetbus", "scsi")
    assert plugged, str(plugged)
    assert len(node.marks_on(ANOTHER)) == len(lease[1])
    unplugged = node.virsh("detach-disk", "first", "sda")
    assert unplugged, str(unplugged)
    labs.wait_until(lambda: not node.marks_on(ANOTHER), "the lease of the unplugged disk is gone")
    assert node.lease() == lease


@pytest.mark.parametrize("how", ["systemctl restart libvirtd", "systemctl kill -s KILL libvirtd"])
def test_libvirtd_comes_back_to_a_guest_with_its_lease(node, how):
    lease, daemon = node.lease(), node.daemon()
    node.ok(how)
    labs.wait_until(lambda: node.daemon() not in (daemon, "0"), "systemd has started libvirtd again")
    labs.wait_until(node.runs, "libvirtd knows its guest again")
    assert node.lease() == lease
    assert node.virsh("suspend", "first") and node.virsh("resume", "first")


def test_the_watcher_with_its_few_rights_sees_the_guest(node):
    started = node.typed("systemctl enable --now leasehold-watch")
    assert started, str(started)
    node.watcher_sees("1 guest, 1 lease, 0 lost")
    assert node.journal("-u", "leasehold-watch", "-p", "warning") == ""


def test_the_watcher_writes_metrics_with_the_example_that_is_installed(node):
    """OPERATIONS.md, "Monitoring"."""
    drop_in, folder = "/etc/systemd/system/leasehold-watch.service.d", "/var/lib/prometheus/node-exporter"
    node.ok(f"mkdir -p {drop_in} {folder}")  # the latter is there with Debian's prometheus-node-exporter
    node.ok(f"cp /usr/share/doc/leasehold/examples/leasehold-watch-metrics.conf {drop_in}/")
    for command in ("systemctl daemon-reload", "systemctl restart leasehold-watch"):
        assert (result := node.typed(command)), result
    node.watcher_sees("1 guest, 1 lease, 0 lost")
    metrics = node.ok(f"cat {folder}/leasehold.prom")
    [lease] = [line for line in metrics.splitlines() if line.startswith("leasehold_lease{")]
    assert 'guest="first"' in lease and f'pid="{node.qemu()}"' in lease and IMAGE in lease, metrics
    assert node.journal("-u", "leasehold-watch", "-p", "warning") == ""


def test_the_watcher_gets_other_options_as_any_unit(node):
    """leasehold(8). The editor of this test puts a file in the place of what it is to edit."""
    node.ok("printf '[Service]\\nTimeoutStopSec=17s\\n' >/run/options")
    node.ok("printf '#!/bin/sh\\nfor last; do :; done; cp /run/options \"$last\"\\n' >/usr/local/bin/editor")
    node.ok("chmod +x /usr/local/bin/editor")
    edit = shlex.join(documented("systemctl edit leasehold-watch"))  # only on a terminal
    edited = node.run(f"SYSTEMD_EDITOR=/usr/local/bin/editor script -qec {shlex.quote(edit)} /dev/null")
    assert edited and node.ok("systemctl show -P TimeoutStopUSec leasehold-watch") == "17s\n", edited


def test_an_upgrade_under_it_restarts_nothing_and_keeps_its_lease(node, newer):
    lease, daemon = node.lease(), node.daemon()
    watcher = node.ok("systemctl show -P MainPID leasehold-watch")
    node.ok(f"echo 'handoff_wait = 7' >>{CONF}")
    upgraded = node.apt("install", f"/share/{newer.name}")
    assert upgraded, str(upgraded)
    assert node.ok("dpkg-query -W -f '${Version}' leasehold") == "99-1"
    assert node.ok(f"tail -n 1 {CONF}") == "handoff_wait = 7\n"
    assert node.daemon() == daemon
    assert node.lease() == lease
    # The watcher holds nothing that could be lost, so it is the new one at once.
    node.watcher_sees("1 guest, 1 lease, 0 lost")
    assert node.ok("systemctl show -P MainPID leasehold-watch") != watcher
    assert (result := node.typed("systemctl restart libvirtd")), result
    node.second_is_refused()
    assert node.lease() == lease
    assert node.virsh("suspend", "first") and node.virsh("resume", "first")


def test_the_command_sees_the_guest_and_finds_the_host_in_order(node):
    assert f"first\t{node.qemu()}\t{IMAGE}\texclusive\theld\t" in node.ok("leasehold status")
    assert "guest 'first'" in node.ok(f"leasehold inspect {IMAGE}")
    checked = node.run("leasehold check")
    assert checked, str(checked)


def test_destroyed_it_leaves_the_image_to_the_other_at_once(node):
    assert node.virsh("destroy", "first")
    assert not node.marks_on(IMAGE)
    started = node.virsh("start", "second")
    assert started, str(started)
    assert node.virsh("destroy", "second")


def test_the_watcher_pauses_a_guest_whose_lease_is_lost(node):
    node.ok("mkdir -m 700 /var/lib/leasehold")
    node.ok(f"""echo 'file_lockspace_dir = "/var/lib/leasehold"' >>{CONF} && systemctl restart libvirtd""")
    started = node.virsh("start", "second")
    assert started, str(started)
    node.watcher_sees("1 guest, 1 lease, 0 lost")
    node.ok("rm /var/lib/leasehold/file-*")
    labs.wait_until(lambda: node.virsh("domstate", "second").out.strip() == "paused", "the guest is paused")
    assert f"the lease on '{IMAGE}'" in node.journal(*documented("journalctl -u leasehold-watch")[1:], "-p", "crit")
    found = node.ok(shlex.join([*documented("journalctl MESSAGE_ID=227211fdaee94e16b697a64f66c6fe84"), "-o", "json"]))
    [lost] = [json.loads(line) for line in found.splitlines()]
    assert (lost["LEASEHOLD_EVENT"], lost["LEASEHOLD_GUEST"], lost["LEASEHOLD_PATH"]) == ("lost", "second", IMAGE)
    assert "second" in node.journal("LEASEHOLD_EVENT=acted", "LEASEHOLD_GUEST=second", "_SYSTEMD_UNIT=leasehold-watch.service")
    assert node.virsh("destroy", "second")
    assert node.run("systemctl is-active leasehold-watch").out == "active\n"


def test_an_nfs_server_is_restarted_and_tells_its_clients(node):
    """OPERATIONS.md, "A host died". What that does to locks is asked in the lab, whose servers have no systemd."""
    for command in ("systemctl restart nfs-server", "sm-notify -f"):
        assert (result := node.typed(command)), result
    assert node.ok("systemctl is-active nfs-server") == "active\n" and node.ok("cat /proc/fs/nfsd/threads") != "0\n"


def test_apparmor_has_forbidden_nothing(node):
    assert denials(node) == []
    # It would have been seen: libvirtd's profile forbids this to libvirtd.
    node.run("aa-exec -p libvirtd -- sh -c '/usr/sbin/apparmor_parser --version'")
    labs.wait_until(lambda: denials(node), "what AppArmor forbids is in the journal")

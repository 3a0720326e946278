# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The SELinux module as it is packaged: linked against Debian's policy, and a node (node.py) where libvirtd and its
guests live under that, enforcing. Nothing of leasehold's is in libvirt_on_debian.te."""

import json
import shlex

import hosts
import lab as labs
import node as nodes
import node_image
import pytest
from conftest import CHROOT, CONF, only
from documents import documented
from node import ANOTHER, IMAGE

LOCKSPACE = "leasehold_lockspace_t"

# The policy as a file, and what the labels are: of all that a node with leasehold has.
LINK = """set -e
cd {folder}
semodule -n -s default -i libvirt_on_debian.pp -X 200 -i leasehold.pp
cp /etc/selinux/default/policy/policy.* policy
cp /etc/selinux/default/contexts/files/file_contexts* .
{semanage}
matchpathcon -n /shared/leases/lvm >shared
"""


@pytest.fixture(scope="module")
def linked(builds, tmp_path_factory):
    """A folder with the policy."""
    try:
        labs.require("checkmodule", "semodule_package", "rpm2cpio", "cpio", "debootstrap", "apt-get")
    except labs.Missing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("policy")
    package = only(builds["rpm"][0], "leasehold-selinux-", ".rpm")
    hosts.ok("sh", "-c", 'cd "$1" && rpm2cpio "$2" | cpio -i --quiet --to-stdout "*/leasehold.pp" >leasehold.pp', "sh",
             folder, package)
    node_image.libvirt_on_debian(folder)
    on_debian(folder, LINK.format(folder=folder, semanage=shlex.join(documented(
        "semanage fcontext -a -t leasehold_lockspace_t '/shared/leases(/.*)?'"))))
    return folder


def on_debian(folder, script):
    """Runs a script on Debian without booting it."""
    return hosts.ok(CHROOT, "run", node_image.tree(), f"{folder}:{folder}", "--", "sh", "-c", script, timeout=600)


# What leasehold asks for: source, target, class, permissions.
NEEDED = [
    ("virtd_t", "svirt_t", "process", "ptrace"),
    ("svirt_t", "virtd_t", "fd", "use"),
    ("svirt_t", "virtd_t", "unix_stream_socket", "read write"),
    ("virtd_t", "svirt_image_t", "file", "getattr setattr read write open lock"),
    ("virtd_t", LOCKSPACE, "dir", "create read search lock add_name remove_name"),
    ("virtd_t", LOCKSPACE, "file", "create read write setattr lock unlink"),
    ("virtd_t", "virtd_t", "unix_stream_socket", "create setopt read write"),
]
NOT_FOR_GUESTS = ("svirt_t", LOCKSPACE, "file")

# As sesearch does, but reads the policy, which takes seconds, once for all questions. Rules of booleans are left out.
SEARCH = """
import json, sys, setools

def always(rule):
    try:
        return rule.conditional is None
    except setools.exception.RuleNotConditional:
        return True

policy = setools.SELinuxPolicy(sys.argv[1])
def permissions(source, target, kind):
    rules = setools.TERuleQuery(policy, ruletype=["allow"], source=source, target=target, tclass=[kind]).results()
    return sorted({permission for rule in rules if always(rule) for permission in rule.perms})
print(json.dumps([permissions(*question) for question in json.loads(sys.argv[2])]))
"""


@pytest.fixture(scope="module")
def allowed(linked):
    """{(source, target, class): the permissions that the policy gives}, whatever attributes the rules are written with."""
    questions = [*(needed[:3] for needed in NEEDED), NOT_FOR_GUESTS]
    answers = on_debian(linked, shlex.join(["/usr/bin/python3", "-c", SEARCH, f"{linked}/policy", json.dumps(questions)]))
    return dict(zip(questions, map(set, json.loads(answers)), strict=True))


# --- linked ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, target, kind, permissions", NEEDED)
def test_linked_with_debians_policy_it_allows_what_leasehold_does(allowed, source, target, kind, permissions):
    assert allowed[source, target, kind] >= set(permissions.split())


def test_guests_get_nothing_of_a_lockspace(allowed):
    assert allowed[NOT_FOR_GUESTS] == set()


def test_a_lockspace_elsewhere_gets_its_label_as_the_manual_says(linked):
    assert f":{LOCKSPACE}:" in (linked / "shared").read_text()


def test_lockspaces_have_their_label(linked):
    places = ("/run/leasehold", "/var/run/leasehold/device-1", "/var/lib/leasehold/files/file-1")
    said = on_debian(linked, f"cp {linked}/file_contexts* /etc/selinux/default/contexts/files; matchpathcon {' '.join(places)}")
    assert [line.split()[-1].split(":")[2] for line in said.splitlines()] == [LOCKSPACE] * len(places)


# --- enforcing ------------------------------------------------------------------------------------------------------


def denials(node):
    """What SELinux has forbidden, of the kinds that leasehold asks for."""
    kinds = ("{ ptrace }", "tclass=unix_stream_socket", LOCKSPACE, "virt_image_t", "virt_content_t")
    return [line for line in node.journal("-b").splitlines()
            if "avc:  denied" in line and "permissive=0" in line and any(kind in line for kind in kinds)]


@pytest.fixture(scope="module")
def node(deb, linked):
    try:
        with nodes.booted("selinux", deb, linked / "policy", *linked.glob("file_contexts*")) as node:
            installed = node.apt("install", f"/share/{deb.name}")
            assert installed, str(installed)
            node.ok("setenforce 1")
            node.enable()
            yield node
    except labs.Missing as missing:
        pytest.skip(str(missing))


def test_without_the_module_no_guest_runs_unprotected(node):
    refused = node.virsh("start", "first")
    assert not refused and "take a descriptor of process" in refused.out
    assert not node.runs()
    assert any("{ ptrace }" in line and "virtd_t" in line and "svirt_t" in line for line in denials(node))


@pytest.fixture(scope="module")
def loaded(node):
    """The node with the module in its policy; the denials from before."""
    node.ok("cp /share/file_contexts* /etc/selinux/default/contexts/files")
    node.ok("cp /share/policy /etc/selinux/default/policy/policy.* && load_policy")
    # As the package's script does: /run/leasehold was made by the other package.
    node.ok("restorecon -Ri /run/leasehold /var/lib/leasehold")
    return denials(node)


def test_a_guest_that_selinux_confines_holds_its_lease(node, loaded):
    started = node.virsh("start", "first")
    assert started, str(started)
    assert node.ok("getenforce").strip() == "Enforcing"
    assert ":svirt_t:" in node.ok(f"cat /proc/{node.qemu()}/attr/current")
    assert ":virtd_t:" in node.ok(f"cat /proc/{node.daemon()}/attr/current")
    assert node.lease()


def test_another_guest_is_refused_and_told_who_has_the_image(node):
    node.second_is_refused()


def test_it_keeps_its_lease_when_it_is_suspended_and_libvirtd_restarted(node):
    lease = node.lease()
    assert node.virsh("suspend", "first")
    node.ok("systemctl restart libvirtd")
    assert node.virsh("resume", "first")
    assert node.lease() == lease


def test_the_watcher_sees_it(node):
    started = node.typed("systemctl enable --now leasehold-watch")
    assert started, str(started)
    node.watcher_sees("1 guest, 1 lease, 0 lost")


def test_disks_are_leased_while_they_are_plugged(node):
    plugged = node.virsh("attach-disk", "first", ANOTHER, "sda", "--targetbus", "scsi")
    assert plugged, str(plugged)
    assert node.marks_on(ANOTHER)
    assert node.virsh("detach-disk", "first", "sda")
    labs.wait_until(lambda: not node.marks_on(ANOTHER), "the lease of the unplugged disk is gone")


def test_leases_in_a_lockspace_are_labelled_and_work(node):
    assert node.virsh("destroy", "first")
    node.ok("mkdir -m 700 /var/lib/leasehold")
    assert (result := node.typed("restorecon -R /shared/leases", _shared_leases="/var/lib/leasehold")), result
    node.ok(f"""echo 'file_lockspace_dir = "/var/lib/leasehold"' >{CONF} && systemctl restart libvirtd""")
    started = node.virsh("start", "first")
    assert started, str(started)
    assert not node.marks_on(IMAGE)
    node.second_is_refused()
    for place, name in (("/var/lib/leasehold", "file-*"), ("/run/leasehold", "*")):
        labels = node.ok(f"stat -c %C {place} {place}/{name}").split()
        assert len(labels) > 1 and all(f":{LOCKSPACE}:" in label for label in labels)
    # Two guests at one image in one lockspace were two; when the first is gone the other gets it.
    assert node.virsh("destroy", "first")
    started = node.virsh("start", "second")
    assert started, str(started)
    assert node.virsh("destroy", "second")


def test_selinux_has_forbidden_nothing_since_the_module_was_there(node, loaded):
    assert denials(node) == loaded

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The RPM package as far as Debian's rpm can handle it: what is in it, and what its scripts do. Its dependencies name
Fedora's packages, which nobody has here; that libvirt loads the plugin is what test_deb.py shows."""

import hosts
import pytest
from conftest import machine_with

PLUGIN = "/usr/lib64/libvirt/lock-driver/leasehold.so"
CONF = "/etc/libvirt/qemu-leasehold.conf"


@pytest.fixture
def machine(rpm, tmp_path):
    (tmp_path / rpm.name).write_bytes(rpm.read_bytes())
    with machine_with(tmp_path) as machine:
        yield machine


@pytest.fixture
def package(machine, rpm):
    return machine.shared / rpm.name


def install(machine, package):
    result = machine.run("rpm", "-U", "--nodeps", "--replacepkgs", package)
    assert result, str(result)
    return result.out


def test_everything_is_where_fedora_has_it(rpm):
    files = set(hosts.ok("rpm", "-qpl", rpm).splitlines())
    assert files >= {PLUGIN, CONF, "/usr/share/augeas/lenses/libvirt_leasehold.aug",
                     "/usr/share/augeas/lenses/tests/test_libvirt_leasehold.aug",
                     "/usr/share/man/man5/qemu-leasehold.conf.5", "/usr/sbin/leasehold",
                     "/usr/lib/systemd/system/leasehold-watch.service", "/usr/lib/tmpfiles.d/leasehold.conf",
                     "/usr/share/doc/leasehold/README.md", "/usr/share/doc/leasehold/OPERATIONS.md",
                     "/usr/share/doc/leasehold/docs/hosts.svg"}
    assert not [file for file in files if "apparmor" in file]
    assert hosts.ok("rpm", "-qpc", rpm).split() == [CONF]


def test_the_selinux_module_comes_beside_it(builds):
    from conftest import only
    policy = only(builds["rpm"][0], "leasehold-selinux-", ".rpm")
    assert "/usr/share/selinux/packages/leasehold.pp" in hosts.ok("rpm", "-qpl", policy)
    assert "semodule -n -s targeted -X 200 -i" in hosts.ok("rpm", "-qp", "--scripts", policy)
    # Installed in one go with the policy, its module would otherwise have nothing to go into.
    assert "selinux-policy-targeted post" in hosts.ok("rpm", "-qp", "--qf", "[%{REQUIRENAME} %{REQUIREFLAGS:deptype}\n]", policy)


def test_installing_it_says_how_to_enable_it_and_removing_it_works(machine, package):
    assert install(machine, package).splitlines()[-1] == 'lock_manager = "leasehold"'
    assert machine.path(PLUGIN).exists()
    machine.ok("rpm", "-e", "leasehold")
    assert not machine.path(PLUGIN).exists() and not machine.path(CONF).exists()


def test_it_does_not_go_while_it_is_the_lock_manager(machine, package):
    install(machine, package)
    qemu_conf = machine.path("/etc/libvirt/qemu.conf")
    qemu_conf.write_text('lock_manager = "leasehold"\n')
    refused = machine.run("rpm", "-e", "leasehold")
    assert not refused and "NOT removed" in refused.err
    assert machine.path(PLUGIN).exists()
    assert "restart libvirtd" in install(machine, package)  # an upgrade is not a removal
    # libvirt takes the first one.
    qemu_conf.write_text('#lock_manager = "leasehold"\nlock_manager = "lockd"\nlock_manager = "leasehold"\n')
    machine.ok("rpm", "-e", "leasehold")


def test_a_changed_configuration_outlives_package_and_upgrade(machine, package):
    install(machine, package)
    conf = machine.path(CONF)
    changed = conf.read_text() + "handoff_wait = 7\n"
    conf.write_text(changed)
    install(machine, package)
    assert conf.read_text() == changed
    machine.ok("rpm", "-e", "leasehold")
    assert machine.path(CONF + ".rpmsave").read_text() == changed

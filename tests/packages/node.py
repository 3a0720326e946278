#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""A node: one emulated machine with a whole Debian on it, booted with a security module of choice, and driven with the
commands of an administrator. It is booted once; each run goes on from there.

Run as a program it boots one and runs what it reads, line by line: tests/packages/node.py [apparmor|selinux]
"""

import contextlib
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import node_image  # makes tests/lab and tests/e2e known

import hosts
import lab as labs
import root_image

sys.path.insert(0, str(hosts.ROOT / "tests" / "support"))
from documents import documented  # noqa: E402
from folders import folder_of_one_run  # noqa: E402

IMAGE, ANOTHER = "/var/lib/libvirt/images/disk.img", "/var/lib/libvirt/images/another.img"
HERE = pathlib.Path(__file__).resolve().parent
MEMORY = 1536  # MiB

# By security module, what the kernel is told. AppArmor is Debian's default: nothing.
KERNEL = {"apparmor": "", "selinux": "security=selinux selinux=1 enforcing=0"}


class Node(labs.Host):
    """A host of the lab's kind, without a lab. `folder` is /share there."""

    def __init__(self, folder, security="apparmor"):
        labs.AnyHost.__init__(self, None, 1)
        labs.require(labs.QEMU, "qemu-img", "mkfs.ext4", "cc", "debootstrap", "apt-get", "setpriv", "checkmodule",
                     "semodule_package")
        self.name, self.security, self.folder = "node", security, folder
        for name in ("first", "second"):
            guest = hosts.Guest(name, [hosts.Disk(IMAGE, "vda")], scsi_controllers=1)
            (folder / f"{name}.xml").write_text(guest.xml())
        self.console_log, self.emulator_log = folder / "console.log", folder / "emulator.log"
        self.image = node_image.prepared()

    def start(self, root, *options):
        self.port = labs.free_port()
        self.console_log.write_text("")
        with open(self.emulator_log, "wb") as output:
            self.process = subprocess.Popen([
                *labs.CHILD, labs.QEMU, "-name", "leasehold-node", "-machine", "q35,accel=tcg", "-cpu", "Nehalem",
                "-smp", "1", "-m", str(MEMORY), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-kernel", self.image.kernel, "-initrd", self.image.initrd,
                "-append", "root=/dev/vda rw console=ttyS0 quiet panic=1 mitigations=off no_timer_check"
                           f" net.ifnames=0 {KERNEL[self.security]}",
                "-serial", f"file:{self.console_log}",
                "-drive", f"file={root},if=none,id=root,cache=unsafe,file.locking=off",
                "-device", "virtio-blk-pci,drive=root",
                "-netdev", f"user,id=agent,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:7000",
                "-device", "virtio-net-pci,netdev=agent,romfile=",
                "-virtfs", f"local,path={self.folder},mount_tag=share,security_model=none,multidevs=remap",
                "-device", "virtio-rng-pci", *options], stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def power_on(self):
        """As it was left after it had booted; what is written from here on is gone with it."""
        booted = root_image.built(self.image.root.parent / self.security, [*node_image.RECIPE, HERE / "node.py",
                                  pathlib.Path(shutil.which(labs.QEMU))], self.boot) / "node"
        self.start(f"{booted.with_suffix('.qcow2')},snapshot=on", "-incoming", f"exec:cat {booted}.state")
        self.wait_for_answer()
        self.ok("mount /share")
        return self

    def boot(self, work):
        """From the power button until systemd has nothing left to start, libvirtd knows what QEMU can do, and apt which
        packages there are. Leaves disk and memory in work/image. It takes minutes on a busy machine, and nothing of
        leasehold is on it yet."""
        disk, state = work / "image" / "node.qcow2", work / "image" / "node.state"
        disk.parent.mkdir()
        root_image.command("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.image.root, "-F", "raw", disk)
        self.start(disk, *self.monitored(state))
        self.wait_for_answer()
        self.run("systemctl is-system-running --wait", timeout=labs.BOOT_SECONDS)
        self.ok("virsh -q -c qemu:///system domcapabilities && apt-get check && sync", timeout=labs.BOOT_SECONDS)
        self.save(state)

    def log(self):
        return (self.console_log.read_text(errors="replace")[-3000:]
                + self.emulator_log.read_text(errors="replace")[-1000:])

    def run(self, command, timeout=900):
        """Of what does not end, what it waits for and what the journal says is told as well."""
        exported = "export HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive; "
        try:
            return super().run(exported + command, timeout)
        except AssertionError as error:
            if "no end after" not in str(error):
                raise
            seen = super().run("ps -eo pid,ppid,stat,time,wchan:24,args | grep -v '\\]$'; journalctl -n 60 --no-pager",
                               300)
            raise AssertionError(f"{error}\n{seen}") from None

    # What its administrator does. Both guests want one image.

    def typed(self, command, **places):
        """A command that a document prints."""
        return self.run(shlex.join(documented(command, **places)))

    def apt(self, *words):
        """Without a network. Changed configuration is kept without a question."""
        return self.run("apt-get -y -q --no-install-recommends -o Dpkg::Options::=--force-confdef"
                        f" -o Dpkg::Options::=--force-confold {' '.join(words)}")

    def enable(self):
        self.ok(f"truncate -s 1M {IMAGE} {ANOTHER}")
        self.ok("leasehold enable && systemctl restart libvirtd")
        for name in ("first", "second"):
            defined = self.virsh("define", f"/share/{name}.xml")
            assert defined, str(defined)

    def watcher_sees(self, what):
        def says():
            # What it said last stays when it has ended.
            shown = self.ok("systemctl show -P ActiveState -P StatusText leasehold-watch")
            return set(shown.splitlines()) == {"active", what}
        labs.wait_until(says, f"leasehold-watch says: {what}")

    def virsh(self, *words):
        return self.run(shlex.join(["virsh", "-q", "-c", "qemu:///system", *map(str, words)]))

    def qemu(self):
        return self.ok("cat /run/libvirt/qemu/first.pid").strip()

    def daemon(self):
        return self.ok("systemctl show -P MainPID libvirtd").strip()

    def runs(self):
        return self.virsh("domstate", "first").out.strip() == "running"

    def lease(self):
        """The first guest's QEMU and its marks: what must not change."""
        marks = self.marks_on(IMAGE)
        assert marks
        return self.qemu(), marks

    def second_is_refused(self):
        refused = self.virsh("start", "second")
        assert not refused
        assert f"image '{IMAGE}' is in use by guest 'first' (UUID " in refused.out
        assert f"pid {self.qemu()} on host 'node'" in refused.out

    def marks_on(self, path):
        """leasehold's marks on the file: where each begins, and what for it is held."""
        inode = self.ok(f"stat -c %i {shlex.quote(path)}").strip()
        locks = [line.split() for line in self.ok("cat /proc/locks").splitlines()]
        return sorted((int(start), access) for _, kind, _, access, _, file, start, _ in locks
                      if kind == "OFDLCK" and file.endswith(f":{inode}") and int(start) >= hosts.MARKS)

    def journal(self, *options):
        return self.ok(shlex.join(["journalctl", "-q", "--no-pager", "-o", "cat", *options]))


@contextlib.contextmanager
def booted(security, *files):
    """A node that has these files in /share, until the with block ends. labs.Missing says why there is none."""
    with folder_of_one_run("leasehold-node") as folder:
        for file in files:
            shutil.copy(file, folder)
        node = Node(folder, security)
        try:
            yield node.power_on()
        finally:
            node.kill()


def prompt(security):
    start = time.monotonic()
    with booted(security) as node:
        print(f"after {time.monotonic() - start:.0f} s; {node.folder} is /share", flush=True)
        for line in sys.stdin:
            with contextlib.suppress(EOFError):
                try:
                    print(node.run(line), flush=True)
                except AssertionError as problem:
                    print(problem, flush=True)


if __name__ == "__main__":
    prompt(sys.argv[1] if len(sys.argv) > 1 else "apparmor")

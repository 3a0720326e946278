# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Several "hosts" on one machine: each a stock libvirtd in its own mount, UTS and PID namespace.

Lab   a temporary directory with images, the boot sector, the emulator without image locks, and the hosts.
Host  one libvirtd with its own /etc/libvirt, /run/libvirt, /var/lib/libvirt; driven with virsh as a user would where
      a test is about what virsh does or says, and by libvirt's API where something only has to happen or is polled.
Guest what `virsh define` needs to know. It belongs to no host: it may migrate.

A host's first process (host_init.sh) lives as long as a pipe that this process holds open; when the test run ends,
whatever the reason, the pipe closes, that process ends, and the kernel kills everything in its PID namespace.

Nothing here knows how leasehold works, with one exception: MARKS, where its marks are in /proc/locks.
"""

import contextlib
import dataclasses
import os
import pathlib
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import uuid as uuids
from xml.sax.saxutils import escape, quoteattr

try:
    import libvirt
except ImportError:
    libvirt = None
else:
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print every refusal

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QEMU = "/usr/bin/qemu-system-x86_64"

# Seconds until something that must happen counts as not happening: long, for a machine that does other things as well.
PATIENCE = 120

# leasehold's marks are single bytes from here on, far beyond any data (DESIGN.md, "Media").
MARKS = 1 << 62


class Missing(Exception):
    """This machine lacks something the lab needs; tests skip with the text."""


def requirements():
    """Raises Missing with what stands in the way of running hosts here."""
    if os.geteuid() != 0:
        raise Missing("needs root (libvirtd in namespaces of its own)")
    for program in ("libvirtd", "virsh", "qemu-img", "qemu-io", "unshare", "nsenter", "as", "ld", "cc", QEMU):
        if not shutil.which(program):
            raise Missing(f"{program} is not installed")
    if not libvirt:
        raise Missing("python3-libvirt is not installed")
    if subprocess.run(["unshare", "-m", "-u", "-p", "-f", "true"], capture_output=True).returncode != 0:
        raise Missing("cannot create mount, UTS and PID namespaces here")


def plugin_dir():
    return pathlib.Path(os.environ.get("LEASEHOLD_PLUGIN_DIR", ROOT / "build" / "plugin")).resolve()


def command():
    """The leasehold command, as it was built beside the plugin, or an installed one."""
    return pathlib.Path(os.environ.get("LEASEHOLD_COMMAND", plugin_dir().parent / "tools" / "leasehold"))


def lock_manager():
    """Which lock manager the hosts use: leasehold, or for comparison lockd or none."""
    return os.environ.get("LEASEHOLD_E2E_LOCK_MANAGER", "leasehold")


def libvirt_version():
    """(9, 0) for libvirt 9.0.0."""
    return tuple(int(number) for number in ok("libvirtd", "--version").split()[-1].split(".")[:2])


def wait_until(condition, what, seconds=PATIENCE):
    """Polls until condition() is true and returns its value; fails after so many seconds, saying what not."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.02)


@dataclasses.dataclass
class Result:
    """What a command said, as a user sees it."""

    command: str
    rc: int
    out: str
    err: str

    def __bool__(self):
        return self.rc == 0

    def __str__(self):
        return f"$ {self.command}\n{self.out}{self.err}(exit {self.rc})"


def run(*command, timeout=PATIENCE, **options):
    command = [str(word) for word in command]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
                              **options)
    except subprocess.TimeoutExpired as slow:
        raise AssertionError(f"no end after {timeout} s: {' '.join(command)}") from slow
    return Result(" ".join(command), done.returncode, done.stdout, done.stderr)


def ok(*command, **options):
    result = run(*command, **options)
    assert result, str(result)
    return result.out


# --- locks, as the kernel lists them -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lock:
    kind: str  # OFDLCK, POSIX, FLOCK
    write: bool
    pid: int
    start: int
    end: int  # inclusive; 2**63 - 1 for "EOF"

    @property
    def is_mark(self):
        return self.kind == "OFDLCK" and self.start >= MARKS


def locks_on_each(paths):
    """{path: every lock on the file}, from /proc/locks, whoever holds it and wherever the descriptor is parked.

    The kernel hands that list out a page at a time, and when locks come and go in between, of whatever process on this
    machine, it leaves out some that stay. What counts is what three looks agree on."""
    inodes = {path: inode_of(path) for path in paths}
    wanted = set(inodes.values())
    looks = [look_for_locks(wanted) for _ in range(3)]
    while not looks[-3] == looks[-2] == looks[-1]:
        looks.append(look_for_locks(wanted))
    return {path: looks[-1].get(inode, []) for path, inode in inodes.items()}


def locks_on(path):
    return locks_on_each([path])[path]


def inode_of(path):
    """A file as /proc/locks names it."""
    status = os.stat(path)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"


def look_for_locks(wanted):
    found = {}
    for line in pathlib.Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "->" in words:
            continue  # somebody who waits has nothing
        _, kind, _, access, pid, inode, start, end = words
        if inode in wanted:
            end = (1 << 63) - 1 if end == "EOF" else int(end)
            found.setdefault(inode, []).append(Lock(kind, access == "WRITE", int(pid), int(start), end))
    for locks in found.values():
        locks.sort(key=lambda lock: (lock.kind, lock.start))
    return found


def marks_on(path):
    return marks_on_each([path])[path]


def marks_on_each(paths):
    """{path: leasehold's marks on the image itself, or as flocked files beside it}"""
    beside = {path: [*(path.parent / ".leasehold" / str(path.stat().st_ino)).glob("*-*")] for path in paths}
    locks = locks_on_each([*paths, *(file for files in beside.values() for file in files)])
    return {path: [lock for lock in locks[path] if lock.is_mark] + sum((locks[file] for file in beside[path]), [])
            for path in paths}


def lock_holders(path):
    """Processes with a descriptor that holds a lock on the file: {pid: [fd]}. Descriptors in flight have none."""
    status = os.stat(path)
    inode = f":{status.st_ino} "
    holders = {}
    for process in pathlib.Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for info in (process / "fdinfo").iterdir():
                if any(line.startswith("lock:") and inode in line for line in info.read_text().splitlines()):
                    holders.setdefault(int(process.name), []).append(int(info.name))
    return holders


def access_to(path, pid):
    """How a process has a file open: a subset of {"reading", "writing"}."""
    status, found = os.stat(path), set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            there = os.stat(f"/proc/{pid}/fd/{fd}")
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                info = pathlib.Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
                flags = int(next(line for line in info.splitlines() if line.startswith("flags:")).split()[1], 8)
                found.add("reading" if flags & os.O_ACCMODE == os.O_RDONLY else "writing")
    return found


@contextlib.contextmanager
def foreign_qemu(host, image):
    """A QEMU that libvirt knows nothing of has the image open for writing inside the with block; its pid there."""
    process = host.spawn(QEMU, "-nodefaults", "-display", "none", "-S", "-accel", "tcg", "-m", "16",
                         "-monitor", "none", "-drive", f"file={image},format=raw,if=virtio", log="foreign.log")
    try:
        # It opens the image before it has a device that writes. 201: nobody else may (block/file-posix.c).
        wait_until(lambda: any(lock.start <= 201 <= lock.end for lock in locks_on(image)), "QEMU may write to it")
        yield inner_pid(only_child(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError, ValueError):
            kill_and_wait(only_child(process.pid))
        process.wait(timeout=PATIENCE)


def only_child(pid):
    return int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text())


def inner_pid(pid):
    """A process's pid in its own PID namespace."""
    line = next(l for l in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith("NSpid:"))
    return int(line.split()[-1])


# --- guests -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Disk:
    """One <disk>. mode: exclusive, readonly or shared. target: the bus is told from its prefix (vd, sd, hd)."""

    path: pathlib.Path
    target: str
    mode: str = "exclusive"
    format: str = "raw"
    device: str = "disk"
    error_policy: str = ""
    cache: str = ""
    address: str = ""

    def xml(self):
        bus = {"vd": "virtio", "sd": "scsi", "hd": "ide"}[self.target[:2]]
        driver = f"<driver name='qemu' type='{self.format}'"
        driver += f" error_policy='{self.error_policy}'" if self.error_policy else ""
        driver += f" cache='{self.cache}'" if self.cache else ""
        kind, attribute = ("block", "dev") if self.path and os.path.exists(self.path) and stat.S_ISBLK(
            os.stat(self.path).st_mode) else ("file", "file")
        source = f"<source {attribute}={quoteattr(str(self.path))}/>" if self.path else ""
        mode = {"exclusive": "", "readonly": "<readonly/>", "shared": "<shareable/>"}[self.mode]
        return (f"<disk type='{kind}' device='{self.device}'>{driver}/>{source}"
                f"<target dev='{self.target}' bus='{bus}'/>{mode}{self.address}</disk>")


@dataclasses.dataclass
class Guest:
    name: str
    disks: list
    uuid: str = dataclasses.field(default_factory=lambda: str(uuids.uuid4()))
    memory: int = 16  # MiB
    emulator: str = QEMU
    on_poweroff: str = "destroy"
    serial: pathlib.Path = None
    scsi_controllers: int = 0
    qemu_args: tuple = ()
    devices: str = ""  # more of them, in libvirt's XML
    on_crash: str = "destroy"
    on_lockfailure: str = ""

    def xml(self):
        devices = self.devices
        devices += "".join(f"<controller type='scsi' index='{index}' model='virtio-scsi'/>"
                          for index in range(self.scsi_controllers))
        devices += "".join(disk.xml() for disk in self.disks)
        if self.serial:
            devices += f"<serial type='file'><source path={quoteattr(str(self.serial))} append='on'/></serial>"
        args = "".join(f"<qemu:arg value={quoteattr(arg)}/>" for arg in self.qemu_args)
        accel = os.environ.get("LEASEHOLD_E2E_ACCEL", "qemu")  # emulated boot sectors beat many a nested KVM
        return (f"<domain type='{accel}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
                f"<name>{escape(self.name)}</name><uuid>{self.uuid}</uuid>"
                f"<memory unit='MiB'>{self.memory}</memory><vcpu>1</vcpu>"
                f"<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><features><acpi/></features>"
                f"<on_poweroff>{self.on_poweroff}</on_poweroff><on_crash>{self.on_crash}</on_crash>"
                f"{f'<on_lockfailure>{self.on_lockfailure}</on_lockfailure>' if self.on_lockfailure else ''}"
                f"<devices><emulator>{self.emulator}</emulator><controller type='usb' model='none'/>{devices}"
                f"<memballoon model='none'/></devices>"
                f"{'<qemu:commandline>' + args + '</qemu:commandline>' if args else ''}</domain>")

    def said(self, letter):
        """Has the boot sector said this on its serial port?"""
        return self.serial.exists() and letter in self.serial.read_text(errors="replace")


# --- hosts --------------------------------------------------------------------------------------------------------

# What libvirt would write outside its own directories, or needs systemd, root's groups or cgroups for, is off. The
# filter: libvirtd does not ask each new QEMU for 400 properties of its processor, one by one, which takes longer than
# all the rest of a start.
QEMU_CONF = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
clear_emulator_capabilities = 0
stdio_handler = "file"
capability_filters = [ "cpu-unavailable-features" ]
"""

STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")  # as virsh says

# Linux' codes of the keys that the boot sector knows.
KEYS = dict(p=25, r=19, d=32, w=17, c=46, b=48)

# Where libvirt keeps things, and the directory of ours that is bound there. The cache is shared by all hosts: it
# holds what libvirtd found out about QEMU, which takes seconds and is the same everywhere.
BINDS = {"/etc/libvirt": "etc", "/run/libvirt": "run", "/var/lib/libvirt": "lib", "/var/log/libvirt": "log",
         "/var/cache/libvirt": "../cache", "/run/leasehold": "leases"}


class Host:
    def __init__(self, lab, name, number):
        self.lab, self.name = lab, name
        self.ports = (49300 + 60 * number, 49300 + 60 * number + 59)
        self.dir = lab.dir / name
        self.socket = self.dir / "run" / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.uuid = str(uuids.uuid4())
        self.init = self.libvirtd = self.virtlockd = self.connection = None

    # A host starts when somebody first wants it, so that a test pays for what it uses.

    def start(self, **configuration):
        for directory in BINDS.values():
            (self.dir / directory).mkdir(parents=True, exist_ok=True)
        self.init = subprocess.Popen(
            ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
             "--propagation", "private", "bash", HERE / "host_init.sh", self.name,
             *[f"{self.dir / ours}:{theirs}" for theirs, ours in BINDS.items()]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        answer = self.init.stdout.readline().split()
        assert answer and answer[0] == "ready", f"host {self.name} did not come up"
        self.pid = str(only_child(self.init.pid))
        self.pid_namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        self.configure(**configuration)
        self.start_libvirtd()
        return self

    def stop(self):
        """Power cut: everything on the host is gone when this returns."""
        if self.init:
            self.disconnect()
            self.init.stdin.close()
            self.init.wait(timeout=PATIENCE)
            for process in (self.libvirtd, self.virtlockd):
                if process:
                    process.wait(timeout=PATIENCE)
            self.init.stdout.close()
        self.init = self.libvirtd = self.virtlockd = None

    @property
    def runs(self):
        return self.init is not None

    def configure(self, lock_manager=None, plugin_conf=None, qemu_conf="", plugin_dir=None):
        """Writes the configuration that the next start_libvirtd() reads. plugin_conf None: what the run was told to
        use, usually no such file."""
        self.configuration = dict(lock_manager=lock_manager, plugin_conf=plugin_conf, qemu_conf=qemu_conf,
                                  plugin_dir=plugin_dir)
        plugin_conf = plugin_conf if plugin_conf is not None else self.lab.plugin_conf
        manager = lock_manager or self.lab.lock_manager
        etc = self.dir / "etc"
        (etc / "libvirtd.conf").write_text(
            f'host_uuid = "{self.uuid}"\nauth_unix_rw = "none"\nunix_sock_rw_perms = "0700"\n'
            f'log_outputs = "2:file:{self.dir}/log/libvirtd.log"\n')
        (etc / "qemu.conf").write_text(
            QEMU_CONF + f"migration_port_min = {self.ports[0]}\nmigration_port_max = {self.ports[1]}\n"
            + (f'lock_manager = "{manager}"\n' if manager != "none" else "") + qemu_conf)
        conf = etc / "qemu-leasehold.conf"
        if plugin_conf is None:
            conf.unlink(missing_ok=True)
        else:
            conf.write_text(plugin_conf)
        self.manager = manager
        self.plugin_dir = plugin_dir or self.lab.plugin_dir

    @contextlib.contextmanager
    def configured(self, **configuration):
        """libvirtd runs with this configuration inside the with block, with what it had before afterwards."""
        before = self.configuration
        self.kill_libvirtd()
        self.configure(**configuration)
        self.start_libvirtd()
        try:
            yield self
        finally:
            self.kill_libvirtd()
            self.configure(**before)
            self.start_libvirtd()

    def spawn(self, *command, env=None, log):
        """A process on this host. What is returned is nsenter, which waits for it: see only_child(). Out of reach of a
        ^C, so that the end of the tests finds a host that works; it dies with the host."""
        with open(self.dir / "log" / log, "ab") as output:
            return subprocess.Popen(["nsenter", "-t", self.pid, "-m", "-u", "-p", *command], stdin=subprocess.DEVNULL,
                                    stdout=output, stderr=output, env={**os.environ, **(env or {})},
                                    start_new_session=True)

    def start_libvirtd(self, expect_failure=False):
        """Starts libvirtd and waits until it answers and is connected to its guests again, or has given them up: an order
        that overtakes that may fail (destroy says that the domain is not running, and has killed it). expect_failure:
        until it has said why it does not work."""
        if self.manager == "lockd" and not self.virtlockd:
            self.virtlockd = self.spawn("/usr/sbin/virtlockd", "-p", "/run/libvirt/virtlockd.pid", log="virtlockd.log")
            wait_until((self.dir / "run" / "virtlockd-sock").exists, "virtlockd answers")
        env = {"LIBVIRT_LOCK_MANAGER_PLUGIN_DIR": str(self.plugin_dir)} if self.manager == "leasehold" else {}
        self.libvirtd = self.spawn("/usr/sbin/libvirtd", "-p", "/run/libvirt/libvirtd.pid", env=env, log="stderr.log")
        if expect_failure:
            return
        def guests():
            assert self.libvirtd.poll() is None, f"libvirtd on {self.name} ended: {self.log()[-2000:]}"
            with contextlib.suppress(libvirt.libvirtError):
                return self.socket.exists() and [self.ask(lambda libvirtd: libvirtd.listAllDomains(
                    libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE))]
        [running] = wait_until(guests, f"libvirtd on {self.name} answers")
        for guest in running:
            def connected():
                try:
                    return self.ask(lambda _: guest.controlInfo()[0]) not in (libvirt.VIR_DOMAIN_CONTROL_JOB,
                                                                              libvirt.VIR_DOMAIN_CONTROL_OCCUPIED)
                except libvirt.libvirtError:
                    return True
            wait_until(connected, f"libvirtd on {self.name} has {guest.name()} again")

    def kill_libvirtd(self):
        """kill -9. Guests live on."""
        if self.libvirtd:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
                os.kill(self.libvirtd_pid(), signal.SIGKILL)
            self.libvirtd.wait(timeout=PATIENCE)
            self.libvirtd = None
            self.disconnect()
            self.socket.unlink(missing_ok=True)

    def revive(self):
        """Starts libvirtd again if it was killed, or has crashed in its own code: that of libvirt 9.0 can, when the
        source's QEMU dies at the switch-over of a migration on a busy machine (qemuMigrationSrcPerform, a null job).
        Any other end is a failure."""
        if self.libvirtd and self.libvirtd.poll() is not None:
            crashes = [line for line in ok("dmesg").splitlines() if "libvirtd" in line and "segfault" in line]
            assert crashes and " in libvirt_driver_qemu.so" in crashes[-1], f"libvirtd ended: {self.log()[-2000:]}"
            self.libvirtd = None
            self.disconnect()
            self.socket.unlink(missing_ok=True)
        if not self.libvirtd:
            self.start_libvirtd()

    def libvirtd_pid(self):
        """As this process knows it, not as the host does."""
        return only_child(self.libvirtd.pid)

    def libvirtd_descriptors(self):
        """{fd: what it is} of libvirtd."""
        found = {}
        directory = f"/proc/{self.libvirtd_pid()}/fd"
        for fd in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                found[int(fd)] = os.readlink(f"{directory}/{fd}")
        return found

    def settled_descriptors(self):
        """The same when the count has stopped falling (closing monitors and event loops takes libvirtd a moment). Where
        that takes longer these are some too many; so compare with what libvirtd comes down to: comes_down_to()."""
        last, since = self.libvirtd_descriptors(), time.monotonic()
        while time.monotonic() - since < 0.5:
            now = self.libvirtd_descriptors()
            if len(now) < len(last):
                since = time.monotonic()
            last = now
            time.sleep(0.05)
        return last

    def comes_down_to(self, before):
        """libvirtd has no more descriptors again than it had."""
        wait_until(lambda: len(self.libvirtd_descriptors()) <= len(before),
                   f"libvirtd on {self.name} has no more than {len(before)} descriptors")

    def log(self):
        return "".join(path.read_text(errors="replace") for path in
                       (self.dir / "log" / "libvirtd.log", self.dir / "log" / "stderr.log") if path.exists())

    def forget_log(self):
        for path in (self.dir / "log").glob("*.log"):
            os.truncate(path, 0)

    # --- libvirt's API

    def ask(self, question):
        """question(connection): over one connection, which lives as long as libvirtd. That costs a thirtieth of what a
        virsh does. libvirtd is killed when there is never an answer; then this fails, as every question does."""
        watchdog = threading.Timer(PATIENCE, self.kill_silent_libvirtd)
        watchdog.daemon = True
        watchdog.start()
        try:
            if not self.connection:
                self.connection = libvirt.open(self.uri)
            return question(self.connection)
        finally:
            watchdog.cancel()

    def kill_silent_libvirtd(self):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError, AttributeError):
            os.kill(self.libvirtd_pid(), signal.SIGKILL)

    def disconnect(self):
        if self.connection:
            with contextlib.suppress(libvirt.libvirtError):
                self.connection.close()
            self.connection = None

    def domain(self, guest, action):
        """action(domain) must succeed."""
        try:
            return self.ask(lambda libvirtd: action(libvirtd.lookupByName(guest.name)))
        except libvirt.libvirtError as error:
            raise AssertionError(f"on {self.name}, guest {guest.name}: {error}") from None

    # --- virsh

    def virsh(self, *words, timeout=PATIENCE):
        result = run("virsh", "-q", "-c", self.uri, *words, timeout=timeout)
        result.command = " ".join(["virsh", *map(str, words)])
        return result

    def ok(self, *words, timeout=PATIENCE):
        result = self.virsh(*words, timeout=timeout)
        assert result, f"on {self.name}: {result}"
        return result.out.strip()

    def refused(self, *words, timeout=PATIENCE):
        """virsh must say no; returns what it printed."""
        result = self.virsh(*words, timeout=timeout)
        assert not result, f"on {self.name} this was not refused: {result}"
        return result.err

    def virsh_in_background(self, *words, through=None):
        """through: another way to this libvirtd than its own socket (gate.py)."""
        return subprocess.Popen(["virsh", "-q", "-c", through or self.uri, *map(str, words)], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @contextlib.contextmanager
    def connected_virsh(self):
        """A virsh that waits for its next line on stdin: what it does then begins at once."""
        virsh = subprocess.Popen(["virsh", "-q", "-c", self.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)
        virsh.stdin.write("hostname\n")
        virsh.stdin.flush()
        assert any(self.name in line for line in virsh.stdout), "virsh ended"
        try:
            yield virsh
        finally:
            virsh.communicate(timeout=PATIENCE)

    # --- guests

    def define(self, guest):
        self.ask(lambda libvirtd: libvirtd.defineXML(guest.xml()))

    def start_guest(self, guest, paused=False):
        self.define(guest)
        self.domain(guest, lambda domain: domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0))

    def suspend(self, guest):
        self.domain(guest, lambda domain: domain.suspend())

    def resume(self, guest):
        self.domain(guest, lambda domain: domain.resume())

    def destroy(self, guest):
        self.domain(guest, lambda domain: domain.destroy())

    def state(self, guest):
        """running, paused, shut off ...; "absent" when the host does not know the guest, or no libvirtd answers."""
        for _ in range(2):
            try:
                return STATES[self.ask(lambda libvirtd: libvirtd.lookupByName(guest.name).state()[0])]
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    break
                self.disconnect()  # of a libvirtd that is no longer there
        return "absent"

    def wait_state(self, guest, state):
        wait_until(lambda: self.state(guest) == state, f"{guest.name} on {self.name} is {state}")

    def press(self, guest, key):
        try:
            self.ask(lambda libvirtd: libvirtd.lookupByName(guest.name).sendKey(
                libvirt.VIR_KEYCODE_SET_LINUX, 0, [KEYS[key]], 1, 0))
        except libvirt.libvirtError as error:
            # One that ends by this key may do so before its QEMU has answered.
            assert "from qemu monitor" in str(error), str(error)

    def boot(self, guest):
        """Start and wait until the boot sector runs (most tests need not wait: the lease is there before)."""
        self.start_guest(guest)
        wait_until(lambda: guest.said("R"), f"{guest.name} has booted")

    def pid_here(self, guest):
        """QEMU's pid as the host knows it, which is what messages name."""
        return int((self.dir / "run" / "qemu" / f"{guest.name}.pid").read_text())

    def qemu_pid(self, guest):
        """QEMU's pid as this process knows it."""
        wanted = self.pid_here(guest)
        for process in pathlib.Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError, StopIteration):
                    if os.readlink(process / "ns" / "pid") == self.pid_namespace and inner_pid(process.name) == wanted:
                        return int(process.name)
        raise AssertionError(f"{guest.name} has no QEMU on {self.name}")

    def kill_qemu(self, guest):
        kill_and_wait(self.qemu_pid(guest))

    def qmp(self, guest, command):
        return self.ok("qemu-monitor-command", guest.name, command)

    def hmp(self, guest, command):
        return self.ok("qemu-monitor-command", guest.name, "--hmp", command)

    def migrate_to(self, other, guest, *options, timeout=PATIENCE, **kw):
        return self.virsh(*self.migrate_words(other, guest, *options, **kw), timeout=timeout)

    def migrate_words(self, other, guest, *options, to=None):
        """to: another way to the other libvirtd (gate.py)."""
        # RAM goes through a Unix socket: the hosts' names resolve to nothing, and it has a small buffer, so that a
        # destination which does not read stops the source at once.
        stream = self.lab.dir / self.lab.unique("stream")
        storage = ["--disks-uri", f"unix://{stream}.nbd"] if "--copy-storage-all" in options else []
        return ["migrate", "--unsafe", *options, *storage, "--migrateuri", f"unix://{stream}", guest.name,
                to or other.uri]

    def try_take(self, image, mode="exclusive"):
        """A third party: a stranger's guest starts on the image, and is destroyed again if it could.

        Its QEMU has no image locks of its own: when it is refused, the lock manager did it."""
        stranger = Guest(self.lab.unique("stranger"), [Disk(image, "vda", mode)],
                         emulator=self.lab.emulator_without_locks)
        try:
            self.ask(lambda libvirtd: libvirtd.createXML(stranger.xml()))
        except libvirt.libvirtError as error:
            return Result(f"create {stranger.name}", 1, "", f"error: {error}\n")
        self.kill_qemu(stranger)  # quicker than virsh destroy, which gives QEMU time to say goodbye
        self.wait_state(stranger, "absent")
        return Result(f"create {stranger.name}", 0, "", "")

    # --- a migration that takes as long as we let it

    def slow_migration(self, other, guest, *options, through=None, **kw):
        """virsh migrate in the background, in its copying phase: the guest dirties RAM faster than it may be sent."""
        if not guest.said("D"):
            self.press(guest, "d")
            wait_until(lambda: guest.said("D"), "the guest dirties its RAM")
        self.domain(guest, lambda domain: domain.migrateSetMaxSpeed(1))
        words = self.migrate_words(other, guest, "--live", *options, **kw)
        process = self.virsh_in_background(*words, through=through)
        def copies():
            assert process.poll() is None, f"the migration ended early: {process.communicate()}"
            with contextlib.suppress(libvirt.libvirtError):
                job = self.ask(lambda libvirtd: libvirtd.lookupByName(guest.name).jobStats())
                return job["type"] and job.get("memory_remaining")
        wait_until(copies, "RAM is being copied")
        return process

    def hurry(self, guest):
        """Lets a slow migration come to its end."""
        self.domain(guest, lambda domain: domain.migrateSetMaxSpeed(1000))

    # --- storage that only this host sees

    def inside(self, *command):
        """A command in this host's namespaces."""
        return run("nsenter", "-t", self.pid, "-m", "-u", "-p", *command)

    def ok_inside(self, *command):
        result = self.inside(*command)
        assert result, str(result)
        return result.out

    def mount(self, *words):
        self.ok_inside("mount", *words)

    def unmount(self, path):
        self.inside("umount", "-l", path)

    def seen(self, path):
        """How this process reaches a path as this host sees it."""
        return pathlib.Path(f"/proc/{self.pid}/root") / str(path).lstrip("/")

    def qemus(self):
        """The pids of all QEMUs on this host, known to its libvirtd or not, as this process knows them."""
        found = []
        for process in pathlib.Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    if (os.readlink(process / "ns" / "pid") == self.pid_namespace
                            and os.readlink(process / "exe") == os.path.realpath(QEMU)):
                        found.append(int(process.name))
        return found

    def clean(self):
        """No guest is left, known or running."""
        if not self.libvirtd:
            self.start_libvirtd()
        for pid in self.qemus():
            with contextlib.suppress(ProcessLookupError):
                kill_and_wait(pid)
        for domain in self.ask(lambda libvirtd: libvirtd.listAllDomains()):
            # It has to notice by itself; if it does not, destroy tells it.
            deadline = time.monotonic() + 2
            with contextlib.suppress(libvirt.libvirtError):
                while self.ask(lambda _: domain.isActive()) and time.monotonic() < deadline:
                    time.sleep(0.01)
                if self.ask(lambda _: domain.isActive()):
                    self.ask(lambda _: domain.destroy())
            with contextlib.suppress(libvirt.libvirtError):
                self.ask(lambda _: domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                                                        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                                                        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA))
        left = [domain.name() for domain in self.ask(lambda libvirtd: libvirtd.listAllDomains())]
        assert not left, f"guests left on {self.name}: {left}"


def kill_and_wait(pid):
    """kill -9, and back when the kernel is through with the process."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(1000 * PATIENCE), f"process {pid} survived SIGKILL"
    finally:
        os.close(pidfd)


class Adversary:
    """A running guest that tries to hot-plug an image into itself, as fast as one virsh can ask, in a with block."""

    def __init__(self, host, image):
        lab = host.lab
        self.host, self.image = host, image
        self.guest = Guest(lab.unique("adversary"), [], emulator=lab.emulator_without_locks, scsi_controllers=1)
        self.output = lab.dir / f"{self.guest.name}.out"

    def __enter__(self):
        self.host.start_guest(self.guest)
        with open(self.output, "w") as output:
            self.virsh = subprocess.Popen(["virsh", "-c", self.host.uri], stdin=subprocess.PIPE, stdout=output,
                                          stderr=subprocess.STDOUT, text=True, bufsize=1)
        self.go_on = True
        self.thread = threading.Thread(target=self.feed)
        self.thread.start()
        wait_until(lambda: self.tries() > 3, "the adversary tries")
        return self

    def feed(self):
        asked = 0
        while self.go_on:
            if asked - self.tries() > 20:
                time.sleep(0.005)
                continue
            self.virsh.stdin.write(f"attach-disk {self.guest.name} {self.image} sda --subdriver raw\n")
            if self.host.manager != "leasehold":  # it may succeed; then it goes on trying
                self.virsh.stdin.write(f"detach-disk {self.guest.name} sda\n")
            asked += 1

    def __exit__(self, *_):
        self.go_on = False
        self.thread.join()
        self.virsh.communicate(timeout=PATIENCE)
        self.host.ok("destroy", self.guest.name)

    def tries(self):
        return self.successes() + self.output.read_text().count("error: resource busy")

    def successes(self):
        return self.output.read_text().count("attached successfully")


class Lab:
    HOSTS = ("alpha", "beta", "gamma")

    def __init__(self):
        requirements()
        self.lock_manager = lock_manager()
        self.plugin_dir = plugin_dir()
        if self.lock_manager == "leasehold" and not (self.plugin_dir / "leasehold.so").exists():
            raise AssertionError(f"{self.plugin_dir}/leasehold.so is missing: build it, or set LEASEHOLD_PLUGIN_DIR")
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="leasehold-"))
        self.plugin_conf = os.environ.get("LEASEHOLD_E2E_CONF", "").replace("{dir}", str(self.dir)) or None
        self.hosts = {name: Host(self, name, number) for number, name in enumerate(self.HOSTS)}
        self.boot_sector = self.build_boot_sector()
        self.emulator_without_locks = self.build_emulator_without_locks()
        self.count = 0

    def build_boot_sector(self):
        binary = self.dir / "guest.bin"
        ok("as", "--32", "-o", self.dir / "guest.o", HERE / "guest.S")
        ok("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00", "-o", binary, self.dir / "guest.o")
        return binary.read_bytes()

    def build_emulator_without_locks(self):
        """QEMU whose own image locks never refuse: see tests/support/no_qemu_locks.c."""
        shim, script = self.dir / "no_qemu_locks.so", self.dir / "qemu-without-locks"
        ok("cc", "-shared", "-fPIC", "-O", "-o", shim, ROOT / "tests" / "support" / "no_qemu_locks.c")
        script.write_text(f'#!/bin/sh\nLD_PRELOAD={shim} exec {QEMU} "$@"\n')
        script.chmod(0o755)
        return str(script)

    def host(self, name):
        host = self.hosts[name]
        return host if host.runs else host.start()

    def running_hosts(self):
        return [host for host in self.hosts.values() if host.runs]

    def image(self, path, size="1M", format="raw", backing=None):
        """An image that boots (raw), or an empty qcow2 one."""
        if format == "raw":
            path.write_bytes(self.boot_sector)
            os.truncate(path, 1 << 20)  # sparse, so that the first write to a full file system fails
        else:
            options = ["-b", backing, "-F", "raw"] if backing else []
            ok("qemu-img", "create", "-q", "-f", format, *options, path, size)
        return path

    def unique(self, stem):
        self.count += 1
        return f"{stem}-{self.count}"

    def close(self):
        for host in self.hosts.values():
            host.stop()
        shutil.rmtree(self.dir, ignore_errors=True)

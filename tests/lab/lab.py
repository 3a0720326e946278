#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Hosts with a kernel each, on this machine: emulated, with a network that can be cut and a disk that they share.

Lab    a temporary directory, the network, the shared disk, a folder that every host sees as /share, and the hosts.
Host   one QEMU that runs a Debian kernel. It can be cut off, frozen, killed (a power cut) and started again.
Actor  a process on a host that plays libvirtd with the built plugin, or takes locks by hand: see actor.cpp.

Machine  this machine's own kernel as one more host of a Lab, with the hosts' root image: for servers that would take
       minutes on an emulated processor. In a MachineLab all hosts are such: for network storage whose clients are
       processes.

NamespaceLab and NamespaceHost are the same without kernels of their own: namespaces of this machine, for storage that
is a process, as FUSE file systems are. They start at once.

All processes die with the one that made the lab. Nothing here knows storage (storage.py) or leases (the tests).

Run as a program it boots hosts and opens a shell-like prompt: tests/lab/lab.py [HOSTS]
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

import root_image

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QEMU = "qemu-system-x86_64"
BOOT_SECONDS = 600  # six on a quiet machine, 200 on one that is very busy, the first time; one afterwards
PATIENCE = 240  # with what does happen, at a speed that nobody knows
MEMORY, CODE_CACHE = 640, 256  # MiB; the latter is QEMU's own, a gigabyte by default
GUEST_DIR = "/run/lab"  # where a host keeps its own copy of /share

# The process dies with us, however we die. (Not nice, too: a few of these run beside compilers, and who waits for them
# waits for one after the other.)
CHILD = ("setpriv", "--pdeathsig", "KILL")


class Missing(Exception):
    """This machine lacks something the lab needs; tests skip with the text."""


def require(*programs):
    """Raises Missing with what stands in the way of a lab here."""
    if os.geteuid() != 0:
        raise Missing("needs root")
    for program in programs:
        if not shutil.which(program):
            raise Missing(f"{program} is not installed")


def command():
    """The leasehold command, as it was built beside the plugin."""
    return plugin_dir().parent / "tools" / "leasehold"


def inject():
    """The program under which one system call of another one fails."""
    return plugin_dir().parent / "tests" / "unit" / "inject"


def plugin_dir():
    return pathlib.Path(os.environ.get("LEASEHOLD_PLUGIN_DIR", ROOT / "build" / "plugin")).resolve()


def wait_until(condition, what, seconds=PATIENCE, pause=0.1):
    """Polls until condition() is true, returns its value; fails after so many seconds, and says what did not happen."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        time.sleep(pause)


def together(function, arguments):
    """function(argument) for each of them, at the same time; the results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


@dataclasses.dataclass
class Result:
    command: str
    rc: int
    out: str

    def __bool__(self):
        return self.rc == 0

    def __str__(self):
        return f"{self.command}\n{self.out}(exit {self.rc})"


def answer_to(request, connection, seconds):
    """What comes until the other end closes, and whether it has closed after so many seconds."""
    connection.sendall(request.encode())
    answer, deadline = b"", time.monotonic() + seconds
    while True:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            got = connection.recv(1 << 16)
        except ConnectionResetError:  # somebody died
            got = b""
        except TimeoutError:
            got = None
        if not got:
            return answer.decode(errors="replace"), got is not None
        answer += got


# --- network ------------------------------------------------------------------------------------------------------


def connected_sockets():
    """Two UDP sockets that talk to each other only. Unix sockets would queue no more than ten frames."""
    pair = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for end in pair:
        end.bind(("127.0.0.1", 0))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    for end, other in (pair, pair[::-1]):
        end.connect(other.getsockname())
    return pair


def tap_device(name):
    """One that goes when its descriptor is closed (tuntap.rst; linux/if_tun.h). None where there is none."""
    try:
        tap = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF; IFF_TAP, IFF_NO_PI
        return tap
    except OSError:
        return None


class Network:
    """The wire between the hosts: hub.c, a socket for each host's QEMU, and one for this machine."""

    tap_numbers = itertools.count()

    def __init__(self, lab, hosts, machines=1):
        pairs = [connected_sockets() for _ in range(hosts)]
        self.plugs = [qemu for qemu, _ in pairs]
        self.taps = [f"lab{os.getpid()}-{next(self.tap_numbers)}" for _ in range(machines)]
        taps = [tap for name in self.taps if (tap := tap_device(name)) is not None]
        ends = [hub.fileno() for _, hub in pairs] + taps
        self.hub = subprocess.Popen([*CHILD, lab.compiled("hub", "cc", HERE / "hub.c"), *map(str, ends)], pass_fds=ends,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _, hub in pairs:
            hub.close()
        for tap in taps:
            os.close(tap)

    def tap_of(self, number):
        return self.taps[number - len(self.plugs) - 1]

    def order(self, word, a, b):
        self.hub.stdin.write(f"{word} {a} {b}\n")
        self.hub.stdin.flush()
        answer = self.hub.stdout.readline()
        assert answer == "done\n", f"the hub said {answer!r} to '{word} {a} {b}'"

    def close(self):
        self.hub.stdin.close()
        self.hub.wait()
        self.hub.stdout.close()
        for plug in self.plugs:
            plug.close()


# --- hosts --------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scsi_name(index):
    """The world wide name (NAA) of a shared SCSI disk."""
    return f"0x5000c50000000a{index:02x}"


class AnyHost:
    def __init__(self, lab, number):
        self.lab, self.number, self.name = lab, number, f"h{number}"
        self.process = self.makes_actors = self.ready = None

    def __repr__(self):
        return self.name

    @property
    def runs(self):
        return self.process is not None and self.process.poll() is None

    def ok(self, command, **options):
        result = self.run(command, **options)
        assert result, str(result)
        return result.out

    def ask(self, address, text, timeout):
        """What somebody says to that who listens at this Unix socket on the host, and whether he came to an end after
        so many seconds."""
        raise NotImplementedError

    def actor(self, name, plugin_conf=None):
        return Actor(self, name, plugin_conf)

    def ready_actors(self):
        """Where actors can be asked for."""
        socket_path = "/run/actors"
        if self.makes_actors is not self.process:
            # Its own copy, so that no order waits for the other hosts' reads of the shared folder.
            self.ok(f"{{ [ -d {GUEST_DIR} ] || cp -r {self.share} {GUEST_DIR}; }} && {GUEST_DIR}/actor {socket_path}"
                    f" {GUEST_DIR}/leasehold.so {GUEST_DIR}/fake_qemu 2>{socket_path}.log")
            self.makes_actors = self.process
        return socket_path

    # Accidents.

    def cut(self, *others):
        """Pulls the cable to these hosts, or to all. The shared disk and the agent are not affected."""
        for other in others or self.lab.others(self):
            self.lab.network.order("cut", self.number, other.number)

    def heal(self, *others):
        for other in others or self.lab.others(self):
            self.lab.network.order("heal", self.number, other.number)

    def kill(self):
        """Power cut."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


class Host(AnyHost):
    """An emulated machine. It does not boot: it goes on where one like it had booted (booted())."""

    share = "/share"

    def __init__(self, lab, number):
        super().__init__(lab, number)
        self.address = f"10.77.0.{number}"
        self.console_log = lab.dir / f"{self.name}.console"
        self.private_disk = lab.sparse_file(f"{self.name}.img", 2 << 30)  # keeps its content over a power cut

    def power_on(self):
        """Starts; wait_ready() waits until it has a name, a network and disks."""
        self.start("-incoming", f"exec:cat {booted(self.lab.image)}")

    def start(self, *options):
        self.kill()
        self.port = free_port()
        self.console_log.write_text("")
        plug = self.lab.network.plugs[self.number - 1].fileno()
        image = self.lab.image
        with open(self.lab.dir / f"{self.name}.qemu", "wb") as output:
            self.process = subprocess.Popen([
                *CHILD, QEMU, "-name", f"lab-{self.name}", "-machine", "q35", "-accel",
                f"tcg,tb-size={CODE_CACHE}", "-cpu", "Nehalem",
                "-m", str(MEMORY), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-kernel", image.kernel, "-initrd", image.initrd,
                # no_timer_check: on a busy machine the timer may be too late for the kernel's test of it.
                "-append", "console=ttyS0 quiet loglevel=5 panic=1 mitigations=off no_timer_check scsi_mod.scan=manual",
                "-serial", f"file:{self.console_log}",
                *self.disk("root", image.root, "readonly=on"),
                *self.disk("private", self.private_disk, "cache=unsafe"),
                *itertools.chain(*(self.disk(name, path, "cache=none", "share-rw=on")
                                   for name, path in self.lab.shared_disks.items())),
                "-device", "virtio-scsi-pci,id=scsi",
                *itertools.chain(*(self.scsi_disk(*disk) for disk in enumerate(self.lab.scsi_disks))),
                # The agent's own way in: no other host is there.
                "-netdev", f"user,id=agent,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:7000",
                "-device", "virtio-net-pci,netdev=agent,romfile=",
                "-netdev", f"dgram,id=wire,local.type=fd,local.str={plug}",
                "-device", "virtio-net-pci,netdev=wire,romfile=",
                "-virtfs", f"local,path={self.lab.share},mount_tag=share,security_model=none,multidevs=remap",
                # Tells the kernel that it is another one now: no two hosts shall draw the same numbers (Linux
                # drivers/virt/vmgenid.c).
                "-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto", *options],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[plug])

    def boot_into(self, state):
        """Boots, and leaves there what power_on() goes on from."""
        self.start(*self.monitored(state))
        self.wait_until_alive(lambda: "LAB-READY" in self.console_log.read_text(errors="replace"))
        self.save(state)

    @staticmethod
    def monitored(state):
        """QEMU's options for save()."""
        return "-monitor", f"unix:{state}.monitor,server=on,wait=off"

    def save(self, state):
        """Ends it, and leaves there what -incoming goes on from."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(f"{state}.monitor")
            monitor.sendall(f'migrate "exec:cat >{state}"\nquit\n'.encode())
            self.process.wait(timeout=BOOT_SECONDS)
        assert state.stat().st_size > 0, f"what had booted was not saved:\n{self.log()}"
        self.kill()

    @staticmethod
    def disk(name, path, *options):
        device = ",".join(["virtio-blk-pci", f"drive={name}", f"serial={name}"]
                          + [option for option in options if option.startswith("share-rw")])
        drive = ",".join([f"file={path}", "format=raw", "if=none", f"id={name}", "file.locking=off"]
                         + [option for option in options if not option.startswith("share-rw")])
        return "-drive", drive, "-device", device

    def scsi_disk(self, index, path):
        """With an identity of its own, and another name on each host: what h1 calls sda is sdb on h2."""
        place = (index + self.number - 1) % len(self.lab.scsi_disks)
        drive, device = f"scsi{index}", f"scsi-hd,drive=scsi{index},scsi-id={place},share-rw=on"
        return ("-drive", f"file={path},format=raw,if=none,id={drive},file.locking=off,cache=none",
                "-device", f"{device},serial=disk{index},wwn={scsi_name(index)}")

    def wait_until_alive(self, condition):
        def alive():
            assert self.process.poll() is None and "LAB-FAILED" not in self.console_log.read_text(errors="replace"), \
                f"{self.name} died at boot:\n{self.log()}"
            return condition()
        wait_until(alive, f"{self.name} has booted", BOOT_SECONDS)

    def wait_for_answer(self):
        # As long as QEMU reads the state nobody is there, and TCP waits ever longer until it asks again.
        patience = itertools.count(0.3, 0.3)

        def answers():
            with contextlib.suppress(OSError, AssertionError):
                return self.run("true", timeout=next(patience))
        self.wait_until_alive(answers)

    def wait_ready(self):
        if self.ready is not self.process:
            self.wait_for_answer()
            self.ok(f"/sbin/lab-init {self.number}")
            self.ready = self.process
        return self

    def log(self):
        """The end of what the kernel and QEMU said."""
        qemu = (self.lab.dir / f"{self.name}.qemu").read_text(errors="replace")
        return self.console_log.read_text(errors="replace")[-3000:] + qemu[-1000:]

    # Commands.

    def run(self, command, timeout=PATIENCE):
        """Runs a shell command on the host. Fails if it has not ended after so many seconds (it goes on there)."""
        reply, ended = self.exchange(command, timeout)
        output, _, status = reply.rpartition("\0")
        assert ended, f"{self.name}$ {command}\n{reply}no end after {timeout} s\n{self.log()}"
        assert status, f"{self.name} died while it ran: {command}\n{self.log()}"
        return Result(f"{self.name}$ {command}", int(status), output)

    def ask(self, address, text, timeout):
        return self.exchange(f"@{address}\n{text}", timeout)

    def exchange(self, request, timeout):
        """What the agent answers, see agent.c."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as agent:
            return answer_to(request + "\0", agent, timeout)

    # Not by QEMU's monitor: that stops the host's clocks as well, and time-outs are what a frozen host is about.

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)


# --- hosts without a kernel of their own ----------------------------------------------------------------------------


class NamespaceHost(AnyHost):
    """Processes, mounts and a host name of its own. /run and /mnt are empty there at first."""

    enter = "-m", "-u", "-p"

    @property
    def share(self):
        return self.lab.share

    def power_on(self):
        self.kill()
        self.process = subprocess.Popen([*CHILD, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
                                         "--mount-proc", "bash", "-c", f"""set -e
            hostname {self.name}
            mount -t tmpfs tmpfs /mnt
            mount -t tmpfs tmpfs /run
            cp -r {self.lab.share} {GUEST_DIR}
            echo ready
            exec sleep infinity"""], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def wait_ready(self):
        if self.process.stdout.closed:
            return self
        with self.process.stdout as output:
            assert output.readline() == "ready\n", f"{self.name} has not started"
        [self.init] = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return self

    def run(self, command, timeout=PATIENCE):
        with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would wait for daemons that keep it
            done = subprocess.run([*CHILD, "nsenter", "-t", self.init, *self.enter, "bash", "-c", command],
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout,
                                  check=False)
            output.seek(0)
            return Result(f"{self.name}$ {command}", done.returncode, output.read())

    def ask(self, address, text, timeout):
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.connect(f"/proc/{self.init}/root{address}")
            except ConnectionRefusedError:  # he is dead
                return "", True
            return answer_to(text, listener, timeout)


class Machine(NamespaceHost):
    """This machine's kernel, in the hosts' root image and on their network."""

    enter = "-m", "-u", "-p", "-n", "-r", "-w"
    share = "/share"

    def __init__(self, lab, number):
        require("ip", "unshare", "nsenter")
        super().__init__(lab, number)
        self.address = f"10.77.0.{number}"
        self.wire = None  # has its network namespace, which outlives the host

    def plug_in(self):
        tap = self.lab.network.tap_of(self.number)
        if subprocess.run(["ip", "link", "show", tap], capture_output=True, check=False).returncode != 0:
            raise Missing("needs /dev/net/tun")
        self.wire = subprocess.Popen([*CHILD, "unshare", "--net", "sh", "-c", "echo made && exec sleep infinity"],
                                     stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        with self.wire.stdout as output:
            assert output.readline() == "made\n", f"{self.name} has no network"
        subprocess.run(["ip", "link", "set", tap, "netns", str(self.wire.pid)], check=True)
        for words in (f"link set {tap} name eth1", f"addr add {self.address}/24 dev eth1", "link set lo up",
                      "link set eth1 up"):
            subprocess.run(["nsenter", "-t", str(self.wire.pid), "-n", "ip", *words.split()], check=True)

    def power_on(self):
        self.kill()
        if self.wire:
            self.heal()
        else:
            self.plug_in()
        root = self.lab.dir / self.name
        self.process = subprocess.Popen([*CHILD, "nsenter", "-t", str(self.wire.pid), "-n", "unshare", "--mount", "--uts",
                                         "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", f"""set -e
            hostname {self.name}
            mkdir -p {root}/image {root}/changes {root}/root
            mount -o ro,loop,noload {self.lab.image.root} {root}/image
            mount -t tmpfs tmpfs {root}/changes
            mkdir {root}/changes/upper {root}/changes/work
            mount -t overlay -o lowerdir={root}/image,upperdir={root}/changes/upper,workdir={root}/changes/work \
                root {root}/root
            cd {root}/root
            mount -t proc proc proc
            mount -t tmpfs tmpfs run
            mkdir -p run/gluster
            mount --rbind /dev dev
            mount --bind {self.lab.share} share
            cp -r share {GUEST_DIR[1:]}
            echo ready
            # As every init it takes care of the dead whose parents are gone.
            exec chroot . bash -c 'while :; do sleep 1; done'"""], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        text=True)

    def wait_ready(self):
        super().wait_ready()
        # Until then commands would run in this machine's own root.
        wait_until(lambda: os.readlink(f"/proc/{self.init}/root") != "/", f"{self.name} has its own root")
        return self

    # A host without power, or with a processor that stands still, says nothing to anybody.

    def kill(self):
        if self.runs:
            self.cut()
        super().kill()

    def freeze(self):
        self.cut()
        self.ok("kill -STOP -1")

    def thaw(self):
        self.ok("kill -CONT -1")
        self.heal()

    def close(self):
        self.kill()
        if self.wire:
            self.wire.kill()
            self.wire.wait()

    def log(self):
        return ""


# --- actors -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """What an actor said: status is ok, refused (by the plugin), errno's name (by the kernel), hung (no answer in time;
    the order goes on, and the next one waits for it) or gone (it died)."""

    order: str
    status: str
    seconds: float
    text: str

    def __bool__(self):
        return self.status == "ok"

    def __str__(self):
        return f"{self.order}\n-> {self.status} after {self.seconds:.3f} s: {self.text}"


class Actor:
    """A process on a host. Guests that it starts are processes of their own and die with it."""

    def __init__(self, host, name, plugin_conf=None):
        self.host, self.name = host, name
        self.socket = f"/run/actor-{name}"
        conf = f"{name}.conf"
        if plugin_conf is not None:
            (host.lab.share / conf).write_text(plugin_conf)
        self.pid, _ = host.ask(host.ready_actors(), f"{self.socket} {host.share}/{conf}\n", PATIENCE)
        assert self.pid.isdigit(), f"{self}: {host.ok('cat /run/actors.log')}"

    def ask(self, *words, timeout=90):
        """One order, one answer. An actor that hangs on storage answers `hung` after the time-out, and does nothing
        else until the storage has answered it."""
        order, begin = " ".join(map(str, words)), time.monotonic()
        answer, ended = self.host.ask(self.socket, f"{order}\n", timeout)
        if not answer:
            seconds = time.monotonic() - begin
            return Answer(f"{self}: {order}", "gone" if ended else "hung", seconds, "no answer")
        status, microseconds, text = answer.rstrip("\n").split(" ", 2)
        if status == "mistake":
            raise AssertionError(f"{self}: {order}: {answer}\n{self.host.run(f'cat {self.socket}.log')}")
        return Answer(f"{self}: {order}", status, int(microseconds) / 1e6, text)

    def ok(self, *words, **options):
        answer = self.ask(*words, **options)
        assert answer, str(answer)
        return answer.text

    def refused(self, *words, **options):
        answer = self.ask(*words, **options)
        assert answer.status == "refused", f"should have been refused: {answer}"
        return answer.text

    def said(self):
        """What the plugin wrote for people, in libvirtd's log and in those of the guests."""
        return self.host.ok(f"cat {self.socket}.log")

    @contextlib.contextmanager
    def accident(self, call, number, signal_name):
        """Inside, the process, or a child of it, gets the signal when it makes this system call for the so-manieth
        time, before the call does anything."""
        def until(tracer):
            return f"until [[ $(</proc/{self.pid}/status) =~ TracerPid:.{tracer} ]]; do sleep 0.02; done"
        self.host.ok(f"strace -f -qq -o /dev/null -p {self.pid} -e trace={call}"
                     f" -e inject={call}:signal={signal_name}:when={number} >/dev/null 2>&1 &"
                     f" echo $! >{self.socket}.strace; {until('[^0]')}")
        try:
            yield
        finally:
            self.host.ok(f"kill $(cat {self.socket}.strace) && {until(0)}")

    def resume(self):
        """After such an accident with STOP."""
        self.host.ok(f"pkill -CONT --session {self.pid}")

    def quit(self):
        """Ends the process, and with it its guests and locks."""
        if self.host.runs and self.ask("die", timeout=1).status != "gone":
            self.host.run(f"kill -KILL {self.pid}")

    def __str__(self):
        return f"{self.name}@{self.host.name}"


# --- the lab ------------------------------------------------------------------------------------------------------


@functools.cache  # what it is known by has all of QEMU in it, which is not read for each host
def booted(image):
    """The state of a host that has booted that image, and has no number yet. Made once."""
    def boot(work):
        (work / "image").mkdir()
        with Lab(1, image) as lab:
            lab.hosts[0].boot_into(work / "image" / "state")
    recipe = [HERE / "lab.py", pathlib.Path(shutil.which(QEMU))]
    return root_image.built(image.root.parent / "booted", recipe, boot) / "state"


class AnyLab:
    """Where the lab's files are, and the programs that hosts need."""

    programs = {}  # name: where it was built

    def __init__(self):
        cache = root_image.cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers(cache)
        # Beside the image, not in /tmp: the shared disks are opened with O_DIRECT, which a tmpfs does not know.
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=cache))
        self.share = self.dir / "share"
        self.share.mkdir()
        self.numbers = itertools.count(1)

    @staticmethod
    def remove_leftovers(cache):
        """Of labs whose process was killed."""
        for run in cache.glob("run-*"):
            if not pathlib.Path("/proc", run.name.split("-")[1]).exists():
                shutil.rmtree(run, ignore_errors=True)

    def compiled(self, name, compiler, *arguments):
        """A program from sources, built for this run; hosts see it in /share. Labs of one process share it."""
        target = self.share / name
        if (built := self.programs.get(name)) and built.exists():
            return shutil.copy(built, target)
        done = subprocess.run([compiler, "-O1", "-Wall", "-Wextra", "-o", target, *arguments], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        self.programs[name] = target
        return target

    def push(self, *files):
        """Copies files into /share."""
        for file in files:
            shutil.copy(file, self.share)

    def push_actor(self):
        """What Host.actor() needs: the actor, the built plugin and the program that plays QEMU. And the command."""
        support = ROOT / "tests" / "support"
        plugin = plugin_dir() / "leasehold.so"
        assert plugin.exists(), f"{plugin} is missing: build it, or set LEASEHOLD_PLUGIN_DIR"
        self.push(plugin)
        self.push(*(program for program in (command(), inject()) if program.exists()))
        self.compiled("fake_qemu", "cc", f"-I{ROOT}", support / "fake_qemu.c")
        self.compiled("actor", "c++", "-std=c++20", "-rdynamic", f"-I{ROOT}", HERE / "actor.cpp",
                      support / "plugin_host.cpp", "-ldl")

    def start(self):
        self.push_actor()
        self.boot()

    def boot(self, *hosts):
        """Boots those of them that do not run, all at once."""
        hosts = hosts or self.hosts
        for host in hosts:
            if not host.runs:
                host.power_on()
        together(lambda host: host.wait_ready(), hosts)

    def others(self, host):
        return [other for other in self.hosts if other is not host]

    def unique(self, stem):
        return f"{stem}{next(self.numbers)}"

    def close(self):
        for host in self.hosts:
            host.kill()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Lab(AnyLab):
    def __init__(self, hosts=3, image=None):
        require(QEMU, "mkfs.ext4", "cc", "c++", "apt-get", "dpkg-deb", "chroot", "ldconfig", "setpriv")
        super().__init__()
        self.image = image or root_image.prepared(root_image.cache_folder())
        self.shared_disks = {name: self.sparse_file(f"{name}.img", 1 << 30) for name in ("shared1", "shared2", "shared3")}
        self.scsi_disks = [self.sparse_file(f"scsi{index}.img", 128 << 20) for index in range(3)]
        self.network = Network(self, hosts)
        self.hosts = [Host(self, number) for number in range(1, hosts + 1)]
        self.machine = Machine(self, hosts + 1)  # not started with the others

    def sparse_file(self, name, size):
        path = self.dir / name
        with open(path, "wb") as file:
            file.truncate(size)
        return path

    def start(self):
        for host in self.hosts:
            host.power_on()
        super().start()  # compiles while they boot

    def close(self):
        self.machine.close()
        super().close()
        self.network.close()


class MachineLab(AnyLab):
    def __init__(self, hosts=3):
        require("mkfs.ext4", "cc", "c++", "apt-get", "dpkg-deb", "chroot", "ldconfig", "setpriv")
        if not pathlib.Path("/dev/fuse").exists():
            raise Missing("there is no /dev/fuse")
        super().__init__()
        self.image = root_image.prepared(root_image.cache_folder())
        self.network = Network(self, 0, hosts)
        self.hosts = [Machine(self, number) for number in range(1, hosts + 1)]

    def close(self):
        for host in self.hosts:
            host.close()
        super().close()
        self.network.close()


class NamespaceLab(AnyLab):
    def __init__(self, hosts=2):
        require("cc", "c++", "setpriv", "unshare", "nsenter", "strace", "bindfs")
        if not pathlib.Path("/dev/fuse").exists():
            raise Missing("there is no /dev/fuse")
        super().__init__()
        self.hosts = [NamespaceHost(self, number) for number in range(1, hosts + 1)]


def kill_a_handover(storage, one, two, call, step):
    """Guest db goes from actor one to actor two, whose process is killed at the so-manieth call of that name while it takes
    over: the image, the state that names the handover, and what became of it."""
    image = storage.image()
    one.ok("register", "db", 1, image)
    one.ok("acquire", "db")
    state = one.ok("inquire", "db")
    two.ok("register", "db", 1, image)
    one.ok("release", "db")
    with two.accident(call, step, "KILL"):
        acquired = two.ask("acquire", "db", state)
    return image, state, acquired


def prompt(hosts):
    """"1 uname -a" runs a command on host 1; "cut 1", "heal 1", "freeze 1", "thaw 1", "kill 1", "boot 1"."""
    with Lab(hosts) as lab:
        start = time.monotonic()
        lab.boot()
        print(f"{hosts} hosts after {time.monotonic() - start:.0f} s; {lab.dir}\n{prompt.__doc__}", flush=True)
        for line in sys.stdin:
            first, _, rest = line.strip().partition(" ")
            try:
                if first.isdigit():
                    print(lab.hosts[int(first) - 1].run(rest), flush=True)
                elif first == "boot":
                    lab.boot(lab.hosts[int(rest) - 1])
                elif first in ("cut", "heal", "freeze", "thaw", "kill"):
                    getattr(lab.hosts[int(rest) - 1], first)()
            except (AssertionError, OSError, ValueError, IndexError) as problem:
                print(problem, flush=True)


if __name__ == "__main__":
    prompt(int(sys.argv[1]) if len(sys.argv) > 1 else 3)

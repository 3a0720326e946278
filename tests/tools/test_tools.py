# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""The leasehold command against real programs that use real images."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))
from documents import documented  # noqa: E402

LEASEHOLD = str(pathlib.Path(os.environ.get("LEASEHOLD_PLUGIN_DIR", "build/plugin")).parent / "tools" / "leasehold")
PATIENCE = 120  # seconds, for a machine that does other things as well
REFUSED, CANNOT_EXECUTE, NO_COMMAND = 75, 126, 127


def call(*words, **options):
    return subprocess.run([LEASEHOLD, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, **options)


def typed(command, *options, **places):
    """A printed command of leasehold's, typed; with other options in the end, where `--` lets it."""
    program, *words = documented(command, **places)
    assert program == "leasehold"
    return call(*words, *options)


def inspect(image):
    result = call("inspect", "--json", image)
    assert result.returncode == 0, result
    return json.loads(result.stdout)["images"][0]


def wait_until(condition, limit=PATIENCE):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@contextlib.contextmanager
def running(*words, **options):
    process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def loop_device():
    """loop_device(file): a device of that file, for one test."""
    with contextlib.ExitStack() as devices:
        def attach(file):
            found = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True)
            if found.returncode != 0:
                pytest.skip(f"no loop devices here: {found.stderr.strip()}")
            device = found.stdout.strip()
            devices.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device
        yield attach


@contextlib.contextmanager
def leased(image, *options):
    """A command that has a lease and waits for the end of its input."""
    with running(LEASEHOLD, "run", *options, image, "--", "cat") as process:
        wait_until(lambda: inspect(image)["leases"])
        yield process


@pytest.fixture
def on_shutdown(tmp_path):
    yield
    assert not list(tmp_path.glob(".leasehold-probe"))


def test_an_image_that_nobody_uses_is_free_for_all(image):
    seen = inspect(image)
    assert seen["leases"] == seen["qemu"] == seen["locks"] == seen["open_without_lock"] == []
    assert seen["qemu_reader"] is seen["qemu_writer"] is None


def guest_of(image, use):
    """A QEMU that has the image as the disk of a guest that never runs."""
    return ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-accel", "tcg", "-monitor", "stdio",
            "-drive", f"file={image},if=virtio,format=raw,readonly={'on' if use == 'reader' else 'off'}"]


def test_qemus_permissions_are_told_in_words_with_the_process(image):
    with running(*guest_of(image, "writer")) as qemu:
        user = wait_until(lambda: inspect(image)["qemu"] and inspect(image)["qemu"][0]["does_not_share"] and
                          inspect(image)["qemu"][0])
        assert (user["pid"], user["elsewhere"]) == (qemu.pid, False)
        assert user["uses"] == ["consistent read", "write"] and user["does_not_share"] == ["write"]
        assert "qemu-system" in user["command"]
        assert f"process {qemu.pid}" in call("inspect", image).stdout


def test_an_image_that_is_exported_by_qemu_nbd_is_known(image, tmp_path):
    with running("qemu-nbd", "-t", "-f", "raw", "-k", tmp_path / "socket", image) as export:
        user = wait_until(lambda: inspect(image)["qemu"] and inspect(image)["qemu"][0]["does_not_share"] and
                          inspect(image)["qemu"][0])
        assert user["pid"] == export.pid and "write" in user["uses"] and "qemu-nbd" in user["command"]


@pytest.mark.parametrize("held", ["writer", "reader"])
@pytest.mark.parametrize("asks", ["writer", "reader"])
def test_what_qemu_would_say_is_what_qemu_says(image, held, asks):
    with running(*guest_of(image, held)):
        wait_until(lambda: any(user["does_not_share"] for user in inspect(image)["qemu"]))
        foretold = inspect(image)["qemu_" + asks] or ""
        said = subprocess.run(guest_of(image, asks), input="quit\n", capture_output=True, text=True, timeout=PATIENCE)
        assert foretold in said.stderr
        assert bool(foretold) == ("Failed to" in said.stderr)


def test_flock_and_its_waiter_are_named(image):
    with running("flock", image, "cat") as holder:
        wait_until(lambda: inspect(image)["locks"])
        with running("flock", image, "true") as waiter:
            locks = wait_until(lambda: [s := inspect(image)["locks"]] and any(x["waiting"] for x in s) and s)
            assert {(lock["type"], lock["waiting"], lock["pid"]) for lock in locks} >= {
                ("flock", False, holder.pid), ("flock", True, waiter.pid)}


def test_posix_locks_on_the_bytes_of_libvirt_and_virtlockd_are_known(image):
    with open(image, "r+b") as file:
        for byte in (0, 1, 7):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
            lock = next(lock for lock in inspect(image)["locks"] if lock["length"] == 1)
            assert lock["type"] == "posix" and lock["pid"] == os.getpid()
            assert lock["purpose"] == {0: "virtlockd", 1: "libvirt-labels", 7: "other"}[byte]
            fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


def test_a_write_lease_is_shown_and_not_broken(image):
    broken = []
    before = signal.signal(signal.SIGIO, lambda *_: broken.append(True))
    descriptor = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert [lock["type"] for lock in inspect(image)["locks"]] == ["lease"]
        assert not broken and fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def test_who_has_it_open_without_a_lock_is_named(image):
    with open(image, "rb"):
        assert [opener["pid"] for opener in inspect(image)["open_without_lock"]] == [os.getpid()]


def test_a_symbolic_link_leads_to_the_image(image, tmp_path):
    (tmp_path / "link").symlink_to(image)
    with leased(image):
        seen = inspect(tmp_path / "link")
        assert seen["target"] == str(image) and len(seen["leases"]) == 1


@pytest.mark.parametrize("what, words", [("nothing", "no such file"), ("fifo", "FIFO"), ("dangling", "symbolic link")])
def test_what_is_no_image_is_refused_in_clear_words_at_once(tmp_path, what, words):
    path = tmp_path / "x"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "dangling":
        path.symlink_to("nowhere")
    result = call("inspect", path)
    assert result.returncode == 1 and words in result.stdout


def test_a_hostile_owner_record_is_printed_harmlessly(image):
    os.setxattr(image, "user.leasehold", b"domain=\x1b[2Jevil\xff\nuuid=00000000-0000-0000-0000-000000000001\n"
                b"incarnation=1\nhost=\x07bell\npid=99999999999999\nsince=-5\n")
    shown = call("inspect", image).stdout
    assert "stale" in shown and "evil" in shown and not any(c in shown for c in "\x1b\x07")
    assert inspect(image)["record"]["current"] is False
    os.setxattr(image, "user.leasehold", b"domain=" + b"x" * 3000)
    assert inspect(image)["record"] is None


def test_a_user_is_told_what_cannot_be_seen(tmp_path):
    open_to_all = pathlib.Path("/tmp") / f"leasehold-tools-{os.getpid()}.img"
    open_to_all.write_bytes(b"")
    try:
        command = f"/tmp/leasehold-tools-{os.getpid()}"
        shutil.copy(LEASEHOLD, command)
        result = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", command, "inspect", open_to_all],
                                capture_output=True, text=True)
        assert result.returncode == 0 and "run this as root" in result.stdout
    finally:
        open_to_all.unlink()
        os.unlink(command)


def test_run_keeps_others_out_and_is_named_to_them(image):
    with leased(image) as first:
        lease = inspect(image)["leases"][0]
        assert (lease["guest"], lease["pid"], lease["mode"], lease["state"], lease["named_by"]) == (
            "leasehold run cat", first.pid, "exclusive", "held", "vessel")
        second = call("run", image, "--", "true")
        assert second.returncode == REFUSED and f"pid {first.pid}" in second.stderr
        assert call("run", "--read-only", image, "--", "true").returncode == REFUSED
    assert call("run", image, "--", "true").returncode == 0


def test_readers_run_side_by_side(image):
    with leased(image, "--read-only"):
        assert call("run", "--read-only", image, "--", "true").returncode == 0
        assert call("run", image, "--", "true").returncode == REFUSED


def test_the_lease_of_run_ends_with_a_command_that_is_killed(image):
    with leased(image) as first:
        first.kill()
        first.wait()
        assert call("run", image, "--", "true").returncode == 0


def test_run_waits_for_an_image(image):
    with leased(image) as first, running(LEASEHOLD, "run", "--wait", "30", image, "--", "echo", "got it") as second:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.7)
        first.kill()
        assert second.wait(PATIENCE) == 0 and "got it" in second.stdout.read()


def test_run_gives_the_status_of_the_command_and_tells_its_own(image):
    assert call("run", image, "--", "sh", "-c", "exit 7").returncode == 7
    assert call("run", image, "--", "/no/such/command").returncode == NO_COMMAND
    assert call("run", image, "--", "/").returncode == CANNOT_EXECUTE
    assert call("run", image.parent / "none", "--", "true").returncode == 125
    assert call("run", image).returncode == 2


def test_qemu_img_works_under_a_lease(tmp_path):
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    result = typed("leasehold run --wait 60 disk.qcow2 -- qemu-img resize disk.qcow2 +10G", disk_qcow2=disk)
    assert result.returncode == 0, result
    told = subprocess.run(["qemu-img", "info", "--output=json", disk], capture_output=True, check=True)
    assert json.loads(told.stdout)["virtual-size"] == (10 << 30) + (1 << 20)


def test_run_refuses_an_image_that_qemu_uses(image):
    with running("qemu-io", "-f", "raw", image):
        wait_until(lambda: inspect(image)["qemu"])
        result = call("run", image, "--", "true")
        assert result.returncode == REFUSED and "qemu-io" in result.stderr


def test_status_lists_leases_by_name_in_every_format(image):
    with leased(image) as first:
        name = "leasehold run cat"
        guest = next(g for g in json.loads(call("status", "--json").stdout)["guests"] if g["pid"] == first.pid)
        lease = guest["leases"][0]
        assert (lease["path"], lease["state"], lease["storage"]["lease"]) == (str(image), "held", "byte-range")
        assert lease["since"] is not None
        table = typed("leasehold status [GUEST]", _GUEST_=guest["uuid"]).stdout
        assert f"{name}\t{first.pid}\t{image}\texclusive\theld" in table and "\x1b" not in table
        assert f'path="{image}"' in call("status", "--prometheus").stdout
    assert call("status", guest["uuid"]).returncode == 1


@pytest.fixture
def of_nobody():
    """An image of the user nobody, and the words with which that user calls the command."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="leasehold-"))
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    for path in (folder, image):
        os.chown(path, 65534, 65534)
    folder.chmod(0o755)
    yield image, ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", shutil.copy(LEASEHOLD, folder)]
    shutil.rmtree(folder)


def test_what_a_user_says_of_himself_does_not_make_him_a_guest(of_nobody):
    """Any process can keep in a socket what a guest keeps there. So root's commands, and libvirtd's messages, believe what
    root has put there, and for the rest the owner record."""
    image, command = of_nobody
    with running(*command, "run", image, "--", "cat") as holder:
        wait_until(lambda: inspect(image)["leases"])
        [lease] = inspect(image)["leases"]
        assert (lease["guest"], lease["pid"], lease["named_by"]) == ("leasehold run cat", holder.pid, "record")
        assert holder.pid not in [guest["pid"] for guest in json.loads(call("status", "--json").stdout)["guests"]]
        seen = subprocess.run([*command, "status", "--json"], capture_output=True, text=True, timeout=60)
        assert holder.pid in [guest["pid"] for guest in json.loads(seen.stdout)["guests"]], seen


def test_of_a_user_s_qemu_root_does_not_say_that_nothing_protects_it(of_nobody):
    image, command = of_nobody
    qemu = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-name", "guest=theirs"]
    with running(*command, "run", image, "--", *qemu) as holder:
        def seen():
            return [guest for guest in json.loads(call("status", "--json").stdout)["guests"]
                    if guest["pid"] == holder.pid and guest["protection"] == "foreign"]
        assert (wait_until(seen)[0]["guest"], seen()[0]["user"]) == (None, 65534)
        result = call("status")
        about_it = [line for line in result.stdout.splitlines() if str(holder.pid) in line]  # others may run here
        assert about_it == [f"(of user 65534)\t{holder.pid}\t-\t-\tforeign"], result
        assert "theirs" not in call("watch", "--once", "--dry-run").stdout
        assert not [finding for finding in json.loads(call("check", "--json").stdout)["findings"]
                    if "theirs" in finding["text"]]


ALONE = """
image=$1 leasehold=$2
shift 2
"$@" run --read-only "$image" -- qemu-system-x86_64 -nodefaults -display none -S -name guest=theirs &
until $leasehold status --json | grep -q '"user": *65534'; do sleep 0.1; done
exec $leasehold status
"""


def test_root_is_not_warned_of_what_a_user_runs(of_nobody):
    """Where nobody else runs anything."""
    image, command = of_nobody
    said = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ALONE, "sh",
                           image, LEASEHOLD, *command], capture_output=True, text=True, timeout=PATIENCE)
    assert said.returncode == 0 and "(of user 65534)" in said.stdout, said


@contextlib.contextmanager
def impostor(command, name, *words):
    """A process of the user nobody whose program is called like that, with these arguments."""
    program = pathlib.Path(command[-1]).parent / name
    shutil.copy("/bin/sh", program)
    with running(*command[:-1], program, "-c", "read line", *words) as process:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program))
        yield process


def test_a_user_s_process_does_not_pass_for_a_guest(of_nobody, conf):
    uuid = "11111111-2222-3333-4444-555555555555"
    with impostor(of_nobody[1], "qemu-system-x86_64", "-name", "guest=prod-db", "-uuid", uuid) as process:
        guests = json.loads(call("status", "--json").stdout)["guests"]
        [seen] = [guest for guest in guests if guest["pid"] == process.pid]
        assert (seen["protection"], seen["user"]) == ("foreign", 65534)
        for words in (["status"], ["status", "--json"], ["status", "--prometheus"], ["watch", "--once", "--dry-run"],
                      ["check"], ["enable", "--dry-run", "--qemu-conf", conf, "--plugin", PLUGIN]):
            result = call(*words)
            assert "prod-db" not in result.stdout + result.stderr and uuid not in result.stdout, result
        assert call("status", "prod-db").returncode == 1
        assert f"(pid {process.pid})" not in call("status").stdout, "it is nothing to complain about"


def test_of_two_pid_files_of_libvirt_the_later_one_is_believed(tmp_path):
    """A libvirtd that was killed has left one, and the number is another guest's by now."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a /run of its own")
    program = tmp_path / "qemu-system-x86_64"
    shutil.copy("/bin/sh", program)
    with running(program, "-c", "read line") as process:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program))
        for earlier, later in (("web", "mail"), ("mail", "web")):
            script = (f"mount -t tmpfs none /run && mkdir -p /run/libvirt/qemu && cd /run/libvirt/qemu && "
                      f"echo {process.pid} | tee {earlier}.pid > {later}.pid && touch -d 2020-01-01 {earlier}.pid && "
                      f"exec {LEASEHOLD} status --json")
            result = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
            [seen] = [guest for guest in json.loads(result.stdout)["guests"] if guest["pid"] == process.pid]
            assert seen["guest"] == later, result


def test_a_user_s_process_does_not_pass_for_the_watcher_or_libvirtd(of_nobody):
    for name, words in (("leasehold", ["watch"]), ("libvirtd", [])):
        with impostor(of_nobody[1], name, *words) as process:
            findings = json.loads(call("check", "--json").stdout)["findings"]
            assert not [each for each in findings if each["about"] in ("watcher", "daemon") and str(process.pid) in each["text"]]


def test_a_reader_of_another_user_is_not_said_to_be_on_another_host(of_nobody):
    """Readers write no owner record, so nobody knows his name; but the storage is this host's alone."""
    image, command = of_nobody
    with running(*command, "run", "--read-only", image, "--", "cat"):
        wait_until(lambda: inspect(image)["leases"])
        refused = call("run", image, "--", "true")
        assert refused.returncode == REFUSED and "another user" in refused.stderr, refused
        for text in (refused.stderr, call("inspect", image).stdout):
            assert "another host" not in text, text


def test_a_user_is_told_why_he_can_have_no_device_in_words_that_he_can_follow(of_nobody, loop_device):
    image, command = of_nobody
    device = loop_device(image)
    node = image.parent / "device"
    os.mknod(node, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
    os.chown(node, 65534, 65534)
    result = subprocess.run([*command, "run", node, "--", "true"], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 125 and "qemu:///system" in result.stderr, result


def test_what_inherits_leases_is_no_guest_of_its_own(image, tmp_path):
    inner = tmp_path / "inner.img"
    inner.write_bytes(bytes(1 << 20))
    with running(LEASEHOLD, "run", image, "--", LEASEHOLD, "run", inner, "--", "sh", "-c", "cat | cat") as first:
        wait_until(lambda: inspect(inner)["leases"])
        for path in (image, inner):
            [lease] = inspect(path)["leases"]
            assert (lease["named_by"], lease["pid"]) == ("vessel", first.pid), "the second one is not where the first is"
        guests = [guest for guest in json.loads(call("status", "--json").stdout)["guests"]
                  if guest["guest"] in ("leasehold run sh", "leasehold run leasehold") and guest["pid"] == first.pid]
        assert sorted(lease["path"] for guest in guests for lease in guest["leases"]) == sorted([str(image), str(inner)])
        text = call("status", "--prometheus").stdout
        series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
        assert len(series) == len(set(series)) and sum(str(image) in each for each in series) == 1, text


def test_who_sees_less_is_told_so(of_nobody):
    command = of_nobody[1]
    for options in ("hidepid=0", "hidepid=1", "hidepid=2"):
        words = ["unshare", "-m", "sh", "-c", f'mount -t proc -o {options} proc /proc && exec "$@"', "sh", *command]
        plain = subprocess.run([*words, "status"], capture_output=True, text=True, timeout=PATIENCE)
        if "mount:" in plain.stderr:
            pytest.skip(f"no mounts here: {plain.stderr}")
        assert plain.returncode == 3 and "run this as root" in plain.stderr, plain
        answer = json.loads(subprocess.run([*words, "status", "--json"], capture_output=True, text=True,
                                           timeout=PATIENCE).stdout)
        assert answer["not_seen"], answer
        assert "leasehold_sees_all 0" in subprocess.run([*words, "status", "--prometheus"], capture_output=True,
                                                        text=True, timeout=PATIENCE).stdout
    assert json.loads(call("status", "--json").stdout)["not_seen"] == []


def test_status_names_a_qemu_without_leases(tmp_path):
    name = f"bare-{os.getpid()}"
    with running("qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-machine", "none", "-name",
                 f"guest={name},debug-threads=on") as qemu:
        guests = wait_until(lambda: [g for g in json.loads(call("status", "--json").stdout)["guests"]
                                     if g["pid"] == qemu.pid])
        assert guests[0]["protection"] == "none"
        result = call("status", name)
        assert result.returncode == 3 and "nothing protects its images" in result.stderr


def test_classify_tells_what_cannot_be_leased(image):
    assert typed("leasehold classify PATH", PATH=image).returncode == 0
    assert call("classify", "/proc/self/status").returncode == 4
    assert typed("leasehold classify PATH...", PATH___=[image, "/no/such"]).returncode == 1
    said = call("classify", "/proc/version")
    assert said.returncode == 4 and "a <readonly/> disk is leased on this host only" in said.stdout
    assert "no lease can be taken" in call("inspect", "/proc/version").stdout


@pytest.mark.parametrize("verb, key", [("classify", "paths"), ("inspect", "images")])
def test_many_are_answered_in_their_order_in_one_process(tmp_path, verb, key):
    """One process for each would take minutes for a host's images."""
    paths = [tmp_path / str(i) for i in range(400)]
    for path in paths:
        path.touch()
    paths[200].unlink()
    log = tmp_path / "log"
    result = subprocess.run(["strace", "-f", "-o", log, "-e", "trace=clone,clone3,fork,vfork", LEASEHOLD, verb, "--json",
                             *paths], capture_output=True, text=True) if shutil.which("strace") else call(verb, "--json", *paths)
    found = json.loads(result.stdout)[key]
    assert [entry["path"] for entry in found] == [str(path) for path in paths]
    assert [i for i, entry in enumerate(found) if entry.get("error")] == [200]
    assert not log.exists() or sum("clone" in line or "fork" in line for line in log.read_text().splitlines()) <= 3


@pytest.mark.parametrize("text, lease", [("file_lockspace_dir = '{dir}'", "lease-file"),
                                         ("storage_locks = [ '{dir}=flock' ]", "file-set")])
def test_leases_that_are_not_on_the_image_are_found_where_the_configuration_says(image, tmp_path, text, lease):
    tmp_path.chmod(0o700)
    conf = tmp_path / "leasehold.conf"
    conf.write_text(text.replace("{dir}", str(tmp_path)) + "\n")
    def look():
        return json.loads(call("inspect", "--json", "--config", conf, image).stdout)["images"][0]
    # Who vouches for flock says that QEMU's own locks stay on their hosts.
    assert look()["leases"] == [] and all("QEMU's own locks on other hosts" in words for words in look()["not_seen"])
    unused = call("classify", "--config", conf, image)
    assert unused.returncode == 0 and "leases hold for" in unused.stdout, unused
    with running(LEASEHOLD, "run", "--config", conf, image, "--", "cat") as holder:
        wait_until(lambda: look()["leases"])
        [found] = look()["leases"]
        assert (found["guest"], found["pid"], found["state"]) == ("leasehold run cat", holder.pid, "held")
        assert str(tmp_path) in look()["lease_file"]
        guest = next(g for g in json.loads(call("status", "--json").stdout)["guests"] if g["pid"] == holder.pid)
        assert [lease_["medium"] for lease_ in guest["leases"]] == [lease]
        assert lease in call("classify", "--config", conf, image).stdout
        assert call("run", "--config", conf, image, "--", "true").returncode == REFUSED
    assert look()["leases"] == []


def test_a_block_device_is_inspected_with_its_lease_of_this_host(image, loop_device):
    path = loop_device(image)
    seen = inspect(path)
    assert (seen["kind"], seen["leases"]) == ("block", [])
    assert "this host only" in call("classify", path).stdout
    with running(LEASEHOLD, "run", path, "--", "cat") as holder:
        wait_until(lambda: inspect(path)["leases"])
        [lease] = inspect(path)["leases"]
        assert (lease["guest"], lease["pid"]) == ("leasehold run cat", holder.pid)
        assert "lease" in inspect(path)["lease_file"]
        said, classified = call("inspect", path).stdout, call("classify", "--json", path).stdout
        assert "no lease can be taken" not in said and "no guest can have it" not in said, said
        facts = json.loads(classified)["paths"][0]
        assert facts.pop("path") == path and facts.pop("error") is None and inspect(path)["storage"] == facts, "they say the same"


@pytest.mark.parametrize("what, text, words", [
    ("device", "require_cluster_leases = 1", "require_cluster_leases forbids it"),
    ("device", "file_lockspace_dir = '{dir}/nowhere'", "does not exist"),
    ("image", "storage_locks = [ '{dir}=refuse' ]", "the administrator refuses leases there")])
def test_what_the_configuration_refuses_is_refused_by_inspect_as_by_classify(image, loop_device, tmp_path, what, text,
                                                                              words):
    conf, path = tmp_path / "leasehold.conf", loop_device(image) if what == "device" else image
    conf.write_text(text.replace("{dir}", str(tmp_path)) + "\n")
    seen = json.loads(call("inspect", "--json", "--config", conf, path).stdout)["images"][0]
    facts = json.loads(call("classify", "--json", "--config", conf, path).stdout)["paths"][0]
    assert seen["storage"] == {key: facts[key] for key in seen["storage"]} and facts["lease"] == "none", facts
    [advice] = [each for each in seen["next"] if "no guest can have it for writing" in each]
    assert words in facts["note"] and facts["note"] in advice, advice


def test_check_finds_a_lockspace_that_is_not_there_or_not_shared(tmp_path):
    conf = tmp_path / "leasehold.conf"
    def lockspace(text):
        conf.write_text(text)
        findings = json.loads(call("check", "--json", "--config", conf).stdout)["findings"]
        return [(found["level"], found["text"]) for found in findings if found["about"] == "lockspace"]
    [(level, text)] = lockspace(f'file_lockspace_dir = "{tmp_path}"\n')
    assert level == "problem" and "is it mounted?" in text and str(tmp_path) in text
    [(level, text)] = lockspace(f'lvm_lockspace_dir = "{tmp_path}"\nsingle_host = 1\n')
    assert level == "ok"
    [(level, text)] = lockspace(f'scsi_lockspace_dir = "{tmp_path}/nowhere"\n')
    assert level == "problem" and "no such file" in text
    assert lockspace("") == []


def test_a_refusal_and_inspect_name_the_layer_that_the_other_has(image, loop_device):
    path = loop_device(image)
    with running(LEASEHOLD, "run", path, "--", "cat"):
        wait_until(lambda: inspect(path)["leases"])
        layer = f"the file '{image}', which '{path}' is on"
        assert layer in call("run", image, "--", "true").stderr
        assert inspect(image)["leases"][0]["layer"] == layer
        assert f"using {layer}" in call("inspect", image).stdout


def test_check_reports_the_worst(tmp_path):
    def finding(about, **options):
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        result = call("check", "--json", *words)
        findings = json.loads(result.stdout)
        assert result.returncode == {"ok": 0, "warning": 3, "problem": 4}[findings["worst"]]
        return next(f["level"] for f in findings["findings"] if f["about"] == about)

    conf = tmp_path / "qemu.conf"
    conf.write_text('#lock_manager = "leasehold"\nlock_manager = "lockd"\n')
    assert finding("lock_manager", qemu_conf=conf) == "problem"
    conf.write_text('lock_manager = "leasehold"\n')
    assert finding("lock_manager", qemu_conf=conf) == "ok"
    settings = tmp_path / "leasehold.conf"
    settings.write_text("nonsense = 1\n")
    assert finding("configuration", config=settings) == "problem"
    plugin = pathlib.Path(os.environ.get("LEASEHOLD_PLUGIN_DIR", "build/plugin")) / "leasehold.so"
    assert finding("plugin", plugin=plugin) == "ok"
    other = tmp_path / "leasehold.so"
    other.write_bytes(plugin.read_bytes().replace(b"plugin-version=0", b"plugin-version=9"))
    assert finding("plugin", plugin=other) == "problem"


def probe_both(first_directory, second_directory):
    with running(LEASEHOLD, *documented("leasehold probe DIR", DIR=first_directory)[1:], "--json", "--wait", "30") as first:
        wait_until(lambda: (pathlib.Path(first_directory) / ".leasehold-probe").exists())
        second = call("probe", "--json", second_directory)
        first.wait(PATIENCE)
        one, two = json.loads(first.stdout.read()), json.loads(second.stdout)
        assert one["ofd_crosses"] == two["ofd_crosses"] and first.returncode == second.returncode
        return second.returncode, two


def test_probe_sees_locks_cross_and_a_dead_holder_forgotten(tmp_path, on_shutdown):
    status, result = probe_both(tmp_path, tmp_path)
    assert status == 0 and result["same_host"] is True
    assert all(result[key] for key in ("flock_crosses", "ofd_crosses", "ofd_high_crosses", "locks_seen",
                                       "read_locks_seen", "dead_holder_forgotten"))


def test_probe_sees_that_locks_do_not_cross_a_mount(tmp_path):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here")
    (tmp_path / "real").mkdir()
    (tmp_path / "mount").mkdir()
    subprocess.run(["bindfs", tmp_path / "real", tmp_path / "mount"], check=True)
    try:
        status, result = probe_both(tmp_path / "real", tmp_path / "mount")
        assert status == 4 and not result["ofd_crosses"] and not result["flock_crosses"]
        assert result["dead_holder_forgotten"] is None
    finally:
        subprocess.run(["umount", tmp_path / "mount"], check=True)


@contextlib.contextmanager
def stoppable_storage(tmp_path):
    """A file system that can be stopped, and the configuration that trusts it: (server, mount point, configuration)."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE here")
    real, mount, config = tmp_path / "real", tmp_path / "mount", tmp_path / "leasehold.conf"
    real.mkdir()
    mount.mkdir()
    config.write_text(f'storage_locks = [ "{mount}=ofd" ]\n')
    with running("bindfs", "-f", real, mount) as server:
        wait_until(lambda: os.path.ismount(mount))
        try:
            yield server, mount, config
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", mount], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", [["status", "--timeout", "1"], ["check", "--timeout", "1"],
                                  ["watch", "--once", "--dry-run", "--timeout", "1"]])
def test_what_no_mount_table_shows_is_not_waited_for(tmp_path, verb):
    with stoppable_storage(tmp_path) as (server, mount, config):
        image = mount / "disk.img"
        image.write_bytes(b"data")
        with running(LEASEHOLD, "run", "--config", config, image, "--", "cat") as command:
            wait_until(lambda: command.pid in {guest["pid"] for guest in json.loads(call("status", "--json").stdout)["guests"]})
            subprocess.run(["umount", "-l", mount], check=True)
            server.send_signal(signal.SIGSTOP)
            call(*verb)  # an answer comes, whatever it is
            server.send_signal(signal.SIGCONT)


def test_probe_alone_says_so(tmp_path, on_shutdown):
    result = call("probe", "--wait", "1", tmp_path)
    assert result.returncode == 5 and "nobody came" in result.stdout


def trap_of_another_user(place, victim):
    place.mkdir()
    (place / "second").symlink_to(victim)
    os.mkfifo(place / "first")
    for path in (place, place / "second", place / "first"):
        os.chown(path, 65534, 65534, follow_symlinks=False)


def trap_by_a_link(place, victim):
    place.symlink_to(victim.parent)


def trap_that_all_may_change(place, victim):
    place.mkdir()
    (place / "second").symlink_to(victim)
    place.chmod(0o777)


def trap_of_hard_links(place, victim):
    place.mkdir(mode=0o700)
    for name in ("first", "second"):
        os.link(victim, place / name)


@pytest.mark.parametrize("set_trap", [trap_of_another_user, trap_by_a_link, trap_that_all_may_change,
                                      trap_of_hard_links])
def test_probe_touches_nothing_that_others_have_put_there(tmp_path, set_trap):
    victims = tmp_path / "victims"
    victims.mkdir()
    victim = victims / "second"
    victim.write_text("precious")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    set_trap(shared / ".leasehold-probe", victim)
    before = sorted(os.listdir(shared / ".leasehold-probe"))
    result = call("probe", "--wait", "1", shared)
    assert result.returncode == 1 and "cannot be used" in result.stderr and "remove it" in result.stderr
    assert victim.read_text() == "precious" and os.listdir(victims) == ["second"]
    assert sorted(os.listdir(shared / ".leasehold-probe")) == before


def test_probe_removes_what_one_that_was_killed_has_left(tmp_path, on_shutdown):
    with running(LEASEHOLD, "probe", "--wait", "30", tmp_path) as first:
        wait_until(lambda: (tmp_path / ".leasehold-probe" / "first").exists())
        first.kill()
    assert call("probe", "--wait", "1", tmp_path).returncode == 5


# --- enable and disable: on a copy of the file that libvirt ships

SHIPPED = pathlib.Path("/etc/libvirt/qemu.conf")
PLUGIN = pathlib.Path(LEASEHOLD).parent.parent / "plugin" / "leasehold.so"
LINE = 'lock_manager = "leasehold"\n'


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "qemu.conf"
    path.write_bytes(SHIPPED.read_bytes())
    path.chmod(0o640)
    return path


def enable(conf, *words):
    return call("enable", "--force", "--qemu-conf", conf, "--plugin", PLUGIN, "--config", "/nonexistent", *words)


def disable(conf, *words):
    return call("disable", "--force", "--qemu-conf", conf, *words)


needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip (iproute2)")


@needs_root
def test_a_host_whose_mounts_cannot_be_read_has_not_told_its_storage():
    result = subprocess.run(["unshare", "-m", "-n", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", LEASEHOLD,
                             "fenced", "dead", "--address", "192.0.2.77", "--i-made-sure-it-is-off"],
                            capture_output=True, text=True, timeout=PATIENCE)
    if "mount:" in result.stderr or "unshare:" in result.stderr:
        pytest.skip(f"no mounts here: {result.stderr}")
    assert result.returncode == 1 and "mounts of this host cannot be read" in result.stderr, result


FULL = """
mount --bind "$1" /proc/$$/mountinfo && ip link add d0 type veth peer d1 && ip addr add 198.51.100.1/24 dev d0 &&
    ip link set d0 up && trap '' XFSZ && ulimit -f 0 && shift && exec "$@"
"""


@needs_root
def test_a_server_that_cannot_be_told_leaves_nothing_in_run(tmp_path):
    """What it is told is written to /run first, which has no room."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text("30 1 0:50 / /mnt rw - nfs 198.51.100.3:/x rw,vers=3,addr=198.51.100.3\n")
    result = subprocess.run(["unshare", "-m", "-n", "sh", "-c", FULL, "sh", mounts, LEASEHOLD, "fenced", "dead",
                             "--address", "198.51.100.77", "--i-made-sure-it-is-off"], capture_output=True, text=True,
                            timeout=PATIENCE)
    if "leasehold" not in result.stderr + result.stdout:
        pytest.skip(f"no mounts or links here: {result.stderr}")
    assert result.returncode == 1 and "cannot write" in result.stdout, result
    assert not [*pathlib.Path("/run").glob("leasehold-fenced-*")], result


@needs_root
@pytest.mark.parametrize(("host", "words"), [
    (os.uname().nodename, "is this host"), ("127.0.0.1", "is this host"), ("no.such.host.invalid", "nobody knows")])
def test_who_was_fenced_is_a_known_host_and_another_one(host, words):
    result = typed("leasehold fenced HOST --i-made-sure-it-is-off", HOST=host)
    assert (result.returncode, result.stdout) == (1, "") and words in result.stderr, result
    result = typed("leasehold fenced HOST", HOST=host)
    assert result.returncode == 1 and words in result.stderr, result


ALERT = pathlib.Path(__file__).resolve().parents[2] / "packaging" / "pacemaker" / "leasehold_fenced.sh"


@pytest.mark.parametrize("change, told", [
    ({}, True), ({"CRM_alert_task": "reboot"}, True),
    ({"CRM_alert_rc": "1"}, False), ({"CRM_alert_task": "on"}, False), ({"CRM_alert_kind": "node"}, False),
    ({"CRM_alert_node": os.uname().nodename}, False), ({"CRM_alert_kind": None}, False)], ids=str)
def test_pacemaker_s_alert_tells_storage_of_a_node_that_was_fenced_and_of_nothing_else(tmp_path, change, told):
    """What Pacemaker sets is in its documentation, "Writing an Alert Agent"; sudo(8) and logger(1) only note here what
    they were told."""
    for program, status in (("sudo", 3), ("logger", 0)):
        stand_in = tmp_path / program
        stand_in.write_text(f'#!/bin/sh\necho "$0" "$@" >>{tmp_path}/told\necho some words\nexit {status}\n')
        stand_in.chmod(0o755)
    says = {"CRM_alert_kind": "fencing", "CRM_alert_node": "alpha", "CRM_alert_task": "off", "CRM_alert_rc": "0"} | change
    result = subprocess.run(["sh", ALERT], timeout=PATIENCE, check=False, env={
        "PATH": f"{tmp_path}:{os.environ['PATH']}", **{key: value for key, value in says.items() if value is not None}})
    written = tmp_path / "told"
    lines = written.read_text().splitlines() if written.exists() else []
    assert result.returncode == (3 if told else 0)
    assert lines == ([f"{tmp_path}/sudo -n leasehold fenced --i-made-sure-it-is-off alpha",
                      f"{tmp_path}/logger -t leasehold fenced 'alpha', exit status 3: some words"] if told else [])


@contextlib.contextmanager
def network():
    """Words that run a command in a network of its own."""
    with running("unshare", "--net", "sh", "-c", "ip link set lo up; echo here; exec sleep infinity") as there:
        assert there.stdout.readline() == "here\n"
        yield ["nsenter", "-t", str(there.pid), "-n"]


@needs_root
def test_a_host_that_lets_nothing_through_but_answers_for_its_address_lives():
    address = "198.51.100.2"  # RFC 5737, for documentation
    with network() as here, network() as there:
        def run(where, command):
            return subprocess.run([*where, *command.split()], capture_output=True, text=True, timeout=PATIENCE,
                                  check=False)

        def ok(where, command):
            result = run(where, command)
            assert result.returncode == 0, result
        ok(here, f"ip link add name eth0 type veth peer name eth0 netns {there[2]}")
        ok(here, "ip addr add 198.51.100.1/30 dev eth0")
        ok(here, "ip link set eth0 up")
        fenced = f"{LEASEHOLD} fenced {address} --i-made-sure-it-is-off"
        result = run(here, fenced)
        assert (result.returncode, result.stderr) == (0, ""), result
        ok(there, f"ip addr add {address}/30 dev eth0")
        ok(there, "ip link set eth0 up")
        result = run(here, fenced)
        assert result.returncode == REFUSED and "lives" in result.stderr, result
        ok(there, "ip route add blackhole 198.51.100.1")
        result = run(here, fenced)
        assert result.returncode == REFUSED and f"{address} answers for its address" in result.stderr, result


def test_enable_adds_one_line_behind_its_explanation_and_disable_takes_it_away(conf):
    shipped = conf.read_text()
    result = enable(conf)
    assert result.returncode == 0, result
    assert "+ " + LINE in result.stdout and "every host" in result.stdout
    example = '#lock_manager = "lockd"\n'
    assert conf.read_text() == shipped.replace(example, example + LINE)
    assert conf.stat().st_mode & 0o777 == 0o640
    assert "already" in enable(conf).stdout
    result = disable(conf)
    assert result.returncode == 0 and "- " + LINE in result.stdout
    assert conf.read_text() == shipped
    assert "is not the lock manager" in disable(conf).stdout


def test_enable_replaces_another_lock_manager_and_leaves_no_second_line(conf):
    conf.write_text('# ours\nlock_manager = "lockd"\nvnc_tls = 1\nlock_manager="sanlock"\n')
    result = enable(conf)
    assert result.returncode == 0 and '- lock_manager = "lockd"' in result.stdout
    assert conf.read_text() == '# ours\nlock_manager = "leasehold"\nvnc_tls = 1\n'


def test_disable_takes_every_line_that_libvirt_could_take(conf):
    conf.write_text('lock_manager = "leasehold"\nvnc_tls = 1\nlock_manager = "leasehold"\n')
    assert disable(conf).returncode == 0
    assert conf.read_text() == "vnc_tls = 1\n"


def test_a_last_line_without_an_end_is_no_obstacle(conf):
    conf.write_text("vnc_tls = 1")
    result = enable(conf)
    assert result.returncode == 0, result
    assert conf.read_text() == 'vnc_tls = 1\n' + LINE


def test_disable_leaves_another_lock_manager_alone(conf):
    conf.write_text('lock_manager = "sanlock"\n')
    result = disable(conf)
    assert result.returncode == 0 and "sanlock" in result.stdout
    assert conf.read_text() == 'lock_manager = "sanlock"\n'


def test_dry_run_shows_the_change_and_makes_none(conf):
    before = conf.read_bytes()
    result = enable(conf, "--dry-run")
    assert result.returncode == 0 and "+ " + LINE in result.stdout and "Nothing was changed" in result.stdout
    assert conf.read_bytes() == before


def test_a_file_that_augeas_does_not_understand_is_left_alone_and_the_line_is_named(conf):
    text = 'vnc_tls = 1\nlock_manager = leasehold\n'
    conf.write_text(text)
    result = enable(conf)
    assert result.returncode == 1 and f"{conf}: line 2 is not understood" in result.stderr and LINE.strip() in result.stderr
    assert conf.read_text() == text


def test_enable_refuses_what_would_keep_libvirtd_from_starting(conf, tmp_path):
    before = conf.read_bytes()
    broken = tmp_path / "broken.conf"
    broken.write_text("handoff_wait = 5\nqemu_lock = 3\n")
    result = enable(conf, "--config", broken)
    assert result.returncode == 1 and f"{broken}:2" in result.stderr
    for plugin, part in ((tmp_path / "none.so", "none.so"), (broken, "version unknown")):
        result = enable(conf, "--plugin", plugin)
        assert result.returncode == 1 and part in result.stderr, result
    assert conf.read_bytes() == before


def test_a_file_that_cannot_be_written_is_an_error_and_stays_as_it_is(conf):
    if subprocess.run(["chattr", "+i", conf], capture_output=True).returncode != 0:
        pytest.skip("chattr +i does not work here")
    try:
        result = enable(conf)
        assert result.returncode == 1 and "cannot be written" in result.stderr, result
    finally:
        subprocess.run(["chattr", "-i", conf], check=True)
    assert conf.read_bytes() == SHIPPED.read_bytes()


def test_a_linked_file_stays_a_link(conf, tmp_path):
    link = tmp_path / "link.conf"
    link.symlink_to(conf)
    assert enable(link).returncode == 0
    assert link.is_symlink() and LINE in conf.read_text()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["inspect"], ["status", "--nonsense"], ["status", "a", "b"],
                                   ["probe"], ["run", "--", "true"], ["status", "--json", "--prometheus"],
                                   ["enable", "now"], ["disable", "--qemu-conf", "relative"]])
def test_wrong_usage_has_a_status_of_its_own_and_one_line(words):
    result = call(*words)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--help" in result.stderr + "--help"

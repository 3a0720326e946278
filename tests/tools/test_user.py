# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""What the command says when something is in the way: the way out that there is, with the path."""

import json
import pathlib
import resource
import shutil
import subprocess

import pytest
from test_tools import (LEASEHOLD, PLUGIN, REFUSED, call, conf, documented, enable, image, leased, of_nobody,  # noqa: F401
                        running, wait_until)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def as_nobody(of_nobody, *words):  # noqa: F811
    return subprocess.run([*of_nobody[1], *map(str, words)], capture_output=True, text=True, timeout=60)


def test_a_user_is_told_to_be_root_or_only_to_read(of_nobody, tmp_path):  # noqa: F811
    disk, _ = of_nobody
    shutil.chown(disk, "root", "root")
    disk.chmod(0o644)
    written = as_nobody(of_nobody, "run", disk, "--", "true")
    assert written.returncode == 125 and str(disk) in written.stderr
    assert "run this as root" in written.stderr and "--read-only" in written.stderr
    assert as_nobody(of_nobody, "run", "--read-only", disk, "--", "true").returncode == 0
    disk.chmod(0o600)
    unread = as_nobody(of_nobody, "run", "--read-only", disk, "--", "true")
    assert "run this as root" in unread.stderr and str(disk) in unread.stderr and "--read-only" not in unread.stderr


def test_enable_and_check_tell_a_user_to_be_root(of_nobody):  # noqa: F811
    folder = of_nobody[0].parent
    qemu = folder / "qemu.conf"
    qemu.write_text("vnc_tls = 1\n")
    qemu.chmod(0o600)
    words = ("--qemu-conf", qemu, "--config", "/nonexistent", "--plugin", PLUGIN)
    shutil.copy(PLUGIN, folder / "leasehold.so")
    words = (*words[:-1], folder / "leasehold.so")
    refused = as_nobody(of_nobody, "enable", *words)
    assert refused.returncode == 1 and "run this as root" in refused.stderr.lower() and str(qemu) in refused.stderr
    findings = json.loads(as_nobody(of_nobody, "check", "--json", *words).stdout)["findings"]
    assert [each["remedy"] for each in findings if each["about"] == "lock_manager"] == ["run this as root"]


def test_run_takes_more_images_than_the_shell_lets_have_files_open(tmp_path):
    disks = [tmp_path / f"{number}.img" for number in range(2000)]
    for disk in disks:
        disk.touch()

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 10000:
        pytest.skip("the hard limit does not allow it")
    result = call(*documented("leasehold run IMAGE... -- COMMAND", IMAGE___=disks, COMMAND=["sh", "-c", "ulimit -Sn"])[1:],
                  preexec_fn=limit)
    assert (result.returncode, result.stdout) == (0, "1024\n"), result.stderr[-500:]


def test_who_would_read_the_image_of_a_running_guest_is_told_how(image):  # noqa: F811
    with leased(image):
        refused = call("run", "--read-only", image, "--", "true")
        assert refused.returncode == REFUSED
        for way in ("virsh backup-begin", "virsh snapshot-create-as", "run --read-only"):
            assert way in refused.stderr
        assert "backup-begin" not in call("run", image, "--", "true").stderr


def test_a_link_that_leads_nowhere_and_lines_of_windows_are_named(conf, tmp_path):  # noqa: F811
    link = tmp_path / "link.conf"
    link.symlink_to(tmp_path / "nowhere")
    result = enable(link)
    assert result.returncode == 1 and f"{link} is a symbolic link to a file that does not exist" in result.stderr
    assert not (tmp_path / "nowhere").exists()
    text = b"vnc_tls = 1\r\n"
    conf.write_bytes(text)
    result = enable(conf)
    assert result.returncode == 1 and "CR LF" in result.stderr and f"sed -i 's/\\r$//' {conf}" in result.stderr
    assert conf.read_bytes() == text


def test_a_new_qemu_conf_has_the_rights_of_libvirt_s_own(tmp_path):
    fresh = tmp_path / "qemu.conf"
    result = enable(fresh)
    assert result.returncode == 0, result
    assert fresh.read_text() == 'lock_manager = "leasehold"\n' and fresh.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["files", "sets"])
def test_a_full_lockspace_is_named_with_its_option_and_the_image(image, tmp_path, kind):  # noqa: F811
    lockspace, settings = tmp_path / "full", tmp_path / "leasehold.conf"
    lockspace.mkdir(mode=0o700)
    # No room for a file, then none for what is written into it.
    for limit in ("nr_inodes=1", "size=4k"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,{limit}", "none", lockspace], check=True)
        try:
            if limit.startswith("size"):
                (lockspace / "filler").write_bytes(bytes(4096))
            settings.write_text(f'file_lockspace_dir = "{lockspace}"\n' +
                                (f'storage_locks = [ "{lockspace}=flock" ]\n' if kind == "sets" else ""))
            said = call("run", "--config", settings, image, "--", "true").stderr
            for word in (str(image), str(lockspace), "file_lockspace_dir", "make room there"):
                assert word in said, said
        finally:
            subprocess.run(["umount", lockspace], check=True)


def test_what_is_asked_for_in_other_words(image):  # noqa: F811
    assert call("-V").stdout == call("--version").stdout
    assert call("help", "status").stdout == call("status", "--help").stdout
    for words in (["help", "status", "more"], ["help", "nonsense"], ["status", "--timeout", "0"]):
        result = call(*words)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result


def test_status_has_the_table_on_stdout_and_remarks_on_stderr(tmp_path):
    with running("qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-machine", "none", "-name",
                 "guest=bare one,debug-threads=on") as qemu:
        wait_until(lambda: f"(pid {qemu.pid})" in call("status").stderr)
        result = call("status")
        rows = [line.split("\t") for line in result.stdout.splitlines()]
        assert rows[0][:2] == ["GUEST", "PID"] and ["bare one", str(qemu.pid), "-", "-", "none"] in rows
        assert all(len(row) > 2 for row in rows) and "nothing protects" in result.stderr


# What may be written in the configuration may be read by augeas, too, and what may not, not.
@pytest.mark.parametrize("text, fine", [
    ("handoff_wait = +5\n", True), ("handoff_wait=05 # five\n", True), ("handoff_wait = 61\n", False),
    ("qemu_locks = 'warn'\n", True), ('qemu_locks = "warn\'\n', False), ("  qemu_locks\t=\t'warn'\t\r\n", True),
    ("storage_locks = [ '/a=ofd', \"/b=flock\", ]\n", True), ("storage_locks = [ '/a=ofd',, ]\n", False),
    ("storage_locks = [ # ours\n '/a=ofd', # here\n # all\n]\n", True), ("storage_locks = [\n]\n", True),
    ("storage_locks = [ '/a=ofd' # no comma\n '/b=ofd' ]\n", False), ("#\n# \n\n \n#handoff_wait = 5\n", True),
])
def test_augeas_reads_what_leasehold_reads(tmp_path, text, fine):
    settings, module = tmp_path / "leasehold.conf", tmp_path / "wanted.aug"
    settings.write_text(text, newline="")
    read = call("classify", "--config", settings, tmp_path)
    assert (read.returncode == 0) == fine, read
    if not shutil.which("augparse"):
        pytest.skip("augparse (augeas-tools) is not installed")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    module.write_text(f'module Wanted =\n  test Libvirt_leasehold.lns get "{quoted}" = ' + ("?\n" if fine else "*\n"),
                      newline="")
    parsed = subprocess.run(["augparse", "-I", ROOT / "conf", module], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed

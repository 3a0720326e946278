# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""What monitoring reads: metrics, by Prometheus' own tools; the journal's fields; JSON, by its schema."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import urllib.request

import pytest
from test_tools import (LEASEHOLD, call, image, inspect, leased, running, stoppable_storage, typed,  # noqa: F401
                        wait_until)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MONITORING = ROOT / "packaging" / "monitoring"
EXPORTER = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")


def promtool(*words, **options):
    if not shutil.which("promtool"):
        pytest.skip("promtool (Debian: prometheus) is not installed")
    return subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, **options)


def textfile_of(tmp_path):
    path = tmp_path / "leasehold.prom"
    result = typed("leasehold watch --textfile /var/lib/prometheus/node-exporter/leasehold.prom", "--once", "--dry-run",
                   _var_lib_prometheus_node_exporter_leasehold_prom=path)
    assert "metrics" not in result.stdout, result
    return path


@pytest.fixture
def lost(tmp_path):
    """A command whose lease has been deleted from its lockspace."""
    lockspace, disk = tmp_path / "leases", tmp_path / "lost.img"
    lockspace.mkdir(mode=0o700)
    disk.write_bytes(bytes(1 << 20))
    conf = tmp_path / "leasehold.conf"
    conf.write_text(f'file_lockspace_dir = "{lockspace}"\n')
    with running(LEASEHOLD, "run", "--config", conf, disk, "--", "cat") as holder:
        [lease] = wait_until(lambda: list(lockspace.iterdir()))
        # Until it is the command that holds it.
        wait_until(lambda: pathlib.Path(f"/proc/{holder.pid}/comm").read_text() == "cat\n")
        lease.unlink()
        yield disk, holder.pid


def test_promtool_finds_nothing_wrong_with_the_metrics(image, lost, tmp_path):  # noqa: F811
    with leased(image):
        for text in (call("status", "--prometheus").stdout, textfile_of(tmp_path).read_text()):
            said = promtool("check", "metrics", input=text)
            assert said.returncode == 0 and not said.stdout + said.stderr, said
            assert f'path="{image}"' in text and "leasehold_build_info{version=" in text


def test_each_lease_is_a_series_of_its_own(image, tmp_path):  # noqa: F811
    """Also of those that are called alike."""
    with leased(image, "--read-only") as first, leased(image, "--read-only") as second:
        wait_until(lambda: len(inspect(image)["leases"]) == 2)
        for text in (call("status", "--prometheus").stdout, textfile_of(tmp_path).read_text()):
            for pid in (first.pid, second.pid):
                assert len(re.findall(f'^leasehold_lease{{.*pid="{pid}".*path="{image}"', text, re.MULTILINE)) == 1


def test_a_lost_lease_is_in_the_metrics(lost, tmp_path):
    disk, pid = lost
    text = textfile_of(tmp_path).read_text()
    assert re.search(f'^leasehold_lease_lost{{.*pid="{pid}",path="{disk}"}} 1', text, re.MULTILINE), text
    assert re.search(f'^leasehold_guest_lost_leases{{.*pid="{pid}"}} 1', text, re.MULTILINE), text


def test_a_lease_on_storage_that_does_not_answer_is_silent_in_the_metrics(tmp_path):
    with stoppable_storage(tmp_path) as (server, mount, config):
        disk, path = mount / "disk.img", tmp_path / "leasehold.prom"
        disk.write_bytes(b"data")
        with running(LEASEHOLD, "run", "--config", config, disk, "--", "cat") as command:
            wait_until(lambda: f"\t{command.pid}\t" in call("status").stdout)
            server.send_signal(signal.SIGSTOP)
            call("watch", "--once", "--dry-run", "--timeout", "1", "--textfile", path)
            assert re.search(f'^leasehold_lease_silent{{.*pid="{command.pid}",path="{disk}"}} 1', path.read_text(), re.MULTILINE)
            server.send_signal(signal.SIGCONT)


def test_hostile_names_do_not_spoil_the_metrics(tmp_path):
    disk = tmp_path / 'a "quoted"\\\n name.img'
    disk.write_bytes(bytes(1 << 20))
    with running(LEASEHOLD, "run", disk, "--", "cat") as holder:
        wait_until(lambda: str(holder.pid) in call("status", "--prometheus").stdout)
        said = promtool("check", "metrics", input=call("status", "--prometheus").stdout)
        assert said.returncode == 0, said


def test_a_real_node_exporter_serves_the_textfile_of_the_watcher(image, tmp_path):  # noqa: F811
    if not EXPORTER:
        pytest.skip("node_exporter (Debian: prometheus-node-exporter) is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tmp_path.chmod(0o755)
    with leased(image):
        path = textfile_of(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o644, "another user collects it"
        assert [each.name for each in tmp_path.glob("leasehold.prom*")] == ["leasehold.prom"]
        with running(EXPORTER, "--collector.disable-defaults", "--collector.textfile",
                     f"--collector.textfile.directory={tmp_path}", f"--web.listen-address=127.0.0.1:{port}"):
            def served():
                try:
                    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
                except OSError:
                    return None
            text = wait_until(served)
        assert "node_textfile_scrape_error 0" in text
        assert re.search(f"^leasehold_lease{{.*{re.escape(str(image))}", text, re.MULTILINE)


def test_a_textfile_that_cannot_be_written_is_said_and_stops_nothing(tmp_path):
    result = call("watch", "--once", "--dry-run", "--textfile", tmp_path / "none" / "x.prom")
    assert "metrics cannot be written" in result.stdout and str(tmp_path / "none") in result.stdout
    assert " lost\n" in result.stdout or " told\n" in result.stdout, result


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_textfile_is_not_written_through_what_others_have_put_there(tmp_path, link):
    """The collector's user may write to that directory, too."""
    secret = tmp_path / "shadow"
    secret.write_text("secret")
    secret.chmod(0o600)
    link(secret, tmp_path / "leasehold.prom.new")
    text = textfile_of(tmp_path).read_text()
    assert "leasehold_sees_all" in text
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o777 == 0o600


def metrics_of_the_watcher(tmp_path):
    return set(re.findall("^# TYPE (\\w+)", textfile_of(tmp_path).read_text(), re.MULTILINE))


def test_alerts_and_dashboard_are_well_formed_and_ask_for_metrics_that_exist(tmp_path):
    said = promtool("check", "rules", MONITORING / "alerts.yml")
    assert said.returncode == 0, said
    known = metrics_of_the_watcher(tmp_path)
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    for text in (asked, (MONITORING / "alerts.yml").read_text()):
        named = set(re.findall(r"\bleasehold_\w+", text))
        assert named and named <= known


RULES = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'leasehold_guest_lost_leases{{guest="db", instance="a"}}'
        values: '0 1 1'
      - series: 'leasehold_guest{{guest="old", instance="a", protection="none"}}'
        values: '1x30'
      - series: 'leasehold_watch_last_round_timestamp_seconds{{instance="b"}}'
        values: '0x30'
    alert_rule_test:
      - {{eval_time: 0m, alertname: LeaseLost, exp_alerts: []}}
      - eval_time: 1m
        alertname: LeaseLost
        exp_alerts: [{{exp_labels: {{guest: db, instance: a, severity: critical}}, exp_annotations: {{summary: "Guest db on a has lost a lease", description: "{lost}"}}}}]
      - {{eval_time: 5m, alertname: GuestWithoutLeases, exp_alerts: []}}
"""


def test_a_lost_lease_sounds_the_alarm(tmp_path):
    lost = re.search('alert: LeaseLost.*?description: "(.*?)"', (MONITORING / "alerts.yml").read_text(), re.DOTALL)[1]
    test = tmp_path / "test.yml"
    test.write_text(RULES.format(rules=MONITORING / "alerts.yml", lost=lost.replace("{{ $labels.guest }}", "db")))
    said = promtool("test", "rules", test)
    assert said.returncode == 0, said


# --- the journal

def journal_of(tmp_path, *options):
    """What the watcher sends to journald's socket, which is played here, as {name: value}; and what it prints."""
    folder = tmp_path / "journal"
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal, open(tmp_path / "out", "w+") as out:
        journal.bind(str(folder / "socket"))
        status = os.fstat(out.fileno())
        subprocess.run(["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && mkdir -p /run/systemd/journal && '
                        'mount --bind "$0" /run/systemd/journal && exec "$@"', folder, LEASEHOLD, "watch", "--once",
                        *options], stdout=out, env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        journal.setblocking(False)
        entries = []
        try:
            while True:
                text = journal.recv(1 << 16).decode()
                assert text.endswith("\n")
                entries.append(dict(line.split("=", 1) for line in text.splitlines()))
        except BlockingIOError:
            out.seek(0)
            return entries, out.read()


def test_a_lost_lease_has_fields_in_the_journal(lost, tmp_path):
    disk, pid = lost
    entries, printed = journal_of(tmp_path, "--dry-run")
    ours = [entry for entry in entries if entry["LEASEHOLD_PID"] == str(pid)]
    by_event = {entry["LEASEHOLD_EVENT"]: entry for entry in ours}
    assert by_event["lost"]["LEASEHOLD_GUEST"] == "leasehold run cat"
    assert by_event["lost"]["LEASEHOLD_PATH"] == str(disk) and by_event["lost"]["PRIORITY"] == "2"
    assert "was deleted from its lockspace" in by_event["lost"]["MESSAGE"]
    assert "failed" in by_event, "nobody here is libvirt"
    assert "was deleted" not in printed and " lost" in printed, "what is no event of these is a line as ever"
    page = (ROOT / "packaging" / "man" / "leasehold.8").read_text()
    for entry in ours:
        assert entry["MESSAGE_ID"] in page, entry


# --- JSON

def definition(verb):
    schema = json.loads((ROOT / "packaging" / "schema" / "leasehold.schema.json").read_text())

    def close(node):  # later versions may have more; this one has not
        if isinstance(node, dict):
            if "properties" in node:
                node["additionalProperties"] = False
            for value in node.values():
                close(value)
    close(schema["definitions"])
    return {"$ref": f"#/definitions/{verb}", "definitions": schema["definitions"]}


def validate(verb, text):
    jsonschema = pytest.importorskip("jsonschema", reason="python3-jsonschema is not installed")
    answer = json.loads(text)
    jsonschema.validate(answer, definition(verb))
    return answer


def test_what_every_verb_prints_is_what_the_schema_says(image, lost, tmp_path):  # noqa: F811
    device = tmp_path / "set"
    device.mkdir(mode=0o700)
    conf = tmp_path / "other.conf"
    conf.write_text(f'file_lockspace_dir = "{device}"\nstorage_locks = [ "{device}=flock" ]\n')
    stale = tmp_path / "stale.img"
    stale.write_bytes(bytes(1 << 20))
    os.setxattr(stale, "user.leasehold", b"domain=old\nuuid=00000000-0000-0000-0000-000000000001\nincarnation=1\n"
                b"host=gone\npid=1\nmode=exclusive\nsince=1\n")
    with leased(image), running("flock", stale, "cat"), running("qemu-img", "bench", "-f", "raw", "-c", "1", image), \
            running(LEASEHOLD, "run", "--config", conf, stale, "--", "cat") as other, open(image, "rb"):
        wait_until(lambda: str(other.pid) in call("status", "--json").stdout)
        validate("inspect", typed("leasehold inspect IMAGE...", "--json", IMAGE___=[image, stale, "/nonexistent"]).stdout)
        seen = validate("status", call("status", "--json").stdout)
        assert {"byte-range", "file-set"} <= {lease["medium"] for guest in seen["guests"] for lease in guest["leases"]}
        validate("classify", call("classify", "--json", image, "/proc/self/status", "/nonexistent").stdout)
        validate("check", call("check", "--json").stdout)
        validate("probe", call("probe", "--json", "--wait", "1", tmp_path).stdout)
        for line in call("watch", "--once", "--dry-run", "--json").stdout.splitlines():
            validate("watch", line)


def test_what_is_not_known_is_null(image):  # noqa: F811
    assert inspect(image)["error"] is inspect(image)["qemu_writer"] is None
    [broken] = json.loads(call("inspect", "--json", "/nonexistent").stdout)["images"]
    assert broken["path"] == "/nonexistent" and broken["target"] is None and "no such file" in broken["error"]

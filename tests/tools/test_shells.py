# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""Completion, as somebody who types meets it: bash and zsh on a terminal of their own."""

import os
import pathlib
import pty
import re
import select
import shutil
import subprocess
import time

import pytest
from test_tools import LEASEHOLD, PATIENCE, image, leased  # noqa: F401

COMPLETIONS = pathlib.Path(__file__).resolve().parent.parent.parent / "packaging" / "completions"
SETUP = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}


class Shell:
    def __init__(self, kind, folder):
        self.shown = ""
        # On a terminal it shows what it was called with; what completion asks, it answers.
        (folder / "bin").mkdir()
        command = folder / "bin" / "leasehold"
        command.write_text(f'#!/bin/sh\n[ -t 1 ] || exec {LEASEHOLD} "$@"\nprintf "<%s>" "$@"; echo " end"\n')
        command.chmod(0o755)
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.environ.update(PATH=f"{folder / 'bin'}:/usr/bin:/bin", PS1="[sh] ", TERM="dumb", HOME=str(folder))
            os.execvp(kind, SETUP[kind])
        self.pid = pid
        if kind == "bash":
            self.type(f"source {COMPLETIONS / 'leasehold'}; bind 'set bell-style none'; echo read''y\n")
        else:
            self.type(f"fpath=({COMPLETIONS} $fpath); autoload -Uz compinit; compinit -u -D; unsetopt beep; "
                      "echo read''y\n")
        self.until("ready\r\n")
        self.until("[sh] ")

    def type(self, text):
        os.write(self.fd, text.encode())

    def until(self, end):
        """What it shows up to there, from where the last one ended."""
        limit = time.monotonic() + PATIENCE
        while end not in self.shown:
            assert time.monotonic() < limit, self.shown
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        said, _, self.shown = self.shown.partition(end)
        return said

    def completed(self, words):
        """What the command gets when TAB is typed behind these words."""
        self.type(f"leasehold {words}\t")
        self.type("\n")
        said = self.until(" end")
        self.until("[sh] ")
        return said[said.index("<"):]

    def close(self):
        os.close(self.fd)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=list(SETUP))
def shell(request, tmp_path):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    made = Shell(request.param, tmp_path)
    yield made
    made.close()


def test_verbs_options_files_and_actions_are_completed(shell, tmp_path):
    (tmp_path / "my disk.img").touch()
    assert shell.completed("insp") == "<inspect>"
    assert shell.completed("help dis") == "<help><disable>"
    assert shell.completed("status --prom") == "<status><--prometheus>"
    assert shell.completed("watch --default=po") == "<watch><--default=poweroff>"
    assert shell.completed("watch --default res") == "<watch><--default><restart>"
    assert shell.completed("inspect my") == "<inspect><my disk.img>"


def test_status_completes_the_names_of_guests_with_their_blanks_and_nothing_else(shell, image):  # noqa: F811
    with leased(image):
        assert shell.completed("status leasehold\\ run\\ c") == \
            "<status><leasehold run cat>"
        assert shell.completed("status nothing") == "<status><nothing>"


def test_every_option_is_completed(tmp_path):
    """Against --help; what the manual says is compared in the same way by packaging/man/check_verbs.sh."""
    zsh = (COMPLETIONS / "_leasehold").read_text()
    verbs = re.findall("^  ([a-z]+) ", subprocess.run([LEASEHOLD, "--help"], capture_output=True, text=True, check=True).stdout,
                       re.MULTILINE)
    assert "fenced" in verbs
    for verb in verbs:
        shown = subprocess.run([LEASEHOLD, verb, "--help"], capture_output=True, text=True, check=True).stdout
        options = {word.split("=")[0].rstrip(",") for word in shown.split() if word.startswith("--")} - {"--"}
        assert options and all(f"{option}=" in zsh or f"{option}[" in zsh for option in options), verb

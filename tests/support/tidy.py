#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""clang-tidy on many files, unless the same has been looked at before: this source with all that it includes, this
command, these checks, this clang-tidy. Where it found nothing a note is left in ${XDG_CACHE_HOME:-/var/cache}/leasehold-lint.

usage: tidy.py [CLANG-TIDY OPTION...] <lines of "BUILD-FOLDER CHECKS FILE"
The exit status is 1 if there was anything to say.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

CLANG_TIDY, OPTIONS = "clang-tidy", sys.argv[1:]
ROOT = os.getcwd()
NOTES = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "leasehold-lint")


def output_of(*command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, **options).stdout


def commands(folder):
    """{file: (directory, words)} as the build folder has them, to be run by clang."""
    found = {}
    for entry in json.loads((pathlib.Path(folder) / "compile_commands.json").read_text()):
        directory, words = pathlib.Path(entry["directory"]), shlex.split(entry["command"])
        if words[0].endswith("ccache"):
            words = words[1:]
        found[os.path.realpath(directory / entry["file"])] = directory, ["clang++", *words[1:]]
    return found


def name_of(folder, checks, file, about_tidy):
    """Of the note: a hash of everything that the result depends on, wherever the checkout is; None: it cannot be told."""
    directory, words = commands(folder)[os.path.realpath(file)]
    for option in ("-o", "-MF", "-MQ"):
        if option in words:
            at = words.index(option)
            del words[at:at + 2]
    words = [word for word in words if word not in ("-MD", "-c")]
    try:
        rule = output_of(*words, "-M", "-Wno-everything", cwd=directory, stderr=subprocess.DEVNULL, text=True)
    except subprocess.CalledProcessError:
        return None
    known = hashlib.sha256(repr((about_tidy, OPTIONS, checks, words)).replace(ROOT, "").encode())
    for name in sorted(set(rule.replace("\\\n", " ").split(":", 1)[1].split())):
        content = (directory / name).read_bytes().replace(ROOT.encode(), b"")
        known.update(name.replace(ROOT, "").encode() + hashlib.sha256(content).digest())
    return known.hexdigest()


def look(job, about_tidy):
    """Whether clang-tidy has nothing to say about it."""
    folder, checks, file = job
    name = name_of(folder, checks, file, about_tidy)
    if name and (NOTES / name).exists():
        return True
    result = subprocess.run([CLANG_TIDY, *OPTIONS, "-p", folder, f"--checks={checks}", "--quiet", file],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode == 0 and not result.stdout and name and os.access(NOTES, os.W_OK):
        (NOTES / name).touch()
    return result.returncode == 0


def main():
    try:
        NOTES.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass  # not root: everything is looked at
    about_tidy = output_of(CLANG_TIDY, "--version"), pathlib.Path(".clang-tidy").read_text()
    jobs = [line.split() for line in sys.stdin]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: look(job, about_tidy), jobs))
    print(f"clang-tidy: {len(jobs)} files")
    return 0 if jobs and all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())

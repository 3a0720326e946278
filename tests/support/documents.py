# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""The commands that the documents print for people to type: what stands in an indented block, in `...`, or after .Dl.

A test that runs one says documented("virsh backup-begin GUEST", GUEST="db") and gets the words to run. So it runs what is
printed, or fails; and tests/tools/test_documents.py finds every command that no test runs."""

import functools
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DOCUMENTS = ("README.md", "OPERATIONS.md", "packaging/man/leasehold.8", "packaging/man/qemu-leasehold.conf.5")
PROGRAMS = set("apt dd dnf gluster grep journalctl leasehold meson mount ninja packaging/build-deb.sh packaging/build-rpm.sh "
               "crm_mon crm_resource pcs ping qemu-img restorecon rm semanage sm-notify sudo systemctl tests/demo tests/run umount uname vgchange "
               "vgimportclone virsh virt-df virt-sparsify cat sed ceph".split())


@functools.cache
def commands():
    """{command: the documents that print it}, without sudo and remarks; those joined by && one by one."""
    found = {}
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        if name.endswith(".md"):
            printed = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        else:
            printed = re.findall(r"^\.Dl (.*)$", text, re.MULTILINE) + re.findall(r"^\.Bd.*\n((?:[^.].*\n)*)", text, re.MULTILINE)
            printed = [line.replace("\\-", "-") for block in printed for line in block.splitlines()]
        for line in printed:
            line = re.sub(r"\s+#.*$", "", re.sub(r"^\w+\$ ", "", line))
            for command in line.split(" && "):
                command = re.sub(r"^sudo ", "", command.strip())
                words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
                if words and words[0] in PROGRAMS:
                    found.setdefault(command, []).append(name)
    return found


def documented(command, **places):
    """The words of a printed command, with what stands for something replaced, by one word or a list of them: GUEST="db";
    "disk.qcow2" as disk_qcow2."""
    assert command in commands(), f"no document prints this: {command}"
    words = shlex.split(command)
    for place, what in places.items():
        stands = [word for word in words if re.sub(r"\W", "_", word) == place]
        assert stands, f"{place} does not stand in: {command}"
        instead = [str(each) for each in what] if isinstance(what, list) else [str(what)]
        words = [new for word in words for new in (instead if word in stands else [word])]
    return words

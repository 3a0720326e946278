#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

"""Every link of the documents leads somewhere: to a file of the tree, and to a heading of it, as GitHub names them.

    check_links.py ROOT"""

import pathlib
import re
import sys


def anchors(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


def broken(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists():
            yield f"{target}: there is no {file}"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: {file} has no such heading"


def main(root):
    documents = [*root.glob("*.md"), *root.glob("docs/*.md")]
    assert documents, f"no documents in {root}"
    wrong = [f"{document}: {what}" for document in documents for what in broken(document)]
    print("\n".join(wrong) or f"{len(documents)} documents: every link leads somewhere")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))

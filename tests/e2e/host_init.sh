#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# The first process of a host (hosts.py): NAME OURS:THEIRS... in fresh mount, UTS and PID namespaces. bash, because a
# first process must reap what others orphan (a QEMU that is a zombie is alive to libvirt), and bash does.
set -eu
hostname "$1"
shift
for pair; do
    mkdir -p "${pair#*:}"
    mount --bind "${pair%%:*}" "${pair#*:}"
done
echo ready
# Ends with the test run; the kernel then kills everything else in this PID namespace.
read -r _ || true

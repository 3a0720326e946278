#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: check.sh ABSTRACTION...
#
# Each can be included in a profile, and apparmor_parser understands it. Nothing is loaded into a kernel.
set -eu

command -v apparmor_parser >/dev/null || { echo "apparmor_parser is not installed"; exit 77; }
apparmor_parser --help 2>&1 | grep -q -e --Werror || { echo "apparmor_parser is older than 3.0, and has no --Werror"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for abstraction; do
    printf 'abi <abi/3.0>,\ninclude <tunables/global>\nprofile libvirtd /usr/sbin/libvirtd {\n  include <abstractions/base>\n  include "%s"\n}\n' \
        "$abstraction" >"$work/profile"
    apparmor_parser --skip-kernel-load --skip-cache --names --warn=all --Werror "$work/profile"
done

#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: check.sh UNIT TMPFILES
#
# systemd understands the unit, whose rights stay as few as they are; and the line for systemd-tmpfiles. Nothing is
# started.
set -eu

for tool in systemd-analyze systemd-tmpfiles; do
    command -v "$tool" >/dev/null || { echo "$tool is not installed"; exit 77; }
done
systemd-analyze --help | grep -q offline || { echo "this systemd is older than 250: it cannot look at a unit offline"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What it starts and where its manual is need not be installed here.
sed 's,^ExecStart=.*,ExecStart=/bin/true,; /^Documentation=/d' "$1" >"$work/leasehold-watch.service"
systemd-analyze verify "$work/leasehold-watch.service" >"$work/said" 2>&1 || { cat "$work/said"; exit 1; }
! grep . "$work/said"
# From 0 (no rights) to 10, times ten.
systemd-analyze security --offline=yes --threshold=20 --no-pager "$work/leasehold-watch.service" >"$work/said" ||
    { grep -v '^✓' "$work/said"; exit 1; }

# It gives what it makes to its owner.
[ "$(id -u)" = 0 ] || { echo "the unit is right; not root: the line for systemd-tmpfiles cannot be tried"; exit 77; }
mkdir "$work/root"
systemd-tmpfiles --root="$work/root" --create "$(realpath "$2")"
[ "$(stat -c '%a %U' "$work/root/run/leasehold")" = "700 root" ]

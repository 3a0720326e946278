#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors

# Runs the lens's own test, then proves that the shipped file, as it is and with every option uncommented, can be read
# by the lens: an option that the lens does not know would make the whole file unreadable for augeas.

set -eu
here=$(cd "$(dirname "$0")" && pwd)

command -v augparse >/dev/null || { echo "augparse (augeas-tools) is not installed"; exit 77; }
augparse -I "$here" "$here/test_libvirt_leasehold.aug"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lens's answer is compared with the file's own "name = value" lines.
check() {
    {
        printf 'module Shipped =\n  test Libvirt_leasehold.lns get "'
        sed 's/[\\"]/\\&/g' "$1"
        printf '" = ?\n'
    } >"$work/shipped.aug"
    augparse -I "$here" "$work/shipped.aug" >"$work/tree" 2>&1 || { cat "$work/tree"; exit 1; }
    # An empty list is a node without a value.
    sed -n 's/^  { "\([a-z_]*\)" = "\(.*\)" }$/\1 = \2/p; s/^  { "\([a-z_]*\)" }$/\1 = [ ]/p' "$work/tree" >"$work/got"
    sed -n '/^[a-z]/{s/"//g;p}' "$1" >"$work/wanted"
    diff "$work/wanted" "$work/got"
}

check "$here/qemu-leasehold.conf"
sed 's/^#\([a-z]\)/\1/' "$here/qemu-leasehold.conf" >"$work/uncommented.conf"
check "$work/uncommented.conf"
[ -s "$work/got" ] || { echo "the shipped file shows no option"; exit 1; }

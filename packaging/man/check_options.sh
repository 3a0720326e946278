#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: check_options.sh CONF PAGE
#
# The manual page shows the options of the shipped file, in its order and with its defaults. (That the shipped file shows
# those that exist, with their defaults, is tested by tests/unit/settings_test.cpp.) And the page is well formed.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed -n 's/^#\([a-z_]* = .*\)/\1/p' "$1" >"$work/file"
# .It Li name = \(dqvalue\(dq
sed -n 's/^\.It Li \([a-z_]* = .*\)$/\1/p' "$2" | sed 's/\\(dq/"/g; s/\\&//g' >"$work/page"
[ -s "$work/file" ] || { echo "$1 shows no option"; exit 1; }
diff "$work/file" "$work/page"

command -v mandoc >/dev/null || { echo "mandoc is not installed: the page's syntax is not checked"; exit 77; }
mandoc -T lint -W warning "$2"

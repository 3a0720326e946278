#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: check_verbs.sh LEASEHOLD PAGE COMPLETION
#
# The manual page and the completion know the options of each verb that the command has, and no others. And the page is
# well formed.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$1" --help | sed -n 's/^  \([a-z]*\) .*/\1/p' >"$work/verbs"
[ -s "$work/verbs" ] || { echo "$1 --help names no verb"; exit 1; }
while read -r verb; do
    "$1" "$verb" --help | sed -n 's/^  \(-., \)\{0,1\}--\([a-z-]*\).*/\2/p' | grep -vx help | sort >"$work/command"
    # The synopsis, from this verb to the next.
    sed -n '/^\.Sh SYNOPSIS/,/^\.Sh DESCRIPTION/p' "$2" | sed -n "/^\.Cm $verb\$/,/^\.Nm/p" |
        grep -o 'Fl -[a-z][a-z-]*\|| -[a-z][a-z-]*' | sed 's/.* -//' | sort >"$work/page"
    diff "$work/command" "$work/page" >"$work/difference" ||
        { echo "$verb: --help and $2 differ:"; cat "$work/difference"; exit 1; }
    grep -E "^ +([a-z]+ \| )*$verb( \| [a-z]+)*\) options=" "$3" | grep -o ' *--[a-z][a-z-]*' | sed 's/.*--//' |
        grep -vx help | sort >"$work/completion"
    diff "$work/command" "$work/completion" >"$work/difference" ||
        { echo "$verb: --help and $3 differ:"; cat "$work/difference"; exit 1; }
done <"$work/verbs"

command -v mandoc >/dev/null || { echo "mandoc is not installed: the page's syntax is not checked"; exit 77; }
mandoc -T lint -W warning "$2"

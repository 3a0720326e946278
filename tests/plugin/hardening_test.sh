#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: hardening_test.sh FILE...
#
# What makes a fault in memory harder to use is in what was built, whoever has built it: addresses that are drawn anew
# (PIE), a table of functions that is read-only from the start (RELRO and BIND_NOW), no memory that is written and
# executed, stacks that are watched, and libraries from where the system has them. With optimization also the checks of
# the C library (FORTIFY_SOURCE), where whoever has built it has asked for them: for those look at the packages.
set -u

command -v readelf >/dev/null || { echo "readelf is not installed"; exit 77; }
failures=0

for file; do
    header=$(readelf -hW "$file") segments=$(readelf -lW "$file") dynamic=$(readelf -dW "$file")
    symbols=$(readelf --dyn-syms -W "$file")
    # check TEXT PATTERN COMPLAINT: it has to be there.
    check() {
        printf '%s\n' "$1" | grep -qE "$2" || { echo "$file: $3"; failures=1; }
    }
    # refuse TEXT PATTERN COMPLAINT: it must not.
    refuse() {
        ! printf '%s\n' "$1" | grep -qE "$2" || { echo "$file: $3"; failures=1; }
    }
    check "$header" 'Type: +DYN' "is loaded at a fixed address (no PIE)"
    check "$segments" 'GNU_RELRO' "what is relocated stays writable (no RELRO)"
    check "$dynamic" 'BIND_NOW|FLAGS_1.*NOW' "functions are looked up later (no BIND_NOW)"
    check "$segments" 'GNU_STACK.* RW +0x' "the stack may be executed"
    refuse "$segments" 'LOAD.* RWE ' "memory is writable and executable"
    refuse "$dynamic" 'TEXTREL' "its code is relocated (TEXTREL)"
    refuse "$dynamic" 'RPATH|RUNPATH' "libraries are looked for elsewhere (RPATH)"
    check "$symbols" '__stack_chk_fail' "stacks are not watched (no -fstack-protector-strong)"
done
exit $failures

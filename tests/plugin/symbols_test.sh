#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# What the plugin's dynamic symbol table says: libvirtd finds one symbol in it, and it asks for none of libvirt's, whose
# private symbols carry the version of one libvirt each. Must run without libvirt being installed.
set -u

plugin=$1
failures=0

complain() {
    echo "$*" >&2
    failures=1
}

command -v nm >/dev/null && command -v readelf >/dev/null || { echo "nm or readelf is not installed"; exit 77; }

exported=$(nm -D --defined-only "$plugin" | awk '{ print $3 }' | sed 's/@.*//')
[ "$exported" = virLockDriverImpl ] || complain "exports $exported, not just virLockDriverImpl"

kind=$(nm -D --defined-only "$plugin" | awk '{ print $2 }')
case $kind in
    D | R) ;;
    *) complain "virLockDriverImpl is of kind $kind, not data" ;;
esac

wanted=$(nm -D --undefined-only "$plugin" | awk '{ print $2 }' | grep '^_*vir')
[ -z "$wanted" ] || complain "wants from libvirt: $wanted"

readelf -V "$plugin" | grep -q LIBVIRT && complain "wants a version of libvirt's symbols"
readelf -d "$plugin" | grep NEEDED | grep -q libvirt && complain "links libvirt"

# libvirtd closes its modules; our threads' and libraries' destructors must still be there.
readelf -d "$plugin" | grep -q NODELETE || complain "may be unloaded"

exit $failures

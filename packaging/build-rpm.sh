#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: packaging/build-rpm.sh [OUTDIR]
#
# Builds the RPM packages from this source tree into OUTDIR (default: build-packages), with the spec file that they are
# built from, and prints the files it made. It takes minutes, and says on stderr what it is at.
# Needs rpmbuild and what packaging/rpm/leasehold.spec names; on Debian its packages of the same purpose.
set -euo pipefail
. "$(dirname "$0")/source.sh"

mkdir "$work/SOURCES"
pack_source "$work/SOURCES/leasehold-$version.tar.gz"
date=$(LC_ALL=C date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')
sed "s/@VERSION@/$version/; s/@DATE@/$date/; s,@HOME@,$home," "$root/packaging/rpm/leasehold.spec" >"$work/leasehold.spec"

options=(--define "_topdir $work"
    --define "use_source_date_epoch_as_buildtime 1" --define "clamp_mtime_to_source_date_epoch 1"
    --define "_buildhost reproducible")
# Debian's rpm: its database knows nothing of what is installed, its macros nothing of Fedora's folders, and it has no
# tool that splits off debugging symbols.
[ -e /etc/redhat-release ] || options+=(--nodeps --define "_libdir /usr/lib64" --define "debug_package %{nil}"
    --define "_unitdir /usr/lib/systemd/system" --define "_tmpfilesdir /usr/lib/tmpfiles.d")

# No source package: it would record the folder it was made in, and its checksum would stand in the others.
echo "building leasehold $version" >&2
quietly rpmbuild -bb "${options[@]}" "$work/leasehold.spec"
cp "$work/leasehold.spec" "$out/"
echo "$out/leasehold.spec"
find "$work/RPMS" -name '*.rpm' -printf '%f\n' -exec cp {} "$out/" ';' | sort | sed "s,^,$out/,"

#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: packaging/build-deb.sh [OUTDIR]
#
# Builds the Debian package from this source tree into OUTDIR (default: build-packages) and prints the files it made.
# Needs debhelper and the packages that packaging/deb/control names.
set -euo pipefail
. "$(dirname "$0")/source.sh"

pack_source "$work/leasehold_$version.orig.tar.gz"
tar -C "$work" -xzf "$work/leasehold_$version.orig.tar.gz"
cd "$work/leasehold-$version"
cp -r packaging/deb debian
cat >debian/changelog <<END
leasehold ($version-1) unstable; urgency=medium

  * Version $version: see NEWS.md.

 -- The leasehold authors <leasehold@leasehold.invalid>  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END
quietly dpkg-buildpackage -b -us -uc
cd "$work"
for file in *.deb *.buildinfo *.changes; do
    cp "$file" "$out/"
    echo "$out/$file"
done

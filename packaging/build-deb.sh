#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: packaging/build-deb.sh [OUTDIR]
#
# Builds the Debian package and its source package from this source tree into OUTDIR (default: build-packages) and prints
# the files it made. It takes minutes, and says on stderr what it is at.
# Needs debhelper and the packages that packaging/deb/control names.
set -euo pipefail
. "$(dirname "$0")/source.sh"

pack_source "$work/leasehold_$version.orig.tar.gz"
tar -C "$work" -xzf "$work/leasehold_$version.orig.tar.gz"
cd "$work/leasehold-$version"
cp -r packaging/deb debian
sed -i "s,@HOME@,$home," debian/control debian/copyright debian/watch debian/upstream/metadata
cat >debian/changelog <<END
leasehold ($version-1) unstable; urgency=medium

  * Version $version: see NEWS.md.

 -- The leasehold authors <leasehold@leasehold.invalid>  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END
echo "building leasehold $version" >&2
quietly dpkg-buildpackage -us -uc
cd "$work"
for file in *.dsc *.tar.* *.deb *.buildinfo *.changes; do
    cp "$file" "$out/"
    echo "$out/$file"
done

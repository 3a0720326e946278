#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# usage: packaging/build-tarball.sh [OUTDIR]
#
# Packs this source tree, as the release's tarball, into OUTDIR (default: build-packages) and prints the file it made: the
# same from a checkout and from the unpacked tarball.
set -euo pipefail
. "$(dirname "$0")/source.sh"

pack_source "$out/leasehold-$version.tar.gz"
echo "$out/leasehold-$version.tar.gz"

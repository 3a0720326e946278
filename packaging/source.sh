# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# Sourced by build-tarball.sh, build-deb.sh and build-rpm.sh, which begin alike: the source as a tarball, the same whenever
# it is made.

root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-$root/build-packages}" && cd "${1:-$root/build-packages}" && pwd)
version=$(sed -n "s/^  version: '\(.*\)',$/\1/p" "$root/meson.build")
home=$(sed -n "s/^home = '\(.*\)'$/\1/p" "$root/meson.build")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# For ccache, where meson finds one: its unity sources name folders from the root on, and rpmbuild has a locale of its own.
# Where a package's debugging symbols say the sources are must not depend on who has compiled them first.
export CCACHE_BASEDIR=$work CCACHE_SLOPPINESS=locale
unset CCACHE_NOHASHDIR

# A checkout is packed as it is, with changes but without what git does not know; an unpacked tarball as
# a whole. Its last change is the time of everything in the packages (https://reproducible-builds.org/specs/source-date-epoch/).
if [ -e "$root/.git" ]; then
    git -C "$root" rev-parse --git-dir >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    files() { git -C "$root" ls-files -z; }
    changed=$(git -C "$root" log -1 --format=%ct)
else
    files() { (cd "$root" && find . -path './build*' -prune -o '(' -type f -o -type l ')' -printf '%P\0'); }
    changed=$(stat -c %Y "$root/meson.build")
fi
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$changed}

pack_source() {
    files | LC_ALL=C sort -z | tar -C "$root" --null --no-recursion -T - --transform "flags=r;s,^,leasehold-$version/," \
        --mtime "@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw -c | gzip -n >"$1"
}

# quietly COMMAND...: what step it is at and for how long already, every ten seconds; its output only if it fails. All on
# stderr: on stdout are the files that were made.
quietly() {
    local began=$SECONDS status=0 pid
    "$@" >"$work/log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if [ $((SECONDS - began)) -ge 10 ] && [ $(((SECONDS - began) % 10)) = 0 ]; then
            echo "  $((SECONDS - began)) s: $(step)" >&2
            sleep 1
        fi
    done
    wait "$pid" || status=$?
    [ "$status" = 0 ] || cat "$work/log" >&2
    return "$status"
}

# The last line of the log that names what is being done: a step of ninja's, of debhelper's or of rpmbuild's.
step() {
    tr '\r' '\n' <"$work/log" | grep -aE '^(\[[0-9]+/[0-9]+\]|   (dh_|debian/rules)|Executing\()' | tail -n 1 | cut -c 1-100 |
        sed 's/^ *//'
}

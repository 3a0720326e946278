# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# Sourced by tests/run and tests/demo: installs Debian packages that are missing, and builds.

say() { printf '\n\033[1m== %s\033[0m\n' "$*" | { [ -t 1 ] && cat || sed 's/\x1b\[[0-9;]*m//g'; }; }

die() {
    echo "$0: $*" >&2
    exit 1
}

# need PACKAGE...: installs those that are not there. One at a time: suites run side by side.
need() {
    local missing=() package
    {
        flock 9
        for package; do
            [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
        done
        [ ${#missing[@]} -gt 0 ] || return 0
        [ "$(id -u)" = 0 ] || die "not root, and these packages are missing: ${missing[*]}"
        say "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq 9<&-
        # Nothing may start by itself: the tests run daemons of their own.
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 9<&-
    } 9<"${BASH_SOURCE[0]}"
}

build_packages=(g++ gcc meson ninja-build pkg-config libglib2.0-dev libvirt-dev libaugeas-dev
    nlohmann-json3-dev)
hypervisor_packages=(libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu qemu-system-x86 qemu-utils
    iproute2 attr python3 python3-libvirt)
test_packages=(ccache libgtest-dev bindfs python3-pytest python3-pytest-xdist augeas-tools binutils mandoc apparmor checkpolicy
    semodule-utils systemd)
# What others use beside leasehold, or before it.
e2e_packages=(resource-agents pacemaker pacemaker-cli-utils corosync libvirt-sanlock sanlock)
tools_packages=(bindfs util-linux prometheus prometheus-node-exporter python3-jsonschema zsh)
lint_packages=(clang clang-format clang-tidy)
model_packages=(spin tcc)
package_packages=(debhelper lintian rpm rpmlint cpio debootstrap)
lab_packages=(qemu-system-x86 e2fsprogs libc6-dev python3 bindfs strace iproute2)

# Meson puts the sources of a target together into one: that compiles in a third of the time, which pays where everything
# is compiled anew. And of debugging symbols those that a stack trace needs: with all of them the optimizer takes half as
# long again.
unity=(--unity=on -Dunity_size=100)
lines=(-Dcpp_args=-g1 -Dc_args=-g1)

# The same where tests are built, whose own targets are not put together. Meson 0.56 (Debian 11) takes no object out of
# a target then, whatever that target says.
unity_with_tests() {
    printf '%s\n' 1.0 "$(meson --version)" | sort -VC && printf '%s\n' "${unity[@]}"
}

# meson uses ccache by itself. This lets it keep what was compiled with a precompiled header as well, and give it to
# another checkout (ccache(1)). A debugger may be told by such an object that its sources are in the first one.
export CCACHE_SLOPPINESS=pch_defines,time_macros CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1

# configure DIR [MESON OPTION...]: once. Here, and for nobody else, a warning is an error.
configure() {
    local dir=$1
    shift
    [ -f "$dir/build.ninja" ] || meson setup "$dir" -Dwerror=true "$@" >"$dir.setup.log" 2>&1 ||
        { cat "$dir.setup.log" >&2; die "meson setup failed"; }
    rm -f "$dir.setup.log"
}

# build DIR [MESON OPTION...]: configures once, then builds all of it, or only `targets`. Two suites may want the same
# folder.
build() {
    local dir=$1
    {
        flock 8
        if [ "$dir" = build ]; then configure "$@" $(unity_with_tests) "${lines[@]}"; else configure "$@"; fi
        ninja -C "$dir" ${targets-} >"$dir.build.log" 2>&1 8<&- ||
            { grep -vE '^\[[0-9]+/' "$dir.build.log" >&2; die "the build failed"; }
        mv "$dir.build.log" "$dir/build.log"
    } 8<"$PWD/meson.build"
}

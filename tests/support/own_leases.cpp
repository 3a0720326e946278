// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Linked into a test, gives it a /run/leasehold of its own: the plugin knows no other place for leases of this host,
// and those of the machine that runs the tests are not the tests' to make or to meet. Without the rights for that
// (nobody but root makes mounts) the plugin cannot write to the real one either.

#include <cstdio>
#include <cstdlib>

#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>

namespace {

[[maybe_unused]] const bool kDone = [] {
    constexpr const char* kLeases = "/run/leasehold";
    if (unshare(CLONE_NEWNS) < 0)
        return false;
    (void)mkdir(kLeases, 0700);
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0 ||
        mount("none", kLeases, "tmpfs", 0, "mode=0700") < 0) {
        std::perror(kLeases);
        std::exit(1);
    }
    return true;
}();

} // namespace

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/loss.hpp"

#include "core/os/error.hpp"

#include <algorithm>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold {

namespace {

using lease::Incarnation;
using qemu::StoredLease;

// A server that has given the lock away while this host was cut off lets us have it again when the thief is gone, and
// somebody has written in between. NFSv4 tells by EIO on what goes past the cache, for good (Linux fs/nfs/nfs4state.c,
// NFS_LOCK_LOST; measured in tests/lab, with an empty file too). 0, or the error number.
//
// O_DIRECT is set for the length of the read only: elsewhere in the lease file the owner record is written, which has
// no alignment. The flag belongs to the description, which the watcher and libvirtd may ask at the same time. Who finds
// after the read that the other one has taken the flag away may have read the cache, and asks again.
int tryReadPastTheCache(const StoredLease& stored) {
    alignas(4096) static thread_local char block[4096];
    int fd = stored.lease.get();
    for (int tries = 0; tries < 100; tries++) {
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags | O_DIRECT) < 0) {
            if (errno == EINVAL) // a file system without such reads (fcntl(2)), which somebody vouches for
                return 0;
            throw SystemError(errno, "prepare to read", stored.path);
        }
        ssize_t got = TEMP_FAILURE_RETRY(pread(fd, block, sizeof block, 0));
        int error = got < 0 ? errno : 0;
        int after = fcntl(fd, F_GETFL);
        (void)fcntl(fd, F_SETFL, after & ~O_DIRECT);
        if (error != 0 || (after & O_DIRECT))
            return error;
    }
    throw Error(Fault::system, "the lease on '" + stored.path + "' is examined by somebody else all the time");
}

// Where marks are files even a look takes locks and sweeps, and storage that is leased like that tells a loss
// otherwise: the host resets itself (OCFS2), or nothing of it can be reached any more (FUSE).
bool isTaken(const StoredLease& stored, const Incarnation& self) {
    if (stored.mode != Mode::exclusive || stored.directory.open())
        return false;
    AnyMedium medium(stored, self);
    if (!medium->note().owner)
        return false;
    std::vector<lease::Mark> marks = medium->look();
    bool taken = std::any_of(marks.begin(), marks.end(),
                             [](const lease::Mark& mark) { return mark.kind == lease::MarkKind::owner; });
    // Who hands it over takes the note down before the mark: then it was given, not taken.
    return taken && medium->note().owner;
}

} // namespace

std::optional<std::string> findLoss(const StoredLease& stored, const Incarnation& self) {
    if (!isListed(stored, self))
        return "was deleted from its lockspace";
    // A node of OCFS2 that is cut off ends itself (o2quo); there is nothing to read that would tell.
    if (!stored.remote || !stored.writable || stored.directory.open())
        return std::nullopt;
    int error = tryReadPastTheCache(stored);
    if (error == 0)
        return std::nullopt;
    // EIO is NFSv4's word for it, EBADFD that of GlusterFS with client.strict-locks, ESHUTDOWN that of CephFS for a
    // client that was evicted (EBLOCKLISTED: Linux include/linux/ceph/rados.h); a file that is gone has no lease.
    if (error == EIO || error == EBADFD || error == ESHUTDOWN || error == EBADF || error == ESTALE)
        return std::string("was lost, or its storage is broken (") + SystemError(error, "read", stored.path).what() +
               ")";
    throw SystemError(error, "read", stored.path);
}

std::optional<std::string> findLossOrTaker(const StoredLease& stored, const Incarnation& self) {
    auto loss = findLoss(stored, self);
    if (!loss && isTaken(stored, self))
        loss = "has gone to another guest";
    return loss;
}

} // namespace leasehold

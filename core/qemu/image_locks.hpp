// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// QEMU's own image locks: what the locked bytes mean, and whether they would stop a guest. Looks, but never locks, with
// one exception: a lock of ours on these bytes keeps QEMU from starting. Source: QEMU block/file-posix.c
// (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE) and include/block/block-common.h (BLK_PERM_*).

#include "core/mode.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

namespace leasehold::qemu {

// The bytes: 100+n "I use permission n", 200+n "nobody else may use permission n".
constexpr std::int64_t kUsesBase = 100;
constexpr std::int64_t kDeniesBase = 200;

// virtlockd locks this byte of an image: for writing, or for reading where the guest shares it (libvirt
// src/locking/lock_daemon_dispatch.c, virLockDaemonProtocolDispatchAcquireResource).
constexpr std::int64_t kVirtlockd = 0;

using Use = Mode; // of the image by a guest

// What the process on the other side does with the image, as far as it is in the way.
struct ImageConflict {
    std::int64_t byte = 0; // the first byte in the way
    std::string words;     // "writes to it and lets nobody else write"
};

// Would a guest that uses the image like this meet QEMU's "Failed to get "write" lock"? Locks that the descriptor's
// own open file description holds are not seen. `what` is the image's path.
// `hidden`: the storage does not show read locks of other hosts (NFSv3). Then each byte is locked for writing and given
// back at once, which needs a writable descriptor: without one, what other hosts do stays unseen.
std::optional<ImageConflict> findImageConflict(int fd, Use use, bool hidden, const std::string& what);

// The guard, for storage where QEMU's locks do not reach other hosts: a read lock on "nobody else may write", which
// makes a QEMU that starts on this host die with "Failed to get "write" lock", and lets an incoming one pass, which
// takes no locks before it runs. A destination puts it up until it has the lease: nothing else tells it from a second
// start of the same guest.
void putUpGuard(int fd, const std::string& what);
void takeDownGuard(int fd, const std::string& what);

// Pure: the bytes that would be in the way of such a use.
std::vector<std::int64_t> conflictingBytes(Use use);
std::string describeByte(std::int64_t byte);

} // namespace leasehold::qemu

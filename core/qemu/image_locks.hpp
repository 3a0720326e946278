// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// QEMU's own image locks: what the locked bytes mean, and whether they would stop a guest. Only looks, never locks:
// a lock of ours on these bytes would keep QEMU from starting. Source: QEMU block/file-posix.c (RAW_LOCK_PERM_BASE,
// RAW_LOCK_SHARED_BASE) and include/block/block-common.h (BLK_PERM_*).

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

namespace leasehold::qemu {

// The bytes: 100+n "I use permission n", 200+n "nobody else may use permission n".
constexpr std::int64_t kUsesBase = 100;
constexpr std::int64_t kDeniesBase = 200;

enum class Use { exclusive, shared, readOnly };

// What the process on the other side does with the image, as far as it is in the way.
struct ImageConflict {
    std::int64_t byte = 0; // the first byte in the way
    std::string words;     // "writes to it and lets nobody else write"
};

// Would a guest that uses the image like this meet QEMU's "Failed to get "write" lock"? Locks that the descriptor's
// own open file description holds are not seen. `what` is the image's path.
std::optional<ImageConflict> findImageConflict(int fd, Use use, const std::string& what);

// Pure: the bytes that would be in the way of such a use.
std::vector<std::int64_t> conflictingBytes(Use use);
std::string describeByte(std::int64_t byte);

} // namespace leasehold::qemu

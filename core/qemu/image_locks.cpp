// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/qemu/image_locks.hpp"

#include "core/os/file_lock.hpp"

namespace leasehold::qemu {

namespace {

// Permission numbers n.
constexpr std::int64_t kRead = 0;
constexpr std::int64_t kWrite = 1;
constexpr std::int64_t kResize = 3;

} // namespace

std::vector<std::int64_t> conflictingBytes(Use use) {
    switch (use) {
    case Use::exclusive:
        // Reads and writes it, resizes qcow2; lets nobody else write or resize.
        return {kUsesBase + kWrite, kUsesBase + kResize, kDeniesBase + kRead, kDeniesBase + kWrite,
                kDeniesBase + kResize};
    case Use::shared:
        return {kDeniesBase + kRead, kDeniesBase + kWrite};
    case Use::readOnly:
        return {kUsesBase + kWrite, kDeniesBase + kRead};
    }
    return {};
}

std::string describeByte(std::int64_t byte) {
    switch (byte) {
    case kUsesBase + kRead:
        return "reads it";
    case kUsesBase + kWrite:
        return "writes to it";
    case kUsesBase + kResize:
        return "may resize it";
    case kDeniesBase + kRead:
        return "lets nobody else read it";
    case kDeniesBase + kWrite:
        return "lets nobody else write to it";
    case kDeniesBase + kResize:
        return "lets nobody else resize it";
    default:
        return "locks byte " + std::to_string(byte);
    }
}

std::optional<ImageConflict> findImageConflict(int fd, Use use, const std::string& what) {
    // Nearly always nobody is there: one question for all bytes.
    if (!os::findConflict(fd, os::LockType::write, {kUsesBase, kDeniesBase + kResize - kUsesBase + 1}, what))
        return std::nullopt;
    std::optional<ImageConflict> conflict;
    for (std::int64_t byte : conflictingBytes(use)) {
        if (!os::findConflict(fd, os::LockType::write, {byte, 1}, what))
            continue;
        if (conflict)
            conflict->words += ", " + describeByte(byte);
        else
            conflict = ImageConflict{byte, describeByte(byte)};
    }
    return conflict;
}

} // namespace leasehold::qemu

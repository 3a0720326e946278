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

namespace {
constexpr os::Range kGuard{kDeniesBase + kWrite, 1};
}

void putUpGuard(int fd, const std::string& what) {
    // Busy would mean that somebody holds the byte for writing, which QEMU never does: then it is as good as a guard.
    (void)os::tryLock(fd, os::LockType::read, kGuard, what);
}

void takeDownGuard(int fd, const std::string& what) {
    os::unlock(fd, kGuard, what);
}

namespace {

// Whether somebody locks the byte, found out by trying.
bool isLocked(int fd, os::Range byte, const std::string& what) {
    if (os::tryLock(fd, os::LockType::write, byte, what) == os::LockOutcome::contended)
        return true;
    os::unlock(fd, byte, what);
    return false;
}

} // namespace

std::optional<ImageConflict> findImageConflict(int fd, Use use, bool hidden, const std::string& what) {
    hidden = hidden && use != Use::readOnly;
    // Nearly always nobody is there: one question for all bytes.
    if (!hidden && !os::findConflict(fd, os::LockType::write, {kVirtlockd, kDeniesBase + kResize + 1}, what))
        return std::nullopt;
    os::LockType asked = use == Use::exclusive ? os::LockType::write : os::LockType::read;
    if (os::findConflict(fd, asked, {kVirtlockd, 1}, what))
        return ImageConflict{kVirtlockd, "locks its first byte, as virtlockd does for each guest that has it"};
    std::optional<ImageConflict> conflict;
    for (std::int64_t byte : conflictingBytes(use)) {
        os::Range range{byte, 1};
        if (!os::findConflict(fd, os::LockType::write, range, what) && !(hidden && isLocked(fd, range, what)))
            continue;
        if (conflict)
            conflict->words += ", " + describeByte(byte);
        else
            conflict = ImageConflict{byte, describeByte(byte)};
    }
    return conflict;
}

} // namespace leasehold::qemu

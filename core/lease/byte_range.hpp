// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Marks as single locked bytes of one file, far beyond any data: the offset says who. For storage where
// open-file-description locks reach everybody who can open the file.
//
//     bit 62 │ 61..59 │ 58..30      │ 29..0
//      1     │ kind   │ domain hash │ incarnation or token
//
// The area is 2^62 .. 2^63-1. QEMU locks bytes 100-203 (block/file-posix.c), libvirt byte 1
// (security/security_util.c), virtlockd byte 0: nobody meets us there. Nothing is ever written to these bytes, so the
// file does not grow.

#include "core/lease/medium.hpp"

#include <string>

namespace leasehold::lease {

class ByteRangeMedium final : public Medium {
public:
    // Neither owns the descriptor nor keeps the lock alive: whoever holds the open file description does. A read-only
    // descriptor can only carry read locks (fcntl(2), EBADF): enough for read-only mode. `name` is for messages, and
    // stays where it is: there is one of these for each disk in each call.
    ByteRangeMedium(int fd, bool writable, const std::string& name);
    ByteRangeMedium(int fd, bool writable, std::string&& name) = delete;

    [[nodiscard]] os::LockOutcome tryPlace(const Mark& mark, os::LockType type) override;
    void remove(const Mark& mark) override;
    void removeHandoff() override;
    void removeAll() override;
    bool any(MarkKind first, MarkKind last) const override;
    Rivals findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const override;
    std::vector<Mark> lookAt(std::uint32_t domain, Mode mode) const override;
    std::vector<Mark> lookToJoin(std::uint32_t domain, Mode mode) const override;
    std::vector<Mark> look() const override;
    Note note() const override;
    void setNote(const Note& note) override;

private:
    bool isLocked(const os::Range& range) const;
    void enumerate(const os::Range& area, std::vector<Mark>& marks) const;

    int fd_;
    bool writable_;
    const std::string& name_;
};

// Pure: a mark's byte, and back. A range that is no mark of ours, or more than a few, decodes as `foreign`.
std::int64_t encodeOffset(const Mark& mark);
std::vector<Mark> decodeRange(const os::Range& range);

constexpr std::int64_t kMarkArea = std::int64_t{1} << 62;

} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/note.hpp"

#include "core/os/error.hpp"

#include <unistd.h>

namespace leasehold::lease {

namespace {
constexpr off_t kLeavingBit = off_t{1} << kIdBits;
constexpr off_t kOwnerBit = off_t{2} << kIdBits;
} // namespace

Note readNote(int fd, const std::string& name) {
    off_t position = lseek(fd, 0, SEEK_CUR);
    if (position < 0)
        throw SystemError(errno, "read the position in", name);
    if (position >= 2 * kOwnerBit)
        return {};
    return {.owner = (position & kOwnerBit) != 0,
            .leaving = (position & kLeavingBit) != 0,
            .token = static_cast<std::uint32_t>(position & (kLeavingBit - 1))};
}

void writeNote(int fd, const Note& note, const std::string& name) {
    off_t position = off_t{note.token} + (note.leaving ? kLeavingBit : 0) + (note.owner ? kOwnerBit : 0);
    if (lseek(fd, position, SEEK_SET) < 0)
        throw SystemError(errno, "set the position in", name);
}

} // namespace leasehold::lease

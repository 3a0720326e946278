// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// A hash that every host computes the same. Not GLib's checksums: they allocate, and GLib before 2.76 has an allocator
// with locks of its own; a forked child must not wait for one that a thread of libvirtd held.

#include <cstdint>
#include <string_view>

namespace leasehold::os {

// FNV-1a, 64 bits (draft-eastlake-fnv).
constexpr std::uint64_t fnv1a(std::string_view text) {
    std::uint64_t hash = 0xcbf29ce484222325;
    for (char c : text)
        hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    return hash;
}

} // namespace leasehold::os

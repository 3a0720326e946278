// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The vocabulary of the lease protocol: modes, marks, and who placed them. Knows no file and no lock.
// DESIGN.md, "The lease protocol", says what each mark is for.

#include "core/mode.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace leasehold::lease {

using leasehold::Mode;

// Guests of different domains may use one resource at once only in these combinations.
constexpr bool compatible(Mode one, Mode other) {
    return one == other && one != Mode::exclusive;
}

using Uuid = std::array<unsigned char, 16>;

std::string formatUuid(const Uuid& uuid);
std::optional<Uuid> parseUuid(std::string_view text);

// Marks carry hashes, because a mark may be nothing but the offset of a locked byte.
constexpr int kDomainBits = 29;
constexpr int kIdBits = 30;

// FNV-1a of the UUID, 64 bits folded to 29 (draft-eastlake-fnv). Every host must compute the same.
std::uint32_t hashDomain(const Uuid& uuid);

// A random, non-zero number of 30 bits: an incarnation (one QEMU process) or a token (one handoff).
std::uint32_t drawId();

// One QEMU process of one domain, as marks name it.
struct Incarnation {
    std::uint32_t domain = 0; // hashDomain
    std::uint32_t id = 0;     // drawId

    bool operator==(const Incarnation&) const = default;
};

enum class MarkKind : std::uint8_t {
    owner,            // exclusive holds it for writing, read-only for reading, shared while it enters
    sharedOwner,      // (domain): what owner is to exclusive, among the incarnations of one shared domain
    presentExclusive, // (domain, incarnation): a living QEMU has the resource attached
    presentShared,
    presentReadOnly,
    handoff, // (domain, token): its placer would let a successor that quotes the token take over
    leaving, // (domain, incarnation): its live migration has begun
    taken,   // (domain, token): a successor has used the token; its source must never resume on it
    foreign, // a lock on the mark area that is not one of ours
};

struct Mark {
    MarkKind kind = MarkKind::foreign;
    std::uint32_t domain = 0;
    std::uint32_t id = 0; // incarnation or token, by kind

    bool operator==(const Mark&) const = default;
};

constexpr Mark presentMark(Mode mode, const Incarnation& who) {
    MarkKind kind = mode == Mode::exclusive ? MarkKind::presentExclusive
                    : mode == Mode::shared  ? MarkKind::presentShared
                                            : MarkKind::presentReadOnly;
    return {kind, who.domain, who.id};
}

// The mode of a present mark; nothing for the other kinds.
constexpr std::optional<Mode> presentMode(const Mark& mark) {
    switch (mark.kind) {
    case MarkKind::presentExclusive:
        return Mode::exclusive;
    case MarkKind::presentShared:
        return Mode::shared;
    case MarkKind::presentReadOnly:
        return Mode::readOnly;
    default:
        return std::nullopt;
    }
}

} // namespace leasehold::lease

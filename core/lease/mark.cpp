// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/mark.hpp"

#include "core/os/error.hpp"
#include "core/os/hash.hpp"

#include <cerrno>

#include <glib.h>
#include <sys/random.h>
#include <unistd.h>

namespace leasehold::lease {

std::string formatUuid(const Uuid& uuid) {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string text(36, '-');
    std::size_t at = 0;
    for (std::size_t i = 0; i < uuid.size(); i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10)
            at++;
        text[at++] = kDigits[uuid[i] >> 4];
        text[at++] = kDigits[uuid[i] & 15];
    }
    return text;
}

std::optional<Uuid> parseUuid(std::string_view text) {
    Uuid uuid{};
    if (text.size() != 36)
        return std::nullopt;
    std::size_t nibble = 0;
    for (std::size_t i = 0; i < text.size(); i++) {
        if (i == 8 || i == 13 || i == 18 || i == 23) {
            if (text[i] != '-')
                return std::nullopt;
            continue;
        }
        int value = g_ascii_xdigit_value(text[i]);
        if (value < 0)
            return std::nullopt;
        uuid[nibble / 2] = static_cast<unsigned char>(uuid[nibble / 2] << 4 | value);
        nibble++;
    }
    return uuid;
}

std::uint32_t hashDomain(const Uuid& uuid) {
    std::uint64_t hash = os::fnv1a({reinterpret_cast<const char*>(uuid.data()), uuid.size()});
    return static_cast<std::uint32_t>((hash >> 32 ^ hash) & ((1u << kDomainBits) - 1));
}

std::uint32_t drawId() {
    for (;;) {
        std::uint32_t value = 0;
        // At most 256 bytes are never interrupted or short once the pool is ready; before, a signal interrupts the wait
        // for it (getrandom(2)).
        if (TEMP_FAILURE_RETRY(getrandom(&value, sizeof value, 0)) != sizeof value)
            throw SystemError(errno, "get", "a random number");
        value &= (1u << kIdBits) - 1;
        // Not 0, which means "none"; not all ones, which would be the very last byte of the address space.
        if (value != 0 && value != (1u << kIdBits) - 1)
            return value;
    }
}

} // namespace leasehold::lease

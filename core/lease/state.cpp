// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/state.hpp"

#include "core/os/text.hpp"

#include <charconv>

namespace leasehold::lease {

namespace {
constexpr std::string_view kPrefix = "leasehold1:";
constexpr std::size_t kTokenDigits = 8;

// All but the token.
std::string beginOf(const Uuid& uuid) {
    std::string text(kPrefix);
    text += formatUuid(uuid);
    text += ':';
    return text;
}
} // namespace

std::string encodeState(const Uuid& uuid, std::uint32_t token) {
    return beginOf(uuid) + os::hexadecimal(token);
}

std::optional<std::uint32_t> parseState(std::string_view text, const Uuid& uuid) {
    const std::string expected = beginOf(uuid);
    if (text.size() != expected.size() + kTokenDigits || !text.starts_with(expected))
        return std::nullopt;
    std::uint32_t token = 0;
    const char* end = text.data() + text.size();
    auto [rest, error] = std::from_chars(text.data() + expected.size(), end, token, 16);
    if (error != std::errc() || rest != end || token == 0 || token >> kIdBits != 0)
        return std::nullopt;
    return token;
}

} // namespace leasehold::lease

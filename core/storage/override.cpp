// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/override.hpp"

#include <algorithm>
#include <array>

namespace leasehold::storage {

namespace {

// "/a//b/./c/" is "/a/b/c".
std::optional<std::string> normalize(std::string_view path) {
    if (!path.starts_with('/') || path.find('\0') != std::string_view::npos)
        return std::nullopt;
    std::string normal;
    while (!path.empty()) {
        path.remove_prefix(1); // the slash
        std::string_view component = path.substr(0, path.find('/'));
        path.remove_prefix(component.size());
        if (component == "..")
            return std::nullopt;
        if (!component.empty() && component != ".")
            normal.append("/").append(component);
    }
    return normal.empty() ? "/" : normal;
}

bool liesBelow(std::string_view path, std::string_view prefix) {
    return prefix == "/" || (path.starts_with(prefix) && (path.size() == prefix.size() || path[prefix.size()] == '/'));
}

struct Word {
    std::string_view text;
    LockKind lock;
    Scope scope;
};

constexpr std::array kWords{
    Word{"ofd", LockKind::byteRange, Scope::allHosts}, Word{"flock", LockKind::flock, Scope::allHosts},
    Word{"local", LockKind::byteRange, Scope::thisHost}, Word{"refuse", LockKind::none, Scope::thisHost}};

} // namespace

std::optional<Override> parseOverride(std::string_view text) {
    std::size_t equals = text.rfind('='); // a path may have one, too
    if (equals == std::string_view::npos)
        return std::nullopt;
    auto prefix = normalize(text.substr(0, equals));
    auto word = std::find_if(kWords.begin(), kWords.end(),
                             [&](const Word& candidate) { return candidate.text == text.substr(equals + 1); });
    if (!prefix || word == kWords.end())
        return std::nullopt;
    return Override{*prefix, word->lock, word->scope};
}

const Override* findOverride(std::span<const Override> overrides, std::string_view path) {
    auto normal = normalize(path);
    const Override* best = nullptr;
    for (const Override& candidate : overrides)
        if (normal && liesBelow(*normal, candidate.prefix) && (!best || candidate.prefix.size() > best->prefix.size()))
            best = &candidate;
    return best;
}

} // namespace leasehold::storage

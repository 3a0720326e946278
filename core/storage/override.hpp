// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What an administrator knows better than we can see: which lock can be trusted below a path. Pure text; who reads the
// configuration file and who looks at storage are elsewhere.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace leasehold::storage {

enum class LockKind {
    byteRange, // open-file-description locks on the file itself
    flock,     // flock on files in a lockspace: byte-range locks do not reach everybody, or outlive their holder
    none,      // not, or not known: a lease here would only pretend
};

// Whom a lock keeps out.
enum class Scope { thisHost, allHosts };

struct Override {
    std::string prefix; // absolute, without empty, "." and ".." components; "/" is everything
    LockKind lock = LockKind::none;
    Scope scope = Scope::thisHost;

    bool operator==(const Override&) const = default;
};

// `/path/prefix=WORD` with WORD one of ofd, flock (of all hosts), local (byte-range locks of this host) and refuse.
// Nothing when it is anything else.
std::optional<Override> parseOverride(std::string_view text);

// The override with the longest prefix among those that `path` lies below, by whole components; null when there is
// none. A path that is relative or goes up ("..") lies below nothing.
const Override* findOverride(std::span<const Override> overrides, std::string_view path);

} // namespace leasehold::storage

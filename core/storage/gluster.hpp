// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// GlusterFS: whether a lock of this mount can be trusted. Its client is a process, made of translators, which shows
// what it is made of in a file of the mount itself, `.meta/graphs/active/volfile`. A brick drops the locks of a client
// that was silent for too long; only with client.strict-locks the client's writes through the locked descriptors fail
// from then on. Called by classify() alone.

#include "core/storage/classify.hpp"

#include <string>
#include <string_view>

namespace leasehold::storage {

// `fd` is open there.
Storage classifyGluster(const Mount& mount, int fd);

// What stands against a lease there, as a clause with what to do; nothing where `reason` is empty.
struct GlusterDoubt {
    std::string reason;
    bool ofVolume = false; // all clients have it, so no host leases there
};

// Pure. `volfile` is the text of the active graph, `mount` is for the commands.
GlusterDoubt doubtGluster(std::string_view volfile, const Mount& mount);

// The text of the active graph of the mount at `point`; or why there is none: it cannot be read, or it may be somebody
// else's (on another file system than `device`, not root's, or writable).
struct GlusterGraph {
    std::string text, problem;
};
GlusterGraph readGlusterGraph(const std::string& point, std::uint64_t device);

} // namespace leasehold::storage

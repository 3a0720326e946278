// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Questions about the leases of a guest that need the leases themselves: duplicates of the descriptors in its QEMU.

#include "core/inspect.hpp"
#include "tools/output.hpp"

namespace leasehold::tools {

// By what its QEMU says: for those who are asked by a person, and may be interrupted.
bool mayHang(const GuestView& guest);

// What `work` finds out about this guest with its leases open; null if it has none any more. If it may hang that is
// done in a process of its own, and nothing is given when there was no answer in time: on NFS even closing a duplicate
// waits for what QEMU has not written back (Linux fs/nfs/nfs4file.c, nfs4_file_flush), which no signal ends. Throws
// what readLeases and the work throw.
std::optional<Json> tryAskGuest(const GuestView& guest, bool mayHang, int seconds,
                                const std::function<Json(const GuestView&)>& work);

} // namespace leasehold::tools

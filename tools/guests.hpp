// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Questions about the leases of a guest that need the leases themselves: duplicates of the descriptors in its QEMU.

#include "core/inspect.hpp"
#include "tools/output.hpp"

namespace leasehold::tools {

// Whether a question about this guest, whose leases have been surveyed, may have to wait for storage that does not
// answer: its leases say so, whatever this host has mounted where (umount -l, other namespaces). `onThisHost` is
// storage::hostHasRemoteMounts: then a QEMU could have put anything into its vessel.
bool mayHang(const GuestView& guest, bool onThisHost);

// What `work` finds out about this guest with its leases open; null if it has none any more. Where the storage may hang
// that is done in a process of its own, and nothing is given when there was no answer in
// time. Such a process may be left behind, also one that has answered (os::stuckHelpers): on NFS even closing a
// duplicate waits for what QEMU has not written back (Linux fs/nfs/nfs4file.c, nfs4_file_flush), which no signal ends.
// Throws what readLeases and the work throw.
std::optional<Json> tryAskGuest(const GuestView& guest, bool onThisHost, int seconds,
                                const std::function<Json(const GuestView&)>& work);

// The same for those who ask about all guests once: nothing either when so many have been left behind that the storage
// must be broken, or when the question failed. What is wrong with the leases themselves is thrown.
std::optional<Json> tryAskGently(const GuestView& guest, bool onThisHost, int seconds,
                                 const std::function<Json(const GuestView&)>& work);

// Why something about a guest could not be read: because what it keeps is damaged, or because that failed.
struct Trouble {
    std::string text;
    bool damaged = false;
};
std::optional<Trouble> attemptToRead(const std::function<void()>& work);

// "leased", "none", "hidden", "foreign", "gone".
const char* protectionName(Protection protection);

} // namespace leasehold::tools

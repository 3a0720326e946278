// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/guests.hpp"

#include <algorithm>

namespace leasehold::tools {

bool mayHang(const GuestView& guest) {
    return std::any_of(guest.leases.begin(), guest.leases.end(),
                       [](const StoredView& lease) { return lease.stored.remote; }) ||
           std::any_of(guest.companions.begin(), guest.companions.end(),
                       [](const qemu::StoredLease& stored) { return stored.remote; });
}

std::optional<Json> tryAskGuest(const GuestView& guest, bool mayHang, int seconds,
                                const std::function<Json(const GuestView&)>& work) {
    auto ask = [&](GuestView& open) {
        open.tag = guest.tag;
        open.pid = guest.pid;
        return readLeases(open) == Protection::leased ? work(open) : Json();
    };
    if (!mayHang) {
        GuestView open;
        return ask(open);
    }
    return tryAskWithin(seconds, {}, [&] {
        static GuestView open; // closed by the end of that process, which nobody waits for
        return ask(open);
    });
}

} // namespace leasehold::tools

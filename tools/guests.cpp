// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/guests.hpp"

#include "core/os/deadline.hpp"
#include "tools/options.hpp"

#include <algorithm>

namespace leasehold::tools {

bool mayHang(const GuestView& guest, bool onThisHost) {
    return onThisHost ||
           std::any_of(guest.leases.begin(), guest.leases.end(),
                       [](const StoredView& lease) { return lease.stored.remote; }) ||
           std::any_of(guest.companions.begin(), guest.companions.end(),
                       [](const qemu::StoredLease& companion) { return companion.remote; });
}

std::optional<Json> tryAskGuest(const GuestView& guest, bool onThisHost, int seconds,
                                const std::function<Json(const GuestView&)>& work) {
    auto ask = [&](GuestView& open) {
        open.tag = guest.tag;
        open.pid = guest.pid;
        Protection protection = readLeases(open);
        if (protection == Protection::leased)
            return work(open);
        if (protection != Protection::gone)
            throw Error(Fault::system, "its leases were there, and could not be found again: try again");
        return Json();
    };
    if (!mayHang(guest, onThisHost)) {
        GuestView open;
        return ask(open);
    }
    return tryAskWithin(seconds, {}, [&] {
        static GuestView open; // closed by the end of that process, which nobody waits for
        return ask(open);
    });
}

std::optional<Json> tryAskGently(const GuestView& guest, bool onThisHost, int seconds,
                                 const std::function<Json(const GuestView&)>& work) {
    constexpr std::size_t kEnoughStuck = 8;
    if (mayHang(guest, onThisHost) && os::stuckHelpers().size() >= kEnoughStuck)
        return std::nullopt;
    try {
        return tryAskGuest(guest, onThisHost, seconds, work);
    } catch (const Error& error) {
        if (error.fault() == Fault::system)
            return std::nullopt;
        throw;
    }
}

std::optional<Trouble> attemptToRead(const std::function<void()>& work) {
    bool damaged = false;
    auto problem = attempt([&] {
        try {
            work();
        } catch (const Error& error) {
            damaged = error.fault() == Fault::invalid;
            throw;
        }
    });
    return problem ? std::optional(Trouble{*problem, damaged}) : std::nullopt;
}

const char* protectionName(Protection protection) {
    switch (protection) {
    case Protection::leased:
        return "leased";
    case Protection::none:
        return "none";
    case Protection::hidden:
        return "hidden";
    case Protection::foreign:
        return "foreign";
    case Protection::gone:
        break;
    }
    return "gone";
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/guests.hpp"

#include "core/os/deadline.hpp"

namespace leasehold::tools {

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

std::optional<Json> tryAskGently(const GuestView& guest, bool mayHang, int seconds,
                                 const std::function<Json(const GuestView&)>& work) {
    constexpr std::size_t kEnoughStuck = 8;
    if (mayHang && os::stuckHelpers().size() >= kEnoughStuck)
        return std::nullopt;
    try {
        return tryAskGuest(guest, mayHang, seconds, work);
    } catch (const Error& error) {
        if (error.fault() == Fault::system)
            return std::nullopt;
        throw;
    }
}

} // namespace leasehold::tools

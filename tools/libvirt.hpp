// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What libvirt knows and does, by its public API. A libvirtd that hangs makes these hang: call them where a deadline
// ends them. They throw when it cannot be reached.

#include "tools/output.hpp"

#include <string_view>

#include <sys/types.h>

namespace leasehold::tools {

// The UUIDs of the guests that run; and of those that have a QEMU, running or not.
Json listRunningGuests();
Json listActiveGuests();

// {"version": 9000000, "guests": [{"name": ..., "disks": [{"type": "file", "path": ...}]}]}: the defined guests and
// the transient ones. Disks without a path (network, volume) have an empty one.
Json describeLibvirt();

// Whether a guest's <on_lockfailure> can say this (https://libvirt.org/formatdomain.html, "Events configuration").
bool isFailureAction(std::string_view word);

// Does to a guest that has lost a lease what its <on_lockfailure> says, or `fallback` where that says nothing.
// {"action": "pause", "asked_by": "guest" or "default", "did": true, "text": "it was paused"}. The vessel that said
// whose QEMU this process is may be forged: nothing is done unless libvirt says so, too. With dryRun nothing is done.
Json respondToLoss(const std::string& uuid, pid_t pid, const std::string& fallback, bool dryRun);

} // namespace leasehold::tools

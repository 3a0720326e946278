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

// {"version": 9000000, "guests": [{"name": ..., "disks": [{"type": "file", "path": ..., "readonly": false}]}]}: the
// defined guests and the transient ones. Disks without a path (network, volume) have an empty one.
Json describeLibvirt();

// Whether a guest's <on_lockfailure> can say this (https://libvirt.org/formatdomain.html, "Events configuration").
bool isFailureAction(std::string_view word);

// What is to be done about a guest that has lost a lease: what its <on_lockfailure> says, or `fallback` where that says
// nothing. {"action": "restart", "asked_by": "guest" or "default", "xml": what to start it again from, or null if it
// has a configuration of its own}.
Json planResponse(const std::string& uuid, pid_t pid, const std::string& fallback);

// Does it: pause, or powers off for poweroff and restart. {"did": true, "text": "it was paused"}, or {"refused": why}.
// Throws where it is not known whether it was done.
Json respondToLoss(const std::string& uuid, pid_t pid, const std::string& action);

// The second half of a restart, of a guest whose QEMU was to be powered off: {"over": true, "text": how it went}, or
// {"over": false} while that QEMU is there. Throws where it is not known how it went.
Json startAgain(const std::string& uuid, pid_t pid, const Json& xml);

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What libvirt knows, by its public API, read-only. A libvirtd that hangs makes these hang: call them where a deadline
// ends them. They throw when it cannot be reached.

#include "tools/output.hpp"

namespace leasehold::tools {

// The UUIDs of the guests that run.
Json listRunningGuests();

// {"version": 9000000, "guests": [{"name": ..., "disks": [{"type": "file", "path": ...}]}]}: the defined guests and
// the transient ones. Disks without a path (network, volume) have an empty one.
Json describeLibvirt();

} // namespace leasehold::tools

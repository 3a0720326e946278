// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Whether a lease is still what it was when it was granted, though its holder lives: storage forgets. Asks through the
// lease's own descriptors, and takes nothing back: to lock again could succeed after somebody else has written. Called
// by the engine before a guest runs, and by core/inspect for the watcher. May hang where the storage does.

#include "core/place.hpp"

#include <optional>
#include <string>

namespace leasehold {

// "was deleted from its lockspace": how it was lost, as the end of a sentence about it. Nothing where no sign of a loss
// is seen. Throws where it cannot be told.
std::optional<std::string> findLoss(const qemu::StoredLease& stored, const lease::Incarnation& self);

// The same, and whether somebody else has what was ours by now: storage may give a lock away without a word (GlusterFS
// without client.strict-locks). Not for a guest that is about to run: there the lock itself decides.
std::optional<std::string> findLossOrTaker(const qemu::StoredLease& stored, const lease::Incarnation& self);

} // namespace leasehold

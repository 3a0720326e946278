// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The engine's words: why a guest was refused, who has the image, and what to do. Looks around (other processes'
// vessels, the owner record) only after something was refused. Each text is one line: libvirt shows it as it is.

#include "core/engine.hpp"

namespace leasehold {

std::string explainRefusal(const Guest& guest, const qemu::StoredLease& stored, const lease::Refusal& refusal);

// A program outside leasehold uses the image. `holders` are the processes of this host that do, `own` is the guest's.
std::string explainOutsider(const std::string& path, const std::string& words, const std::vector<pid_t>& holders,
                            pid_t own);

// The guest's QEMU keeps no leases.
std::string explainNoVessel(const Guest& guest);

} // namespace leasehold

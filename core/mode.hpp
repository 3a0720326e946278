// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// How a guest uses a resource: the one word that lease/ and qemu/ share.

#include <cstdint>

namespace leasehold {

// libvirt: nothing, <shareable/>, <readonly/>. The numbers are stored in vessels.
enum class Mode : std::uint8_t { exclusive, shared, readOnly };

} // namespace leasehold

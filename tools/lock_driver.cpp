// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Compiled by itself: only here does it matter in which distribution's folder libvirt looks. All other sources compile
// alike for each package, and a compiler cache does that once.

#include "tools/plugin_file.hpp"

namespace leasehold::tools {

const char* const kLockDriver = LOCK_DRIVER;
const char* const kLockDriverHelp = "Another lock driver (" LOCK_DRIVER ")";

} // namespace leasehold::tools

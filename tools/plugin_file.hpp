// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The lock driver as a file. It is not loaded: that only libvirtd may do.

#include <string>

namespace leasehold::tools {

// Where libvirt looks for it, and the help of the option that names another one.
extern const char* const kLockDriver;
extern const char* const kLockDriverHelp;

// "0.1.0", or "unknown" for a file that is not leasehold's. Throws where it cannot be read.
std::string versionOfPlugin(const std::string& file);

} // namespace leasehold::tools

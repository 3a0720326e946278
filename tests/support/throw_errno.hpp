// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// For programs of the tests that use nothing of core/. Call it on the line of the call that failed, or before errno
// changes.

#include <cerrno>
#include <string>
#include <system_error>

namespace leasehold::support {

// Throws std::system_error with errno as it is.
[[noreturn]] inline void throwErrno(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

} // namespace leasehold::support

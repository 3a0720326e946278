// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// How a message reaches the person at virsh: libvirt's own error report, found at run time. The function is private to
// libvirt (versioned LIBVIRT_PRIVATE_x.y.z), so it is never linked: one binary serves all versions, and where it is
// missing the text goes to standard error, which is the journal of libvirtd or the log of the guest.

#include <string>

namespace leasehold::plugin {

// libvirt's error codes (libvirt/virterror.h, virErrorNumber).
enum class ErrorCode {
    internal = 1,
    operationFailed = 9,
    systemError = 38,
    configUnsupported = 67,
    resourceBusy = 87,
};

// Has to be called once while libvirtd is still alone with us: the forked child may not look up symbols.
void findReporter();

void report(ErrorCode code, const std::string& message);

// To standard error only: nothing failed.
void warn(const std::string& message);

} // namespace leasehold::plugin

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/error.hpp"

#include <cstring>

#include <unistd.h>

namespace leasehold {

namespace {

std::string describe(int error, const std::string& operation, const std::string& subject) {
    char buffer[128];
    // The GNU variant: it may return a constant instead of filling the buffer.
    std::string text = operation + " " + subject + ": " + strerror_r(error, buffer, sizeof buffer);
    if (error == EMFILE)
        text += "; raise the limit of open files (LimitNOFILE= of libvirtd)";
    return text;
}

} // namespace

SystemError::SystemError(int error, const std::string& operation, const std::string& subject)
    : Error(Fault::system, describe(error, operation, subject)), error_(error) {}

std::string nextStep(int error) {
    switch (error) {
    case EIO:
    case ESTALE:
    case ENOTCONN:
    case ESHUTDOWN:
        return "; the storage is broken or cut off (dmesg may say more): mend it, and try again";
    case EROFS:
        return "; mount that for writing";
    case EACCES:
    case EPERM:
        return geteuid() == 0 ? "" : "; run this as root";
    default:
        return "";
    }
}

} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The exceptions of leasehold. "Somebody else holds it" is never one of them: that is an answer, returned as a value.
// What is thrown is breakage: nothing was decided, so whoever catches it refuses. Everything that leaves core is an
// Error or a std::bad_alloc; it is caught in plugin/ and at the end of a helper process (deadline.hpp).

#include <cerrno>
#include <stdexcept>
#include <string>

namespace leasehold {

// What kind of breakage, as far as somebody outside wants to tell them apart (libvirt's error codes).
enum class Fault {
    system,      // a system call failed
    unsupported, // this storage, kernel or element cannot be served; waiting does not help
    invalid,     // hostile or damaged input: a vessel, a parameter
};

class Error : public std::runtime_error {
public:
    Error(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
    Fault fault() const { return fault_; }

private:
    Fault fault_;
};

// A failed system call: "OPERATION SUBJECT: strerror". The error number is a parameter, not read here, because it has
// to be taken on the line of the call, before anything else can overwrite it.
class SystemError : public Error {
public:
    SystemError(int error, const std::string& operation, const std::string& subject);
    int error() const { return error_; }

private:
    int error_;
};

// What whoever reads of a failed call can do about it, to be appended: "; ...". Empty where the number does not tell.
// Errors of storage that has died, was taken away or has evicted this host; and, for who is not root, of permissions.
std::string nextStep(int error);

} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "plugin/report.hpp"

#include "core/os/text.hpp"

#include <atomic>

#include <dlfcn.h>
#include <unistd.h>

namespace leasehold::plugin {

namespace {

using Reporter = void (*)(int domain, int code, const char* file, const char* function, std::size_t line,
                          const char* format, ...);

constexpr int kFromLocking = 42; // virErrorDomain, VIR_FROM_LOCKING

std::atomic<Reporter> reporter{nullptr};

} // namespace

void findReporter() {
    reporter = reinterpret_cast<Reporter>(dlsym(RTLD_DEFAULT, "virReportErrorHelper"));
}

void report(ErrorCode code, const std::string& message) {
    // Names of guests and images may hold anything: none of it may forge a line of the log.
    if (Reporter call = reporter)
        call(kFromLocking, static_cast<int>(code), "leasehold", "", 0, "%s", os::printable(message).c_str());
    else
        warn(message);
}

void warn(const std::string& message) {
    // One write: libvirtd's threads share the stream. No stdio: the forked child must not wait for its lock.
    std::string line = "leasehold: " + os::printable(message) + "\n";
    ssize_t ignored = write(STDERR_FILENO, line.data(), line.size());
    (void)ignored;
}

} // namespace leasehold::plugin

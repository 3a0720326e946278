// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Calls that may never return: on network storage even a stat(2) or a lock call that does not wait can hang for as long
// as a server does not answer. They run in a process of their own, which can be killed; a thread could not. Locks
// belong to open file descriptions, so what that process locks through a shared one stays locked when it ends.

#include <chrono>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <sys/types.h>

namespace leasehold::os {

// Runs `work` in a forked process and gives what it returns; nothing when it has not returned within the limit. The
// process is killed then, and whatever it held alone is gone. All descriptors above 2 but those in `keep` are closed
// in it: a hanging helper must not hold on to what libvirtd has open. An exception in it throws Error here, with the
// same fault and text.
//
// A process that cannot even be killed (uninterruptible in the kernel) is left behind and reaped by a later call; with
// too many of them around (kMaxStuckHelpers) the call throws at once.
std::optional<std::string> runWithDeadline(std::chrono::milliseconds limit, std::span<const int> keep,
                                           const std::function<std::string()>& work);

constexpr std::size_t kMaxStuckHelpers = 64;

// Those that have been left behind, and still are there. One that has reported may be among them: it may hang in
// closing what it has open.
std::vector<pid_t> stuckHelpers();

} // namespace leasehold::os

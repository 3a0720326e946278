// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_CALLS_HPP
#define LEASEHOLD_TESTS_BENCH_CALLS_HPP

// What does not depend on the machine: how many system calls something makes.

#include <functional>
#include <optional>

namespace leasehold::bench {

// In a forked child, under ptrace(2); with the processes that the child forks, where it waits for them. Nothing where
// tracing is forbidden. Throws when the child fails.
std::optional<long> countSystemCalls(const std::function<void()>& body);

} // namespace leasehold::bench

#endif

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Every system call of a piece of work fails once.

#include <functional>
#include <string>

namespace leasehold::unit {

struct InjectedFault {
    std::string what; // which call of the work, its name, the error
    // What the work gave, or "thrown: " and the words of an Error; anything else that befell it starts with "CRASH".
    std::string outcome;
};

// Runs `work` in a child process as often as it has system calls; in each, one of them is not made and gives an error
// that fits it. Of each call `errors` different ones are tried. Before each run `scene` is called, and after it
// `check`, both here. Only each `every`th call fails. Gives the number of faults, or -1 where tracing is forbidden or
// unknown on this machine.
int failAtEverySystemCall(int errors, int every, const std::function<void()>& scene,
                          const std::function<std::string()>& work,
                          const std::function<void(const InjectedFault&)>& check);

} // namespace leasehold::unit

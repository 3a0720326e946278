// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Every system call of a piece of work fails once.

#include <functional>
#include <string>
#include <vector>

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

// How many faults there were in this process, and of how many kinds: a call and its error.
std::string tellFaultsSoFar();

// The end of a program.
struct ProgramEnd {
    std::string what; // which call failed, as above
    int error = 0;    // how
    int status = 0;   // waitpid(2)
    bool hangs = false;
    std::string said, complained; // its outputs
};

// The same for a program, with all processes that it starts, from when it is loaded until it becomes another one. The
// first end is that without a fault. `limit`: about so many calls fail, spread over all; 0: each.
int failAtEverySystemCallOf(const std::vector<std::string>& words, int errors, int limit,
                            const std::function<void(const ProgramEnd&)>& check);

} // namespace leasehold::unit

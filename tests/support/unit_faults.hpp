// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Every system call of a piece of work fails once.

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace leasehold::unit {

// What is made to fail: a call of libvirt, or a verb of the command; and where the leases are.
struct Entry {
    std::string name, medium;
};

struct InjectedFault {
    std::string what; // which call of the work, its name, the error
    // What the work gave, or "thrown: " and the words of an Error; anything else that befell it starts with "CRASH".
    std::string outcome;
};

// Runs `work` in a child process as often as it has system calls; in each, one of them is not made and gives an error
// that fits it. Of each call `errors` different ones are tried. Before each run `scene` is called, and after it
// `check`, both here. Only each `every`th call fails. Gives the number of faults, or -1 where tracing is forbidden or
// unknown on this machine.
int failAtEverySystemCall(const Entry& entry, int errors, int every, const std::function<void()>& scene,
                          const std::function<std::string()>& work,
                          const std::function<void(const InjectedFault&)>& check);

// That a process was killed in it so often.
void countDeaths(const Entry& entry, int deaths);

// A table of what was made to fail in this process since it was asked for last: a line for each entry and medium, and
// where all is tried (LEASEHOLD_LONG) one for each of its system calls and errors.
std::string tellFaults();

// The end of a program.
struct ProgramEnd {
    std::string what; // which call failed, as above
    std::string call; // its name
    int error = 0;    // how
    int status = 0;   // waitpid(2)
    bool hangs = false;
    std::string said, complained;                      // its outputs
    std::vector<std::pair<int, std::string>> fallible; // where none was to fail: the calls that can, and their names
};

// A program, with all processes that it starts, from when it is loaded until it becomes another one: call number
// `failing` of those fails (0: none), or the first after it that can, with the error number `choice` of those that fit
// it. Where it sleeps for a second or longer it does not. Throws std::system_error where tracing is forbidden or
// unknown.
ProgramEnd failOneSystemCallOf(const std::vector<std::string>& words, int failing, int choice);

// Each call of such a program. The first end is that without a fault. `limit`: about so many calls fail, spread over
// all; 0: each.
int failAtEverySystemCallOf(const Entry& entry, const std::vector<std::string>& words, int errors, int limit,
                            const std::function<void(const ProgramEnd&)>& check);

} // namespace leasehold::unit

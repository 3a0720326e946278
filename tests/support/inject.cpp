// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// inject REPORT NUMBER CHOICE PROGRAM [WORD...]: runs the program as unit_faults.hpp says, and one of its system calls,
// or of its helpers', fails: that with this number (0: none), or the first after it that can, with the error that has
// this number among those that fit it. For tests that are not written in C++. What the program says, and how it ends,
// is as without this. The report: whether anything hung, what failed, and where nothing had to, which calls can: lines
// of a word and what it means.

#include "tests/support/unit_faults.hpp"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <sys/wait.h>

int main(int count, char** words) {
    using namespace leasehold::unit;
    if (count < 5) {
        std::cerr << "usage: inject REPORT NUMBER CHOICE PROGRAM [WORD...]\n";
        return 2;
    }
    try {
        const ProgramEnd end =
            failOneSystemCallOf({words + 4, words + count}, std::atoi(words[2]), std::atoi(words[3]));
        std::cout << end.said << std::flush;
        std::cerr << end.complained << std::flush;
        std::ofstream report(words[1]);
        if (end.hangs)
            report << "hangs\n";
        if (!end.what.empty())
            report << "failed " << end.what << '\n';
        for (const auto& [number, call] : end.fallible)
            report << "fallible " << number << ' ' << call << '\n';
        return WIFEXITED(end.status) ? WEXITSTATUS(end.status) : 128 + WTERMSIG(end.status);
    } catch (const std::exception& error) {
        std::cerr << "inject: " << error.what() << '\n';
        return 77;
    }
}

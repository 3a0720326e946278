// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The verbs of the leasehold command, one file each. They parse their arguments, ask core, and print: for a person, or
// as JSON. What goes wrong is thrown and ends at one wall, in main.cpp.

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace leasehold::tools {

// leasehold(8), EXIT STATUS.
constexpr int kDone = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 2;
constexpr int kWarnings = 3;
constexpr int kProblems = 4;
constexpr int kNotMet = 5;
constexpr int kRefused = 75;    // sysexits.h, EX_TEMPFAIL: try again later
constexpr int kRunFailed = 125; // as env(1) and nohup(1)
constexpr int kCannotExecute = 126;
constexpr int kNoCommand = 127;

using Words = std::vector<std::string>;

int inspect(const Words& arguments);
int status(const Words& arguments);
int classify(const Words& arguments);
int check(const Words& arguments);
int probe(const Words& arguments);
int run(const Words& arguments);
int watch(const Words& arguments);
int fenced(const Words& arguments);
int enable(const Words& arguments);
int disable(const Words& arguments);

// Where one broken thing must not hide the others: what went wrong with it, or nothing.
std::optional<std::string> attempt(const std::function<void()>& work);

} // namespace leasehold::tools

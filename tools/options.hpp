// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The options of one verb, by GLib's parser.

#include "tools/verbs.hpp"

#include <deque>
#include <memory>
#include <stdexcept>

#include <glib.h>

namespace leasehold::tools {

class UsageError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class Options {
public:
    // "inspect", "IMAGE...", one sentence for --help.
    Options(const char* verb, const char* operands, const char* summary);

    void add(const char* name, bool& value, const char* help);
    // `least` is the smallest that means something.
    void add(const char* name, int& value, const char* help, int least = 0, const char* unit = "SECONDS");
    void add(const char* name, std::string& value, const char* help, const char* unit);

    // Gives the operands. Prints the help and ends the process where that was asked for.
    Words parse(const Words& arguments);

private:
    void add(const char* name, GOptionArg kind, void* place, const char* help, const char* unit);

    std::string verb_;
    std::unique_ptr<GOptionContext, decltype(&g_option_context_free)> context_;
    struct Flag {
        gboolean parsed;
        bool* value;
    };
    struct Text {
        char* parsed;
        std::string* value;
    };
    std::deque<Flag> flags_; // GLib keeps pointers into them
    std::deque<Text> texts_;
    struct Number {
        const char* name;
        int* value;
        int least;
    };
    std::deque<Number> numbers_;
};

} // namespace leasehold::tools

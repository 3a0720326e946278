// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/), as `status --prometheus`
// prints it and `watch --textfile` writes it.

#include "tools/output.hpp"

#include <set>

namespace leasehold::tools {

class Metrics {
public:
    // Begins with leasehold_build_info.
    Metrics();

    // A gauge: what comes next, and what it says.
    void begin(const std::string& name, const std::string& help);

    // One series of it; {"guest": "db", "pid": 52}. The second one with the same labels is left out: who reads this
    // takes all or nothing, and a guest may say anything of itself.
    void add(const Json& labels, double value);

    const std::string& text() const { return text_; }

private:
    std::string name_, text_;
    std::set<std::string> seen_;
};

// Whole or not at all, readable for everybody: what collects it is another user. Throws where it cannot be written.
void writeTextfile(const std::string& path, const std::string& text);

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_REPORT_HPP
#define LEASEHOLD_TESTS_BENCH_REPORT_HPP

// From samples to what people read: medians, 99th percentiles, ratios, and whether the project's goals were met in this
// run. Knows nothing of how the samples came about.

#include <array>
#include <chrono>
#include <cstddef>
#include <iosfwd>
#include <map>
#include <string>
#include <vector>

namespace leasehold::bench {

constexpr char kLeasehold[] = "leasehold";
constexpr char kVirtlockd[] = "virtlockd";
constexpr char kBare[] = "bare";

struct Summary {
    double median = 0; // microseconds
    double p99 = 0;    // nearest rank
};

Summary summarise(std::vector<std::chrono::nanoseconds> samples);

// One line of the table. A contestant that was not measured is not in the map.
struct Row {
    std::size_t disks;
    std::string operation;
    std::map<std::string, Summary> contestants;
};

struct Run {
    std::string kernel;
    std::string fileSystem;
    std::string directory;
    unsigned cpus = 0;
    double loadBefore = 0; // of the last minute
    std::size_t repetitions = 0;
    std::vector<Row> rows;
};

void printTable(std::ostream& out, const Run& run);
void printGoals(std::ostream& out, const Run& run);
void printJson(std::ostream& out, const Run& run);

} // namespace leasehold::bench

#endif

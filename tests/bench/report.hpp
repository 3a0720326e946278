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
#include <optional>
#include <string>
#include <vector>

namespace leasehold::bench {

constexpr char kLeasehold[] = "leasehold";
constexpr char kVirtlockd[] = "virtlockd";
constexpr char kSanlock[] = "sanlock";
constexpr char kReplay[] = "replay"; // leasehold's system calls alone
constexpr char kBare[] = "bare";

// Of the scenes of many guests: what the kernel takes for one question, and so no goal of leasehold's.
constexpr char kBareLook[] = "bare look";
constexpr char kBareLock[] = "bare lock"; // and unlock
constexpr char kBareClose[] = "bare close";

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
    std::optional<long> calls{}; // leasehold's system calls; they do not depend on the machine
};

// What happens where many guests are (scale.hpp), and what the command takes for many images.
struct ScaleRow {
    std::string
        scene; // "reader", "shared": beside so many of them; "storm", "evacuation", "incoming", "libvirtd", "command"
    std::string medium; // "bytes", "files", or nothing
    std::size_t guests;
    std::string operation;
    Summary time;
    std::optional<long> calls{};
    std::optional<long> kilobytes{}; // instead of a time
};

struct Run {
    std::string kernel;
    std::string fileSystem;
    std::string directory;
    unsigned cpus = 0;
    double loadBefore = 0; // of the last minute
    std::size_t repetitions = 0;
    std::vector<Row> rows;
    std::vector<ScaleRow> scale;
};

void printTable(std::ostream& out, const Run& run);
void printScale(std::ostream& out, const Run& run);
void printGoals(std::ostream& out, const Run& run);
void printJson(std::ostream& out, const Run& run);

} // namespace leasehold::bench

#endif

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/report.hpp"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <ostream>

namespace leasehold::bench {
namespace {

// At one disk, and at many.
constexpr double kTimesFasterThanVirtlockd = 10;
constexpr double kTimesFasterOfMany = 20;
constexpr double kTimesBare = 4;
constexpr std::size_t kDisksForTimesBare = 64;

struct Goal {
    std::string text;
    std::optional<double> ratio;
    bool met;
};

std::optional<double> ratio(const Row& row, const char* over, const char* under, double Summary::*value) {
    const auto above = row.contestants.find(over);
    const auto below = row.contestants.find(under);
    if (above == row.contestants.end() || below == row.contestants.end() || below->second.*value <= 0)
        return std::nullopt;
    return above->second.*value / (below->second.*value);
}

std::string number(std::optional<double> value, int width) {
    char text[32];
    if (value)
        std::snprintf(text, sizeof text, "%*.1f", width, *value);
    else
        std::snprintf(text, sizeof text, "%*s", width, "-");
    return text;
}

std::string limit(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

constexpr double kTimesOfTheFirst = 2;

// The row with the fewest guests of what else is the same.
const ScaleRow* firstOf(const Run& run, const ScaleRow& row) {
    return &*std::ranges::find_if(run.scale, [&](const ScaleRow& other) {
        return other.scene == row.scene && other.medium == row.medium && other.operation == row.operation;
    });
}

// Register has no goal: libvirt calls it once in a guest's life, beside a fork and an exec.
bool hasGoal(const Row& row) {
    return row.operation != "register";
}

std::vector<Goal> goals(const Run& run) {
    std::vector<Goal> all;
    for (const Row& row : run.rows) {
        if (!hasGoal(row))
            continue;
        const std::string what =
            row.operation + " of " + std::to_string(row.disks) + (row.disks == 1 ? " disk: " : " disks: ");
        const auto faster = ratio(row, kVirtlockd, kLeasehold, &Summary::median);
        const double wanted = row.disks >= kDisksForTimesBare ? kTimesFasterOfMany : kTimesFasterThanVirtlockd;
        // What nobody could do better who makes these calls.
        const auto most = ratio(row, kVirtlockd, kReplay, &Summary::median);
        all.push_back({what + "at least " + limit(wanted) + " times faster than virtlockd" +
                           (most ? " (its system calls alone: " + number(most, 0) + ")" : ""),
                       faster, faster && *faster >= wanted});
        if (row.disks != kDisksForTimesBare)
            continue;
        const auto slower = ratio(row, kLeasehold, kBare, &Summary::median);
        all.push_back({what + "at most " + limit(kTimesBare) + " times the bare system calls", slower,
                       slower && *slower <= kTimesBare});
    }
    for (const ScaleRow& row : run.scale) {
        const ScaleRow* first = firstOf(run, row);
        if (first == &row || first->time.median <= 0 || row.operation.starts_with("bare "))
            continue;
        const double times = row.time.median / first->time.median;
        all.push_back({row.operation + " of a " + row.scene + " (" + row.medium + ") beside " +
                           std::to_string(row.guests) + ": at most " + limit(kTimesOfTheFirst) + " times that beside " +
                           std::to_string(first->guests),
                       times, times <= kTimesOfTheFirst});
    }
    return all;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        char escape[8];
        if (c == '"' || c == '\\')
            out += '\\';
        if (static_cast<unsigned char>(c) >= 0x20) {
            out += c;
            continue;
        }
        std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
        out += escape;
    }
    return out + '"';
}

std::string jsonNumber(std::optional<double> value) {
    char text[32];
    if (!value)
        return "null";
    std::snprintf(text, sizeof text, "%.3f", *value);
    return text;
}

} // namespace

Summary summarise(std::vector<std::chrono::nanoseconds> samples) {
    if (samples.empty())
        return {};
    std::ranges::sort(samples);
    const auto micros = [&](std::size_t index) { return static_cast<double>(samples[index].count()) / 1000; };
    const std::size_t middle = samples.size() / 2;
    const std::size_t rank = (samples.size() * 99 + 99) / 100; // ceil(0.99 n)
    return {samples.size() % 2 == 1 ? micros(middle) : (micros(middle - 1) + micros(middle)) / 2, micros(rank - 1)};
}

void printTable(std::ostream& out, const Run& run) {
    out << "kernel " << run.kernel << ", " << run.cpus << " CPUs, load " << number(run.loadBefore, 0) << "; "
        << run.fileSystem << " in " << run.directory << "; " << run.repetitions
        << " repetitions; microseconds, ratios of medians and of 99th percentiles\n\n";
    out << "                      leasehold             virtlockd               sanlock      "
           "its calls alone                  bare    virtlockd/leasehold"
           "   leasehold/bare   calls\n";
    out << "disks  operation   median       p99      median       p99      median       p99      median       p99      "
           "median       p99    median       p99"
           "   median     p99   of leasehold\n";
    for (const Row& row : run.rows) {
        char start[32];
        std::snprintf(start, sizeof start, "%5zu  %-9s", row.disks, row.operation.c_str());
        out << start;
        bool first = true;
        for (const char* name : {kLeasehold, kVirtlockd, kSanlock, kReplay, kBare}) {
            const auto found = row.contestants.find(name);
            const bool measured = found != row.contestants.end();
            out << number(measured ? std::optional(found->second.median) : std::nullopt, first ? 9 : 12)
                << number(measured ? std::optional(found->second.p99) : std::nullopt, 10);
            first = false;
        }
        out << number(ratio(row, kVirtlockd, kLeasehold, &Summary::median), 10)
            << number(ratio(row, kVirtlockd, kLeasehold, &Summary::p99), 10)
            << number(ratio(row, kLeasehold, kBare, &Summary::median), 9)
            << number(ratio(row, kLeasehold, kBare, &Summary::p99), 8) << std::string(4, ' ')
            << (row.calls ? std::to_string(*row.calls) : "-") << '\n';
    }
}

void printScale(std::ostream& out, const Run& run) {
    if (run.scale.empty())
        return;
    out << "\nscene       medium  guests  operation          median       p99   calls\n";
    for (const ScaleRow& row : run.scale) {
        char start[64];
        std::snprintf(start, sizeof start, "%-11s %-6s %7zu  %-15s", row.scene.c_str(), row.medium.c_str(), row.guests,
                      row.operation.c_str());
        if (row.kilobytes)
            out << start << "  " << *row.kilobytes << " kB\n";
        else
            out << start << number(row.time.median, 10) << number(row.time.p99, 10) << std::string(4, ' ')
                << (row.calls ? std::to_string(*row.calls) : "-") << '\n';
    }
}

void printGoals(std::ostream& out, const Run& run) {
    out << "\ngoals, by medians, in this run\n";
    for (const Goal& goal : goals(run)) {
        const char* verdict = !goal.ratio ? "not measured" : goal.met ? "met         " : "NOT MET     ";
        out << "  " << verdict << number(goal.ratio, 8) << "  " << goal.text << '\n';
    }
}

void printJson(std::ostream& out, const Run& run) {
    out << "{\n  \"kernel\": " << quoted(run.kernel) << ",\n  \"fileSystem\": " << quoted(run.fileSystem)
        << ",\n  \"cpus\": " << run.cpus << ",\n  \"load\": " << jsonNumber(run.loadBefore)
        << ",\n  \"repetitions\": " << run.repetitions << ",\n  \"unit\": \"us\",\n  \"rows\": [";
    const char* separator = "\n";
    for (const Row& row : run.rows) {
        out << separator << "    {\"disks\": " << row.disks << ", \"operation\": " << quoted(row.operation);
        for (const auto& [name, summary] : row.contestants)
            out << ", " << quoted(name) << ": {\"median\": " << jsonNumber(summary.median)
                << ", \"p99\": " << jsonNumber(summary.p99) << '}';
        out << ", \"virtlockdOverLeasehold\": " << jsonNumber(ratio(row, kVirtlockd, kLeasehold, &Summary::median))
            << ", \"virtlockdOverReplay\": " << jsonNumber(ratio(row, kVirtlockd, kReplay, &Summary::median))
            << ", \"leaseholdOverBare\": " << jsonNumber(ratio(row, kLeasehold, kBare, &Summary::median))
            << ", \"calls\": " << (row.calls ? std::to_string(*row.calls) : "null") << '}';
        separator = ",\n";
    }
    out << "\n  ],\n  \"scale\": [";
    separator = "\n";
    for (const ScaleRow& row : run.scale) {
        out << separator << "    {\"scene\": " << quoted(row.scene) << ", \"medium\": " << quoted(row.medium)
            << ", \"guests\": " << row.guests << ", \"operation\": " << quoted(row.operation)
            << ", \"median\": " << jsonNumber(row.time.median) << ", \"p99\": " << jsonNumber(row.time.p99)
            << ", \"calls\": " << (row.calls ? std::to_string(*row.calls) : "null")
            << ", \"kilobytes\": " << (row.kilobytes ? std::to_string(*row.kilobytes) : "null") << '}';
        separator = ",\n";
    }
    out << "\n  ],\n  \"goals\": [";
    separator = "\n";
    for (const Goal& goal : goals(run)) {
        out << separator << "    {\"goal\": " << quoted(goal.text) << ", \"ratio\": " << jsonNumber(goal.ratio)
            << ", \"met\": "
            << (!goal.ratio ? "null"
                : goal.met  ? "true"
                            : "false")
            << '}';
        separator = ",\n";
    }
    out << "\n  ]\n}\n";
}

} // namespace leasehold::bench

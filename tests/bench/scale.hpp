// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_SCALE_HPP
#define LEASEHOLD_TESTS_BENCH_SCALE_HPP

// What happens where many guests are: what one more costs, and what becomes of many that come or go at once. At the
// level of the plugin, with a process for each guest. Throws where anybody is refused: nobody is in anybody's way.

#include "tests/bench/report.hpp"

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace leasehold::bench {

struct ScaleOptions {
    std::string plugin, standIn;
    std::filesystem::path directory;
    std::function<void()> pulse; // called now and then: may throw to end it all
};

// A newcomer's register, acquire and release beside so many others of one image, for reading and shared, with byte
// ranges and with files.
std::vector<ScaleRow> measureCrowds(const ScaleOptions& options, const std::vector<std::size_t>& others,
                                    std::size_t repetitions);

// So many guests start at once, each with a disk of its own, a template and an ISO that all read.
std::vector<ScaleRow> measureStarts(const ScaleOptions& options, std::size_t guests);

// Two hosts with so many guests each evacuate to each other at once.
std::vector<ScaleRow> measureEvacuation(const ScaleOptions& options, std::size_t guests);

// Register of a guest with so many disks: at a cold start, and as the destination of a live migration.
std::vector<ScaleRow> measureIncoming(const ScaleOptions& options, std::size_t disks, std::size_t repetitions);

// libvirtd beside so many guests of ten disks each: what a call for one of them costs, the fork that a call makes where
// storage may hang, and what memory stays in use when all of them were suspended and resumed.
std::vector<ScaleRow> measureLibvirtd(const ScaleOptions& options, std::size_t guests);

} // namespace leasehold::bench

#endif

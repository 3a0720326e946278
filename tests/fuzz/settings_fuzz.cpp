// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Any bytes either are a configuration or are refused with "FILE:LINE: ...", LINE being a line that exists. With
// libFuzzer: clang++ -fsanitize=fuzzer,address,undefined. With -DSTANDALONE: a program that runs every file of the
// directories it is given, for compilers without libFuzzer and for replaying what was found.

#include "core/settings.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

namespace {

void require(bool truth) {
    if (!truth)
        std::abort();
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    try {
        const leasehold::Settings settings = leasehold::parseSettings(text, "a.conf");
        require(settings.handoffWait.count() >= 0 && settings.handoffWait.count() <= 60'000);
    } catch (const leasehold::SettingsError& error) {
        const std::string what = error.what();
        require(what.starts_with("a.conf:") && what.find("; ") != what.npos && what.size() < 1000);
        require(std::all_of(what.begin(), what.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
        const long line = std::strtol(what.c_str() + 7, nullptr, 10);
        require(line >= 1 && line <= 1 + std::count(text.begin(), text.end(), '\n'));
    }
    return 0;
}

#ifdef STANDALONE

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

int main(int argc, char** argv) {
    std::size_t count = 0;
    for (int i = 1; i < argc; i++)
        for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
            std::ifstream file(entry.path(), std::ios::binary);
            const std::string text{std::istreambuf_iterator<char>(file), {}};
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
            count++;
        }
    std::printf("%zu inputs, none crashed\n", count);
    return count > 0 ? 0 : 1;
}

#endif

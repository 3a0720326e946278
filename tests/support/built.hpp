// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

#include <filesystem>
#include <string>

namespace leasehold::support {

/// The path of what was built with this test, which is tests/FOLDER/NAME of the build folder. No path is compiled in:
/// what the compiler made of a test in one checkout its cache can give in another one. Throws if /proc cannot be read.
inline std::string built(const std::string& name) {
    const auto self = std::filesystem::read_symlink("/proc/self/exe");
    return self.parent_path().parent_path().parent_path() / name;
}

} // namespace leasehold::support

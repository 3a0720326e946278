// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/plugin_file.hpp"

#include "core/os/fd.hpp"

#include <algorithm>
#include <string_view>

namespace leasehold::tools {

std::string versionOfPlugin(const std::string& file) {
    std::string content = os::readFile(file, 64 << 20);
    constexpr std::string_view kMark = "leasehold-plugin-version="; // plugin/version.cpp
    std::size_t at = content.find(kMark);
    if (at == std::string::npos)
        return "unknown";
    at += kMark.size();
    return content.substr(at, std::min(content.find(';', at) - at, std::size_t{32}));
}

} // namespace leasehold::tools

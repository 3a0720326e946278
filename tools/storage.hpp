// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// How modes and storage are called in what the verbs print.

#include "core/lease/mark.hpp"
#include "core/settings.hpp"
#include "core/storage/classify.hpp"
#include "tools/output.hpp"

namespace leasehold::tools {

const char* modeName(lease::Mode mode);
Json storageToJson(const storage::Storage& storage);
// What a lease of this image, device or directory is made of, and where it is.
Json leaseToJson(const std::string& path, const Settings& settings, lease::Mode mode = lease::Mode::exclusive);
std::string describeStorage(const Json& storage);

} // namespace leasehold::tools

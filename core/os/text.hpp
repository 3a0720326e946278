// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Texts that come from somewhere else: names of guests, images and hosts may hold anything.

#include <cstdint>
#include <string>
#include <string_view>

namespace leasehold::os {

// What cannot be printed in one line becomes "?".
std::string printable(std::string_view text);

// What this host calls itself (gethostname(2)), printable.
std::string hostName();

// 8 lower-case digits: how incarnations and tokens are written everywhere.
std::string hexadecimal(std::uint32_t number);

} // namespace leasehold::os

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The state string that libvirt keeps for a suspended guest and carries in a migration: `leasehold1:UUID:TOKEN`, the
// token as 8 hexadecimal digits. libvirt writes it into XML without escaping, hence no character that XML knows.
// A state proves nothing: it only names a handoff, and the marks say whether that is up.

#include "core/lease/mark.hpp"

namespace leasehold::lease {

std::string encodeState(const Uuid& uuid, std::uint32_t token);

// The token, if this is a state of that domain. Anything else, a lock manager's that was used before or garbage, is
// the same as no state: it entitles to nothing.
std::optional<std::uint32_t> parseState(std::string_view text, const Uuid& uuid);

} // namespace leasehold::lease

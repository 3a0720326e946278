// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Where a medium keeps its note: in the file position of the lease's descriptor, which belongs to the open file
// description like the locks do (open(2)) and which nobody uses: QEMU never touches what is in its vessel.

#include "core/lease/medium.hpp"

#include <string>

namespace leasehold::lease {

// A position that is no note of ours reads as the empty one: nothing is known.
Note readNote(int fd, const std::string& name);
void writeNote(int fd, const Note& note, const std::string& name);

} // namespace leasehold::lease

# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
#
# core/qemu/vessel.cpp as a later version may have it: more fields in both structures of the wire format.
s/^    std::uint64_t caller;.*$/&\n    std::uint64_t later[4];/
s/^    std::uint32_t pathLength;$/&\n    std::uint64_t laterToo[2];/
s/sizeof(Header) == 96/sizeof(Header) == 128/
s/sizeof(Entry) == 24/sizeof(Entry) == 40/
s/^    header.entrySize = sizeof(Entry);$/&\n    header.later[3] = 7;/
s/^        text.append(reinterpret_cast<const char\*>(&entry), sizeof entry);$/        entry.laterToo[1] = 7;\n&/

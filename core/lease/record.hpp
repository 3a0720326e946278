// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The owner record: who has the image, in words, for the person who is refused. Kept in the extended attribute
// `user.leasehold` of the image (xattr(7)), or in the lease file where the lease is not on the image. Never decides
// anything, and may be stale or forged: whoever shows it compares its hashes with the marks that are up.

#include "core/lease/mark.hpp"

namespace leasehold::lease {

struct OwnerRecord {
    std::string domain; // the guest's name
    Uuid uuid{};
    std::uint32_t incarnation = 0;
    std::string host;
    std::string bootId; // tells a pid of this boot from one of an earlier boot or another host of the same name
    pid_t pid = 0;
    Mode mode = Mode::exclusive;
    std::int64_t since = 0; // seconds since the epoch
    std::string as;         // of a layer below a device: in which way the guest uses that; or empty

    bool operator==(const OwnerRecord&) const = default;
};

// Pure: lines of KEY=VALUE. Parsing takes nothing for granted: unknown lines are passed over, what
// cannot be printed becomes "?", what does not name domain, UUID and incarnation is no record.
std::string encodeRecord(const OwnerRecord& record);
std::optional<OwnerRecord> parseRecord(std::string_view text);

// Printable, and no longer than a file name may be.
std::string cleanName(std::string_view name);

// A host as it stands in a command that people copy into a shell: a record may say anything. "HOST" where it is no name
// of one.
std::string hostForCommand(const std::string& name);

// Best effort, in both directions: without a record only the messages are poorer. As an extended attribute of an image,
// or in a lease file from `offset` on.
void writeRecord(int fd, const OwnerRecord& record);
std::optional<OwnerRecord> readRecord(int fd);
void writeRecordAt(int fd, std::int64_t offset, const OwnerRecord& record);
std::optional<OwnerRecord> readRecordAt(int fd, std::int64_t offset);

} // namespace leasehold::lease

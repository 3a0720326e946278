// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Lockspaces: directories where lease files live, for resources whose own storage has no lock to trust. The kind of
// lock is that of the lockspace's file system. What is found there may have been put there by somebody else: a
// directory or file that others than its owner may change is refused, and no symbolic link is ever followed. Knows no
// marks and no guests.

#include "core/storage/classify.hpp"

#include <functional>
#include <optional>
#include <span>
#include <string>

namespace leasehold::storage {

struct Lockspace {
    std::string path;
    std::string origin; // who named it, for messages: "file_lockspace_dir"
    Storage storage;
    os::Fd directory;
};

// What about a directory that is not there: it is an error, it is made (but not its parents), or it is left so (for who
// only looks: then `directory` is not open, and nothing is known of its storage).
enum class Missing { refused, made, left };

// Throws Error naming the directory and its origin when it is a symbolic link, may be changed by others than its owner,
// or is on storage without a lock to trust.
Lockspace openLockspace(const std::string& path, const std::string& origin, std::span<const Override> overrides,
                        Missing missing);

// Runs `work` while nobody else has, or takes, the lease in this open lease file; false where somebody has it.
using WhileUnused = std::function<bool(int fd, const std::function<void()>& work)>;

// The file, or the directory (for a file set), of one lease: made when it is missing. `about` says what it belongs to.
// A file that says something else gets its inscription anew if nobody has the lease: a QEMU that was broken into can
// write to the files of its leases, and must not close its images beyond its death.
//
// Whoever makes a new file removes a few that nobody uses any more: nobody does when a guest ends. Not on network
// storage, where to read the directory may take long.
os::Fd openLeaseFile(const Lockspace& lockspace, const std::string& name, const std::string& about,
                     const WhileUnused& whileUnused = {});
os::Fd openLeaseDirectory(const Lockspace& lockspace, const std::string& name);

// The same, of either kind, for looking; not open where there is none.
os::Fd openLeaseIfExists(const Lockspace& lockspace, const std::string& name);

// Whether nobody but root and ourselves can have made this lease file or directory, or may change it. For descriptors
// that come out of a QEMU and may be anything that it could open. Throws where that cannot be read.
bool isTrusted(int fd, const std::string& path);

// The same for a file that is only to be locked: it may also have nothing in it, where the host lost its power before
// the inscription was on the disk, and what cannot be read may be one, too: NFS gives EIO where a lock was lost.
bool mayCarryLease(int fd, const std::string& path);

// Which file or directory that is; nothing when there is none.
std::optional<os::FileId> findLease(const std::string& lockspace, const std::string& name);

// Writes into a new lease file what it belongs to. In one that exists it has to stand already: two resources that come
// to one lease would exclude each other, or worse, believe they do not. Throws Error where it says something else.
void inscribe(int fd, const std::string& about, const std::string& name);

// Behind the inscription, where the owner record stands.
constexpr std::int64_t kRecordOffset = 4096;

// A file name for any text: its FNV-1a hash, 64 bits, the same on every host. Texts with one hash are told apart by the
// inscription.
std::string hashName(std::string_view text);

} // namespace leasehold::storage

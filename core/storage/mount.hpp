// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What the kernel says about a mount: /proc/self/mountinfo, proc(5). Pure parsing, and one function that asks for the
// mount of an open file.

#include "core/os/fd.hpp"

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace leasehold::storage {

struct Mount {
    int id = 0;
    std::string point;
    std::string type;                 // "nfs4", "fuse.glusterfs"
    std::string source;               // "server:/export"
    std::vector<std::string> options; // of the mount, then of the file system; as the kernel writes them
    std::uint64_t device = 0;         // of the file system: what /proc/locks says, and stat(2) not always (btrfs)

    bool has(std::string_view option) const;
    // The value of `key=value`; nothing when the option is not there.
    std::optional<std::string> value(std::string_view key) const;
    // All values of a key, as the kernel writes them: in a list, what is escaped separates nothing.
    std::vector<std::string> values(std::string_view key) const;
};

// A word of mountinfo without the kernel's escapes: any character may stand there as three octal digits (proc(5)).
std::string unescape(std::string_view text);

// The mount with this id in a mountinfo text.
std::optional<Mount> findMount(std::string_view mountinfo, int id);

// All mounts that this process sees; none when /proc does not tell.
std::vector<Mount> allMounts();
// Whether a file system with this number (stat(2), st_dev) is among them. Of btrfs and overlayfs files have other
// numbers than the mount.
bool isAmong(const std::vector<Mount>& mounts, std::uint64_t device);

// Why storage may be silent though its servers are up, as a clause that follows "and try again"; "" where there is no
// such reason. Goes by the name alone, so it does not touch the storage.
std::string causeOfSilence(std::string_view path);

// The mount of an open file. Nothing when /proc does not tell.
std::optional<Mount> mountOf(int fd);

// Whether any of the mounts is of a type whose calls can hang until somebody else answers. Told by the type alone: not
// one of them is touched.
bool anyRemote(std::string_view mountinfo);

// The same as anyRemote() for this host, remembered until the kernel reports a change (proc(5), mountinfo can be
// polled). Not for a forked child: it has a mutex.
class MountTable {
public:
    MountTable();
    bool hasRemote();

private:
    std::mutex mutex_;
    os::Fd table_;
    bool known_ = false;
    bool remote_ = false;
};

// Without a memory. None where the mount table cannot be read.
std::optional<bool> remoteMounts();

// What cannot be read is not known to be local.
bool hostHasRemoteMounts();

} // namespace leasehold::storage

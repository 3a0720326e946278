// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/mount.hpp"

#include "core/os/fd.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>

#include <fcntl.h>
#include <poll.h>
#include <sys/sysmacros.h>

namespace leasehold::storage {

namespace {

constexpr const char* kMountinfo = "/proc/self/mountinfo";

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> words;
    while (!text.empty()) {
        std::string_view word = text.substr(0, text.find(separator));
        text.remove_prefix(std::min(text.size(), word.size() + 1));
        if (!word.empty())
            words.push_back(word);
    }
    return words;
}

int parseId(std::string_view text) {
    int id = -1;
    std::from_chars(text.data(), text.data() + text.size(), id);
    return id;
}

} // namespace

std::string unescape(std::string_view text) {
    std::string plain;
    for (std::size_t i = 0; i < text.size(); i++) {
        unsigned code = 0;
        if (text[i] == '\\' && i + 3 < text.size() &&
            std::from_chars(text.data() + i + 1, text.data() + i + 4, code, 8).ptr == text.data() + i + 4) {
            plain += static_cast<char>(code);
            i += 3;
        } else {
            plain += text[i];
        }
    }
    return plain;
}

bool Mount::has(std::string_view option) const {
    return std::find(options.begin(), options.end(), option) != options.end();
}

std::optional<std::string> Mount::value(std::string_view key) const {
    std::vector<std::string> all = values(key);
    return all.empty() ? std::nullopt : std::optional(unescape(all.front()));
}

std::vector<std::string> Mount::values(std::string_view key) const {
    std::vector<std::string> all;
    for (const std::string& option : options)
        if (option.size() > key.size() && option.starts_with(key) && option[key.size()] == '=')
            all.push_back(option.substr(key.size() + 1));
    return all;
}

namespace {

// Nothing where it cannot be read: a host has mounts.
std::string readMounts() {
    return os::readFileIfPossible(kMountinfo, 8 << 20).value_or("");
}

std::optional<Mount> parseMount(std::string_view line) {
    // 36 35 98:0 /root /mountpoint rw,noatime shared:1 - ext4 /dev/sda1 rw,errors=continue
    std::vector<std::string_view> words = split(line, ' ');
    auto dash = std::find(words.begin(), words.end(), "-");
    if (words.size() < 6 || words.end() - dash < 3)
        return std::nullopt;
    // An empty source leaves only two words behind the type.
    bool source = words.end() - dash > 3;
    Mount mount{parseId(words[0]), unescape(words[4]), std::string(dash[1]), source ? unescape(dash[2]) : "", {}, 0};
    unsigned major = 0, minor = 0;
    if (std::sscanf(std::string(words[2]).c_str(), "%u:%u", &major, &minor) == 2)
        mount.device = makedev(major, minor);
    for (std::size_t field : {std::size_t{5}, words.size() - 1})
        for (std::string_view option : split(words[field], ','))
            mount.options.emplace_back(option);
    return mount;
}

} // namespace

std::optional<Mount> findMount(std::string_view mountinfo, int id) {
    for (std::string_view line : split(mountinfo, '\n'))
        if (parseId(line) == id)
            if (auto mount = parseMount(line))
                return mount;
    return std::nullopt;
}

std::vector<Mount> allMounts() {
    std::vector<Mount> mounts;
    std::string table = readMounts();
    for (std::string_view line : split(table, '\n'))
        if (auto mount = parseMount(line))
            mounts.push_back(std::move(*mount));
    return mounts;
}

bool isAmong(const std::vector<Mount>& mounts, std::uint64_t device) {
    return std::any_of(mounts.begin(), mounts.end(), [&](const Mount& mount) { return mount.device == device; });
}

std::string causeOfSilence(std::string_view path) {
    Mount nearest;
    for (Mount& mount : allMounts())
        if (path.starts_with(mount.point) && mount.point.size() >= nearest.point.size() &&
            (mount.point == "/" || path.size() == mount.point.size() || path[mount.point.size()] == '/'))
            nearest = std::move(mount);
    // Whoever asks waits for the capabilities of a client that is dead (Ceph doc/cephfs/eviction.rst).
    return nearest.type == "ceph" || nearest.type == "fuse.ceph-fuse"
               ? "; on CephFS a host that died while it had the image open keeps others waiting until its client is "
                 "evicted: make sure that it is off, and run leasehold fenced HOST"
               : "";
}

bool anyRemote(std::string_view mountinfo) {
    // Those of the kernel that keep data elsewhere; all of FUSE, because there is a process behind it.
    // An automount point may become any of them.
    constexpr std::array<std::string_view, 15> kTypes{"autofs", "fuseblk", "nfs",   "nfs4", "cifs",
                                                      "smb3",   "ceph",    "ocfs2", "gfs2", "9p",
                                                      "lustre", "beegfs",  "gpfs",  "afs",  "virtiofs"};
    for (std::string_view line : split(mountinfo, '\n')) {
        std::size_t dash = line.find(" - ");
        if (dash == std::string_view::npos)
            continue;
        std::string_view type = line.substr(dash + 3);
        type = type.substr(0, type.find(' '));
        if (type.starts_with("fuse.") || type == "fuse" ||
            std::find(kTypes.begin(), kTypes.end(), type) != kTypes.end())
            return true;
    }
    return false;
}

std::optional<bool> remoteMounts() {
    std::string mounts = readMounts();
    return mounts.empty() ? std::nullopt : std::optional(anyRemote(mounts));
}

bool hostHasRemoteMounts() {
    return remoteMounts().value_or(true);
}

MountTable::MountTable() : table_(os::openFile(kMountinfo, O_RDONLY)) {}

bool MountTable::hasRemote() {
    std::lock_guard lock(mutex_);
    pollfd event{table_.get(), POLLPRI, 0};
    // A change that comes while we read is reported by the next poll.
    if (poll(&event, 1, 0) != 0 || !known_)
        remote_ = hostHasRemoteMounts();
    known_ = true;
    return remote_;
}

std::optional<Mount> mountOf(int fd) {
    std::string info = os::readFileIfPossible("/proc/self/fdinfo/" + std::to_string(fd), 1 << 20).value_or("");
    std::size_t at = info.find("mnt_id:");
    if (at == std::string::npos)
        return std::nullopt;
    at = info.find_first_of("0123456789", at);
    if (at == std::string::npos)
        return std::nullopt;
    return findMount(readMounts(), parseId(std::string_view(info).substr(at)));
}

} // namespace leasehold::storage

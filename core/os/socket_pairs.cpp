// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/socket_pairs.hpp"

#include <algorithm>
#include <charconv>
#include <set>
#include <string>
#include <tuple>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::os {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMaxTable = 64 << 20;

std::string folderOf(pid_t pid) {
    return "/proc/" + std::to_string(pid);
}

// "socket:[12345]", which asks nothing of what the descriptor leads to (proc(5), /proc/PID/fd).
bool isSocketLink(const std::string& link) {
    constexpr std::string_view kBegin = "socket:";
    char target[kBegin.size()];
    return readlink(link.c_str(), target, sizeof target) == ssize_t{sizeof target} &&
           std::string_view(target, sizeof target) == kBegin;
}

// What is told of sockets by their network namespace: its table, read once.
class UnixTables {
public:
    UnixTables() { add(getpid()); }

    void add(pid_t pid) {
        char space[64];
        ssize_t length = readlink((folderOf(pid) + "/ns/net").c_str(), space, sizeof space);
        // What a security module does not tell is asked again.
        if (length > 0 && !known_.emplace(space, static_cast<std::size_t>(length)).second)
            return;
        for (std::uint64_t inode :
             parseUnixTable(readFileIfPossible(folderOf(pid) + "/net/unix", kMaxTable).value_or("")))
            inodes_.insert(inode);
    }

    bool has(std::uint64_t inode) const { return inodes_.count(inode) != 0; }

private:
    std::set<std::string> known_;
    std::set<std::uint64_t> inodes_;
};

} // namespace

std::optional<HeldSocket> inspectSocket(pid_t pid, int number) {
    std::string link = folderOf(pid) + "/fd/" + std::to_string(number);
    struct statx status;
    if (!isSocketLink(link) ||
        statx(AT_FDCWD, link.c_str(), AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO | STATX_UID, &status) < 0 ||
        !S_ISSOCK(status.stx_mode))
        return std::nullopt;
    return HeldSocket{status.stx_ino, status.stx_uid, pid, number};
}

bool isTrustedMaker(uid_t maker) {
    return maker == 0 || maker == geteuid();
}

SocketPairs findSocketPairs(Clock::time_point deadline, int likely) {
    SocketPairs found;
    std::vector<pid_t> processes = listProcesses();
    std::stable_partition(processes.begin(), processes.end(), [&](pid_t pid) {
        auto socket = inspectSocket(pid, likely);
        return socket && isTrustedMaker(socket->maker);
    });
    UnixTables tables;
    std::vector<HeldSocket> sockets;
    for (pid_t pid : processes) {
        if (Clock::now() > deadline) {
            found.complete = false;
            break;
        }
        auto process = Process::openToLookAt(pid, found.hidden);
        if (!process)
            continue;
        std::size_t before = sockets.size();
        for (int number : process->descriptors())
            if (auto socket = inspectSocket(pid, number); socket && isTrustedMaker(socket->maker))
                sockets.push_back(*socket);
        if (sockets.size() > before)
            tables.add(pid);
    }
    // Only now: who has left the namespace of a socket still has the socket.
    std::erase_if(sockets, [&](const HeldSocket& socket) { return !tables.has(socket.inode); });
    for (const HeldSocket& socket : sockets)
        if (std::any_of(sockets.begin(), sockets.end(), [&](const HeldSocket& other) {
                return other.pid == socket.pid && other.inode != socket.inode;
            }))
            found.ends.push_back(socket);
    std::sort(found.ends.begin(), found.ends.end(), [](const HeldSocket& one, const HeldSocket& other) {
        return std::tie(one.inode, one.pid, one.number) < std::tie(other.inode, other.pid, other.number);
    });
    return found;
}

// ffff8ead43a1c000: 00000003 00000000 00000000 0005 03 31337 /path/if/it/has/a/name
std::vector<std::uint64_t> parseUnixTable(std::string_view text) {
    std::vector<std::uint64_t> inodes;
    while (!text.empty()) {
        std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(text.size(), line.size() + 1));
        std::vector<std::string_view> words;
        while (!line.empty()) {
            std::size_t begin = std::min(line.size(), line.find_first_not_of(' '));
            line.remove_prefix(begin);
            std::string_view word = line.substr(0, line.find(' '));
            line.remove_prefix(word.size());
            if (!word.empty())
                words.push_back(word);
        }
        std::uint64_t inode = 0;
        if (words.size() == 7 && words[4] == "0005" && words[5] == "03" &&
            std::from_chars(words[6].data(), words[6].data() + words[6].size(), inode).ec == std::errc())
            inodes.push_back(inode);
    }
    return inodes;
}

} // namespace leasehold::os

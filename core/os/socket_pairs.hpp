// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Pairs of sockets that processes have open, as /proc tells of them. Nothing is taken from anybody, and nothing is
// asked of what a descriptor leads to: to duplicate one that is not what we look for could have effects (a tape drive,
// FUSE, the class of a network socket), and whoever has made it could make us wait.

#include "core/os/process.hpp"

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace leasehold::os {

// A socket among the descriptors of a process. `maker` is the user who has made it: with whose rights socketpair(2) was
// called (Linux net/socket.c, sock_alloc).
struct HeldSocket {
    std::uint64_t inode = 0;
    uid_t maker = 0;
    pid_t pid = 0;
    int number = 0;
};

// What the descriptor of this number is. 0, ENOTSOCK, or the error number: ENOENT where there is none.
[[nodiscard]] int tryInspectSocket(pid_t pid, int number, HeldSocket& socket);
// The same; nothing if it is no socket, or may not be looked at.
std::optional<HeldSocket> inspectSocket(pid_t pid, int number);

// Root has made it, as libvirtd is, or who runs as we do.
bool isTrustedMaker(uid_t maker);

struct SocketPairs {
    std::vector<HeldSocket> ends; // in the order of their inodes, then of the processes
    std::size_t hidden = 0;       // processes that could not be looked at
    bool complete = true;         // false: there was no time to look at all processes
};

// The ends of SOCK_SEQPACKET pairs that a trusted user has made and that a process has both ends of, in all processes.
// Those that have a socket with the number `likely` are looked at first.
SocketPairs findSocketPairs(std::chrono::steady_clock::time_point deadline, int likely);

// Pure: the inodes of connected SOCK_SEQPACKET sockets without a name in a text of /proc/PID/net/unix (proc(5)).
std::vector<std::uint64_t> parseUnixTable(std::string_view text);

} // namespace leasehold::os

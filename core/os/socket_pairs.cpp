// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/socket_pairs.hpp"

#include <algorithm>
#include <cerrno>
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

// "/proc/PID/fd/NUMBER", without memory for it: every call of libvirt asks for one.
class Link {
public:
    Link(pid_t pid, int number) {
        char* at = append(text_, "/proc/");
        at = std::to_chars(at, text_ + sizeof text_, pid).ptr;
        at = append(at, "/fd/");
        *std::to_chars(at, text_ + sizeof text_, number).ptr = '\0';
    }
    const char* path() const { return text_; }

private:
    static char* append(char* at, std::string_view word) { return at + word.copy(at, word.size()); }

    char text_[48]; // two numbers of at most 11 characters
};

// The inode in "socket:[12345]", which asks nothing of what the descriptor leads to (proc(5), /proc/PID/fd). 0,
// ENOTSOCK, or the error number.
int trySocketAt(const Link& link, std::uint64_t& inode) {
    constexpr std::string_view kBegin = "socket:[";
    char target[64];
    const ssize_t length = readlink(link.path(), target, sizeof target);
    if (length < 0)
        return errno == ENAMETOOLONG ? ENOTSOCK : errno; // a file's
    const std::string_view text(target, static_cast<std::size_t>(length));
    const bool found = text.substr(0, kBegin.size()) == kBegin &&
                       std::from_chars(text.data() + kBegin.size(), text.data() + text.size(), inode).ec == std::errc();
    return found ? 0 : ENOTSOCK;
}

// The processes of which something could not be looked at.
class Unseen {
public:
    // What a process has closed, and that it has ended, is no gap.
    void note(pid_t pid, int error) {
        // Whoever started it, the first process is no guest.
        if (error != 0 && error != ENOTSOCK && error != ENOENT && error != ESRCH && pid != 1)
            pids_.insert(pid);
    }

    // Without those that have ended since: of one that has just gone /proc says EACCES, too (Linux fs/proc/base.c,
    // proc_pid_readlink).
    std::size_t count() const {
        return static_cast<std::size_t>(std::count_if(pids_.begin(), pids_.end(), [](pid_t pid) {
            const auto process = Process::openIfExists(pid);
            return process && !process->diedWithin(std::chrono::milliseconds(0));
        }));
    }

private:
    std::set<pid_t> pids_;
};

bool isTrusted(const std::optional<HeldSocket>& socket) {
    return socket && isTrustedMaker(socket->maker);
}

// What is told of sockets by their network namespace: its table, read once.
class UnixTables {
public:
    explicit UnixTables(Unseen& unseen) : unseen_(unseen) { add(getpid()); }

    // Whether the table of its namespace has been read. What a security module does not tell is asked again.
    bool cover(pid_t pid) const { return known_.count(spaceOf(pid)) != 0; }

    void add(pid_t pid) {
        if (std::string space = spaceOf(pid); !space.empty())
            known_.insert(std::move(space));
        const std::optional<std::string> table = readFileIfPossible(folderOf(pid) + "/net/unix", kMaxTable);
        unseen_.note(pid, table ? 0 : EACCES);
        for (std::uint64_t inode : parseUnixTable(table.value_or("")))
            inodes_.insert(inode);
    }

    bool has(std::uint64_t inode) const { return inodes_.count(inode) != 0; }

private:
    static std::string spaceOf(pid_t pid) {
        char space[64];
        ssize_t length = readlink((folderOf(pid) + "/ns/net").c_str(), space, sizeof space);
        return {space, static_cast<std::size_t>(std::max<ssize_t>(length, 0))};
    }

    Unseen& unseen_;
    std::set<std::string> known_;
    std::set<std::uint64_t> inodes_;
};

} // namespace

int tryInspectSocket(pid_t pid, int number, HeldSocket& socket) {
    std::uint64_t inode = 0;
    const Link link(pid, number);
    if (const int error = trySocketAt(link, inode))
        return error;
    struct statx status;
    if (statx(AT_FDCWD, link.path(), AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO | STATX_UID, &status) < 0)
        return errno;
    socket = {status.stx_ino, status.stx_uid, pid, number};
    return S_ISSOCK(status.stx_mode) ? 0 : ENOTSOCK;
}

std::optional<HeldSocket> inspectSocket(pid_t pid, int number) {
    HeldSocket socket;
    return tryInspectSocket(pid, number, socket) == 0 ? std::optional(socket) : std::nullopt;
}

bool isTrustedMaker(uid_t maker) {
    return maker == 0 || maker == geteuid();
}

SocketPairs findSocketPairs(Clock::time_point deadline, int likely) {
    SocketPairs found;
    Unseen unseen;
    UnixTables tables(unseen);
    std::vector<pid_t> processes = listProcesses();
    std::stable_partition(processes.begin(), processes.end(), [&](pid_t pid) {
        std::uint64_t inode = 0;
        return trySocketAt(Link(pid, likely), inode) == 0 && (tables.has(inode) || !tables.cover(pid)) &&
               isTrusted(inspectSocket(pid, likely));
    });
    auto inspect = [&](const HeldSocket& socket) {
        HeldSocket looked;
        const int error = tryInspectSocket(socket.pid, socket.number, looked);
        unseen.note(socket.pid, error);
        return error == 0 && isTrustedMaker(looked.maker) ? std::optional(looked) : std::nullopt;
    };
    std::vector<HeldSocket> sockets; // nobody has been asked yet who made them
    for (pid_t pid : processes) {
        if (Clock::now() > deadline) {
            found.complete = false;
            break;
        }
        const auto process = Process::openIfExists(pid);
        if (!process)
            continue;
        std::vector<int> numbers;
        unseen.note(pid, process->tryListDescriptors(numbers));
        const auto before = static_cast<std::ptrdiff_t>(sockets.size());
        for (int number : numbers) {
            std::uint64_t inode = 0;
            const int error = trySocketAt(Link(pid, number), inode);
            unseen.note(pid, error);
            if (error == 0)
                sockets.push_back({inode, 0, pid, number});
        }
        // Whoever likes makes namespaces: the table of another one is read where somebody trusted has made a socket.
        if (!tables.cover(pid) && std::any_of(sockets.begin() + before, sockets.end(), inspect))
            tables.add(pid);
    }
    // Only now: who has left the namespace of a socket still has the socket. And no other socket is looked at closer:
    // SELinux writes it into the log where that is not allowed, as for those of most services.
    std::erase_if(sockets, [&](const HeldSocket& socket) { return !tables.has(socket.inode); });
    std::vector<HeldSocket> trusted;
    for (const HeldSocket& socket : sockets) {
        if (Clock::now() > deadline) {
            found.complete = false;
            break;
        }
        if (const auto looked = inspect(socket); looked && looked->inode == socket.inode)
            trusted.push_back(*looked);
    }
    found.hidden = unseen.count();
    for (const HeldSocket& socket : trusted)
        if (std::any_of(trusted.begin(), trusted.end(), [&](const HeldSocket& other) {
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

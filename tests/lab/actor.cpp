// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// A process on a host of the lab that does what it is told: it plays libvirtd with the built plugin, and guests (real
// processes) with it; or it takes locks by hand, so that the lab can be compared with what is known of a file system.
// It judges nothing: it says what happened and how long it took. Knows no core/, as PluginHost does not.
// Called by tests/lab/lab.py (class Actor).
//
//   actor SOCKET PLUGIN STAND-IN   goes to the background when it can be asked for actors
//
// "SOCKET CONFIG" asks for one: the answer is its process id. It is forked, for an emulated processor takes a quarter
// of a second to load this program and the plugin. Each connection to its socket carries an order, one line, and the
// answer: STATUS MICROSECONDS TEXT. STATUS is ok, refused (by the plugin; TEXT is its message), the name of an errno,
// or mistake (in the order). One order at a time, so what shall hang alone needs an actor of its own. Orders:
//
//   register GUEST NUMBER IMAGE[:ro|:shared]...   the guest's uuid is made of the number, its QEMU starts or does not
//   acquire GUEST [STATE]                         release, inquire: TEXT is the state
//   detach GUEST IMAGE...    attach GUEST IMAGE...
//   kill GUEST               SIGKILL to its QEMU, reaped
//   qemu-locks IMAGE         what QEMU does for a writable disk, until qemu-unlocks IMAGE
//   open HANDLE PATH ro|rw|direct    close HANDLE    as UID (file system uid of the opens to come)
//   park HANDLE              leaves it nowhere but in flight in a socket, as the vessel does
//   ofd HANDLE r|w|u START LENGTH    get HANDLE r|w START LENGTH    flock HANDLE ex|sh|un
//   listed HANDLE            what /proc/self/fdinfo calls its first lock
//   read HANDLE OFFSET       TEXT is the word that stands there
//   write HANDLE OFFSET [WORD]       512 bytes, and fsync
//   soil HANDLE              writes a page, without fsync    statfs PATH
//   die                      as by SIGKILL, and its guests with it

#include "tests/support/orders.hpp"
#include "tests/support/plugin_host.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/fsuid.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace {

using namespace leasehold::support;
using Words = std::vector<std::string>;
using Clock = std::chrono::steady_clock;

// An answer, not breakage: what the kernel said to the lock call, with its errno.
struct Reply {
    std::string status = "ok";
    std::string text;
};

Reply kernelReply(long result, const std::string& text = "") {
    return result < 0 ? Reply{strerrorname_np(errno), strerror(errno)} : Reply{"ok", text};
}

Reply pluginReply(const Outcome& outcome, const std::string& text = "") {
    return outcome ? Reply{"ok", text} : Reply{"refused", outcome.message()};
}

struct Mistake : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// "4611686018427387904" or "2^62" or "2^62+5".
off_t parseOffset(const std::string& text) {
    if (!text.starts_with("2^"))
        return std::stoll(text);
    std::size_t used = 0;
    const off_t power = off_t(1) << std::stoi(text.substr(2), &used);
    return used + 2 < text.size() ? power + std::stoll(text.substr(used + 2)) : power;
}

struct flock range(short type, off_t start, off_t length) {
    struct flock lock {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = start;
    lock.l_len = length;
    return lock;
}

short parseLockType(const std::string& word) {
    return word == "r" ? F_RDLCK : word == "w" ? F_WRLCK : F_UNLCK;
}

class Handles {
public:
    ~Handles() {
        for (const auto& [name, fd] : fds_)
            ::close(fd);
    }

    Reply open(const std::string& name, const std::string& path, const std::string& mode) {
        close(name);
        const int flags = mode == "ro" ? O_RDONLY : mode == "direct" ? O_RDWR | O_DIRECT : O_RDWR;
        const int fd = ::open(path.c_str(), flags | O_CLOEXEC);
        if (fd >= 0)
            fds_[name] = fd;
        return kernelReply(fd);
    }

    Reply close(const std::string& name) {
        if (!fds_.contains(name))
            return {};
        const int fd = fds_[name];
        fds_.erase(name);
        return kernelReply(::close(fd));
    }

    Reply park(const std::string& name) {
        const int fd = (*this)[name];
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
            return kernelReply(-1);
        char text = 'p';
        struct iovec part = {.iov_base = &text, .iov_len = 1};
        alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
        struct msghdr message {};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
        const ssize_t sent = sendmsg(ends[0], &message, 0);
        return sent < 0 ? kernelReply(sent) : close(name); // the pair stays open until we die
    }

    int operator[](const std::string& name) const {
        if (!fds_.contains(name))
            throw Mistake("no handle " + name);
        return fds_.at(name);
    }

private:
    std::map<std::string, int> fds_;
};

// --- QEMU's own image locks: block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes. A writable raw disk
// uses
// --- the permissions consistent-read, write and resize (bytes 100 + n), and shares neither write nor resize (200 + n).

constexpr off_t kUsed[] = {100, 101, 103};
constexpr off_t kUnshared[] = {201, 203};

Reply takeQemuLocks(int fd) {
    std::vector<off_t> bytes(std::begin(kUsed), std::end(kUsed));
    bytes.insert(bytes.end(), std::begin(kUnshared), std::end(kUnshared));
    for (const off_t byte : bytes) {
        struct flock lock = range(F_RDLCK, byte, 1);
        if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
            return {strerrorname_np(errno), "Failed to lock byte " + std::to_string(byte)};
    }
    // Whoever uses what we do not share, or does not share what we use, has the opposite byte.
    for (const off_t byte : bytes) {
        const off_t opposite = byte < 200 ? byte + 100 : byte - 100;
        struct flock lock = range(F_WRLCK, opposite, 1);
        if (fcntl(fd, F_OFD_GETLK, &lock) < 0)
            return {strerrorname_np(errno), "Failed to look at byte " + std::to_string(opposite)};
        if (lock.l_type != F_UNLCK)
            return {"EAGAIN", "Failed to get lock: byte " + std::to_string(opposite) + " is taken"};
    }
    return {};
}

// --- the daemon's side of libvirtd ---------------------------------------------------------------------------------

struct RunningGuest {
    Guest guest;
    std::vector<Disk> disks;
    GuestProcess process;
};

std::vector<Disk> parseDisks(Words::const_iterator first, Words::const_iterator last) {
    std::vector<Disk> disks;
    for (; first != last; ++first) {
        const std::size_t colon = first->find(':');
        const std::string mode = colon == std::string::npos ? "" : first->substr(colon + 1);
        const unsigned flags = mode == "ro"       ? static_cast<unsigned>(LOCK_RESOURCE_READONLY)
                               : mode == "shared" ? static_cast<unsigned>(LOCK_RESOURCE_SHARED)
                                                  : 0U;
        disks.push_back({.path = first->substr(0, colon), .flags = flags});
    }
    return disks;
}

class Libvirtd {
public:
    Libvirtd(PluginHost& host, const std::string& config) : host_(host) {
        if (const Outcome outcome = host_.init(config); !outcome)
            throw std::runtime_error("the plugin does not start: " + outcome.message());
    }

    Reply registerGuest(const Words& words) {
        if (guests_.contains(words.at(1)))
            throw Mistake(words[1] + " runs");
        const Guest guest = makeGuest(words[1], static_cast<unsigned>(std::stoul(words.at(2))));
        const std::vector<Disk> disks = parseDisks(words.begin() + 3, words.end());
        Registration registration = host_.registerGuest(guest, disks);
        const Reply reply = pluginReply(registration);
        if (registration)
            guests_.emplace(guest.name, RunningGuest{guest, disks, std::move(*registration.process)});
        return reply;
    }

    Reply acquire(const Words& words) {
        const RunningGuest& running = guest(words);
        CallOptions options;
        if (words.size() > 2)
            options.state = words[2];
        return pluginReply(host_.acquire(running.guest, running.process.pid(), running.disks, options));
    }

    Reply release(const Words& words) {
        const RunningGuest& running = guest(words);
        const StateOutcome outcome = host_.release(running.guest, running.process.pid(), running.disks);
        return pluginReply(outcome, outcome.state.value_or(""));
    }

    Reply inquire(const Words& words) {
        const RunningGuest& running = guest(words);
        const StateOutcome outcome = host_.inquire(running.guest, running.process.pid(), running.disks);
        return pluginReply(outcome, outcome.state.value_or(""));
    }

    Reply attach(const Words& words) {
        const RunningGuest& running = guest(words);
        return pluginReply(
            host_.acquire(running.guest, running.process.pid(), parseDisks(words.begin() + 2, words.end())));
    }

    Reply detach(const Words& words) {
        const RunningGuest& running = guest(words);
        const std::vector<Disk> disks = parseDisks(words.begin() + 2, words.end());
        // libvirt says that it detaches what QEMU has closed.
        for (const Disk& disk : disks)
            if (leasehold::support::hasOpen(running.process.pid(), disk.path))
                leasehold::support::order(running.process.pid(), 'c', disk.path);
        return pluginReply(host_.detach(running.guest, running.process.pid(), disks));
    }

    Reply kill(const Words& words) {
        guest(words).process.kill();
        guests_.erase(words[1]);
        return {};
    }

private:
    RunningGuest& guest(const Words& words) {
        const auto found = guests_.find(words.at(1));
        if (found == guests_.end())
            throw Mistake("no guest " + words[1]);
        return found->second;
    }

    PluginHost& host_;
    std::map<std::string, RunningGuest> guests_;
};

// --- orders --------------------------------------------------------------------------------------------------------

Reply describeFileSystem(const std::string& path) {
    struct statfs status {};
    const int result = statfs(path.c_str(), &status);
    char magic[32] = "";
    std::snprintf(magic, sizeof magic, "0x%lx", static_cast<unsigned long>(status.f_type));
    return kernelReply(result, magic);
}

Reply look(int fd, const Words& words) {
    struct flock lock = range(parseLockType(words.at(2)), parseOffset(words.at(3)), parseOffset(words.at(4)));
    const int result = fcntl(fd, F_OFD_GETLK, &lock);
    const std::string type = lock.l_type == F_UNLCK ? "free" : lock.l_type == F_RDLCK ? "read" : "write";
    return kernelReply(result, lock.l_type == F_UNLCK
                                   ? type
                                   : type + " " + std::to_string(lock.l_start) + " " + std::to_string(lock.l_len) +
                                         " pid " + std::to_string(lock.l_pid));
}

// What fdinfo calls the first lock of the descriptor: OFDLCK, POSIX, FLOCK; or nothing.
Reply listedKind(int fd) {
    std::ifstream info("/proc/self/fdinfo/" + std::to_string(fd));
    for (std::string line; std::getline(info, line);) {
        std::istringstream stream(line);
        std::string word, number, kind;
        if (stream >> word >> number >> kind && word == "lock:")
            return {"ok", kind};
    }
    return {"ok", "nothing"};
}

// Leaves a page behind that the kernel has not written back.
Reply soil(int fd) {
    static const char page[4096] = "unwritten";
    return kernelReply(pwrite(fd, page, sizeof page, 0));
}

struct Block {
    alignas(4096) char bytes[512] = ""; // O_DIRECT wants it aligned
};

Reply readWord(int fd, off_t offset) {
    Block block;
    const ssize_t result = pread(fd, block.bytes, sizeof block.bytes, offset);
    return kernelReply(result, std::string(block.bytes, strnlen(block.bytes, sizeof block.bytes)));
}

Reply writeWord(int fd, off_t offset, const std::string& word) {
    Block block;
    word.copy(block.bytes, sizeof block.bytes - 1);
    return kernelReply(pwrite(fd, block.bytes, sizeof block.bytes, offset) < 0 ? -1 : fsync(fd));
}

class Orders {
public:
    explicit Orders(Libvirtd& libvirtd) {
        table_ = {
            {"register", [&](const Words& w) { return libvirtd.registerGuest(w); }},
            {"acquire", [&](const Words& w) { return libvirtd.acquire(w); }},
            {"release", [&](const Words& w) { return libvirtd.release(w); }},
            {"inquire", [&](const Words& w) { return libvirtd.inquire(w); }},
            {"attach", [&](const Words& w) { return libvirtd.attach(w); }},
            {"detach", [&](const Words& w) { return libvirtd.detach(w); }},
            {"kill", [&](const Words& w) { return libvirtd.kill(w); }},
            {"qemu-locks", [&](const Words& w) { return qemuLocks(w.at(1)); }},
            {"qemu-unlocks", [&](const Words& w) { return handles_.close("qemu:" + w.at(1)); }},
            {"open", [&](const Words& w) { return handles_.open(w.at(1), w.at(2), w.at(3)); }},
            {"close", [&](const Words& w) { return handles_.close(w.at(1)); }},
            {"park", [&](const Words& w) { return handles_.park(w.at(1)); }},
            {"as", [](const Words& w) { return setfsuid(static_cast<uid_t>(std::stoul(w.at(1)))), Reply{}; }},
            {"ofd",
             [&](const Words& w) {
                 struct flock lock = range(parseLockType(w.at(2)), parseOffset(w.at(3)), parseOffset(w.at(4)));
                 return kernelReply(fcntl(handles_[w.at(1)], F_OFD_SETLK, &lock));
             }},
            {"get", [&](const Words& w) { return look(handles_[w.at(1)], w); }},
            {"listed", [&](const Words& w) { return listedKind(handles_[w.at(1)]); }},
            {"flock",
             [&](const Words& w) {
                 const int kind = w.at(2) == "ex" ? LOCK_EX : w[2] == "sh" ? LOCK_SH : LOCK_UN;
                 return kernelReply(flock(handles_[w.at(1)], kind | LOCK_NB));
             }},
            {"read", [&](const Words& w) { return readWord(handles_[w.at(1)], parseOffset(w.at(2))); }},
            {"write",
             [&](const Words& w) {
                 return writeWord(handles_[w.at(1)], parseOffset(w.at(2)), w.size() > 3 ? w[3] : "");
             }},
            {"soil", [&](const Words& w) { return soil(handles_[w.at(1)]); }},
            {"die", [](const Words&) { return raise(SIGKILL), Reply{}; }},
            {"statfs", [](const Words& w) { return describeFileSystem(w.at(1)); }},
        };
    }

    std::string carryOut(const std::string& line) {
        std::istringstream stream(line);
        Words words;
        for (std::string word; stream >> word;)
            words.push_back(word);
        const Clock::time_point begin = Clock::now();
        Reply reply;
        try {
            const auto order = table_.find(words.at(0));
            reply = order != table_.end() ? order->second(words) : Reply{"mistake", "no such order"};
        } catch (const std::exception& problem) {
            reply = {"mistake", problem.what()};
        }
        const auto elapsed = std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begin);
        return reply.status + " " + std::to_string(elapsed.count()) + " " + reply.text + "\n";
    }

private:
    Reply qemuLocks(const std::string& image) {
        const std::string handle = "qemu:" + image;
        Reply reply = handles_.open(handle, image, "rw");
        if (reply.status == "ok")
            reply = takeQemuLocks(handles_[handle]);
        if (reply.status != "ok")
            handles_.close(handle);
        return reply;
    }

    Handles handles_;
    std::map<std::string, std::function<Reply(const Words&)>> table_;
};

// --- the socket -----------------------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

int listenAt(const std::string& path) {
    struct sockaddr_un address {};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof address) < 0 || listen(fd, 8) < 0)
        fail(path);
    return fd;
}

std::string readLine(int fd) {
    std::string line;
    for (char byte = 0; read(fd, &byte, 1) == 1 && byte != '\n';)
        line += byte;
    return line;
}

// What is made of a line goes back, for each connection.
template <typename Answer>
[[noreturn]] void serve(int listener, Answer answer) {
    for (;;) {
        const int connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (connection < 0)
            continue;
        const std::string text = answer(readLine(connection), connection);
        (void)!write(connection, text.data(), text.size());
        close(connection);
    }
}

[[noreturn]] void beActor(PluginHost& host, int listener, const std::string& config, const std::string& log) {
    setsid();
    signal(SIGCHLD, SIG_DFL);
    const int file = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    dup2(file, STDOUT_FILENO);
    dup2(file, STDERR_FILENO);
    try {
        Libvirtd libvirtd(host, config);
        Orders orders(libvirtd);
        serve(listener, [&](const std::string& line, int) { return orders.carryOut(line); });
    } catch (const std::exception& problem) {
        std::cerr << "actor: " << problem.what() << '\n';
    }
    _exit(EXIT_FAILURE);
}

int makeActors(const std::string& path, const std::string& plugin, const std::string& standIn) {
    const int listener = listenAt(path);
    if (const pid_t child = fork())
        return child < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
    setsid();
    signal(SIGPIPE, SIG_IGN); // whoever asked has lost patience
    signal(SIGCHLD, SIG_IGN); // nobody waits for actors

    PluginHost host(plugin, standIn);
    serve(listener, [&](const std::string& line, int connection) {
        const std::string socket = line.substr(0, line.find(' '));
        const int orders = listenAt(socket); // from here on they queue
        const pid_t actor = fork();
        if (actor == 0) {
            close(listener);
            close(connection);
            beActor(host, orders, line.substr(socket.size() + 1), socket + ".log");
        }
        close(orders);
        return std::to_string(actor);
    });
}

} // namespace

int main(int argc, char** argv) {
    const Words arguments(argv + 1, argv + argc);
    try {
        if (arguments.size() == 3)
            return makeActors(arguments[0], arguments[1], arguments[2]);
        std::cerr << "usage: actor SOCKET PLUGIN STAND-IN\n";
    } catch (const std::exception& problem) {
        std::cerr << "actor: " << problem.what() << '\n';
    }
    return EXIT_FAILURE;
}

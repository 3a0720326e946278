// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/virtlockd.hpp"

#include "tests/support/throw_errno.hpp"

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace leasehold::bench {
namespace {

namespace fs = std::filesystem;
using support::throwErrno;

constexpr char kVirtlockdSocket[] = "/run/libvirt/virtlockd-sock";
constexpr char kSanlockSocket[] = "/run/sanlock/sanlock.sock";
constexpr std::chrono::seconds kStartLimit{20};
constexpr std::chrono::seconds kStopLimit{5};
constexpr std::chrono::milliseconds kPoll{5};

void writeFile(const fs::path& path, const std::string& text) {
    std::ofstream file(path);
    file << text;
    file.close();
    if (!file)
        throw std::runtime_error("cannot write " + path.string());
}

bool accepting(const std::string& path) {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        throwErrno("socket");
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    const bool connected = connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    close(fd);
    return connected;
}

} // namespace

void enterPrivateRun() {
    if (unshare(CLONE_NEWNS) < 0)
        throwErrno("a private mount namespace");
    if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0)
        throwErrno("making the mounts private");
    if (mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755") < 0)
        throwErrno("a private /run");
}

Daemon::Daemon(const std::vector<std::string>& command, std::string socket, const fs::path& directory)
    : socket_(std::move(socket)) {
    fs::create_directories(directory);
    try {
        start(command, directory / "daemon.log");
    } catch (...) {
        stop();
        throw;
    }
}

void Daemon::start(const std::vector<std::string>& command, const fs::path& log) {
    std::vector<char*> arguments;
    for (const std::string& word : command)
        arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    const int logFd = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (logFd < 0)
        throwErrno(log);

    const pid_t parent = getpid();
    pid_ = fork();
    if (pid_ < 0)
        throwErrno("fork");
    if (pid_ == 0) {
        // The daemon ends with us even if we are killed. The parent may have died before prctl took effect.
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(EXIT_FAILURE);
        const int null = open("/dev/null", O_RDONLY);
        dup2(null, STDIN_FILENO);
        dup2(logFd, STDOUT_FILENO);
        dup2(logFd, STDERR_FILENO);
        execv(arguments[0], arguments.data());
        dprintf(STDERR_FILENO, "%s: %s\n", arguments[0], strerror(errno));
        _exit(EXIT_FAILURE);
    }
    close(logFd);
    waitForSocket(log);
}

void Daemon::waitForSocket(const fs::path& log) {
    const auto limit = std::chrono::steady_clock::now() + kStartLimit;
    while (!accepting(socket_)) {
        const bool ended = waitpid(pid_, nullptr, WNOHANG) == pid_;
        if (ended)
            pid_ = -1;
        if (ended || std::chrono::steady_clock::now() > limit) {
            std::ostringstream text;
            text << std::ifstream(log).rdbuf();
            throw std::runtime_error("the daemon of " + socket_ + (ended ? " ended" : " does not listen") +
                                     "; its log: " + text.str());
        }
        std::this_thread::sleep_for(kPoll);
    }
}

void Daemon::stop() {
    if (pid_ <= 0)
        return;
    const pid_t pid = std::exchange(pid_, -1);
    kill(pid, SIGTERM);
    for (const auto limit = std::chrono::steady_clock::now() + kStopLimit; std::chrono::steady_clock::now() < limit;) {
        const pid_t ended = waitpid(pid, nullptr, WNOHANG);
        if (ended == pid || (ended < 0 && errno != EINTR))
            return;
        std::this_thread::sleep_for(kPoll);
    }
    kill(pid, SIGKILL);
    while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
    }
}

namespace {

// What the daemon reads, and the words that start it.
std::vector<std::string> virtlockdCommand(const std::string& daemon, const fs::path& directory) {
    fs::create_directories(directory);
    const std::string config = directory / "virtlockd.conf";
    writeFile(config, "log_outputs = \"3:stderr\"\n");
    return {daemon, "--config", config, "--pid-file", directory / "virtlockd.pid"};
}

std::vector<std::string> sanlockCommand(const std::string& daemon) {
    fs::create_directories("/run/sanlock");
    // Without the watchdog, which would restart this machine; without the priority that only a host of its own can
    // give.
    return {daemon, "daemon", "-D", "-w", "0", "-h", "0", "-l", "0", "-U", "root", "-G", "root"};
}

} // namespace

Virtlockd::Virtlockd(const std::string& daemon, const fs::path& directory)
    : Daemon(virtlockdCommand(daemon, directory), kVirtlockdSocket, directory),
      pluginConfig_(directory / "qemu-lockd.conf") {
    writeFile(pluginConfig_, "auto_disk_leases = 1\n");
}

Sanlock::Sanlock(const std::string& daemon, const fs::path& directory)
    : Daemon(sanlockCommand(daemon), kSanlockSocket, directory), pluginConfig_(directory / "qemu-sanlock.conf") {
    const fs::path leases = directory / "leases";
    fs::create_directories(leases);
    // Its time to wait for storage is shortened: the lockspace is entered in seconds instead of a minute.
    writeFile(pluginConfig_, "auto_disk_leases = 1\nhost_id = 1\nio_timeout = 1\nuser = \"root\"\ngroup = \"root\"\n"
                             "disk_lease_dir = \"" +
                                 leases.string() + "\"\n");
}

} // namespace leasehold::bench

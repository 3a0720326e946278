// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/virtlockd.hpp"

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
#include <system_error>
#include <thread>
#include <utility>

namespace leasehold::bench {
namespace {

namespace fs = std::filesystem;

constexpr char kSocket[] = "/run/libvirt/virtlockd-sock";
constexpr std::chrono::seconds kStartLimit{20};
constexpr std::chrono::seconds kStopLimit{5};
constexpr std::chrono::milliseconds kPoll{5};

[[noreturn]] void throwErrno(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

void writeFile(const fs::path& path, const std::string& text) {
    std::ofstream file(path);
    file << text;
    file.close();
    if (!file)
        throw std::runtime_error("cannot write " + path.string());
}

bool accepting() {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        throwErrno("socket");
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, kSocket, sizeof kSocket);
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

Virtlockd::Virtlockd(const std::string& daemon, const fs::path& directory)
    : pluginConfig_(directory / "qemu-lockd.conf") {
    fs::create_directories(directory);
    writeFile(pluginConfig_, "auto_disk_leases = 1\n");
    try {
        start(daemon, directory);
    } catch (...) {
        stop();
        throw;
    }
}

void Virtlockd::start(const std::string& daemon, const fs::path& directory) {
    const std::string config = directory / "virtlockd.conf";
    const std::string pidFile = directory / "virtlockd.pid";
    const fs::path log = directory / "virtlockd.log";
    writeFile(config, "log_outputs = \"3:stderr\"\n");
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
        execl(daemon.c_str(), daemon.c_str(), "--config", config.c_str(), "--pid-file", pidFile.c_str(),
              static_cast<char*>(nullptr));
        dprintf(STDERR_FILENO, "%s: %s\n", daemon.c_str(), strerror(errno));
        _exit(EXIT_FAILURE);
    }
    close(logFd);
    waitForSocket(log);
}

void Virtlockd::waitForSocket(const fs::path& log) {
    const auto limit = std::chrono::steady_clock::now() + kStartLimit;
    while (!accepting()) {
        const bool ended = waitpid(pid_, nullptr, WNOHANG) == pid_;
        if (ended)
            pid_ = -1;
        if (ended || std::chrono::steady_clock::now() > limit) {
            std::ostringstream text;
            text << std::ifstream(log).rdbuf();
            throw std::runtime_error(std::string("virtlockd ") + (ended ? "ended" : "does not listen") +
                                     "; its log: " + text.str());
        }
        std::this_thread::sleep_for(kPoll);
    }
}

void Virtlockd::stop() {
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

} // namespace leasehold::bench

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/unit_support.hpp"

#include "tests/support/built.hpp"
#include "tests/support/orders.hpp"

#include "core/os/error.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::unit {

namespace {

// Far longer than anything takes; only a test that hangs meets it.
constexpr int kPatienceMs = 60'000;

[[noreturn]] void fail(const std::string& operation) {
    throw std::runtime_error(operation + " failed");
}

void reap(pid_t pid) {
    while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
    }
}

struct Pipe {
    os::Fd read, write;

    Pipe() {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0)
            fail("pipe");
        read = os::Fd(ends[0]);
        write = os::Fd(ends[1]);
    }
};

std::string readAll(int fd) {
    std::string text;
    char buffer[512];
    for (;;) {
        ssize_t got = ::read(fd, buffer, sizeof buffer);
        if (got > 0)
            text.append(buffer, static_cast<std::size_t>(got));
        else if (got == 0 || errno != EINTR)
            return text;
    }
}

// Runs the body; what it throws goes into the pipe. Gives whether it went well.
bool runReporting(const std::function<void()>& body, int pipe) {
    try {
        body();
        return true;
    } catch (const std::exception& error) {
        std::string text = error.what();
        (void)!::write(pipe, text.data(), text.size());
        return false;
    }
}

} // namespace

TempDir::TempDir(const std::string& parent) : path_(parent + "/leasehold-unit-XXXXXX") {
    if (!mkdtemp(path_.data()))
        fail("mkdtemp in " + parent);
}

TempDir::~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

std::string TempDir::file(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
}

std::size_t countDescriptors() {
    // The directory that is being read counts itself: the same each time.
    auto all = std::filesystem::directory_iterator("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

bool mayOpen(std::size_t descriptors) {
    rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return false;
    if (limit.rlim_cur >= descriptors)
        return true;
    limit.rlim_cur = descriptors;
    limit.rlim_max = std::max<rlim_t>(limit.rlim_max, descriptors);
    return setrlimit(RLIMIT_NOFILE, &limit) == 0;
}

std::string errorOf(const std::function<void()>& call) {
    try {
        call();
        return "";
    } catch (const Error& error) {
        return error.what();
    }
}

::testing::AssertionResult says(const std::string& text, const std::string& part) {
    auto result = text.find(part) == text.npos ? ::testing::AssertionFailure() : ::testing::AssertionSuccess();
    return result << "'" << part << "' in: " << text;
}

void demand(bool condition, const std::string& what) {
    if (!condition)
        throw std::runtime_error(what);
}

void Line::say(char word) {
    if (send(fd_.get(), &word, 1, MSG_NOSIGNAL) != 1)
        fail("saying something to the other process");
}

char Line::hear() {
    pollfd event{fd_.get(), POLLIN, 0};
    char word = 0;
    int ready;
    while ((ready = poll(&event, 1, kPatienceMs)) < 0 && errno == EINTR) {
    }
    if (ready != 1 || recv(fd_.get(), &word, 1, 0) != 1)
        fail("hearing something from the other process");
    return word;
}

bool Line::hasWord(std::chrono::milliseconds within) {
    pollfd event{fd_.get(), POLLIN, 0};
    return poll(&event, 1, static_cast<int>(within.count())) > 0;
}

Child::Child(const std::function<void(Line&)>& body) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        fail("socketpair");
    Line here{os::Fd(ends[0])}, there{os::Fd(ends[1])};
    Pipe verdict;
    pid_ = fork();
    if (pid_ < 0)
        fail("fork");
    if (pid_ == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        here.close();
        _exit(runReporting([&] { body(there); }, verdict.write.get()) ? 0 : 1);
    }
    line_ = std::move(here);
    verdict_ = std::move(verdict.read);
}

std::string Child::join() {
    std::string text = readAll(verdict_.get());
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    if (text.empty() && status != 0)
        return "the other process ended with status " + std::to_string(status);
    return text;
}

void Child::kill() {
    if (pid_ <= 0)
        return;
    ::kill(pid_, SIGKILL);
    reap(pid_);
    pid_ = -1;
}

StandIn::StandIn(const std::function<void()>& before) {
    const std::string program = support::built("tests/fake_qemu");
    Pipe life, report;
    pid_ = fork();
    if (pid_ < 0)
        fail("fork");
    if (pid_ == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        // Above all numbers that anybody cares for.
        int keep = fcntl(report.write.get(), F_DUPFD_CLOEXEC, 900);
        dup2(life.read.get(), STDIN_FILENO);
        syscall(__NR_close_range, 3, keep - 1, 0);
        syscall(__NR_close_range, keep + 1, ~0u, 0);
        if (runReporting(before, keep)) {
            execl(program.c_str(), program.c_str(), nullptr);
            runReporting([&] { fail("exec of " + program); }, keep);
        }
        _exit(1);
    }
    report.write.reset();
    lifeline_ = std::move(life.write);
    std::string problem = readAll(report.read.get());
    if (!problem.empty()) {
        kill();
        throw std::runtime_error(problem);
    }
    process_.emplace(pid_);
    // It is QEMU when it reads its input. Before, the dynamic loader has descriptors of its own open.
    int unread = 1;
    for (int tries = 0; tries < kPatienceMs && unread > 0; tries++) {
        if (tries == 0 && ::write(lifeline_.get(), "\n", 1) != 1)
            fail("writing to the stand-in");
        if (ioctl(lifeline_.get(), FIONREAD, &unread) < 0)
            fail("asking for unread input");
        if (unread > 0 && process_->diedWithin(std::chrono::milliseconds(1)))
            fail("starting the stand-in");
    }
}

void StandIn::order(char what, const std::string& path) const {
    support::order(pid_, what, path);
}

void StandIn::kill() {
    if (pid_ <= 0)
        return;
    ::kill(pid_, SIGKILL);
    reap(pid_);
    pid_ = -1;
}

namespace {

// Stops `body`, each time in a new child, after its first system call, after its second, and so on until one gets to
// its end; `then` decides about the child, which is traced, and reaps it.
int stopAtEverySystemCall(const std::function<void()>& body, const std::function<void(pid_t, int)>& then,
                          int every = 1) {
    int stopped = 0;
    // Every second stop is the end of a system call: dead there is dead before the next one.
    for (int stops = 2;; stops += 2 * every) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork");
        if (pid == 0) {
            if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) < 0)
                _exit(77);
            raise(SIGSTOP);
            bool good = runReporting(body, STDERR_FILENO);
            _exit(good ? 0 : 1);
        }
        int status = 0;
        waitpid(pid, &status, 0); // the SIGSTOP
        for (int i = 0; i < stops && WIFSTOPPED(status); i++) {
            ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr);
            waitpid(pid, &status, 0);
        }
        if (WIFEXITED(status)) {
            if (WEXITSTATUS(status) == 77)
                return -1;
            if (WEXITSTATUS(status) != 0)
                fail("the body, when nobody stopped it,");
            return stopped;
        }
        then(pid, stops);
        stopped++;
    }
}

} // namespace

int countSystemCalls(const std::function<void()>& body) {
    pid_t pid = fork();
    if (pid == 0) {
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) < 0)
            _exit(77);
        raise(SIGSTOP);
        _exit(runReporting(body, STDERR_FILENO) ? 0 : 1);
    }
    int status = 0, stops = 0;
    while (waitpid(pid, &status, 0) == pid && WIFSTOPPED(status)) {
        stops++;
        ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return -1;
    demand(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the body has failed");
    return stops / 2;
}

int killAtEverySystemCall(const std::function<void()>& body, const std::function<void(int)>& check, int every) {
    return stopAtEverySystemCall(
        body,
        [&](pid_t pid, int stop) {
            ::kill(pid, SIGKILL);
            reap(pid);
            check(stop);
        },
        every);
}

int meddleAtEverySystemCall(const std::function<void()>& body, const std::function<void()>& meddle,
                            const std::function<void(int, bool)>& check) {
    return stopAtEverySystemCall(body, [&](pid_t pid, int stop) {
        meddle();
        ptrace(PTRACE_DETACH, pid, nullptr, nullptr);
        int status = 0;
        waitpid(pid, &status, 0);
        check(stop, WIFEXITED(status) && WEXITSTATUS(status) == 0);
    });
}

bool isLongRun() {
    return std::getenv("LEASEHOLD_LONG") != nullptr;
}

bool hasMountsOfItsOwn() {
    return unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
}

bool isFree(const std::string& path, std::int64_t byte) {
    os::Fd fd = os::openFile(path, O_RDWR);
    return os::tryLock(fd.get(), os::LockType::write, {byte, 1}, path) == os::LockOutcome::granted;
}

} // namespace leasehold::unit

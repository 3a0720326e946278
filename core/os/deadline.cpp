// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/deadline.hpp"

#include "core/os/error.hpp"
#include "core/os/fd.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::os {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Helpers that did not die of SIGKILL in time, 0 for a free place. No mutex: this also runs in a process that was
// forked while another thread of libvirtd held it. (Whose children these are not: there they are simply forgotten.)
std::array<std::atomic<pid_t>, 16> abandoned;

// What a helper reports: one letter, then text.
constexpr char kReturned = 'r';
constexpr char kThrew = 'e'; // followed by the digit of the Fault

void reapAbandoned() {
    std::size_t stuck = 0;
    for (auto& place : abandoned) {
        pid_t pid = place;
        if (pid == 0)
            continue;
        if (waitpid(pid, nullptr, WNOHANG) != 0)
            place.compare_exchange_strong(pid, 0);
        else
            stuck++;
    }
    if (stuck == abandoned.size())
        throw Error(Fault::system, std::to_string(stuck) +
                                       " calls to storage that does not answer are stuck in the kernel; bring the "
                                       "storage back (processes in state D: ps axo pid,stat,wchan,comm)");
}

void abandon(pid_t pid) {
    for (auto& place : abandoned)
        if (pid_t none = 0; place.compare_exchange_strong(none, pid))
            return;
    // Full by now: it stays a zombie when it ends, and the next call is refused.
}

void closeOthers(std::vector<int> keep) {
    std::sort(keep.begin(), keep.end());
    unsigned first = STDERR_FILENO + 1;
    for (int number : keep) {
        if (static_cast<unsigned>(number) > first)
            syscall(SYS_close_range, first, number - 1, 0); // Linux 5.9; before it they merely stay open
        first = std::max(first, static_cast<unsigned>(number) + 1);
    }
    syscall(SYS_close_range, first, ~0u, 0);
}

void writeAll(int fd, const std::string& text) {
    for (std::size_t done = 0; done < text.size();) {
        ssize_t wrote = write(fd, text.data() + done, text.size() - done);
        if (wrote < 0 && errno != EINTR)
            return;
        done += wrote > 0 ? static_cast<std::size_t>(wrote) : 0;
    }
}

[[noreturn]] void runHelper(int pipe, std::span<const int> keep, const std::function<std::string()>& work) {
    std::vector<int> numbers(keep.begin(), keep.end());
    numbers.push_back(pipe);
    closeOthers(std::move(numbers));
    // The end of this process is the end of the call: the one place in core where exceptions become text.
    std::string report;
    try {
        report = kReturned + work();
    } catch (const Error& error) {
        report = std::string{kThrew, static_cast<char>('0' + static_cast<int>(error.fault()))} + error.what();
    } catch (const std::exception& error) {
        report = std::string{kThrew, static_cast<char>('0' + static_cast<int>(Fault::system))} + error.what();
    }
    writeAll(pipe, report);
    _exit(0);
}

// Reads until the helper closes the pipe; false at the deadline.
bool readUntil(int fd, steady_clock::time_point deadline, std::string& text) {
    char buffer[4096];
    for (;;) {
        auto left = std::chrono::ceil<milliseconds>(deadline - steady_clock::now());
        pollfd event{fd, POLLIN, 0};
        int ready = poll(&event, 1, static_cast<int>(std::max(left.count(), milliseconds::rep{0})));
        if (ready == 0)
            return false;
        if (ready < 0) {
            if (errno == EINTR)
                continue;
            throw SystemError(errno, "wait for", "a storage helper");
        }
        ssize_t got = read(fd, buffer, sizeof buffer);
        if (got == 0)
            return true;
        if (got < 0 && errno != EINTR)
            throw SystemError(errno, "read from", "a storage helper");
        text.append(buffer, got > 0 ? static_cast<std::size_t>(got) : 0);
    }
}

// SIGKILL ends every wait that a file system has not made uninterruptible.
void endHelper(pid_t pid) {
    kill(pid, SIGKILL);
    for (int tries = 0; tries < 100; tries++) {
        if (waitpid(pid, nullptr, WNOHANG) != 0)
            return;
        poll(nullptr, 0, 2);
    }
    abandon(pid);
}

} // namespace

std::optional<std::string> runWithDeadline(milliseconds limit, std::span<const int> keep,
                                           const std::function<std::string()>& work) {
    reapAbandoned();
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throw SystemError(errno, "create", "a pipe");
    Fd reader(ends[0]), writer(ends[1]);
    auto deadline = steady_clock::now() + limit;
    pid_t pid = fork();
    if (pid < 0)
        throw SystemError(errno, "fork", "a storage helper");
    if (pid == 0)
        runHelper(writer.get(), keep, work);
    writer.reset();
    std::string report;
    bool finished = readUntil(reader.get(), deadline, report);
    endHelper(pid);
    if (!finished)
        return std::nullopt;
    if (!report.empty() && report[0] == kReturned)
        return report.substr(1);
    if (report.size() > 1 && report[0] == kThrew)
        throw Error(static_cast<Fault>(report[1] - '0'), report.substr(2));
    throw Error(Fault::system, "a storage helper died without a report");
}

} // namespace leasehold::os

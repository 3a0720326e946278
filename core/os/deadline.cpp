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
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::os {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Helpers that did not die of SIGKILL in time, 0 for a free place. No mutex: this also runs in a process that was
// forked while another thread of libvirtd held it. (Whose children these are not: there they are simply forgotten.)
std::array<std::atomic<pid_t>, kMaxStuckHelpers> abandoned;

// What a helper reports: one letter, text, and an end without which nothing counts.
constexpr char kReturned = 'r';
constexpr char kThrew = 'e'; // followed by the digit of the Fault
constexpr char kEnd = '.';

void reapAbandoned() {
    std::size_t stuck = stuckHelpers().size();
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
            syscall(__NR_close_range, first, number - 1, 0); // Linux 5.9; before it they merely stay open
        first = std::max(first, static_cast<unsigned>(number) + 1);
    }
    syscall(__NR_close_range, first, ~0u, 0);
}

void writeAll(int fd, const std::string& text) {
    for (std::size_t done = 0; done < text.size();) {
        ssize_t wrote = write(fd, text.data() + done, text.size() - done);
        if (wrote < 0 && errno != EINTR)
            return;
        done += wrote > 0 ? static_cast<std::size_t>(wrote) : 0;
    }
}

// The handlers of libvirtd are not ours: its handler for SIGTERM writes to a descriptor by number, and in the helper
// that number may be an image.
void forgetHandlers() {
    for (int number = 1; number < NSIG; number++)
        (void)signal(number, SIG_DFL);
}

[[noreturn]] void runHelper(pid_t parent, int pipe, std::span<const int> keep,
                            const std::function<std::string()>& work) {
    forgetHandlers();
    // Whoever waits for us is also who ends us. Without it we would go on with what we knew of the leases, in parallel
    // with a libvirtd that has started anew and changed them.
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    std::vector<int> numbers(keep.begin(), keep.end());
    numbers.push_back(pipe);
    closeOthers(std::move(numbers));
    // The end of this process is the end of the call: here exceptions become text.
    std::string report;
    try {
        report = kReturned + work();
    } catch (const Error& error) {
        report = std::string{kThrew, static_cast<char>('0' + static_cast<int>(error.fault()))} + error.what();
    } catch (const std::exception& error) {
        report = std::string{kThrew, static_cast<char>('0' + static_cast<int>(Fault::system))} + error.what();
    }
    writeAll(pipe, report + kEnd);
    // Before all else that is open here: closing that may hang, and the report does not wait for it.
    close(pipe);
    _exit(0);
}

// Forks with all signals blocked, so that none meets a handler of libvirtd in the child.
pid_t forkQuietly() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    pid_t pid = fork();
    int error = errno;
    if (pid != 0)
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (pid < 0)
        throw SystemError(error, "fork", "a storage helper");
    return pid;
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

// The helper's end, whatever becomes of the call. SIGKILL ends every wait that a file system has not made
// uninterruptible.
class Helper {
public:
    explicit Helper(pid_t pid) : pid_(pid) {}
    Helper(const Helper&) = delete;
    ~Helper() {
        kill(pid_, SIGKILL);
        Fd pidfd(static_cast<int>(syscall(SYS_pidfd_open, pid_, 0)));
        pollfd event{pidfd.get(), POLLIN, 0};
        (void)poll(&event, 1, 200);
        if (waitpid(pid_, nullptr, WNOHANG) == 0)
            abandon(pid_);
    }

private:
    pid_t pid_;
};

} // namespace

std::vector<pid_t> stuckHelpers() {
    std::vector<pid_t> stuck;
    for (auto& place : abandoned) {
        pid_t pid = place;
        if (pid == 0)
            continue;
        if (waitpid(pid, nullptr, WNOHANG) != 0)
            place.compare_exchange_strong(pid, 0);
        else
            stuck.push_back(pid);
    }
    return stuck;
}

std::optional<std::string> runWithDeadline(milliseconds limit, std::span<const int> keep,
                                           const std::function<std::string()>& work) {
    reapAbandoned();
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throw SystemError(errno, "create", "a pipe");
    Fd reader(ends[0]), writer(ends[1]);
    auto deadline = steady_clock::now() + limit;
    pid_t parent = getpid();
    pid_t pid = forkQuietly();
    if (pid == 0)
        runHelper(parent, writer.get(), keep, work);
    Helper helper(pid);
    writer.reset();
    std::string report;
    if (!readUntil(reader.get(), deadline, report))
        return std::nullopt;
    if (report.size() >= 2 && report.back() == kEnd) {
        report.pop_back();
        if (report[0] == kReturned)
            return report.substr(1);
        if (report[0] == kThrew && report.size() >= 2)
            throw Error(static_cast<Fault>(report[1] - '0'), report.substr(2));
    }
    throw Error(Fault::system, "a storage helper died without a report");
}

} // namespace leasehold::os

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/calls.hpp"

#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>

namespace leasehold::bench {
namespace {

constexpr int kForbidden = 77;

// Calls that nobody else makes, with this as their argument: where the body begins, and where it ends.
void mark() {
    (void)getpgid(-1);
}

[[noreturn]] void runTraced(const std::function<void()>& body) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) < 0)
        _exit(kForbidden);
    raise(SIGSTOP);
    try {
        mark();
        body();
        mark();
        _exit(EXIT_SUCCESS);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "bench: %s\n", error.what());
    }
    _exit(EXIT_FAILURE);
}

} // namespace

std::optional<long> countSystemCalls(const std::function<void()>& body) {
    const pid_t child = fork();
    if (child < 0)
        throw std::system_error(errno, std::generic_category(), "fork");
    if (child == 0)
        runTraced(body);
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFSTOPPED(status)) {
        constexpr long kOptions =
            PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE;
        ptrace(PTRACE_SETOPTIONS, child, nullptr, kOptions);
        ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
    }
    long calls = 0;
    bool inside = false;
    for (;;) {
        const pid_t pid = WIFSTOPPED(status) ? waitpid(-1, &status, __WALL) : child;
        if (pid < 0 && errno == EINTR)
            continue;
        if (pid < 0 || (pid == child && !WIFSTOPPED(status)))
            break;
        if (!WIFSTOPPED(status)) { // a helper that has ended
            status = 0x7f;
            continue;
        }
        int signal = WSTOPSIG(status);
        if (signal == (SIGTRAP | 0x80)) {
            __ptrace_syscall_info info{};
            ptrace(PTRACE_GET_SYSCALL_INFO, pid, reinterpret_cast<void*>(sizeof info), &info);
            if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
                const bool marks = info.entry.nr == SYS_getpgid && static_cast<std::int32_t>(info.entry.args[0]) == -1;
                inside = marks ? !inside : inside;
                calls += inside && !marks;
            }
        }
        const bool ours = signal == (SIGTRAP | 0x80) || signal == SIGTRAP || signal == SIGSTOP;
        ptrace(PTRACE_SYSCALL, pid, nullptr, ours ? 0 : signal);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == kForbidden)
        return std::nullopt;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != EXIT_SUCCESS)
        throw std::runtime_error("what was to be counted has failed");
    return calls;
}

} // namespace leasehold::bench

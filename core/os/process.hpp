// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Other processes, held by pidfd so that a reused pid is never mistaken for the process we mean (pidfd_open(2),
// pidfd_getfd(2); Linux 5.6). Knows nothing of QEMU.

#include "core/os/fd.hpp"

#include <array>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace leasehold::os {

class Process {
public:
    // Throws SystemError(ESRCH) when there is no such process.
    explicit Process(pid_t pid);
    static std::optional<Process> openIfExists(pid_t pid);
    // One whose descriptors can be listed. Adds to `hidden` where one that is there gives none.
    static std::optional<Process> openToLookAt(pid_t pid, std::size_t& hidden);

    pid_t pid() const { return pid_; }
    // The pidfd, as what a forked helper has to keep.
    std::array<int, 1> descriptor() const { return {pidfd_.get()}; }
    // For ClosedTogether. Nothing can be asked afterwards.
    Fd takePidfd() { return std::move(pidfd_); }

    // Waits until the process has died, for at most this long. A dead process holds nothing any more: its descriptors
    // are closed by the time its pidfd is readable.
    bool diedWithin(std::chrono::milliseconds limit) const;

    // A duplicate of the process's descriptor: the same open file description. Nothing when there is no such
    // descriptor (any more) or the process is gone; throws EPERM when we may not (PTRACE_MODE_ATTACH_REALCREDS).
    std::optional<Fd> takeDescriptor(int number) const;
    bool mayTakeDescriptors() const;

    // The numbers of its open descriptors, ascending; none when it is gone or may not be looked at.
    std::vector<int> descriptors() const;
    // The same, with the error number of what could not be looked at, or 0.
    [[nodiscard]] int tryListDescriptors(std::vector<int>& numbers) const;
    // And the folder that has them, /proc/PID/fd.
    [[nodiscard]] int tryListDescriptors(std::vector<int>& numbers, Fd& directory) const;

private:
    Process(pid_t pid, Fd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

    pid_t pid_;
    Fd pidfd_;
};

// What a person calls the process: its command name, /proc/PID/comm. Printable ASCII only. Empty when it is gone.
std::string commandName(pid_t pid);

// The name of the program that it executes, without its folder. Nothing where that may not be looked at. Unlike its
// command name it cannot be chosen by whoever may not write where the program is.
std::optional<std::string> programName(pid_t pid);

// With whose rights it runs (the owner of /proc/PID; proc(5)). Nothing when it is gone.
std::optional<uid_t> userOf(pid_t pid);

// All processes of this pid namespace, as /proc lists them. It need not list those of other users (proc(5), hidepid).
std::vector<pid_t> listProcesses();

// Whether /proc keeps processes of others from us, which are not in its list then.
bool areProcessesHidden();

// Processes that have the file open through a descriptor with an open-file-description lock on one of the bytes
// first..last (/proc/PID/fdinfo). The lock may be of any type. Needs root for other users' processes; those that may
// not be looked at are passed over. Anybody can have very many processes and descriptors: at the deadline it stops.
struct LockHolders {
    std::vector<pid_t> pids; // ascending
    bool complete = true;    // false: there was no time to look at all
};
LockHolders findLockHolders(const FileId& file, std::int64_t first, std::int64_t last,
                            std::chrono::steady_clock::time_point deadline);

} // namespace leasehold::os

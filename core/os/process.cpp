// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/process.hpp"

#include "core/os/error.hpp"
#include "core/os/file_lock.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <limits>
#include <memory>

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold::os {

namespace {

// Debian 12's glibc has wrappers for both, RHEL 9's has not.
int pidfdOpen(pid_t pid) {
    return static_cast<int>(syscall(__NR_pidfd_open, pid, 0));
}
int pidfdGetfd(int pidfd, int number) {
    return static_cast<int>(syscall(__NR_pidfd_getfd, pidfd, number, 0));
}

// The entries of a /proc directory whose names are numbers. 0, or the error number: what could not be looked at is not
// empty. Not readdir(3): through what has been opened its entries can be looked at, without the way to it.
int tryListNumbers(const std::string& path, std::vector<int>& numbers, Fd& directory) {
    if (int error = tryOpen(path, O_RDONLY | O_DIRECTORY, directory))
        return error;
    alignas(dirent64) char room[16 * 1024];
    ssize_t length;
    while ((length = getdents64(directory.get(), room, sizeof room)) > 0)
        for (ssize_t at = 0; at < length;) {
            const auto* entry = reinterpret_cast<const dirent64*>(room + at);
            const char* end = entry->d_name + std::char_traits<char>::length(entry->d_name);
            int number = 0;
            if (auto [rest, error] = std::from_chars(entry->d_name, end, number); error == std::errc() && rest == end)
                numbers.push_back(number);
            at += entry->d_reclen;
        }
    int error = length < 0 ? errno : 0;
    std::sort(numbers.begin(), numbers.end());
    return error;
}

int tryListNumbers(const std::string& path, std::vector<int>& numbers) {
    Fd directory;
    return tryListNumbers(path, numbers, directory);
}

// The same for a process that may be gone or forbidden, and has none then.
std::vector<int> numbersIn(const std::string& directory) {
    std::vector<int> numbers;
    int error = tryListNumbers(directory, numbers);
    if (error != 0 && error != ENOENT && error != ESRCH && error != EACCES && error != EPERM)
        throw SystemError(error, "list", directory);
    return numbers;
}

std::string procPath(pid_t pid, const char* entry) {
    return "/proc/" + std::to_string(pid) + "/" + entry;
}

bool holdsLock(pid_t pid, int number, std::int64_t first, std::int64_t last) {
    // Whoever vanished while we looked holds nothing.
    std::string text = readFileIfPossible(procPath(pid, "fdinfo/") + std::to_string(number), 1 << 20).value_or("");
    for (const FoundLock& lock : parseFdinfoLocks(text))
        if (lock.range.start <= last && (lock.range.length == 0 || lock.range.start + lock.range.length > first))
            return true;
    return false;
}

} // namespace

Process::Process(pid_t pid) : pid_(pid), pidfd_(pidfdOpen(pid)) {
    if (!pidfd_.open())
        throw SystemError(errno, "open process", std::to_string(pid));
}

std::optional<Process> Process::openToLookAt(pid_t pid, std::size_t& hidden) {
    Fd probe;
    int error = tryOpen("/proc/" + std::to_string(pid) + "/fd", O_RDONLY | O_DIRECTORY, probe);
    hidden += error != 0 && error != ENOENT && error != ESRCH;
    return error == 0 ? openIfExists(pid) : std::nullopt;
}

std::optional<Process> Process::openIfExists(pid_t pid) {
    Fd pidfd(pidfdOpen(pid));
    if (pidfd.open())
        return Process(pid, std::move(pidfd));
    if (errno == ESRCH || errno == EINVAL) // EINVAL: no number of a process at all
        return std::nullopt;
    throw SystemError(errno, "open process", std::to_string(pid));
}

bool Process::diedWithin(std::chrono::milliseconds limit) const {
    pollfd event{pidfd_.get(), POLLIN, 0};
    int ready = poll(&event, 1, static_cast<int>(limit.count()));
    if (ready < 0 && errno != EINTR)
        throw SystemError(errno, "poll process", std::to_string(pid_));
    return ready > 0;
}

std::optional<Fd> Process::takeDescriptor(int number) const {
    Fd fd(pidfdGetfd(pidfd_.get(), number));
    if (fd.open())
        return fd;
    if (errno == EBADF || errno == ESRCH)
        return std::nullopt;
    throw SystemError(errno, "take a descriptor of process", std::to_string(pid_));
}

bool Process::mayTakeDescriptors() const {
    // The check comes before the descriptor is looked up, and no process has this one.
    Fd none(pidfdGetfd(pidfd_.get(), std::numeric_limits<int>::max()));
    return errno == EBADF;
}

std::vector<int> Process::descriptors() const {
    return numbersIn(procPath(pid_, "fd"));
}

int Process::tryListDescriptors(std::vector<int>& numbers) const {
    return tryListNumbers(procPath(pid_, "fd"), numbers);
}

int Process::tryListDescriptors(std::vector<int>& numbers, Fd& directory) const {
    return tryListNumbers(procPath(pid_, "fd"), numbers, directory);
}

std::string commandName(pid_t pid) {
    std::string name = readFileIfPossible(procPath(pid, "comm"), 64).value_or("");
    // The process chooses its name itself: no control characters from there into messages.
    std::erase_if(name, [](unsigned char c) { return c < 0x20 || c > 0x7e; });
    return name;
}

std::optional<std::string> programName(pid_t pid) {
    char target[4096];
    ssize_t length = readlink(procPath(pid, "exe").c_str(), target, sizeof target);
    if (length <= 0)
        return std::nullopt;
    std::string name(target, static_cast<std::size_t>(length));
    constexpr std::string_view kGone = " (deleted)"; // it was upgraded since
    if (name.size() > kGone.size() && name.compare(name.size() - kGone.size(), kGone.size(), kGone) == 0)
        name.resize(name.size() - kGone.size());
    return name.substr(name.rfind('/') + 1);
}

std::optional<uid_t> userOf(pid_t pid) {
    struct stat status;
    if (stat(("/proc/" + std::to_string(pid)).c_str(), &status) < 0)
        return std::nullopt;
    return status.st_uid;
}

bool areProcessesHidden() {
    // The first process of a pid namespace is always there, and its name is for all.
    return !readFileIfPossible(procPath(1, "comm"), 64);
}

std::vector<pid_t> listProcesses() {
    std::vector<pid_t> processes;
    if (int error = tryListNumbers("/proc", processes))
        throw SystemError(error, "list", "/proc");
    return processes;
}

LockHolders findLockHolders(const FileId& file, std::int64_t first, std::int64_t last,
                            std::chrono::steady_clock::time_point deadline) {
    LockHolders holders;
    for (pid_t pid : listProcesses()) {
        for (int number : numbersIn(procPath(pid, "fd"))) {
            if (std::chrono::steady_clock::now() > deadline) {
                holders.complete = false;
                return holders;
            }
            FileId found;
            if (tryIdentify(procPath(pid, "fd/") + std::to_string(number), found) == 0 && found == file &&
                holdsLock(pid, number, first, last)) {
                holders.pids.push_back(pid);
                break;
            }
        }
    }
    return holders;
}

} // namespace leasehold::os

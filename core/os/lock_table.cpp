// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/lock_table.hpp"

#include "core/os/process.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

namespace leasehold::os {

namespace {

constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max();

std::int64_t lastOf(const Range& range) {
    return range.length == 0 ? kLast : range.start + (range.length - 1);
}

std::string_view takeUntil(std::string_view& text, char separator) {
    std::string_view part = text.substr(0, text.find(separator));
    text.remove_prefix(std::min(text.size(), part.size() + 1));
    return part;
}

std::string_view takeWord(std::string_view& line) {
    line.remove_prefix(std::min(line.size(), line.find_first_not_of(" \t")));
    std::size_t length = std::min(line.size(), line.find_first_of(" \t"));
    std::string_view word = line.substr(0, length);
    line.remove_prefix(length);
    return word;
}

template <typename Number>
bool parseNumber(std::string_view text, Number& value, int base = 10) {
    auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    return error == std::errc() && rest == text.data() + text.size();
}

bool parseClass(std::string_view word, LockClass& kind) {
    struct Name {
        std::string_view word;
        LockClass kind;
    };
    constexpr std::array kNames{Name{"OFDLCK", LockClass::ofd}, Name{"POSIX", LockClass::posix},
                                Name{"FLOCK", LockClass::flock}, Name{"LEASE", LockClass::lease},
                                Name{"DELEG", LockClass::delegation}};
    auto name = std::find_if(kNames.begin(), kNames.end(), [&](const Name& each) { return each.word == word; });
    if (name == kNames.end())
        return false;
    kind = name->kind;
    return true;
}

// 254:0 in hexadecimal and the inode in decimal: fe:00:10953723
bool parseFile(std::string_view word, TableLock& lock) {
    unsigned major = 0, minor = 0;
    if (!parseNumber(takeUntil(word, ':'), major, 16) || !parseNumber(takeUntil(word, ':'), minor, 16) ||
        !parseNumber(word, lock.inode))
        return false;
    lock.device = makedev(major, minor);
    return true;
}

bool parseRange(std::string_view first, std::string_view last, Range& range) {
    std::int64_t end = kLast;
    if (!parseNumber(first, range.start) || range.start < 0 || (last != "EOF" && !parseNumber(last, end)) ||
        end < range.start)
        return false;
    range.length = end == kLast ? 0 : end - range.start + 1;
    return true;
}

// 1: POSIX  ADVISORY  WRITE 24191 fe:00:10953723 1 1
// 1: -> POSIX  ADVISORY  WRITE 24233 fe:00:10953723 1 1
bool parseLine(std::string_view line, TableLock& lock) {
    std::string_view word = takeWord(line);
    if (word == "lock:")
        word = takeWord(line);
    if (!word.ends_with(':'))
        return false;
    word = takeWord(line);
    lock.waiting = word == "->";
    if (lock.waiting)
        word = takeWord(line);
    if (!parseClass(word, lock.kind))
        return false;
    (void)takeWord(line); // ADVISORY, ACTIVE, BREAKING
    std::string_view type = takeWord(line);
    lock.type = type == "READ" ? LockType::read : LockType::write;
    if ((type != "READ" && type != "WRITE" && type != "UNLCK") || !parseNumber(takeWord(line), lock.pid) ||
        !parseFile(takeWord(line), lock))
        return false;
    std::string_view first = takeWord(line), last = takeWord(line);
    return parseRange(first, last, lock.range);
}

constexpr std::uint64_t kDevice = 0; // as an inode: a device, whatever node leads to it

// Which file a descriptor of another process leads to, without asking a server that may not answer, and which device.
struct Leads {
    FileId file;
    std::optional<std::uint64_t> node;
};

std::optional<Leads> whereLeads(const std::string& path) {
    struct statx status;
    if (statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, STATX_INO | STATX_TYPE, &status) < 0)
        return std::nullopt;
    Leads leads{{makedev(status.stx_dev_major, status.stx_dev_minor), status.stx_ino}, std::nullopt};
    if (S_ISBLK(status.stx_mode))
        leads.node = makedev(status.stx_rdev_major, status.stx_rdev_minor);
    return leads;
}

bool opensForWriting(std::string_view info) {
    while (!info.empty()) {
        std::string_view line = takeUntil(info, '\n');
        unsigned flags = 0;
        if (takeWord(line) == "flags:" && parseNumber(takeWord(line), flags, 8))
            return (flags & O_ACCMODE) != O_RDONLY;
    }
    return false;
}

} // namespace

std::vector<TableLock> parseLockTable(std::string_view text) {
    std::vector<TableLock> locks;
    while (!text.empty()) {
        TableLock lock;
        if (parseLine(takeUntil(text, '\n'), lock))
            locks.push_back(lock);
    }
    return locks;
}

OpenTable::OpenTable(std::chrono::steady_clock::time_point deadline) {
    for (pid_t pid : listProcesses())
        if (complete_)
            lookAt(pid, deadline);
    std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& one, const Entry& other) {
        return std::pair(one.inode, one.device) < std::pair(other.inode, other.device);
    });
}

void OpenTable::lookAt(pid_t pid, std::chrono::steady_clock::time_point deadline) {
    const std::string folder = "/proc/" + std::to_string(pid) + "/fd/";
    auto process = Process::openToLookAt(pid, hidden_);
    if (!process)
        return;
    for (int number : process->descriptors()) {
        complete_ = std::chrono::steady_clock::now() <= deadline;
        if (!complete_)
            return;
        auto leads = whereLeads(folder + std::to_string(number));
        if (!leads)
            continue;
        entries_.push_back({leads->file.device, leads->file.inode, pid, number});
        if (leads->node)
            entries_.push_back({*leads->node, kDevice, pid, number});
    }
}

std::vector<Opener> OpenTable::openersOf(const FileId& file, std::optional<std::uint64_t> node) const {
    const std::pair wanted = node ? std::pair(kDevice, *node) : std::pair(file.inode, file.device);
    auto first = std::lower_bound(entries_.begin(), entries_.end(), wanted, [](const Entry& entry, const auto& value) {
        return std::pair(entry.inode, entry.device) < value;
    });
    std::vector<Opener> openers;
    for (; first != entries_.end() && std::pair(first->inode, first->device) == wanted; ++first) {
        std::string folder = "/proc/" + std::to_string(first->pid), name = "/" + std::to_string(first->number);
        const std::string links = folder + "/fd", infos = folder + "/fdinfo";
        auto leads = whereLeads(links + name);
        if (!leads || (node ? leads->node != node : leads->file != file))
            continue; // closed meanwhile
        auto info = readFileIfPossible(infos + name, 1 << 20);
        if (!info)
            continue;
        if (openers.empty() || openers.back().pid != first->pid)
            openers.push_back({first->pid, false, {}});
        Opener& opener = openers.back();
        opener.writes = opener.writes || opensForWriting(*info);
        // Two descriptors of one open file description show the same locks.
        for (TableLock& lock : parseLockTable(*info))
            if (std::find(opener.locks.begin(), opener.locks.end(), lock) == opener.locks.end())
                opener.locks.push_back(lock);
    }
    return openers;
}

bool overlap(const Range& one, const Range& other) {
    return one.start <= lastOf(other) && other.start <= lastOf(one);
}

std::vector<FoundLock> findConflicts(int fd, const std::string& what, std::size_t limit) {
    std::vector<FoundLock> found;
    std::vector<Range> unseen{{0, 0}};
    while (!unseen.empty() && found.size() < limit) {
        Range range = unseen.back();
        unseen.pop_back();
        auto lock = findConflict(fd, LockType::write, range, what);
        if (!lock || !overlap(lock->range, range))
            continue;
        found.push_back(*lock);
        std::int64_t last = lastOf(range), hit = lastOf(lock->range);
        if (hit < last)
            unseen.push_back({hit + 1, range.length == 0 ? 0 : last - hit});
        if (lock->range.start > range.start)
            unseen.push_back({range.start, lock->range.start - range.start});
    }
    return found;
}

} // namespace leasehold::os

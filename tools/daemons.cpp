// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/daemons.hpp"

#include "core/os/process.hpp"

#include <sstream>

#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

// Root's, and in no container of its own.
bool belongsToHost(const std::string& folder) {
    struct stat owner, ours, its;
    if (stat(folder.c_str(), &owner) < 0 || owner.st_uid != 0)
        return false;
    return stat("/proc/self/ns/pid", &ours) < 0 || stat((folder + "/ns/pid").c_str(), &its) < 0 ||
           ours.st_ino == its.st_ino;
}

// proc_pid_maps(5): the path is the rest of the line, with " (deleted)" behind it when no name leads there any more.
Daemon::Driver driverOf(const std::string& folder) {
    auto maps = os::readFileIfPossible(folder + "/maps", 1 << 22);
    if (!maps)
        return Daemon::Driver::hidden;
    std::istringstream lines(*maps);
    for (std::string line; std::getline(lines, line);) {
        if (line.ends_with("/leasehold.so"))
            return Daemon::Driver::loaded;
        if (line.ends_with("/leasehold.so (deleted)"))
            return Daemon::Driver::replaced;
    }
    return Daemon::Driver::absent;
}

} // namespace

namespace {

// By its program where that may be looked at: a process can choose its name, and anybody can start a program of root's
// under another one (su).
bool isCalled(pid_t pid, const std::string& name) {
    return os::programName(pid).value_or(geteuid() == 0 ? "" : os::commandName(pid)) == name;
}

} // namespace

pid_t findWatcher() {
    constexpr std::string_view kOrder{"\0watch\0", 7};
    for (pid_t pid : os::listProcesses()) {
        std::string folder = "/proc/" + std::to_string(pid);
        if (os::programName(pid) == "leasehold" && belongsToHost(folder) &&
            os::readFileIfPossible(folder + "/cmdline", 256).value_or("").find(kOrder) != std::string::npos)
            return pid;
    }
    return 0;
}

std::vector<Daemon> findDaemons() {
    std::vector<Daemon> daemons;
    for (pid_t pid : os::listProcesses()) {
        std::string folder = "/proc/" + std::to_string(pid);
        for (const char* name : {"libvirtd", "virtqemud"})
            if (os::commandName(pid) == name && isCalled(pid, name) && belongsToHost(folder))
                daemons.push_back({name, pid, driverOf(folder)});
    }
    return daemons;
}

} // namespace leasehold::tools

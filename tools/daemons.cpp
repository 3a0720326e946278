// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/daemons.hpp"

#include "core/os/process.hpp"

#include <sstream>

#include <sys/stat.h>

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

std::vector<Daemon> findDaemons() {
    std::vector<Daemon> daemons;
    for (pid_t pid : os::listProcesses()) {
        std::string name = os::commandName(pid), folder = "/proc/" + std::to_string(pid);
        if ((name == "libvirtd" || name == "virtqemud") && belongsToHost(folder))
            daemons.push_back({name, pid, driverOf(folder)});
    }
    return daemons;
}

} // namespace leasehold::tools

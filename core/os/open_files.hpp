// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What a process has open, as the kernel shows it (proc(5), /proc/PID/fd): the files and block devices among its
// descriptors. A fact, where a path is only what somebody said once. Touches no storage: of each file is asked what the
// kernel knows of it already. Knows nothing of leases.

#include "core/os/fd.hpp"
#include "core/os/process.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace leasehold::os {

// One descriptor.
struct OpenFile {
    FileId file;
    int number = 0;
    mode_t type = 0; // S_IFREG or S_IFBLK
    bool writable = false;
};

class OpenFiles {
public:
    // Of a process that is gone: none. What cannot be looked at makes the answer incomplete, not empty.
    static OpenFiles read(const Process& process);

    // What its descriptors of a file allow the process, all taken together.
    enum class Use { none, reads, writes };
    Use useOf(const FileId& file) const;

    // False: there may be more than is listed. `gap` says why, for people.
    bool complete() const { return gap_.empty(); }
    const std::string& gap() const { return gap_; }

    const std::vector<OpenFile>& all() const { return files_; }

private:
    std::vector<OpenFile> files_;
    std::string gap_;
};

// What the kernel shows of itself as a file, and nobody stores anything in: of proc, sysfs, and what is mounted in them
// (cgroup2, debugfs). Programs read there without being asked to. `path` is what the descriptor's link says.
bool isOfKernel(const OpenFile& open, std::string_view path);

// A path that leads to the very file behind a descriptor of the process, wherever its name has gone. Opening it makes
// an open file description of one's own (proc(5)).
std::string pathThrough(const Process& process, int number);

} // namespace leasehold::os

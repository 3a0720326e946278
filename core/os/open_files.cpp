// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/open_files.hpp"

#include "core/os/error.hpp"

#include <cerrno>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

namespace leasehold::os {

namespace {

// A guest with 1000 disks and as many network queues has a few thousand. Each costs two system calls.
constexpr std::size_t kMaxDescriptors = 16384;

} // namespace

OpenFiles OpenFiles::read(const Process& process) {
    OpenFiles open;
    std::vector<int> numbers;
    Fd folder;
    if (int error = process.tryListDescriptors(numbers, folder)) {
        if (error == EMFILE || error == ENFILE || error == ENOMEM) // ours to complain about
            throw SystemError(error, "list", "/proc/" + std::to_string(process.pid()) + "/fd");
        if (error != ENOENT && error != ESRCH)
            open.gap_ = SystemError(error, "list", "/proc/" + std::to_string(process.pid()) + "/fd").what();
        return open;
    }
    if (numbers.size() > kMaxDescriptors) {
        numbers.resize(kMaxDescriptors);
        open.gap_ = "it has more than " + std::to_string(kMaxDescriptors) + " descriptors";
    }
    for (int number : numbers) {
        const std::string name = std::to_string(number);
        OpenFile found{.file = {}, .number = number, .type = 0, .writable = false};
        int error = tryIdentifyAt(folder.get(), name, found.file, &found.type);
        struct stat link;
        // The link's permissions say how the descriptor was opened (Linux fs/proc/fd.c, tid_fd_update_inode).
        if (error == 0 && (S_ISREG(found.type) || S_ISBLK(found.type)))
            error = fstatat(folder.get(), name.c_str(), &link, AT_SYMLINK_NOFOLLOW) == 0 ? 0 : errno;
        else if (error == 0)
            continue;
        if (error == ENOENT || error == ESRCH)
            continue; // closed meanwhile
        if (error != 0) {
            open.gap_ = SystemError(error, "look at", pathThrough(process, number)).what();
            continue;
        }
        // O_PATH gives no right to the file: what we open because of it the process must not get from us.
        if (!(link.st_mode & (S_IRUSR | S_IWUSR)))
            continue;
        found.writable = (link.st_mode & S_IWUSR) != 0;
        open.files_.push_back(found);
    }
    return open;
}

OpenFiles::Use OpenFiles::useOf(const FileId& file) const {
    Use use = Use::none;
    for (const OpenFile& open : files_)
        if (open.file == file)
            use = open.writable ? Use::writes : use == Use::writes ? use : Use::reads;
    return use;
}

bool isOfKernel(const OpenFile& open, std::string_view path) {
    // No device has the number 0 (Linux Documentation/admin-guide/devices.txt): file systems without one get it.
    return S_ISREG(open.type) && major(open.file.device) == 0 &&
           (path.starts_with("/proc/") || path.starts_with("/sys/"));
}

std::string pathThrough(const Process& process, int number) {
    return "/proc/" + std::to_string(process.pid()) + "/fd/" + std::to_string(number);
}

} // namespace leasehold::os

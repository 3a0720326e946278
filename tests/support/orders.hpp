// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Orders for a stand-in of QEMU (fake_qemu.c): what it is to open and to close. Obeyed when the call returns.

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <thread>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

namespace leasehold::support {

inline std::size_t countDescriptorsOf(pid_t pid) {
    std::size_t count = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd"))
        count++;
    return count;
}

inline void order(pid_t pid, char what, const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    int length = std::snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "leasehold-fake-qemu-%d", pid);
    auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(length));
    int sender = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    auto trySend = [&](const std::string& text) {
        return sendto(sender, text.data(), text.size(), 0, reinterpret_cast<const sockaddr*>(&name), size) >= 0;
    };
    auto waitFor = [&](auto condition) {
        for (int tries = 0; tries < 60'000; tries++) {
            if (condition())
                return;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        close(sender);
        throw std::runtime_error("the stand-in " + std::to_string(pid) + " did not obey: " + what + path);
    };
    // Its socket is there when the dynamic loader has closed what it had open.
    waitFor([&] { return trySend("-"); });
    std::size_t before = countDescriptorsOf(pid);
    waitFor([&] { return trySend(what + path); });
    waitFor([&] { return countDescriptorsOf(pid) != before; });
    close(sender);
}

// Whether the process has the file open that the path leads to. Not std::filesystem::equivalent: it takes no devices.
inline bool hasOpen(pid_t pid, const std::string& path) {
    struct stat wanted, found;
    if (stat(path.c_str(), &wanted) < 0)
        return false;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd", error))
        if (stat(entry.path().c_str(), &found) == 0 && found.st_dev == wanted.st_dev && found.st_ino == wanted.st_ino)
            return true;
    return false;
}

} // namespace leasehold::support

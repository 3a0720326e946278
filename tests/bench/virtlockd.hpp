// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_VIRTLOCKD_HPP
#define LEASEHOLD_TESTS_BENCH_VIRTLOCKD_HPP

// A virtlockd and a sanlock of the benchmark's own. virtlockd's plugin knows one socket, /run/libvirt/virtlockd-sock,
// so the benchmark gets a /run of its own: a virtlockd that serves real guests on this machine is neither disturbed nor
// measured.

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace leasehold::bench {

// Moves the calling process into a mount namespace whose /run is an empty tmpfs. Needs root; call it once, early.
void enterPrivateRun();

// In the foreground, as our child.
class Daemon {
public:
    // Returns when it accepts connections. `directory` holds its log and what it needs.
    Daemon(const std::vector<std::string>& command, std::string socket, const std::filesystem::path& directory);
    Daemon(const Daemon&) = delete;
    Daemon& operator=(const Daemon&) = delete;
    ~Daemon() { stop(); }

private:
    void start(const std::vector<std::string>& command, const std::filesystem::path& log);
    void waitForSocket(const std::filesystem::path& log);
    void stop();

    std::string socket_;
    pid_t pid_ = -1;
};

class Virtlockd : public Daemon {
public:
    Virtlockd(const std::string& daemon, const std::filesystem::path& directory);

    // The qemu-lockd.conf that asks for what leasehold does by default: one lease for every disk.
    const std::filesystem::path& pluginConfig() const { return pluginConfig_; }

private:
    std::filesystem::path pluginConfig_;
};

class Sanlock : public Daemon {
public:
    // As many disks as it takes of one guest (SANLK_MAX_RESOURCES in sanlock.h).
    static constexpr std::size_t kMostDisks = 8;

    Sanlock(const std::string& daemon, const std::filesystem::path& directory);

    const std::filesystem::path& pluginConfig() const { return pluginConfig_; }

private:
    std::filesystem::path pluginConfig_;
};

} // namespace leasehold::bench

#endif

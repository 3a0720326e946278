// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_BENCH_VIRTLOCKD_HPP
#define LEASEHOLD_TESTS_BENCH_VIRTLOCKD_HPP

// A virtlockd of the benchmark's own. virtlockd's plugin knows one socket, /run/libvirt/virtlockd-sock, so the
// benchmark gets a /run of its own: a virtlockd that serves real guests on this machine is neither disturbed nor
// measured.

#include <sys/types.h>

#include <filesystem>
#include <string>

namespace leasehold::bench {

// Moves the calling process into a mount namespace whose /run is an empty tmpfs. Needs root; call it once, early.
void enterPrivateRun();

class Virtlockd {
public:
    // Starts the daemon in the foreground as our child and returns when it accepts connections. directory holds its
    // configuration, log and pid file, and the plugin's configuration.
    Virtlockd(const std::string& daemon, const std::filesystem::path& directory);
    Virtlockd(const Virtlockd&) = delete;
    Virtlockd& operator=(const Virtlockd&) = delete;
    ~Virtlockd() { stop(); }

    // The qemu-lockd.conf that asks for what leasehold does by default: one lease for every disk.
    const std::filesystem::path& pluginConfig() const { return pluginConfig_; }

private:
    void start(const std::string& daemon, const std::filesystem::path& directory);
    void waitForSocket(const std::filesystem::path& log);
    void stop();

    std::filesystem::path pluginConfig_;
    pid_t pid_ = -1;
};

} // namespace leasehold::bench

#endif

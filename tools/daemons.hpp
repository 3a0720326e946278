// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The daemons that would load the lock driver: what they have loaded counts, not what their configuration says now.

#include <string>
#include <vector>

#include <sys/types.h>

namespace leasehold::tools {

struct Daemon {
    // Replaced: the file has been upgraded or removed since. Hidden: one has to be root to look.
    enum class Driver { absent, loaded, replaced, hidden };

    std::string name; // libvirtd, virtqemud
    pid_t pid = 0;
    Driver driver = Driver::absent;

    // What to do to have it load what its configuration says now.
    std::string restart() const { return "systemctl restart " + name + " (guests go on)"; }
};

// Root's, on this host and in no container. Those of qemu:///session have configurations of their own.
std::vector<Daemon> findDaemons();

// A `leasehold watch` of root's, on this host and in no container; 0 if there is none that may be looked at. Any
// process can call itself so: its program counts.
pid_t findWatcher();

} // namespace leasehold::tools

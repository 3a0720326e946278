// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The configuration as one value. This module knows the syntax of libvirt's own .conf files, the options of
// qemu-leasehold.conf, their defaults and what may be written for them, and nothing else: what an option does is the
// business of those who read it. A mistake in the file is never skipped or guessed right, because a lock manager that
// runs with other rules than the administrator wrote down protects the wrong thing. Called once by plugin/ when
// libvirtd loads the driver, and by tools/.

#include "core/os/error.hpp"
#include "core/storage/override.hpp"

#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <sys/types.h>

namespace leasehold {

// what() is one line for the administrator: "FILE:LINE: OPTION: problem; what to do". OPTION is left out where the
// text names none, LINE where the file itself cannot be read.
class SettingsError : public Error {
public:
    explicit SettingsError(const std::string& message) : Error(Fault::invalid, message) {}
};

struct Settings {
    // auto_disk_leases: every disk of a guest is leased without being asked to.
    bool autoDiskLeases = true;

    // require_lease_for_disks: a guest with a writable disk that is not shareable, and without any lease, may not
    // start. When the file does not say, it is the opposite of auto_disk_leases, as for virtlockd.
    bool requireLeaseForDisks = false;

    // handoff_wait: how long a guest that comes here waits for the lease that is being handed over. 0 to 60 seconds.
    std::chrono::milliseconds handoffWait{5000};

    // storage_timeout: how long a call may wait for network storage that does not answer. 1 to 600 seconds.
    std::chrono::milliseconds storageTimeout{30000};

    // guests_without_lease: may a guest that was started before leasehold was enabled resume or hot-plug a disk?
    enum class Unleased { refuse, allow };
    Unleased guestsWithoutLease = Unleased::refuse;

    // qemu_locks: what to do when a program outside leasehold (qemu-img, qemu-nbd, QEMU by hand) holds QEMU's own
    // locks on an image.
    enum class Outsiders { refuse, warn, ignore };
    Outsiders outsiders = Outsiders::refuse;

    // file_lockspace_dir, lvm_lockspace_dir, scsi_lockspace_dir: directories where lease files live, shared by all
    // hosts; for regular files, for logical volumes by their UUID, for SCSI devices by their identity. Empty: none.
    std::string fileLockspaceDir, lvmLockspaceDir, scsiLockspaceDir;

    // require_cluster_leases: refuse what can only be leased on this host though other hosts may reach it.
    bool requireClusterLeases = false;

    // lease_backing_files: what QEMU has open below the images is leased for reading, too.
    bool leaseBackingFiles = true;

    // device_layers: what lies below a device is leased, too.
    bool deviceLayers = true;

    // host_devices: what to do about devices that the host itself uses.
    Outsiders hostDevices = Outsiders::refuse;

    // single_host: no other host reaches what this one does, so a lockspace of this host is enough for all.
    bool singleHost = false;

    // storage_locks: which lock can be trusted below a path, where the administrator knows better.
    std::vector<storage::Override> storageLocks;

    // image_user, image_group: who may open images that root may not. Nothing: the image's own owner.
    std::optional<uid_t> imageUser;
    std::optional<gid_t> imageGroup;

    // No option: where leases of block devices live that have no lockspace. Tests use another.
    std::string hostLockspaceDir = "/run/leasehold";

    bool operator==(const Settings&) const = default;
};

// The text of a configuration file; fileName only serves the messages. Throws SettingsError at the first mistake.
Settings parseSettings(std::string_view text, const std::string& fileName);

// A file that does not exist means the defaults. Everything else that is not a readable regular file of at most
// 1 MiB throws SettingsError: a dangling symbolic link too, since somebody wanted a file to be there.
Settings loadSettings(const std::string& path);

} // namespace leasehold

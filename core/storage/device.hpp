// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Which block device this is, in a way that is the same on every host that can reach it, whatever the host calls it.
// Read from sysfs and udev's database, without running a command. What a device says about itself is hostile input.
// Knows nothing of leases.

#include <string>
#include <string_view>

#include <sys/types.h>

namespace leasehold::storage {

struct Device {
    enum class Kind {
        logicalVolume, // of LVM
        scsi,          // SCSI or NVMe, also by way of multipath
        other,
    };
    Kind kind = Kind::other;
    // Empty where there is none. Otherwise letters, digits and "._-%", at most 200, and good as part of a file's name.
    // All paths to a disk, and the multipath device over them, have the same.
    std::string identity;
    std::string words; // for messages: "logical volume vg-lv", "partition 1 of SCSI disk sda"
};

// `root` stands before /sys and /run, for tests. What is not there makes a device of kind other.
Device identifyDevice(dev_t device, const std::string& root = "");

// Pure. The name of a logical unit in its Device Identification page (SPC, VPD page 83h): "naa.6...", "eui.0...",
// "t10.VENDOR_...". Empty when the page has none. The best kind wins in the order in which udev's scsi_id looks for
// them, because that is what multipath names its devices by.
std::string parseDeviceIdentification(std::string_view page);

} // namespace leasehold::storage

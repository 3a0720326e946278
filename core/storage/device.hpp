// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Which block device this is, in a way that is the same on every host that can reach it, whatever the host calls it.
// Read from sysfs and udev's database, without running a command. What a device says about itself is hostile input.
// Knows nothing of leases.

#include <string>
#include <string_view>
#include <vector>

#include <sys/stat.h>
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

// One thing that a device stands on.
struct Layer {
    dev_t number = 0;
    Device device;
    // What stands on it covers it as a loop device covers its file, and is not one of its parts, as a partition is.
    bool whole = false;
    std::string file; // behind a loop device, and then no device
    std::string loop; // whose file it is: "loop0"
    std::string part; // "-part2": the only thing above that loop device is its second partition
};

// All that lies below a device, as sysfs knows it: the disk of a partition, what LVM, dm, md and the like are made of,
// the file of a loop device. The paths of a multipath device are that device. Throws Error where a loop device has no
// file, or one that was deleted, and where the layers have no end.
std::vector<Layer> findLayers(dev_t device, const std::string& root = "");

// Whether that is the file behind a loop device ("loop0"); its name may lead elsewhere by now. Throws SystemError.
bool isBehindLoop(const std::string& loop, const struct stat& file);

// The loop devices over a file, by number. Those that may not be asked are left out.
std::vector<dev_t> findLoops(const struct stat& file);

// Whether the kernel lets nobody write to it.
bool isReadOnly(dev_t device);

// Who uses the device on this host, in words, as far as sysfs and /proc tell: what is made of it, where it or a
// partition of it is mounted, swap. Empty where nothing is known.
std::string findHostUse(dev_t device);

// Pure. The name of a logical unit in its Device Identification page (SPC, VPD page 83h): "naa.6...", "eui.0...",
// "t10.VENDOR_...". Empty when the page has none. The best kind wins in the order in which udev's scsi_id looks for
// them, because that is what multipath names its devices by.
std::string parseDeviceIdentification(std::string_view page);

} // namespace leasehold::storage

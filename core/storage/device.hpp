#pragma once
#include <string>
#include <sys/types.h>
namespace leasehold::storage {
struct Device {
    enum class Kind { logicalVolume, scsi, other };
    Kind kind = Kind::other;
    std::string identity;
    std::string words;
};
Device identifyDevice(dev_t device, const std::string& root = "");
} // namespace leasehold::storage

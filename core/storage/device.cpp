#include "core/storage/device.hpp"
namespace leasehold::storage {
Device identifyDevice(dev_t, const std::string&) {
    return {Device::Kind::other, "", "block device"};
}
} // namespace leasehold::storage

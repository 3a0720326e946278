#include "core/storage/override.hpp"
namespace leasehold::storage {
std::optional<Override> parseOverride(std::string_view) {
    return std::nullopt;
}
} // namespace leasehold::storage

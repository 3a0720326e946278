// stub
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
namespace leasehold::storage {
enum class LockKind { byteRange, flock, none };
enum class Scope { thisHost, allHosts };
struct Override {
    std::string prefix;
    LockKind lock;
    Scope scope;
    bool operator==(const Override&) const = default;
};
std::optional<Override> parseOverride(std::string_view text);
} // namespace leasehold::storage

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/record.hpp"

#include "core/os/text.hpp"

#include <algorithm>
#include <charconv>

#include <glib.h>
#include <sys/xattr.h>
#include <unistd.h>

namespace leasehold::lease {

namespace {

constexpr const char* kAttribute = "user.leasehold";
constexpr std::size_t kMaxRecord = 2048;
constexpr std::size_t kMaxName = 255;

constexpr std::array<std::string_view, 3> kModeNames{"exclusive", "shared", "read-only"};

template <typename Number>
bool parseNumber(std::string_view text, Number& value, int base = 10) {
    auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    return error == std::errc() && rest == text.data() + text.size();
}

} // namespace

std::string cleanName(std::string_view name) {
    return os::printable(name.substr(0, kMaxName));
}

std::string hostForCommand(const std::string& name) {
    bool good = !name.empty() && name[0] != '-' && std::all_of(name.begin(), name.end(), [](unsigned char letter) {
        return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
               (letter >= '0' && letter <= '9') || letter == '-' || letter == '.';
    });
    return good ? name : "HOST";
}

std::string encodeRecord(const OwnerRecord& record) {
    return "domain=" + cleanName(record.domain) + "\nuuid=" + formatUuid(record.uuid) +
           "\nincarnation=" + os::hexadecimal(record.incarnation) + "\nhost=" + cleanName(record.host) +
           "\nboot=" + record.bootId + "\npid=" + std::to_string(record.pid) +
           "\nmode=" + std::string(kModeNames[static_cast<std::size_t>(record.mode)]) +
           "\nsince=" + std::to_string(record.since) + "\n" +
           (record.as.empty() ? "" : "as=" + cleanName(record.as) + "\n");
}

std::optional<OwnerRecord> parseRecord(std::string_view text) {
    if (text.size() > kMaxRecord)
        return std::nullopt;
    OwnerRecord record;
    bool uuid = false, incarnation = false;
    while (!text.empty()) {
        std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(text.size(), line.size() + 1));
        std::size_t sign = line.find('=');
        if (sign == std::string_view::npos)
            continue;
        std::string_view key = line.substr(0, sign), value = line.substr(sign + 1);
        if (key == "domain")
            record.domain = cleanName(value);
        else if (key == "uuid") {
            auto parsed = parseUuid(value);
            uuid = parsed.has_value();
            record.uuid = parsed.value_or(Uuid{});
        } else if (key == "incarnation")
            incarnation = parseNumber(value, record.incarnation, 16);
        else if (key == "host")
            record.host = cleanName(value);
        else if (key == "boot")
            record.bootId = cleanName(value);
        else if (key == "as")
            record.as = cleanName(value);
        else if (key == "pid" && !parseNumber(value, record.pid))
            record.pid = 0;
        else if (key == "since" && !parseNumber(value, record.since))
            record.since = 0;
        else if (key == "mode")
            for (std::size_t i = 0; i < kModeNames.size(); i++)
                if (value == kModeNames[i])
                    record.mode = static_cast<Mode>(i);
    }
    if (!uuid || !incarnation || record.domain.empty())
        return std::nullopt;
    return record;
}

void writeRecord(int fd, const OwnerRecord& record) {
    std::string text = encodeRecord(record);
    (void)fsetxattr(fd, kAttribute, text.data(), text.size(), 0);
}

std::optional<OwnerRecord> readRecord(int fd) {
    char buffer[kMaxRecord];
    ssize_t length = fgetxattr(fd, kAttribute, buffer, sizeof buffer);
    if (length < 0)
        return std::nullopt;
    return parseRecord({buffer, static_cast<std::size_t>(length)});
}

void writeRecordAt(int fd, std::int64_t offset, const OwnerRecord& record) {
    std::string text = encodeRecord(record);
    if (pwrite(fd, text.data(), text.size(), offset) == static_cast<ssize_t>(text.size()))
        (void)!ftruncate(fd, offset + static_cast<std::int64_t>(text.size()));
}

std::optional<OwnerRecord> readRecordAt(int fd, std::int64_t offset) {
    char buffer[kMaxRecord];
    ssize_t length = TEMP_FAILURE_RETRY(pread(fd, buffer, sizeof buffer, offset));
    if (length < 0)
        return std::nullopt;
    return parseRecord({buffer, static_cast<std::size_t>(length)});
}

} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/settings.hpp"

#include "core/os/fd.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <fcntl.h>
#include <functional>
#include <grp.h>
#include <map>
#include <numeric>
#include <optional>
#include <pwd.h>
#include <sys/stat.h>
#include <system_error>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>

namespace leasehold {
namespace {

constexpr std::size_t kLargestFile = 1024 * 1024;
constexpr std::string_view kRequireLeaseForDisks = "require_lease_for_disks";

// What stands in the file reaches libvirtd's log and a terminal: printable ASCII only, and never a megabyte of it.
std::string printable(std::string_view text) {
    constexpr std::size_t kLongest = 60;
    constexpr std::string_view kHex = "0123456789abcdef";
    std::string result;
    for (const char c : text.substr(0, kLongest)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f)
            result += c;
        else
            (((result += "\\x") += kHex[byte >> 4]) += kHex[byte & 15]);
    }
    return text.size() > kLongest ? result + "..." : result;
}

std::string inQuotes(std::string_view text) {
    return "\"" + std::string(text) + "\"";
}

struct Value {
    std::string found; // in words, for messages
    std::optional<std::int64_t> number = std::nullopt;
    std::optional<std::string> text = std::nullopt;
    std::optional<std::vector<Value>> list = std::nullopt;
};

struct Option {
    std::string_view name;
    std::string allowed; // continues "write ..."
    // false: the value is not one of those allowed
    std::function<bool(Settings&, const Value&)> set;
};

Option flag(std::string_view name, bool Settings::*member) {
    return {name, "0 (no) or 1 (yes)", [member](Settings& settings, const Value& value) {
                if (!value.number || (*value.number != 0 && *value.number != 1))
                    return false;
                settings.*member = value.number == 1;
                return true;
            }};
}

Option seconds(std::string_view name, std::chrono::milliseconds Settings::*member, std::int64_t least,
               std::int64_t most) {
    return {name, "a whole number of seconds from " + std::to_string(least) + " to " + std::to_string(most),
            [=](Settings& settings, const Value& value) {
                if (!value.number || *value.number < least || *value.number > most)
                    return false;
                settings.*member = std::chrono::seconds(*value.number);
                return true;
            }};
}

template <class Enum>
Option choice(std::string_view name, Enum Settings::*member,
              std::type_identity_t<std::vector<std::pair<std::string_view, Enum>>> words) {
    std::string allowed;
    for (const auto& [word, meaning] : words)
        allowed += (allowed.empty() ? "" : " or ") + inQuotes(word);
    return {name, allowed, [=](Settings& settings, const Value& value) {
                const auto match =
                    std::ranges::find_if(words, [&](const auto& word) { return value.text == word.first; });
                if (match == words.end())
                    return false;
                settings.*member = match->second;
                return true;
            }};
}

// A directory by its whole name: libvirtd's working directory is nobody's business.
Option directory(std::string_view name, std::string Settings::*member) {
    return {name, "the absolute path of a directory, in quotes", [member](Settings& settings, const Value& value) {
                if (!value.text || !(value.text->empty() || value.text->starts_with('/')))
                    return false;
                settings.*member = *value.text;
                return true;
            }};
}

// By name, or by number as "+107", like qemu.conf's user and group. Names are looked up once, when the file is read.
template <class Id>
Option account(std::string_view name, std::string allowed, std::optional<Id> Settings::*member,
               std::optional<Id> (*find)(const std::string&)) {
    return {name, std::move(allowed), [=](Settings& settings, const Value& value) {
                if (!value.text)
                    return false;
                if (value.text->empty())
                    return true;
                std::string_view digits = *value.text;
                Id id = 0;
                if (digits.starts_with('+')) {
                    digits.remove_prefix(1);
                    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), id);
                    if (error != std::errc() || end != digits.data() + digits.size() || id == static_cast<Id>(-1))
                        return false;
                    settings.*member = id;
                } else {
                    settings.*member = find(*value.text);
                }
                return (settings.*member).has_value();
            }};
}

std::optional<uid_t> findUser(const std::string& name) {
    const passwd* entry = getpwnam(name.c_str());
    return entry ? std::optional(entry->pw_uid) : std::nullopt;
}

std::optional<gid_t> findGroup(const std::string& name) {
    const group* entry = getgrnam(name.c_str());
    return entry ? std::optional(entry->gr_gid) : std::nullopt;
}

Option storageLocks() {
    return {"storage_locks",
            R"(a list like [ "/mnt/shared=ofd" ], of absolute paths, each with =ofd, =flock, =local or =refuse)",
            [](Settings& settings, const Value& value) {
                if (!value.list)
                    return false;
                for (const Value& item : *value.list) {
                    const auto parsed = item.text ? storage::parseOverride(*item.text) : std::nullopt;
                    if (!parsed)
                        return false;
                    settings.storageLocks.push_back(*parsed);
                }
                return true;
            }};
}

const std::vector<Option>& options() {
    using Unleased = Settings::Unleased;
    using Outsiders = Settings::Outsiders;
    static const std::vector<Option> table = {
        flag("auto_disk_leases", &Settings::autoDiskLeases),
        flag(kRequireLeaseForDisks, &Settings::requireLeaseForDisks),
        seconds("handoff_wait", &Settings::handoffWait, 0, 60),
        seconds("storage_timeout", &Settings::storageTimeout, 1, 600),
        choice("guests_without_lease", &Settings::guestsWithoutLease,
               {{"refuse", Unleased::refuse}, {"allow", Unleased::allow}}),
        choice("qemu_locks", &Settings::outsiders,
               {{"refuse", Outsiders::refuse}, {"warn", Outsiders::warn}, {"ignore", Outsiders::ignore}}),
        directory("file_lockspace_dir", &Settings::fileLockspaceDir),
        directory("lvm_lockspace_dir", &Settings::lvmLockspaceDir),
        directory("scsi_lockspace_dir", &Settings::scsiLockspaceDir),
        flag("require_cluster_leases", &Settings::requireClusterLeases),
        flag("single_host", &Settings::singleHost),
        choice("host_devices", &Settings::hostDevices,
               {{"refuse", Outsiders::refuse}, {"warn", Outsiders::warn}, {"ignore", Outsiders::ignore}}),
        flag("device_layers", &Settings::deviceLayers),
        flag("lease_backing_files", &Settings::leaseBackingFiles),
        storageLocks(),
        account<uid_t>("image_user", R"(a user of this host, or a number as "+107")", &Settings::imageUser, findUser),
        account<gid_t>("image_group", R"(a group of this host, or a number as "+107")", &Settings::imageGroup,
                       findGroup),
    };
    return table;
}

// Levenshtein's distance, blind to case and to "-" for "_".
std::size_t distance(std::string_view a, std::string_view b) {
    const auto folded = [](char c) { return c == '-' ? '_' : c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
    std::vector<std::size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (std::size_t i = 0; i < a.size(); i++) {
        std::size_t diagonal = std::exchange(row[0], i + 1);
        for (std::size_t j = 0; j < b.size(); j++) {
            const std::size_t replaced = diagonal + (folded(a[i]) == folded(b[j]) ? 0 : 1);
            diagonal = row[j + 1];
            row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
        }
    }
    return row.back();
}

std::string adviceForUnknown(std::string_view name) {
    const auto distanceTo = [&](const Option& option) { return distance(name.substr(0, 64), option.name); };
    const Option& nearest = *std::ranges::min_element(options(), {}, distanceTo);
    if (distanceTo(nearest) <= nearest.name.size() / 4)
        return "did you mean " + inQuotes(nearest.name) + "?";
    std::string names;
    for (const Option& option : options())
        names += (names.empty() ? "" : ", ") + std::string(option.name);
    return "the options are " + names;
}

class Reader {
public:
    Reader(std::string_view text, const std::string& fileName) : text_(text), fileName_(fileName) {}

    Settings read() {
        constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
        if (text_.starts_with(kByteOrderMark))
            position_ = kByteOrderMark.size();
        if (const auto nul = text_.find('\0'); nul != text_.npos)
            fail(1 + newlinesIn(text_.substr(0, nul)), "there is a NUL byte", "save the file as plain UTF-8 text");

        for (skipSpace(); !atEnd(); skipSpace()) {
            if (peek() != '#')
                readAssignment();
            endStatement();
        }
        if (!lineOf_.contains(kRequireLeaseForDisks))
            settings_.requireLeaseForDisks = !settings_.autoDiskLeases;
        return settings_;
    }

private:
    bool atEnd() const { return position_ == text_.size(); }
    char peek() const { return atEnd() ? '\0' : text_[position_]; }
    bool atOneOf(std::string_view set) const { return !atEnd() && set.find(peek()) != set.npos; }

    static std::size_t newlinesIn(std::string_view text) {
        return static_cast<std::size_t>(std::ranges::count(text, '\n'));
    }

    std::string_view take(std::size_t count) {
        const std::string_view taken = text_.substr(position_, count);
        position_ += taken.size();
        line_ += newlinesIn(taken);
        return taken;
    }

    std::string_view takeUntil(std::string_view stops) {
        return take(std::min(text_.find_first_of(stops, position_), text_.size()) - position_);
    }

    void skip(std::string_view set) {
        take(std::min(text_.find_first_not_of(set, position_), text_.size()) - position_);
    }
    void skipBlanks() { skip(" \t"); }
    void skipSpace() { skip(" \t\r\n"); }
    // Comments may stand in a list of several lines, which libvirt's own reader does not allow.
    void skipSpaceAndComments() {
        for (skipSpace(); peek() == '#'; skipSpace())
            takeUntil("\r\n");
    }

    [[noreturn]] void fail(std::size_t line, const std::string& problem, const std::string& advice) const {
        const std::string option = option_.empty() ? "" : printable(option_) + ": ";
        throw SettingsError(fileName_ + ":" + std::to_string(line) + ": " + option + problem + "; " + advice);
    }

    void readAssignment() {
        const std::size_t line = line_;
        // Anything may stand here for a name: "auto-disk-leases:" is answered better as an unknown option than as a
        // character that was not expected.
        option_ = takeUntil(" \t\r\n=#;");
        if (option_.empty())
            fail(line, "an option's name is missing", "write NAME = VALUE");
        const auto option = std::ranges::find(options(), option_, &Option::name);
        if (option == options().end())
            fail(line, "unknown option", adviceForUnknown(option_));
        if (const auto [first, isNew] = lineOf_.emplace(option->name, line); !isNew)
            fail(line, "set a second time", "keep either this line or line " + std::to_string(first->second));

        skipBlanks();
        if (peek() != '=')
            fail(line, "there is no = after the name", "write " + std::string(option->name) + " = VALUE");
        take(1);
        skipBlanks();
        const Value value = readValue();
        if (!option->set(settings_, value))
            fail(line, "found " + value.found, "write " + option->allowed);
    }

    void endStatement() {
        skipBlanks();
        if (peek() == '#')
            takeUntil("\r\n");
        if (peek() == ';')
            take(1);
        else if (!atEnd() && !atOneOf("\r\n"))
            fail(line_, "found " + printable(takeUntil("\r\n")) + " after the value",
                 "end the line before it, or put a # there");
        option_ = {};
    }

    Value readValue() { return atOneOf("\"'") ? readText() : peek() == '[' ? readList() : readWord(); }

    Value readWord() {
        const std::string_view word = takeUntil(" \t\r\n#;,]");
        Value value{word.empty() ? "no value" : printable(word)};
        std::string_view digits = word;
        // from_chars knows no plus sign, libvirt does; "+-1" is a number to neither.
        if (digits.starts_with('+') && !digits.starts_with("+-"))
            digits.remove_prefix(1);
        std::int64_t number = 0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
        // A number too large for us stays without a value, and so is refused: no option allows it.
        if (error == std::errc() && end == digits.data() + digits.size())
            value.number = number;
        return value;
    }

    Value readText() {
        const bool multiLine = text_.substr(position_).starts_with(R"(""")");
        const std::size_t line = line_;
        const std::string_view quote = take(multiLine ? 3 : 1);
        const std::size_t end = text_.find(quote, position_);
        const std::string_view body = text_.substr(position_, end - position_);
        if (end == text_.npos || (!multiLine && body.find_first_of("\r\n") != body.npos))
            fail(line, "the string is not closed", "write " + std::string(quote) + " at its end");
        take(body.size() + quote.size());
        return {"the string " + inQuotes(printable(body)), std::nullopt, std::string(body)};
    }

    Value readList() {
        const std::size_t line = line_;
        std::vector<Value> items;
        take(1);
        for (skipSpaceAndComments(); !atEnd() && peek() != ']'; skipSpaceAndComments()) {
            // A list inside a list too: libvirt's reader recurses there, and no driver has a use for it.
            if (atOneOf("[,;"))
                fail(line_, "found " + printable(takeUntil("\r\n")) + " inside the list",
                     "write strings or numbers only");
            items.push_back(readValue());
            skipSpaceAndComments();
            if (peek() == ',')
                take(1);
            else if (!atEnd() && peek() != ']')
                fail(line_, "found " + printable(takeUntil("\r\n")) + " inside the list", "write , or ] before it");
        }
        if (atEnd())
            fail(line, "the list is not closed", "write ] after its last value");
        take(1);
        Value value{"a list"};
        for (const Value& item : items)
            if (value.found.size() < 200)
                value.found += (&item == &items.front() ? " of " : ", ") + item.found;
        value.list = std::move(items);
        return value;
    }

    std::string_view text_;
    const std::string& fileName_;
    std::size_t position_ = 0;
    std::size_t line_ = 1;
    std::string_view option_;
    std::map<std::string_view, std::size_t> lineOf_;
    Settings settings_;
};

[[noreturn]] void cannotUse(const std::string& path, const std::string& problem, bool forbidden = false) {
    throw SettingsError(path + ": " + problem +
                        (forbidden && geteuid() != 0 ? "; run this as root"
                                                     : "; put it right, or remove the file to get the defaults"));
}

} // namespace

Settings parseSettings(std::string_view text, const std::string& fileName) {
    return Reader(text, fileName).read();
}

Settings loadSettings(const std::string& path) {
    const auto cannot = [&](const char* verb, int error) {
        cannotUse(path, std::string("cannot ") + verb + ": " + std::generic_category().message(error), error == EACCES);
    };
    // O_NONBLOCK: a FIFO in place of the file must not stop libvirtd for ever.
    const os::Fd file(TEMP_FAILURE_RETRY(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)));
    if (!file.open()) {
        const int error = errno;
        struct stat link;
        if (error != ENOENT)
            cannot("open", error);
        if (lstat(path.c_str(), &link) == 0)
            cannotUse(path, "a symbolic link to a file that does not exist");
        return {};
    }
    struct stat status;
    if (fstat(file.get(), &status) != 0)
        cannot("stat", errno);
    if (!S_ISREG(status.st_mode))
        cannotUse(path, S_ISDIR(status.st_mode) ? "a directory, not a file" : "not a regular file");

    std::string text(kLargestFile + 1, '\0');
    std::size_t size = 0;
    while (size < text.size()) {
        const ssize_t count = TEMP_FAILURE_RETRY(read(file.get(), text.data() + size, text.size() - size));
        if (count < 0)
            cannot("read", errno);
        if (count == 0)
            break;
        size += static_cast<std::size_t>(count);
    }
    if (size > kLargestFile)
        cannotUse(path, "larger than 1 MiB");
    return parseSettings(std::string_view(text).substr(0, size), path);
}

} // namespace leasehold

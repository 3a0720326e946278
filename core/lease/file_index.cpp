// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/file_index.hpp"

#include "core/lease/file_set.hpp"
#include "core/os/error.hpp"
#include "core/os/text.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::lease {

namespace {

constexpr std::string_view kIndexMagic = "leasehold-index1";
constexpr const char* kNewName = "index-new"; // until it is whole
// Of the head and of each line: a power of two, so that none lies in two pages, and whoever is killed while he writes
// one has written all of it or nothing.
constexpr std::size_t kLineSize = 32;
constexpr std::size_t kNameSize = 17;
constexpr std::size_t kMaxSize = kLineSize << 16;
// What is written is on the server when the gate is open again, as with the marks.
constexpr int kFlags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_DSYNC;

std::string padded(std::string text) {
    text.resize(kLineSize - 1, ' ');
    return text + '\n';
}

std::string headOf(const Index& index) {
    return padded(std::string(kIndexMagic) + ' ' + os::hexadecimal(index.living) + (index.readers ? " r" : " -"));
}

std::string textOf(const Index::Line& line) {
    return padded(encodeMarkFileName(line.who) + ' ' + static_cast<char>(line.marks));
}

constexpr auto kDigits = [] {
    std::array<int, 256> digits{};
    digits.fill(-1);
    for (int digit = 0; digit < 16; digit++)
        digits[static_cast<unsigned char>("0123456789abcdef"[digit])] = digit;
    return digits;
}();

// Eight digits, as os::hexadecimal writes them; negative where they are not.
std::int64_t parseNumber(const char* text) {
    std::int64_t number = 0;
    for (int i = 0; i < 8; i++) {
        const int digit = kDigits[static_cast<unsigned char>(text[i])];
        if (digit < 0)
            return -1;
        number = number << 4 | digit;
    }
    return number;
}

// Only what textOf writes. There may be a thousand, and each step reads all of them.
bool tryParseLine(const char* text, Index::Line& line) {
    constexpr std::string_view kRest = "            \n";
    static_assert(kNameSize + 2 + kRest.size() == kLineSize);
    const std::int64_t domain = parseNumber(text), id = parseNumber(text + 9);
    const char marks = text[kNameSize + 1];
    if (domain < 0 || id < 0 || text[8] != '-' || text[kNameSize] != ' ' ||
        (marks != '-' && marks != 's' && marks != 'x') ||
        std::memcmp(text + kNameSize + 2, kRest.data(), kRest.size()) != 0)
        return false;
    line = {{static_cast<std::uint32_t>(domain), static_cast<std::uint32_t>(id)}, static_cast<Index::Marks>(marks)};
    return true;
}

} // namespace

std::string encodeIndex(const Index& index) {
    std::string text = headOf(index);
    for (const Index::Line& line : index.lines)
        text += textOf(line);
    return text;
}

std::optional<Index> parseIndex(std::string_view text) {
    if (text.size() < kLineSize || text.size() % kLineSize != 0 || !text.starts_with(kIndexMagic))
        return std::nullopt;
    Index index;
    std::string_view head = text.substr(0, kLineSize);
    index.readers = head[kIndexMagic.size() + 10] == 'r';
    const char* number = head.data() + kIndexMagic.size() + 1;
    (void)std::from_chars(number, number + 8, index.living, 16);
    if (headOf(index) != head)
        return std::nullopt;
    index.lines.resize(text.size() / kLineSize - 1);
    const char* at = text.data();
    for (Index::Line& line : index.lines)
        if (!tryParseLine(at += kLineSize, line))
            return std::nullopt;
    return index;
}

std::optional<FileIndex> FileIndex::openIfExists(int directory, const std::string& name) {
    os::Fd file;
    int error = os::tryOpenAt(directory, encodeMarkFileName(kIndexIncarnation), kFlags, 0, file);
    if (error == ENOENT)
        return std::nullopt;
    if (error != 0)
        throw SystemError(error, "open the index of the lease of", name);
    std::string text;
    char buffer[16 * 1024];
    for (ssize_t got = sizeof buffer; got == ssize_t{sizeof buffer} && text.size() < kMaxSize;) {
        got = TEMP_FAILURE_RETRY(pread(file.get(), buffer, sizeof buffer, static_cast<off_t>(text.size())));
        if (got < 0)
            throw SystemError(errno, "read the index of the lease of", name);
        text.append(buffer, static_cast<std::size_t>(got));
    }
    auto index = parseIndex(text);
    return index ? std::optional(FileIndex(std::move(file), std::move(*index), name)) : std::nullopt;
}

void FileIndex::make(int directory, const Index& index, const std::string& name) {
    os::Fd file;
    if (int error = os::tryOpenAt(directory, kNewName, kFlags | O_CREAT | O_TRUNC, 0600, file))
        throw SystemError(error, "make the index of the lease of", name);
    FileIndex(std::move(file), {}, name).write(0, encodeIndex(index));
    if (renameat(directory, kNewName, directory, encodeMarkFileName(kIndexIncarnation).c_str()) < 0)
        throw SystemError(errno, "make the index of the lease of", name);
}

void FileIndex::write(std::size_t offset, const std::string& text) const {
    ssize_t length = TEMP_FAILURE_RETRY(pwrite(file_.get(), text.data(), text.size(), static_cast<off_t>(offset)));
    if (length != static_cast<ssize_t>(text.size()))
        throw SystemError(length < 0 ? errno : ENOSPC, "write the index of the lease of", name_);
}

void FileIndex::set(const Incarnation& who, Index::Marks marks) {
    auto& lines = index_.lines;
    auto line = std::find_if(lines.begin(), lines.end(), [&](const Index::Line& each) { return each.who == who; });
    if (line == lines.end() ? marks == Index::Marks::none : line->marks == marks)
        return;
    if (line == lines.end())
        line = std::find_if(lines.begin(), lines.end(),
                            [](const Index::Line& each) { return each.marks == Index::Marks::none; });
    if (line == lines.end())
        line = lines.insert(lines.end(), Index::Line{});
    *line = {who, marks};
    write(kLineSize * (1 + static_cast<std::size_t>(line - lines.begin())), textOf(*line));
}

void FileIndex::setReaders() {
    if (std::exchange(index_.readers, true))
        return;
    write(0, headOf(index_));
}

} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The index of a file set: who may have other marks up than those of a reader, so that whoever enters need not open the
// file of every reader that is there. It is a hint that says too much rather than too little: an incarnation is in it
// before it has such marks, and until after it has dropped them. Read and written behind the gate only.
//
// It is a file with the name of a mark file that nobody can have and nobody flocks. Versions of leasehold that do not
// know it take it for the file of a dead incarnation: they sweep it whenever they look, and they look before each mark
// that they place. So where it is, nobody has placed a mark since it was made without keeping it; where it is not, all
// mark files have to be read, as ever. Old and new hosts, and plugins that were downgraded, are safe together.

#include "core/lease/mark.hpp"
#include "core/os/fd.hpp"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace leasehold::lease {

// As the name of a mark file: no incarnation has the number 0 (drawId).
constexpr Incarnation kIndexIncarnation{0, 0};

struct Index {
    enum class Marks : char {
        none = '-',     // or a reader's: the line is free
        shared = 's',   // none of: owner, present exclusive, present read-only
        anything = 'x', //
    };
    struct Line {
        Incarnation who;
        Marks marks = Marks::anything;

        bool operator==(const Line&) const = default;
    };
    std::vector<Line> lines;
    bool readers = false;     // somebody may have a reader's marks
    std::uint32_t living = 0; // how many there were when all files were read last

    bool operator==(const Index&) const = default;
};

// Pure: its text, and back; nothing when it is no such text.
std::string encodeIndex(const Index& index);
std::optional<Index> parseIndex(std::string_view text);

class FileIndex {
public:
    // Nothing where there is none, or what is there is none.
    static std::optional<FileIndex> openIfExists(int directory, const std::string& name);
    // In one step, whatever was there before. `name` is the image's, for messages.
    static void make(int directory, const Index& index, const std::string& name);

    const Index& get() const { return index_; }
    // Each is one write of less than a sector.
    void set(const Incarnation& who, Index::Marks marks);
    void setReaders();

private:
    FileIndex(os::Fd file, Index index, std::string name)
        : file_(std::move(file)), index_(std::move(index)), name_(std::move(name)) {}
    void write(std::size_t offset, const std::string& text) const;

    os::Fd file_;
    Index index_;
    std::string name_;
};

} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Marks as files of a directory, one for each incarnation, that count while somebody holds a flock on them. For storage
// where flock(2) is what reaches every host: byte-range locks stay on one node (OCFS2 with o2cb), or outlive their
// holder (many FUSE file systems).
//
//     LOCKSPACE/RESOURCE/gate                   flocked for the length of every single step, never removed
//                       /DOMAIN-INCARNATION     flocked by one QEMU for as long as it lives; its text is the marks
//                       /00000000-00000000      the index, where many are there (file_index.hpp)
//
// What others have up is read and what one has up is written behind the gate only, so every step is atomic for
// everybody, also when its process is killed: a flock ends with its holder, and a file that nobody holds is no mark. It
// is swept by whoever comes next, behind the gate too. The flock of a file is taken once and never converted: a refused
// conversion would lose it (flock(2)).

#include "core/lease/medium.hpp"
#include "core/os/fd.hpp"

#include <string>
#include <string_view>

namespace leasehold::lease {

constexpr const char* kGateName = "gate";

// The new file of this incarnation in the directory of a resource, held, with no marks up yet. The gate is made when it
// is missing; `about` is what it says then, and has to say (storage::inscribe).
os::Fd openMarkFile(int directory, const Incarnation& self, const std::string& about, const std::string& name);

// Whether it still has its name there: one that was deleted by hand marks nothing.
bool isMarkFileListed(int directory, int markFile, const Incarnation& self, const std::string& name);

class FileSetMedium final : public Medium {
public:
    // Owns none of the descriptors. `image` is -1, or a descriptor of the image itself: then whoever has `owner` flocks
    // that as well, so that flock(1) and others respect it, and one of theirs shows as a foreign mark. `name` is the
    // image's, for messages, and stays where it is.
    FileSetMedium(int markFile, int directory, int image, const Incarnation& self, const std::string& name);
    FileSetMedium(int markFile, int directory, int image, const Incarnation& self, std::string&& name) = delete;

    [[nodiscard]] os::LockOutcome tryPlace(const Mark& mark, os::LockType type) override;
    void remove(const Mark& mark) override;
    void removeHandoff() override;
    void removeAll() override;
    bool any(MarkKind first, MarkKind last) const override;
    Rivals findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const override;
    std::vector<Mark> lookAt(std::uint32_t domain, Mode mode) const override;
    std::vector<Mark> lookToJoin(std::uint32_t domain, Mode mode) const override;
    std::vector<Mark> look() const override;
    Note note() const override;
    void setNote(const Note& note) override;

private:
    template <typename Which>
    void drop(Which which);

    int markFile_;
    int directory_;
    int image_;
    Incarnation self_;
    const std::string& name_;
    bool imageLocked_ = false; // by somebody who has no marks, when we tried last
};

// A mark that is up, and whether it is for reading or for writing (`owner` alone may be for reading).
struct Placed {
    Mark mark;
    os::LockType type = os::LockType::write;

    bool operator==(const Placed&) const = default;
};

// Pure: the text of an incarnation's file, always of one length, and back. What is not such a text decodes as
// `foreign`.
std::string encodeMarks(const std::vector<Placed>& marks);
std::vector<Placed> decodeMarks(std::string_view text, const Incarnation& placer);

// Pure: "DOMAIN-INCARNATION", both as 8 hexadecimal digits, and back.
std::string encodeMarkFileName(const Incarnation& who);
std::optional<Incarnation> parseMarkFileName(std::string_view name);

} // namespace leasehold::lease

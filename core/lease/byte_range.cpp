// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/byte_range.hpp"

#include "core/lease/note.hpp"
#include "core/os/error.hpp"

#include <limits>

namespace leasehold::lease {

namespace {

constexpr int kKindShift = kDomainBits + kIdBits;
constexpr os::Range kWholeArea{kMarkArea, 0};

// All marks of these kinds, whoever's they are.
constexpr os::Range rangeOf(MarkKind first, MarkKind last) {
    const std::int64_t kinds = static_cast<std::int64_t>(last) - static_cast<std::int64_t>(first) + 1;
    return {kMarkArea + (static_cast<std::int64_t>(first) << kKindShift), kinds << kKindShift};
}

constexpr os::Range kPresentArea = rangeOf(MarkKind::presentExclusive, MarkKind::presentReadOnly);
static_assert(static_cast<int>(MarkKind::presentExclusive) == 2 && static_cast<int>(MarkKind::presentReadOnly) == 4);
// handoff and leaving are neighbours so that one unlock drops both.
constexpr os::Range kHandoffArea = rangeOf(MarkKind::handoff, MarkKind::leaving);
static_assert(static_cast<int>(MarkKind::handoff) == 5 && static_cast<int>(MarkKind::leaving) == 6);
static_assert(static_cast<int>(MarkKind::foreign) == 8, "kinds 0-7 fill the area");

// More marks than this on one resource are an attack or a mistake, not guests.
constexpr std::size_t kMaxMarks = 4096;
// The kernel merges locks of neighbouring bytes of one holder. Ours are scattered by hashes: a few may meet by
// chance, a long range is somebody else's.
constexpr std::int64_t kMaxMerged = 4;

os::Range byteOf(const Mark& mark) {
    return {encodeOffset(mark), 1};
}

// All marks of one kind that one domain can have.
os::Range rangeOf(MarkKind kind, std::uint32_t domain) {
    return {encodeOffset({kind, domain, 0}), std::int64_t{1} << kIdBits};
}

} // namespace

std::int64_t encodeOffset(const Mark& mark) {
    return kMarkArea + (static_cast<std::int64_t>(mark.kind) << kKindShift) +
           (static_cast<std::int64_t>(mark.domain) << kIdBits) + mark.id;
}

std::vector<Mark> decodeRange(const os::Range& range) {
    if (range.start < kMarkArea || range.length < 1 || range.length > kMaxMerged)
        return {Mark{}};
    std::vector<Mark> marks;
    for (std::int64_t i = 0; i < range.length; i++) {
        std::int64_t offset = range.start + i - kMarkArea;
        marks.push_back({static_cast<MarkKind>(offset >> kKindShift),
                         static_cast<std::uint32_t>(offset >> kIdBits) & ((1u << kDomainBits) - 1),
                         static_cast<std::uint32_t>(offset) & ((1u << kIdBits) - 1)});
    }
    return marks;
}

ByteRangeMedium::ByteRangeMedium(int fd, bool writable, const std::string& name)
    : fd_(fd), writable_(writable), name_(name) {}

os::LockOutcome ByteRangeMedium::tryPlace(const Mark& mark, os::LockType type) {
    // A read lock marks just as well, but it would be no `owner` for writing: let the kernel say EBADF there.
    if (!writable_ && mark.kind != MarkKind::owner)
        type = os::LockType::read;
    return os::tryLock(fd_, type, byteOf(mark), name_);
}

void ByteRangeMedium::remove(const Mark& mark) {
    os::unlock(fd_, byteOf(mark), name_);
}

void ByteRangeMedium::removeHandoff() {
    os::unlock(fd_, kHandoffArea, name_);
}

void ByteRangeMedium::removeAll() {
    os::unlock(fd_, kWholeArea, name_);
}

bool ByteRangeMedium::any(MarkKind first, MarkKind last) const {
    return isLocked(rangeOf(first, last));
}

bool ByteRangeMedium::isLocked(const os::Range& range) const {
    return os::findConflict(fd_, os::LockType::write, range, name_).has_value();
}

Rivals ByteRangeMedium::findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const {
    Rivals rivals;
    rivals.present = isLocked(rangeOf(presentMark(mode, {domain, 0}).kind, domain));
    if (!rivals.present)
        return rivals;
    rivals.quoted = quoted && isLocked(byteOf({MarkKind::handoff, domain, *quoted}));
    rivals.handoff = rivals.quoted || isLocked(rangeOf(MarkKind::handoff, domain));
    rivals.taken = quoted && isLocked(byteOf({MarkKind::taken, domain, *quoted}));
    return rivals;
}

std::vector<Mark> ByteRangeMedium::lookAt(std::uint32_t domain, Mode mode) const {
    std::vector<Mark> marks;
    enumerate(byteOf({MarkKind::owner, 0, 0}), marks);
    if (mode == Mode::shared)
        enumerate(byteOf({MarkKind::sharedOwner, domain, 0}), marks);
    std::size_t owners = marks.size();
    enumerate(rangeOf(presentMark(mode, {domain, 0}).kind, domain), marks);
    if (marks.size() == owners)
        return marks;
    enumerate(rangeOf(MarkKind::handoff, domain), marks);
    enumerate(rangeOf(MarkKind::taken, domain), marks);
    return marks;
}

std::vector<Mark> ByteRangeMedium::lookToJoin(std::uint32_t domain, Mode mode) const {
    std::vector<Mark> marks;
    enumerate(mode == Mode::exclusive ? kPresentArea : rangeOf(presentMark(mode, {domain, 0}).kind, domain), marks);
    if (marks.empty())
        return marks;
    if (isLocked(rangeOf(MarkKind::handoff, domain))) {
        marks.push_back({MarkKind::handoff, domain, 0});
        return marks;
    }
    enumerate(byteOf({MarkKind::owner, 0, 0}), marks);
    if (mode == Mode::shared)
        enumerate(byteOf({MarkKind::sharedOwner, domain, 0}), marks);
    return marks;
}

std::vector<Mark> ByteRangeMedium::look() const {
    std::vector<Mark> marks;
    enumerate(kWholeArea, marks);
    return marks;
}

// F_OFD_GETLK names one lock of a range: ask again for what is left and right of it until nothing is found.
void ByteRangeMedium::enumerate(const os::Range& area, std::vector<Mark>& marks) const {
    std::vector<os::Range> unseen{area};
    while (!unseen.empty()) {
        os::Range range = unseen.back();
        unseen.pop_back();
        auto found = os::findConflict(fd_, os::LockType::write, range, name_);
        if (!found)
            continue;
        for (const Mark& mark : decodeRange(found->range))
            marks.push_back(mark);
        if (marks.size() > kMaxMarks)
            throw Error(Fault::invalid, name_ + " carries more than " + std::to_string(kMaxMarks) +
                                            " locks in leasehold's area; find who places them (/proc/locks)");
        const os::Range& hit = found->range;
        if (hit.start > range.start)
            unseen.push_back({range.start, hit.start - range.start});
        // Length 0 reaches to the end of the address space, 2^63-1. It must not be confused with "nothing left".
        constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max();
        std::int64_t hitLast = hit.length == 0 ? kLast : hit.start + hit.length - 1;
        std::int64_t last = range.length == 0 ? kLast : range.start + range.length - 1;
        if (hitLast < last)
            unseen.push_back({hitLast + 1, range.length == 0 ? 0 : last - hitLast});
    }
}

Note ByteRangeMedium::note() const {
    return readNote(fd_, name_);
}

void ByteRangeMedium::setNote(const Note& note) {
    writeNote(fd_, note, name_);
}

} // namespace leasehold::lease

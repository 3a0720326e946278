// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/file_set.hpp"

#include "core/lease/file_index.hpp"
#include "core/lease/note.hpp"
#include "core/os/error.hpp"
#include "core/os/text.hpp"
#include "core/storage/lockspace.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <functional>
#include <thread>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace leasehold::lease {

namespace {

using os::LockOutcome;
using os::LockType;

// A step takes milliseconds, also between hosts. Longer than this the gate is held only by a process that is stopped.
constexpr std::chrono::seconds kGateWait{10};

constexpr std::chrono::milliseconds kForkWait{200};

constexpr std::string_view kMagic = "leasehold-marks1";
// So short that nobody ever reads half of an old text and half of a new one: one page.
constexpr std::size_t kTextSize = 512;
// One that is left behind by each QEMU that died since somebody came here last, and the living ones.
constexpr std::size_t kMaxFiles = 16384;

[[noreturn]] void deleted(const std::string& name) {
    throw Error(Fault::invalid, "the lease of '" + name +
                                    "' was deleted from its lockspace: another guest may use the image; destroy this "
                                    "guest and start it again");
}

// Everybody else waits outside while this lives.
class Gate {
public:
    Gate(int directory, const std::string& name, bool create = false) {
        int flags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | (create ? O_CREAT : 0);
        int error = os::tryOpenAt(directory, kGateName, flags, 0600, fd_);
        if (error == ENOENT)
            deleted(name);
        if (error != 0)
            throw SystemError(error, "open the gate of the lease of", name);
        if (!create && !storage::isTrusted(fd_.get(), name))
            throw Error(Fault::invalid, "the lease of '" + name + "' is damaged: what is there as its gate is none");
        auto deadline = std::chrono::steady_clock::now() + kGateWait;
        // Not the call that waits: nobody could end it.
        std::chrono::microseconds step{200};
        while (os::tryFlock(fd_.get(), LockType::write, name) == LockOutcome::contended) {
            if (std::chrono::steady_clock::now() > deadline)
                throw Error(Fault::system, "the lease of '" + name +
                                               "' is kept busy by somebody else: look for a stopped libvirtd or "
                                               "leasehold on the hosts that share the image (/proc/locks)");
            std::this_thread::sleep_for(step);
            step = std::min(step * 2, std::chrono::microseconds(10000));
        }
    }

    // Closing alone would leave it to a process that another thread of libvirtd has forked meanwhile.
    ~Gate() { (void)flock(fd_.get(), LOCK_UN); }
    Gate(const Gate&) = delete;

    int fd() const { return fd_.get(); }

private:
    os::Fd fd_;
};

std::string readText(int fd, const std::string& name) {
    char text[kTextSize];
    ssize_t length;
    while ((length = pread(fd, text, sizeof text, 0)) < 0)
        if (errno != EINTR)
            throw SystemError(errno, "read the marks of", name);
    return {text, static_cast<std::size_t>(length)};
}

void writeText(int fd, const std::string& text, const std::string& name) {
    ssize_t length;
    while ((length = pwrite(fd, text.data(), text.size(), 0)) < 0)
        if (errno != EINTR)
            throw SystemError(errno, "write the marks of", name);
    if (length != static_cast<ssize_t>(text.size()))
        throw SystemError(ENOSPC, "write the marks of", name);
}

bool allowedTogether(const Placed& theirs, const Mark& mark, LockType type) {
    if (theirs.mark.kind == MarkKind::foreign)
        return mark.kind != MarkKind::owner;
    return theirs.mark != mark || (theirs.type == LockType::read && type == LockType::read);
}

using Marks = std::vector<Placed>;

// What one has up whose file is there; nothing when nobody holds it: then it is swept. Behind the gate.
std::optional<Marks> readOther(int directory, const std::string& file, const Incarnation& placer,
                               const std::string& name) {
    os::Fd fd;
    int error = os::tryOpenAt(directory, file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0, fd);
    if (error == ENOENT)
        return std::nullopt;
    if (error != 0)
        throw SystemError(error, "read the marks of", name);
    if (os::tryFlock(fd.get(), LockType::read, name) == LockOutcome::contended)
        return decodeMarks(readText(fd.get(), name), placer);
    if (unlinkat(directory, file.c_str(), 0) < 0 && errno != ENOENT)
        throw SystemError(errno, "sweep the lease of", name);
    return std::nullopt;
}

// How an incarnation with these marks stands in the index.
struct Standing {
    Index::Marks marks = Index::Marks::none;
    bool reads = false;

    bool operator==(const Standing&) const = default;
};

constexpr bool isReaders(const Placed& placed) {
    return placed.mark.kind == MarkKind::presentReadOnly ||
           (placed.mark.kind == MarkKind::owner && placed.type == LockType::read);
}

constexpr bool isOfSharers(MarkKind kind) {
    return kind != MarkKind::owner && kind != MarkKind::presentExclusive && kind != MarkKind::presentReadOnly &&
           kind != MarkKind::foreign;
}

Standing standingOf(const Marks& marks) {
    auto all = [&](auto test) { return std::all_of(marks.begin(), marks.end(), test); };
    if (all(isReaders))
        return {Index::Marks::none, !marks.empty()};
    bool shares = all([](const Placed& placed) { return isOfSharers(placed.mark.kind); });
    return {shares ? Index::Marks::shared : Index::Marks::anything, std::any_of(marks.begin(), marks.end(), isReaders)};
}

// What it may be between the two.
Standing eitherOf(const Standing& one, const Standing& other) {
    Standing either = one == Standing{} ? other : one;
    if (one.marks != other.marks)
        either.marks = one.marks == Index::Marks::none     ? other.marks
                       : other.marks == Index::Marks::none ? one.marks
                                                           : Index::Marks::anything;
    either.reads = one.reads || other.reads;
    return either;
}

// Whose marks are asked for, besides those of whoever may have any.
struct Interest {
    bool readers = false;                // of those who have only a reader's
    bool sharers = false;                // of those who share and have no owner, ...
    std::optional<std::uint32_t> domain; // ... if they are of this domain
};

// All others, as far as somebody asks for them. Behind the gate.
class Others {
public:
    Others(int directory, const Incarnation& self, const std::string& name)
        : directory_(directory), self_(self), name_(name), index_(FileIndex::openIfExists(directory, name)) {}

    // Until `visit` gives false; true when it never did.
    template <typename Visit>
    bool visit(const Interest& interest, Visit visit) {
        if (!index_ || (interest.readers && index_->get().readers))
            return visitAll(visit);
        // A line that is there may change meanwhile, and none is added.
        for (const Index::Line line : index_->get().lines) {
            bool concerned =
                line.marks == Index::Marks::anything || (line.marks == Index::Marks::shared && interest.sharers &&
                                                         interest.domain.value_or(line.who.domain) == line.who.domain);
            if (!concerned || line.who == self_)
                continue;
            auto marks = readOther(directory_, encodeMarkFileName(line.who), line.who, name_);
            if (!marks)
                index_->set(line.who, Index::Marks::none);
            else if (!visit(*marks))
                return false;
        }
        return true;
    }

    template <typename Visit>
    bool visitAll(Visit visit);

    // Whoever looks into all files sweeps the dead. With an index nobody has to: so one in so many does.
    bool isSweepDue() const { return index_ && self_.id % std::max(kFewest, index_->get().living / 2) == 0; }

    // Says how we stand: before we have marks up, and after we have dropped them.
    void tell(const Standing& own) {
        bool worthIt = index_ || found_.living > kFew;
        if (complete_ && worthIt) {
            Index index = found_;
            index.readers = index.readers || own.reads;
            if (own.marks != Index::Marks::none)
                index.lines.push_back({self_, own.marks});
            FileIndex::make(directory_, index, name_);
        } else if (index_) {
            index_->set(self_, own.marks);
            if (own.reads)
                index_->setReaders();
        }
    }

private:
    // So few are read quickly.
    static constexpr std::uint32_t kFew = 4, kFewest = 64;

    int directory_;
    const Incarnation& self_;
    const std::string& name_;
    std::optional<FileIndex> index_;
    Index found_;           // in all files
    bool complete_ = false; // they were all read
};

template <typename Visit>
bool Others::visitAll(Visit visit) {
    os::Listing list = os::listAt(directory_);
    if (!list)
        throw SystemError(errno, "read the lease of", name_);
    found_ = {};
    std::size_t files = 0;
    while (dirent* entry = (errno = 0, readdir(list.get()))) {
        auto placer = parseMarkFileName(entry->d_name);
        if (!placer || *placer == self_ || *placer == kIndexIncarnation)
            continue;
        if (++files > kMaxFiles)
            throw Error(Fault::invalid, "the lease of '" + name_ + "' has more than " + std::to_string(kMaxFiles) +
                                            " files: see what is in its directory");
        auto marks = readOther(directory_, entry->d_name, *placer, name_);
        if (!marks)
            continue;
        Standing standing = standingOf(*marks);
        found_.living++;
        found_.readers = found_.readers || standing.reads;
        if (standing.marks != Index::Marks::none)
            found_.lines.push_back({*placer, standing.marks});
        if (!visit(*marks))
            return false;
    }
    if (errno != 0)
        throw SystemError(errno, "read the lease of", name_);
    complete_ = true;
    return true;
}

// What we have up, and how to change it. Behind the gate.
class OwnMarks {
public:
    OwnMarks(int directory, int file, const Incarnation& self, const std::string& name) : file_(file), name_(name) {
        // Others would not see it, and whoever comes next would think that nobody is here. Asked before it is read: it
        // came out of QEMU, and to read what is no such file might never end.
        if (!isMarkFileListed(directory, file, self, name))
            deleted(name);
        marks_ = decodeMarks(readText(file, name), self);
        // To write them anew would drop marks that others rely on.
        if (std::find(marks_.begin(), marks_.end(), Placed{}) != marks_.end())
            throw Error(Fault::invalid, "the lease of '" + name +
                                            "' is damaged in its lockspace; destroy this guest and start it again");
    }

    void put(const Mark& mark, LockType type) {
        erase([&](const Placed& placed) { return placed.mark == mark; });
        marks_.push_back({mark, type});
    }

    template <typename Which>
    void erase(Which which) {
        std::erase_if(marks_, which);
    }

    Standing standing() const { return standingOf(marks_); }

    bool hasOwner() const {
        return std::any_of(marks_.begin(), marks_.end(),
                           [](const Placed& placed) { return placed.mark.kind == MarkKind::owner; });
    }

    void write() const { writeText(file_, encodeMarks(marks_), name_); }

private:
    int file_;
    const std::string& name_;
    std::vector<Placed> marks_;
};

} // namespace

os::Fd openMarkFile(int directory, const Incarnation& self, const std::string& about, const std::string& name) {
    Gate gate(directory, name, true);
    storage::inscribe(gate.fd(), about, os::pathOf(gate.fd(), name));
    os::Fd file;
    // O_DSYNC: a file system that writes behind would leave the text on this host when the gate is open again (FUSE
    // with writeback_cache, NFS).
    int flags = O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_DSYNC;
    if (int error = os::tryOpenAt(directory, encodeMarkFileName(self), flags, 0600, file))
        throw SystemError(error, "make a file for the lease of", name);
    // One is there already when the image was detached from this QEMU a moment ago, and nobody has looked since.
    // A process that libvirtd has just forked keeps it for an instant.
    auto deadline = std::chrono::steady_clock::now() + kForkWait;
    while (os::tryFlock(file.get(), LockType::write, name) == LockOutcome::contended) {
        if (std::chrono::steady_clock::now() < deadline) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            continue;
        }
        throw Error(Fault::invalid, "the guest has '" + name + "' twice, under two names; detach one of them");
    }
    writeText(file.get(), encodeMarks({}), name);
    return file;
}

bool isMarkFileListed(int directory, int markFile, const Incarnation& self, const std::string& name) {
    struct stat ours, listed;
    if (fstat(markFile, &ours) < 0)
        throw SystemError(errno, "stat the marks of", name);
    if (fstatat(directory, encodeMarkFileName(self).c_str(), &listed, AT_SYMLINK_NOFOLLOW) == 0)
        return os::fileIdOf(listed) == os::fileIdOf(ours);
    if (errno == ENOENT || errno == ESTALE)
        return false;
    throw SystemError(errno, "stat the marks of", name);
}

FileSetMedium::FileSetMedium(int markFile, int directory, int image, const Incarnation& self, const std::string& name)
    : markFile_(markFile), directory_(directory), image_(image), self_(self), name_(name) {}

namespace {

// Whose marks may be in the way of this one. Nobody's, if it says which incarnation it is of.
std::optional<Interest> rivalsOf(const Mark& mark, LockType type, const Incarnation& self) {
    if (mark.kind == MarkKind::owner)
        return Interest{.readers = type == LockType::write, .sharers = false, .domain = std::nullopt};
    bool named = presentMode(mark) || mark.kind == MarkKind::leaving;
    if (named && Incarnation{mark.domain, mark.id} == self)
        return std::nullopt;
    return Interest{.readers = mark.kind == MarkKind::presentReadOnly, .sharers = true, .domain = mark.domain};
}

} // namespace

LockOutcome FileSetMedium::tryPlace(const Mark& mark, LockType type) {
    Gate gate(directory_, name_);
    OwnMarks own(directory_, markFile_, self_, name_);
    const Standing before = own.standing();
    std::optional<Others> others;
    if (auto rivals = rivalsOf(mark, type, self_)) {
        others.emplace(directory_, self_, name_);
        auto allowed = [&](const Marks& theirs) {
            return std::all_of(theirs.begin(), theirs.end(),
                               [&](const Placed& placed) { return allowedTogether(placed, mark, type); });
        };
        bool all = mark.kind == MarkKind::owner && others->isSweepDue();
        if (!(all ? others->visitAll(allowed) : others->visit(*rivals, allowed)))
            return LockOutcome::contended;
    }
    bool withImage = mark.kind == MarkKind::owner && image_ >= 0;
    imageLocked_ = withImage && os::tryFlock(image_, type, name_) == LockOutcome::contended;
    if (imageLocked_) {
        // An upgrade that was refused has dropped the lock for reading. The gate has kept all guests out meanwhile.
        if (own.hasOwner())
            (void)os::tryFlock(image_, LockType::read, name_);
        return LockOutcome::contended;
    }
    // Nobody would know whose it is without the text.
    struct GiveBack {
        int image;
        ~GiveBack() { image >= 0 ? (void)flock(image, LOCK_UN) : void(); }
    } giveBack{withImage && !own.hasOwner() ? image_ : -1};
    own.put(mark, type);
    const Standing meanwhile = eitherOf(before, own.standing());
    if (others || meanwhile != before)
        (others ? *others : others.emplace(directory_, self_, name_)).tell(meanwhile);
    own.write();
    giveBack.image = -1;
    if (own.standing() != meanwhile)
        Others(directory_, self_, name_).tell(own.standing());
    return LockOutcome::granted;
}

// Which of one's own marks are to go is up to `which`.
template <typename Which>
void FileSetMedium::drop(Which which) {
    OwnMarks own(directory_, markFile_, self_, name_);
    const Standing before = own.standing();
    own.erase(which);
    own.write();
    if (own.standing() != before)
        Others(directory_, self_, name_).tell(own.standing());
}

void FileSetMedium::remove(const Mark& mark) {
    Gate gate(directory_, name_);
    drop([&](const Placed& placed) { return placed.mark == mark; });
    if (mark.kind == MarkKind::owner && image_ >= 0)
        os::unflock(image_, name_);
}

void FileSetMedium::removeHandoff() {
    Gate gate(directory_, name_);
    drop([](const Placed& placed) {
        return placed.mark.kind == MarkKind::handoff || placed.mark.kind == MarkKind::leaving;
    });
}

void FileSetMedium::removeAll() {
    Gate gate(directory_, name_);
    drop([](const Placed&) { return true; });
    if (image_ >= 0)
        os::unflock(image_, name_);
}

bool FileSetMedium::any(MarkKind first, MarkKind last) const {
    if (imageLocked_)
        return true;
    auto among = [&](MarkKind kind) { return (kind >= first && kind <= last) || kind == MarkKind::foreign; };
    constexpr std::array kSharers{MarkKind::sharedOwner, MarkKind::presentShared, MarkKind::handoff, MarkKind::leaving,
                                  MarkKind::taken};
    Gate gate(directory_, name_);
    return !Others(directory_, self_, name_)
                .visit({.readers = among(MarkKind::owner) || among(MarkKind::presentReadOnly),
                        .sharers = std::any_of(kSharers.begin(), kSharers.end(), among),
                        .domain = std::nullopt},
                       [&](const Marks& theirs) {
                           return std::none_of(theirs.begin(), theirs.end(),
                                               [&](const Placed& placed) { return among(placed.mark.kind); });
                       });
}

// Behind one gate.
Rivals FileSetMedium::findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const {
    Rivals rivals;
    for (const Mark& mark : lookAt(domain, mode)) {
        if (mark.domain != domain)
            continue;
        const bool ofToken = quoted == mark.id;
        rivals.present = rivals.present || mark.kind == presentMark(mode, {}).kind;
        rivals.handoff = rivals.handoff || mark.kind == MarkKind::handoff;
        rivals.quoted = rivals.quoted || (mark.kind == MarkKind::handoff && ofToken);
        rivals.taken = rivals.taken || (mark.kind == MarkKind::taken && ofToken);
    }
    return rivals;
}

std::vector<Mark> FileSetMedium::lookAt(std::uint32_t domain, Mode mode) const {
    const MarkKind present = presentMark(mode, {}).kind;
    std::vector<Mark> marks;
    Gate gate(directory_, name_);
    Others(directory_, self_, name_)
        .visit({.readers = mode == Mode::readOnly, .sharers = true, .domain = domain}, [&](const Marks& theirs) {
            for (const auto& [mark, type] : theirs) {
                bool counts = mark.kind == MarkKind::sharedOwner || mark.kind == present ||
                              mark.kind == MarkKind::handoff || mark.kind == MarkKind::taken;
                if (mark.kind == MarkKind::owner || mark.kind == MarkKind::foreign || (mark.domain == domain && counts))
                    marks.push_back(mark);
            }
            return true;
        });
    if (imageLocked_)
        marks.push_back({});
    return marks;
}

// Behind one gate: of one instant.
std::vector<Mark> FileSetMedium::lookToJoin(std::uint32_t domain, Mode mode) const {
    return mode == Mode::exclusive ? look() : lookAt(domain, mode);
}

std::vector<Mark> FileSetMedium::look() const {
    Gate gate(directory_, name_);
    std::vector<Mark> marks;
    Others(directory_, self_, name_).visitAll([&](const Marks& theirs) {
        for (const Placed& placed : theirs)
            marks.push_back(placed.mark);
        return true;
    });
    if (imageLocked_)
        marks.push_back({});
    return marks;
}

Note FileSetMedium::note() const {
    return readNote(markFile_, name_);
}

void FileSetMedium::setNote(const Note& note) {
    writeNote(markFile_, note, name_);
}

namespace {

// A word for each kind: with "=" the token follows, as 8 hexadecimal digits.
struct Word {
    std::string_view word;
    MarkKind kind;
    LockType type = LockType::write;
};

constexpr Word kWords[] = {
    {"owner", MarkKind::owner},
    {"owner-reading", MarkKind::owner, LockType::read},
    {"shared-owner", MarkKind::sharedOwner},
    {"present-exclusive", MarkKind::presentExclusive},
    {"present-shared", MarkKind::presentShared},
    {"present-read-only", MarkKind::presentReadOnly},
    {"leaving", MarkKind::leaving},
    {"handoff=", MarkKind::handoff},
    {"taken=", MarkKind::taken},
};

std::optional<std::uint32_t> parseHexadecimal(std::string_view digits) {
    std::uint32_t number = 0;
    auto [rest, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number, 16);
    bool whole = error == std::errc() && rest == digits.data() + digits.size();
    return whole && digits.size() == 8 ? std::optional(number) : std::nullopt;
}

// The mark that a word means, when this incarnation says it.
std::optional<Placed> parseWord(std::string_view text, const Incarnation& placer) {
    for (const Word& word : kWords) {
        bool withToken = word.word.ends_with('=');
        if (withToken ? !text.starts_with(word.word) : text != word.word)
            continue;
        std::uint32_t id = placer.id;
        if (withToken) {
            auto token = parseHexadecimal(text.substr(word.word.size()));
            if (!token)
                return std::nullopt;
            id = *token;
        }
        if (word.kind == MarkKind::owner)
            return Placed{{MarkKind::owner, 0, 0}, word.type};
        if (word.kind == MarkKind::sharedOwner)
            id = 0;
        return Placed{{word.kind, placer.domain, id}, word.type};
    }
    return std::nullopt;
}

} // namespace

std::string encodeMarks(const std::vector<Placed>& marks) {
    std::string text(kMagic);
    for (const Placed& placed : marks) {
        auto word = std::find_if(std::begin(kWords), std::end(kWords), [&](const Word& candidate) {
            bool typed = candidate.kind != MarkKind::owner || candidate.type == placed.type;
            return candidate.kind == placed.mark.kind && typed;
        });
        if (word == std::end(kWords))
            continue; // nobody places a foreign mark
        text += ' ';
        text += word->word;
        if (word->word.ends_with('='))
            text += os::hexadecimal(placed.mark.id);
    }
    if (text.size() >= kTextSize)
        throw Error(Fault::invalid, "a lease carries too many marks; destroy the guest and start it again");
    text.resize(kTextSize - 1, ' ');
    return text + '\n';
}

std::vector<Placed> decodeMarks(std::string_view text, const Incarnation& placer) {
    std::vector<Placed> foreign{Placed{}};
    if (text.size() != kTextSize || !text.starts_with(kMagic) || text.back() != '\n')
        return foreign;
    text.remove_prefix(kMagic.size());
    text.remove_suffix(1);
    std::vector<Placed> marks;
    while (text.find_first_not_of(' ') != text.npos) {
        text.remove_prefix(text.find_first_not_of(' '));
        std::string_view word = text.substr(0, text.find(' '));
        text.remove_prefix(word.size());
        auto placed = parseWord(word, placer);
        if (!placed)
            return foreign;
        marks.push_back(*placed);
    }
    return marks;
}

std::string encodeMarkFileName(const Incarnation& who) {
    return os::hexadecimal(who.domain) + '-' + os::hexadecimal(who.id);
}

std::optional<Incarnation> parseMarkFileName(std::string_view name) {
    auto domain = parseHexadecimal(name.substr(0, 8));
    auto id = name.size() == 17 && name[8] == '-' ? parseHexadecimal(name.substr(9)) : std::nullopt;
    if (!domain || !id)
        return std::nullopt;
    return Incarnation{*domain, *id};
}

} // namespace leasehold::lease

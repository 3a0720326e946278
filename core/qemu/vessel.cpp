// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/qemu/vessel.hpp"

#include "core/os/error.hpp"
#include "core/os/open_files.hpp"
#include "core/os/socket_pairs.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>

#include <fcntl.h>
#include <linux/sockios.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace leasehold::qemu {

namespace {

constexpr char kMagic[8] = {'l', 'e', 'a', 's', 'e', 'h', 'l', 'd'};
constexpr std::uint32_t kVersion = 1;

// Below SCM_MAX_FD (253, include/net/scm.h), and the paths that go with them fit into one message.
constexpr std::size_t kMaxDescriptorsPerMessage = 240;
constexpr std::size_t kMaxMessage = 64 * 1024;
constexpr std::size_t kMaxMessages = 64;
constexpr std::size_t kMaxLeases = 2048;
constexpr std::size_t kMaxPath = 4096;
constexpr std::size_t kMaxName = 1024;
constexpr std::uint8_t kMaxMode = 2;
constexpr std::uint8_t kMaxStage = 3;
// Two generations of the largest guests at once. The default of some 200 KiB takes 7 messages.
constexpr int kSendBuffer = 8 * 1024 * 1024;

// Where the pair sits in QEMU if nothing is there yet: high enough to be out of the way of libvirt's and QEMU's own
// descriptors, below any RLIMIT_NOFILE. Only a shortcut: elsewhere it is searched for.
constexpr int kFirstNumber = 250;

// Wire format, in host byte order: both ends are on one machine. A later version may append fields to both structures,
// in which 0 has to mean what was before them: a reader uses what it knows and skips the rest by the sizes, and takes
// what an earlier version did not store for 0. So guests go on through upgrades and downgrades
// (tests/e2e/test_upgrade.py with a plugin whose structures are longer). What that does not allow for is a new
// kVersion.
struct Header {
    char magic[8];
    std::uint32_t version;
    std::uint16_t headerSize;
    std::uint16_t entrySize;
    unsigned char uuid[16];
    std::uint32_t incarnation;
    std::uint32_t nameLength;
    std::uint64_t generation;
    std::uint32_t part;   // of this message, from 0
    std::uint32_t parts;  // of this generation
    std::uint32_t leases; // in this message
    std::uint32_t totalLeases;
    std::int32_t numbers[2]; // of the pair's ends in QEMU: sending, receiving
    std::uint64_t socketInodes[2];
    std::uint64_t caller; // appended after the first version
};
static_assert(sizeof(Header) == 96);
constexpr std::size_t kFirstHeader = 88; // the size in the first version, and so the least

// Followed by the path, and then by the FileId of each of its descriptors. Further paths are appended to the first one,
// each after a NUL, as far as there is room for all of them. A companion follows its lease.
struct Entry {
    os::FileId file;
    std::uint8_t mode;
    std::uint8_t flags;
    std::uint8_t descriptors; // which: kHasImage, kHasDirectory; `lease` always
    std::uint8_t stage;       // 0 in the first version
    std::uint32_t pathLength;
};
static_assert(sizeof(Entry) == 24 && sizeof(os::FileId) == 16);
constexpr std::size_t kFirstEntry = 24;

constexpr std::uint8_t kWritable = 1 << 0;
constexpr std::uint8_t kJoined = 1 << 1;
constexpr std::uint8_t kRemote = 1 << 2;
constexpr std::uint8_t kGuarded = 1 << 3;
constexpr std::uint8_t kFlocksImage = 1 << 4;
constexpr std::uint8_t kNamed = 1 << 5;
constexpr std::uint8_t kCompanion = 1 << 6;
constexpr std::uint8_t kLower = 1 << 7;

constexpr std::uint8_t kHasImage = 1 << 0;
constexpr std::uint8_t kHasDirectory = 1 << 1;

[[noreturn]] void hostile(const std::string& problem) {
    throw Error(Fault::invalid, "the leases kept in its QEMU are damaged (" + problem +
                                    "): destroy and start the guest to protect its images again");
}

[[noreturn]] void beBusy() {
    throw Error(Fault::system, "the leases in its QEMU are read or changed by somebody else all the time, its QEMU "
                               "perhaps: try again, and destroy the guest if that does not end");
}

std::uint64_t inodeOf(const os::Fd& socket) {
    return os::identify(socket.get(), "the vessel").inode;
}

// What travels of a lease or a companion.
struct Part {
    std::uint8_t descriptors = 0; // which it has
    bool companion = false;
};

// Everything that a message says, before anything is done with it.
struct Message {
    Header header{};
    GuestTag tag;
    std::vector<StoredLease> leases; // each companion by itself, behind its lease
    std::vector<Part> parts;         // of each of them
    std::size_t descriptors = 0;     // of all of them
};

// The descriptors of a lease in the order in which they travel.
template <typename Lease, typename Visit>
void visitDescriptors(Lease& lease, std::uint8_t which, Visit visit) {
    visit(lease.lease);
    if (which & kHasImage)
        visit(lease.image);
    if (which & kHasDirectory)
        visit(lease.directory);
}

std::uint8_t descriptorsOf(const StoredLease& lease) {
    return (lease.image.open() ? kHasImage : 0) | (lease.directory.open() ? kHasDirectory : 0);
}

// The same without its contents: what is about to travel.
struct PartView {
    const StoredLease* lease;
    bool companion;
};

std::vector<PartView> flatten(std::span<const StoredLease> leases) {
    std::vector<PartView> parts;
    for (const StoredLease& lease : leases)
        visitParts(lease, [&](const StoredLease& part) { parts.push_back({&part, &part != &lease}); });
    return parts;
}

std::string namesOf(const StoredLease& lease) {
    std::string names = lease.path.substr(0, kMaxPath);
    for (const std::string& alias : lease.aliases)
        if (names.size() + 1 + alias.size() <= kMaxPath)
            names += '\0' + alias;
    return names;
}

// As the lease says, which is compared with the descriptors whenever they are to decide something. Which file of a set
// has its marks it does not say.
os::FileId fileBehind(const StoredLease& lease, const os::Fd& fd) {
    if (&fd == &lease.image)
        return lease.file;
    return &fd == &lease.lease && lease.directory.open() ? os::identify(fd.get(), lease.path) : lease.leaseFile;
}

std::string encodeMessage(Header header, const GuestTag& tag, std::span<const PartView> parts) {
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.version = kVersion;
    header.headerSize = sizeof(Header);
    header.entrySize = sizeof(Entry);
    std::copy(tag.uuid.begin(), tag.uuid.end(), header.uuid);
    header.incarnation = tag.incarnation;
    header.nameLength = static_cast<std::uint32_t>(std::min(tag.name.size(), kMaxName));
    header.leases = static_cast<std::uint32_t>(parts.size());
    std::string text(reinterpret_cast<const char*>(&header), sizeof header);
    text.append(tag.name, 0, header.nameLength);
    for (const PartView& part : parts) {
        const StoredLease& lease = *part.lease;
        std::string names = namesOf(lease);
        std::uint8_t flags = (lease.writable ? kWritable : 0) | (lease.joined ? kJoined : 0) |
                             (lease.remote ? kRemote : 0) | (lease.guarded ? kGuarded : 0) |
                             (lease.flocksImage ? kFlocksImage : 0) | (lease.named ? kNamed : 0) |
                             (part.companion ? kCompanion : 0) | (lease.lower ? kLower : 0);
        std::uint8_t which = descriptorsOf(lease);
        Entry entry{};
        entry.file = lease.file;
        entry.mode = static_cast<std::uint8_t>(lease.mode);
        entry.flags = flags;
        entry.descriptors = which;
        entry.stage = static_cast<std::uint8_t>(lease.stage);
        entry.pathLength = static_cast<std::uint32_t>(names.size());
        text.append(reinterpret_cast<const char*>(&entry), sizeof entry);
        text += names;
        visitDescriptors(lease, which, [&](const os::Fd& fd) {
            os::FileId file = fileBehind(lease, fd);
            text.append(reinterpret_cast<const char*>(&file), sizeof file);
        });
    }
    return text;
}

// Takes the message apart, believing nothing.
class Parser {
public:
    explicit Parser(std::string_view text) : text_(text) {}

    Message parse() {
        Message message;
        message.header = head();
        const Header& header = message.header;
        message.tag.name = take(header.nameLength, kMaxName);
        std::copy(std::begin(header.uuid), std::end(header.uuid), message.tag.uuid.begin());
        message.tag.incarnation = header.incarnation;
        message.leases.reserve(header.leases);
        message.parts.reserve(header.leases);
        for (std::uint32_t i = 0; i < header.leases; i++) {
            Entry entry{};
            copyStored(entry, header.entrySize);
            StoredLease& lease = message.leases.emplace_back();
            lease.file = entry.file;
            if (entry.mode > kMaxMode)
                hostile("an unknown mode");
            if (entry.descriptors & ~(kHasImage | kHasDirectory))
                hostile("unknown descriptors");
            lease.mode = static_cast<Mode>(entry.mode);
            // Of a later version: not settled is always true of it.
            lease.stage = entry.stage > kMaxStage ? Stage::changing : static_cast<Stage>(entry.stage);
            lease.writable = entry.flags & kWritable;
            lease.joined = entry.flags & kJoined;
            lease.remote = entry.flags & kRemote;
            lease.guarded = entry.flags & kGuarded;
            lease.flocksImage = entry.flags & kFlocksImage;
            lease.named = entry.flags & kNamed;
            lease.lower = entry.flags & kLower;
            const std::string_view names = take(entry.pathLength, kMaxPath);
            lease.path = std::string(names.substr(0, names.find('\0')));
            for (std::size_t end = lease.path.size(); end < names.size();) {
                std::size_t begin = end + 1;
                end = std::min(names.find('\0', begin), names.size());
                lease.aliases.emplace_back(names.substr(begin, end - begin));
            }
            std::array<os::FileId, 3> files;
            std::size_t count = 0;
            visitDescriptors(lease, entry.descriptors, [&](const os::Fd&) { copy(&files[count++], sizeof files[0]); });
            // What libvirt names: the image, where the lease is elsewhere; the directory of a named lease; the only
            // one. The marks are in the last one that is no image.
            const bool image = entry.descriptors & kHasImage, directory = entry.descriptors & kHasDirectory;
            if (files[image || directory ? 1 : 0] != lease.file)
                hostile("a lease belongs to another image");
            lease.leaseFile = files[directory ? count - 1 : 0];
            message.descriptors += count;
            message.parts.push_back({entry.descriptors, (entry.flags & kCompanion) != 0});
        }
        if (!text_.empty())
            hostile("a message is too long");
        return message;
    }

private:
    Header head() {
        if (text_.size() < kFirstHeader)
            hostile("a message is too short");
        Header header{};
        std::memcpy(&header, text_.data(), kFirstHeader);
        if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0)
            hostile("not leasehold's");
        if (header.version != kVersion)
            throw Error(Fault::unsupported, "the guest's leases were stored by another version of leasehold (format " +
                                                std::to_string(header.version) + ", this one knows " +
                                                std::to_string(kVersion) +
                                                "): install that version, or destroy and start the guest");
        if (header.headerSize < kFirstHeader || header.entrySize < kFirstEntry)
            hostile("a message is too short");
        copyStored(header, header.headerSize);
        if (header.leases > kMaxDescriptorsPerMessage || header.totalLeases > kMaxLeases || header.parts == 0 ||
            header.parts > kMaxMessages || header.part >= header.parts)
            hostile("impossible counts");
        // Another one has to come after it.
        if (header.generation == 0 || header.generation == std::numeric_limits<std::uint64_t>::max())
            hostile("an impossible generation");
        return header;
    }

    void copy(void* to, std::size_t size) {
        if (text_.size() < size)
            hostile("a message is too short");
        std::memcpy(to, text_.data(), size);
        text_.remove_prefix(size);
    }

    // A structure of which another version has stored so many bytes.
    template <typename Structure>
    void copyStored(Structure& structure, std::size_t stored) {
        std::size_t known = std::min(stored, sizeof structure);
        copy(&structure, known);
        skip(stored - known);
    }

    void skip(std::size_t size) {
        if (text_.size() < size)
            hostile("a message is too short");
        text_.remove_prefix(size);
    }

    std::string_view take(std::size_t size, std::size_t limit) {
        if (size > limit || size > text_.size())
            hostile("a name is too long");
        const std::string_view taken = text_.substr(0, size);
        text_.remove_prefix(size);
        return taken;
    }

    std::string_view text_;
};

void sendMessage(int socket, const std::string& text, std::span<const PartView> parts) {
    iovec data{const_cast<char*>(text.data()), text.size()};
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptorsPerMessage * sizeof(int))];
    std::vector<int> numbers;
    for (const PartView& part : parts)
        visitDescriptors(*part.lease, descriptorsOf(*part.lease),
                         [&](const os::Fd& fd) { numbers.push_back(fd.get()); });
    if (!numbers.empty()) {
        std::size_t size = numbers.size() * sizeof(int);
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(size);
        cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(size);
        std::memcpy(CMSG_DATA(rights), numbers.data(), size);
    }
    while (sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        if (errno == ETOOMANYREFS) // unix(7)
            throw Error(Fault::system, "the leases cannot be stored in its QEMU: as many descriptors as this user may "
                                       "have open are on their way between processes already, those in other vessels "
                                       "included; raise the limit of open files (ulimit -n, LimitNOFILE=)");
        if (errno != EINTR)
            throw SystemError(errno, "store the leases in", "its QEMU");
    }
}

// How many of them fit into one message.
std::size_t fitting(std::span<const PartView> parts) {
    std::size_t size = sizeof(Header) + kMaxName, descriptors = 0, count = 0;
    for (const PartView& part : parts) {
        size += sizeof(Entry) + namesOf(*part.lease).size();
        visitDescriptors(*part.lease, descriptorsOf(*part.lease), [&](const os::Fd&) {
            size += sizeof(os::FileId);
            descriptors++;
        });
        if (size > kMaxMessage || descriptors > kMaxDescriptorsPerMessage)
            break;
        count++;
    }
    return count;
}

// Appends a complete generation. `header` has the numbers and inodes of the pair; `sent` counts the
// messages, also when not all of them could be sent.
void sendGeneration(int socket, Header header, const GuestTag& tag, std::span<const StoredLease> leases,
                    std::size_t& sent) {
    std::vector<PartView> all = flatten(leases);
    std::vector<std::span<const PartView>> messages;
    for (std::span<const PartView> rest = all; messages.empty() || !rest.empty();
         rest = rest.subspan(messages.back().size()))
        messages.push_back(rest.first(fitting(rest)));
    if (messages.size() > kMaxMessages || all.size() > kMaxLeases)
        throw Error(Fault::unsupported, "a guest with " + std::to_string(all.size()) +
                                            " leases: leasehold stores at most " + std::to_string(kMaxLeases));
    header.parts = static_cast<std::uint32_t>(messages.size());
    header.totalLeases = static_cast<std::uint32_t>(all.size());
    for (header.part = 0; header.part < header.parts; header.part++) {
        sendMessage(socket, encodeMessage(header, tag, messages[header.part]), messages[header.part]);
        sent++;
    }
}

std::vector<os::Fd> collectDescriptors(msghdr& header) {
    std::vector<os::Fd> fds;
    for (cmsghdr* item = CMSG_FIRSTHDR(&header); item; item = CMSG_NXTHDR(&header, item)) {
        // A hostile QEMU can ask the socket to add a pidfd to every message (SO_PASSPIDFD): closed below with the rest.
        constexpr int kPidfd = 4; // SCM_PIDFD, Linux 6.5
        if (item->cmsg_level != SOL_SOCKET || (item->cmsg_type != SCM_RIGHTS && item->cmsg_type != kPidfd))
            continue;
        std::size_t count = (item->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        fds.reserve(fds.size() + count);
        for (std::size_t i = 0; i < count; i++) {
            int number;
            std::memcpy(&number, CMSG_DATA(item) + i * sizeof number, sizeof number);
            fds.emplace_back(number);
        }
    }
    return fds;
}

// One message of the queue as it came, without taking it out.
struct RawMessage {
    std::string_view text; // empty at the end of the queue
    std::vector<os::Fd> fds;
    int flags = 0;
    bool withDescriptors = false; // or the words alone
};

// Without room for them the kernel keeps the descriptors to itself.
RawMessage peekRaw(int socket, std::span<char> buffer, bool withDescriptors) {
    iovec data{buffer.data(), buffer.size()};
    // Room for all that a sender may send (SCM_MAX_FD), so that what is cut off is cut by our own descriptor limit.
    alignas(cmsghdr) char control[CMSG_SPACE(256 * sizeof(int))];
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = withDescriptors ? control : nullptr;
    header.msg_controllen = withDescriptors ? sizeof control : 0;
    ssize_t length;
    while ((length = recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
        if (errno == EAGAIN)
            return {};
        if (errno != EINTR)
            throw SystemError(errno, "read the leases in", "its QEMU");
    }
    // Length 0: QEMU has closed the other end, or sent nothing. Both make what follows useless.
    return {{buffer.data(), static_cast<std::size_t>(length)},
            collectDescriptors(header),
            header.msg_flags,
            withDescriptors};
}

// Puts the descriptors of a message into its leases.
void attach(Message& message, RawMessage raw) {
    // Fewer descriptors than were sent: our table is full (or a security module forbids one). Nothing is lost in
    // QEMU, but a lease that we cannot see is a lease that we cannot keep.
    if (raw.flags & MSG_CTRUNC)
        throw SystemError(EMFILE, "receive all leases from", "its QEMU");
    if (raw.fds.size() != message.descriptors)
        hostile("descriptors are missing");
    auto next = raw.fds.begin();
    for (std::size_t i = 0; i < message.leases.size(); i++)
        visitDescriptors(message.leases[i], message.parts[i].descriptors, [&](os::Fd& fd) { fd = std::move(*next++); });
}

Message parseMessage(RawMessage raw) {
    if (raw.flags & MSG_TRUNC)
        hostile("a message is too long");
    Message message = Parser(raw.text).parse();
    if (raw.withDescriptors)
        attach(message, std::move(raw));
    return message;
}

// Before anything is done with it: a descriptor of another file could make us take what is not this guest's for its.
void compareFiles(const StoredLease& lease) {
    auto compare = [&](const os::Fd& fd, const os::FileId* said) {
        mode_t type = 0;
        os::FileId file = os::identify(fd.get(), lease.path, &type);
        if (said && file != *said)
            hostile("a descriptor leads to another file");
        // Reading from anything else might never end.
        if (type != S_IFREG && type != S_IFDIR && (type != S_IFBLK || &fd != &lease.image))
            hostile("a descriptor is no file");
    };
    // A file of a set is compared with its name in each step (lease/file_set.cpp).
    compare(lease.lease, lease.directory.open() ? nullptr : &lease.leaseFile);
    if (lease.image.open())
        compare(lease.image, &lease.file);
    if (lease.directory.open())
        compare(lease.directory, &lease.leaseFile);
}

void compareAllFiles(const std::vector<StoredLease>& leases) {
    for (const StoredLease& lease : leases)
        visitParts(lease, [](const StoredLease& part) { compareFiles(part); });
}

// What travelled by itself in a complete generation, each lease with its companion.
std::vector<StoredLease> assemble(std::vector<StoredLease> all, std::span<const Part> parts) {
    auto isCompanion = [](const Part& part) { return part.companion; };
    if (std::none_of(parts.begin(), parts.end(), isCompanion))
        return all;
    std::vector<StoredLease> leases;
    leases.reserve(all.size());
    for (std::size_t i = 0; i < all.size(); i++)
        if (!parts[i].companion)
            leases.push_back(std::move(all[i]));
    for (std::size_t i = 0; i < all.size(); i++) {
        if (!parts[i].companion)
            continue;
        auto main = std::find_if(leases.begin(), leases.end(), [&](const StoredLease& lease) {
            return lease.file == all[i].file && !lease.companion;
        });
        if (main == leases.end())
            hostile("half of a lease is missing");
        main->companion = std::make_unique<StoredLease>(std::move(all[i]));
    }
    return leases;
}

bool isVesselOf(std::string_view text, const std::array<unsigned char, 16>& uuid) {
    return text.size() >= kFirstHeader && std::memcmp(text.data(), kMagic, sizeof kMagic) == 0 &&
           std::memcmp(text.data() + offsetof(Header, uuid), uuid.data(), uuid.size()) == 0;
}

// Several processes may look at one vessel (libvirtd, the leasehold command), but where a peek stands (SO_PEEK_OFF) is
// a property of the socket. A flock on QEMU's /proc/PID/fd serialises those who walk the queue: only who may read the
// vessel can open that folder. Nothing when the process is gone or somebody else keeps the lock.
class QueueLock {
public:
    explicit QueueLock(os::Fd directory) : directory_(std::move(directory)) {}
    QueueLock(QueueLock&&) = default;
    QueueLock& operator=(QueueLock&&) = delete;
    // Closing alone would leave it to a process that another thread of libvirtd has forked meanwhile.
    ~QueueLock() {
        if (directory_.open())
            (void)flock(directory_.get(), LOCK_UN);
    }

private:
    os::Fd directory_;
};

// Nobody may take what cannot be seen for a guest without leases.
[[noreturn]] void keptOut(const SystemError& error) {
    throw Error(Fault::system, std::string("its QEMU may not be looked into: ") + error.what() +
                                   "; see whether a security module or a container keeps libvirtd out of it");
}

std::optional<QueueLock> tryLockOut(const os::Process& process, std::chrono::steady_clock::time_point deadline) {
    std::string path = "/proc/" + std::to_string(process.pid()) + "/fd";
    os::Fd directory;
    int error = os::tryOpen(path, O_RDONLY | O_DIRECTORY, directory);
    if (error == ENOENT || error == ESRCH)
        return std::nullopt;
    if (error != 0)
        keptOut(SystemError(error, "open", path));
    while (flock(directory.get(), LOCK_EX | LOCK_NB) < 0)
        if (std::chrono::steady_clock::now() > deadline || process.diedWithin(std::chrono::milliseconds(5)))
            return std::nullopt;
    return QueueLock(std::move(directory));
}

QueueLock lockOut(const os::Process& process, std::chrono::steady_clock::time_point deadline) {
    auto locked = tryLockOut(process, deadline);
    if (!locked)
        throw Error(Fault::system,
                    "the leases in its QEMU cannot be read: the QEMU has ended, or another program keeps "
                    "its /proc/PID/fd locked (flock; see /proc/locks)");
    return std::move(*locked);
}

// All that waits in the queue (unix(7), SIOCINQ; for SOCK_SEQPACKET the sum of all messages).
int bytesIn(int socket) {
    int bytes = 0;
    if (ioctl(socket, SIOCINQ, &bytes) < 0)
        throw SystemError(errno, "read the leases in", "its QEMU");
    return bytes;
}

bool isSeqpacket(int fd) {
    int type = 0;
    socklen_t size = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET;
}

// Who called socketpair(2) for it (unix(7), SO_PEERCRED). Nobody if it is an end of no pair: who is connected to a
// socket with a name would be told who listens there.
std::optional<ucred> makerOf(int socket) {
    ucred maker{};
    socklen_t size = sizeof maker;
    sockaddr_un peer{};
    socklen_t length = sizeof peer;
    // The name of the other end tells the family, too.
    if (getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &length) < 0 || length != sizeof peer.sun_family ||
        peer.sun_family != AF_UNIX || getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &maker, &size) < 0)
        return std::nullopt;
    return maker;
}

// A local user, or QEMU's, may keep a pair in which the same words are.
bool isOurs(int socket) {
    auto maker = makerOf(socket);
    return maker && os::isTrustedMaker(maker->uid);
}

// A descriptor that may be an end of a vessel, by what could be told without touching it: closing a duplicate of
// anything else may take its time.
std::optional<os::Fd> takePair(const os::Process& process, int number, const std::optional<os::HeldSocket>& seen) {
    auto taken = seen && os::isTrustedMaker(seen->maker) ? process.takeDescriptor(number) : std::optional<os::Fd>();
    return taken && isOurs(taken->get()) ? std::move(taken) : std::nullopt;
}

// What the guest's own QEMU has there; nothing if it is no socket, or the process has ended: then /proc says EACCES,
// too (Linux fs/proc/base.c, proc_pid_readlink).
std::optional<os::HeldSocket> inspectOwn(const os::Process& process, int number) {
    os::HeldSocket socket;
    const int error = os::tryInspectSocket(process.pid(), number, socket);
    if (error == 0)
        return socket;
    if (error != ENOTSOCK && error != ENOENT && error != ESRCH && !process.diedWithin(std::chrono::milliseconds(0)))
        keptOut(SystemError(error, "look at", os::pathThrough(process, number)));
    return std::nullopt;
}

// The same where processes are searched: any of them may have put something else there meanwhile.
std::optional<os::Fd> takeSocket(const os::Process& process, int number, const std::optional<os::HeldSocket>& seen) {
    auto taken = takePair(process, number, seen);
    return taken && isSeqpacket(taken->get()) && inodeOf(*taken) == seen->inode ? std::move(taken) : std::nullopt;
}

// The beginning of a message that waits, and its header if it is one of a vessel.
struct Peeked {
    char text[512 + kMaxName]; // the header of a later version may be longer
    std::size_t length = 0;
    std::optional<Header> header;
};

// 0, or the error number of what tells nothing about the socket: no memory. Any other error is an answer, which QEMU
// may have brought about (ECONNRESET): no vessel.
int tryPeek(int socket, Peeked& peeked) noexcept {
    ssize_t length = TEMP_FAILURE_RETRY(recv(socket, peeked.text, sizeof peeked.text, MSG_PEEK | MSG_DONTWAIT));
    if (length < 0 && (errno == ENOMEM || errno == ENOBUFS))
        return errno;
    if (length < static_cast<ssize_t>(kFirstHeader) || std::memcmp(peeked.text, kMagic, sizeof kMagic) != 0)
        return 0;
    peeked.length = static_cast<std::size_t>(length);
    std::memcpy(&peeked.header.emplace(), peeked.text, kFirstHeader);
    return 0;
}

// Whose vessel it is, if the socket is the receiving end of one. Takes no descriptors.
std::optional<Message> peekHere(int socket) {
    Peeked peeked;
    if (int error = tryPeek(socket, peeked); error != 0)
        throw SystemError(error, "read the leases in", "its QEMU");
    if (!peeked.header)
        return std::nullopt;
    Message message;
    Header& header = message.header = *peeked.header;
    std::copy(std::begin(header.uuid), std::end(header.uuid), message.tag.uuid.begin());
    message.tag.incarnation = header.incarnation;
    std::size_t end = std::size_t{header.headerSize} + header.nameLength;
    if (header.nameLength <= kMaxName && end <= peeked.length)
        message.tag.name.assign(peeked.text + header.headerSize, header.nameLength);
    return message;
}

// The next peek starts at the first message: a reader that was killed has left its position behind. The caller has
// locked others out.
void peekFromTheFirst(int socket) noexcept {
    int off = -1;
    (void)setsockopt(socket, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
}

// 0 where that is not known: the next change of the vessel reads it anew. The caller has locked others out.
std::uint64_t firstGenerationIn(int socket) noexcept {
    Peeked head;
    peekFromTheFirst(socket);
    (void)tryPeek(socket, head);
    return head.header ? head.header->generation : 0;
}

// The same of the first message. The caller has locked others out.
std::optional<Message> peekHeader(int socket) {
    peekFromTheFirst(socket);
    return peekHere(socket);
}

// The receiving end of a vessel, if this descriptor of the process is one.
struct End {
    os::Fd out;
    Message first;
};

std::optional<End> tryEnd(const os::Process& process, int number) {
    auto out = takeSocket(process, number, inspectOwn(process, number));
    if (!out)
        return std::nullopt;
    auto message = peekHeader(out->get());
    if (!message || message->header.numbers[1] != number || inodeOf(*out) != message->header.socketInodes[1])
        return std::nullopt;
    return End{std::move(*out), std::move(*message)};
}

// Where the next peek starts, -1 at the first message (socket(7), SO_PEEK_OFF). Nothing if it has no position.
std::optional<int> peekPosition(int socket) {
    int position = 0;
    socklen_t size = sizeof position;
    return getsockopt(socket, SOL_SOCKET, SO_PEEK_OFF, &position, &size) < 0 ? std::nullopt : std::optional(position);
}

// All leases and companions of a generation, for who has to choose.
std::vector<const StoredLease*> wordsOf(std::span<const StoredLease> all) {
    std::vector<const StoredLease*> words;
    words.reserve(all.size());
    for (const StoredLease& lease : all)
        visitParts(lease, [&](const StoredLease& part) { words.push_back(&part); });
    return words;
}

std::optional<End> search(const os::Process& process, const std::array<unsigned char, 16>& uuid) {
    auto at = [&](int number) {
        auto end = tryEnd(process, number);
        return end && end->first.tag.uuid == uuid ? std::move(end) : std::nullopt;
    };
    // A large guest's is where it was put, in several messages.
    if (auto end = at(kFirstNumber + 1))
        return end;
    std::vector<int> numbers;
    if (int error = process.tryListDescriptors(numbers); error != 0 && error != ENOENT && error != ESRCH)
        keptOut(SystemError(error, "list the descriptors of process", std::to_string(process.pid())));
    for (int number : numbers)
        if (auto end = at(number))
            return end;
    return std::nullopt;
}

// An end of the pair, where it is looked for first, without O_CLOEXEC.
os::Fd inheritable(const os::Fd& end, int number) {
    for (int lowest : {number, 3}) { // RLIMIT_NOFILE may be lower than our favourite numbers: EINVAL
        os::Fd copy(fcntl(end.get(), F_DUPFD, lowest));
        if (copy.open())
            return copy;
        if (errno != EINVAL)
            break;
    }
    throw SystemError(errno, "duplicate a descriptor for", "QEMU");
}

} // namespace

bool StoredLease::isNamed(const std::string& name) const {
    return path == name || std::find(aliases.begin(), aliases.end(), name) != aliases.end();
}

void closeLater(StoredLease& lease, os::ClosedTogether& closed) {
    visitParts(lease, [&](StoredLease& part) {
        for (os::Fd* fd : {&part.lease, &part.image, &part.directory})
            closed.add(std::move(*fd));
    });
}

VesselEnds::VesselEnds() {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        throw SystemError(errno, "create", "a socket pair");
    os::Fd in(pair[0]), out(pair[1]);
    // The privileged variant is not bounded by net.core.wmem_max. Without either, large guests are refused.
    if (setsockopt(in.get(), SOL_SOCKET, SO_SNDBUFFORCE, &kSendBuffer, sizeof kSendBuffer) < 0)
        (void)setsockopt(in.get(), SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof kSendBuffer);
    in_ = inheritable(in, kFirstNumber);
    out_ = inheritable(out, kFirstNumber + 1);
}

void VesselEnds::plant(const GuestTag& tag, std::span<const StoredLease> leases) const {
    Header header{};
    header.generation = 1;
    header.numbers[0] = in_.get();
    header.numbers[1] = out_.get();
    header.socketInodes[0] = inodeOf(in_);
    header.socketInodes[1] = inodeOf(out_);
    std::size_t sent = 0;
    sendGeneration(in_.get(), header, tag, leases, sent);
}

void VesselEnds::leaveToQemu() {
    in_.release();
    out_.release();
}

std::unique_ptr<Vessel> Vessel::retrieve(const os::Process& process, const std::array<unsigned char, 16>& uuid,
                                         const Choice& choose, std::chrono::milliseconds limit) {
    std::unique_ptr<Vessel> vessel(new Vessel(process, limit));
    return vessel->tryRead(uuid, Contents::everything, choose) ? std::move(vessel) : nullptr;
}

std::optional<Manifest> Vessel::readManifest(const os::Process& process, const std::array<unsigned char, 16>& uuid,
                                             std::chrono::milliseconds limit) {
    Vessel vessel(process, limit);
    if (!vessel.tryRead(uuid, Contents::words, {}))
        return std::nullopt;
    return Manifest{std::move(vessel.tag_), std::move(vessel.leases_)};
}

bool Vessel::tryRead(const std::array<unsigned char, 16>& uuid, Contents contents, const Choice& choose) {
    if (tryReadAtOnce(uuid, contents, choose))
        return true;
    QueueLock locked = lockOut(*process_, deadline_);
    auto end = search(*process_, uuid);
    if (!end)
        return false;
    out_ = std::move(end->out);
    tag_ = std::move(end->first.tag);
    if (choose) {
        readAll(Contents::words);
        if (choose(wordsOf(leases_)) == Taking::none)
            throw RemoteLeases();
    }
    readAll(contents);
    return true;
}

// Nearly always there is one generation of one message, where it is looked for first, and two peeks tell all: the
// second one has the descriptors, if they are to be had. Nobody is locked out, or waited for. What is not asked:
// - whether somebody walks the queue (SO_PEEK_OFF): he notices that we have moved his position and begins anew, and
//   whatever we have got instead of the first message is not all that waits.
// - of which type the socket is, and whether it is still the one that was looked at: libvirt has said whose process it
//   is, and whoever has the vessel of that guest writes into it what he likes. That trusted hands made the pair is told
//   by the socket itself.
bool Vessel::tryReadAtOnce(const std::array<unsigned char, 16>& uuid, Contents contents, const Choice& choose) {
    constexpr int kNumber = kFirstNumber + 1;
    auto out = takePair(*process_, kNumber, inspectOwn(*process_, kNumber));
    if (!out)
        return false;
    char room[kMaxMessage];
    RawMessage raw = peekRaw(out->get(), room, contents == Contents::everything && !choose);
    if (!isVesselOf(raw.text, uuid))
        return false;
    const std::string_view text = raw.text;
    Message message = parseMessage(std::move(raw));
    const Header& header = message.header;
    if (header.parts != 1 || header.numbers[1] != kNumber)
        return false;
    if (header.leases != header.totalLeases)
        hostile("leases are missing");
    Taking taking = Taking::compared;
    if (choose) {
        taking = choose(wordsOf(message.leases));
        if (taking == Taking::none)
            throw RemoteLeases();
        // The words are known: as much of them as tells that these are still the same (who changes them counts up
        // the generation).
        char head[sizeof(Header)];
        RawMessage whole = peekRaw(out->get(), head, true);
        if (whole.text != text.substr(0, sizeof head))
            return false;
        attach(message, std::move(whole));
    }
    // All that waits in the queue, and not the older one of two generations.
    if (int waiting = 0; ioctl(out->get(), SIOCINQ, &waiting) < 0 || static_cast<std::size_t>(waiting) != text.size())
        return false;
    out_ = std::move(*out);
    tag_ = std::move(message.tag);
    numbers_ = {header.numbers[0], header.numbers[1]};
    socketInodes_ = {header.socketInodes[0], header.socketInodes[1]};
    generation_ = firstGeneration_ = header.generation;
    queued_ = 1;
    queuedBytes_ = static_cast<int>(text.size());
    caller_ = header.caller;
    leases_ = assemble(std::move(message.leases), message.parts);
    compared_ = contents == Contents::words; // there are none
    if (taking == Taking::compared)
        compareFiles();
    return true;
}

void Vessel::compareFiles() {
    if (!std::exchange(compared_, true))
        compareAllFiles(leases_);
}

// Walks the whole queue. The caller has locked others out.
void Vessel::readAll(Contents contents) {
    while (!tryWalk(contents))
        if (Clock::now() > deadline_)
            beBusy();
}

// False where somebody's peek has moved our position meanwhile: what was read may lack a message.
bool Vessel::tryWalk(Contents contents) {
    char room[kMaxMessage];
    int start = 0, off = -1, walked = 0;
    queued_ = 0;
    if (setsockopt(out_.get(), SOL_SOCKET, SO_PEEK_OFF, &start, sizeof start) < 0)
        throw SystemError(errno, "read the leases in", "its QEMU");
    queuedBytes_ = bytesIn(out_.get());
    std::vector<StoredLease> candidate;
    std::vector<Part> parts;
    std::uint32_t nextPart = 0;
    std::uint64_t current = 0;
    std::size_t begun = 0, complete = 0;
    for (RawMessage raw; raw = peekRaw(out_.get(), room, contents != Contents::words), true;) {
        walked += static_cast<int>(raw.text.size());
        if (peekPosition(out_.get()) != walked)
            return false;
        if (raw.text.empty())
            break;
        if (Clock::now() > deadline_)
            beBusy();
        Message message = parseMessage(std::move(raw));
        const Header& header = message.header;
        if (++queued_ > 2 * kMaxMessages)
            hostile("too many messages");
        if (message.tag != tag_)
            hostile("two guests in one vessel");
        if (queued_ == 1)
            firstGeneration_ = header.generation;
        // A change was interrupted while it took out the old generation: its first parts are gone.
        if (current == 0 && header.part != 0) {
            begun++;
            continue;
        }
        if (header.part == 0) {
            if (header.generation <= current)
                hostile("generations out of order");
            current = header.generation;
            candidate.clear();
            parts.clear();
            nextPart = 0;
            begun++;
        }
        if (header.generation != current || header.part != nextPart++ ||
            candidate.size() + message.leases.size() > header.totalLeases)
            hostile("parts out of order");
        std::move(message.leases.begin(), message.leases.end(), std::back_inserter(candidate));
        parts.insert(parts.end(), message.parts.begin(), message.parts.end());
        if (nextPart < header.parts)
            continue;
        if (candidate.size() != header.totalLeases)
            hostile("leases are missing");
        leases_ = assemble(std::move(candidate), parts);
        if (contents == Contents::everything)
            compareAllFiles(leases_);
        candidate.clear();
        caller_ = header.caller;
        numbers_ = {header.numbers[0], header.numbers[1]};
        socketInodes_ = {header.socketInodes[0], header.socketInodes[1]};
        complete++;
        stale_ = queued_ - header.parts;
        nextPart = 0;
    }
    (void)setsockopt(out_.get(), SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
    if (walked != queuedBytes_)
        return false; // that nothing more waits was no answer of this queue
    if (complete == 0)
        hostile("no complete set of leases");
    disordered_ = begun > 1;
    generation_ = current;
    return true;
}

bool Vessel::tryReplace(std::uint64_t caller) {
    QueueLock locked = lockOut(*process_, Clock::now() + kReadLimit);
    auto in = process_->takeDescriptor(numbers_[0]);
    if (!in || !isSeqpacket(in->get()) || inodeOf(*in) != socketInodes_[0] || inodeOf(out_) != socketInodes_[1])
        hostile("an end is missing");
    // Somebody else has changed it since we read it, and we would undo that: a libvirtd that was replaced meanwhile.
    auto first = peekHeader(out_.get());
    if (!first || first->header.generation != firstGeneration_ || bytesIn(out_.get()) != queuedBytes_)
        return false;
    // What was before the newest complete generation is of no use any more. Gone first, so that however many changes
    // are interrupted, the queue does not grow.
    // Whatever fails from here on: what is in the queue is our doing.
    struct Recount {
        Vessel& vessel;
        bool done = false; // nothing but the new generation is there
        ~Recount() {
            vessel.firstGeneration_ = done ? vessel.generation_ : firstGenerationIn(vessel.out_.get());
            (void)ioctl(vessel.out_.get(), SIOCINQ, &vessel.queuedBytes_);
        }
    } recount{*this};
    if (!tryTakeOut(stale_))
        throw Error(Fault::system, "old leases cannot be removed from its QEMU: try again");
    stale_ = 0;
    Header header{};
    header.caller = caller;
    header.generation = ++generation_;
    std::copy(numbers_.begin(), numbers_.end(), header.numbers);
    std::copy(socketInodes_.begin(), socketInodes_.end(), header.socketInodes);
    std::size_t old = queued_;
    sendGeneration(in->get(), header, tag_, leases_, queued_);
    std::size_t fresh = queued_ - old;
    // From here on the new generation counts. Taking the old messages out closes their descriptors; the leases that
    // are in the new one live on through it.
    caller_ = caller;
    disordered_ = !tryTakeOut(old);
    stale_ = queued_ - fresh;
    recount.done = !disordered_;
    return true;
}

// False when the socket does not let go of them.
bool Vessel::tryTakeOut(std::size_t count) {
    for (char rest; count > 0;) {
        if (recv(out_.get(), &rest, sizeof rest, MSG_DONTWAIT) >= 0) {
            count--;
            queued_--;
        } else if (errno != EINTR) {
            return errno == EAGAIN;
        }
    }
    return true;
}

namespace {

// The first words of what may be a vessel. Waits for nobody who does not stand in its queue, and changes no socket that
// is none.
std::optional<Message> peekAmongReaders(const os::Process& process, const os::Fd& out,
                                        std::chrono::steady_clock::time_point deadline) {
    if (peekPosition(out.get()) == -1)
        if (auto message = peekHere(out.get()); message || peekPosition(out.get()) == -1)
            return message;
    // Somebody walks, or was killed at it.
    auto soon = std::min(deadline, std::chrono::steady_clock::now() + std::chrono::milliseconds(50));
    auto position = peekPosition(out.get());
    auto locked = position ? tryLockOut(process, soon) : std::nullopt;
    if (!locked)
        return std::nullopt;
    auto message = peekHeader(out.get());
    if (!message)
        (void)setsockopt(out.get(), SOL_SOCKET, SO_PEEK_OFF, &*position, sizeof *position);
    return message;
}

// Whether a socket that could not be taken is one that the process still has.
bool isStillThere(const os::Process& process, const os::HeldSocket& socket) {
    auto seen = os::inspectSocket(socket.pid, socket.number);
    return seen && seen->inode == socket.inode && !process.diedWithin(std::chrono::milliseconds(0));
}

// The vessel at one of these, which are all who have that end.
std::optional<RunningGuest> guestAt(std::span<const os::HeldSocket> holders, HostGuests& found,
                                    std::chrono::steady_clock::time_point deadline) {
    bool unseen = false;
    for (const os::HeldSocket& holder : holders) {
        auto process = os::Process::openIfExists(holder.pid);
        if (!process)
            continue;
        auto out = process->mayTakeDescriptors()
                       ? takeSocket(*process, holder.number, os::inspectSocket(holder.pid, holder.number))
                       : std::nullopt;
        if (!out || inodeOf(*out) != holder.inode) {
            unseen = unseen || isStillThere(*process, holder);
            continue;
        }
        auto message = peekAmongReaders(*process, *out, deadline);
        if (!message || message->header.socketInodes[1] != holder.inode)
            return std::nullopt;
        RunningGuest guest{std::move(message->tag), holder.pid, {}};
        auto maker = makerOf(out->get());
        for (const os::HeldSocket& each : holders) {
            guest.holders.push_back(each.pid);
            if (maker && maker->pid == each.pid)
                guest.pid = each.pid;
        }
        return guest;
    }
    found.hidden += unseen ? 1 : 0;
    return std::nullopt;
}

} // namespace

const RunningGuest* HostGuests::of(pid_t pid) const {
    auto guest = std::find_if(guests.begin(), guests.end(), [&](const RunningGuest& each) {
        return std::find(each.holders.begin(), each.holders.end(), pid) != each.holders.end();
    });
    return guest == guests.end() ? nullptr : &*guest;
}

HostGuests findGuests(std::chrono::milliseconds limit) {
    auto deadline = std::chrono::steady_clock::now() + limit;
    os::SocketPairs pairs = os::findSocketPairs(deadline, kFirstNumber + 1);
    HostGuests found{{}, pairs.hidden, pairs.complete};
    for (std::span<const os::HeldSocket> rest = pairs.ends; !rest.empty();) {
        if (std::chrono::steady_clock::now() > deadline) {
            found.complete = false;
            break;
        }
        auto next = std::find_if(rest.begin(), rest.end(),
                                 [&](const os::HeldSocket& each) { return each.inode != rest.front().inode; });
        auto count = static_cast<std::size_t>(next - rest.begin());
        if (auto guest = guestAt(rest.first(count), found, deadline))
            found.guests.push_back(std::move(*guest));
        rest = rest.subspan(count);
    }
    std::sort(found.guests.begin(), found.guests.end(),
              [](const RunningGuest& one, const RunningGuest& other) { return one.pid < other.pid; });
    return found;
}

namespace {

// The leases of another guest, for a message. What is wrong with its vessel does not concern whoever is told.
std::vector<StoredLease> leasesOf(const RunningGuest& guest) {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    try {
        auto manifest = Vessel::readManifest(*process, guest.tag.uuid);
        return manifest ? std::move(manifest->leases) : std::vector<StoredLease>();
    } catch (const Error&) {
        return {};
    }
}

} // namespace

BelowUse findBelowUse(const RunningGuest& guest, const os::FileId& file, const os::FileId& leaseFile) {
    BelowUse use;
    for (const StoredLease& lease : leasesOf(guest)) {
        if (!lease.isLayer())
            use.reads = use.reads || (lease.lower && lease.file == file);
        else if (use.layer.empty() && lease.leaseFile == leaseFile)
            use.layer = lease.path;
    }
    return use;
}

} // namespace leasehold::qemu

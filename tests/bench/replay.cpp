// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/replay.hpp"

#include "tests/support/throw_errno.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace leasehold::bench {
namespace {

using support::throwErrno;
using Clock = std::chrono::steady_clock;

// core/qemu/vessel and core/lease/byte_range.
constexpr int kSender = 250, kNumber = 251;
constexpr std::size_t kHeader = 96;
constexpr off_t kMarks = off_t{1} << 62;
constexpr off_t kHandoffs = kMarks + (off_t{5} << 59);
constexpr off_t kHandoffsLength = off_t{2} << 59;
constexpr off_t kOwnerNote = off_t{2} << 30;

long checked(long result, const char* what) {
    if (result < 0)
        throwErrno(what);
    return result;
}

void lock(int fd, int command, short type, off_t start, off_t length) {
    struct flock lock {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = start;
    lock.l_len = length;
    checked(fcntl(fd, command, &lock), "lock");
}

// What was opened for one call of libvirt.
class Opened {
public:
    // `mounts`: what says whether the host's mounts have changed, asked where the words do not tell all (or -1).
    Opened(pid_t pid, std::size_t disks, int mounts = -1) {
        const int pidfd = add(checked(syscall(SYS_pidfd_open, pid, 0), "pidfd_open"));
        const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(kNumber);
        char text[64];
        checked(readlink(path.c_str(), text, sizeof text), "readlink");
        struct statx status;
        checked(statx(AT_FDCWD, path.c_str(), AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO | STATX_UID, &status),
                "statx");
        const int socket = add(checked(syscall(SYS_pidfd_getfd, pidfd, kNumber, 0), "pidfd_getfd"));
        sockaddr_un peer{};
        ucred maker{};
        socklen_t size = sizeof peer;
        checked(getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &size), "getpeername");
        size = sizeof maker;
        checked(getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &maker, &size), "getsockopt");
        iovec data{words_, sizeof words_};
        msghdr header{};
        header.msg_iov = &data;
        header.msg_iovlen = 1;
        length_ = static_cast<std::size_t>(
            checked(recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC), "recvmsg"));
        pollfd changes{mounts, POLLPRI, 0};
        if (mounts >= 0)
            checked(poll(&changes, 1, 0), "poll");
        char head[kHeader];
        data = {head, sizeof head};
        header.msg_control = control_;
        header.msg_controllen = sizeof control_;
        checked(recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC), "recvmsg");
        controlLength_ = header.msg_controllen;
        const cmsghdr* rights = CMSG_FIRSTHDR(&header);
        const std::size_t count = rights == nullptr ? 0 : (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        if (count < disks)
            throw std::runtime_error("replay: its vessel has fewer descriptors than disks");
        std::memcpy(numbers_.data() + count_, CMSG_DATA(rights), count * sizeof(int));
        disks_ = {numbers_.data() + count_, disks}; // what the stand-in had open when it was looked at comes behind
        count_ += count;
        int waiting = 0;
        checked(ioctl(socket, SIOCINQ, &waiting), "ioctl");
    }
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;
    ~Opened() {
        std::sort(numbers_.begin(), numbers_.begin() + static_cast<std::ptrdiff_t>(count_));
        for (std::size_t first = 0, next = 0; first < count_; first = next) {
            for (next = first + 1; next < count_ && numbers_[next] == numbers_[next - 1] + 1;)
                next++;
            if (next - first == 1)
                close(numbers_[first]);
            else
                (void)syscall(SYS_close_range, numbers_[first], numbers_[next - 1], 0);
        }
    }

    std::span<const int> disks() const { return disks_; }
    int pidfd() const { return numbers_[0]; }
    int socket() const { return numbers_[1]; }

    // The message as it came, into the queue behind itself.
    void sendAgain(int sender) {
        iovec data{words_, length_};
        msghdr header{};
        header.msg_iov = &data;
        header.msg_iovlen = 1;
        header.msg_control = control_;
        header.msg_controllen = controlLength_;
        checked(sendmsg(sender, &header, MSG_DONTWAIT | MSG_NOSIGNAL), "sendmsg");
    }

private:
    int add(long number) { return numbers_[count_++] = static_cast<int>(number); }

    char words_[64 * 1024];
    std::size_t length_ = 0;
    alignas(cmsghdr) char control_[CMSG_SPACE(256 * sizeof(int))];
    std::size_t controlLength_ = 0;

    std::array<int, 256 + 2> numbers_{}; // SCM_MAX_FD is 253
    std::size_t count_ = 0;
    std::span<const int> disks_;
};

void identify(int directory, const char* path, int flags) {
    struct statx status;
    checked(statx(directory, path, flags | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &status), "statx");
}

int openDescriptors(pid_t pid) {
    const std::string path = "/proc/" + std::to_string(pid) + "/fd";
    return static_cast<int>(checked(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), "open"));
}

// The notes, and then owner and nothing else is up.
void takeOver(std::span<const int> disks) {
    for (const int fd : disks)
        checked(lseek(fd, 0, SEEK_CUR), "lseek");
    for (const int fd : disks) {
        checked(lseek(fd, kOwnerNote, SEEK_SET), "lseek");
        lock(fd, F_OFD_SETLK, F_UNLCK, kHandoffs, kHandoffsLength);
    }
}

// What the guest has open: each descriptor, and of those that are files how they were opened.
void lookAtOpenFiles(pid_t pid) {
    const int folder = openDescriptors(pid);
    alignas(dirent64) char room[16 * 1024];
    for (long length; (length = checked(getdents64(folder, room, sizeof room), "getdents64")) > 0;)
        for (long at = 0; at < length;) {
            const auto* entry = reinterpret_cast<const dirent64*>(room + at);
            at += entry->d_reclen;
            if (entry->d_name[0] == '.')
                continue;
            struct statx status;
            if (statx(folder, entry->d_name, AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &status) < 0) {
                if (errno == ENOENT) // closed meanwhile
                    continue;
                throwErrno("statx");
            }
            struct stat link;
            if (S_ISREG(status.stx_mode) || S_ISBLK(status.stx_mode))
                checked(fstatat(folder, entry->d_name, &link, AT_SYMLINK_NOFOLLOW), "fstatat");
        }
    close(folder);
}

// The vessel says that the guest has run: a new generation, and then the old one goes.
void store(pid_t pid, Opened& opened) {
    const int folder = openDescriptors(pid);
    checked(flock(folder, LOCK_EX | LOCK_NB), "flock");
    const int sender = static_cast<int>(checked(syscall(SYS_pidfd_getfd, opened.pidfd(), kSender, 0), "pidfd_getfd"));
    int type = 0, off = -1, waiting = 0;
    socklen_t size = sizeof type;
    checked(getsockopt(sender, SOL_SOCKET, SO_TYPE, &type, &size), "getsockopt");
    identify(sender, "", AT_EMPTY_PATH);
    identify(opened.socket(), "", AT_EMPTY_PATH);
    checked(setsockopt(opened.socket(), SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off), "setsockopt");
    char head[1536];
    checked(recv(opened.socket(), head, sizeof head, MSG_PEEK | MSG_DONTWAIT), "recv");
    checked(ioctl(opened.socket(), SIOCINQ, &waiting), "ioctl");
    opened.sendAgain(sender);
    checked(recv(opened.socket(), head, 1, MSG_DONTWAIT), "recv");
    checked(ioctl(opened.socket(), SIOCINQ, &waiting), "ioctl");
    close(sender);
    checked(flock(folder, LOCK_UN), "flock");
    close(folder);
}

} // namespace

Replay::Replay(const std::string& plugin, const std::filesystem::path& config, const std::string& standIn)
    : Contestant(kReplay), leasehold_(kReplay, plugin, config, standIn),
      mounts_(static_cast<int>(checked(open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC), "open"))) {}

Replay::~Replay() {
    close(mounts_);
}

Contestant::Time Replay::firstAcquire(const std::vector<support::Disk>& disks) {
    const auto begin = Clock::now();
    {
        Opened opened(leasehold_.pid(), disks.size(), mounts_);
        for (const int fd : opened.disks())
            identify(fd, "", AT_EMPTY_PATH);
        lookAtOpenFiles(leasehold_.pid());
        struct stat status;
        if (disks.size() == 1) // a disk that is named alone may be new
            checked(stat(disks.front().path.c_str(), &status), "stat");
        takeOver(opened.disks());
        store(leasehold_.pid(), opened);
    }
    return Clock::now() - begin;
}

Contestant::Time Replay::acquire(const std::vector<support::Disk>& disks) {
    if (!stopped_)
        return firstAcquire(disks);
    const auto begin = Clock::now();
    {
        const Opened opened(leasehold_.pid(), disks.size());
        takeOver(opened.disks());
    }
    const Time elapsed = Clock::now() - begin;
    stopped_ = false;
    return elapsed;
}

Contestant::Time Replay::release(const std::vector<support::Disk>& disks) {
    const auto begin = Clock::now();
    {
        const Opened opened(leasehold_.pid(), disks.size());
        for (const int fd : opened.disks())
            checked(lseek(fd, 0, SEEK_CUR), "lseek");
        std::uint32_t token = 0;
        checked(getrandom(&token, sizeof token, 0), "getrandom");
        token = token % (1U << 30);
        for (const int fd : opened.disks()) {
            lock(fd, F_OFD_SETLK, F_WRLCK, kHandoffs + token, 1);
            checked(lseek(fd, kOwnerNote + token, SEEK_SET), "lseek");
        }
    }
    const Time elapsed = Clock::now() - begin;
    stopped_ = true;
    return elapsed;
}

void Replay::endGuest() {
    leasehold_.endGuest();
    stopped_ = false;
}

} // namespace leasehold::bench

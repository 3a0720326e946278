// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/replay.hpp"

#include "tests/support/throw_errno.hpp"

#include <fcntl.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace leasehold::bench {
namespace {

using support::throwErrno;
using Clock = std::chrono::steady_clock;

// core/qemu/vessel and core/lease/byte_range.
constexpr int kNumber = 251;
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
    Opened(pid_t pid, std::size_t disks) {
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
        char words[64 * 1024];
        iovec data{words, sizeof words};
        msghdr header{};
        header.msg_iov = &data;
        header.msg_iovlen = 1;
        checked(recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC), "recvmsg");
        alignas(cmsghdr) char control[CMSG_SPACE(256 * sizeof(int))];
        data.iov_len = kHeader;
        header.msg_control = control;
        header.msg_controllen = sizeof control;
        checked(recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC), "recvmsg");
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

private:
    int add(long number) { return numbers_[count_++] = static_cast<int>(number); }

    std::array<int, 256 + 2> numbers_{}; // SCM_MAX_FD is 253
    std::size_t count_ = 0;
    std::span<const int> disks_;
};

} // namespace

Contestant::Time Replay::acquire(const std::vector<support::Disk>& disks) {
    if (!stopped_)
        return leasehold_.acquire(disks);
    const auto begin = Clock::now();
    {
        const Opened opened(leasehold_.pid(), disks.size());
        for (const int fd : opened.disks())
            checked(lseek(fd, 0, SEEK_CUR), "lseek");
        for (const int fd : opened.disks())
            lock(fd, F_OFD_GETLK, F_WRLCK, kMarks, kMarks);
        for (const int fd : opened.disks()) {
            checked(lseek(fd, kOwnerNote, SEEK_SET), "lseek");
            lock(fd, F_OFD_SETLK, F_UNLCK, kHandoffs, kHandoffsLength);
        }
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
            lock(fd, F_OFD_SETLK, F_UNLCK, kHandoffs, kHandoffsLength);
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

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/unit_vessel.hpp"

#include <algorithm>
#include <cstring>

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

namespace leasehold::unit {

using qemu::GuestTag;
using qemu::StoredLease;

GuestTag makeTag(unsigned number) {
    GuestTag tag;
    tag.uuid[0] = 0xee;
    tag.uuid[15] = static_cast<unsigned char>(number);
    tag.incarnation = 1000 + number;
    tag.name = "guest-" + std::to_string(number);
    return tag;
}

std::vector<StoredLease> openLeases(const std::vector<std::string>& images, bool locked) {
    std::vector<StoredLease> leases;
    for (const std::string& image : images) {
        StoredLease lease;
        lease.lease = os::openFile(image, O_RDWR);
        lease.file = lease.leaseFile = os::identify(lease.lease.get(), image);
        lease.mode = static_cast<Mode>(leases.size() % 3);
        lease.writable = true;
        lease.joined = leases.size() % 2;
        lease.path = image;
        if (locked)
            demand(os::tryLock(lease.lease.get(), os::LockType::write, {kLeaseByte, 1}, image) ==
                       os::LockOutcome::granted,
                   image + " is locked by somebody else");
        leases.push_back(std::move(lease));
    }
    return leases;
}

std::vector<std::string> makeImages(const TempDir& dir, int count) {
    std::vector<std::string> images;
    for (int i = 0; i < count; i++)
        images.push_back(dir.file("disk" + std::to_string(i) + ".img"));
    return images;
}

void plantVessel(const qemu::GuestTag& tag, std::span<const qemu::StoredLease> leases) {
    qemu::VesselEnds ends;
    ends.plant(tag, leases);
    ends.leaveToQemu();
}

StandIn plantedGuest(const GuestTag& tag, const std::vector<std::string>& images) {
    return StandIn([&] { plantVessel(tag, openLeases(images)); });
}

std::optional<GuestTag> guestOf(pid_t pid) {
    const qemu::HostGuests found = qemu::findGuests(std::chrono::seconds(60));
    const qemu::RunningGuest* guest = found.of(pid);
    return guest ? std::optional(guest->tag) : std::nullopt;
}

std::string Forgery::bytes() const {
    std::string text(reinterpret_cast<const char*>(&header), sizeof header);
    text += name;
    for (std::size_t i = 0; i < entries.size(); i++) {
        text.append(reinterpret_cast<const char*>(&entries[i].first), sizeof(WireEntry));
        text += entries[i].second;
        text.append(reinterpret_cast<const char*>(files[i].data()), files[i].size() * sizeof(os::FileId));
    }
    return text + tail;
}

ForgedVessel::ForgedVessel(int in, int out, int type) {
    demand(socketpair(AF_UNIX, type, 0, ends_) == 0, "no socket pair");
    int wanted[2] = {in, out};
    for (int i : {0, 1})
        if (ends_[i] != wanted[i]) {
            demand(dup2(ends_[i], wanted[i]) == wanted[i], "no such number");
            close(ends_[i]);
            ends_[i] = wanted[i];
        }
    int size = 1 << 20;
    (void)setsockopt(in, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

Forgery ForgedVessel::message(const GuestTag& tag, const std::vector<StoredLease>& leases,
                              std::uint64_t generation) const {
    Forgery forgery;
    WireHeader& header = forgery.header;
    std::memcpy(header.magic, "leasehld", 8);
    header.version = 1;
    header.headerSize = sizeof(WireHeader);
    header.entrySize = sizeof(WireEntry);
    std::copy(tag.uuid.begin(), tag.uuid.end(), header.uuid);
    header.incarnation = tag.incarnation;
    header.nameLength = static_cast<std::uint32_t>(tag.name.size());
    header.generation = generation;
    header.parts = 1;
    header.leases = header.totalLeases = static_cast<std::uint32_t>(leases.size());
    for (int i : {0, 1}) {
        header.numbers[i] = ends_[i];
        header.socketInodes[i] = os::identify(ends_[i], "a socket").inode;
    }
    forgery.name = tag.name;
    for (const StoredLease& lease : leases) {
        auto flags = static_cast<std::uint8_t>(lease.writable | lease.joined << 1 | lease.named << 5);
        auto which = static_cast<std::uint8_t>(lease.image.open() | lease.directory.open() << 1);
        forgery.entries.emplace_back(WireEntry{lease.file.device, lease.file.inode,
                                               static_cast<std::uint8_t>(lease.mode), flags, which, 0,
                                               static_cast<std::uint32_t>(lease.path.size())},
                                     lease.path);
        auto& files = forgery.files.emplace_back();
        for (const os::Fd* fd : {&lease.lease, &lease.image, &lease.directory})
            if (fd->open()) {
                files.push_back(os::identify(fd->get(), lease.path));
                forgery.fds.push_back(fd->get());
            }
    }
    return forgery;
}

void ForgedVessel::send(const std::string& bytes, const std::vector<int>& fds) const {
    iovec data{const_cast<char*>(bytes.data()), bytes.size()};
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    if (!fds.empty()) {
        header.msg_control = control.data();
        header.msg_controllen = control.size();
        cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
        std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
    }
    demand(sendmsg(in(), &header, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()), "not sent");
}

} // namespace leasehold::unit

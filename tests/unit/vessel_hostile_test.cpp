// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// A QEMU in the hands of an attacker: whatever its vessel says, the reader neither crashes nor hangs nor keeps a
// descriptor, and never takes a file for another.

#include "core/os/error.hpp"
#include "core/os/socket_pairs.hpp"
#include "core/qemu/vessel.hpp"
#include "tests/support/unit_vessel.hpp"

#include <chrono>
#include <memory>
#include <thread>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

namespace leasehold::qemu {
namespace {

using unit::ForgedVessel;
using unit::Forgery;
using unit::guestOf;
using unit::makeImages;
using unit::makeTag;
using unit::openLeases;
using unit::StandIn;

const GuestTag kTag = makeTag(1);

// What a reader makes of it. Frozen: read, but it cannot be changed.
enum class Reading { whole, frozen, nothing, invalid, unsupported };

std::ostream& operator<<(std::ostream& out, Reading reading) {
    static const char* const names[] = {"whole", "frozen", "nothing", "invalid", "unsupported"};
    return out << names[static_cast<int>(reading)];
}

class HostileVessel : public unit::LeavesNoDescriptor {
protected:
    static Reading read(const StandIn& qemu) {
        std::size_t before = unit::countDescriptors();
        Reading reading = Reading::whole;
        try {
            const os::Process& process = qemu.process();
            auto vessel = Vessel::retrieve(process, kTag.uuid);
            if (!vessel) {
                reading = Reading::nothing;
            } else {
                reading = Reading::frozen;
                (void)vessel->tryReplace();
                reading = Reading::whole;
            }
        } catch (const Error& error) {
            if (reading != Reading::frozen)
                reading = error.fault() == Fault::unsupported ? Reading::unsupported : Reading::invalid;
            EXPECT_TRUE(error.fault() != Fault::system || reading == Reading::frozen) << error.what();
        }
        EXPECT_NO_THROW((void)guestOf(qemu.pid()));
        try {
            (void)Vessel::readManifest(qemu.process(), kTag.uuid);
        } catch (const Error& error) {
            EXPECT_NE(error.fault(), Fault::system) << error.what();
        }
        EXPECT_EQ(unit::countDescriptors(), before) << "descriptors of the vessel stayed open";
        return reading;
    }

    // A guest with a message of two leases that `spoil` has changed.
    template <typename Spoil>
    StandIn guestWithSpoilt(Spoil spoil) {
        return StandIn([&] {
            ForgedVessel forged;
            auto leases = openLeases(images);
            Forgery message = forged.message(kTag, leases);
            spoil(message);
            forged.send(message);
        });
    }

    // What becomes of it.
    template <typename Spoil>
    Reading readSpoilt(Spoil spoil) {
        StandIn qemu = guestWithSpoilt(spoil);
        return read(qemu);
    }

    static void swapDescriptors(Forgery& message) { std::swap(message.fds[0], message.fds[1]); }

    unit::TempDir dir;
    std::vector<std::string> images = makeImages(dir, 2);
};

TEST_F(HostileVessel, IsOnlyMeasuredAgainstWhatAnHonestOneLooksLike) {
    EXPECT_EQ(readSpoilt([](Forgery&) {}), Reading::whole);
}

TEST_F(HostileVessel, WithASpoiltMessageIsRefused) {
    struct Row {
        const char* name;
        Reading expected;
        std::function<void(Forgery&)> spoil;
    };
    const Row rows[] = {
        {"wrong magic", Reading::nothing, [](Forgery& m) { m.header.magic[7]++; }},
        {"later version", Reading::unsupported, [](Forgery& m) { m.header.version = 2; }},
        {"version 0", Reading::unsupported, [](Forgery& m) { m.header.version = 0; }},
        {"header too small", Reading::invalid, [](Forgery& m) { m.header.headerSize = 87; }},
        {"header of size 0", Reading::invalid, [](Forgery& m) { m.header.headerSize = 0; }},
        {"header beyond the message", Reading::invalid, [](Forgery& m) { m.header.headerSize = 65535; }},
        {"entries too small", Reading::invalid, [](Forgery& m) { m.header.entrySize = 23; }},
        {"entries beyond the message", Reading::invalid, [](Forgery& m) { m.header.entrySize = 65535; }},
        {"name beyond the message", Reading::invalid, [](Forgery& m) { m.header.nameLength = 1000; }},
        {"name of 4 GiB", Reading::invalid, [](Forgery& m) { m.header.nameLength = ~0u; }},
        {"name too long", Reading::invalid,
         [](Forgery& m) {
             m.name = std::string(1025, 'n');
             m.header.nameLength = 1025;
         }},
        {"more leases than entries", Reading::invalid, [](Forgery& m) { m.header.leases = m.header.totalLeases = 3; }},
        {"fewer leases than entries", Reading::invalid, [](Forgery& m) { m.header.leases = m.header.totalLeases = 1; }},
        {"4 G leases", Reading::invalid, [](Forgery& m) { m.header.leases = ~0u; }},
        {"4 G leases in all", Reading::invalid, [](Forgery& m) { m.header.totalLeases = ~0u; }},
        {"fewer in all than here", Reading::invalid, [](Forgery& m) { m.header.totalLeases = 1; }},
        {"more in all than ever come", Reading::invalid, [](Forgery& m) { m.header.totalLeases = 3; }},
        {"the last generation of all", Reading::invalid, [](Forgery& m) { m.header.generation = ~std::uint64_t{0}; }},
        {"no generation", Reading::invalid, [](Forgery& m) { m.header.generation = 0; }},
        {"no parts", Reading::invalid, [](Forgery& m) { m.header.parts = 0; }},
        {"4 G parts", Reading::invalid, [](Forgery& m) { m.header.parts = ~0u; }},
        {"part that is not one of them", Reading::invalid, [](Forgery& m) { m.header.part = 1; }},
        {"parts that never come", Reading::invalid, [](Forgery& m) { m.header.parts = 2; }},
        {"path beyond the message", Reading::invalid, [](Forgery& m) { m.entries[1].first.pathLength++; }},
        {"path of 4 GiB", Reading::invalid, [](Forgery& m) { m.entries[0].first.pathLength = ~0u; }},
        {"path too long", Reading::invalid,
         [](Forgery& m) {
             m.entries[0].second = std::string(4097, 'p');
             m.entries[0].first.pathLength = 4097;
         }},
        {"path shorter than sent", Reading::invalid, [](Forgery& m) { m.entries[1].first.pathLength--; }},
        {"bytes after the end", Reading::invalid, [](Forgery& m) { m.tail = "x"; }},
        {"message of 200 KB", Reading::invalid, [](Forgery& m) { m.tail = std::string(200'000, 'x'); }},
        {"no descriptors", Reading::invalid, [](Forgery& m) { m.fds.clear(); }},
        {"one descriptor missing", Reading::invalid, [](Forgery& m) { m.fds.pop_back(); }},
        {"one descriptor too many", Reading::invalid, [](Forgery& m) { m.fds.push_back(m.fds[0]); }},
        {"250 descriptors too many", Reading::invalid, [](Forgery& m) { m.fds.resize(252, m.fds[0]); }},
        {"swapped descriptors", Reading::invalid, [](Forgery& m) { std::swap(m.fds[0], m.fds[1]); }},
        {"a socket for a file", Reading::invalid, [](Forgery& m) { m.fds[1] = ForgedVessel::kIn; }},
        {"another inode", Reading::invalid, [](Forgery& m) { m.entries[0].first.inode++; }},
        {"another device", Reading::invalid, [](Forgery& m) { m.entries[1].first.device++; }},
        {"the image's number and another descriptor", Reading::invalid, [](Forgery& m) { m.files[0][0].inode++; }},
        {"a second descriptor that is not there", Reading::invalid,
         [](Forgery& m) { m.entries[0].first.descriptors = 1; }},
        {"a second descriptor of another image", Reading::invalid,
         [](Forgery& m) {
             m.entries[0].first.descriptors = 1; // kHasImage
             m.files[0].push_back(m.files[1][0]);
             m.fds.insert(m.fds.begin() + 1, m.fds[1]);
         }},
        {"a kind of descriptor that nobody knows", Reading::invalid,
         [](Forgery& m) { m.entries[0].first.descriptors = 4; }},
        {"uuid of another guest", Reading::nothing, [](Forgery& m) { m.header.uuid[3] = 1; }},
        {"ends elsewhere", Reading::nothing, [](Forgery& m) { std::swap(m.header.numbers[0], m.header.numbers[1]); }},
        {"end that is no socket", Reading::frozen, [](Forgery& m) { m.header.numbers[0] = 0; }},
        {"end that is not open", Reading::frozen, [](Forgery& m) { m.header.numbers[0] = 555; }},
        {"end with a negative number", Reading::frozen, [](Forgery& m) { m.header.numbers[0] = -7; }},
        {"sending socket of another inode", Reading::frozen, [](Forgery& m) { m.header.socketInodes[0]++; }},
        {"receiving socket of another inode", Reading::frozen, [](Forgery& m) { m.header.socketInodes[1]++; }},
    };
    for (const Row& row : rows) {
        SCOPED_TRACE(row.name);
        EXPECT_EQ(readSpoilt(row.spoil), row.expected);
    }
}

// Whoever takes all leases as they are relies on no file; before one decides anything they are compared.
TEST_F(HostileVessel, WithSwappedDescriptorsIsRefusedBeforeAFileDecidesAnything) {
    StandIn qemu = guestWithSpoilt(swapDescriptors);
    auto retrieve = [&](Taking taking) {
        return Vessel::retrieve(qemu.process(), kTag.uuid, [&](const std::vector<const StoredLease*>& words) {
            EXPECT_EQ(words.size(), images.size());
            return taking;
        });
    };
    EXPECT_THROW(retrieve(Taking::compared), Error);
    EXPECT_THROW(retrieve(Taking::none), RemoteLeases);
    auto vessel = retrieve(Taking::asTheyAre);
    ASSERT_TRUE(vessel);
    EXPECT_THROW(vessel->compareFiles(), Error);
}

TEST_F(HostileVessel, CutAnywhereIsRefused) {
    std::size_t whole = 0;
    {
        ForgedVessel forged(800, 801);
        whole = forged.message(kTag, openLeases(images)).bytes().size();
        close(800);
        close(801);
    }
    for (std::size_t length = 0; length < whole; length += length < 88 ? 29 : 7) {
        StandIn qemu([&] {
            ForgedVessel forged;
            auto leases = openLeases(images);
            Forgery message = forged.message(kTag, leases);
            forged.send(message.bytes().substr(0, length), length ? message.fds : std::vector<int>{});
        });
        EXPECT_NE(read(qemu), Reading::whole) << length;
    }
}

TEST_F(HostileVessel, OfALaterVersionsLongerStructuresIsReadAsFarAsItIsKnown) {
    Reading reading = readSpoilt([](Forgery& message) {
        message.header.headerSize += 8;
        message.header.entrySize += 4;
        message.name = std::string(8, '\xaa') + message.name;
        for (auto& [entry, path] : message.entries)
            path = std::string(4, '\xbb') + path;
    });
    EXPECT_EQ(reading, Reading::whole);
}

TEST_F(HostileVessel, WithGarbageAfterAGoodMessageIsRefused) {
    for (std::size_t size : {1u, 88u, 500u}) {
        StandIn qemu([&] {
            ForgedVessel forged;
            auto leases = openLeases(images);
            forged.send(forged.message(kTag, leases));
            forged.send(std::string(size, 'g'), {});
        });
        EXPECT_EQ(read(qemu), Reading::invalid) << size;
    }
}

TEST_F(HostileVessel, OfTwoGuestsIsRefused) {
    StandIn qemu([&] {
        ForgedVessel forged;
        auto leases = openLeases(images);
        forged.send(forged.message(kTag, leases, 1));
        forged.send(forged.message(makeTag(2), leases, 2));
    });
    EXPECT_EQ(read(qemu), Reading::invalid);
}

TEST_F(HostileVessel, WhoseGenerationsRunBackwardsIsRefused) {
    for (std::uint64_t second : {1, 4, 5}) {
        StandIn qemu([&] {
            ForgedVessel forged;
            auto leases = openLeases(images);
            forged.send(forged.message(kTag, leases, 5));
            forged.send(forged.message(kTag, leases, second));
        });
        EXPECT_EQ(read(qemu), Reading::invalid) << second;
    }
}

TEST_F(HostileVessel, WithMoreMessagesThanAnyGuestNeedsIsRefused) {
    StandIn qemu([&] {
        ForgedVessel forged;
        for (std::uint64_t generation = 1; generation <= 300; generation++)
            forged.send(forged.message(kTag, {}, generation));
    });
    EXPECT_EQ(read(qemu), Reading::invalid);
}

// The same words as in an honest one, in a socket that a user has made.
TEST_F(HostileVessel, MadeByAnotherUserIsNone) {
    if (geteuid() != 0)
        GTEST_SKIP() << "not root: cannot be another user";
    for (int out : {ForgedVessel::kOut, 60}) {
        StandIn qemu([&] {
            auto leases = openLeases(images);
            unit::demand(seteuid(65534) == 0, "cannot be another user");
            ForgedVessel forged(ForgedVessel::kIn, out);
            unit::demand(seteuid(0) == 0, "cannot be root again");
            forged.send(forged.message(kTag, leases));
        });
        EXPECT_EQ(read(qemu), Reading::nothing);
        EXPECT_FALSE(Vessel::readManifest(qemu.process(), kTag.uuid));
        EXPECT_FALSE(guestOf(qemu.pid()));
    }
}

// It costs him nothing to keep locked what nobody but he has. Who looks for the names of guests waits for none of them.
TEST_F(HostileVessel, OfLocalUsersThatAreLockedForEverDelaysNobody) {
    if (geteuid() != 0)
        GTEST_SKIP() << "not root: cannot be another user";
    std::vector<std::unique_ptr<StandIn>> crowd;
    for (int i = 0; i < 40; i++)
        crowd.push_back(std::make_unique<StandIn>([&] {
            unit::demand(seteuid(65534) == 0, "cannot be another user");
            ForgedVessel forged;
            unit::demand(seteuid(0) == 0, "cannot be root again");
            forged.send(forged.message(kTag, {}));
            int position = 0, directory = open("/proc/self/fd", O_RDONLY | O_DIRECTORY);
            unit::demand(setsockopt(forged.out(), SOL_SOCKET, SO_PEEK_OFF, &position, sizeof position) == 0 &&
                             flock(directory, LOCK_EX) == 0,
                         "not locked");
        }));
    StandIn qemu = unit::plantedGuest(makeTag(2), images);
    // In the time that two of them could take.
    const HostGuests found = findGuests(std::chrono::milliseconds(1000));
    EXPECT_TRUE(found.complete);
    EXPECT_TRUE(found.of(qemu.pid()));
    for (const auto& each : crowd)
        EXPECT_FALSE(found.of(each->pid()));
}

// Nothing is taken out of a process that cannot be a vessel: to close a duplicate of a tape drive rewinds it.
TEST_F(HostileVessel, IsNotLookedForInWhatIsNoPair) {
    StandIn qemu([&] {
        int pipes[2], numbers[2] = {ForgedVessel::kIn, ForgedVessel::kOut};
        unit::demand(pipe(pipes) == 0 && dup2(pipes[0], numbers[0]) >= 0 && dup2(pipes[1], numbers[1]) >= 0, "no pipe");
    });
    EXPECT_EQ(read(qemu), Reading::nothing);
    EXPECT_FALSE(guestOf(qemu.pid()));
    for (const os::HeldSocket& end :
         os::findSocketPairs(std::chrono::steady_clock::now() + std::chrono::hours(1), 0).ends)
        EXPECT_NE(end.pid, qemu.pid());
}

// Who is connected to a service of root's, which says what the vessel of a guest says.
TEST_F(HostileVessel, SpokenByAServiceIsNone) {
    for (int type : {SOCK_SEQPACKET, SOCK_STREAM}) {
        StandIn qemu([&] {
            os::Fd listener(socket(AF_UNIX, type, 0)), peer(socket(AF_UNIX, type, 0));
            sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}}; // autobind (unix(7))
            socklen_t length = sizeof address;
            unit::demand(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address.sun_family) == 0 &&
                             listen(listener.get(), 1) == 0 &&
                             getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length) == 0 &&
                             connect(peer.get(), reinterpret_cast<sockaddr*>(&address), length) == 0,
                         "no connection");
            ForgedVessel forged;
            unit::demand(dup2(accept(listener.get(), nullptr, nullptr), forged.in()) >= 0 &&
                             dup2(peer.get(), forged.out()) >= 0,
                         "no such numbers");
            forged.send(forged.message(kTag, openLeases(images)));
        });
        EXPECT_EQ(read(qemu), Reading::nothing);
        EXPECT_FALSE(guestOf(qemu.pid()));
    }
}

TEST_F(HostileVessel, WithoutAnythingInItIsNone) {
    StandIn qemu([] { ForgedVessel forged; });
    EXPECT_EQ(read(qemu), Reading::nothing);
}

TEST_F(HostileVessel, WhoseEndQemuHasClosedIsNoneOrFrozen) {
    for (int closed : {ForgedVessel::kIn, ForgedVessel::kOut}) {
        StandIn qemu([&] {
            ForgedVessel forged;
            auto leases = openLeases(images);
            forged.send(forged.message(kTag, leases));
            close(closed);
        });
        EXPECT_EQ(read(qemu), closed == ForgedVessel::kOut ? Reading::nothing : Reading::frozen);
    }
}

TEST_F(HostileVessel, ThatQemuShutDownIsReadOrRefusedButNeverWaitedFor) {
    for (int how : {SHUT_RD, SHUT_WR, SHUT_RDWR})
        for (int end : {ForgedVessel::kIn, ForgedVessel::kOut}) {
            StandIn qemu([&] {
                ForgedVessel forged;
                auto leases = openLeases(images);
                forged.send(forged.message(kTag, leases));
                shutdown(end, how);
            });
            auto start = std::chrono::steady_clock::now();
            read(qemu);
            EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
        }
}

TEST_F(HostileVessel, OfAnotherTypeOfSocketIsNoneOrFrozen) {
    for (int type : {SOCK_STREAM, SOCK_DGRAM}) {
        StandIn qemu([&] {
            ForgedVessel forged(ForgedVessel::kIn, ForgedVessel::kOut, type);
            auto leases = openLeases(images);
            forged.send(forged.message(kTag, leases));
        });
        EXPECT_NE(read(qemu), Reading::whole);
    }
}

TEST_F(HostileVessel, WhoseSendingEndBelongsToAnotherPairHarmsOnlyItself) {
    StandIn qemu([&] {
        ForgedVessel forged, other(260, 261);
        auto leases = openLeases(images);
        Forgery message = forged.message(kTag, leases);
        message.header.numbers[0] = 260;
        message.header.socketInodes[0] = os::identify(260, "a socket").inode;
        forged.send(message);
    });
    std::size_t before = unit::countDescriptors();
    try {
        if (auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid))
            (void)vessel->tryReplace();
    } catch (const Error&) {
        // As good as a replacement that goes nowhere.
    }
    EXPECT_EQ(unit::countDescriptors(), before);
}

// A full one takes long to read, and whoever moves the position of a reader has it begin anew.
TEST_F(HostileVessel, InWhichSomebodyPlaysIsNotReadForLong) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "RLIMIT_NOFILE cannot be raised";
    StandIn qemu([&] {
        ForgedVessel forged;
        int size = 256 << 20;
        (void)setsockopt(forged.in(), SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
        auto leases = openLeases(std::vector<std::string>(200, images[0]), false);
        for (std::uint64_t generation = 1; generation <= 60; generation++)
            forged.send(forged.message(kTag, leases, generation));
    });
    ASSERT_TRUE(Vessel::retrieve(qemu.process(), kTag.uuid));
    unit::Child player([&](unit::Line& line) {
        auto out = os::Process(qemu.pid()).takeDescriptor(ForgedVessel::kOut);
        line.say();
        (void)setpriority(PRIO_PROCESS, 0, -20); // so that it gets its turn on a busy machine
        for (int position = 0;; position ^= 1) {
            setsockopt(out->get(), SOL_SOCKET, SO_PEEK_OFF, &position, sizeof position);
            std::this_thread::sleep_for(std::chrono::microseconds(200)); // one reading takes longer
        }
    });
    player.line().hear();
    // On a busy machine the player may miss a turn, and all is read in it.
    bool refused = false;
    for (int tries = 0; tries < 20 && !refused; tries++) {
        const auto begin = std::chrono::steady_clock::now();
        try {
            EXPECT_TRUE(Vessel::retrieve(qemu.process(), kTag.uuid));
        } catch (const Error&) {
            refused = true;
        }
        EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
    }
    EXPECT_TRUE(refused);
}

TEST_F(HostileVessel, ThatIsLockedForEverByQemuIsNotWaitedForLong) {
    StandIn qemu([&] {
        unit::plantVessel(kTag, openLeases(images));
        int directory = open("/proc/self/fd", O_RDONLY | O_DIRECTORY); // stays open in QEMU
        unit::demand(flock(directory, LOCK_EX) == 0, "not locked");
    });
    auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(guestOf(qemu.pid()), kTag) << "to be named takes no lock";
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel) << "to read one message takes no lock";
    EXPECT_THROW((void)vessel->tryReplace(), Error);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST_F(HostileVessel, IsReadWithoutAnyChangeOfTheLocksOnItsFiles) {
    StandIn qemu = guestWithSpoilt(swapDescriptors);
    for (int i = 0; i < 3; i++) {
        EXPECT_EQ(read(qemu), Reading::invalid);
        for (const std::string& image : images)
            EXPECT_FALSE(unit::isFree(image, unit::kLeaseByte));
    }
}

} // namespace
} // namespace leasehold::qemu

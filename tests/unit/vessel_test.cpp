// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Honest vessels: planted in a child that becomes QEMU by exec, found and read from another process.

#include "core/os/error.hpp"
#include "core/qemu/vessel.hpp"
#include "tests/support/unit_vessel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <tuple>

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::qemu {
namespace {

using unit::Child;
using unit::guestOf;
using unit::isFree;
using unit::kLeaseByte;
using unit::Line;
using unit::makeImages;
using unit::makeTag;
using unit::openLeases;
using unit::plantedGuest;
using unit::plantVessel;
using unit::StandIn;

const GuestTag kTag = makeTag(1);

class VesselInQemu : public unit::LeavesNoDescriptor {
protected:
    // Everything that was planted comes back, and each is the very same open file description.
    static void expectComplete(Vessel& vessel, const std::vector<std::string>& images) {
        ASSERT_EQ(vessel.leases().size(), images.size());
        for (std::size_t i = 0; i < images.size(); i++) {
            const StoredLease& lease = vessel.leases()[i];
            EXPECT_EQ(lease.path, images[i]);
            EXPECT_EQ(lease.mode, static_cast<Mode>(i % 3));
            EXPECT_EQ(lease.joined, i % 2 != 0);
            EXPECT_TRUE(lease.writable);
            EXPECT_EQ(os::identify(lease.lease.get(), lease.path), lease.file);
            EXPECT_EQ(os::tryLock(lease.lease.get(), os::LockType::write, {kLeaseByte, 1}, lease.path),
                      os::LockOutcome::granted);
            EXPECT_NE(fcntl(lease.lease.get(), F_GETFD) & FD_CLOEXEC, 0);
        }
    }

    // Of a QEMU that died, whoever looks at all guests of this machine may have a duplicate for a moment.
    static void expectHeld(const std::vector<std::string>& images, bool held) {
        for (const std::string& image : images) {
            for (int tries = 0; !held && !isFree(image, kLeaseByte) && tries < 1000; tries++)
                usleep(10000);
            EXPECT_EQ(!isFree(image, kLeaseByte), held) << image;
        }
    }

    unit::TempDir dir;
};

// libvirtd forks whenever it likes, and what it forks may keep copies of all descriptors for a while.
TEST_F(VesselInQemu, IsChangedThoughOtherThreadsForkProcessesThatKeepAllDescriptors) {
    StandIn qemu = plantedGuest(kTag, makeImages(dir, 2));
    std::atomic<bool> stop{false};
    std::vector<pid_t> children;
    std::thread forks([&] {
        while (!stop && children.size() < 400) {
            pid_t child = fork();
            if (child == 0) {
                pause();
                _exit(0);
            }
            children.push_back(child);
        }
    });
    std::string problem = unit::errorOf([&] {
        for (int i = 0; i < 500; i++) {
            auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
            unit::demand(vessel && vessel->tryReplace(), "cannot be changed");
        }
    });
    stop = true;
    forks.join();
    for (pid_t child : children) {
        ::kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
    }
    EXPECT_EQ(problem, "");
}

// unix(7), ETOOMANYREFS: what is in flight counts against its sender's user, if that has no privileges.
TEST_F(VesselInQemu, LimitOfDescriptorsInFlightIsNamedWithItsRemedy) {
    if (geteuid() != 0)
        GTEST_SKIP() << "needs root, to become a user whose descriptors nobody else has in flight";
    std::vector<std::string> images = unit::makeImages(dir, 60);
    unit::Child user([&](unit::Line&) {
        std::vector<StoredLease> leases = openLeases(images);
        VesselEnds ends;
        const rlimit low{30, 30};
        constexpr uid_t kUser = 54321;
        unit::demand(setrlimit(RLIMIT_NOFILE, &low) == 0 && setuid(kUser) == 0, "cannot become a user");
        std::string problem = unit::errorOf([&] {
            for (int i = 0; i < 2; i++)
                ends.plant(kTag, leases);
        });
        unit::demand(problem.find("ulimit -n") != problem.npos, problem);
    });
    EXPECT_EQ(user.join(), "");
}

// What is read without the descriptors is what is read with them.
void expectSameWithoutDescriptors(const StandIn& qemu, Vessel& vessel) {
    std::size_t before = unit::countDescriptors();
    auto manifest = Vessel::readManifest(qemu.process(), kTag.uuid);
    EXPECT_EQ(unit::countDescriptors(), before);
    ASSERT_TRUE(manifest);
    EXPECT_EQ(manifest->tag, vessel.tag());
    ASSERT_EQ(manifest->leases.size(), vessel.leases().size());
    for (std::size_t i = 0; i < manifest->leases.size(); i++) {
        const StoredLease &read = manifest->leases[i], &whole = vessel.leases()[i];
        EXPECT_EQ(std::tie(read.file, read.leaseFile, read.mode, read.writable, read.joined, read.remote, read.guarded,
                           read.flocksImage, read.named, read.lower, read.stage, read.path),
                  std::tie(whole.file, whole.leaseFile, whole.mode, whole.writable, whole.joined, whole.remote,
                           whole.guarded, whole.flocksImage, whole.named, whole.lower, whole.stage, whole.path));
    }
}

TEST_F(VesselInQemu, GivesBackWhatWasPlanted) {
    auto images = makeImages(dir, 3);
    StandIn qemu = plantedGuest(kTag, images);
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    EXPECT_EQ(vessel->tag(), kTag);
    EXPECT_FALSE(vessel->disordered());
    expectComplete(*vessel, images);
    expectSameWithoutDescriptors(qemu, *vessel);
}

TEST_F(VesselInQemu, KeepsTheLeaseAfterEveryCopyHereIsClosed) {
    auto images = makeImages(dir, 2);
    StandIn qemu = plantedGuest(kTag, images);
    expectHeld(images, true);
    for (int i = 0; i < 3; i++) {
        Vessel::retrieve(qemu.process(), kTag.uuid).reset();
        expectHeld(images, true);
    }
}

TEST_F(VesselInQemu, EndsItsLeasesWithQemuAndNotLater) {
    auto images = makeImages(dir, 2);
    for (int i = 0; i < 20; i++) {
        StandIn qemu = plantedGuest(kTag, images);
        const os::Process& process = qemu.process();
        expectHeld(images, true);
        kill(qemu.pid(), SIGKILL);
        ASSERT_TRUE(process.diedWithin(std::chrono::milliseconds(60'000)));
        expectHeld(images, false);
    }
}

TEST_F(VesselInQemu, KeepsTheLeaseWhenLibvirtdIsKilledWithIt) {
    auto images = makeImages(dir, 2);
    StandIn qemu = plantedGuest(kTag, images);
    Child libvirtd([&](Line& line) {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        unit::demand(vessel != nullptr, "no vessel");
        line.say();
        line.hear();
    });
    libvirtd.line().hear();
    libvirtd.kill();
    expectHeld(images, true);
    EXPECT_TRUE(Vessel::retrieve(qemu.process(), kTag.uuid)) << "nor is it locked out for ever";
}

TEST_F(VesselInQemu, IsNotTheSameAsOpeningQemusDescriptorThroughProc) {
    auto images = makeImages(dir, 1);
    StandIn qemu([&] {
        auto leases = openLeases(images);
        plantVessel(kTag, leases);
        unit::demand(dup2(leases[0].lease.get(), 100) == 100, "not duplicated");
    });
    os::Fd reopened = os::openFile("/proc/" + std::to_string(qemu.pid()) + "/fd/100", O_RDWR);
    EXPECT_EQ(os::tryLock(reopened.get(), os::LockType::write, {kLeaseByte, 1}, images[0]), os::LockOutcome::contended);
}

TEST_F(VesselInQemu, LeavesOnlyItsTwoEndsOpenInQemu) {
    auto images = makeImages(dir, 5);
    StandIn qemu = plantedGuest(kTag, images);
    EXPECT_EQ(qemu.process().descriptors(), (std::vector<int>{0, 1, 2, 250, 251}));
}

TEST_F(VesselInQemu, OfAGuestWithoutDisksIsThereForHotPlug) {
    StandIn qemu = plantedGuest(kTag, {});
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    EXPECT_TRUE(vessel->leases().empty());
    for (auto& lease : openLeases(makeImages(dir, 1)))
        vessel->leases().push_back(std::move(lease));
    (void)vessel->tryReplace();
    vessel.reset();
    EXPECT_FALSE(isFree(dir.path("disk0.img"), kLeaseByte));
    EXPECT_EQ(Vessel::retrieve(qemu.process(), kTag.uuid)->leases().size(), 1u);
}

TEST_F(VesselInQemu, CarriesHundredsOfLeases) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "RLIMIT_NOFILE cannot be raised";
    for (int count : {239, 240, 241, 300, 1000}) {
        auto images = makeImages(dir, count);
        StandIn qemu = plantedGuest(kTag, images);
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel) << count;
        expectComplete(*vessel, images);
        (void)vessel->tryReplace();
        vessel.reset();
        vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel) << count;
        expectComplete(*vessel, images);
        vessel.reset();
        expectHeld(images, true);
        qemu.kill();
        expectHeld(images, false);
    }
}

// A lease on the image, one in a lease file beside it, one of a directory, one of a directory for an image; 200 of
// each.
TEST_F(VesselInQemu, CarriesLeasesOfSeveralDescriptorsInOrder) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "may not open enough files";
    constexpr int kLeases = 800;
    auto images = makeImages(dir, kLeases);
    std::string other = dir.file("lease");
    auto imageOf = [](int i) { return i % 4 == 1 || i % 4 == 3; };
    auto directoryOf = [](int i) { return i % 4 >= 2; };
    StandIn qemu([&] {
        unit::demand(unit::mayOpen(4096), "too few descriptors");
        std::vector<StoredLease> leases;
        for (int i = 0; i < kLeases; i++) {
            StoredLease& lease = leases.emplace_back();
            lease.path = images[static_cast<std::size_t>(i)];
            lease.flocksImage = i % 3 == 0;
            lease.named = i % 5 == 0;
            lease.guarded = i % 7 == 0;
            lease.remote = i % 2 == 0;
            if (imageOf(i))
                lease.image = os::openFile(lease.path, O_RDWR);
            if (directoryOf(i))
                lease.directory = os::openFile(dir.path(), O_RDONLY | O_DIRECTORY);
            lease.lease = os::openFile(imageOf(i) || directoryOf(i) ? other : lease.path, O_RDWR);
            lease.file = os::identify(imageOf(i)       ? lease.image.get()
                                      : directoryOf(i) ? lease.directory.get()
                                                       : lease.lease.get(),
                                      lease.path);
            lease.leaseFile = os::identify(directoryOf(i) ? lease.directory.get() : lease.lease.get(), lease.path);
        }
        plantVessel(kTag, leases);
    });
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    for (bool replaced : {false, true}) {
        if (replaced) {
            ASSERT_TRUE(vessel->tryReplace());
            vessel.reset();
            vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        }
        ASSERT_EQ(vessel->leases().size(), static_cast<std::size_t>(kLeases));
        expectSameWithoutDescriptors(qemu, *vessel);
        for (int i = 0; i < kLeases; i++) {
            SCOPED_TRACE(i);
            const StoredLease& lease = vessel->leases()[static_cast<std::size_t>(i)];
            ASSERT_EQ(lease.path, images[static_cast<std::size_t>(i)]);
            ASSERT_EQ(lease.image.open(), imageOf(i));
            ASSERT_EQ(lease.directory.open(), directoryOf(i));
            if (imageOf(i)) {
                EXPECT_EQ(os::identify(lease.image.get(), lease.path), lease.file);
            }
            EXPECT_EQ(os::identify(directoryOf(i) ? lease.directory.get() : lease.lease.get(), lease.path),
                      lease.leaseFile);
            EXPECT_EQ(std::tuple(lease.flocksImage, lease.named, lease.guarded, lease.remote),
                      std::tuple(i % 3 == 0, i % 5 == 0, i % 7 == 0, i % 2 == 0));
        }
    }
}

TEST_F(VesselInQemu, RefusesMoreLeasesThanItCanKeep) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "RLIMIT_NOFILE cannot be raised";
    std::vector<std::string> images(2049, dir.file("disk.img"));
    try {
        StandIn qemu([&] { plantVessel(kTag, openLeases(images, false)); });
        FAIL() << "planted";
    } catch (const std::runtime_error& error) {
        EXPECT_NE(std::string(error.what()).find("2049 leases"), std::string::npos) << error.what();
    }
}

TEST_F(VesselInQemu, CarriesTheLongestPathsAndNames) {
    GuestTag tag = kTag;
    tag.name = std::string(1024, 'n');
    auto images = makeImages(dir, 40);
    std::string path(4096, 'p');
    StandIn qemu([&] {
        auto leases = openLeases(images);
        for (StoredLease& lease : leases)
            lease.path = path;
        plantVessel(tag, leases);
    });
    auto vessel = Vessel::retrieve(qemu.process(), tag.uuid);
    ASSERT_TRUE(vessel);
    EXPECT_EQ(vessel->tag(), tag);
    ASSERT_EQ(vessel->leases().size(), images.size());
    EXPECT_EQ(vessel->leases().back().path, path);
    expectHeld(images, true);
}

TEST_F(VesselInQemu, IsFoundWhereverItsEndsAre) {
    auto images = makeImages(dir, 1);
    StandIn qemu([&] {
        for (int number = 240; number < 300; number++)
            unit::demand(dup2(STDIN_FILENO, number) == number, "not duplicated");
        plantVessel(kTag, openLeases(images));
    });
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    expectComplete(*vessel, images);
    (void)vessel->tryReplace();
    vessel.reset();
    EXPECT_TRUE(Vessel::retrieve(qemu.process(), kTag.uuid));
}

TEST_F(VesselInQemu, IsFoundAmongManyOtherSockets) {
    auto images = makeImages(dir, 1);
    StandIn qemu([&] {
        unit::ForgedVessel noise;
        noise.send("leasehld", {});
        for (int i = 0; i < 100; i++) {
            int pair[2];
            int type = i % 3 == 0 ? SOCK_SEQPACKET : i % 3 == 1 ? SOCK_STREAM : SOCK_DGRAM;
            unit::demand(socketpair(AF_UNIX, type, 0, pair) == 0, "no socket pair");
            (void)send(pair[0], std::string(200, 'x').data(), i, MSG_DONTWAIT);
        }
        unit::demand(socket(AF_INET, SOCK_STREAM, 0) >= 0, "no socket");
        plantVessel(kTag, openLeases(images));
    });
    std::size_t before = qemu.process().descriptors().size();
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    expectComplete(*vessel, images);
    EXPECT_EQ(qemu.process().descriptors().size(), before);
}

TEST_F(VesselInQemu, IsPlantedUnderALowLimitOfDescriptorsToo) {
    auto images = makeImages(dir, 2);
    StandIn qemu([&] {
        auto leases = openLeases(images);
        rlimit limit{64, 64};
        unit::demand(setrlimit(RLIMIT_NOFILE, &limit) == 0, "the limit was not set");
        plantVessel(kTag, leases);
    });
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    expectComplete(*vessel, images);
}

TEST_F(VesselInQemu, OfAnotherGuestIsNotTaken) {
    auto images = makeImages(dir, 1);
    StandIn qemu = plantedGuest(kTag, images);
    EXPECT_FALSE(Vessel::retrieve(qemu.process(), makeTag(2).uuid));
    StandIn bare([] {});
    EXPECT_FALSE(Vessel::retrieve(bare.process(), kTag.uuid)) << "a guest that was started without leasehold";
}

TEST_F(VesselInQemu, OfADeadProcessIsAnErrorOrNothing) {
    StandIn qemu = plantedGuest(kTag, makeImages(dir, 1));
    pid_t pid = qemu.pid();
    const os::Process& process = qemu.process();
    qemu.kill();
    EXPECT_THROW(Vessel::retrieve(process, kTag.uuid), Error);
    EXPECT_EQ(guestOf(pid), std::nullopt);
}

TEST_F(VesselInQemu, SaysWhoseItIs) {
    StandIn qemu = plantedGuest(kTag, makeImages(dir, 2)), bare([] {});
    EXPECT_EQ(guestOf(qemu.pid()), kTag);
    EXPECT_EQ(guestOf(bare.pid()), std::nullopt);
    EXPECT_EQ(guestOf(1), std::nullopt);
}

TEST_F(VesselInQemu, SaysWhoseItIsThoughItHasHundredsOfLeases) {
    auto images = makeImages(dir, 300);
    StandIn qemu([&] {
        VesselEnds ends; // before the leases take its numbers
        ends.plant(kTag, openLeases(images));
        ends.leaveToQemu();
    });
    EXPECT_EQ(guestOf(qemu.pid()), kTag) << "a refused guest would not be told who has the image";
}

// A QEMU with many passed descriptors; a command under `leasehold run` within another; what that starts.
TEST_F(VesselInQemu, IsFoundOnceWhereverItIsAndWhoeverInheritedIt) {
    const unsigned own = static_cast<unsigned>(getpid()); // other tests run on this host at the same time
    const GuestTag outer = makeTag(own), inner = makeTag(own + 1);
    auto images = makeImages(dir, 2);
    StandIn qemu([&] {
        plantVessel(outer, openLeases({images[0]}));
        for (int number = 252; number < 400; number++)
            unit::demand(dup2(0, number) == number, "no such number");
        plantVessel(inner, openLeases({images[1]}));
        if (pid_t heir = fork(); heir == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            syscall(__NR_close_range, 3, 249, 0);
            syscall(__NR_close_range, 410, ~0u, 0);
            pause();
            _exit(0);
        }
    });
    const HostGuests found = findGuests(std::chrono::seconds(60));
    EXPECT_TRUE(found.complete);
    for (const GuestTag& tag : {outer, inner}) {
        std::vector<RunningGuest> seen;
        std::copy_if(found.guests.begin(), found.guests.end(), std::back_inserter(seen),
                     [&](const RunningGuest& guest) { return guest.tag == tag; });
        ASSERT_EQ(seen.size(), 1u);
        EXPECT_EQ(seen[0].pid, qemu.pid());
        EXPECT_EQ(seen[0].holders.size(), 2u);
    }
}

// Whoever is refused is told his name all the same, while an ordinary change goes on.
TEST_F(VesselInQemu, InWhichSomebodyStandsSaysWhoseItIs) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "RLIMIT_NOFILE cannot be raised";
    StandIn qemu = plantedGuest(kTag, makeImages(dir, 300));
    int number = qemu.process().descriptors().back();
    auto out = qemu.process().takeDescriptor(number);
    ASSERT_TRUE(out);
    for (int position : {0, 100, 1 << 30}) {
        ASSERT_EQ(setsockopt(out->get(), SOL_SOCKET, SO_PEEK_OFF, &position, sizeof position), 0);
        EXPECT_EQ(guestOf(qemu.pid()), kTag) << position;
    }
}

TEST_F(VesselInQemu, ReaderThatWasKilledHasNotLeftItsPositionBehind) {
    if (!unit::mayOpen(4096))
        GTEST_SKIP() << "RLIMIT_NOFILE cannot be raised";
    auto images = makeImages(dir, 300);
    StandIn qemu = plantedGuest(kTag, images);
    for (int position : {0, 1, 100, 70'000, 1 << 30}) {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel);
        int number = 3;
        for (int candidate : qemu.process().descriptors())
            number = std::max(number, candidate);
        auto out = qemu.process().takeDescriptor(number);
        ASSERT_TRUE(out);
        vessel.reset();
        ASSERT_EQ(setsockopt(out->get(), SOL_SOCKET, SO_PEEK_OFF, &position, sizeof position), 0);
        vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel) << position;
        expectComplete(*vessel, images);
    }
}

TEST_F(VesselInQemu, ThatCannotBeReadWholeForWantOfDescriptorsIsAnErrorAndLosesNothing) {
    auto images = makeImages(dir, 20);
    StandIn qemu = plantedGuest(kTag, images);
    Child libvirtd([&](Line&) {
        rlimit old;
        getrlimit(RLIMIT_NOFILE, &old);
        const os::Process& process = qemu.process();
        std::size_t before = unit::countDescriptors();
        bool reached = false;
        // From "not even the socket" over "some of the leases" to "all".
        for (rlim_t room = 0; room < 30 && !reached; room++) {
            rlimit limit{static_cast<rlim_t>(process.descriptors().empty() ? 0 : before - 1 + room), old.rlim_max};
            setrlimit(RLIMIT_NOFILE, &limit);
            bool refused = false;
            try {
                auto vessel = Vessel::retrieve(process, kTag.uuid);
                reached = vessel && vessel->leases().size() == images.size();
                refused = !vessel && room < 3; // not even /proc could be read
            } catch (const SystemError& error) {
                refused = error.error() == EMFILE;
            }
            setrlimit(RLIMIT_NOFILE, &old);
            unit::demand(reached || refused, "part of the leases was taken for all at " + std::to_string(room));
            unit::demand(unit::countDescriptors() == before, "descriptors were leaked at " + std::to_string(room));
        }
        unit::demand(reached, "never reached");
    });
    EXPECT_EQ(libvirtd.join(), "");
    expectHeld(images, true);
}

// The position of a walk belongs to the socket, not to the reader: two readers must not push each other on.
TEST_F(VesselInQemu, IsReadWholeByTwoReadersAtOnce) {
    auto images = makeImages(dir, 2);
    auto readMany = [&](const StandIn& qemu, std::size_t expected, const std::atomic<bool>* stop) {
        os::Process process(qemu.pid());
        for (int i = 0; stop ? !*stop : i < 4000; i++) {
            if (i % 200 == 0)
                (void)guestOf(qemu.pid()); // gives up where the others read all the time
            auto vessel = Vessel::retrieve(process, kTag.uuid);
            unit::demand(vessel && vessel->leases().size() == expected, "another set was read than the newest");
        }
    };
    for (int generations : {1, 2}) {
        StandIn qemu([&] {
            unit::ForgedVessel forged;
            auto leases = openLeases(images);
            if (generations == 2)
                forged.send(forged.message(kTag, {}, 1));
            forged.send(forged.message(kTag, leases, 2));
        });
        Child other([&](Line&) {
            std::atomic<bool> never = false;
            readMany(qemu, images.size(), &never);
        });
        EXPECT_NO_THROW(readMany(qemu, images.size(), nullptr)) << generations;
        bool died = os::Process(other.pid()).diedWithin(std::chrono::milliseconds(0));
        EXPECT_EQ(died ? other.join() : "", "") << generations;
    }
}

} // namespace
} // namespace leasehold::qemu

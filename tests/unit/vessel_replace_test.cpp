// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Changes of a vessel: at no instant a lease is in nobody's hands, whoever dies when.

#include "core/os/error.hpp"
#include "core/qemu/vessel.hpp"
#include "tests/support/unit_vessel.hpp"

#include <algorithm>

#include <fcntl.h>
#include <sys/socket.h>

namespace leasehold::qemu {
namespace {

using unit::Child;
using unit::ForgedVessel;
using unit::Forgery;
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

class VesselReplace : public unit::LeavesNoDescriptor {
protected:
    static std::vector<std::string> pathsIn(const StandIn& qemu) {
        std::vector<std::string> paths;
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        if (!vessel)
            return {"no vessel"};
        for (const StoredLease& lease : vessel->leases())
            paths.push_back(lease.path);
        return paths;
    }

    unit::TempDir dir;
};

TEST_F(VesselReplace, AddsAndDropsLeases) {
    auto images = makeImages(dir, 3);
    StandIn qemu = plantedGuest(kTag, {images[0], images[1]});
    {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        for (StoredLease& lease : openLeases({images[2]}))
            vessel->leases().push_back(std::move(lease));
        vessel->leases().erase(vessel->leases().begin());
        (void)vessel->tryReplace();
    }
    EXPECT_EQ(pathsIn(qemu), (std::vector{images[1], images[2]}));
    EXPECT_TRUE(isFree(images[0], kLeaseByte)) << "nobody holds what was dropped";
    EXPECT_FALSE(isFree(images[1], kLeaseByte));
    EXPECT_FALSE(isFree(images[2], kLeaseByte));
}

TEST_F(VesselReplace, ManyTimesDoesNotFillTheQueue) {
    auto images = makeImages(dir, 5);
    StandIn qemu = plantedGuest(kTag, images);
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    for (int i = 0; i < 2000; i++)
        (void)vessel->tryReplace();
    vessel.reset();
    vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    EXPECT_FALSE(vessel->disordered());
    EXPECT_EQ(vessel->leases().size(), 5u);
}

TEST_F(VesselReplace, NeverLetsARivalIn) {
    auto images = makeImages(dir, 2);
    StandIn qemu = plantedGuest(kTag, images);
    Child rival([&](Line& line) {
        os::Fd fd = os::openFile(images[1], O_RDWR);
        line.say();
        for (;;)
            if (os::tryLock(fd.get(), os::LockType::write, {kLeaseByte, 1}, images[1]) == os::LockOutcome::granted)
                throw std::runtime_error("a rival got the lease");
    });
    rival.line().hear();
    for (int i = 0; i < 1500; i++) {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel);
        (void)vessel->tryReplace();
    }
    EXPECT_FALSE(os::Process(rival.pid()).diedWithin(std::chrono::milliseconds(0)));
}

// The proof of the order "append, then consume": libvirtd's own copies hide a wrong one unless libvirtd dies.
TEST_F(VesselReplace, KilledAtAnySystemCallKeepsEveryLeaseAndTheVesselReadable) {
    for (std::size_t longPath : {0, 4000}) { // one message, or two with the longest paths
        auto images = makeImages(dir, longPath ? 20 : 2);
        StandIn qemu([&] {
            auto leases = openLeases(images);
            for (StoredLease& lease : leases)
                lease.path.resize(std::max(lease.path.size(), longPath), '/');
            plantVessel(kTag, leases);
        });
        const os::Process& process = qemu.process();
        bool disorder = false;
        auto replace = [&] {
            auto vessel = Vessel::retrieve(process, kTag.uuid);
            unit::demand(vessel != nullptr, "no vessel");
            (void)vessel->tryReplace();
        };
        int deaths = 0;
        // Now and then an allocator makes a call of its own, and the one that tells is passed over.
        for (int tries = 0; tries < 5 && deaths >= 0 && !disorder; tries++)
            deaths = unit::killAtEverySystemCall(replace, [&](int stop) {
                for (const std::string& image : {images.front(), images.back()})
                    ASSERT_FALSE(isFree(image, kLeaseByte)) << "killed at stop " << stop;
                auto vessel = Vessel::retrieve(process, kTag.uuid);
                ASSERT_TRUE(vessel) << stop;
                ASSERT_EQ(vessel->leases().size(), images.size()) << stop;
                disorder = disorder || vessel->disordered();
                (void)vessel->tryReplace(); // so that the next one begins with a vessel in order
            });
        if (deaths < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(deaths, 10);
        EXPECT_TRUE(disorder) << "no death fell between the two halves";
        EXPECT_EQ(pathsIn(qemu).size(), images.size());
        for (const std::string& image : images)
            ASSERT_FALSE(isFree(image, kLeaseByte));
    }
}

class VesselAfterAnInterruptedChange : public VesselReplace {
protected:
    // A QEMU whose queue holds what `fill` sends.
    template <typename Fill>
    static StandIn guestWith(Fill fill) {
        return StandIn([&] {
            ForgedVessel forged;
            fill(forged);
        });
    }

    std::vector<std::string> images = makeImages(dir, 3);
};

TEST_F(VesselAfterAnInterruptedChange, TheNewestCompleteGenerationCounts) {
    StandIn qemu = guestWith([&](ForgedVessel& forged) {
        forged.send(forged.message(kTag, openLeases({images[0]}), 1));
        forged.send(forged.message(kTag, openLeases({images[1]}), 2));
        forged.send(forged.message(kTag, openLeases({images[2]}), 5));
    });
    {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel);
        EXPECT_TRUE(vessel->disordered());
        ASSERT_EQ(vessel->leases().size(), 1u);
        EXPECT_EQ(vessel->leases()[0].path, images[2]);
        (void)vessel->tryReplace();
        EXPECT_FALSE(vessel->disordered());
    }
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    EXPECT_FALSE(vessel->disordered());
    EXPECT_TRUE(isFree(images[0], kLeaseByte));
    EXPECT_TRUE(isFree(images[1], kLeaseByte));
    EXPECT_FALSE(isFree(images[2], kLeaseByte));
}

TEST_F(VesselAfterAnInterruptedChange, AnIncompleteGenerationDoesNotCount) {
    StandIn qemu = guestWith([&](ForgedVessel& forged) {
        forged.send(forged.message(kTag, openLeases({images[0]}), 1));
        auto leases = openLeases({images[1]});
        Forgery half = forged.message(kTag, leases, 2);
        half.header.parts = 2;
        half.header.totalLeases = 2;
        forged.send(half);
    });
    auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
    ASSERT_TRUE(vessel);
    EXPECT_TRUE(vessel->disordered());
    ASSERT_EQ(vessel->leases().size(), 1u);
    EXPECT_EQ(vessel->leases()[0].path, images[0]);
    (void)vessel->tryReplace();
    vessel.reset();
    EXPECT_EQ(pathsIn(qemu), std::vector{images[0]});
    EXPECT_FALSE(isFree(images[0], kLeaseByte));
    EXPECT_TRUE(isFree(images[1], kLeaseByte));
}

TEST_F(VesselAfterAnInterruptedChange, AnIncompleteGenerationBetweenCompleteOnesIsPassedOver) {
    StandIn qemu = guestWith([&](ForgedVessel& forged) {
        forged.send(forged.message(kTag, openLeases({images[0]}), 1));
        auto leases = openLeases({images[1]});
        Forgery half = forged.message(kTag, leases, 2);
        half.header.parts = 3;
        half.header.totalLeases = 3;
        forged.send(half);
        forged.send(forged.message(kTag, openLeases({images[2]}), 3));
    });
    EXPECT_EQ(pathsIn(qemu), std::vector{images[2]});
}

TEST_F(VesselAfterAnInterruptedChange, ConsumptionThatStoppedHalfwayHarmsNothing) {
    // The second half of an old generation of two parts is still there.
    StandIn qemu = guestWith([&](ForgedVessel& forged) {
        auto leases = openLeases({images[0]});
        Forgery half = forged.message(kTag, leases, 1);
        half.header.part = 1;
        half.header.parts = 2;
        half.header.totalLeases = 2;
        forged.send(half);
        forged.send(forged.message(kTag, openLeases({images[1], images[2]}), 2));
    });
    EXPECT_EQ(pathsIn(qemu), (std::vector{images[1], images[2]}));
}

TEST_F(VesselAfterAnInterruptedChange, FailureForWantOfRoomLeavesTheOldSet) {
    StandIn qemu = plantedGuest(kTag, images);
    {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel);
        auto in = qemu.process().takeDescriptor(250);
        ASSERT_TRUE(in);
        int tiny = 1;
        ASSERT_EQ(setsockopt(in->get(), SOL_SOCKET, SO_SNDBUF, &tiny, sizeof tiny), 0);
        StoredLease copy = std::move(vessel->leases().back());
        vessel->leases().pop_back();
        std::string path(4000, 'p');
        for (StoredLease& lease : vessel->leases())
            lease.path = path;
        EXPECT_THROW((void)vessel->tryReplace(), SystemError);
    }
    EXPECT_EQ(pathsIn(qemu), images);
    for (const std::string& image : images)
        EXPECT_FALSE(isFree(image, kLeaseByte));
}

// A change that failed in its second message and is tried again on the same Vessel.
TEST_F(VesselAfterAnInterruptedChange, FailureInTheMiddleCanBeTriedAgain) {
    StandIn qemu = plantedGuest(kTag, images);
    {
        auto vessel = Vessel::retrieve(qemu.process(), kTag.uuid);
        ASSERT_TRUE(vessel);
        auto in = qemu.process().takeDescriptor(250);
        ASSERT_TRUE(in);
        // The kernel doubles it: enough for one message of 60 KB beside the old one, not for two.
        int small = 30'500, large = 1 << 20;
        ASSERT_EQ(setsockopt(in->get(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small), 0);
        std::vector<StoredLease>& leases = vessel->leases();
        for (int i = 0; i < 30; i++)
            for (StoredLease& lease : openLeases({dir.file("more" + std::to_string(i))})) {
                lease.path = std::string(4000, 'p');
                leases.push_back(std::move(lease));
            }
        EXPECT_THROW((void)vessel->tryReplace(), SystemError);
        ASSERT_EQ(setsockopt(in->get(), SOL_SOCKET, SO_SNDBUF, &large, sizeof large), 0);
        EXPECT_TRUE(vessel->tryReplace());
    }
    auto paths = pathsIn(qemu);
    EXPECT_EQ(paths.size(), 33u);
}

TEST_F(VesselAfterAnInterruptedChange, OfAGuestWithManyMessagesIsStillReadable) {
    // Two generations of 40 messages: what a change of 600 leases with the longest paths leaves when it is killed
    // right before it consumes the old one.
    StandIn qemu = guestWith([&](ForgedVessel& forged) {
        int size = 64 << 20;
        (void)setsockopt(forged.in(), SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
        for (std::uint64_t generation : {1, 2})
            for (std::uint32_t part = 0; part < 40; part++) {
                Forgery message = forged.message(kTag, {}, generation);
                message.header.part = part;
                message.header.parts = 40;
                forged.send(message);
            }
    });
    std::unique_ptr<Vessel> vessel;
    EXPECT_NO_THROW(vessel = Vessel::retrieve(qemu.process(), kTag.uuid));
}

} // namespace
} // namespace leasehold::qemu

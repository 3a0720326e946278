// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// A QEMU that was broken into can do to its vessel what it likes. It may lose its own leases. It may not crash or hang
// libvirtd, leak into it, or make it lock or unlock anything of anybody else.

#include "tests/plugin/libvirtd.hpp"

#include <chrono>
#include <csignal>
#include <thread>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::plugin_test {
namespace {

using namespace std::chrono_literals;

constexpr long long kOwnerByte = 1LL << 62; // where leasehold's locks begin

// The wire format's offsets, as in hostile_qemu.c.
class Hostile : public PluginTest {
protected:
    Hostile() {
        qemu_.takeOver();
        EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), disks_)));
        before_ = host_.descriptors();
        victim_ = boot(host_, rival_, {{treasure_}});
        treasureLocks_ = kernelLocksOn(treasure_).size();
    }

    void order(const std::string& line) { ASSERT_EQ(qemu_.command(line), "ok") << line; }

    // A grant must be true, whatever the vessel says: the guest's own lease is really there.
    Outcome acquire(const std::vector<Disk>& disks) {
        Outcome outcome = host_.acquire(guest_, running_.pid(), disks);
        for (const Disk& disk : disks)
            EXPECT_TRUE(!outcome.ok || locksOnByte(disk.path, kOwnerByte) == 1) << "granted, but nobody holds a lease";
        return outcome;
    }

    // Every call that libvirtd may make now ends soon, with a clear answer, and with nothing left open.
    void callEverything() {
        const Outcome outcomes[] = {
            host_.acquire(guest_, running_.pid(), disks_),
            host_.acquire(guest_, running_.pid(), added_),
            host_.release(guest_, running_.pid(), disks_),
            host_.inquire(guest_, running_.pid(), disks_),
            host_.acquire(guest_, running_.pid(), {{disk_, 1}}),
            host_.detach(guest_, running_.pid(), added_),
            acquire({{treasure_}}),
            host_.detach(guest_, running_.pid(), {{treasure_}}),
            host_.detach(guest_, running_.pid(), disks_),
        };
        for (const Outcome& outcome : outcomes) {
            EXPECT_LT(outcome.elapsed, 60s) << outcome.message();
            EXPECT_TRUE(outcome.ok || !outcome.message().empty());
        }
        EXPECT_FALSE(outcomes[6].ok) << "the hostile guest was given its victim's image";
    }

    void TearDown() override {
        EXPECT_EQ(host_.descriptors(), before_);
        EXPECT_EQ(kernelLocksOn(treasure_).size(), treasureLocks_) << "the victim's locks were touched";
        // Others go on undisturbed.
        EXPECT_TRUE(granted(host_.acquire(rival_, victim_.pid(), {{treasure_}})));
        EXPECT_TRUE(granted(host_.start(support::makeGuest("calm", 7), {{image("calm.img")}})));
        // And whatever it was, it ends with the process.
        running_.qemu->kill();
        EXPECT_TRUE(kernelLocksOn(disk_).empty());
        EXPECT_TRUE(kernelLocksOn(added_[0].path).empty());
    }

    std::string disk_ = image("disk.img"), treasure_ = image("treasure.img");
    std::vector<Disk> disks_{{disk_}, {image("second.img")}}, added_{{image("added.img")}};
    Puppeteer qemu_{path("control")};
    Libvirtd quiet_;
    Libvirtd host_{{.hostile = true, .control = path("control")}};
    Started running_ = host_.start(guest_, disks_);
    Started victim_;
    std::size_t before_ = 0;
    std::size_t treasureLocks_ = 0;
};

TEST_F(Hostile, ObedientQemuIsNoTrouble) {
    EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), added_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running_.pid(), added_)));
}

TEST_F(Hostile, DrainedVesselIsNotTakenForALease) {
    order("drain");
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), disks_));
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), added_));
    EXPECT_TRUE(kernelLocksOn(added_[0].path).empty());
    callEverything();
}

TEST_F(Hostile, LeasesThatQemuTookOutAreStillItsOwnOnly) {
    order("keep");
    EXPECT_TRUE(leased(disk_));
    callEverything();
}

TEST_F(Hostile, FloodedVesselRefusesMore) {
    order("flood");
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), added_));
    callEverything();
}

TEST_F(Hostile, FullVesselOfTrueMessagesIsReadInBoundedTime) {
    order("refill");
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), added_));
    callEverything();
}

TEST_F(Hostile, EmptyMessageIsNoEnd) {
    order("flood-empty");
    callEverything();
}

TEST_F(Hostile, ClosedSenderRefusesMore) {
    order("close-sender");
    EXPECT_FALSE(acquire(added_));
    EXPECT_TRUE(kernelLocksOn(added_[0].path).empty());
    callEverything();
}

TEST_F(Hostile, ClosedReceiverTakesTheLeasesAlong) {
    order("close-receiver");
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
    EXPECT_FALSE(acquire(disks_));
    EXPECT_FALSE(acquire(added_));
    EXPECT_TRUE(kernelLocksOn(added_[0].path).empty()) << "a lease that nobody holds was granted";
    callEverything();
}

TEST_F(Hostile, ClosedPairTakesTheLeasesAlong) {
    order("close-both");
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
    EXPECT_FALSE(acquire(disks_));
    EXPECT_FALSE(acquire(added_));
    callEverything();
}

TEST_F(Hostile, ShutDownPairRefusesMore) {
    order("shutdown");
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), added_));
    callEverything();
}

TEST_F(Hostile, SwappedDescriptorsAreRefusedWhereAFileDecides) {
    order("swap " + treasure_);
    EXPECT_TRUE(refused(host_.acquire(guest_, running_.pid(), added_), kFailed, {"damaged"}));
    EXPECT_TRUE(refused(host_.acquire(guest_, running_.pid(), {disks_[0]}), kFailed, {"damaged"}));
    EXPECT_TRUE(refused(host_.detach(guest_, running_.pid(), {disks_[1]}), kFailed, {"damaged"}));
    EXPECT_TRUE(kernelLocksOn(added_[0].path).empty());
}

// Such a call takes the leases as they are. What it locks through a descriptor of QEMU's, QEMU can lock itself; it does
// not get its victim's lease, does not keep the victim from running, and has nothing when that descriptor goes.
TEST_F(Hostile, SwappedDescriptorsGiveItNothingWhenItStopsAndRuns) {
    order("swap " + treasure_);
    const StateOutcome state = host_.release(guest_, running_.pid(), disks_);
    (void)host_.inquire(guest_, running_.pid(), disks_);
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), disks_, {.state = state.state}));
    EXPECT_TRUE(granted(host_.acquire(rival_, victim_.pid(), {{treasure_}})));
    order("swap " + disk_);
}

TEST_F(Hostile, RefusalNamesTheGuestWhoseVesselIsDamaged) {
    order("strip");
    EXPECT_TRUE(refused(host_.acquire(guest_, running_.pid(), disks_), kFailed,
                        {"'web'", std::to_string(running_.pid()), "destroy and start"}));
}

TEST_F(Hostile, ConsistentLieAboutAnotherGuestsFileIsNotActedOn) {
    order("point " + treasure_);
    callEverything();
}

TEST_F(Hostile, StrippedDescriptorsAreRefused) {
    order("strip");
    EXPECT_FALSE(host_.acquire(guest_, running_.pid(), disks_));
    callEverything();
}

TEST_F(Hostile, PeekPositionThatQemuSetIsNotFollowed) {
    order("peek-off 100000");
    EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), disks_)));
    callEverything();
}

TEST_F(Hostile, VesselMovedToAnotherNumberIsFoundOrMissedButNothingElse) {
    order("move 77");
    callEverything();
}

TEST_F(Hostile, ThousandsOfSocketsDoNotHoldLibvirtdUp) {
    order("sockets 4000");
    callEverything();
}

TEST_F(Hostile, LockOnItsOwnProcDirectoryHoldsNobodyUpForLong) {
    order("hold-directory");
    for (const std::vector<Disk>& disks : {disks_, added_}) {
        const Outcome outcome = acquire(disks);
        EXPECT_LT(outcome.elapsed, 60s);
        EXPECT_TRUE(outcome.ok || outcome.message().find("'web'") != std::string::npos) << outcome.message();
    }
    // A stranger's refusal only wants to know the name.
    const Outcome refusal = stranger().start(support::makeGuest("third", 3), disks_);
    EXPECT_LT(refusal.elapsed, 60s);
    EXPECT_TRUE(refused(refusal, kBusy, {"'web'"}));
}

TEST_F(Hostile, QemuThatIsStoppedAnswersAllTheSame) {
    running_.qemu->signal(SIGSTOP);
    EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), added_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running_.pid(), added_)));
    running_.qemu->signal(SIGCONT);
}

TEST_F(Hostile, ChangesUnderLibvirtdsHandsDoNoHarm) {
    order("race");
    const auto end = std::chrono::steady_clock::now() + 300ms;
    while (std::chrono::steady_clock::now() < end && !HasFailure())
        callEverything();
}

// One field of the header is wrong: offset, size, value.
class HostileHeader : public Hostile, public testing::WithParamInterface<const char*> {};

TEST_P(HostileHeader, IsRefusedUnlessTheLeasesAreThereAllTheSame) {
    order(GetParam());
    acquire(disks_);
    acquire(added_);
    callEverything();
}

INSTANTIATE_TEST_SUITE_P(Field, HostileHeader,
                         testing::Values("patch 0 1 88",           // magic
                                         "patch 8 4 2",            // version
                                         "patch 12 2 0",           // header size
                                         "patch 12 2 65535",       //
                                         "patch 14 2 0",           // entry size
                                         "patch 14 2 65535",       //
                                         "patch 16 1 255",         // uuid
                                         "patch 36 4 4294967295",  // length of the name
                                         "patch 36 4 1025",        //
                                         "patch 48 4 7",           // part
                                         "patch 52 4 0",           // parts
                                         "patch 52 4 4294967295",  //
                                         "patch 52 4 2",           //
                                         "patch 56 4 0",           // leases in this message
                                         "patch 56 4 241",         //
                                         "patch 56 4 4294967295",  //
                                         "patch 60 4 0",           // leases in all
                                         "patch 60 4 4294967295",  //
                                         "patch 64 4 0",           // numbers of the ends
                                         "patch 64 4 4294967295",  //
                                         "patch 68 4 1",           //
                                         "patch 72 8 1",           // inodes of the ends
                                         "patch 80 8 1",           //
                                         "patch 91 8 1",           // the first entry's file, behind the name "web"
                                         "patch 111 4 4294967295", // the length of its path
                                         "cut 1", "cut 87", "cut 88", "cut 100", "lengthen 1", "lengthen 1000",
                                         "lengthen 60000"),
                         [](const auto& value) {
                             std::string name = value.param;
                             for (char& c : name)
                                 c = c == ' ' ? '_' : c;
                             return name;
                         });

// The queue as a libvirtd leaves it that dies within a change: how many messages of the old set are consumed, and how
// many of the new set have arrived. 300 disks are two messages.
class Interrupted : public PluginTest, public testing::WithParamInterface<std::pair<int, int>> {};

TEST_P(Interrupted, ChangeIsSetRightByTheNextCall) {
    const std::vector<Disk> many = images(300), added{{image("added.img")}};
    Puppeteer qemu(path("control"));
    Libvirtd host({.hostile = true, .control = path("control")});
    const Started running = boot(host, guest_, many);
    qemu.takeOver();
    const auto [gone, arrived] = GetParam();
    ASSERT_EQ(qemu.command("interrupt " + std::to_string(gone) + " " + std::to_string(arrived)), "ok");
    EXPECT_TRUE(granted(host.acquire(guest_, running.pid(), many)));
    EXPECT_TRUE(granted(host.acquire(guest_, running.pid(), added)));
    EXPECT_TRUE(granted(host.detach(guest_, running.pid(), added)));
    const StateOutcome state = host.release(guest_, running.pid(), many);
    EXPECT_TRUE(granted(state));
    EXPECT_TRUE(granted(host.acquire(guest_, running.pid(), many, {.state = state.state})));
    for (std::size_t i : {0u, 150u, 299u})
        EXPECT_TRUE(leased(many[i].path));
    running.qemu->closes(many[299].path);
    EXPECT_TRUE(granted(host.detach(guest_, running.pid(), {many[299]})));
    EXPECT_TRUE(kernelLocksOn(many[299].path).empty());
}

INSTANTIATE_TEST_SUITE_P(Change, Interrupted,
                         testing::Values(std::pair(0, 1), std::pair(0, 2), std::pair(1, 2), std::pair(2, 2)),
                         [](const auto& value) {
                             return std::to_string(value.param.first) + "Gone" + std::to_string(value.param.second) +
                                    "Arrived";
                         });

} // namespace
} // namespace leasehold::plugin_test

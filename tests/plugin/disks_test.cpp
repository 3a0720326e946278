// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Images that come and go while the guest is there: hot-plug, snapshots, block jobs; many of them; one of them under
// several names; and the modes in which guests may share one.

#include "tests/plugin/libvirtd.hpp"

#include <filesystem>

#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

namespace leasehold::plugin_test {
namespace {

constexpr unsigned kReadOnly = LOCK_RESOURCE_READONLY, kShared = LOCK_RESOURCE_SHARED;

class Disks : public PluginTest {
protected:
    std::string disk_ = image("disk.img"), other_ = image("other.img");
    std::vector<Disk> disks_{{disk_}}, others_{{other_}};
    Libvirtd host_;
};

TEST_F(Disks, AttachedImageIsLeasedBeforeQemuOpensIt) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, DetachedImageIsFreeAtOnceAndTheOthersAreNot) {
    const Started running = boot(host_, guest_, {{disk_}, {other_}});
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(free(other_));
    EXPECT_TRUE(kernelLocksOn(other_).empty());
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, AttachOfAnotherGuestsImageIsRefusedAndChangesNothing) {
    const Started running = boot(host_, guest_, disks_);
    const Started rival = boot(stranger(), rival_, others_);
    const auto before = kernelLocksOn(other_).size();
    EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), others_), kBusy, {other_, "'rival'", "'web'"}));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_))) << "what libvirt calls to undo it";
    EXPECT_EQ(kernelLocksOn(other_).size(), before);
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(leased(disk_));
}

// QEMU refuses the disk after all: Release(NULL).
TEST_F(Disks, FailedAttachIsTakenBack) {
    const Started running = boot(host_, guest_, disks_);
    host_.acquire(guest_, running.pid(), others_);
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(free(other_));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, DetachingWhatWasNeverAttachedChangesNothing) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, DetachingTwiceIsDetachingOnce) {
    const Started running = boot(host_, guest_, {{disk_}, {other_}});
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    const Started rival = boot(stranger(), rival_, others_);
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), others_), kBusy, {"'rival'"}));
}

TEST_F(Disks, ImageOfADetachedDiskMayHaveVanished) {
    const Started running = boot(host_, guest_, {{disk_}, {other_}});
    std::filesystem::remove(other_);
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, GuestWithoutDisksMayRunStopAndGetOne) {
    const Started running = boot(host_, guest_, {});
    ASSERT_TRUE(granted(running));
    const StateOutcome state = host_.release(guest_, running.pid(), {});
    EXPECT_TRUE(granted(state));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), {}, {.state = state.state})));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_)));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(free(disk_));
}

TEST_F(Disks, AttachIsIdempotent) {
    const Started running = boot(host_, guest_, disks_);
    for (int i = 0; i < 5; i++)
        EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(free(other_));
}

TEST_F(Disks, MediaChangeSwapsTheLease) {
    const Started running = boot(host_, guest_, {{disk_}, {other_, kReadOnly}});
    const std::string next = image("next.iso");
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), {{next, kReadOnly}})));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {{other_, kReadOnly}})));
    EXPECT_TRUE(free(other_));
    EXPECT_TRUE(leased(next));
    EXPECT_TRUE(free(next, kReadOnly));
}

// snapshot --disk-only
TEST_F(Disks, SnapshotMovesTheLeaseToTheOverlay) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(leased(other_));
}

// The same of a paused guest: the overlay's lease is given back at once and comes with the resume.
TEST_F(Disks, SnapshotOfAPausedGuestLeasesTheOverlayAtItsResume) {
    const Started running = boot(host_, guest_, disks_);
    const StateOutcome state = host_.release(guest_, running.pid(), disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_, {.state = state.state})));
    EXPECT_TRUE(leased(other_));
}

// blockcommit --active --pivot
TEST_F(Disks, ActiveCommitMovesTheLeaseToTheBase) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(free(disk_));
}

// blockcommit of a middle image: Acquire(base), then the same READONLY.
TEST_F(Disks, InactiveCommitGivesItsBaseBackToReaders) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(other_, kReadOnly)) << "a reader came in while the guest committed into it";
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), {{other_, kReadOnly}})));
    EXPECT_TRUE(free(other_, kReadOnly));
    EXPECT_TRUE(leased(other_)) << "a writer came in while the guest reads it";
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {{image("top.img"), kReadOnly}})));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, SecondInactiveCommitTakesTheBaseForWritingAgain) {
    const Started running = boot(host_, guest_, disks_);
    for (int round = 0; round < 3; round++) {
        ASSERT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
        EXPECT_TRUE(leased(other_, kReadOnly));
        ASSERT_TRUE(granted(host_.acquire(guest_, running.pid(), {{other_, kReadOnly}})));
        EXPECT_TRUE(free(other_, kReadOnly));
    }
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {{other_, kReadOnly}})));
    EXPECT_TRUE(free(other_));
}

TEST_F(Disks, SecondInactiveCommitIsRefusedWhileSomebodyReadsTheBase) {
    const Started running = boot(host_, guest_, disks_);
    host_.acquire(guest_, running.pid(), others_);
    host_.acquire(guest_, running.pid(), {{other_, kReadOnly}});
    {
        const Started reader = boot(stranger(), rival_, {{other_, kReadOnly}});
        EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), others_), kBusy, {other_, "'rival'", "'web'"}));
        EXPECT_TRUE(leased(other_)) << "the refused commit lost the read-only lease";
    }
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(other_, kReadOnly));
}

// A suspend in the middle: afterwards the mode must be what it was.
TEST_F(Disks, ResumeDoesNotTurnACommittedBaseBackIntoAnExclusiveImage) {
    const Started running = boot(host_, guest_, disks_);
    host_.acquire(guest_, running.pid(), others_);
    host_.acquire(guest_, running.pid(), {{other_, kReadOnly}});
    const StateOutcome state = host_.release(guest_, running.pid(), disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_, {.state = state.state})));
    EXPECT_TRUE(free(other_, kReadOnly));
}

// blockcopy --pivot
TEST_F(Disks, BlockCopyMovesTheLeaseToTheCopy) {
    const Started running = boot(host_, guest_, disks_);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(leased(other_));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), disks_)));
    EXPECT_TRUE(free(disk_));
    EXPECT_TRUE(leased(other_));
}

TEST_F(Disks, SecondOfSeveralRefusedLeavesTheFirstOneFree) {
    const Started rival = boot(stranger(), rival_, others_);
    const std::string third = image("third.img");
    for (const std::vector<Disk>& disks :
         {std::vector<Disk>{{disk_}, {other_}, {third}}, {{third}, {other_}, {disk_}}}) {
        EXPECT_TRUE(refused(host_.start(guest_, disks), kBusy, {other_, "'rival'"}));
        EXPECT_TRUE(kernelLocksOn(disk_).empty());
        EXPECT_TRUE(kernelLocksOn(third).empty());
    }
    const Started running = boot(host_, guest_, {});
    EXPECT_TRUE(
        refused(host_.acquire(guest_, running.pid(), {{disk_}, {other_}, {third}}), kBusy, {other_, "'rival'"}));
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
    EXPECT_TRUE(kernelLocksOn(third).empty());
}

TEST_F(Disks, MissingImageAmongManyLeavesTheOthersFree) {
    EXPECT_TRUE(refused(host_.start(guest_, {{disk_}, {path("missing")}, {other_}}), kFailed, {path("missing")}));
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
    EXPECT_TRUE(kernelLocksOn(other_).empty());
}

TEST_F(Disks, ThreeHundredImagesAreLeasedAndEachMayLeave) {
    const std::vector<Disk> many = images(300);
    Started running = boot(host_, guest_, many);
    ASSERT_TRUE(granted(running));
    for (std::size_t i : {0u, 1u, 149u, 239u, 240u, 298u, 299u})
        EXPECT_TRUE(leased(many[i].path));
    StateOutcome state = host_.release(guest_, running.pid(), many);
    EXPECT_TRUE(granted(state));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), many, {.state = state.state})));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_)));
    EXPECT_TRUE(leased(disk_));
    for (std::size_t i : {0u, 150u, 299u}) {
        EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {many[i]})));
        EXPECT_TRUE(kernelLocksOn(many[i].path).empty());
    }
    for (std::size_t i : {1u, 149u, 298u})
        EXPECT_FALSE(kernelLocksOn(many[i].path).empty());
    running.qemu->kill();
    for (const Disk& disk : many)
        ASSERT_TRUE(kernelLocksOn(disk.path).empty());
}

TEST_F(Disks, OneOfThreeHundredRefusedLeavesAllOthersFree) {
    std::vector<Disk> many = images(300);
    const Started rival = boot(stranger(), rival_, {many[217]});
    EXPECT_TRUE(refused(host_.start(guest_, many), kBusy, {many[217].path, "'rival'"}));
    for (std::size_t i = 0; i < many.size(); i += 7)
        EXPECT_EQ(kernelLocksOn(many[i].path).empty(), i != 217) << i;
}

TEST_F(Disks, HundredAttachesAndDetachesLeaveTheQueueAsItWas) {
    const Started running = boot(host_, guest_, disks_);
    for (int round = 0; round < 100; round++) {
        ASSERT_TRUE(granted(host_.acquire(guest_, running.pid(), others_)));
        ASSERT_TRUE(granted(host_.detach(guest_, running.pid(), others_)));
    }
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(free(other_));
}

TEST_F(Disks, SymbolicLinkIsTheImage) {
    const Started running = boot(host_, guest_, disks_);
    std::filesystem::create_symlink(disk_, path("link"));
    EXPECT_TRUE(leased(path("link")));
    EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {{path("link")}})));
    EXPECT_TRUE(free(disk_));
}

TEST_F(Disks, HardLinkIsTheImage) {
    const Started running = boot(host_, guest_, disks_);
    std::filesystem::create_hard_link(disk_, path("link"));
    EXPECT_TRUE(leased(path("link")));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), {{path("link")}}))) << "the guest itself";
}

TEST_F(Disks, BindMountIsTheImage) {
    if (geteuid() != 0)
        GTEST_SKIP() << "needs root for a mount";
    const Started running = boot(host_, guest_, disks_);
    const std::string folder = path("folder"), bound = image("bound");
    std::filesystem::create_directory(folder);
    const std::string answer = inOwnProcess([&](support::PluginHost& host) -> std::string {
        if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0 ||
            mount(disk_.c_str(), bound.c_str(), nullptr, MS_BIND, nullptr) < 0 ||
            mount(path("").c_str(), folder.c_str(), nullptr, MS_BIND, nullptr) < 0)
            return "SKIP";
        host.init(path("no.conf"));
        for (const std::string& name : {bound, folder + "/disk.img"}) {
            const std::vector<Disk> disk{{name}};
            if (const auto started = host.registerGuest(rival_, disk); started)
                return "started with " + name;
            else if (started.message().find("'web'") == std::string::npos)
                return started.message();
        }
        return "";
    });
    if (answer == "SKIP")
        GTEST_SKIP() << "mounts are not allowed here";
    EXPECT_EQ(answer, "");
}

TEST_F(Disks, SameReadOnlyImageTwiceIsFine) {
    std::filesystem::create_hard_link(disk_, path("link"));
    const std::vector<Disk> twice{{disk_, kReadOnly}, {disk_, kReadOnly}, {path("link"), kReadOnly}};
    const Started running = boot(host_, guest_, twice);
    ASSERT_TRUE(granted(running));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(free(disk_, kReadOnly));
    const StateOutcome state = host_.release(guest_, running.pid(), twice);
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), twice, {.state = state.state})));
}

TEST_F(Disks, SameImageTwiceExclusivelyIsRefusedWithBothNames) {
    std::filesystem::create_symlink(disk_, path("link"));
    EXPECT_TRUE(refused(host_.start(guest_, {{disk_}, {disk_}}), kUnsupported, {disk_, "twice", "<shareable/>"}));
    EXPECT_TRUE(refused(host_.start(guest_, {{disk_}, {path("link")}}), kUnsupported, {disk_, path("link"), "twice"}));
    EXPECT_TRUE(refused(host_.start(guest_, {{disk_}, {disk_, kReadOnly}}), kUnsupported, {disk_, "twice"}));
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Disks, ReadersShareAndKeepWritersOut) {
    const Started one = boot(host_, guest_, {{disk_, kReadOnly}});
    EXPECT_TRUE(free(disk_, kReadOnly));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(leased(disk_, kShared));
    const Started two = boot(host_, support::makeGuest("mail", 2), {{disk_, kReadOnly}});
    EXPECT_TRUE(granted(two));
}

TEST_F(Disks, SharersShareAndKeepOthersOut) {
    const Started one = boot(host_, guest_, {{disk_, kShared}});
    EXPECT_TRUE(free(disk_, kShared));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(leased(disk_, kReadOnly));
    const Started two = boot(host_, support::makeGuest("mail", 2), {{disk_, kShared}});
    EXPECT_TRUE(granted(two));
}

TEST_F(Disks, WriterKeepsReadersAndSharersOut) {
    const Started one = boot(host_, guest_, disks_);
    EXPECT_TRUE(leased(disk_, kShared));
    EXPECT_TRUE(leased(disk_, kReadOnly));
}

TEST_F(Disks, ReadOnlyAndShareableIsReadOnly) {
    const Started one = boot(host_, guest_, {{disk_, kReadOnly | kShared}});
    EXPECT_TRUE(free(disk_, kReadOnly));
    EXPECT_TRUE(leased(disk_));
}

TEST_F(Disks, SuspendedSharersAndReadersKeepTheirModes) {
    for (unsigned flags : {kReadOnly, kShared}) {
        const std::vector<Disk> disks{{disk_, flags}};
        const Started one = boot(host_, guest_, disks);
        const StateOutcome state = host_.release(guest_, one.pid(), disks);
        EXPECT_TRUE(free(disk_, flags));
        EXPECT_TRUE(leased(disk_));
        EXPECT_TRUE(granted(host_.acquire(guest_, one.pid(), disks, {.state = state.state})));
        EXPECT_TRUE(leased(disk_));
    }
}

// The image is there as <readonly/> and comes again as a disk to write to: the reader's lease is not enough for that.
TEST_F(Disks, AttachingForWritingWhatIsAttachedReadOnlyIsRefused) {
    for (unsigned flags : {0u, kShared}) {
        const Started running = boot(host_, guest_, {{disk_, kReadOnly}});
        EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), {{disk_, flags}}), kUnsupported,
                            {disk_, "'web'", "read-only"}))
            << "flags " << flags;
    }
}

// The same with <shareable/> first: others write to it, so the guest cannot have it for itself.
TEST_F(Disks, AttachingForItselfWhatIsAttachedSharedIsRefusedWhileOthersShareIt) {
    const Started running = boot(host_, guest_, {{disk_, kShared}});
    const Started other = boot(stranger(), rival_, {{disk_, kShared}});
    EXPECT_FALSE(host_.acquire(guest_, running.pid(), disks_));
}

// Where one side reads or shares already, the message names the mark that the other one lacks.
TEST_F(Disks, RefusalOfGuestsThatCouldReadOrShareSaysHow) {
    const struct {
        unsigned has, wants;
        const char* mark;
    } kCases[] = {
        {kReadOnly, 0, "mark the disk <readonly/>"},  {0, kReadOnly, "mark its disk <readonly/>"},
        {kShared, 0, "mark the disk <shareable/>"},   {0, kShared, "mark the other guest's disk <shareable/>"},
        {kShared, kReadOnly, "mark its disks alike"}, {kReadOnly, kShared, "mark its disks alike"}};
    for (const auto& each : kCases) {
        const Started running = boot(host_, guest_, {{disk_, each.has}});
        EXPECT_TRUE(refused(stranger().start(rival_, {{disk_, each.wants}}), kBusy, {disk_, "'web'", each.mark}));
    }
    const Started running = boot(host_, guest_, disks_);
    EXPECT_FALSE(refused(stranger().start(rival_, disks_), kBusy, {"/>"})) << "two that write get no such idea";
}

// A guest whose QEMU really has its image open, with QEMU's own locks.
class OpenImage : public PluginTest {
protected:
    OpenImage() {
        qemu_.takeOver();
        EXPECT_EQ(qemu_.command("open " + disk_), "ok");
        EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), disks_)));
    }

    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
    Puppeteer qemu_{path("control")};
    Libvirtd host_{{.hostile = true, .control = path("control")}};
    Started running_ = host_.start(guest_, disks_);
};

// virsh attach-disk of an image that the guest has already: libvirt asks us, QEMU refuses, libvirt undoes.
TEST_F(OpenImage, KeepsItsLeaseWhenASecondAttachOfItFails) {
    host_.acquire(guest_, running_.pid(), disks_);
    EXPECT_TRUE(granted(host_.detach(guest_, running_.pid(), disks_)));
    EXPECT_FALSE(kernelLocksOn(disk_).empty());
    EXPECT_GE(locksOnByte(disk_, 1LL << 62), 1u) << "the guest writes to the image, but has no lease any more";
}

// The same as a CD: not the end of a block commit, the guest goes on writing.
TEST_F(OpenImage, KeepsItsLeaseExclusiveWhenItIsAttachedReadOnlyAsWell) {
    host_.acquire(guest_, running_.pid(), {{disk_, kReadOnly}});
    host_.detach(guest_, running_.pid(), {{disk_, kReadOnly}});
    // Where QEMU's own locks do not reach, the lease alone decides.
    Libvirtd elsewhere({.config = "qemu_locks = \"ignore\"\n"});
    EXPECT_TRUE(refused(elsewhere.start(rival_, {{disk_, kReadOnly}}), kBusy, {disk_, "'web'", "exclusively"}));
}

// A snapshot leaves the old image open for reading, as the overlay's backing file.
TEST_F(OpenImage, DetachedImageThatBacksAnOverlayMayBeHadByReaders) {
    const std::string overlay = image("overlay.img"), backing = image("backing.img");
    EXPECT_EQ(qemu_.command("open-to-read " + backing), "ok");
    EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), {{backing}}))) << "its own QEMU reads it: block commit";
    EXPECT_TRUE(granted(host_.detach(guest_, running_.pid(), {{backing}})));
    EXPECT_TRUE(refused(stranger().start(rival_, {{backing}}), kBusy, {backing, "'web'", "read-only"}));
    EXPECT_TRUE(free(backing, LOCK_RESOURCE_READONLY));
}

TEST_F(OpenImage, OfAGuestThatHasNoLeaseForItIsNamedBeforeTheStart) {
    const std::string taken = image("taken.img");
    Started outsider = host_.start(support::makeGuest("by-hand", 50), {});
    qemu_.takeOver();
    ASSERT_EQ(qemu_.command("open " + taken), "ok");
    EXPECT_TRUE(refused(stranger().start(rival_, {{taken}}), kBusy,
                        {taken, "'by-hand'", "pid " + std::to_string(outsider.pid()), "writes to it", "backing file"}));
    EXPECT_EQ(locksOnByte(taken, 1LL << 62), 0u);
    outsider.qemu->kill();
    EXPECT_TRUE(free(taken));
}

} // namespace
} // namespace leasehold::plugin_test

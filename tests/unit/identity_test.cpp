// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Which lease belongs to which disk: that of the file that QEMU has open, whatever its path leads to by now; and which
// files below the images have one.

#include "core/os/error.hpp"
#include "tests/support/unit_media.hpp"
#include "tests/support/unit_vessel.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <fcntl.h>
#include <linux/capability.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace leasehold {
namespace {

using lease::Mode;
using unit::says;
namespace fs = std::filesystem;

class EngineWithDisks : public unit::EngineWithMedia {
protected:
    const std::vector<Resource> disk{{image, Mode::exclusive}}, other{{second, Mode::exclusive}};
    const std::vector<Resource> both{disk[0], other[0]};

    // Another file has the name now; gives that of the old one. No hard link: leases that go by a name allow none.
    std::string replace(const std::string& path) const {
        fs::rename(path, path + ".old");
        std::ofstream(path).flush();
        return path + ".old";
    }

    // In a lockspace a lease goes by the path: a second file of the same name has the same one.
    bool goesByName() const { return !settings.fileLockspaceDir.empty(); }

    // A guest that runs.
    struct Running : Qemu {
        Running(const Engine& engine, Guest& guest, const std::vector<Resource>& disks,
                const std::vector<std::string>& lower)
            : Qemu(engine, guest, disks) {
            for (const std::string& path : lower)
                reads(path);
            EXPECT_EQ(engine.acquire(guest, disks, ""), std::nullopt);
        }
    };
    Running run(Guest& guest, const std::vector<Resource>& disks, const std::vector<std::string>& lower = {}) const {
        return Running(engine, guest, disks, lower);
    }

    // Suspended and resumed, and rebooted, by this libvirtd and by the next one, the guest runs on.
    void expectRunsOn(const Guest& guest, const std::vector<Resource>& disks, const char* after) {
        EXPECT_EQ(pauseAndRun(engine, guest, disks), "") << after;
        EXPECT_EQ(engine.acquire(guest, disks, ""), std::nullopt) << after;
        EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return pauseAndRun(fresh, guest, disks); }), "") << after;
    }

    bool warned(const std::string& part) const {
        return std::any_of(warnings.begin(), warnings.end(),
                           [&](const std::string& text) { return text.find(part) != text.npos; });
    }
};

TEST_P(EngineWithDisks, AnImageThatWasDeletedRenamedOrReplacedUnderItsGuestStaysItsOwn) {
    const std::pair<const char*, std::function<std::string()>> mishaps[] = {
        {"deleted", [&] { return fs::remove(image), ""; }},
        {"renamed", [&] { return fs::rename(image, dir.path("elsewhere.img")), dir.path("elsewhere.img"); }},
        {"replaced", [&] { return replace(image); }}};
    for (const auto& disks : {disk, both})
        for (const auto& [what, happen] : mishaps) {
            SCOPED_TRACE(testing::Message() << what << ", disks: " << disks.size());
            std::string now;
            {
                Running qemu = run(web, disks);
                now = happen();
                expectRunsOn(web, disks, what);
                EXPECT_EQ(storedFor(qemu, web), disks.size());
                if (!now.empty()) {
                    EXPECT_TRUE(says(refusalOf(mail, {{now, Mode::exclusive}}), "in use by guest 'web'"));
                }
            }
            if (!now.empty()) {
                EXPECT_EQ(refusalOf(mail, {{now, Mode::exclusive}}), "granted");
            }
            dir.file("disk.img");
        }
}

TEST_P(EngineWithDisks, AnImageWhoseDirectoryWasRenamedMountedOverOrUnmountedStaysItsGuests) {
    if (!unit::hasMountsOfItsOwn())
        GTEST_SKIP() << "no mount namespace may be made here";
    const std::string directory = dir.path("directory"), own = dir.path("directory/own.img"),
                      there = dir.path("mounted");
    struct Mishap {
        const char* what;
        std::string path, now; // as libvirt names it; afterwards, as somebody else does
        std::function<void()> happen, undo;
    };
    const Mishap mishaps[] = {
        {"renamed", own, dir.path("renamed/own.img"), [&] { fs::rename(directory, dir.path("renamed")); },
         [&] { fs::rename(dir.path("renamed"), directory); }},
        {"mounted over", own, own,
         [&] { unit::demand(mount("none", directory.c_str(), "tmpfs", 0, nullptr) == 0, "no mount"); },
         [&] { unit::demand(umount(directory.c_str()) == 0, "no unmount"); }},
        {"unmounted", dir.path("mounted/own.img"), own,
         [&] { unit::demand(umount2(there.c_str(), MNT_DETACH) == 0, "no unmount"); },
         [&] { unit::demand(mount(directory.c_str(), there.c_str(), nullptr, MS_BIND, nullptr) == 0, "no mount"); }}};
    fs::create_directory(directory);
    fs::create_directory(there);
    dir.file("directory/own.img");
    mishaps[2].undo();
    for (bool alone : {true, false})
        for (const Mishap& mishap : mishaps) {
            SCOPED_TRACE(testing::Message() << mishap.what << (alone ? ", its only disk" : ", one of two"));
            std::vector<Resource> disks{{mishap.path, Mode::exclusive}};
            if (!alone)
                disks.push_back(other[0]);
            {
                Running qemu = run(web, disks);
                mishap.happen();
                expectRunsOn(web, disks, mishap.what);
                EXPECT_EQ(storedFor(qemu, web), disks.size());
                if (mishap.now != mishap.path) {
                    EXPECT_TRUE(says(refusalOf(mail, {{mishap.now, Mode::exclusive}}), "in use by guest 'web'"));
                }
                mishap.undo();
                EXPECT_TRUE(says(refusalOf(mail, {{own, Mode::exclusive}}), "in use by guest 'web'"));
            }
            EXPECT_EQ(refusalOf(mail, {{own, Mode::exclusive}}), "granted");
        }
    (void)umount(there.c_str());
}

TEST_P(EngineWithDisks, ASuspendedGuestLeavesTheFileOfASymbolicLinkThatWasTurnedToItsNewGuest) {
    std::string link = dir.path("current.img"), third = dir.file("third.img");
    for (bool alone : {true, false}) {
        SCOPED_TRACE(alone ? "its only disk" : "one of two disks");
        fs::create_symlink(image, link);
        std::vector<Resource> disks{{link, Mode::exclusive}};
        if (!alone)
            disks.push_back({third, Mode::exclusive});
        Running qemu = run(web, disks);
        std::string state = engine.release(web, disks);
        fs::remove(link);
        fs::create_symlink(second, link);
        {
            Running owner = run(mail, other);
            EXPECT_EQ(engine.acquire(web, disks, state), std::nullopt);
            EXPECT_EQ(leaseOf(owner, mail, second), "exclusive");
            EXPECT_EQ(storedFor(qemu, web), disks.size());
        }
        // Nobody has it: this guest does not get it either.
        EXPECT_EQ(pauseAndRun(engine, web, disks), "");
        EXPECT_EQ(leaseOf(qemu, web, second), "free");
        EXPECT_EQ(leaseOf(qemu, web, image), "exclusive");
        EXPECT_EQ(refusalOf(mail, other), "granted");
        fs::remove(link);
    }
}

TEST_P(EngineWithDisks, APluggedFileThatACopyHasReplacedLeavesBothFreeWhenItIsDetached) {
    Running qemu = run(web, disk);
    ASSERT_EQ(engine.acquire(web, other, ""), std::nullopt);
    qemu.writes(second);
    const std::vector<Resource> old{{replace(second), Mode::exclusive}};
    expectRunsOn(web, both, "the copy");
    EXPECT_TRUE(says(refusalOf(mail, old), "in use by guest 'web'"));
    qemu.closes(old[0].path);
    engine.detach(web, other);
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_EQ(refusalOf(mail, old), "granted");
    EXPECT_EQ(refusalOf(mail, other), "granted");
    expectRunsOn(web, disk, "the detach");
}

// By a name there is one lease of both. Each file has one of this host, by its number.
TEST_P(EngineWithDisks, AReplacedFileOfTheSameNameThatIsPluggedBesideTheOldOneIsLeasedAsLongAsEitherIsOpen) {
    for (bool newFirst : {true, false}) {
        SCOPED_TRACE(newFirst ? "the new one goes first" : "the old one goes first");
        Running qemu = run(web, both);
        std::string old = replace(image), first = newFirst ? image : old, last = newFirst ? old : image;
        const std::vector<Resource> oldOne{{old, Mode::exclusive}};
        EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt);
        qemu.writes(image);
        EXPECT_EQ(storedFor(qemu, web), 3u);
        for (const auto& taken : {disk, oldOne})
            EXPECT_TRUE(says(refusalOf(mail, taken), "in use by guest 'web'"));
        expectRunsOn(web, {disk[0], other[0], disk[0]}, "the plug");
        qemu.closes(first);
        engine.detach(web, disk);
        EXPECT_EQ(storedFor(qemu, web), 2u);
        EXPECT_EQ(leaseOf(qemu, web, last == old && goesByName() ? second : last), "exclusive");
        if (goesByName()) {
            EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'")) << "one name, one lease";
        } else {
            EXPECT_EQ(refusalOf(mail, newFirst ? disk : oldOne), "granted");
        }
        EXPECT_TRUE(says(refusalOf(mail, newFirst ? oldOne : disk), "in use by guest 'web'"));
        expectRunsOn(web, both, "the detach");
        qemu.closes(last);
        engine.detach(web, disk);
        EXPECT_EQ(refusalOf(mail, disk), "granted");
        EXPECT_EQ(refusalOf(mail, oldOne), "granted");
        EXPECT_EQ(storedFor(qemu, web), 1u);
        fs::remove(old);
    }
}

TEST_P(EngineWithDisks, AReplacedFileAndTheOneThatReplacedItAreGivenBackAtOnceWhenQemuHasClosedBoth) {
    Running qemu = run(web, both);
    std::string old = replace(image);
    EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    qemu.writes(image);
    expectRunsOn(web, {disk[0], other[0], disk[0]}, "the plug");
    EXPECT_EQ(storedFor(qemu, web), 3u);
    qemu.closes(image);
    qemu.closes(old);
    expectRunsOn(web, other, "both were closed");
    EXPECT_EQ(storedFor(qemu, web), 1u);
    for (const std::string& path : {image, old})
        EXPECT_EQ(refusalOf(mail, {{path, Mode::exclusive}}), "granted") << path;
}

// In a lockspace their lease is one, and has one mode.
TEST_P(EngineWithDisks, AReplacedFileThatIsPluggedInAnotherModeIsRefusedWhereTheNameDecides) {
    const std::vector<Resource> disc{{image, Mode::readOnly}};
    Running qemu = run(web, {other[0], disc[0]});
    replace(image);
    if (!goesByName()) {
        EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt);
        return;
    }
    EXPECT_TRUE(says(unit::errorOf([&] { engine.acquire(web, disk, ""); }), "detach that one first"));
    EXPECT_EQ(storedFor(qemu, web), 2u);
    expectRunsOn(web, {other[0], disc[0]}, "the refusal");
}

TEST_P(EngineWithDisks, AReplacedFileThatSomebodyHasIsRefusedToWhoeverPlugsIt) {
    Running qemu = run(web, both);
    replace(image);
    if (goesByName()) {
        EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'"));
        return;
    }
    Running owner = run(mail, disk);
    auto refusal = engine.acquire(web, disk, "");
    ASSERT_TRUE(refusal);
    EXPECT_TRUE(says(*refusal, "in use by guest 'mail'"));
    EXPECT_EQ(storedFor(qemu, web), 2u);
    EXPECT_EQ(pauseAndRun(engine, web, both), "");
}

// Of a guest with one disk, a restart looks like the plug of another file of the same name.
TEST_P(EngineWithDisks, WhereARestartAndAPlugLookAlikeEitherIsSafe) {
    Running qemu = run(web, disk);
    std::string old = replace(image);
    EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt) << "once more";
    EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'")) << "it may be about to open it";
    if (goesByName()) {
        // It has opened it, and the old one goes.
        qemu.writes(image);
        qemu.closes(old);
        engine.detach(web, disk);
        EXPECT_EQ(storedFor(qemu, web), 1u);
        EXPECT_EQ(leaseOf(qemu, web, image), "exclusive");
        expectRunsOn(web, disk, "the plug");
        return;
    }
    EXPECT_TRUE(says(refusalOf(mail, {{old, Mode::exclusive}}), "in use by guest 'web'"));
    EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return pauseAndRun(fresh, web, disk); }), "");
    EXPECT_EQ(refusalOf(mail, disk), "granted") << "it has not opened it";
    // Somebody has it, and would not notice a second writer but for the lease.
    Running owner = run(mail, disk);
    auto refusal = engine.acquire(web, disk, "");
    ASSERT_TRUE(refusal);
    EXPECT_TRUE(says(*refusal, "leads to another file"));
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_EQ(pauseAndRun(engine, web, disk), "") << "with a state it is a resume";
}

TEST_P(EngineWithDisks, AMediumThatWasReplacedIsChangedToTheNewFileOfTheSameName) {
    const std::vector<Resource> disc{{image, Mode::readOnly}};
    Running qemu = run(web, {other[0], disc[0]});
    std::string old = replace(image);
    EXPECT_EQ(engine.acquire(web, disc, ""), std::nullopt);
    EXPECT_NE(refusalOf(mail, disk), "granted") << "the new one is leased before QEMU opens it";
    qemu.reads(image);
    qemu.closes(old);
    engine.detach(web, disc);
    EXPECT_NE(refusalOf(mail, disk), "granted") << "the new one is in the drive";
    EXPECT_EQ(refusalOf(mail, {{old, Mode::exclusive}}), "granted");
    expectRunsOn(web, {other[0], disc[0]}, "the change");
}

TEST_P(EngineWithDisks, AReaderThatIsRefusedToWriteAsWellKeepsItsLeaseWhenThatIsDetached) {
    const std::vector<Resource> disc{{image, Mode::readOnly}};
    for (const auto& disks : {disc, std::vector<Resource>{other[0], disc[0]}}) {
        Running qemu = run(web, disks);
        std::string problem =
            unit::errorOf([&] { EXPECT_NE(engine.acquire(web, disk, ""), std::nullopt) << "a second disk"; });
        EXPECT_TRUE(says(problem, "the guest has it already, read-only"));
        engine.detach(web, disk);
        EXPECT_EQ(leaseOf(qemu, web, image), "reading");
        EXPECT_TRUE(says(refusalOf(mail, disk), "'web'"));
    }
}

TEST_P(EngineWithDisks, NamesThatLookDeletedAreNamesLikeOthers) {
    std::string odd = dir.file("disk.img (deleted)");
    const std::vector<Resource> odds{{odd, Mode::exclusive}};
    Running qemu = run(web, odds, {second});
    EXPECT_EQ(leaseOf(qemu, web, odd), "exclusive");
    EXPECT_EQ(leaseOf(qemu, web, image), "free") << "the file whose name is the beginning of that one";
    expectRunsOn(web, odds, "nothing");
    fs::remove(odd);
    expectRunsOn(web, odds, "deleted");
    EXPECT_EQ(storedFor(qemu, web), 2u);
}

TEST_P(EngineWithDisks, AFileBelowIsLeasedFromTheFirstRunUntilItIsClosed) {
    std::string base = dir.file("base.img"), written = dir.file("log");
    Qemu qemu = start(web, disk);
    qemu.reads(base);
    qemu.writes(written);
    engine.inquire(web, disk);
    EXPECT_EQ(leaseOf(qemu, web, base), "free") << "it waits for its first run";
    ASSERT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    EXPECT_EQ(leaseOf(qemu, web, base), "reading");
    EXPECT_EQ(leaseOf(qemu, web, written), "free") << "not an image that it reads";
    EXPECT_TRUE(says(refusalOf(mail, {{base, Mode::exclusive}}), "'web'"));
    EXPECT_EQ(refusalOf(mail, {{base, Mode::readOnly}}), "granted");
    qemu.closes(base); // a pull; libvirt lets it go
    engine.detach(web, {{base, Mode::readOnly}});
    EXPECT_EQ(leaseOf(qemu, web, base), "free");
}

TEST_P(EngineWithDisks, AFileBelowThatSomebodyWritesIsRefusedAtTheFirstRunAndOnlyToldOfLater) {
    std::string base = dir.file("base.img");
    Running writer = run(mail, {{base, Mode::exclusive}});
    {
        Qemu qemu = start(web, disk);
        qemu.reads(base);
        auto refusal = engine.acquire(web, disk, "");
        ASSERT_TRUE(refusal);
        for (const char* part : {"backing file", "in use by guest 'mail'", base.c_str()})
            EXPECT_TRUE(says(*refusal, part));
    }
    Running qemu = run(web, disk);
    qemu.reads(base);
    warnings.clear();
    EXPECT_EQ(engine.acquire(web, other, ""), std::nullopt) << "a plug looks at what is open";
    EXPECT_TRUE(warned("in use by guest 'mail'"));
    EXPECT_EQ(leaseOf(writer, mail, base), "exclusive");
}

// VFIO reads /sys, sanitizers and libraries read /proc/self/maps.
TEST_P(EngineWithDisks, WhatTheKernelShowsOfItselfIsNoFileBelow) {
    for (const std::string file : {"/proc/self/maps", "/proc/sys/kernel/osrelease", "/sys/kernel/notes"}) {
        SCOPED_TRACE(file);
        Qemu qemu = start(web, disk);
        qemu.reads(file);
        warnings.clear();
        EXPECT_EQ(engine.acquire(web, disk, ""), std::nullopt);
        EXPECT_EQ(storedFor(qemu, web), 1);
        EXPECT_EQ(warnings, std::vector<std::string>());
    }
}

TEST_P(EngineWithDisks, LeasesOfFilesBelowCanBeTurnedOff) {
    std::string base = dir.file("base.img");
    Settings off = settings;
    off.leaseBackingFiles = false;
    Engine without(off, [](const std::string&) {});
    Qemu qemu = start(web, disk);
    qemu.reads(base);
    EXPECT_EQ(without.acquire(web, disk, ""), std::nullopt);
    EXPECT_EQ(leaseOf(qemu, web, base), "free");
    EXPECT_EQ(refusalOf(mail, {{base, Mode::exclusive}}), "granted");
}

TEST_P(EngineWithDisks, AFileBelowOnStorageWithoutLocksIsAWarning) {
    fs::create_directory(dir.path("unsafe"));
    std::string base = dir.file("unsafe/base.img");
    Settings refusing = settings;
    refusing.storageLocks.insert(refusing.storageLocks.begin(),
                                 {dir.path("unsafe"), storage::LockKind::none, storage::Scope::thisHost});
    refusing.fileLockspaceDir.clear();
    std::vector<std::string> told;
    Engine strict(refusing, [&](const std::string& text) { told.push_back(text); });
    Qemu qemu(strict, web, disk);
    qemu.reads(base);
    EXPECT_EQ(strict.acquire(web, disk, ""), std::nullopt);
    ASSERT_FALSE(told.empty());
    EXPECT_TRUE(says(told.back(), "without a lease"));
    EXPECT_TRUE(says(told.back(), base));
}

TEST_P(EngineWithDisks, ACommitNeedsTheBaseAloneAndGivesItBack) {
    Running qemu = run(web, both, {});
    std::string base = dir.file("base.img");
    qemu.reads(base);
    const std::vector<Resource> writing{{base, Mode::exclusive}}, reading{{base, Mode::readOnly}};
    ASSERT_EQ(engine.acquire(web, {{dir.file("third.img"), Mode::exclusive}}, ""), std::nullopt);
    ASSERT_EQ(leaseOf(qemu, web, base), "reading");
    {
        Running clone = run(mail, {{dir.file("clone.img"), Mode::exclusive}}, {base});
        auto refusal = engine.acquire(web, writing, "");
        ASSERT_TRUE(refusal);
        EXPECT_TRUE(says(*refusal, "'mail'"));
        EXPECT_EQ(leaseOf(qemu, web, base), "reading");
        EXPECT_EQ(leaseOf(clone, mail, base), "reading");
    }
    ASSERT_EQ(engine.acquire(web, writing, ""), std::nullopt);
    qemu.writes(base);
    EXPECT_EQ(leaseOf(qemu, web, base), "exclusive");
    EXPECT_TRUE(says(refusalOf(mail, reading), "'web'"));
    qemu.closes(base);
    EXPECT_EQ(engine.acquire(web, reading, ""), std::nullopt);
    EXPECT_EQ(leaseOf(qemu, web, base), "reading");
    EXPECT_EQ(refusalOf(mail, reading), "granted");
}

// In a lockspace the lease by the path could be had, and its companion by device and inode could not.
TEST_P(EngineWithDisks, ACommitThatIsRefusedHalfWayLeavesTheWholeLeaseForReading) {
    if (!unit::hasMountsOfItsOwn())
        GTEST_SKIP() << "no mount namespace may be made here";
    fs::create_directory(dir.path("one"));
    fs::create_directory(dir.path("two"));
    std::string base = dir.file("one/base.img"), same = dir.path("two/base.img");
    ASSERT_EQ(mount(dir.path("one").c_str(), dir.path("two").c_str(), nullptr, MS_BIND, nullptr), 0);
    const std::vector<Resource> reading{{base, Mode::readOnly}}, writing{{base, Mode::exclusive}};
    Running qemu = run(web, disk, {base});
    {
        Qemu reader = start(mail, {{same, Mode::readOnly}});
        auto refusal = engine.acquire(web, writing, "");
        ASSERT_TRUE(refusal);
        EXPECT_TRUE(says(*refusal, "guest 'web' cannot have it"));
        EXPECT_EQ(refusalOf(db, reading), "granted");
    }
    EXPECT_EQ(leaseOf(qemu, web, base), "reading");
    EXPECT_EQ(refusalOf(db, reading), "granted") << "no mark of the refused one is left";
    EXPECT_TRUE(says(refusalOf(db, writing), "'web'"));
    EXPECT_EQ(engine.acquire(web, writing, ""), std::nullopt);
    EXPECT_TRUE(says(refusalOf(db, reading), "'web'"));
    (void)umount(dir.path("two").c_str());
}

TEST_P(EngineWithDisks, ASnapshotTurnsTheLeaseOfItsBaseIntoOneForReading) {
    Running qemu = run(web, disk);
    ASSERT_EQ(engine.acquire(web, other, ""), std::nullopt);
    qemu.writes(second);
    qemu.closes(image);
    qemu.reads(image);
    engine.detach(web, disk);
    EXPECT_EQ(leaseOf(qemu, web, image), "reading");
    EXPECT_EQ(leaseOf(qemu, web, second), "exclusive");
    EXPECT_EQ(refusalOf(mail, {{image, Mode::readOnly}}), "granted");
    EXPECT_TRUE(says(refusalOf(mail, disk), "'web'"));
    expectRunsOn(web, other, "the snapshot");
}

TEST_P(EngineWithDisks, TwoPathsOfOneFileAreKnownWhenTheyAreGone) {
    const std::string link = dir.path("link.img");
    fs::create_symlink(image, link);
    const std::vector<Resource> disks{{image, Mode::readOnly}, {link, Mode::readOnly}, other[0]};
    Running qemu = run(web, disks);
    EXPECT_EQ(storedFor(qemu, web), 2u);
    fs::remove(link);
    fs::rename(image, dir.path("old.img"));
    expectRunsOn(web, disks, "both names are gone");
    EXPECT_EQ(storedFor(qemu, web), 2u);
    EXPECT_TRUE(says(refusalOf(mail, {{dir.path("old.img"), Mode::exclusive}}), "'web'"));
}

TEST_P(EngineWithDisks, AFileThatIsOpenAmongThousandsIsFound) {
    std::string many = dir.file("many"), base = dir.file("base.img");
    Qemu qemu = start(web, disk);
    for (int i = 0; i < (unit::isLongRun() ? 900 : 100); i++)
        qemu.reads("/dev/null");
    qemu.reads(base);
    ASSERT_EQ(engine.acquire(web, disk, ""), std::nullopt);
    EXPECT_EQ(leaseOf(qemu, web, base), "reading");
    EXPECT_EQ(storedFor(qemu, web), 2u);
}

// As in a container, or where libvirt gives QEMU a /dev of its own.
TEST_P(EngineWithDisks, AFileBelowThatOnlyQemuSeesKeepsTheGuestFromNothing) {
    const std::string inner = dir.path("inner");
    fs::create_directory(inner);
    unit::StandIn qemu([&] {
        web.pid = getpid();
        unit::demand(!engine.registerGuest(web, disk), "refused");
        unit::demand(unit::hasMountsOfItsOwn() && mount("none", inner.c_str(), "tmpfs", 0, nullptr) == 0, "SKIP");
        std::ofstream(inner + "/base.img").flush();
    });
    web.pid = qemu.pid();
    qemu.writes(image);
    qemu.reads(inner + "/base.img");
    // Its storage may hang, as far as this host can tell: what is said comes from a helper process.
    const std::string log = dir.path("log");
    Engine telling(settings, [&](const std::string& text) { std::ofstream(log, std::ios::app) << text << '\n'; });
    EXPECT_EQ(telling.acquire(web, disk, ""), std::nullopt);
    std::stringstream said;
    said << std::ifstream(log).rdbuf();
    EXPECT_TRUE(storedFor(qemu, web) == 2 || says(said.str(), "without a lease")) << said.str();
    expectRunsOn(web, disk, "a look");
    EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'"));
}

// From here on this process, and whoever it starts, may list no process's descriptors; all else it may (landlock(7)).
// False where the kernel knows nothing of that.
bool mayNotListDescriptors() {
    constexpr long kCreate = 444, kAdd = 445, kRestrict = 446; // before Linux 5.13 no header has them
    const std::uint64_t handled = 1 << 3;                      // LANDLOCK_ACCESS_FS_READ_DIR
    const int rules = static_cast<int>(syscall(kCreate, &handled, sizeof handled, 0));
    if (rules < 0)
        return false;
    for (const auto& entry : fs::directory_iterator("/")) {
        if (entry.path() == "/proc" || !entry.is_directory())
            continue;
        struct __attribute__((packed)) {
            std::uint64_t allowed;
            std::int32_t beneath;
        } rule{handled, open(entry.path().c_str(), O_PATH | O_CLOEXEC)};
        syscall(kAdd, rules, 1, &rule, 0);
        close(rule.beneath);
    }
    bool done = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && syscall(kRestrict, rules, 0) == 0;
    close(rules);
    return done;
}

// What cannot be told drops nothing, and nobody is told that it did. The guest runs on, and who can look makes up for
// it.
TEST_P(EngineWithDisks, AQemuWhoseDescriptorsCannotBeListedLosesNothing) {
    const std::string base = dir.file("base.img"), number = dir.path("pid");
    unit::Child libvirtd([&](unit::Line& test) {
        unit::demand(mayNotListDescriptors(), "SKIP");
        unit::StandIn qemu([&] { // only whom it has started it may look into at all
            web.pid = getpid();
            unit::demand(!engine.registerGuest(web, both), "refused");
            unit::demand(open(image.c_str(), O_RDWR) >= 0 && open(base.c_str(), O_RDONLY) >= 0, "no such file");
        });
        web.pid = qemu.pid();
        std::ofstream(number) << web.pid << std::flush;
        test.say(); // the guest runs when this libvirtd hears of it
        test.hear();
        const std::string problem = pauseAndRun(engine, web, both);
        unit::demand(problem.empty(), "the resume: " + problem);
        auto mustSay = [](const std::string& text, const std::string& what) {
            unit::demand(text.find(what) != std::string::npos, "said: " + text);
        };
        mustSay(unit::errorOf([&] { engine.detach(web, other); }),
                "whether its QEMU has closed '" + second + "' cannot be told (list /proc/");
        unit::demand(warned("has open cannot be told (list /proc/"), "nothing is said");
        mustSay(unit::errorOf([&] {
                    (void)engine.acquire(web, {{base, Mode::readOnly}}, "");
                }),
                "its QEMU may not be looked into: open /proc/");
        unit::demand(held(image) && held(second), "a lease was dropped");
        test.say();
        test.hear(); // its QEMU lives as long
    });
    libvirtd.line().hasWord(std::chrono::seconds(60)); // or it has ended
    if (!fs::exists(number)) {
        std::string problem = libvirtd.join();
        if (problem == "SKIP")
            GTEST_SKIP() << "this kernel has no Landlock";
        FAIL() << problem;
    }
    libvirtd.line().hear();
    std::ifstream(number) >> web.pid;
    settings.leaseBackingFiles = false;
    ASSERT_EQ(Engine(settings, [](const std::string&) {}).acquire(web, both, ""), std::nullopt);
    libvirtd.line().say();
    libvirtd.line().hasWord(std::chrono::seconds(60));
    EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'"));
    EXPECT_TRUE(says(refusalOf(mail, other), "in use by guest 'web'"));
    EXPECT_EQ(inNewLibvirtd([&](const Engine& fresh) { return pauseAndRun(fresh, web, disk); }), "") << "it can look";
    EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'"));
    EXPECT_EQ(refusalOf(mail, other), "granted");
    libvirtd.line().say();
    EXPECT_EQ(libvirtd.join(), "");
}

// A security module keeps libvirtd out of QEMU, or a container has no CAP_SYS_PTRACE.
TEST_P(EngineWithDisks, AQemuThatMayNotBeLookedIntoKeepsItsLeasesAndIsRefusedInWords) {
    if (geteuid() != 0)
        GTEST_SKIP() << "needs root, whose QEMU is another user's";
    unit::StandIn qemu([&] {
        web.pid = getpid();
        unit::demand(!engine.registerGuest(web, both), "refused");
        unit::demand(open(image.c_str(), O_RDWR) >= 0 && open(second.c_str(), O_RDWR) >= 0, "no such file");
        unit::demand(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0, "no other user");
    });
    web.pid = qemu.pid();
    ASSERT_EQ(engine.acquire(web, both, ""), std::nullopt);
    unit::Child libvirtd([&](unit::Line&) {
        __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
        __user_cap_data_struct sets[2]{};
        unit::demand(syscall(SYS_capget, &header, sets) == 0, "capget");
        for (auto* set : {&sets[0].effective, &sets[0].permitted})
            *set &= ~(1u << CAP_SYS_PTRACE);
        unit::demand(syscall(SYS_capset, &header, sets) == 0, "capset");
        Engine fresh(settings, [](const std::string&) {});
        const std::pair<const char*, std::function<void()>> calls[] = {
            {"resume", [&] { unit::demand(!fresh.acquire(web, both, ""), "refused as if it had no leases"); }},
            {"suspend", [&] { fresh.release(web, both); }},
            {"begin of a migration", [&] { fresh.inquire(web, both); }},
            {"unplug", [&] { fresh.detach(web, other); }},
        };
        for (const auto& [name, call] : calls) {
            std::string refusal = unit::errorOf(call);
            unit::demand(refusal.find("its QEMU may not be looked into: look at /proc/" + std::to_string(web.pid)) == 0,
                         std::string(name) + ": " + refusal);
        }
    });
    EXPECT_EQ(libvirtd.join(), "");
    EXPECT_EQ(leaseOf(qemu, web, image), "exclusive");
    EXPECT_EQ(leaseOf(qemu, web, second), "exclusive");
    expectRunsOn(web, both, "it could be looked into again");
}

// More than are looked at: what QEMU has open cannot be told, so nothing is given up, and nobody is told that it was.
TEST_P(EngineWithDisks, AQemuThatHidesItsFilesBehindTooManyDescriptorsLosesNothing) {
    rlimit allowed{};
    if (getrlimit(RLIMIT_NOFILE, &allowed) < 0 || allowed.rlim_max < 17'000)
        GTEST_SKIP() << "no process may have 17000 descriptors here (ulimit -Hn)";
    unit::StandIn qemu([&] {
        web.pid = getpid();
        unit::demand(!engine.registerGuest(web, both), "refused");
        constexpr rlim_t kMany = 16'500;
        rlimit limit{kMany + 100, kMany + 100};
        unit::demand(setrlimit(RLIMIT_NOFILE, &limit) == 0, "no such limit");
        for (rlim_t i = 0; i < kMany; i++)
            unit::demand(dup(STDERR_FILENO) >= 0, "no descriptor");
    });
    web.pid = qemu.pid();
    ASSERT_EQ(engine.acquire(web, both, ""), std::nullopt);
    EXPECT_TRUE(warned("more than 16384 descriptors"));
    EXPECT_TRUE(says(unit::errorOf([&] { engine.detach(web, other); }), "cannot be told"));
    EXPECT_TRUE(held(second)) << "QEMU may have it open";
    EXPECT_EQ(engine.acquire(web, both, engine.release(web, both)), std::nullopt) << "and the guest runs on";
    EXPECT_EQ(storedFor(qemu, web), 2u);
}

INSTANTIATE_TEST_SUITE_P(Everywhere, EngineWithDisks, unit::everywhere(), unit::nameOfWhere);

class OnTheImage : public unit::EngineTest {};

TEST_F(OnTheImage, AQemuThatOpensAndClosesFilesAtEveryStepOfALookLosesNoLeaseOfWhatItHasOpen) {
    const std::vector<Resource> both{{image, Mode::exclusive}, {second, Mode::exclusive}};
    std::string base = dir.file("base.img");
    Qemu qemu = start(web, both);
    qemu.reads(base);
    ASSERT_EQ(engine.acquire(web, both, ""), std::nullopt);
    bool reads = true;
    int runs = unit::meddleAtEverySystemCall(
        [&] {
            Engine fresh(settings, [](const std::string&) {}); // another libvirtd's: it looks
            unit::demand(!fresh.acquire(web, both, fresh.release(web, both)), "refused");
        },
        [&] {
            qemu.writes(image); // and still has it open when one of the two is closed
            qemu.closes(image);
            reads ? qemu.closes(base) : qemu.reads(base);
            reads = !reads;
        },
        [&](int stop, bool whole) {
            EXPECT_TRUE(whole) << "meddled with at stop " << stop;
            for (const Resource& each : both)
                unit::demand(held(each), "a lease was lost at stop " + std::to_string(stop));
        });
    if (runs < 0)
        GTEST_SKIP() << "tracing is forbidden here";
    EXPECT_GT(runs, 10);
    EXPECT_EQ(engine.acquire(web, both, engine.release(web, both)), std::nullopt);
    EXPECT_EQ(held(base), reads);
    EXPECT_EQ(refusalOf(mail, {{base, Mode::exclusive}}) == "granted", !reads);
}

// What the first version stored: no stage, no caller, no lower files, and no handoff of a guest that never ran.
TEST_F(OnTheImage, AGuestOfTheFirstVersionGoesOnAndItsLowerFilesAreLeasedWithTheFirstCall) {
    const std::vector<Resource> disk{{image, Mode::exclusive}};
    std::string base = dir.file("base.img");
    unit::StandIn qemu([&] {
        web.pid = getpid();
        lease::Incarnation self{lease::hashDomain(web.uuid), 77};
        std::vector<qemu::StoredLease> leases;
        leases.push_back(openPlace(disk[0], self, settings).stored);
        AnyMedium medium(leases[0], self);
        lease::Share share{&*medium, Mode::exclusive};
        lease::Patience none{[](std::chrono::milliseconds) { return false; }};
        unit::demand(!lease::registerAll(self, {&share, 1}, none, lease::Entry::running).refusal, "refused");
        unit::ForgedVessel forged;
        forged.send(forged.message({web.uuid, self.id, web.name}, leases));
    });
    web.pid = qemu.pid();
    qemu.writes(image);
    qemu.reads(base);
    std::string state = engine.release(web, disk);
    EXPECT_FALSE(state.empty());
    EXPECT_TRUE(says(refusalOf(mail, {{base, Mode::exclusive}}), "'web'"));
    EXPECT_EQ(refusalOf(mail, {{base, Mode::readOnly}}), "granted");
    EXPECT_EQ(engine.acquire(web, disk, state), std::nullopt);
    EXPECT_TRUE(says(refusalOf(mail, disk), "in use by guest 'web'"));
    EXPECT_EQ(storedFor(qemu, web), 2u);
}

} // namespace
} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Leases that are not on the image: which names lead to one, what is refused, how lease files come and go, and what a
// QEMU that was broken into can make of them. That such leases work like others is told by engine_test.

#include "core/os/error.hpp"
#include "tests/support/unit_engine.hpp"
#include "tests/support/unit_vessel.hpp"

#include <atomic>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <linux/fs.h> // after sys/mount.h, whose names it makes macros (Linux 5.10)

namespace leasehold {
namespace {

using lease::Mode;
using storage::LockKind;
using storage::Scope;
using unit::errorOf;
using unit::says;
using unit::StandIn;

namespace fs = std::filesystem;

std::string makePrivate(const std::string& path) {
    fs::create_directory(path);
    fs::permissions(path, fs::perms::owner_all);
    return path;
}

std::size_t countFiles(const std::string& path) {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(path), fs::directory_iterator()));
}

Settings withLockspace(const unit::TempDir& dir) {
    Settings settings;
    settings.fileLockspaceDir = makePrivate(dir.path("lockspace"));
    settings.handoffWait = std::chrono::milliseconds(100);
    return settings;
}

class InALockspace : public unit::EngineTest {
protected:
    InALockspace() : EngineTest(withLockspace) {}

    std::string leaseFile() const { return fs::directory_iterator(settings.fileLockspaceDir)->path(); }
};

TEST_F(InALockspace, SymbolicLinksAndDetoursLeadToTheLeaseOfTheImage) {
    Qemu qemu = start(web, {{image}});
    fs::create_symlink(image, dir.path("link"));
    fs::create_directory(dir.path("folder"));
    for (const std::string& name : {image, dir.path("link"), dir.path("folder/../disk.img"), dir.path("./disk.img")})
        EXPECT_TRUE(says(refusalOf(mail, {{name}}), "in use by guest 'web'"));
    EXPECT_EQ(countFiles(settings.fileLockspaceDir), 1u);
}

TEST_F(InALockspace, ImageWithHardLinksIsRefusedAndLeavesNoLeaseFile) {
    fs::create_hard_link(image, dir.path("hard"));
    EXPECT_TRUE(says(refusalOf(web, {{image}}), "2 names (hard links)"));
    EXPECT_EQ(countFiles(settings.fileLockspaceDir), 0u);
}

TEST_F(InALockspace, ImageThatIsMovedUnderItsGuestIsNotFreeOnThisHost) {
    Qemu qemu = start(web, {{image}});
    std::string moved = dir.path("moved.img");
    fs::rename(image, moved);
    EXPECT_TRUE(says(refusalOf(mail, {{moved}}), "guest 'web'"));
}

TEST_F(InALockspace, PathStaysLeasedWhenItsImageIsReplaced) {
    Qemu qemu = start(web, {{image}});
    fs::rename(second, image);
    EXPECT_TRUE(says(refusalOf(mail, {{image}}), "in use by guest 'web'"));
}

TEST_F(InALockspace, LeaseFileDeletedUnderAGuestIsNoticedBeforeItRunsAgain) {
    Qemu qemu = start(web, {{image}});
    fs::remove(leaseFile());
    EXPECT_TRUE(says(refusalOf(mail, {{image}}), "guest 'web'")) << "on this host the companion still stands";
    Settings elsewhere = settings;
    elsewhere.hostLockspaceDir = dir.path("another host");
    Engine another{elsewhere, [](const std::string&) {}};
    Qemu thief(another, mail, {{image}});
    std::string error = errorOf([&] { (void)engine.acquire(web, {{image}}, ""); });
    EXPECT_TRUE(says(error, "'" + image + "'"));
    EXPECT_TRUE(says(error, "deleted from its lockspace"));
    EXPECT_TRUE(says(error, "destroy this guest"));
}

TEST_F(InALockspace, LeaseFileGoesWithTheDetachUnlessAnotherGuestUsesIt) {
    Qemu one = start(web, {}), two = start(mail, {{image, Mode::shared}});
    ASSERT_EQ(engine.acquire(web, {{image, Mode::shared}}, ""), std::nullopt);
    engine.detach(web, {{image, Mode::shared}});
    EXPECT_EQ(countFiles(settings.fileLockspaceDir), 1u);
    EXPECT_TRUE(says(refusalOf(web, {{image}}), "'mail'"));
    two.closes(image);
    engine.detach(mail, {{image, Mode::shared}});
    EXPECT_EQ(countFiles(settings.fileLockspaceDir), 0u);
    EXPECT_EQ(refusalOf(web, {{image}}), "granted");
}

TEST_F(InALockspace, FileOfSomethingElseIsNotTakenForALease) {
    Qemu qemu = start(web, {{image}});
    std::string name = leaseFile();
    std::ofstream(name) << "leasehold lease of file '/somewhere/else.img'\n";
    EXPECT_TRUE(says(refusalOf(mail, {{image}}), "belongs to something else"));
    qemu.kill();
    fs::resize_file(name, 0);
    EXPECT_EQ(refusalOf(web, {{image}}), "granted") << "a host that died before it wrote the inscription";
}

// readlink(2) of /proc/self/fd cannot tell it then, and another name would be another lease.
TEST_F(InALockspace, ImageWithAPathLongerThanThatCanBeToldIsRefused) {
    const std::string name(250, 'd');
    std::string tenBelow;
    for (int i = 0; i < 10; i++)
        tenBelow += "/" + name;
    // No path is longer than PATH_MAX: the second ten are made and reached through a link to the first.
    std::string half = dir.path("half"), deep = dir.path("deep");
    fs::create_directories(dir.path() + tenBelow);
    fs::create_directory_symlink(dir.path() + tenBelow, half);
    fs::create_directories(half + tenBelow);
    fs::create_directory_symlink(half + tenBelow, deep);
    std::string far = deep + "/disk.img";
    std::ofstream(far) << "data";
    EXPECT_TRUE(says(refusalOf(web, {{far}}), "File name too long"));
    settings.storageLocks = {{"/nowhere", LockKind::none, Scope::thisHost}};
    settings.fileLockspaceDir.clear();
    EXPECT_TRUE(says(errorOf([&] {
                         (void)openPlace({far}, {1, 1}, settings);
                     }),
                     "File name too long"))
        << "it may be below a path that is refused";
}

// A QEMU that was broken into has its lease file open for writing.
TEST_F(InALockspace, WhatAGuestWroteIntoItsLeaseFileDoesNotOutliveIt) {
    for (const char* text : {"owned", "leasehold lease of file '/somewhere/else.img'\n", "leasehold lease of"}) {
        Qemu qemu = start(web, {{image}});
        std::string name = leaseFile();
        std::fstream(name) << text;
        qemu.kill();
        EXPECT_EQ(refusalOf(mail, {{image}}), "granted") << text;
        std::string says = os::readFile(name, 4096);
        EXPECT_EQ(says.substr(0, says.find('\n')), "leasehold lease of file '" + image + "'");
    }
}

TEST_F(InALockspace, LeaseFilesOfGuestsThatHaveEndedDoNotPileUp) {
    Qemu living = start(web, {{image}}), suspended = start(mail, {{second}});
    (void)engine.release(mail, {{second}});
    constexpr int kGuests = 100;
    for (int i = 0; i < kGuests; i++) {
        Guest guest = named("guest", static_cast<unsigned char>(10 + i));
        Qemu brief = start(guest, {{dir.file("disk" + std::to_string(i))}});
        // What is younger than a minute is left.
        for (const std::string& lockspace : {settings.fileLockspaceDir, settings.hostLockspaceDir})
            for (const auto& entry : fs::directory_iterator(lockspace))
                fs::last_write_time(entry, fs::file_time_type::clock::now() - std::chrono::hours(1));
    }
    EXPECT_LT(countFiles(settings.fileLockspaceDir), 30u);
    EXPECT_LT(countFiles(settings.hostLockspaceDir), 30u);
    EXPECT_TRUE(says(refusalOf(db, {{image}}), "in use by guest 'web'"));
    EXPECT_TRUE(says(refusalOf(db, {{second}}), "by guest 'mail'"));
    EXPECT_EQ(engine.acquire(mail, {{second}}, ""), std::nullopt);
}

TEST_F(InALockspace, OfThisHostIsRefusedForAnImageThatOthersReach) {
    Settings far = settings;
    far.storageLocks = {{image, storage::LockKind::byteRange, storage::Scope::allHosts}};
    Engine other(far, [](const std::string&) {});
    std::string error = errorOf([&] { (void)openPlace({image}, {1, 1}, far); });
    EXPECT_TRUE(says(error, "'" + settings.fileLockspaceDir + "' (file_lockspace_dir)"));
    EXPECT_TRUE(says(error, "which only this host locks"));
    EXPECT_NO_THROW(openPlace({second}, {1, 1}, far));
}

// What is on storage without a lock to trust. Files of /proc are on one.
class WithoutLocks : public unit::EngineTest {
protected:
    const std::string medium = "/proc/version";
};

TEST_F(WithoutLocks, ReadersShareTheImageUnderALeaseOfThisHostAndAreToldSo) {
    Qemu one = start(web, {{medium, Mode::readOnly}});
    EXPECT_EQ(refusalOf(mail, {{medium, Mode::readOnly}}), "granted");
    Place place = openPlace({medium, Mode::readOnly}, {1, 1}, settings);
    EXPECT_TRUE(place.ofThisHost);
    EXPECT_TRUE(says(place.caution, "'" + medium + "' is leased for reading on this host only: it is on proc"));
    EXPECT_EQ(engine.acquire(web, {{medium, Mode::readOnly}}, ""), std::nullopt);
    EXPECT_EQ(storedFor(one, web), 1u);
    one.closes(medium);
    engine.detach(web, {{medium, Mode::readOnly}});
    EXPECT_EQ(storedFor(one, web), 0u);
    EXPECT_EQ(countFiles(settings.hostLockspaceDir), 0u);
}

TEST_F(WithoutLocks, WritersStayRefused) {
    for (Mode mode : {Mode::exclusive, Mode::shared})
        EXPECT_TRUE(says(errorOf([&] { (void)findPlace({medium, mode}, settings); }), "it is on proc"));
}

TEST_F(WithoutLocks, ReadersAreRefusedWhereTheClusterHasToRespectThemOrTheAdministratorSaysSo) {
    Settings strict = settings, refusing = settings;
    strict.requireClusterLeases = true;
    refusing.storageLocks = {{"/proc", LockKind::none, Scope::thisHost}};
    EXPECT_TRUE(says(errorOf([&] {
                         (void)openPlace({medium, Mode::readOnly}, {1, 1}, strict);
                     }),
                     "require_cluster_leases"));
    EXPECT_TRUE(says(errorOf([&] {
                         (void)openPlace({medium, Mode::readOnly}, {1, 1}, refusing);
                     }),
                     "the administrator refuses leases there"));
}

// Two libvirtds take and drop one lease as fast as they can; each drop sweeps the lease file.
TEST_F(InALockspace, SweepsBesideEntriesNeverGiveTheLeaseToTwo) {
    Qemu one = start(web, {}), two = start(mail, {});
    std::string witness = dir.path("witness");
    // However slow the machine is: until each of them has won often, or something is wrong.
    struct Score {
        std::atomic<int> wins[2];
        std::atomic<bool> wrong;
    };
    void* shared = mmap(nullptr, sizeof(Score), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(shared, MAP_FAILED);
    auto& score = *new (shared) Score();
    auto demand = [&](bool holds, const char* problem) {
        score.wrong = score.wrong || !holds;
        unit::demand(holds, problem);
    };
    auto fight = [&](const Guest& guest, int self) {
        while (!score.wrong && (score.wins[0] < 20 || score.wins[1] < 20)) {
            if (engine.acquire(guest, {{image}}, ""))
                continue;
            os::Fd alone;
            demand(os::tryOpenAt(AT_FDCWD, witness, O_CREAT | O_EXCL | O_WRONLY, 0600, alone) == 0,
                   "both have the lease");
            score.wins[self]++;
            demand(unlink(witness.c_str()) == 0, "the witness is gone");
            engine.detach(guest, {{image}});
        }
    };
    unit::Child rival([&](unit::Line& line) {
        line.hear();
        fight(mail, 1);
    });
    rival.line().say();
    fight(web, 0);
    EXPECT_EQ(rival.join(), "");
    munmap(shared, sizeof(Score));
}

// What a QEMU that was broken into says of its lease: true about the image, and about a file that is none of its own.
class Forged : public InALockspace {
protected:
    struct Forger : StandIn {
        Forger(Guest& guest, const std::string& image, const std::string& leasePath, const std::string& directory = "")
            : StandIn([&] {
                  unit::ForgedVessel forged;
                  std::vector<qemu::StoredLease> leases(1);
                  qemu::StoredLease& lease = leases[0];
                  lease.image = os::openFile(image, O_RDWR);
                  lease.file = os::identify(lease.image.get(), image);
                  lease.lease = os::openFile(leasePath, O_RDWR);
                  lease.writable = true;
                  lease.path = image;
                  if (!directory.empty())
                      lease.directory = os::openFile(directory, O_RDONLY | O_DIRECTORY);
                  forged.send(forged.message({guest.uuid, 77, guest.name}, leases));
              }) {
            guest.pid = pid();
        }
    };

    void callEverything() {
        for (const std::function<void()>& call : std::initializer_list<std::function<void()>>{
                 [&] { engine.release(web, {{image}}); }, [&] { engine.inquire(web, {{image}}); },
                 [&] { (void)engine.acquire(web, {{image}}, ""); },
                 [&] {
                     (void)engine.acquire(web, {{image, Mode::readOnly}}, "");
                 },
                 [&] { engine.detach(web, {{image}}); }})
            (void)errorOf(call);
    }
};

TEST_F(Forged, VesselDoesNotMakeUsRemoveAFile) {
    std::string empty = dir.file("empty"), other = dir.file("other", "not a lease"),
                pretence = dir.file("pretence", "leasehold lease of file '/a'\n");
    ASSERT_EQ(chmod(pretence.c_str(), 0666), 0) << "as if it belonged to QEMU";
    for (const std::string& path : {empty, other, pretence}) {
        Forger qemu(web, image, path);
        callEverything();
        EXPECT_TRUE(fs::exists(path)) << path;
    }
}

TEST_F(Forged, VesselDoesNotMakeUsLockAFileThatIsNoLease) {
    std::string other = dir.file("other", "not a lease");
    Forger qemu(web, image, other);
    callEverything();
    EXPECT_FALSE(held(Resource{.path = other}));
    std::string error = errorOf([&] { (void)engine.acquire(web, {{image}}, ""); });
    EXPECT_TRUE(says(error, "the lease of '" + image + "' is in a file that leasehold has not made"));
}

TEST_F(Forged, VesselDoesNotMakeUsChangeADirectoryOfItsOwn) {
    std::string folder = makePrivate(dir.path("folder")), mark = folder + "/00000001-00000001";
    std::string own = folder + "/" + lease::encodeMarkFileName({lease::hashDomain(web.uuid), 77});
    std::ofstream(folder + "/gate") << "precious";
    std::ofstream(mark) << "precious as well";
    std::ofstream(own) << lease::encodeMarks({});
    fs::permissions(folder, fs::perms::all);
    Forger qemu(web, image, own, folder);
    callEverything();
    EXPECT_EQ(fs::file_size(folder + "/gate"), 8u) << "a record was written";
    EXPECT_TRUE(fs::exists(mark)) << "swept";
    EXPECT_EQ(countFiles(folder), 3u);
}

TEST_F(Forged, VesselWithTheLeaseOfAnotherGuestTouchesNothingOfThatGuest) {
    Qemu victim = start(mail, {{second}});
    Forger qemu(web, image, leaseFile());
    callEverything();
    EXPECT_TRUE(says(refusalOf(db, {{second}}), "in use by guest 'mail'"));
    EXPECT_EQ(engine.acquire(mail, {{second}}, engine.release(mail, {{second}})), std::nullopt);
}

// <lease> elements.
class Named : public unit::EngineTest {
protected:
    Resource leaseOf(const std::string& path, const std::string& key = "key", std::uint64_t offset = 0,
                     const std::string& lockspace = "space") const {
        return {.path = path, .named = NamedLease{lockspace, key, offset}};
    }

    std::string folder = makePrivate(dir.path("targets"));
};

TEST_F(Named, LeaseIsOnePerLockspaceKeyAndOffset) {
    for (const std::string& target : {image, folder}) {
        Qemu qemu = start(web, {leaseOf(target)});
        std::string text = refusalOf(mail, {leaseOf(target)});
        EXPECT_TRUE(says(text, "in use by guest 'web'"));
        EXPECT_TRUE(says(text, "key in " + target));
        Qemu others = start(mail, {leaseOf(target, "other"), leaseOf(target, "key", 512),
                                   leaseOf(target, "key", 0, "elsewhere"), leaseOf(target, "key", 0, "")});
        EXPECT_EQ(storedFor(others, mail), 4u);
    }
}

TEST_F(Named, LeaseIsHandedOverLikeAnImage) {
    const std::vector<Resource> leases{leaseOf(image), leaseOf(folder)};
    Guest there = web;
    Qemu source = start(web, leases);
    std::string cookie = engine.inquire(web, leases);
    Qemu target = start(there, leases);
    engine.release(web, leases);
    EXPECT_TRUE(says(refusalOf(mail, {leases[1]}), "'web'"));
    EXPECT_EQ(engine.acquire(there, leases, cookie), std::nullopt);
    EXPECT_TRUE(engine.acquire(web, leases, cookie));
}

TEST_F(Named, LeaseComesAndGoesWhileTheGuestRuns) {
    Qemu qemu = start(web, {{image}});
    for (const std::string& target : {second, folder})
        for (int round = 0; round < 3; round++) {
            ASSERT_EQ(engine.acquire(web, {leaseOf(target)}, ""), std::nullopt);
            EXPECT_TRUE(held(leaseOf(target)));
            engine.detach(web, {leaseOf(target)});
            EXPECT_EQ(storedFor(qemu, web), 1u);
            EXPECT_EQ(countFiles(target == folder ? folder : dir.path(".leasehold")), 0u) << "the lease file is swept";
        }
    EXPECT_TRUE(held(image));
}

TEST_F(Named, LeaseOnAnImageDoesNotLeaseTheImage) {
    Qemu qemu = start(web, {leaseOf(image)});
    EXPECT_EQ(refusalOf(mail, {{image}}), "granted");
}

TEST_F(Named, SameLeaseTwiceInOneGuestIsRefused) {
    for (const std::string& target : {image, folder})
        EXPECT_TRUE(says(refusalOf(web, {leaseOf(target), {second}, leaseOf(target)}), "twice"));
    EXPECT_FALSE(held(second));
}

TEST_F(Named, TargetThatCannotHaveLeasesIsRefusedWithAReason) {
    ASSERT_EQ(mkfifo(dir.path("fifo").c_str(), 0600), 0);
    fs::create_symlink(image, dir.path("link"));
    fs::create_symlink(folder, dir.path("folder-link"));
    fs::create_directory(dir.path("open"));
    fs::permissions(dir.path("open"), fs::perms::all);
    const std::pair<std::string, const char*> rows[] = {{dir.path("missing"), "no such file"},
                                                        {dir.path("missing/target"), "no such file"},
                                                        {dir.path("fifo"), "a regular file or a directory"},
                                                        {"/dev/null", "a regular file or a directory"},
                                                        {dir.path("link"), "symbolic link"},
                                                        {dir.path("folder-link"), "symbolic link"},
                                                        {dir.path("open"), "others than root"}};
    for (const auto& [path, reason] : rows) {
        std::string text = refusalOf(web, {{second}, leaseOf(path)});
        EXPECT_TRUE(says(text, reason)) << path;
        EXPECT_TRUE(says(text, "'" + path + "'"));
        EXPECT_FALSE(held(second));
    }
}

// A block device for the length of a test.
class Loop {
public:
    explicit Loop(const std::string& backing, unsigned flags = 0) {
        os::Fd control;
        int number =
            os::tryOpen("/dev/loop-control", O_RDWR, control) == 0 ? ioctl(control.get(), LOOP_CTL_GET_FREE) : -1;
        if (number < 0 || os::tryOpen("/dev/loop" + std::to_string(number), O_RDWR, device_) != 0)
            return;
        os::Fd file = os::openFile(backing, O_RDWR);
        loop_config config{};
        config.fd = static_cast<std::uint32_t>(file.get());
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR | flags;
        struct stat status;
        if (ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0 && fstat(device_.get(), &status) == 0) {
            path_ = "/dev/loop" + std::to_string(number);
            number_ = status.st_rdev;
        }
    }

    const std::string& path() const { return path_; } // empty where there are none
    dev_t number() const { return number_; }
    int fd() const { return device_.get(); }
    std::string name() const { return path_.substr(std::string("/dev/").size()); }

private:
    os::Fd device_;
    std::string path_;
    dev_t number_ = 0;
};

Settings withHostLockspace(const unit::TempDir& dir) {
    Settings settings;
    settings.hostLockspaceDir = dir.path("host");
    return settings;
}

class Device : public unit::EngineTest {
protected:
    Device() : EngineTest(withHostLockspace) {}

    void SetUp() override {
        fs::resize_file(image, 1 << 20);
        loop.emplace(image);
        if (loop->path().empty())
            GTEST_SKIP() << "no loop devices here";
        node = dir.path("node");
        os::Fd opened;
        if (mknod(node.c_str(), S_IFBLK | 0600, loop->number()) < 0 || os::tryOpen(node, O_RDONLY, opened) != 0)
            GTEST_SKIP() << "no device nodes here";
    }

    std::optional<Loop> loop;
    std::string node;
};

TEST_F(Device, IsOneLeaseUnderAllItsNodes) {
    Qemu qemu = start(web, {{loop->path()}});
    EXPECT_TRUE(says(refusalOf(mail, {{node}}), "in use by guest 'web'"));
    EXPECT_TRUE(says(refusalOf(mail, {{loop->path(), Mode::readOnly}}), "in use by guest 'web'"));
    EXPECT_TRUE(says(refusalOf(mail, {{node}, {loop->path()}}), "twice"));
    qemu.closes(loop->path());
    engine.detach(web, {{node}});
    EXPECT_EQ(refusalOf(mail, {{loop->path()}}), "granted");
}

// It has no identity, so its lease goes by the path.
TEST_F(Device, IsOneLeaseUnderAllItsNodesInALockspaceToo) {
    Settings shared = settings;
    shared.fileLockspaceDir = makePrivate(dir.path("shared"));
    shared.singleHost = true;
    Engine other{shared, [](const std::string&) {}};
    Qemu qemu(other, web, {{loop->path()}});
    try {
        Qemu rival(other, mail, {{node}});
        FAIL() << "granted";
    } catch (const std::runtime_error& error) {
        EXPECT_TRUE(says(error.what(), "in use by guest 'web'"));
    }
}

TEST_F(Device, ALoopDeviceAndItsFileAreOneResource) {
    Loop other(image);
    ASSERT_NE(other.path(), "");
    for (const std::string& first : {loop->path(), image})
        for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
            Qemu qemu = start(web, {{first, mode}});
            for (const std::string& then : {loop->path(), other.path(), image}) {
                std::string refusal = refusalOf(mail, {{then}});
                EXPECT_TRUE(says(refusal, "in use by guest 'web'")) << first << " and " << then;
                if (first != image && then != first) {
                    EXPECT_TRUE(says(refusal, "the file '" + image + "', which '" + first + "' is on"));
                }
                if (mode == Mode::readOnly) {
                    EXPECT_EQ(refusalOf(mail, {{then, mode}}), "granted");
                }
            }
        }
    EXPECT_TRUE(says(refusalOf(web, {{loop->path()}, {image}}), "twice"));
    EXPECT_TRUE(says(refusalOf(web, {{loop->path()}, {other.path()}}), "twice"));
    EXPECT_EQ(refusalOf(web, {{second}, {loop->path()}}), "granted");
}

TEST_F(Device, LayersComeAndGoWithTheDevice) {
    Qemu qemu = start(web, {});
    for (int round = 0; round < 2; round++) {
        ASSERT_EQ(engine.acquire(web, {{loop->path()}}, ""), std::nullopt);
        EXPECT_TRUE(held(image));
        EXPECT_TRUE(says(refusalOf(mail, {{image}}), "guest 'web'"));
        engine.detach(web, {{loop->path()}});
        EXPECT_EQ(storedFor(qemu, web), 0u);
        EXPECT_FALSE(held(image));
    }
}

TEST_F(Device, AGuestWithLayersStopsRunsAndMigrates) {
    const std::vector<Resource> disks{{loop->path()}};
    Qemu qemu = start(web, disks);
    ASSERT_EQ(engine.acquire(web, disks, ""), std::nullopt);
    std::string state = engine.release(web, disks);
    ASSERT_EQ(engine.acquire(web, disks, state), std::nullopt);
    std::string cookie = engine.inquire(web, disks);
    Guest there = web;
    Qemu target = start(there, disks);
    (void)engine.release(web, disks);
    EXPECT_EQ(engine.acquire(there, disks, cookie), std::nullopt);
    EXPECT_TRUE(engine.acquire(web, disks, cookie)) << "it has gone";
    qemu.kill();
    EXPECT_TRUE(says(refusalOf(mail, {{image}}), "guest 'web'"));
    target.kill();
    EXPECT_EQ(refusalOf(mail, {{image}}), "granted");
}

TEST_F(Device, WithLayersIsAsBeforeWhereTheAdministratorSaysSo) {
    Settings without = settings;
    without.deviceLayers = false;
    Engine other{without, [](const std::string&) {}};
    Qemu qemu(other, web, {{loop->path()}}), rival(other, mail, {{image}});
}

TEST_F(Device, ALoopDeviceWhoseFileIsNotThereIsRefusedInWords) {
    std::string moved = dir.path("moved.img");
    fs::rename(image, moved);
    EXPECT_EQ(refusalOf(web, {{loop->path()}}), "granted") << "the kernel follows the name";
    fs::remove(moved);
    EXPECT_TRUE(says(refusalOf(web, {{loop->path()}}), "was deleted"));
    os::Fd control = os::openFile("/dev/loop-control", O_RDWR);
    int number = ioctl(control.get(), LOOP_CTL_GET_FREE);
    ASSERT_GE(number, 0);
    EXPECT_TRUE(says(refusalOf(web, {{"/dev/loop" + std::to_string(number)}}), "has no file behind it"));
}

TEST_F(Device, OfTheHostItselfIsRefusedWithTheReasonUnlessSomebodyKnowsBetter) {
    os::Fd claim = os::openFile(loop->path(), O_RDONLY | O_EXCL);
    std::string refusal = refusalOf(web, {{loop->path()}});
    EXPECT_TRUE(says(refusal, "'" + loop->path() + "'"));
    EXPECT_TRUE(says(refusal, "in use by this host itself: a program has it open for itself alone"));
    EXPECT_TRUE(says(refusal, "host_devices"));
    Settings knowing = settings;
    std::vector<std::string> told;
    for (auto what : {Settings::Outsiders::warn, Settings::Outsiders::ignore}) {
        knowing.hostDevices = what;
        Engine other{knowing, [&](const std::string& text) { told.push_back(text); }};
        EXPECT_NO_THROW(openPlace({loop->path()}, {1, 1}, knowing));
    }
    EXPECT_TRUE(says(openPlace({loop->path()}, {1, 1},
                               [&] {
                                   knowing.hostDevices = Settings::Outsiders::warn;
                                   return knowing;
                               }())
                         .caution,
                     "in use by this host itself"));
}

TEST_F(Device, ALockspaceThatOnlyThisHostSeesIsRefusedUnlessOneHostIsMeant) {
    Settings local = settings;
    local.fileLockspaceDir = makePrivate(dir.path("not mounted"));
    std::string error = errorOf([&] { (void)openPlace({node}, {1, 1}, local); });
    for (const std::string& part : {"'" + local.fileLockspaceDir + "' (file_lockspace_dir)",
                                    std::string("is it mounted?"), std::string("single_host")})
        EXPECT_TRUE(says(error, part));
    local.singleHost = true;
    EXPECT_EQ(openPlace({node}, {1, 1}, local).caution, "");
}

// Two partitions of one loop device, as `partx` would add them.
class Partitions : public Device {
protected:
    void SetUp() override {
        Device::SetUp();
        if (IsSkipped())
            return;
        loop.reset();
        loop.emplace(image, LO_FLAGS_PARTSCAN);
        other.emplace(image, LO_FLAGS_PARTSCAN);
        if (loop->path().empty() || other->path().empty())
            GTEST_SKIP() << "no two loop devices can be had";
        for (Loop* disk : {&*loop, &*other})
            for (int number : {1, 2}) {
                blkpg_partition partition{};
                partition.start = number * 65536;
                partition.length = 65536;
                partition.pno = number;
                blkpg_ioctl_arg add{BLKPG_ADD_PARTITION, 0, sizeof partition, &partition};
                if (ioctl(disk->fd(), BLKPG, &add) < 0)
                    GTEST_SKIP() << "no partitions of loop devices here";
                std::string name = disk->name() + "p" + std::to_string(number);
                unsigned major = 0, minor = 0;
                std::string text =
                    os::readFileIfPossible("/sys/block/" + disk->name() + "/" + name + "/dev", 64).value_or("");
                ASSERT_EQ(std::sscanf(text.c_str(), "%u:%u", &major, &minor), 2);
                part[disk == &*other][number] = dir.path(name);
                ASSERT_EQ(mknod(dir.path(name).c_str(), S_IFBLK | 0600, makedev(major, minor)), 0);
            }
    }
    void TearDown() override {
        for (auto* disk : {&loop, &other})
            for (int number : {1, 2}) {
                blkpg_partition partition{};
                partition.pno = number;
                blkpg_ioctl_arg del{BLKPG_DEL_PARTITION, 0, sizeof partition, &partition};
                if (disk->has_value())
                    (void)ioctl((*disk)->fd(), BLKPG, &del);
            }
    }

    std::optional<Loop> other;
    std::string part[2][3]; // of the loop devices, by number
};

TEST_F(Partitions, AreForTwoGuestsAndTheWholeIsForNeitherOfThem) {
    Qemu one = start(web, {{part[0][1]}});
    EXPECT_EQ(refusalOf(mail, {{part[0][2]}}), "granted");
    Qemu two = start(mail, {{part[0][2]}});
    for (const std::string& whole : {loop->path(), other->path(), image})
        for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
            std::string refusal = refusalOf(db, {{whole, mode}});
            EXPECT_TRUE(says(refusal, "in use by guest '")) << whole;
            EXPECT_TRUE(says(refusal, ", which '" + dir.path() + "/loop")) << "it says which layer the other has";
        }
    EXPECT_TRUE(says(refusalOf(db, {{part[0][1]}}), "guest 'web'"));
    EXPECT_TRUE(says(refusalOf(db, {{part[1][1]}}), "guest 'web'")) << "the same bytes by way of another loop device";
}

TEST_F(Partitions, AreKeptFromWhoeverComesWhileTheWholeIsUsed) {
    for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly})
        for (const std::string& whole : {loop->path(), image}) {
            Qemu qemu = start(web, {{whole, mode}});
            for (int disk : {0, 1})
                EXPECT_TRUE(says(refusalOf(mail, {{part[disk][1]}}), "in use by guest 'web'")) << whole;
        }
    EXPECT_EQ(refusalOf(mail, {{part[0][1]}}), "granted");
}

TEST_F(Partitions, AreKeptFromAFileThatWasInUseBeforeItHadALoopDevice) {
    Settings blind = settings;
    blind.deviceLayers = false; // as if there were no loop device yet
    Engine earlier{blind, [](const std::string&) {}};
    Qemu qemu(earlier, web, {{image}});
    EXPECT_TRUE(says(refusalOf(mail, {{part[0][1]}}), "'" + image + "'"));
}

TEST_F(Partitions, OfOneDiskInOneGuestHaveItsLayersTogether) {
    Qemu qemu = start(web, {{part[0][1]}, {part[0][2]}});
    ASSERT_EQ(engine.acquire(web, {{part[0][1]}, {part[0][2]}}, ""), std::nullopt);
    qemu.closes(part[0][1]);
    engine.detach(web, {{part[0][1]}});
    EXPECT_TRUE(says(refusalOf(mail, {{loop->path()}}), "guest 'web'")) << "the other one still stands on it";
    qemu.closes(part[0][2]);
    engine.detach(web, {{part[0][2]}});
    EXPECT_EQ(refusalOf(mail, {{loop->path()}}), "granted");
    EXPECT_TRUE(says(refusalOf(db, {{part[0][1]}, {loop->path()}}), "twice"));
}

TEST_F(Device, LeaseOfThisHostOnlyIsSaidToBeOne) {
    Qemu qemu = start(web, {});
    ASSERT_EQ(engine.acquire(web, {{node}}, ""), std::nullopt);
    ASSERT_EQ(warnings.size(), 1u);
    EXPECT_TRUE(says(warnings[0], "'" + node + "'"));
    EXPECT_TRUE(says(warnings[0], "on this host only"));
    EXPECT_TRUE(says(warnings[0], "file_lockspace_dir"));
}

TEST_F(Device, IsRefusedWhereLeasesOfAllHostsAreDemandedUnlessTheLockspaceGivesThem) {
    Settings strict = settings;
    strict.requireClusterLeases = true;
    EXPECT_TRUE(says(errorOf([&] { (void)openPlace({node}, {1, 1}, strict); }), "require_cluster_leases"));
    strict.fileLockspaceDir = makePrivate(dir.path("shared"));
    EXPECT_TRUE(says(errorOf([&] { (void)openPlace({node}, {1, 1}, strict); }), "is it mounted?"));
    strict.storageLocks = {{strict.fileLockspaceDir, storage::LockKind::byteRange, storage::Scope::allHosts}};
    Place place = openPlace({node}, {1, 1}, strict);
    EXPECT_EQ(place.caution, "");
    EXPECT_TRUE(place.guardable);
}

TEST_F(Device, NodeIsNeverFlockedNorLocked) {
    Qemu qemu = start(web, {{node}});
    os::Fd udev = os::openFile(loop->path(), O_RDONLY);
    EXPECT_EQ(os::tryFlock(udev.get(), os::LockType::write, node), os::LockOutcome::granted);
    EXPECT_EQ(os::findConflict(udev.get(), os::LockType::write, {0, 0}, node), std::nullopt);
}

// --- what would lead two guests to two leases of one image is refused

class PlaceOfALease : public unit::LeavesNoDescriptor {
protected:
    // Why the resource has no place, or "placed".
    std::string refusalOf(const Resource& resource) const {
        try {
            openPlace(resource, self, settings);
            return "placed";
        } catch (const Error& error) {
            return error.what();
        }
    }

    std::string makeLockspace(const std::string& name) const {
        std::filesystem::create_directory(dir.path(name));
        std::filesystem::permissions(dir.path(name), std::filesystem::perms::owner_all);
        return dir.path(name);
    }

    unit::TempDir dir;
    std::string image = dir.file("disk.img");
    lease::Incarnation self{1, 2};
    Settings settings = withHostLockspace(dir);
};

TEST_F(PlaceOfALease, LeaseFileThatNfsKeepsUnderAHiddenNameIsNotListed) {
    settings.fileLockspaceDir = makeLockspace("lockspace");
    Place place = openPlace({.path = image}, self, settings);
    ASSERT_TRUE(isListed(place.stored, self));
    std::filesystem::path file = *std::filesystem::directory_iterator(settings.fileLockspaceDir);
    std::filesystem::rename(file, file.parent_path() / ".nfs00000000000000010000002a");
    EXPECT_FALSE(isListed(place.stored, self));
}

TEST_F(PlaceOfALease, ImageThatIsABindMountHasNoLeaseThatGoesByItsPath) {
    std::string other = dir.file("mounted.img");
    std::string lockspace = makeLockspace("lockspace");
    unit::Child host([&](unit::Line& line) {
        bool mounted = unit::hasMountsOfItsOwn() && mount(image.c_str(), other.c_str(), nullptr, MS_BIND, nullptr) == 0;
        line.say(mounted ? 'm' : '-');
        line.hear();
        settings.fileLockspaceDir = lockspace;
        unit::demand(refusalOf({.path = other}).find("mount of its own") != std::string::npos,
                     refusalOf({.path = other}));
        settings = {.storageLocks = {{"/", LockKind::flock, Scope::allHosts}}};
        unit::demand(refusalOf({.path = other}).find("mount of its own") != std::string::npos,
                     refusalOf({.path = other}));
    });
    if (host.line().hear() != 'm')
        GTEST_SKIP() << "may not mount here";
    host.line().say();
    EXPECT_EQ(host.join(), "");
}

TEST_F(PlaceOfALease, FilesBesideAnImageOfAllHostsAreNotOnStorageOfOneHost) {
    settings.storageLocks = {{image, LockKind::flock, Scope::allHosts}};
    std::string text = refusalOf({.path = image});
    EXPECT_NE(text.find("other hosts reach the image"), std::string::npos) << text;
}

TEST_F(PlaceOfALease, RequireClusterLeasesRefusesStorageThatTheAdministratorCallsLocal) {
    Resource file{.path = "/proc/version", .mode = Mode::readOnly}; // procfs is not known to be local
    settings.storageLocks = {{"/proc", LockKind::byteRange, Scope::thisHost}};
    EXPECT_EQ(refusalOf(file), "placed");
    settings.requireClusterLeases = true;
    EXPECT_NE(refusalOf(file).find("require_cluster_leases"), std::string::npos) << refusalOf(file);
    settings.fileLockspaceDir = makeLockspace("lockspace");
    EXPECT_NE(refusalOf(file).find("require_cluster_leases"), std::string::npos) << refusalOf(file);
    EXPECT_EQ(refusalOf({.path = image}), "placed");
}

TEST_F(PlaceOfALease, LeaseOfSomethingElseIsNamedByItsOwnPath) {
    settings.fileLockspaceDir = makeLockspace("lockspace");
    settings.storageLocks = {{settings.fileLockspaceDir, LockKind::flock, Scope::allHosts}};
    ASSERT_EQ(refusalOf({.path = image}), "placed");
    std::filesystem::path gate = std::filesystem::directory_iterator(settings.fileLockspaceDir)->path() / "gate";
    std::ofstream(gate) << "leasehold lease of file '/another/image, whose name must be as long as this one'\n";
    std::string text = refusalOf({.path = image});
    EXPECT_NE(text.find("lease file '" + gate.string() + "' belongs to something else"), std::string::npos) << text;
}

} // namespace
} // namespace leasehold

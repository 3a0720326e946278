// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Leases that are not on the image: which names lead to one, what is refused, how lease files come and go, and what a
// QEMU that was broken into can make of them. That such leases work like others is told by engine_test.

#include "core/os/error.hpp"
#include "tests/support/unit_engine.hpp"
#include "tests/support/unit_vessel.hpp"

#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <linux/loop.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

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
    auto fight = [&](const Guest& guest) {
        int wins = 0;
        auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(700);
        while (std::chrono::steady_clock::now() < end) {
            if (engine.acquire(guest, {{image}}, ""))
                continue;
            os::Fd alone;
            unit::demand(os::tryOpenAt(AT_FDCWD, witness, O_CREAT | O_EXCL | O_WRONLY, 0600, alone) == 0,
                         "both have the lease");
            wins++;
            unit::demand(unlink(witness.c_str()) == 0, "the witness is gone");
            engine.detach(guest, {{image}});
        }
        return wins;
    };
    unit::Child rival([&](unit::Line& line) {
        line.hear();
        unit::demand(fight(mail) > 10, "it hardly ever got the lease");
    });
    rival.line().say();
    EXPECT_GT(fight(web), 10);
    EXPECT_EQ(rival.join(), "");
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
    explicit Loop(const std::string& backing) {
        os::Fd control;
        int number =
            os::tryOpen("/dev/loop-control", O_RDWR, control) == 0 ? ioctl(control.get(), LOOP_CTL_GET_FREE) : -1;
        if (number < 0 || os::tryOpen("/dev/loop" + std::to_string(number), O_RDWR, device_) != 0)
            return;
        os::Fd file = os::openFile(backing, O_RDWR);
        loop_config config{};
        config.fd = static_cast<std::uint32_t>(file.get());
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
        struct stat status;
        if (ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0 && fstat(device_.get(), &status) == 0) {
            path_ = "/dev/loop" + std::to_string(number);
            number_ = status.st_rdev;
        }
    }

    const std::string& path() const { return path_; } // empty where there are none
    dev_t number() const { return number_; }

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
    Engine other{shared, [](const std::string&) {}};
    Qemu qemu(other, web, {{loop->path()}});
    try {
        Qemu rival(other, mail, {{node}});
        FAIL() << "granted";
    } catch (const std::runtime_error& error) {
        EXPECT_TRUE(says(error.what(), "in use by guest 'web'"));
    }
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
    EXPECT_TRUE(says(errorOf([&] { (void)openPlace({node}, {1, 1}, strict); }), "require_cluster_leases"));
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
        bool mounted = unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                       mount(image.c_str(), other.c_str(), nullptr, MS_BIND, nullptr) == 0;
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

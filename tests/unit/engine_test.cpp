// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// The engine, as far as it shows better here than through the plugin: which names are one file, what a refusal says,
// deaths of libvirtd at any system call. Registrations happen in a child that becomes QEMU.

#include "core/holdings.hpp"
#include "core/os/error.hpp"
#include "tests/support/unit_media.hpp"
#include "tests/support/unit_vessel.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <unordered_map>

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold {
namespace {

using lease::Mode;
using unit::isFree;
using unit::StandIn;

class EngineWithGuests : public unit::EngineTest {
protected:
    // A program outside leasehold that says when it has the image locked.
    unit::Child lockingProgram(os::LockType type, os::Range range) const {
        return unit::Child([this, type, range](unit::Line& line) {
            os::Fd fd = os::openFile(image, O_RDWR);
            unit::demand(os::tryLock(fd.get(), type, range, image) == os::LockOutcome::granted, "no lock");
            line.say();
            line.hear();
        });
    }
};

TEST_F(EngineWithGuests, OneFileUnderTwoNamesIsOneResource) {
    std::filesystem::create_symlink(image, dir.path("symbolic"));
    std::filesystem::create_hard_link(image, dir.path("hard"));
    for (const char* name : {"symbolic", "hard"}) {
        Qemu qemu = start(web, {{image, Mode::exclusive}});
        std::string text = refusalOf(mail, {{dir.path(name), Mode::exclusive}});
        EXPECT_NE(text.find("in use by guest 'web'"), std::string::npos) << text;
        std::string twice =
            refusalOf(db, {{second, Mode::exclusive}, {dir.path(name), Mode::exclusive}, {image, Mode::exclusive}});
        EXPECT_NE(twice.find("the guest has it twice"), std::string::npos) << twice;
        EXPECT_FALSE(held(second)) << "all or nothing";
    }
}

TEST_F(EngineWithGuests, ABindMountIsTheSameResource) {
    std::string other = dir.file("mounted.img");
    unit::Child host([&](unit::Line& line) {
        bool mounted = unit::hasMountsOfItsOwn() && mount(image.c_str(), other.c_str(), nullptr, MS_BIND, nullptr) == 0;
        line.say(mounted ? 'm' : '-');
        line.hear();
        std::string text = refusalOf(mail, {{other, Mode::exclusive}});
        unit::demand(text.find("in use by guest 'web'") != std::string::npos, text);
    });
    if (host.line().hear() != 'm')
        GTEST_SKIP() << "may not mount here";
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    host.line().say();
    EXPECT_EQ(host.join(), "");
}

TEST_F(EngineWithGuests, TheSameReadOnlyImageTwiceIsFine) {
    std::filesystem::create_hard_link(image, dir.path("hard"));
    Qemu qemu = start(web, {{image, Mode::readOnly}, {image, Mode::readOnly}, {dir.path("hard"), Mode::readOnly}});
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_EQ(engine.acquire(web, {{image, Mode::readOnly}, {dir.path("hard"), Mode::readOnly}}, ""), std::nullopt);
    EXPECT_NE(refusalOf(mail, {{image, Mode::readOnly}, {image, Mode::exclusive}}).find("the guest has it twice"),
              std::string::npos);
}

TEST_F(EngineWithGuests, RefusalNamesImageGuestUuidPidHostAndWhatToDo) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    for (std::string text : {refusalOf(mail, {{image, Mode::exclusive}}), refusalOf(mail, {{image, Mode::readOnly}})})
        for (std::string part : {"image '" + image + "'", std::string("guest 'web'"), lease::formatUuid(web.uuid),
                                 "pid " + std::to_string(qemu.pid()), "host '" + std::string(host) + "'",
                                 std::string("guest 'mail'"), std::string("try again")})
            EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
    ASSERT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, ""), std::nullopt);
    std::string twin = refusalOf(web, {{image, Mode::exclusive}});
    EXPECT_NE(twin.find("guest 'web' already runs on this host"), std::string::npos) << twin;
}

TEST_F(EngineWithGuests, RefusalNamesTheProgramThatLocksTheWholeFile) {
    unit::Child program = lockingProgram(os::LockType::write, {0, 0});
    program.line().hear();
    std::string text = refusalOf(web, {{image, Mode::exclusive}});
    EXPECT_TRUE(unit::says(text, "locked as a whole"));
    EXPECT_TRUE(unit::says(text, "(pid " + std::to_string(program.pid()) + ")"));
}

// What a QEMU changes all the time begins anew until the deadline, and not a hundred times.
TEST(Insistence, EndsAtItsDeadlineAndForgivesOnce) {
    int tries = 0;
    EXPECT_THROW(
        insist(std::chrono::steady_clock::now(), [&]() -> std::optional<int> { return tries++, std::nullopt; }), Error);
    EXPECT_EQ(tries, 2);
    EXPECT_EQ(insist(std::chrono::steady_clock::now() + std::chrono::hours(1),
                     [&]() -> std::optional<int> { return tries++ < 20 ? std::nullopt : std::optional(7); }),
              7);
}

// Two UUIDs of one hash, as one in 500 million pairs.
TEST_F(EngineWithGuests, RefusalTellsGuestsApartWhoseUuidsMeetInTheirHash) {
    std::unordered_map<std::uint32_t, lease::Uuid> known;
    Guest other = db;
    for (std::uint64_t number = 0; other.uuid == db.uuid; number++) {
        lease::Uuid uuid{};
        std::memcpy(uuid.data(), &number, sizeof number);
        auto [place, fresh] = known.try_emplace(lease::hashDomain(uuid), uuid);
        if (!fresh) {
            web.uuid = place->second;
            other.uuid = uuid;
        }
    }
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    ASSERT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, ""), std::nullopt);
    std::string text = refusalOf(other, {{image, Mode::exclusive}});
    EXPECT_TRUE(unit::says(text, "guest 'web' (UUID " + lease::formatUuid(web.uuid)));
    EXPECT_TRUE(unit::says(text, "another UUID"));
    EXPECT_EQ(text.find("migrate"), std::string::npos) << text;
}

// libvirt shows the log in front of whatever QEMU died of.
TEST_F(EngineWithGuests, IncomingQemuSaysOnceWhoHasItsImagesAndDoesNotTakeThatForTheReason) {
    const std::vector<Resource> disks{{image, Mode::exclusive}, {second, Mode::exclusive}};
    Qemu source = start(web, disks);
    ASSERT_EQ(engine.acquire(web, disks, ""), std::nullopt);
    engine.inquire(web, disks);
    Guest arriving = web;
    const std::string log = dir.path("log");
    unit::StandIn destination([&] {
        Engine there(settings, [&](const std::string& text) { std::ofstream(log, std::ios::app) << text << '\n'; });
        arriving.pid = getpid();
        unit::demand(!there.registerGuest(arriving, disks), "refused");
    });
    std::string text = os::readFile(log, 4096);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
    EXPECT_TRUE(unit::says(text, "pid " + std::to_string(source.pid())));
    EXPECT_TRUE(unit::says(text, "and 1 more"));
    EXPECT_TRUE(unit::says(text, "Only if QEMU fails to get a lock"));
    // Who else wants the image is told of one guest.
    std::string refusal = refusalOf(mail, {{image, Mode::exclusive}});
    EXPECT_EQ(refusal.find("guest 'web'"), refusal.rfind("guest 'web'")) << refusal;
    EXPECT_TRUE(unit::says(refusal, "with 2 QEMUs, as in a migration"));
}

TEST_F(EngineWithGuests, RefusalNamesAGuestWithHundredsOfDisks) {
    std::vector<Resource> many{{image, Mode::exclusive}};
    for (const std::string& path : unit::makeImages(dir, 300))
        many.push_back({path, Mode::exclusive});
    Qemu qemu = start(web, many);
    std::string text = refusalOf(mail, {{image, Mode::exclusive}});
    EXPECT_NE(text.find("guest 'web'"), std::string::npos) << text;
}

TEST_F(EngineWithGuests, RefusalNamesTheGuestWithoutExtendedAttributesToo) {
    unit::TempDir memory("/dev/shm"); // tmpfs has user attributes since Linux 6.6 only
    std::string path = memory.file("disk.img");
    Qemu qemu = start(web, {{path, Mode::exclusive}});
    std::string text = refusalOf(mail, {{path, Mode::exclusive}});
    EXPECT_NE(text.find("guest 'web'"), std::string::npos) << text;
}

TEST_F(EngineWithGuests, RefusalNamesTheProgramOutsideLeasehold) {
    unit::Child program = lockingProgram(os::LockType::read, {201, 1});
    program.line().hear();
    std::string text = refusalOf(web, {{image, Mode::exclusive}});
    EXPECT_NE(text.find("(pid " + std::to_string(program.pid()) + ")"), std::string::npos) << text;
    EXPECT_NE(text.find("outside leasehold"), std::string::npos) << text;
    EXPECT_FALSE(held(image));
}

TEST_F(EngineWithGuests, BadImagesAreRefusedWithAReasonAndLeaveNothing) {
    std::filesystem::create_symlink(dir.path("gone"), dir.path("dangling"));
    ASSERT_EQ(mkfifo(dir.path("fifo").c_str(), 0600), 0);
    const std::pair<std::string, const char*> rows[] = {
        {dir.path("missing"), "there is no such file"},
        {image + "/x", "there is no such file"},
        {dir.path("dangling"), "a symbolic link to a file"},
        {dir.path(), "it is a directory"},
        {dir.path("fifo"), "neither a regular file, nor a block device, nor a directory"},
        {"/dev/null", "neither a regular file, nor a block device, nor a directory"},
        {"/proc/self/comm", "it is on proc"}};
    for (const auto& [path, reason] : rows) {
        std::string text = refusalOf(web, {{image, Mode::exclusive}, {path, Mode::exclusive}});
        EXPECT_NE(text.find(reason), std::string::npos) << text;
        EXPECT_NE(text.find(path), std::string::npos) << text;
        EXPECT_FALSE(held(image)) << path;
    }
    EXPECT_EQ(refusalOf(web, {{dir.path(), Mode::readOnly}}), "granted") << "a vvfat disk";
}

TEST_F(EngineWithGuests, StateOfGarbageIsAsGoodAsNone) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    for (std::string state : {std::string(), std::string("garbage"), std::string(100'000, 'x'), std::string("\0\1", 2),
                              std::string("leasehold1:"), engine.release(web, {{image, Mode::exclusive}})})
        EXPECT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, state), std::nullopt);
    EXPECT_TRUE(held(image));
}

TEST_F(EngineWithGuests, HotPlugAndUnplugHoldExactlyWhatIsAttached) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    std::size_t before = unit::countDescriptors();
    EXPECT_EQ(engine.acquire(web, {{second, Mode::exclusive}}, ""), std::nullopt);
    EXPECT_TRUE(held(second));
    EXPECT_EQ(storedFor(qemu, web), 2u);
    qemu.closes(image);
    engine.detach(web, {{image, Mode::exclusive}});
    EXPECT_FALSE(held(image));
    EXPECT_TRUE(held(second));
    engine.detach(web, {{image, Mode::exclusive}});
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_EQ(unit::countDescriptors(), before);
}

TEST_F(EngineWithGuests, ReAcquireForReadingLetsReadersInAndForWritingTakesItBack) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    qemu.closes(image); // by a snapshot, say: the image is a lower file from now on
    qemu.reads(image);
    EXPECT_EQ(engine.acquire(web, {{image, Mode::readOnly}}, ""), std::nullopt);
    {
        Qemu reader = start(mail, {{image, Mode::readOnly}});
        EXPECT_NE(refusalOf(db, {{image, Mode::exclusive}}), "granted");
        auto refusal = engine.acquire(web, {{image, Mode::exclusive}}, "");
        ASSERT_TRUE(refusal);
        EXPECT_NE(refusal->find("guest 'mail'"), std::string::npos) << *refusal;
    }
    EXPECT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, ""), std::nullopt);
    EXPECT_NE(refusalOf(mail, {{image, Mode::readOnly}}), "granted");
}

TEST_F(EngineWithGuests, ForgedVesselDoesNotMakeUsLockAnotherFile) {
    // The vessel claims, truly, that it holds `second`; libvirt asks for `image`.
    StandIn qemu([&] {
        unit::ForgedVessel forged;
        auto leases = unit::openLeases({second}, false);
        leases[0].path = image;
        qemu::GuestTag tag{web.uuid, 77, web.name};
        forged.send(forged.message(tag, leases));
    });
    web.pid = qemu.pid();
    engine.release(web, {{image, Mode::exclusive}});
    engine.inquire(web, {{image, Mode::exclusive}});
    EXPECT_TRUE(isFree(second, lease::kMarkArea));
    EXPECT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, ""), std::nullopt) << "a fresh lease, on the right file";
    EXPECT_TRUE(held(image));
    EXPECT_FALSE(held(second));
}

class EngineWithMedia : public unit::EngineWithMedia {
protected:
    // Both images are the guest's, and a stranger gets neither.
    void expectNobodyElse() const {
        for (const std::string& path : {image, second})
            EXPECT_NE(refusalOf(mail, {{path, Mode::exclusive}}).find("in use by guest 'web'"), std::string::npos);
    }
};

// libvirtd is killed at every system call of each of its calls; QEMU's lease stands, and the next call is right.
TEST_P(EngineWithMedia, LibvirtdKilledAtAnySystemCallLeavesTheLeaseAndAWorkingVessel) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    const std::vector<Resource> disks{{image, Mode::exclusive}}, plug{{second, Mode::exclusive}};
    const std::pair<const char*, std::function<void()>> calls[] = {
        {"release", [&] { engine.release(web, disks); }},
        {"acquire", [&] { unit::demand(!engine.acquire(web, disks, ""), "refused"); }},
        {"inquire", [&] { engine.inquire(web, disks); }},
        {"plug", [&] { unit::demand(!engine.acquire(web, plug, ""), "refused"); }},
        {"unplug", [&] { engine.detach(web, plug); }}};
    for (const auto& [name, call] : calls) {
        int deaths = unit::killAtEverySystemCall(
            call,
            [&, name = name](int stop) {
                SCOPED_TRACE(testing::Message() << name << " killed at stop " << stop);
                ASSERT_TRUE(held(image));
                auto vessel = qemu::Vessel::retrieve(qemu.process(), web.uuid);
                ASSERT_TRUE(vessel);
                ASSERT_GE(vessel->leases().size(), 1u);
                if (vessel->disordered())
                    (void)vessel->tryReplace(); // as the next call does
            },
            unit::placesPerTry());
        if (deaths < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(deaths * unit::placesPerTry(), 10) << name;
    }
    EXPECT_EQ(engine.acquire(web, disks, engine.release(web, disks)), std::nullopt);
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_FALSE(held(second));
}

TEST_P(EngineWithMedia, GuestMigratesAndNobodyElseComesInBetween) {
    const std::vector<Resource> disks{{image, Mode::exclusive}, {second, Mode::exclusive}};
    Guest there = web;
    Qemu source = start(web, disks);
    ASSERT_EQ(engine.acquire(web, disks, ""), std::nullopt);
    std::string cookie = engine.inquire(web, disks);
    expectNobodyElse();
    Qemu target = start(there, disks);
    expectNobodyElse();
    EXPECT_EQ(engine.release(web, disks), cookie);
    expectNobodyElse();
    ASSERT_EQ(engine.acquire(there, disks, cookie), std::nullopt);
    expectNobodyElse();
    auto refusal = engine.acquire(web, disks, cookie);
    ASSERT_TRUE(refusal) << "the source resumed beside its successor";
    EXPECT_NE(refusal->find("was taken over"), std::string::npos) << *refusal;
    source.kill();
    expectNobodyElse();
    EXPECT_EQ(engine.acquire(there, disks, engine.release(there, disks)), std::nullopt);
    target.kill();
    EXPECT_EQ(refusalOf(mail, disks), "granted");
}

// Started paused, or restored so: libvirt calls nothing at the source.
TEST_P(EngineWithMedia, GuestThatHasNotRunYetMigratesAndNobodyElseComesInBetween) {
    const std::vector<Resource> disks{{image, Mode::exclusive}, {second, Mode::exclusive}};
    Guest there = web;
    Qemu source = start(web, disks);
    expectNobodyElse();
    Qemu target = start(there, disks);
    expectNobodyElse();
    EXPECT_NE(engine.acquire(there, disks, ""), std::nullopt) << "it runs beside its source";
    source.kill();
    expectNobodyElse();
    EXPECT_EQ(engine.acquire(there, disks, ""), std::nullopt);
    expectNobodyElse();
    EXPECT_EQ(engine.acquire(there, disks, engine.release(there, disks)), std::nullopt);
    target.kill();
    EXPECT_EQ(refusalOf(mail, disks), "granted");
}

TEST_P(EngineWithMedia, ImageComesAndGoesAndComesAgain) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    std::size_t before = unit::countDescriptors();
    for (int round = 0; round < 3; round++) {
        ASSERT_EQ(engine.acquire(web, {{second, Mode::exclusive}}, ""), std::nullopt);
        EXPECT_TRUE(held(second));
        engine.detach(web, {{second, Mode::exclusive}});
        EXPECT_FALSE(held(second));
        {
            Qemu other = start(mail, {{second, Mode::exclusive}});
            auto refusal = engine.acquire(web, {{second, Mode::exclusive}}, "");
            ASSERT_TRUE(refusal);
            EXPECT_NE(refusal->find("in use by guest 'mail'"), std::string::npos) << *refusal;
        }
    }
    EXPECT_TRUE(held(image));
    EXPECT_EQ(storedFor(qemu, web), 1u);
    EXPECT_EQ(unit::countDescriptors(), before);
}

TEST_P(EngineWithMedia, ReadersAndSharersComeTogetherAndWritersDoNot) {
    for (Mode mode : {Mode::readOnly, Mode::shared}) {
        Qemu one = start(web, {{image, mode}}), two = start(mail, {{image, mode}});
        for (Mode other : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
            std::string text = refusalOf(db, {{image, other}});
            if (other == mode)
                EXPECT_EQ(text, "granted");
            else // names are looked for five seconds, which is short on a very busy machine
                EXPECT_TRUE(text.find("'web'") != std::string::npos ||
                            text.find("could not be found in time") != std::string::npos)
                    << text;
        }
    }
}

TEST_P(EngineWithMedia, BlockCommitGivesItsBaseToReadersAndTakesItBack) {
    Qemu qemu = start(web, {{image, Mode::exclusive}});
    qemu.closes(image); // by a snapshot, say: the image is a lower file from now on
    qemu.reads(image);
    EXPECT_EQ(engine.acquire(web, {{image, Mode::readOnly}}, ""), std::nullopt);
    {
        Qemu reader = start(mail, {{image, Mode::readOnly}});
        EXPECT_NE(refusalOf(db, {{image, Mode::exclusive}}), "granted");
        EXPECT_TRUE(engine.acquire(web, {{image, Mode::exclusive}}, ""));
    }
    EXPECT_EQ(engine.acquire(web, {{image, Mode::exclusive}}, ""), std::nullopt);
    EXPECT_NE(refusalOf(mail, {{image, Mode::readOnly}}), "granted");
}

INSTANTIATE_TEST_SUITE_P(Everywhere, EngineWithMedia, unit::everywhere(), unit::nameOfWhere);

} // namespace
} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Leases that are not on the image, as libvirtd sees them: lockspaces, marks that are files, <lease> elements.

#include "tests/plugin/libvirtd.hpp"

#include <filesystem>
#include <fstream>

#include <sys/stat.h>

namespace leasehold::plugin_test {
namespace {

// Two hosts with one configuration.
class Elsewhere : public PluginTest {
protected:
    static std::string option(const std::string& name, const std::string& value) {
        return name + " = \"" + value + "\"\n";
    }

    std::string lockspace(const std::string& name, mode_t mode = 0700) const {
        std::filesystem::create_directory(path(name));
        EXPECT_EQ(chmod(path(name).c_str(), mode), 0);
        return path(name);
    }

    static Disk lease(const std::string& key, const std::string& target, const std::string& space = "space",
                      unsigned long long offset = 0) {
        return {key, 0, LOCK_RESOURCE_LEASE, {}, support::LeaseTarget{target, space, offset}};
    }

    // A guest's whole life: nobody else comes in at any moment of it, and everybody afterwards.
    void liveAndMigrate(const std::string& config, const Disk& disk, const std::string& name) {
        Libvirtd here({.config = config}), there({.config = config});
        auto expectBusy = [&] { EXPECT_TRUE(refused(there.start(rival_, {disk}), kBusy, {name, "'web'", "'rival'"})); };
        Started source = boot(here, guest_, {disk});
        ASSERT_TRUE(granted(source));
        expectBusy();
        StateOutcome state = here.release(guest_, source.pid(), {disk});
        expectBusy();
        EXPECT_TRUE(granted(here.acquire(guest_, source.pid(), {disk}, {.state = state.state})));
        state = here.inquire(guest_, source.pid(), {disk});
        Started target = there.start(guest_, {disk});
        ASSERT_TRUE(granted(target));
        EXPECT_TRUE(granted(here.release(guest_, source.pid(), {disk})));
        expectBusy();
        EXPECT_TRUE(granted(there.acquire(guest_, target.pid(), {disk}, {.state = state.state})));
        EXPECT_TRUE(refused(here.acquire(guest_, source.pid(), {disk}, {.state = state.state}), kBusy, {"'web'"}));
        source.qemu->kill();
        expectBusy();
        const std::size_t before = there.descriptors();
        for (int round = 0; round < 3; round++) {
            EXPECT_TRUE(granted(there.detach(guest_, target.pid(), {disk})));
            EXPECT_TRUE(granted(here.start(rival_, {disk})));
            EXPECT_TRUE(granted(there.acquire(guest_, target.pid(), {disk})));
            expectBusy();
        }
        EXPECT_EQ(there.descriptors(), before);
        target.qemu->kill();
        EXPECT_TRUE(granted(here.start(rival_, {disk})));
    }

    std::string disk_ = image("disk.img");
};

TEST_F(Elsewhere, LeaseInALockspaceIsAsGoodAsOneOnTheImage) {
    liveAndMigrate(option("file_lockspace_dir", lockspace("space")), {disk_}, disk_);
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Elsewhere, LeaseOfFilesIsAsGoodAsOneOnTheImage) {
    liveAndMigrate("storage_locks = [ \"" + path("") + "=flock\" ]\n", {disk_}, disk_);
}

TEST_F(Elsewhere, LeaseOfFilesInALockspaceIsAsGoodAsOneOnTheImage) {
    liveAndMigrate(option("file_lockspace_dir", lockspace("space")) + "storage_locks = [ \"" + path("space") +
                       "=flock\" ]\n",
                   {disk_}, disk_);
}

TEST_F(Elsewhere, LeaseElementIsAsGoodAsAnImage) {
    liveAndMigrate("", lease("the-key", disk_), "the-key in " + disk_);
    liveAndMigrate("", lease("the-key", lockspace("targets"), ""), "the-key in " + path("targets"));
}

TEST_F(Elsewhere, LeaseElementKeepsOutItsTwinOnly) {
    Libvirtd host;
    const Started running = boot(host, guest_, {lease("key", disk_)});
    EXPECT_TRUE(refused(stranger().start(rival_, {{image("own.img")}, lease("key", disk_)}), kBusy, {"'web'", "key"}));
    EXPECT_TRUE(free(image("own.img"))) << "a refused start kept a lease";
    for (const Disk& other : {lease("other", disk_), lease("key", disk_, "elsewhere"), lease("key", disk_, ""),
                              lease("key", disk_, "space", 1048576)})
        EXPECT_TRUE(granted(stranger().start(rival_, {other})));
    EXPECT_TRUE(free(disk_)) << "the target itself is not leased";
}

TEST_F(Elsewhere, LeaseElementIsEnoughWhereDisksAreNotLeased) {
    Libvirtd host({.config = "auto_disk_leases = 0\nrequire_lease_for_disks = 1\n"});
    EXPECT_TRUE(refused(host.start(guest_, {{disk_}}), kUnsupported, {"'web'", "require_lease_for_disks"}));
    const Started running = boot(host, guest_, {{disk_}, lease("key", disk_)});
    EXPECT_TRUE(granted(running));
    EXPECT_TRUE(refused(stranger().start(rival_, {lease("key", disk_)}), kBusy, {"'web'"}));
}

TEST_F(Elsewhere, UnusableLockspaceRefusesTheStartAndNamesItselfAndTheOption) {
    const std::string missing = path("missing"), open = lockspace("open", 0777), file = image("file");
    std::filesystem::create_directory_symlink(lockspace("good"), path("link"));
    for (const std::string& space : {missing, open, file, path("link")}) {
        Libvirtd host({.config = option("file_lockspace_dir", space)});
        EXPECT_TRUE(refused(host.start(guest_, {{disk_}}), kUnsupported, {"'web'", space, "file_lockspace_dir"}));
        const Started running = boot(host, guest_, {});
        EXPECT_TRUE(granted(running)) << "nothing to lease";
        EXPECT_TRUE(refused(host.acquire(guest_, running.pid(), {{disk_}}), kUnsupported, {"'web'", space}));
    }
    EXPECT_TRUE(free(disk_));
}

TEST_F(Elsewhere, GuestFromBeforeALockspaceWasConfiguredGoesOn) {
    std::optional<Started> running;
    std::optional<std::string> state;
    {
        Libvirtd before;
        running = boot(before, guest_, {{disk_}});
        state = before.release(guest_, running->pid(), {{disk_}}).state;
    }
    Libvirtd after({.config = option("file_lockspace_dir", lockspace("space"))});
    EXPECT_TRUE(granted(after.acquire(guest_, running->pid(), {{disk_}}, {.state = state})));
    EXPECT_TRUE(leased(disk_));
    EXPECT_TRUE(granted(after.detach(guest_, running->pid(), {{disk_}})));
    EXPECT_TRUE(free(disk_));
}

// A QEMU that was broken into lies about leases of two or three descriptors: what libvirtd was told (hostile_qemu.c).
class HostileElsewhere : public Elsewhere, public testing::WithParamInterface<const char*> {};

TEST_P(HostileElsewhere, QemuHarmsNobodyElse) {
    const std::string treasure = image("treasure.img"), added = image("added.img");
    const std::string inLockspace = option("file_lockspace_dir", lockspace("space"));
    for (const std::string& config :
         {inLockspace, inLockspace + "storage_locks = [ \"" + path("space") + "=flock\" ]\n",
          "storage_locks = [ \"" + path("") + "=flock\" ]\n"}) {
        SCOPED_TRACE(config);
        for (const auto& entry : std::filesystem::directory_iterator(path("space")))
            std::filesystem::remove_all(entry); // no guest is left from the round before
        std::filesystem::remove(path("control"));
        Puppeteer qemu(path("control"));
        Libvirtd other({.config = config}),
            host({.config = "handoff_wait = 0\n" + config, .hostile = true, .control = path("control")});
        const Started hostile = boot(host, guest_, {{disk_}});
        ASSERT_TRUE(granted(hostile));
        qemu.takeOver();
        const Started victim = boot(other, rival_, {{treasure}});
        const std::size_t before = host.descriptors();
        const std::string command = GetParam();
        ASSERT_EQ(qemu.command(command.ends_with(' ') ? command + treasure : command), "ok");
        const Outcome outcomes[] = {host.acquire(guest_, hostile.pid(), {{disk_}}),
                                    host.release(guest_, hostile.pid(), {{disk_}}),
                                    host.inquire(guest_, hostile.pid(), {{disk_}}),
                                    host.acquire(guest_, hostile.pid(), {{disk_, LOCK_RESOURCE_READONLY}}),
                                    host.acquire(guest_, hostile.pid(), {{added}}),
                                    host.detach(guest_, hostile.pid(), {{added}}),
                                    host.acquire(guest_, hostile.pid(), {{treasure}}),
                                    host.detach(guest_, hostile.pid(), {{treasure}}),
                                    host.detach(guest_, hostile.pid(), {{disk_}})};
        for (const Outcome& outcome : outcomes) {
            EXPECT_LT(outcome.elapsed, std::chrono::seconds(60)) << outcome.message();
            EXPECT_TRUE(outcome.ok || !outcome.message().empty());
        }
        EXPECT_FALSE(outcomes[6].ok) << "the hostile guest was given its victim's image";
        EXPECT_EQ(host.descriptors(), before);
        EXPECT_TRUE(std::filesystem::exists(treasure));
        EXPECT_TRUE(kernelLocksOn(treasure).empty()) << "locked, though its lease is elsewhere";
        EXPECT_TRUE(refused(other.start(support::makeGuest("third", 3), {{treasure}}), kBusy, {"'rival'"}));
        const StateOutcome state = other.release(rival_, victim.pid(), {{treasure}});
        EXPECT_TRUE(granted(state));
        EXPECT_TRUE(granted(other.acquire(rival_, victim.pid(), {{treasure}}, {.state = state.state})));
    }
}

// The first entry stands behind the header and the name "web": mode at 107, flags, which descriptors.
INSTANTIATE_TEST_SUITE_P(Lie, HostileElsewhere,
                         testing::Values("drain", "keep", "strip", "swap ", "point ", "patch 107 1 2", "patch 107 1 3",
                                         "patch 108 1 0", "patch 108 1 255", "patch 109 1 0", "patch 109 1 1",
                                         "patch 109 1 2", "patch 109 1 3", "patch 109 1 255"),
                         [](const auto& value) {
                             std::string name = value.param;
                             for (char& c : name)
                                 c = c == ' ' ? '_' : c;
                             return name;
                         });

} // namespace
} // namespace leasehold::plugin_test

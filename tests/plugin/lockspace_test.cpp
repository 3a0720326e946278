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

} // namespace
} // namespace leasehold::plugin_test

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Where leases live: what would lead two guests to two leases of one image is refused.

#include "core/os/error.hpp"
#include "core/place.hpp"
#include "tests/support/unit_support.hpp"

#include <filesystem>
#include <fstream>

#include <sched.h>
#include <sys/mount.h>

namespace leasehold {
namespace {

using lease::Mode;
using storage::LockKind;
using storage::Scope;

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
    Settings settings;
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

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

} // namespace
} // namespace leasehold

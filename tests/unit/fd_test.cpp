// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/os/fd.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>
#include <filesystem>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

namespace leasehold::os {
namespace {

using unit::TempDir;

class Descriptor : public unit::LeavesNoDescriptor {};
class File : public unit::LeavesNoDescriptor {};

bool isOpen(int number) {
    return fcntl(number, F_GETFD) >= 0;
}

TEST_F(Descriptor, IsClosedWithItsOwner) {
    int number;
    {
        Fd fd = openFile("/dev/null", O_RDONLY);
        number = fd.get();
        EXPECT_TRUE(isOpen(number));
    }
    EXPECT_FALSE(isOpen(number));
}

TEST_F(Descriptor, HasOneOwnerAfterMoves) {
    Fd one = openFile("/dev/null", O_RDONLY);
    int number = one.get();
    Fd other(std::move(one));
    EXPECT_FALSE(one.open());
    Fd third = openFile("/dev/null", O_RDONLY);
    int replaced = third.get();
    third = std::move(other);
    EXPECT_EQ(third.get(), number);
    EXPECT_FALSE(isOpen(replaced));
    Fd& alias = third;
    third = std::move(alias);
    EXPECT_TRUE(isOpen(number)) << "moving onto itself closes nothing";
}

TEST_F(Descriptor, IsNotClosedOnceItWasReleased) {
    Fd fd = openFile("/dev/null", O_RDONLY);
    int number = fd.release();
    EXPECT_FALSE(fd.open());
    fd.reset();
    EXPECT_TRUE(isOpen(number));
    close(number);
}

TEST_F(Descriptor, IsClosedTogetherWithOthersOfItsOwnerAndWithNobodyElses) {
    std::vector<int> given;
    Fd stranger;
    {
        ClosedTogether closed;
        closed.add(Fd());
        for (int i = 0; i < 300; i++) { // more than go at once
            Fd fd = openFile("/dev/null", O_RDONLY);
            if (i == 150) {
                stranger = std::move(fd);
                continue;
            }
            given.push_back(fd.get());
            closed.add(std::move(fd));
        }
    }
    EXPECT_TRUE(isOpen(stranger.get()));
    EXPECT_EQ(given.size(), 299u);
    EXPECT_TRUE(std::none_of(given.begin(), given.end(), isOpen));
}

TEST_F(Descriptor, IsNeverInheritedByAnExecutedProgram) {
    Fd fd = openFile("/dev/null", O_RDONLY);
    EXPECT_NE(fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST_F(File, IsOneFileByEveryNameThatLeadsToIt) {
    TempDir dir;
    std::string image = dir.file("disk.img");
    std::filesystem::create_symlink(image, dir.path("symbolic"));
    std::filesystem::create_hard_link(image, dir.path("hard"));
    auto id = [](const std::string& path) { return identify(openFile(path, O_RDONLY).get(), path); };
    EXPECT_EQ(id(image), id(dir.path("symbolic")));
    EXPECT_EQ(id(image), id(dir.path("hard")));
    EXPECT_NE(id(image), id(dir.file("other.img")));
}

TEST_F(File, ThatIsMissingIsNamedInTheErrorWithItsReason) {
    try {
        openFile("/nowhere/disk.img", O_RDONLY);
        FAIL() << "opened what does not exist";
    } catch (const SystemError& error) {
        EXPECT_EQ(error.error(), ENOENT);
        EXPECT_EQ(error.fault(), Fault::system);
        EXPECT_STREQ(error.what(), "open /nowhere/disk.img: No such file or directory");
    }
}

TEST_F(File, IsReadUpToTheLimitOnly) {
    TempDir dir;
    std::string path = dir.file("text", std::string(10'000, 'x'));
    EXPECT_EQ(readFile(path, 20'000).size(), 10'000u);
    EXPECT_EQ(readFile(path, 5'000).size(), 5'000u);
    EXPECT_EQ(readFile(path, 0).size(), 0u);
}

TEST_F(File, ThatCannotBeReadIsAnErrorOrNothingAsTheCallerWishes) {
    EXPECT_THROW(readFile("/nowhere/text", 10), SystemError);
    EXPECT_THROW(readFile("/tmp", 10), SystemError) << "a directory";
    EXPECT_EQ(readFileIfPossible("/nowhere/text", 10), std::nullopt);
    EXPECT_EQ(readFileIfPossible("/tmp", 10), std::nullopt);
    EXPECT_EQ(readFileIfPossible("/dev/null", 10), "");
}

} // namespace
} // namespace leasehold::os

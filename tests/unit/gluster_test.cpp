// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/storage/gluster.hpp"
#include "tests/support/unit_support.hpp"

#include <filesystem>

#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::storage {
namespace {

using namespace std::string_literals;

const Mount kMount{.id = 1,
                   .point = "/mnt/g",
                   .type = "fuse.glusterfs",
                   .source = "h1:/lab/sub",
                   .options = {"rw", "user_id=0"},
                   .device = 0};

std::string translator(const std::string& name, const std::string& type, const std::string& options = "") {
    return "volume " + name + "\n    type " + type + "\n" + options + "end-volume\n\n";
}

std::string client(int number, const std::string& strict, const std::string& version = "10.3") {
    return translator("lab-client-" + std::to_string(number), "protocol/client",
                      "    option client-version " + version + "\n    option remote-subvolume /srv/my brick\n" +
                          (strict.empty() ? "" : "    option strict-locks " + strict + "\n"));
}

// As GlusterFS 10.3 shows it.
const std::string kAbove = translator("lab-dht", "cluster/distribute",
                                      "    option lock-migration off\n    subvolumes lab-client-0 lab-client-1\n") +
                           translator("lab-utime", "features/utime") +
                           translator("lab-write-behind", "performance/write-behind") +
                           translator("lab", "debug/io-stats") + translator("meta-autoload", "meta");

std::string doubt(const std::string& volfile) {
    return doubtGluster(volfile, kMount).reason;
}

TEST(Gluster, AVolumeWhoseClientsAreAllStrictIsTrusted) {
    for (const char* word : {"on", "yes", "true", "enable", "1"}) {
        EXPECT_EQ(doubt(client(0, word) + kAbove), "");
        EXPECT_EQ(doubt(client(0, word) + client(1, "on") + kAbove), "");
    }
    EXPECT_EQ(doubt(client(0, "on", "11.1") + kAbove), "");
}

TEST(Gluster, OneClientThatIsNotStrictRefusesTheVolumeWithTheTwoCommandsThatChangeIt) {
    for (const std::string& graph :
         {client(0, "off"), client(0, ""), client(0, "on") + client(1, "off"), client(0, "") + client(1, "on"),
          client(0, "strict-locks on"), client(0, "off\n    option x strict-locks on")}) {
        std::string reason = doubt(graph + kAbove);
        EXPECT_TRUE(unit::says(reason, "gluster volume set lab client.strict-locks on"));
        EXPECT_TRUE(unit::says(reason, "umount /mnt/g && mount /mnt/g"));
        EXPECT_FALSE(doubtGluster(graph + kAbove, kMount).ofVolume) << "another host may have it on";
    }
}

TEST(Gluster, WhatLosesTrackOfLocksRefusesTheVolumeByName) {
    for (const auto& [type, words] : {std::pair{"features/shard", "features.shard"},
                                      {"cluster/replicate", "replicated"},
                                      {"cluster/disperse", "cluster/disperse has not been tried"},
                                      {"features/new", "features/new has not been tried"}}) {
        std::string graph = client(0, "on") + translator("lab-x", type, "    subvolumes lab-client-0\n") + kAbove;
        EXPECT_TRUE(unit::says(doubt(graph), words));
        EXPECT_TRUE(doubtGluster(graph, kMount).ofVolume) << type;
    }
}

TEST(Gluster, AClientFromBeforeVersionTenIsNotTrusted) {
    for (const char* version : {"9.6", "3.12", "", "git"})
        EXPECT_TRUE(unit::says(doubt(client(0, "on", version) + kAbove), "before 10"));
}

TEST(Gluster, AGraphThatIsCutOffOrIsNoneIsNotTrusted) {
    const std::string whole = client(0, "on") + kAbove;
    ASSERT_EQ(doubt(whole), "");
    for (const std::string& text : {""s, "\n"s, "x"s, kAbove, "volume a\nend-volume\n"s, whole + "volume b\n",
                                    whole + "option strict-locks on\n", whole + "\0"s, "volume a\nvolume b\n" + whole})
        EXPECT_TRUE(unit::says(doubt(text), "cannot be understood")) << text;
    for (std::size_t length = 0; length < whole.size(); length++) {
        std::string text = whole.substr(0, length);
        if (!std::string_view(text).ends_with("end-volume") && !text.ends_with("\n")) {
            EXPECT_NE(doubt(text), "") << text;
        }
    }
}

// A mount of GlusterFS is a directory with such a file in it.
class GlusterMount : public unit::LeavesNoDescriptor {
protected:
    GlusterMount() { std::filesystem::create_directories(dir_.path(".meta/graphs/one")); }
    void link(const std::string& target) { std::filesystem::create_symlink(target, dir_.path(".meta/graphs/active")); }
    std::string write(const std::string& text, mode_t mode = 0444) {
        std::string path = dir_.file(".meta/graphs/one/volfile", text);
        EXPECT_EQ(chmod(path.c_str(), mode), 0);
        return path;
    }
    std::uint64_t device() const {
        struct stat status;
        EXPECT_EQ(stat(dir_.path().c_str(), &status), 0);
        return status.st_dev;
    }
    GlusterGraph read() { return readGlusterGraph(dir_.path(), device()); }

    unit::TempDir dir_;
};

TEST_F(GlusterMount, TheActiveGraphIsRead) {
    if (geteuid() != 0)
        GTEST_SKIP() << "its files are root's";
    std::string large(100000, 'x');
    write(large);
    link("one");
    EXPECT_EQ(read().problem, "");
    EXPECT_EQ(read().text, large);
}

TEST_F(GlusterMount, WithoutAnActiveGraphTheProblemIsTold) {
    EXPECT_TRUE(unit::says(read().problem, "No such file"));
    link("gone");
    EXPECT_TRUE(unit::says(read().problem, dir_.path(".meta/graphs/active/volfile")));
}

TEST_F(GlusterMount, WhatSomebodyElseMayHavePutThereIsNotBelieved) {
    if (geteuid() != 0)
        GTEST_SKIP() << "its files are root's";
    link("one");
    std::string path = write("x", 0644);
    EXPECT_TRUE(unit::says(read().problem, "not GlusterFS's own"));
    write("x");
    EXPECT_EQ(read().problem, "");
    EXPECT_TRUE(unit::says(readGlusterGraph(dir_.path(), device() + 1).problem, "not GlusterFS's own"));
    ASSERT_EQ(chown(path.c_str(), 1, 1), 0);
    EXPECT_TRUE(unit::says(read().problem, "not GlusterFS's own"));
    ASSERT_EQ(unlink(path.c_str()), 0);
    ASSERT_EQ(mkdir(path.c_str(), 0555), 0);
    EXPECT_TRUE(unit::says(read().problem, "not GlusterFS's own"));
    ASSERT_EQ(rmdir(path.c_str()), 0);
    ASSERT_EQ(mkfifo(path.c_str(), 0444), 0);
    EXPECT_TRUE(unit::says(read().problem, "not GlusterFS's own")) << "and nobody waits for its other end";
}

} // namespace
} // namespace leasehold::storage

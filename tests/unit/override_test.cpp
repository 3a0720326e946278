// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/storage/override.hpp"

#include <vector>

#include <gtest/gtest.h>

namespace leasehold::storage {
namespace {

TEST(Override, EveryWordMeansALockAndAScope) {
    struct Row {
        const char* text;
        LockKind lock;
        Scope scope;
    };
    for (const Row& row :
         {Row{"/srv=ofd", LockKind::byteRange, Scope::allHosts}, Row{"/srv=flock", LockKind::flock, Scope::allHosts},
          Row{"/srv=local", LockKind::byteRange, Scope::thisHost},
          Row{"/srv=refuse", LockKind::none, Scope::thisHost}}) {
        auto parsed = parseOverride(row.text);
        ASSERT_TRUE(parsed) << row.text;
        EXPECT_EQ(parsed->prefix, "/srv");
        EXPECT_EQ(parsed->lock, row.lock) << row.text;
        EXPECT_EQ(parsed->scope, row.scope) << row.text;
    }
}

TEST(Override, PrefixIsWrittenInOneWay) {
    struct Row {
        const char* text;
        const char* prefix;
    };
    for (const Row& row : {Row{"/=ofd", "/"}, Row{"//=ofd", "/"}, Row{"/a/=ofd", "/a"}, Row{"//a///b/./=ofd", "/a/b"},
                           Row{"/a=b=ofd", "/a=b"}, Row{"/a b/..c/d..=ofd", "/a b/..c/d.."}}) {
        auto parsed = parseOverride(row.text);
        ASSERT_TRUE(parsed) << row.text;
        EXPECT_EQ(parsed->prefix, row.prefix);
    }
}

TEST(Override, AnythingElseIsNone) {
    using namespace std::string_view_literals;
    for (std::string_view text :
         {""sv, "="sv, "/srv"sv, "/srv="sv, "=ofd"sv, "srv=ofd"sv, "./srv=ofd"sv, "/srv=OFD"sv, "/srv=ofd "sv,
          "/srv= ofd"sv, "/srv=yes"sv, "/srv/..=ofd"sv, "/../srv=ofd"sv, "/srv\0/x=ofd"sv, "/srv=ofd\0"sv})
        EXPECT_FALSE(parseOverride(text)) << text;
}

TEST(Override, TheLongestPrefixOfWholeComponentsWins) {
    std::vector<Override> overrides{{"/srv/images"}, {"/srv"}, {"/srv/images/fast"}};
    auto prefix = [&](std::string_view path) {
        const Override* found = findOverride(overrides, path);
        return found ? found->prefix : "";
    };
    EXPECT_EQ(prefix("/srv/images/disk.img"), "/srv/images");
    EXPECT_EQ(prefix("/srv/images"), "/srv/images");
    EXPECT_EQ(prefix("/srv/images/fast/disk.img"), "/srv/images/fast");
    EXPECT_EQ(prefix("/srv/images/faster/disk.img"), "/srv/images");
    EXPECT_EQ(prefix("/srv/images2/disk.img"), "/srv");
    EXPECT_EQ(prefix("/srv//images//disk.img"), "/srv/images");
    EXPECT_EQ(prefix("/srv2/disk.img"), "");
    EXPECT_EQ(prefix("/"), "");
    EXPECT_EQ(prefix("srv/disk.img"), "");
    EXPECT_EQ(prefix("/srv/../etc/disk.img"), "") << "where that leads only the kernel knows";
    EXPECT_EQ(prefix(""), "");
    overrides.push_back({"/"});
    EXPECT_EQ(prefix("/home/disk.img"), "/");
    EXPECT_EQ(prefix("/"), "/");
    EXPECT_EQ(prefix("/srv/x"), "/srv");
}

} // namespace
} // namespace leasehold::storage

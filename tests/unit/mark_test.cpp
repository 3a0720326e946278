// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/lease/mark.hpp"
#include "core/lease/state.hpp"

#include <set>

#include <gtest/gtest.h>

namespace leasehold::lease {
namespace {

constexpr Uuid kUuid{0xab, 0x1e, 0x33, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xfe, 0xff};
constexpr const char* kText = "ab1e3300-0102-0304-0506-0708090afeff";

TEST(Modes, AllowTwoDomainsOnlyAmongWritersThatShareAndAmongReaders) {
    const Mode modes[] = {Mode::exclusive, Mode::shared, Mode::readOnly};
    for (Mode one : modes)
        for (Mode other : modes)
            EXPECT_EQ(compatible(one, other), one == other && one != Mode::exclusive);
}

TEST(Uuids, AreWrittenAndReadAsLibvirtWritesThem) {
    EXPECT_EQ(formatUuid(kUuid), kText);
    EXPECT_EQ(parseUuid(kText), kUuid);
    EXPECT_EQ(parseUuid("AB1E3300-0102-0304-0506-0708090AFEFF"), kUuid);
}

TEST(Uuids, AreNothingElse) {
    for (const char* text :
         {"", "ab1e3300", "ab1e3300-0102-0304-0506-0708090afef", "ab1e3300-0102-0304-0506-0708090afeff0",
          "ab1e3300x0102-0304-0506-0708090afeff", "gb1e3300-0102-0304-0506-0708090afeff",
          "ab1e33000-102-0304-0506-0708090afeff", "------------------------------------"})
        EXPECT_EQ(parseUuid(text), std::nullopt) << text;
}

TEST(DomainHash, IsTheSameInEveryVersion) {
    // FNV-1a of 64 bits, its halves folded, the low 29 bits. Another value would hide guests of other versions and
    // hosts.
    EXPECT_EQ(hashDomain(Uuid{}), 148863964u);
    EXPECT_EQ(hashDomain(kUuid), 0xe5007a4u);
    EXPECT_EQ(hashDomain(kUuid) >> kDomainBits, 0u);
}

TEST(DomainHash, SpreadsUuidsThatAreNotRandom) {
    std::set<std::uint32_t> seen;
    for (unsigned i = 0; i < 1000; i++) {
        Uuid uuid{};
        uuid[15] = static_cast<unsigned char>(i);
        uuid[14] = static_cast<unsigned char>(i >> 8);
        seen.insert(hashDomain(uuid));
    }
    EXPECT_GT(seen.size(), 990u);
}

TEST(Ids, AreRandomAndNeverZeroOrTheLastByte) {
    std::set<std::uint32_t> seen;
    for (int i = 0; i < 1000; i++) {
        std::uint32_t id = drawId();
        EXPECT_NE(id, 0u);
        EXPECT_LT(id, (1u << kIdBits) - 1);
        seen.insert(id);
    }
    EXPECT_GT(seen.size(), 990u);
}

TEST(PresentMarks, SayTheirMode) {
    for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
        Mark mark = presentMark(mode, {5, 6});
        EXPECT_EQ(presentMode(mark), mode);
        EXPECT_EQ(mark.domain, 5u);
        EXPECT_EQ(mark.id, 6u);
    }
    for (MarkKind kind : {MarkKind::owner, MarkKind::sharedOwner, MarkKind::handoff, MarkKind::leaving, MarkKind::taken,
                          MarkKind::foreign})
        EXPECT_EQ(presentMode({kind, 5, 6}), std::nullopt);
}

TEST(State, ComesBackAsItsToken) {
    for (std::uint32_t token : {1u, 0x2afe0001u, (1u << kIdBits) - 1})
        EXPECT_EQ(parseState(encodeState(kUuid, token), kUuid), token);
    EXPECT_EQ(encodeState(kUuid, 0x2afe), std::string("leasehold1:") + kText + ":00002afe");
}

TEST(State, HasNoCharacterThatXmlKnows) {
    for (int i = 0; i < 100; i++)
        for (char c : encodeState(kUuid, drawId()))
            EXPECT_TRUE(std::isalnum(static_cast<unsigned char>(c)) ||
                        std::string_view(":._-").find(c) != std::string::npos);
}

TEST(State, OfAnotherDomainIsNoState) {
    EXPECT_EQ(parseState(encodeState(Uuid{}, 7), kUuid), std::nullopt);
}

TEST(State, ThatIsGarbageIsNoState) {
    std::string good = encodeState(kUuid, 0x2afe);
    for (std::size_t length = 0; length < good.size(); length++)
        EXPECT_EQ(parseState(good.substr(0, length), kUuid), std::nullopt) << "cut to " << length;
    std::string prefix = good.substr(0, good.size() - 8);
    for (std::string tail : {"00002afe0", "00000000", "ffffffff", "40000000", "-0002afe", "+0002afe", " 0002afe",
                             "0x002afe", "0000 afe", "0000g000", "00002afe ", "00002af\n"})
        EXPECT_EQ(parseState(prefix + tail, kUuid), std::nullopt) << tail;
    EXPECT_EQ(parseState(std::string("leasehold2") + good.substr(10), kUuid), std::nullopt);
    EXPECT_EQ(parseState(" " + good, kUuid), std::nullopt);
    EXPECT_EQ(parseState(std::string_view("\0\0\0\0", 4), kUuid), std::nullopt);
    EXPECT_EQ(parseState(std::string(1 << 20, 'x'), kUuid), std::nullopt);
    EXPECT_EQ(parseState("/var/lib/libvirt/sanlock:token", kUuid), std::nullopt);
}

} // namespace
} // namespace leasehold::lease

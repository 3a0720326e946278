// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// What inspect concludes from marks and locks: tables. And from vessels: whose backing file it is. tests/tools has the
// same on real images, against what QEMU says.

#include "core/explain.hpp"
#include "core/inspect.hpp"
#include "tests/support/unit_engine.hpp"

namespace leasehold {
namespace {

using lease::Mark;
using lease::MarkKind;
using os::LockClass;
using os::LockType;
using os::TableLock;

constexpr Mark kOwner{MarkKind::owner, 0, 0};
constexpr Mark kHandoff{MarkKind::handoff, 7, 99};
constexpr Mark kTaken{MarkKind::taken, 7, 99};
constexpr Mark kSelf{MarkKind::presentExclusive, 7, 1};
constexpr Mark kPeer{MarkKind::presentExclusive, 7, 2};
constexpr Mark kLeaving{MarkKind::leaving, 7, 1};

TEST(StateOfALease, FollowsFromTheMarks) {
    struct Row {
        Mark self;
        std::vector<Mark> marks;
        LeaseState state;
    };
    const Mark reader{MarkKind::presentReadOnly, 7, 1}, shared{MarkKind::presentShared, 7, 1};
    const Row rows[] = {
        {kSelf, {kSelf, kOwner}, LeaseState::held},
        {kSelf, {kSelf, kOwner, kHandoff}, LeaseState::suspended},
        {kSelf, {kSelf, kOwner, kHandoff, kLeaving}, LeaseState::migrating},
        {kSelf, {kSelf}, LeaseState::arrived},
        {kSelf, {kSelf, kOwner, Mark{MarkKind::handoff, 8, 99}}, LeaseState::held},
        {kPeer, {kSelf, kPeer, kOwner, kHandoff, kLeaving}, LeaseState::joined},
        {kPeer, {kSelf, kPeer, kOwner, kHandoff, kLeaving, kTaken}, LeaseState::held},
        {kPeer, {kSelf, kPeer, kOwner}, LeaseState::unclear},
        {reader, {reader, kHandoff}, LeaseState::held},
        {shared, {shared, kOwner}, LeaseState::arrived},
        {shared, {shared, Mark{MarkKind::sharedOwner, 7, 0}}, LeaseState::held},
        {shared, {shared, Mark{MarkKind::sharedOwner, 8, 0}}, LeaseState::arrived},
    };
    for (const Row& row : rows)
        EXPECT_EQ(describe(stateOf(row.self, row.marks)), describe(row.state)) << &row - rows;
}

TEST(AnswerOfQemu, IsThatOfItsSource) {
    struct Row {
        TableLock lock;
        std::string reader, writer;
    };
    auto range = [](LockType type, std::int64_t start, std::int64_t length) {
        return TableLock{.kind = LockClass::ofd, .type = type, .range = {start, length}};
    };
    const Row rows[] = {
        {range(LockType::read, 100, 1), "", ""},
        {range(LockType::read, 101, 1), "Failed to get shared \"write\" lock", "Failed to get shared \"write\" lock"},
        {range(LockType::read, 201, 1), "", "Failed to get \"write\" lock"},
        {range(LockType::read, 200, 1), "Failed to get \"consistent read\" lock",
         "Failed to get \"consistent read\" lock"},
        {range(LockType::read, 203, 1), "", "Failed to get \"resize\" lock"},
        {range(LockType::write, 0, 0), "Failed to lock byte 100", "Failed to lock byte 100"},
        {range(LockType::write, 201, 1), "Failed to lock byte 201", "Failed to lock byte 201"},
        {range(LockType::write, INT64_C(1) << 62, 1), "", ""},
        {TableLock{.kind = LockClass::flock, .type = LockType::write, .range = {0, 0}}, "", ""},
    };
    for (const Row& row : rows) {
        EXPECT_EQ(answerOfQemu({row.lock}, qemu::Use::readOnly), row.reader) << row.lock.range.start;
        EXPECT_EQ(answerOfQemu({row.lock}, qemu::Use::exclusive), row.writer) << row.lock.range.start;
    }
}

TEST(Advice, NamesTheServersRemedyForADeadHostOnNfs3AndBreaksNothing) {
    ImageView image;
    image.storage = {
        .name = "NFSv3", .lock = storage::LockKind::byteRange, .remote = true, .hidesReadLocks = true, .reason = ""};
    image.server = "filer";
    image.leases.push_back({.source = LeaseView::Source::record, .guest = "db", .host = "alpha"});
    std::string all;
    for (const std::string& sentence : adviseOn(image))
        all += sentence + "\n";
    EXPECT_NE(all.find("run: leasehold fenced alpha"), std::string::npos) << all;
    EXPECT_NE(all.find("on the NFS server 'filer': systemctl restart nfs-server && sm-notify -f"), std::string::npos)
        << all;
    image.leases[0].source = LeaseView::Source::vessel; // it runs here
    for (const std::string& sentence : adviseOn(image))
        EXPECT_EQ(sentence.find("nfs-server"), std::string::npos) << sentence;
}

TEST(Advice, DoesNotHaveTheOnlyCopyOfAGuestsMemoryDestroyed) {
    ImageView image;
    image.leases.push_back(
        {.state = LeaseState::arrived, .source = LeaseView::Source::vessel, .guest = "db", .host = "alpha"});
    const std::vector<std::string> advice = adviseOn(image);
    ASSERT_FALSE(advice.empty());
    EXPECT_EQ(advice[0].find("destroy"), std::string::npos) << advice[0];
    EXPECT_NE(advice[0].find("resume it or shut it down there"), std::string::npos) << advice[0];
}

TEST(Advice, SpeaksOfOtherHostsOnlyWhereTheyReachTheImage) {
    ImageView image;
    image.leases.push_back({}); // nobody knows whose
    for (bool remote : {false, true}) {
        image.storage.remote = remote;
        std::string all;
        for (const std::string& sentence : adviseOn(image))
            all += sentence + "\n";
        EXPECT_EQ(all.find("host") != std::string::npos, remote) << all;
    }
}

TEST(Advice, NamesTheCommandThatEvictsTheClientOfADeadHostOnCephFs) {
    ImageView image;
    image.storage = {.name = "CephFS", .lock = storage::LockKind::byteRange, .remote = true, .reason = ""};
    image.leases.push_back({.source = LeaseView::Source::record, .guest = "db", .host = "alpha"});
    std::string all;
    for (const std::string& sentence : adviseOn(image))
        all += sentence + "\n";
    EXPECT_NE(all.find("leasehold fenced alpha"), std::string::npos) << all;
    EXPECT_NE(all.find("client evict id="), std::string::npos) << all;
}

class InspectedGuest : public unit::EngineTest {
protected:
    LeaseView onlyLease(const std::string& path) const {
        Place place = findPlace({.path = path, .mode = lease::Mode::readOnly}, settings);
        auto leases = inspectImage(path, &place, lookAtProcesses()).leases;
        EXPECT_EQ(leases.size(), 1u) << path;
        return leases.empty() ? LeaseView() : leases[0];
    }
};

TEST_F(InspectedGuest, HasALeaseOfABackingFileAndItIsCalledThat) {
    const std::vector<Resource> disks{{image, lease::Mode::exclusive}};
    Qemu qemu = start(web, disks);
    qemu.reads(second);
    ASSERT_EQ(engine.acquire(web, disks, ""), std::nullopt);
    EXPECT_TRUE(onlyLease(second).lower);
    EXPECT_FALSE(onlyLease(image).lower);

    GuestView guest{.tag = {.uuid = web.uuid, .incarnation = 0, .name = ""}, .pid = web.pid};
    ASSERT_EQ(surveyLeases(guest), Protection::leased);
    ASSERT_EQ(guest.leases.size(), 2u);
    for (const StoredView& lease : guest.leases)
        EXPECT_EQ(lease.lower, lease.path == second) << lease.path;

    std::string text = refusalOf(mail, {{second, lease::Mode::exclusive}});
    EXPECT_NE(text.find("guest 'web'"), std::string::npos) << text;
    EXPECT_NE(text.find("read-only, as a backing file)"), std::string::npos) << text;
}

// It has the only copy of the guest's memory.
TEST_F(InspectedGuest, ThatArrivedSuspendedWaitsForNobodyWhenItsSourceHasEnded) {
    const std::vector<Resource> disks{{image, lease::Mode::exclusive}};
    Qemu source = start(web, disks);
    ASSERT_EQ(engine.acquire(web, disks, ""), std::nullopt);
    engine.release(web, disks);
    Guest arrived = web;
    Qemu destination = start(arrived, disks);
    auto stateHere = [&] {
        GuestView guest{.tag = {.uuid = arrived.uuid, .incarnation = 0, .name = ""}, .pid = arrived.pid};
        EXPECT_EQ(readLeases(guest), Protection::leased);
        return guest.leases.empty() ? "none" : describe(guest.leases[0].state);
    };
    EXPECT_EQ(stateHere(), "joined");
    source.kill();
    EXPECT_EQ(stateHere(), "arrived");
    EXPECT_EQ(describe(onlyLease(image).state), "arrived");
}

TEST_F(InspectedGuest, IsNotCalledAnotherUsersWhereTheSearchForItsNameRanOutOfTime) {
    const lease::Incarnation stranger{12345, lease::drawId()};
    const Place place = openPlace({.path = image, .mode = lease::Mode::exclusive}, stranger, settings);
    const lease::Refusal refusal{0, lease::Obstacle::guestPresent, {kSelf}};
    const os::LockHolders cut{.pids = {}, .complete = false};
    for (const std::chrono::milliseconds limit : {std::chrono::milliseconds(-1), std::chrono::milliseconds(3600'000)}) {
        Neighbours neighbours(limit);
        std::string text = explainRefusal(web, place.stored, lease::Mode::exclusive, refusal, neighbours);
        EXPECT_EQ(text.find("in time, among very many processes") != std::string::npos, limit.count() < 0) << text;
        EXPECT_EQ(text.find("another user's or in a container") == std::string::npos, limit.count() < 0) << text;
    }
    Neighbours neighbours;
    std::string text = explainOutsider(place.stored, "locks it as virtlockd does", cut, 0, neighbours);
    EXPECT_NE(text.find("in time, among very many processes"), std::string::npos) << text;
}

TEST_F(InspectedGuest, WithAnImageOfItsOwnForReadingHasNoBackingFile) {
    const std::vector<Resource> disks{{image, lease::Mode::readOnly}};
    Qemu qemu = start(web, disks);
    EXPECT_FALSE(onlyLease(image).lower);
    std::string text = refusalOf(mail, {{image, lease::Mode::exclusive}});
    EXPECT_EQ(text.find("backing file"), std::string::npos) << text;
}

} // namespace
} // namespace leasehold

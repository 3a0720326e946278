// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// releaseAll, inquireAll, downgrade and upgrade, and whole migrations made of them.

#include "tests/support/unit_actor.hpp"

#include <optional>

namespace leasehold::lease {
namespace {

using namespace unit;

class Handoff : public ProtocolTest {};

TEST_F(Handoff, ReleaseKeepsTheImageLocked) {
    Actor web(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.release();
    EXPECT_TRUE(web.owns());
    EXPECT_TRUE(web.present());
    EXPECT_EQ(web.handoff(), token);
    EXPECT_TRUE(refused(mail.enter().refusal, Obstacle::guestPresent));
}

TEST_F(Handoff, SecondReleaseChangesNothing) {
    Actor web(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.release();
    std::size_t locks = web.count();
    EXPECT_EQ(web.release(), token);
    EXPECT_EQ(web.count(), locks);
    EXPECT_TRUE(web.owns());
}

TEST_F(Handoff, ReleaseAfterInquireKeepsTheOwnerMarkWhenNobodyHasJoined) {
    Actor web(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.inquire();
    EXPECT_EQ(web.release(), token);
    EXPECT_TRUE(web.owns());
    EXPECT_TRUE(refused(mail.enter().refusal, Obstacle::guestPresent));
}

TEST_F(Handoff, ReleaseWithoutInquireKeepsTheOwnerMarkThoughSomebodyJoined) {
    Actor web(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    web.release();
    ASSERT_TRUE(granted(target.enter()));
    web.release();
    EXPECT_TRUE(web.owns());
}

TEST_F(Handoff, ReleaseGivesTheOwnerMarkToAJoinerOnly) {
    Actor web(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image), next(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.inquire();
    ASSERT_TRUE(granted(target.enter()));
    web.release();
    EXPECT_FALSE(web.owns());
    EXPECT_EQ(web.release(), token) << "twice is as good as once";
    ASSERT_TRUE(granted(target.acquire(token)));
    // The source lingers with its handoff up: it is no joiner for the migration that follows.
    target.inquire();
    target.release();
    EXPECT_TRUE(target.owns());
    EXPECT_TRUE(refused(next.enter().refusal, Obstacle::sameGuest)) << "a third";
    web.die();
    EXPECT_TRUE(granted(next.enter()));
    target.release();
    EXPECT_FALSE(target.owns());
}

TEST_F(Handoff, AReleaseOfTheDestinationThatNeverRanDoesNotStopTheMigration) {
    Actor web(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.inquire();
    ASSERT_TRUE(granted(target.enter()));
    target.release();
    EXPECT_FALSE(target.owns());
    web.release();
    EXPECT_FALSE(web.owns());
    EXPECT_TRUE(granted(target.acquire(token)));
}

TEST_F(Handoff, InquireThatIsNotFollowedByAMigrationIsUndoneByTheNextAcquire) {
    Actor web(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image), late(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.inquire();
    ASSERT_TRUE(granted(target.enter()));
    target.die();
    EXPECT_TRUE(web.owns());
    EXPECT_TRUE(granted(web.acquire()));
    EXPECT_EQ(web.count(), 2u);
    EXPECT_TRUE(refused(late.enter().refusal, Obstacle::sameGuest));
    EXPECT_TRUE(refused(late.acquire(token), Obstacle::sameGuest));
}

// As a libvirtd leaves it that dies before it notes the token, or does not.
void showHandoff(Actor& actor, std::size_t image, std::uint32_t token, std::uint32_t noted) {
    lease::Medium& medium = *actor.shares()[image].medium;
    ASSERT_EQ(medium.tryPlace({MarkKind::handoff, kWeb, token}, os::LockType::write), os::LockOutcome::granted);
    medium.setNote({.owner = true, .leaving = false, .token = noted});
}

TEST_F(Handoff, EveryInquireDrawsAnotherToken) {
    Actor web(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t suspended = web.release(), first = web.inquire(), again = web.inquire();
    EXPECT_NE(suspended, first);
    EXPECT_NE(first, again);
    EXPECT_EQ(web.count(), 4u) << "one handoff only";
    ASSERT_TRUE(granted(target.enter()));
    web.release();
    EXPECT_TRUE(refused(target.acquire(first), Obstacle::sameGuest));
    EXPECT_TRUE(refused(target.acquire(suspended), Obstacle::sameGuest));
    EXPECT_TRUE(granted(target.acquire(again)));
}

TEST_F(Handoff, SeveralImagesGoUnderOneToken) {
    Actor web(kWeb, Mode::exclusive, both);
    ASSERT_TRUE(granted(web.enter()));
    std::uint32_t token = web.release();
    EXPECT_EQ(web.handoff(0), token);
    EXPECT_EQ(web.handoff(1), token);
    token = web.inquire();
    EXPECT_EQ(web.handoff(0), token);
    EXPECT_EQ(web.handoff(0), web.handoff(1));
}

TEST_F(Handoff, TokensThatAnInterruptedChangeLeftDifferentAreReplaced) {
    Actor web(kWeb, Mode::exclusive, both);
    ASSERT_TRUE(granted(web.enter()));
    for (std::uint32_t i : {0u, 1u})
        showHandoff(web, i, 100 + i, 100 + i);
    std::uint32_t token = web.release();
    EXPECT_EQ(web.handoff(0), token);
    EXPECT_EQ(web.handoff(1), token);
    EXPECT_EQ(web.count(0), 3u);
    EXPECT_EQ(web.count(1), 3u);
}

TEST_F(Handoff, ATokenThatOneImageHasNotedIsPlacedOnceOnTheOther) {
    Actor web(kWeb, Mode::exclusive, both);
    ASSERT_TRUE(granted(web.enter()));
    showHandoff(web, 0, 100, 100);
    showHandoff(web, 1, 100, 0);
    EXPECT_EQ(web.release(), 100u);
    EXPECT_EQ(web.handoff(1), 100u);
    EXPECT_EQ(web.count(1), 3u);
}

// A libvirtd died between the mark and its note. Nobody was told that token.
TEST_F(Handoff, OneThatNoNoteTellsOfStaysUntilTheGuestRunsOrMigrates) {
    for (bool migrates : {false, true}) {
        std::optional<Actor> web(std::in_place, kWeb, Mode::exclusive, both);
        ASSERT_TRUE(granted(web->enter()));
        for (std::uint32_t i : {0u, 1u})
            showHandoff(*web, i, 100 + i, 0);
        std::uint32_t token = web->release();
        for (std::uint32_t i : {0u, 1u}) {
            EXPECT_TRUE(web->has({MarkKind::handoff, kWeb, token}, i));
            EXPECT_TRUE(web->has({MarkKind::handoff, kWeb, 100 + i}, i));
        }
        if (migrates)
            token = web->inquire();
        else
            EXPECT_TRUE(granted(web->acquire(token)));
        for (std::size_t i : {0, 1})
            EXPECT_EQ(web->handoff(i), migrates ? std::optional(token) : std::nullopt);
        EXPECT_EQ(web->count(1), migrates ? 4u : 2u);
    }
}

TEST_F(Handoff, ReadersHaveNothingToHandOver) {
    Actor reader(kWeb, Mode::readOnly, image);
    ASSERT_TRUE(granted(reader.enter()));
    reader.release();
    reader.inquire();
    EXPECT_EQ(reader.count(), 2u);
}

// A -> B -> A, once with sources that end and once with sources that linger; a third party is refused all the way.
TEST_F(Handoff, MigratesThereAndBackWithNoMomentForAThirdParty) {
    for (Mode mode : {Mode::exclusive, Mode::shared})
        for (bool lingering : {false, true}) {
            SCOPED_TRACE(testing::Message() << int(mode) << lingering);
            Actor first(kWeb, mode, image), there(kWeb, mode, image), back(kWeb, mode, image);
            auto nobodyElse = [&] {
                for (Mode tried : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
                    Actor third(kMail, tried, image);
                    if (!compatible(tried, mode)) {
                        EXPECT_TRUE(refused(third.enter().refusal, Obstacle::guestPresent));
                    }
                    Actor twin(kWeb, tried == Mode::exclusive ? mode : tried, image);
                    twin.enter();
                    EXPECT_FALSE(twin.owns());
                }
            };
            ASSERT_TRUE(granted(first.enter()));
            first.before = there.before = back.before = nobodyElse;
            ASSERT_TRUE(granted(first.acquire()));
            std::uint32_t token = first.inquire();
            ASSERT_TRUE(granted(there.enter()));
            EXPECT_EQ(first.release(), token);
            ASSERT_TRUE(granted(there.acquire(token)));
            if (!lingering)
                first.die();
            token = there.inquire();
            if (lingering) {
                EXPECT_TRUE(refused(back.enter().refusal, Obstacle::sameGuest)) << "a third";
                first.die();
            }
            ASSERT_TRUE(granted(back.enter()));
            EXPECT_EQ(there.release(), token);
            ASSERT_TRUE(granted(back.acquire(token)));
            there.die();
            EXPECT_TRUE(back.owns());
            EXPECT_TRUE(granted(back.acquire(back.release())));
        }
}

// The destination dies before the guest runs there, and the source goes on. Whoever looks at the destination's leases
// just then, as `leasehold status` does, has them an instant longer. The source may have no state: a libvirtd that was
// killed in its Release has lost it.
TEST_F(Handoff, SourceGoesOnWhenTheMarksOfASuccessorThatDiedVanishAMomentLater) {
    for (const Mode mode : {Mode::exclusive, Mode::shared})
        for (const bool taken : {true, false})
            for (const bool hasState : {true, false}) {
                Actor source(kWeb, mode, image), target(kWeb, mode, image);
                ASSERT_TRUE(granted(source.enter()));
                std::uint32_t token = source.inquire();
                ASSERT_TRUE(granted(target.enter()));
                source.release();
                if (taken) {
                    ASSERT_TRUE(granted(target.acquire(token)));
                }
                auto state = hasState ? std::optional(token) : std::nullopt;
                if (taken || !hasState) {
                    EXPECT_FALSE(granted(source.acquire(state)));
                }
                source.lingering = std::chrono::minutes(1);
                source.pause = [&] {
                    target.die();
                    return true;
                };
                EXPECT_TRUE(granted(source.acquire(state))) << taken << hasState;
            }
}

TEST_F(Handoff, OfASharedImageNeverDisturbsTheOtherGuestsOnIt) {
    Actor mail(kMail, Mode::shared, image), source(kWeb, Mode::shared, image), target(kWeb, Mode::shared, image);
    ASSERT_TRUE(granted(mail.enter()));
    ASSERT_TRUE(granted(source.enter()));
    std::uint32_t token = source.inquire();
    ASSERT_TRUE(granted(target.enter()));
    source.release();
    EXPECT_FALSE(source.owns());
    EXPECT_TRUE(refused(target.acquire(), Obstacle::sameGuest));
    ASSERT_TRUE(granted(target.acquire(token)));
    EXPECT_TRUE(target.owns());
    EXPECT_TRUE(refused(source.acquire(token), Obstacle::stateTaken));
    EXPECT_TRUE(mail.owns());
    EXPECT_TRUE(granted(mail.acquire()));
    Actor db(3, Mode::shared, image);
    EXPECT_TRUE(granted(db.enter())) << "the entry is free for others";
}

TEST_F(Handoff, TwoSharedGuestsMigrateAtTheSameTime) {
    Actor a(kWeb, Mode::shared, image), b(kMail, Mode::shared, image);
    ASSERT_TRUE(granted(a.enter()));
    ASSERT_TRUE(granted(b.enter()));
    std::uint32_t tokenA = a.inquire(), tokenB = b.inquire();
    Actor toA(kWeb, Mode::shared, image), toB(kMail, Mode::shared, image);
    ASSERT_TRUE(granted(toA.enter()));
    b.release();
    EXPECT_TRUE(b.owns()) << "the joiner that is there belongs to another guest";
    ASSERT_TRUE(granted(toB.enter()));
    a.release();
    b.release();
    EXPECT_TRUE(refused(toA.acquire(tokenB), Obstacle::sameGuest));
    EXPECT_TRUE(granted(toB.acquire(tokenB)));
    EXPECT_TRUE(granted(toA.acquire(tokenA)));
}

class Downgrade : public Handoff {};

TEST_F(Downgrade, LetsReadersInAndNobodyElse) {
    Actor web(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    web.downgrade();
    EXPECT_FALSE(web.owns());
    EXPECT_TRUE(web.present());
    EXPECT_EQ(web.count(), 2u);
    Actor reader(kMail, Mode::readOnly, image), writer(3, Mode::exclusive, image), sharer(3, Mode::shared, image);
    EXPECT_TRUE(granted(reader.enter()));
    EXPECT_TRUE(refused(writer.enter().refusal, Obstacle::guestPresent));
    EXPECT_TRUE(refused(sharer.enter().refusal, Obstacle::guestPresent));
}

TEST_F(Downgrade, AndUpgradeLeaveNoMomentForAWriter) {
    Actor web(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    int tries = 0;
    web.before = [&] {
        tries++;
        for (Mode mode : {Mode::exclusive, Mode::shared}) {
            Actor rival(kMail, mode, image);
            EXPECT_TRUE(refused(rival.enter().refusal, Obstacle::guestPresent));
        }
    };
    web.downgrade();
    EXPECT_TRUE(granted(web.upgrade()));
    EXPECT_TRUE(web.owns());
    EXPECT_TRUE(web.present());
    EXPECT_EQ(web.count(), 2u);
    EXPECT_GE(tries, 6);
}

TEST_F(Downgrade, UpgradeIsRefusedWhileAnotherReads) {
    Actor web(kWeb, Mode::exclusive, image), reader(kMail, Mode::readOnly, image), writer(3, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    web.downgrade();
    ASSERT_TRUE(granted(reader.enter()));
    EXPECT_TRUE(refused(web.upgrade(), Obstacle::guestPresent));
    EXPECT_EQ(web.count(), 2u);
    EXPECT_TRUE(web.present()) << "the read-only lease stays";
    reader.die();
    EXPECT_TRUE(refused(writer.enter().refusal, Obstacle::guestPresent));
    EXPECT_TRUE(granted(web.upgrade()));
}

TEST_F(Downgrade, UpgradeAndAReaderThatMeetAtAnyStepAreNeverBothLetIn) {
    std::optional<Actor> web, reader;
    Registration entry;
    Answer answer;
    int steps = atEveryStep(
        [&]() -> Actor& {
            reader.reset();
            web.emplace(kWeb, Mode::exclusive, image);
            reader.emplace(kMail, Mode::readOnly, image);
            EXPECT_TRUE(granted(web->enter()));
            web->downgrade();
            return *web;
        },
        [&](Actor& actor) { answer = actor.upgrade(); }, [&] { entry = reader->enter(); },
        [&](int step) {
            EXPECT_NE(answer.has_value(), entry.refusal.has_value()) << "step " << step;
            EXPECT_EQ(web->owns(), !answer);
            EXPECT_EQ(web->count(), 2u);
        });
    EXPECT_GE(steps, 3);
}

} // namespace
} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// acquireAll: who may run now, with which state.

#include "core/lease/byte_range.hpp"
#include "tests/support/unit_actor.hpp"

namespace leasehold::lease {
namespace {

using namespace unit;

class Acquire : public ProtocolTest {
protected:
    Actor source{kWeb, Mode::exclusive, image}, target{kWeb, Mode::exclusive, image};

    // The source runs, its migration has begun, the destination has joined. Gives the token in the cookie.
    std::uint32_t prepare() {
        EXPECT_TRUE(granted(source.enter()));
        EXPECT_TRUE(granted(source.acquire()));
        std::uint32_t token = source.inquire();
        EXPECT_TRUE(granted(target.enter()));
        return token;
    }
};

TEST_F(Acquire, IsIdempotent) {
    ASSERT_TRUE(granted(source.enter()));
    for (int i = 0; i < 3; i++) {
        EXPECT_TRUE(granted(source.acquire()));
        EXPECT_TRUE(source.owns());
        EXPECT_EQ(source.count(), 2u);
    }
}

TEST_F(Acquire, ResumesASuspendedGuestWithAnyStateOrNone) {
    ASSERT_TRUE(granted(source.enter()));
    for (std::optional<std::uint32_t> wrong : {std::optional<std::uint32_t>(), std::optional<std::uint32_t>(12345)}) {
        source.release();
        EXPECT_TRUE(granted(source.acquire(wrong)));
        EXPECT_EQ(source.handoff(), std::nullopt) << "the token is void";
    }
    EXPECT_TRUE(granted(source.acquire(source.release())));
    EXPECT_EQ(source.count(), 2u);
}

TEST_F(Acquire, OfAColdStartTakesTheStateOfADeadQemuForNothing) {
    ASSERT_TRUE(granted(source.enter()));
    std::uint32_t stale = source.release();
    source.die();
    ASSERT_TRUE(granted(target.enter()));
    EXPECT_TRUE(granted(target.acquire(stale)));
    EXPECT_EQ(target.count(), 2u) << "no taken mark either";
}

TEST_F(Acquire, HandsOverToTheSuccessorThatQuotesTheToken) {
    std::uint32_t token = prepare();
    EXPECT_EQ(source.release(), token);
    EXPECT_FALSE(source.owns());
    EXPECT_TRUE(source.present()) << "QEMU still drains";
    ASSERT_TRUE(granted(target.acquire(token)));
    EXPECT_TRUE(target.owns());
    EXPECT_TRUE(target.has({MarkKind::taken, kWeb, token}));
    EXPECT_EQ(target.handoff(), std::nullopt);
}

TEST_F(Acquire, IsRefusedWithoutTheTokenAndGivesBackWhatItTook) {
    std::uint32_t token = prepare();
    source.release();
    for (std::optional<std::uint32_t> wrong : {std::optional<std::uint32_t>(), std::optional(token + 1)}) {
        auto answer = target.acquire(wrong);
        EXPECT_TRUE(refused(answer, Obstacle::sameGuest));
        EXPECT_FALSE(target.has(kOwner));
        EXPECT_EQ(target.count(), 1u);
    }
    EXPECT_TRUE(granted(target.acquire(token))) << "a wrong try has spoilt nothing";
}

TEST_F(Acquire, IsRefusedWithTheTokenOfAnEarlierMigration) {
    ASSERT_TRUE(granted(source.enter()));
    std::uint32_t stale = source.inquire();
    EXPECT_TRUE(granted(source.acquire(stale)));
    source.inquire();
    ASSERT_TRUE(granted(target.enter()));
    source.release();
    EXPECT_TRUE(refused(target.acquire(stale), Obstacle::sameGuest));
}

TEST_F(Acquire, OfASuccessorIsRefusedWhileTheSourceRuns) {
    std::uint32_t token = prepare();
    EXPECT_TRUE(refused(target.acquire(token), Obstacle::sameGuest)) << "the source has not released";
    EXPECT_TRUE(source.owns());
    EXPECT_EQ(target.count(), 1u);
}

TEST_F(Acquire, WaitsForTheReleaseThatItsStateBelongsTo) {
    std::uint32_t token = prepare();
    int pauses = 0;
    target.pause = [&] {
        if (++pauses == 4)
            source.release();
        return true;
    };
    EXPECT_TRUE(granted(target.acquire(token)));
    EXPECT_EQ(pauses, 4);
}

TEST_F(Acquire, WaitsUntilTheSuspendedSourceIsDead) {
    ASSERT_TRUE(granted(source.enter()));
    std::uint32_t token = source.release(); // no Inquire: a migration of a suspended guest
    ASSERT_TRUE(granted(target.enter()));
    EXPECT_EQ(source.release(), token);
    EXPECT_TRUE(source.owns());
    int pauses = 0;
    target.pause = [&] {
        if (++pauses == 2)
            source.die();
        return true;
    };
    EXPECT_TRUE(granted(target.acquire(token)));
    EXPECT_TRUE(target.owns());
}

TEST_F(Acquire, DoesNotWaitWithoutAState) {
    prepare();
    target.pause = [] {
        ADD_FAILURE() << "waited";
        return true;
    };
    EXPECT_TRUE(refused(target.acquire(), Obstacle::sameGuest));
}

TEST_F(Acquire, GivesUpAtOnceWhenItsQemuDies) {
    std::uint32_t token = prepare();
    int pauses = 0;
    target.pause = [&] {
        pauses++;
        return false;
    };
    EXPECT_TRUE(refused(target.acquire(token), Obstacle::sameGuest));
    EXPECT_EQ(pauses, 1);
    EXPECT_TRUE(refused(target.acquire(token + 1), Obstacle::sameGuest));
    EXPECT_EQ(pauses, 2);
}

TEST_F(Acquire, ResumesTheSourceWhenTheDestinationHasDied) {
    std::uint32_t token = prepare();
    source.release();
    target.die();
    EXPECT_TRUE(granted(source.acquire(token)));
    EXPECT_TRUE(source.owns());
    EXPECT_EQ(source.count(), 2u) << "handoff and leaving are gone";
}

TEST_F(Acquire, ResumesTheSourceByItsOwnStateWhileTheDestinationOnlyJoined) {
    std::uint32_t token = prepare();
    source.release();
    EXPECT_TRUE(refused(source.acquire(), Obstacle::sameGuest)) << "without the state nobody can tell who may run";
    EXPECT_TRUE(granted(source.acquire(token)));
    EXPECT_TRUE(source.owns());
    EXPECT_TRUE(refused(target.acquire(token), Obstacle::sameGuest)) << "the token is void now";
    EXPECT_EQ(target.count(), 1u);
}

TEST_F(Acquire, NeverResumesASourceWhoseTokenWasUsed) {
    std::uint32_t token = prepare();
    source.release();
    ASSERT_TRUE(granted(target.acquire(token)));
    EXPECT_TRUE(refused(source.acquire(token), Obstacle::stateTaken));
    EXPECT_TRUE(refused(source.acquire(), Obstacle::sameGuest));
    EXPECT_TRUE(target.owns());
    // Nor when the owner mark is free: a passing rogue made the next Release give it up.
    target.inquire();
    Actor rogue(kWeb, Mode::exclusive, image);
    ASSERT_EQ(rogue.shares()[0].medium->tryPlace(presentMark(Mode::exclusive, rogue.self()), os::LockType::write),
              os::LockOutcome::granted);
    target.release();
    ASSERT_FALSE(target.owns());
    EXPECT_TRUE(refused(source.acquire(token), Obstacle::stateTaken));
    EXPECT_FALSE(source.owns());
}

TEST_F(Acquire, DoesNotWaitForAStateThatWasTaken) {
    std::uint32_t token = prepare();
    source.release();
    ASSERT_TRUE(granted(target.acquire(token)));
    source.pause = [] {
        ADD_FAILURE() << "waited";
        return true;
    };
    EXPECT_TRUE(refused(source.acquire(token), Obstacle::stateTaken));
}

TEST_F(Acquire, IsNotDisturbedByAThirdThatTriedToJoin) {
    std::uint32_t token = prepare();
    Actor third(kWeb, Mode::exclusive, image);
    EXPECT_TRUE(refused(third.enter().refusal, Obstacle::sameGuest)) << "with two others nobody knows whose is newest";
    source.release();
    EXPECT_TRUE(granted(target.acquire(token)));
}

TEST_F(Acquire, IsAllowedOnceEverybodyElseOfTheDomainIsDead) {
    prepare();
    source.die();
    EXPECT_TRUE(granted(target.acquire()));
    EXPECT_TRUE(target.owns());
}

TEST_F(Acquire, WaitsForAStrangersColdStartToFail) {
    std::uint32_t token = prepare();
    source.release();
    Actor stranger(kMail, Mode::exclusive, image);
    ASSERT_EQ(stranger.shares()[0].medium->tryPlace(kOwner, os::LockType::write), os::LockOutcome::granted);
    int pauses = 0;
    target.pause = [&] {
        if (++pauses == 2)
            stranger.die();
        return true;
    };
    EXPECT_TRUE(granted(target.acquire(token)));
    EXPECT_EQ(pauses, 2);
}

TEST_F(Acquire, NamesAForeignLockThatDoesNotGo) {
    std::uint32_t token = prepare();
    source.release();
    os::Fd program = lockOutside(image, os::LockType::write, lease::kMarkArea + 1);
    EXPECT_TRUE(refused(target.acquire(token), Obstacle::foreignLock));
    EXPECT_EQ(target.count(), 1u);
    // It may be that of a QEMU that is just dying.
    target.pause = [&] {
        program.reset();
        return true;
    };
    EXPECT_TRUE(granted(target.acquire(token)));
}

// A joiner of the same domain comes in between any two steps; nothing that it does may cost a suspended guest its
// lease.
TEST_F(Acquire, KeepsTheLeaseOfASuspendedGuestWhateverComesBetween) {
    std::optional<Actor> guest, joiner;
    Answer resumed;
    int steps = atEveryStep(
        [&]() -> Actor& {
            joiner.reset();
            guest.emplace(kWeb, Mode::exclusive, image);
            joiner.emplace(kWeb, Mode::exclusive, image);
            EXPECT_TRUE(granted(guest->enter()));
            guest->release();
            return *guest;
        },
        [&](Actor& actor) { resumed = actor.acquire(); },
        [&] {
            (void)joiner->enter();
            EXPECT_FALSE(granted(joiner->acquire()));
        },
        [&](int step) { EXPECT_TRUE(guest->owns()) << "step " << step; });
    EXPECT_GE(steps, 3);
}

TEST_F(Acquire, TheLookWithTheOwnerMarkInHandDecides) {
    // The source resumes by its own state in between any two steps of the successor: never both.
    std::optional<Actor> from, to;
    std::uint32_t token = 0;
    Answer taken, resumed;
    int steps = atEveryStep(
        [&]() -> Actor& {
            to.reset();
            from.emplace(kWeb, Mode::exclusive, image);
            to.emplace(kWeb, Mode::exclusive, image);
            EXPECT_TRUE(granted(from->enter()));
            token = from->inquire();
            EXPECT_TRUE(granted(to->enter()));
            from->release();
            return *to;
        },
        [&](Actor& actor) { taken = actor.acquire(token); }, [&] { resumed = from->acquire(token); },
        [&](int step) {
            EXPECT_NE(taken.has_value(), resumed.has_value()) << "step " << step;
            EXPECT_EQ(to->owns(), !taken) << "step " << step;
            EXPECT_EQ(from->owns(), !resumed) << "step " << step;
        });
    EXPECT_GE(steps, 4);
}

TEST_F(Acquire, ASourceThatResumesAndDiesAgainHasMadeTheStateVoid) {
    // In between any two steps the source resumes and is suspended again under another token: its old one is void,
    // though the owner mark is free for a moment of the next migration.
    std::optional<Actor> from, to, other;
    std::uint32_t token = 0;
    Answer taken;
    atEveryStep(
        [&]() -> Actor& {
            other.reset();
            to.reset();
            from.emplace(kWeb, Mode::exclusive, image);
            to.emplace(kWeb, Mode::exclusive, image);
            other.emplace(kWeb, Mode::exclusive, image);
            EXPECT_TRUE(granted(from->enter()));
            token = from->inquire();
            EXPECT_TRUE(granted(to->enter()));
            from->release();
            return *to;
        },
        [&](Actor& actor) { taken = actor.acquire(token); },
        [&] {
            if (from->acquire(token))
                return; // the successor has the owner mark already
            from->inquire();
            EXPECT_FALSE(granted(other->enter())) << "a third";
            from->release();
        },
        [&](int step) {
            if (!from->has({MarkKind::handoff, kWeb, token})) {
                EXPECT_TRUE(refused(taken, Obstacle::sameGuest)) << "step " << step;
            }
            EXPECT_EQ(to->owns(), !taken) << "step " << step;
        });
}

TEST_F(Acquire, OfSeveralImagesGivesBackTheFirstWhenTheSecondIsRefused) {
    for (int busy : {0, 1}) {
        Actor from(kWeb, Mode::exclusive, both), to(kWeb, Mode::exclusive, both);
        ASSERT_TRUE(granted(from.enter()));
        std::uint32_t token = from.inquire();
        ASSERT_TRUE(granted(to.enter()));
        from.release();
        ASSERT_EQ(from.shares()[busy].medium->tryPlace(kOwner, os::LockType::write), os::LockOutcome::granted);
        auto answer = to.acquire(token);
        ASSERT_TRUE(refused(answer, Obstacle::sameGuest));
        EXPECT_EQ(answer->share, static_cast<std::size_t>(busy));
        EXPECT_EQ(to.count(0), 1u);
        EXPECT_EQ(to.count(1), 1u);
        EXPECT_EQ(from.handoff(0), token);
        EXPECT_EQ(from.handoff(1), token);
    }
}

TEST_F(Acquire, OfSeveralImagesClearsNoHandoffBeforeAllAreOwned) {
    Actor from(kWeb, Mode::exclusive, both), to(kWeb, Mode::exclusive, both);
    ASSERT_TRUE(granted(from.enter()));
    std::uint32_t token = from.inquire();
    ASSERT_TRUE(granted(to.enter()));
    from.release();
    // The destination has one of them already when the source comes back.
    ASSERT_EQ(to.shares()[1].medium->tryPlace(kOwner, os::LockType::write), os::LockOutcome::granted);
    EXPECT_TRUE(refused(from.acquire(token), Obstacle::sameGuest));
    EXPECT_EQ(from.handoff(0), token);
    EXPECT_EQ(from.handoff(1), token);
    EXPECT_TRUE(granted(to.acquire(token)));
}

TEST_F(Acquire, OfAReaderNeedsNothing) {
    Actor reader(kWeb, Mode::readOnly, second), twin(kWeb, Mode::readOnly, second);
    ASSERT_TRUE(granted(reader.enter()));
    ASSERT_TRUE(granted(twin.enter()));
    EXPECT_TRUE(granted(reader.acquire()));
    EXPECT_TRUE(granted(twin.acquire(77)));
    EXPECT_EQ(reader.count(), 2u);
}

} // namespace
} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// registerAll: who may come in, and what a refusal leaves.

#include "tests/support/sanitizers.hpp"
#include "tests/support/unit_actor.hpp"

#include <algorithm>
#include <deque>
#include <limits>
#include <memory>
#include <optional>

namespace leasehold::lease {
namespace {

using namespace unit;

class Register : public ProtocolTest {
protected:
    std::string third = dir.file("third.img");
};

TEST_F(Register, ColdStartOwnsTheImage) {
    Actor web(kWeb, Mode::exclusive, image);
    auto result = web.enter();
    ASSERT_TRUE(granted(result));
    EXPECT_EQ(result.joined, std::vector{false});
    EXPECT_TRUE(web.owns());
    EXPECT_TRUE(web.present());
    EXPECT_EQ(web.count(), 2u);
}

TEST_F(Register, GuestWithoutImagesIsLetIn) {
    Actor web(kWeb, Mode::exclusive, std::vector<std::string>{});
    EXPECT_TRUE(granted(web.enter()));
}

TEST_F(Register, StrangerIsRefusedSeesWhoIsThereAndLeavesNothing) {
    Actor web(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    auto result = mail.enter();
    ASSERT_TRUE(refused(result.refusal, Obstacle::guestPresent));
    EXPECT_EQ(std::count(result.refusal->marks.begin(), result.refusal->marks.end(),
                         presentMark(Mode::exclusive, web.self())),
              1);
    EXPECT_EQ(mail.count(), 0u);
    EXPECT_TRUE(web.owns());
    EXPECT_EQ(web.count(), 2u);
}

TEST_F(Register, GuestIsLetInWhenTheOtherHasDied) {
    Actor web(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    web.die();
    EXPECT_TRUE(granted(mail.enter()));
    EXPECT_TRUE(mail.owns());
}

TEST_F(Register, TwoDomainsShareOnlyWhereBothShareOrBothRead) {
    for (Mode one : kModes)
        for (Mode other : kModes) {
            SCOPED_TRACE(testing::Message() << int(one) << " then " << int(other));
            Actor web(kWeb, one, image), mail(kMail, other, image);
            ASSERT_TRUE(granted(web.enter()));
            auto result = mail.enter();
            if (compatible(one, other)) {
                EXPECT_TRUE(granted(result));
                EXPECT_EQ(result.joined, std::vector{false}) << "another domain is nobody to join";
                EXPECT_TRUE(mail.present());
            } else {
                EXPECT_TRUE(refused(result.refusal, Obstacle::guestPresent));
                EXPECT_EQ(mail.count(), 0u);
            }
            EXPECT_TRUE(web.present());
            EXPECT_TRUE(one == Mode::readOnly || web.owns());
        }
}

TEST_F(Register, TwoIncarnationsOfOneDomainOnlyRead) {
    for (Mode one : kModes)
        for (Mode other : kModes) {
            SCOPED_TRACE(testing::Message() << int(one) << " then " << int(other));
            Actor first(kWeb, one, image), twin(kWeb, other, image);
            ASSERT_TRUE(granted(first.enter()));
            auto result = twin.enter();
            if (one == Mode::readOnly && other == Mode::readOnly) {
                EXPECT_TRUE(granted(result));
                continue;
            }
            EXPECT_TRUE(refused(result.refusal, one == other ? Obstacle::sameGuest : Obstacle::guestPresent));
            EXPECT_EQ(twin.count(), 0u);
            EXPECT_TRUE(first.present());
            EXPECT_TRUE(one == Mode::readOnly || first.owns());
        }
}

TEST_F(Register, SharedGuestsDoNotKeepTheEntryBusy) {
    Actor web(kWeb, Mode::shared, image), mail(kMail, Mode::shared, image), db(3, Mode::shared, image);
    for (Actor* actor : {&web, &mail, &db}) {
        EXPECT_TRUE(granted(actor->enter()));
        EXPECT_FALSE(actor->has(kOwner));
        EXPECT_TRUE(actor->owns());
    }
}

// A template under linked clones; a disk of a cluster. What one costs more than another is a look at each who is there.
TEST_F(Register, WhoComesToManyMakesNoMoreSystemCallsThanWhoComesToFew) {
    // The sanitizer's maps memory when it likes: 3 calls more were seen.
    constexpr int kAllocator = support::kAddressSanitizer ? 20 : 0;
    const std::size_t many = marksAreFiles() ? 60 : 1000;
    if (!mayOpen(4 * many))
        GTEST_SKIP() << "may not open enough files";
    for (Mode mode : {Mode::readOnly, Mode::shared}) {
        std::string shared = dir.file(mode == Mode::shared ? "cluster.img" : "template.img");
        std::uint32_t domain = 5000;
        auto countEntry = [&] {
            int least = std::numeric_limits<int>::max();
            for (int i = 0; i < 3; i++, domain++) // one in so many looks at all who are there, to sweep the dead
                least = std::min(least, countSystemCalls([&] {
                                     Actor newcomer(domain, mode, shared);
                                     demand(!newcomer.enter().refusal && !newcomer.acquire(), "refused");
                                     newcomer.release();
                                 }));
            return least;
        };
        std::deque<Actor> there;
        auto fill = [&](std::size_t count) {
            while (there.size() < count)
                ASSERT_TRUE(
                    granted(there.emplace_back(100 + static_cast<std::uint32_t>(there.size()), mode, shared).enter()));
        };
        fill(10);
        int few = countEntry();
        if (few < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        fill(many);
        // A longer index takes a longer read.
        EXPECT_LE(countEntry(), few + static_cast<int>(many / 100) + kAllocator) << "mode " << int(mode);
        Actor stranger(kWeb, Mode::exclusive, shared);
        EXPECT_TRUE(refused(stranger.enter().refusal, Obstacle::guestPresent));
        Actor other(kWeb, mode == Mode::shared ? Mode::readOnly : Mode::shared, shared);
        EXPECT_TRUE(refused(other.enter().refusal, Obstacle::guestPresent));
    }
}

// The successor of one of many finds its source, and nobody else's.
TEST_F(Register, SuccessorFindsItsSourceAmongMany) {
    std::deque<Actor> there;
    for (std::uint32_t i = 0; i < 12; i++)
        ASSERT_TRUE(granted(there.emplace_back(100 + i, Mode::shared, image).enter()));
    std::uint32_t token = there[7].inquire();
    Actor successor(107, Mode::shared, image), twin(103, Mode::shared, image);
    auto result = successor.enter();
    ASSERT_TRUE(granted(result));
    EXPECT_EQ(result.joined, std::vector{true});
    EXPECT_TRUE(refused(twin.enter().refusal, Obstacle::sameGuest)) << "that one offers nothing";
    there[7].release();
    EXPECT_TRUE(granted(successor.acquire(token)));
    EXPECT_TRUE(refused(there[7].acquire(token), Obstacle::stateTaken));
}

TEST_F(Register, SuccessorJoinsWhereAHandoffIsOffered) {
    for (Mode mode : {Mode::exclusive, Mode::shared}) {
        Actor source(kWeb, mode, image), target(kWeb, mode, image);
        ASSERT_TRUE(granted(source.enter()));
        source.inquire();
        auto result = target.enter();
        ASSERT_TRUE(granted(result));
        EXPECT_EQ(result.joined, std::vector{true});
        EXPECT_TRUE(target.present());
        EXPECT_FALSE(target.owns());
        EXPECT_EQ(target.count(), 1u);
        EXPECT_TRUE(source.owns()) << "joining takes nothing away";
    }
}

TEST_F(Register, SuccessorJoinsASuspendedGuest) {
    Actor source(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(source.enter()));
    source.release();
    auto result = target.enter();
    EXPECT_TRUE(granted(result));
    EXPECT_EQ(result.joined, std::vector{true});
    EXPECT_TRUE(source.owns());
}

TEST_F(Register, SuccessorJoinsAnIncarnationThatOwnsNothing) {
    Actor source(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, image),
        next(kWeb, Mode::exclusive, image);
    ASSERT_TRUE(granted(source.enter()));
    source.inquire();
    ASSERT_TRUE(granted(target.enter()));
    source.die(); // its destination stays paused and owns nothing
    auto result = next.enter();
    EXPECT_TRUE(granted(result));
    EXPECT_EQ(result.joined, std::vector{true});
}

TEST_F(Register, NobodyJoinsBesideOneThatFoundNobodyAndRemovesTheLeaseFile) {
    for (Mode mode : {Mode::exclusive, Mode::shared}) {
        std::unique_ptr<Actor> leaving, comer;
        lease::Registration result;
        bool removes = false;
        auto scene = [&]() -> Actor& {
            leaving = std::make_unique<Actor>(kWeb, mode, image);
            comer = std::make_unique<Actor>(kWeb, mode, image);
            EXPECT_TRUE(granted(leaving->enter()));
            leaving->release();
            return *comer;
        };
        auto enter = [&](Actor& actor) { result = actor.enter(); };
        // What place.cpp's sweepLease does, up to the unlink.
        auto sweep = [&] {
            Medium& medium = *leaving->shares()[0].medium;
            medium.removeAll();
            removes = medium.tryPlace(kOwner, os::LockType::write) == os::LockOutcome::granted && medium.look().empty();
        };
        unit::atEveryStep(scene, enter, sweep, [&](int step) {
            EXPECT_FALSE(removes && !result.refusal) << "step " << step << ", mode " << static_cast<int>(mode);
        });
    }
}

TEST_F(Register, AnotherDomainCannotUseAHandoff) {
    Actor source(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(source.enter()));
    source.inquire();
    EXPECT_TRUE(refused(mail.enter().refusal, Obstacle::guestPresent));
    source.release();
    EXPECT_TRUE(refused(mail.enter().refusal, Obstacle::guestPresent));
    EXPECT_EQ(mail.count(), 0u);
}

TEST_F(Register, OneIncarnationInAnotherModeIsNoSuccessor) {
    Actor source(kWeb, Mode::exclusive, image), reader(kWeb, Mode::readOnly, image);
    ASSERT_TRUE(granted(source.enter()));
    source.inquire();
    EXPECT_TRUE(refused(reader.enter().refusal, Obstacle::guestPresent));
}

TEST_F(Register, AProgramThatLocksTheWholeFileIsForeign) {
    for (os::LockType type : {os::LockType::read, os::LockType::write}) {
        os::Fd program = lockOutside(image, type);
        for (Mode mode : kModes) {
            if (marksAreFiles() && type == os::LockType::read && mode == Mode::readOnly)
                continue; // two readers
            Actor web(kWeb, mode, image);
            EXPECT_TRUE(refused(web.enter().refusal, Obstacle::foreignLock));
            EXPECT_EQ(web.count(), 0u);
        }
    }
}

TEST_F(Register, WaitsForSomebodyWhoIsJustGoing) {
    Actor web(kWeb, Mode::exclusive, image);
    std::optional<Actor> going(std::in_place, kMail, Mode::exclusive, image);
    ASSERT_EQ(going->shares()[0].medium->tryPlace(kOwner, os::LockType::write), os::LockOutcome::granted);
    int pauses = 0;
    web.pause = [&] {
        if (++pauses == 3)
            going->die();
        return true;
    };
    EXPECT_TRUE(granted(web.enter()));
    EXPECT_EQ(pauses, 3);
}

TEST_F(Register, DoesNotWaitBeyondItsLimit) {
    Actor web(kWeb, Mode::exclusive, image), stuck(kMail, Mode::exclusive, image);
    ASSERT_EQ(stuck.shares()[0].medium->tryPlace(kOwner, os::LockType::write), os::LockOutcome::granted);
    EXPECT_TRUE(refused(web.enter().refusal, Obstacle::beingTaken));
    int pauses = 0;
    web.pause = [&] { return ++pauses < 5; };
    EXPECT_TRUE(refused(web.enter().refusal, Obstacle::beingTaken));
    EXPECT_EQ(pauses, 5);
    EXPECT_EQ(web.count(), 0u);
}

TEST_F(Register, DoesNotWaitForAGuestThatIsPresent) {
    Actor web(kWeb, Mode::exclusive, image), mail(kMail, Mode::exclusive, image);
    ASSERT_TRUE(granted(web.enter()));
    mail.pause = [] {
        ADD_FAILURE() << "waited";
        return true;
    };
    EXPECT_TRUE(refused(mail.enter().refusal, Obstacle::guestPresent));
}

// Whoever comes in between any two steps of another one's entry: never both, and never neither.
TEST_F(Register, OfTwoThatMeetAtAnyStepExactlyOneIsLetIn) {
    for (std::uint32_t domain : {kWeb, kMail})
        for (Mode one : kModes)
            for (Mode other : kModes) {
                if (domain == kWeb && one == Mode::shared && other == Mode::shared)
                    continue; // the next test
                std::optional<Actor> web, rival;
                Registration entry, between;
                int steps = atEveryStep(
                    [&]() -> Actor& {
                        rival.reset();
                        web.reset();
                        rival.emplace(domain, other, image);
                        return web.emplace(kWeb, one, image);
                    },
                    [&](Actor& actor) { entry = actor.enter(); }, [&] { between = rival->enter(); },
                    [&](int step) {
                        SCOPED_TRACE(testing::Message()
                                     << "domain " << domain << " modes " << int(one) << int(other) << " step " << step);
                        EXPECT_TRUE(!entry.refusal || !between.refusal) << "neither";
                        if (!compatible(one, other) || (domain == kWeb && one != Mode::readOnly)) {
                            EXPECT_TRUE(entry.refusal || between.refusal) << "both";
                        }
                        EXPECT_EQ(web->count() > 0, !entry.refusal);
                        EXPECT_EQ(rival->count() > 0, !between.refusal);
                    });
                EXPECT_GE(steps, 4);
            }
}

// Not in the test before, because here both may be refused: none of them has run, and each finds the other.
TEST_F(Register, OfASharedGuestStartedTwiceNoTwoAreLetInAtAnyStep) {
    std::optional<Actor> web, rival;
    Registration entry, between;
    atEveryStep(
        [&]() -> Actor& {
            rival.reset();
            web.reset();
            rival.emplace(kWeb, Mode::shared, image);
            return web.emplace(kWeb, Mode::shared, image);
        },
        [&](Actor& actor) { entry = actor.enter(); }, [&] { between = rival->enter(); },
        [&](int step) { EXPECT_TRUE(entry.refusal || between.refusal) << "both, step " << step; });
}

TEST_F(Register, ARogueStartNeverMakesARightfulAcquireFail) {
    std::optional<Actor> source, target, rogue;
    std::uint32_t token = 0;
    Answer acquired;
    int steps = atEveryStep(
        [&]() -> Actor& {
            source.emplace(kWeb, Mode::exclusive, image);
            target.emplace(kWeb, Mode::exclusive, image);
            EXPECT_TRUE(granted(source->enter()));
            token = source->inquire();
            EXPECT_TRUE(granted(target->enter()));
            source->release();
            return rogue.emplace(kMail, Mode::exclusive, image);
        },
        [&](Actor& actor) { EXPECT_TRUE(refused(actor.enter().refusal, Obstacle::guestPresent)); },
        [&] { acquired = target->acquire(token); }, [&](int) { EXPECT_TRUE(granted(acquired)); });
    EXPECT_GE(steps, 1);
}

TEST_F(Register, SeveralImagesAreAllOrNothingWhicheverIsTaken) {
    std::vector<std::string> images{image, second, third};
    for (std::size_t taken = 0; taken < images.size(); taken++)
        for (Mode mode : {Mode::exclusive, Mode::shared}) {
            Actor mail(kMail, Mode::exclusive, images[taken]), web(kWeb, mode, images);
            ASSERT_TRUE(granted(mail.enter()));
            auto result = web.enter();
            ASSERT_TRUE(refused(result.refusal, Obstacle::guestPresent));
            EXPECT_EQ(result.refusal->share, taken);
            for (std::size_t i = 0; i < images.size(); i++)
                EXPECT_EQ(web.count(i), 0u) << i;
        }
}

TEST_F(Register, SeveralImagesAreAllOrNothingInAnyOrderOfNames) {
    std::vector<std::string> images{image, second, third};
    std::sort(images.begin(), images.end());
    do {
        Actor mail(kMail, Mode::exclusive, third), web(kWeb, Mode::exclusive, images);
        ASSERT_TRUE(granted(mail.enter()));
        EXPECT_TRUE(refused(web.enter().refusal, Obstacle::guestPresent));
        for (std::size_t i = 0; i < images.size(); i++)
            EXPECT_EQ(web.count(i), 0u);
    } while (std::next_permutation(images.begin(), images.end()));
}

TEST_F(Register, OfTwoGuestsThatShareTwoImagesOneIsLetInAtAnyStep) {
    std::optional<Actor> web, rival;
    Registration entry, between;
    int steps = atEveryStep(
        [&]() -> Actor& {
            rival.reset();
            web.reset();
            rival.emplace(kMail, Mode::exclusive, both);
            return web.emplace(kWeb, Mode::exclusive, both);
        },
        [&](Actor& actor) { entry = actor.enter(); }, [&] { between = rival->enter(); },
        [&](int step) { EXPECT_NE(entry.refusal.has_value(), between.refusal.has_value()) << "step " << step; });
    EXPECT_GE(steps, 8);
}

TEST_F(Register, SomeImagesMayBeJoinedAndOthersOwned) {
    Actor source(kWeb, Mode::exclusive, image), target(kWeb, Mode::exclusive, both);
    ASSERT_TRUE(granted(source.enter()));
    source.inquire();
    auto result = target.enter();
    ASSERT_TRUE(granted(result));
    EXPECT_EQ(result.joined, (std::vector{true, false}));
    EXPECT_FALSE(target.owns(0));
    EXPECT_TRUE(target.owns(1)) << "an image that --copy-storage writes to before the guest runs";
}

TEST_F(Register, ReadersOfAFileThatCannotBeWrittenStopWriters) {
    Actor reader(kWeb, Mode::readOnly, image), other(kMail, Mode::readOnly, image), writer(3, Mode::exclusive, image);
    EXPECT_TRUE(granted(reader.enter()));
    EXPECT_TRUE(granted(other.enter()));
    EXPECT_TRUE(refused(writer.enter().refusal, Obstacle::guestPresent));
    reader.die();
    EXPECT_TRUE(refused(writer.enter().refusal, Obstacle::guestPresent));
    other.die();
    EXPECT_TRUE(granted(writer.enter()));
}

} // namespace
} // namespace leasehold::lease

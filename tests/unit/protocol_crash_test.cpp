// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// libvirtd dies between any two steps of a call. Its QEMU lives on with the marks that are up at that moment: the image
// stays protected, and the next call, of a libvirtd that remembers nothing, sets everything right.

#include "tests/support/unit_actor.hpp"

#include <optional>

namespace leasehold::lease {
namespace {

using namespace unit;

class LibvirtdsDeath : public ProtocolTest {
protected:
    // The call ends where libvirtd is killed; the actor is the QEMU, which is not.
    template <typename Call>
    static auto interrupted(Call call) {
        return [call](Actor& actor) {
            try {
                call(actor);
            } catch (const Death&) {
            }
        };
    }

    Actor& newGuest() {
        target.reset();
        guest.emplace(kWeb, Mode::exclusive, both);
        target.emplace(kWeb, Mode::exclusive, both);
        EXPECT_TRUE(granted(guest->enter()));
        return *guest;
    }

    void expectStrangersRefused(int step) {
        for (Mode mode : {Mode::exclusive, Mode::shared, Mode::readOnly}) {
            Actor stranger(kMail, mode, both);
            EXPECT_TRUE(refused(stranger.enter().refusal, Obstacle::guestPresent)) << "step " << step;
        }
    }

    void expectRuns(Actor& actor, int step) {
        for (std::size_t i = 0; i < both.size(); i++) {
            EXPECT_TRUE(actor.owns(i)) << "step " << step << " image " << i;
            EXPECT_TRUE(actor.present(i)) << "step " << step << " image " << i;
            EXPECT_EQ(actor.handoff(i), std::nullopt) << "step " << step << " image " << i;
        }
    }

    static constexpr auto die = [] { throw Death{}; };

    std::optional<Actor> guest, target;
    std::uint32_t token = 0;
};

TEST_F(LibvirtdsDeath, DuringARegistrationLeavesNothing) {
    int steps = atEveryStep([&]() -> Actor& { return guest.emplace(kWeb, Mode::exclusive, both); },
                            [](Actor& actor) { actor.enter(); }, die,
                            [&](int step) {
                                Actor mail(kMail, Mode::exclusive, both);
                                EXPECT_TRUE(granted(mail.enter())) << "step " << step;
                            });
    EXPECT_GE(steps, 8);
}

TEST_F(LibvirtdsDeath, DuringASuspendKeepsTheLeaseAndTheNextReleaseGivesOneState) {
    int steps =
        atEveryStep([&]() -> Actor& { return newGuest(); }, interrupted([](Actor& actor) { actor.release(); }), die,
                    [&](int step) {
                        expectStrangersRefused(step);
                        token = guest->release();
                        for (std::size_t i : {0, 1})
                            EXPECT_TRUE(guest->has({lease::MarkKind::handoff, kWeb, token}, i)) << "step " << step;
                        EXPECT_TRUE(granted(guest->acquire(token)));
                        expectRuns(*guest, step);
                    });
    EXPECT_GE(steps, 4);
}

TEST_F(LibvirtdsDeath, DuringAResumeKeepsTheLeaseAndTheNextResumeWorks) {
    int steps = atEveryStep(
        [&]() -> Actor& {
            newGuest();
            token = guest->release();
            return *guest;
        },
        interrupted([&](Actor& actor) { (void)actor.acquire(token); }), die,
        [&](int step) {
            expectStrangersRefused(step);
            EXPECT_TRUE(granted(guest->acquire(token)));
            expectRuns(*guest, step);
        });
    EXPECT_GE(steps, 4);
}

TEST_F(LibvirtdsDeath, DuringAnInquireKeepsTheLeaseAndTheNextMigrationWorks) {
    int steps =
        atEveryStep([&]() -> Actor& { return newGuest(); }, interrupted([](Actor& actor) { actor.inquire(); }), die,
                    [&](int step) {
                        expectStrangersRefused(step);
                        token = guest->inquire();
                        ASSERT_TRUE(granted(target->enter())) << "step " << step;
                        guest->release();
                        EXPECT_TRUE(granted(target->acquire(token))) << "step " << step;
                        expectRuns(*target, step);
                    });
    EXPECT_GE(steps, 6);
}

TEST_F(LibvirtdsDeath, DuringTheReleaseOfAMigrationLetsTheDestinationOrTheSourceGoOn) {
    for (bool forward : {true, false})
        atEveryStep(
            [&]() -> Actor& {
                newGuest();
                token = guest->inquire();
                EXPECT_TRUE(granted(target->enter()));
                return *guest;
            },
            interrupted([](Actor& actor) { actor.release(); }), die,
            [&](int step) {
                expectStrangersRefused(step);
                guest->release(); // libvirtd, started again, sees the stop and says so
                Actor& next = forward ? *target : *guest;
                EXPECT_TRUE(granted(next.acquire(token))) << "step " << step;
                expectRuns(next, step);
                EXPECT_FALSE(granted((forward ? *guest : *target).acquire(token))) << "never both; step " << step;
            });
}

TEST_F(LibvirtdsDeath, DuringTheTakeOverNeverLetsBothRun) {
    for (bool forward : {true, false})
        atEveryStep(
            [&]() -> Actor& {
                newGuest();
                token = guest->inquire();
                EXPECT_TRUE(granted(target->enter()));
                guest->release();
                return *target;
            },
            interrupted([&](Actor& actor) { (void)actor.acquire(token); }), die,
            [&](int step) {
                expectStrangersRefused(step);
                if (!forward)
                    target->die(); // libvirt kills a destination that it lost
                Actor& next = forward ? *target : *guest;
                EXPECT_TRUE(granted(next.acquire(token))) << "step " << step;
                expectRuns(next, step);
                if (forward) {
                    EXPECT_FALSE(granted(guest->acquire(token))) << "step " << step;
                }
            });
}

TEST_F(LibvirtdsDeath, DuringADowngradeOrUpgradeLetsNoWriterIn) {
    auto writersRefused = [&](int step) {
        for (Mode mode : {Mode::exclusive, Mode::shared}) {
            Actor writer(kMail, mode, both[0]);
            EXPECT_TRUE(refused(writer.enter().refusal, Obstacle::guestPresent)) << "step " << step;
        }
    };
    auto one = [&]() -> Actor& {
        guest.emplace(kWeb, Mode::exclusive, both[0]);
        EXPECT_TRUE(granted(guest->enter()));
        return *guest;
    };
    EXPECT_EQ(atEveryStep(one, interrupted([](Actor& actor) { actor.downgrade(); }), die, writersRefused), 5);
    auto reading = [&]() -> Actor& {
        one().downgrade();
        return *guest;
    };
    EXPECT_EQ(atEveryStep(reading, interrupted([](Actor& actor) { (void)actor.upgrade(); }), die, writersRefused), 5);
}

} // namespace
} // namespace leasehold::lease

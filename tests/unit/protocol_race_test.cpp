// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Two processes enter at the same time, thousands of times. The processes meet at a barrier in shared memory.

#include "tests/support/unit_actor.hpp"

#include <atomic>
#include <chrono>
#include <new>

#include <sched.h>
#include <sys/mman.h>

namespace leasehold::lease {
namespace {

using namespace unit;

// Thousands of rounds, or as many as a busy machine gives in the time.
constexpr int kRounds = 5000;
constexpr std::chrono::milliseconds kTime{1000};

struct Arena {
    std::atomic<int> arrived{0};
    std::atomic<bool> in[2]{};
    std::atomic<bool> over{false};

    // The n-th meeting of the two.
    void meet(int n) {
        auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        arrived++;
        while (arrived < 2 * n) {
            sched_yield();
            demand(std::chrono::steady_clock::now() < deadline, "the other process did not come");
        }
    }
};

class Race : public ProtocolTest {
protected:
    struct Contender {
        std::uint32_t domain;
        Mode mode;
        std::vector<std::string> images;
    };

    // Gives how often each of them, both and none were let in.
    struct Score {
        int first = 0, second = 0, both = 0, none = 0, rounds = 0;
    };

    static void run(Arena& arena, int number, const Contender& contender) {
        for (int round = 0;; round++) {
            Actor actor(contender.domain, contender.mode, contender.images);
            actor.pause = [] {
                sched_yield();
                return true;
            };
            arena.meet(3 * round + 1);
            arena.in[number] = !actor.enter().refusal;
            demand(arena.in[number] == (actor.count() > 0), "a refusal left a lock, or a grant none");
            arena.meet(3 * round + 2);
            arena.meet(3 * round + 3); // the judge has looked
            if (arena.over)
                return;
        }
    }

    Score race(const Contender& first, const Contender& other) {
        void* memory = mmap(nullptr, sizeof(Arena), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        Arena& arena = *new (memory) Arena;
        Child rival([&](Line&) { run(arena, 1, other); });
        Score score;
        auto end = std::chrono::steady_clock::now() + kTime;
        for (int round = 0; !arena.over; round++) {
            {
                Actor actor(first.domain, first.mode, first.images);
                actor.pause = [&] {
                    sched_yield();
                    return !os::Process(rival.pid()).diedWithin(std::chrono::milliseconds(0));
                };
                arena.meet(3 * round + 1);
                bool here = !actor.enter().refusal;
                arena.meet(3 * round + 2);
                bool there = arena.in[1];
                (here && there ? score.both : here ? score.first : there ? score.second : score.none)++;
            }
            score.rounds++;
            arena.over = score.rounds == kRounds || std::chrono::steady_clock::now() > end;
            arena.meet(3 * round + 3);
        }
        EXPECT_EQ(rival.join(), "");
        munmap(memory, sizeof(Arena));
        return score;
    }

    void expectExactlyOne(const Contender& first, const Contender& other) {
        Score score = race(first, other);
        EXPECT_EQ(score.both, 0);
        EXPECT_EQ(score.none, 0);
        EXPECT_EQ(score.first + score.second, score.rounds);
    }
};

TEST_F(Race, OfTwoColdStartsExactlyOneWins) {
    expectExactlyOne({1, Mode::exclusive, {image}}, {2, Mode::exclusive, {image}});
}

TEST_F(Race, OfOneGuestStartedTwiceExactlyOneWins) {
    expectExactlyOne({1, Mode::exclusive, {image}}, {1, Mode::exclusive, {image}});
}

TEST_F(Race, OfAWriterAndAReaderExactlyOneWins) {
    expectExactlyOne({1, Mode::exclusive, {image}}, {2, Mode::readOnly, {image}});
}

TEST_F(Race, OfAWriterThatSharesAndOneThatDoesNotExactlyOneWins) {
    expectExactlyOne({1, Mode::shared, {image}}, {2, Mode::exclusive, {image}});
}

TEST_F(Race, OfASharedGuestStartedTwiceExactlyOneWins) {
    expectExactlyOne({1, Mode::shared, {image}}, {1, Mode::shared, {image}});
}

TEST_F(Race, OfTwoGuestsThatWantTheSameTwoImagesExactlyOneWins) {
    expectExactlyOne({1, Mode::exclusive, both}, {2, Mode::exclusive, both});
}

TEST_F(Race, GuestsThatShareAreBothLetIn) {
    Score score = race({1, Mode::shared, {image}}, {2, Mode::shared, {image}});
    EXPECT_EQ(score.both, score.rounds);
}

} // namespace
} // namespace leasehold::lease

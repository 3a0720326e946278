// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The people of the protocol tests: QEMUs that use images, each with an open file description of its own for each
// image, as the engine gives them. The media are the real ones; one can be interrupted between any two of its steps.

#include "core/lease/byte_range.hpp"
#include "core/lease/protocol.hpp"
#include "core/os/fd.hpp"

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace leasehold::unit {

// A real medium that says before each step that it takes it. What comes in between is up to the test: another guest, or
// a death (an exception).
class SteppedMedium final : public lease::Medium {
public:
    SteppedMedium(lease::ByteRangeMedium medium, std::function<void()>& before)
        : medium_(std::move(medium)), before_(before) {}

    [[nodiscard]] os::LockOutcome tryPlace(const lease::Mark& mark, os::LockType type) override;
    void remove(const lease::Mark& mark) override;
    void removeHandoff() override;
    void removeAll() override;
    std::vector<lease::Mark> look() const override;
    lease::Note note() const override;
    void setNote(const lease::Note& note) override;

private:
    void step() const;

    lease::ByteRangeMedium medium_;
    std::function<void()>& before_;
};

// One QEMU of a domain, with some images, in one mode.
class Actor {
public:
    Actor(std::uint32_t domain, lease::Mode mode, const std::vector<std::string>& images);
    Actor(std::uint32_t domain, lease::Mode mode, const std::string& image)
        : Actor(domain, mode, std::vector<std::string>{image}) {}
    Actor(const Actor&) = delete;
    Actor& operator=(const Actor&) = delete;

    const lease::Incarnation& self() const { return self_; }
    const std::vector<lease::Share>& shares() const { return shares_; }

    // The calls of the protocol. None waits, unless `pause` is set: then it is called as often as they ask.
    lease::Registration enter();
    lease::Answer acquire(std::optional<std::uint32_t> quoted = std::nullopt);
    std::uint32_t release() { return lease::releaseAll(self_, shares_); }
    std::uint32_t inquire() { return lease::inquireAll(self_, shares_); }
    void downgrade();
    lease::Answer upgrade();
    void die(); // closes everything: what the kernel does when QEMU goes

    // What the kernel says that this QEMU holds.
    bool has(const lease::Mark& mark, std::size_t image = 0) const;
    bool owns(std::size_t image = 0) const; // the mark that decides in its mode, for writing
    bool present(std::size_t image = 0) const;
    std::size_t locks(std::size_t image = 0) const;
    std::optional<std::uint32_t> handoff(std::size_t image = 0) const;

    std::function<bool()> pause;  // between two tries; false: the QEMU has died
    std::function<void()> before; // before each step of a medium

private:
    lease::Patience patience();

    lease::Incarnation self_;
    lease::Mode mode_;
    std::vector<os::Fd> fds_;
    std::deque<SteppedMedium> media_;
    std::vector<lease::Share> shares_;
};

constexpr lease::Mark kOwner{lease::MarkKind::owner, 0, 0};

// Who has been killed between two steps.
struct Death {};

// Runs `body` once for each step that the actor takes in it, on a new scene each time, and calls `between` right before
// that step. `scene` gives the actor that is interrupted. Gives the number of steps.
int atEveryStep(const std::function<Actor&()>& scene, const std::function<void(Actor&)>& body,
                const std::function<void()>& between, const std::function<void(int)>& check);

// EXPECT_TRUE(granted(...)) prints why not.
::testing::AssertionResult granted(const lease::Answer& answer);
::testing::AssertionResult granted(const lease::Registration& registration);
::testing::AssertionResult refused(const lease::Answer& answer, lease::Obstacle why);

} // namespace leasehold::unit

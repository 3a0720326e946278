// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The people of the protocol tests: QEMUs that use images, each with an open file description of its own for each
// image, as the engine gives them. The media are the real ones; one can be interrupted between any two of its steps.
// Which of them the marks are in says the environment: meson runs every protocol test once on each.

#include "core/lease/file_set.hpp"
#include "core/lease/protocol.hpp"
#include "tests/support/unit_support.hpp"

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace leasehold::unit {

// A real medium that says before each step that it takes it. What comes in between is up to the test: another guest, or
// a death (an exception).
class SteppedMedium final : public lease::Medium {
public:
    SteppedMedium(std::unique_ptr<lease::Medium> medium, std::function<void()>& before)
        : medium_(std::move(medium)), before_(before) {}

    [[nodiscard]] os::LockOutcome tryPlace(const lease::Mark& mark, os::LockType type) override;
    void remove(const lease::Mark& mark) override;
    void removeHandoff() override;
    void removeAll() override;
    bool any(lease::MarkKind first, lease::MarkKind last) const override;
    lease::Rivals findRivals(std::uint32_t domain, lease::Mode mode,
                             std::optional<std::uint32_t> quoted) const override;
    std::vector<lease::Mark> lookAt(std::uint32_t domain, lease::Mode mode) const override;
    std::vector<lease::Mark> lookToJoin(std::uint32_t domain, lease::Mode mode) const override;
    std::vector<lease::Mark> look() const override;
    lease::Note note() const override;
    void setNote(const lease::Note& note) override;

private:
    void step() const;

    std::unique_ptr<lease::Medium> medium_;
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
    lease::Registration enter(lease::Entry entry = lease::Entry::running);
    lease::Answer acquire(std::optional<std::uint32_t> quoted = std::nullopt);
    std::uint32_t release() { return lease::releaseAll(self_, shares_); }
    std::uint32_t inquire() { return lease::inquireAll(self_, shares_); }
    void downgrade();
    lease::Answer upgrade();
    void die(); // closes everything: what the kernel does when QEMU goes

    // What the kernel, or the file of this incarnation, says that this QEMU holds.
    bool has(const lease::Mark& mark, std::size_t image = 0) const;
    bool owns(std::size_t image = 0) const; // the mark that decides in its mode, for writing
    bool present(std::size_t image = 0) const;
    std::size_t count(std::size_t image = 0) const;
    std::optional<std::uint32_t> handoff(std::size_t image = 0) const;

    std::function<bool()> pause;            // between two tries; false: the QEMU has died
    std::chrono::milliseconds lingering{0}; // lease::Patience
    std::function<void()> before;           // before each step of a medium

private:
    // What keeps one lease alive.
    struct Opened {
        std::string name;
        os::Fd lease, directory, image; // the latter two for a file set only
    };
    std::unique_ptr<lease::Medium> openMedium(const std::string& image);
    lease::Patience patience();
    std::vector<lease::Placed> marks(std::size_t image) const;

    lease::Incarnation self_;
    lease::Mode mode_;
    std::deque<Opened> opened_; // stays where it is: the media have the names from here
    std::deque<SteppedMedium> media_;
    std::vector<lease::Share> shares_;
};

constexpr lease::Mark kOwner{lease::MarkKind::owner, 0, 0};
constexpr lease::Mode kModes[] = {lease::Mode::exclusive, lease::Mode::shared, lease::Mode::readOnly};
constexpr std::uint32_t kWeb = 1, kMail = 2; // domains

// Two images, and who closes what it opened.
class ProtocolTest : public LeavesNoDescriptor {
protected:
    TempDir dir;
    std::string image = dir.file("disk.img"), second = dir.file("second.img");
    std::vector<std::string> both{image, second};
};

// Whether the marks are files of a directory, or bytes of the image.
bool marksAreFiles();
// A program outside leasehold that locks the image in the way that an owner of this medium meets: fcntl(2), flock(2).
// `length` 0: to the end.
os::Fd lockOutside(const std::string& image, os::LockType type, std::int64_t length = 0);

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

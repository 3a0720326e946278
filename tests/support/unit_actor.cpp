// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/unit_actor.hpp"

#include "core/os/file_lock.hpp"

#include <fcntl.h>

namespace leasehold::unit {

using lease::Mark;
using lease::MarkKind;
using lease::Mode;

void SteppedMedium::step() const {
    if (before_)
        before_();
}

os::LockOutcome SteppedMedium::tryPlace(const Mark& mark, os::LockType type) {
    step();
    return medium_.tryPlace(mark, type);
}

void SteppedMedium::remove(const Mark& mark) {
    step();
    medium_.remove(mark);
}

void SteppedMedium::removeHandoff() {
    step();
    medium_.removeHandoff();
}

void SteppedMedium::removeAll() {
    step();
    medium_.removeAll();
}

std::vector<Mark> SteppedMedium::look() const {
    step();
    return medium_.look();
}

lease::Note SteppedMedium::note() const {
    step();
    return medium_.note();
}

void SteppedMedium::setNote(const lease::Note& note) {
    step();
    medium_.setNote(note);
}

Actor::Actor(std::uint32_t domain, Mode mode, const std::vector<std::string>& images)
    : self_{domain, lease::drawId()}, mode_(mode) {
    bool writable = mode != Mode::readOnly;
    for (const std::string& image : images) {
        fds_.push_back(os::openFile(image, writable ? O_RDWR : O_RDONLY));
        media_.emplace_back(lease::ByteRangeMedium(fds_.back().get(), writable, image), before);
        shares_.push_back({&media_.back(), mode});
    }
}

lease::Patience Actor::patience() {
    return {[this](std::chrono::milliseconds) { return pause(); }, std::chrono::seconds(pause ? 60 : 0)};
}

lease::Registration Actor::enter() {
    return lease::registerAll(self_, shares_, patience());
}

lease::Answer Actor::acquire(std::optional<std::uint32_t> quoted) {
    return lease::acquireAll(self_, shares_, quoted, patience());
}

void Actor::downgrade() {
    for (lease::Share& share : shares_) {
        lease::downgrade(self_, share);
        share.mode = Mode::readOnly;
    }
    mode_ = Mode::readOnly;
}

lease::Answer Actor::upgrade() {
    auto answer = lease::upgrade(self_, shares_[0]);
    if (!answer)
        mode_ = shares_[0].mode = Mode::exclusive;
    return answer;
}

void Actor::die() {
    fds_.clear();
}

bool Actor::has(const Mark& mark, std::size_t image) const {
    for (const os::FoundLock& lock : os::inspectOwnLocks(fds_[image].get()))
        for (const Mark& own : lease::decodeRange(lock.range))
            if (own == mark)
                return true;
    return false;
}

bool Actor::owns(std::size_t image) const {
    Mark mark = mode_ == Mode::shared ? Mark{MarkKind::sharedOwner, self_.domain, 0} : kOwner;
    os::Range byte{lease::encodeOffset(mark), 1};
    for (const os::FoundLock& lock : os::inspectOwnLocks(fds_[image].get()))
        if (lock.range == byte && lock.type == os::LockType::write)
            return true;
    return false;
}

bool Actor::present(std::size_t image) const {
    return has(presentMark(mode_, self_), image);
}

std::size_t Actor::locks(std::size_t image) const {
    return os::inspectOwnLocks(fds_[image].get()).size();
}

std::optional<std::uint32_t> Actor::handoff(std::size_t image) const {
    for (const os::FoundLock& lock : os::inspectOwnLocks(fds_[image].get()))
        for (const Mark& mark : lease::decodeRange(lock.range))
            if (mark.kind == lease::MarkKind::handoff)
                return mark.id;
    return std::nullopt;
}

int atEveryStep(const std::function<Actor&()>& scene, const std::function<void(Actor&)>& body,
                const std::function<void()>& between, const std::function<void(int)>& check) {
    for (int step = 1;; step++) {
        Actor& actor = scene();
        int left = step;
        actor.before = [&] {
            if (--left == 0)
                between();
        };
        try {
            body(actor);
        } catch (const Death&) {
            actor.die();
        }
        actor.before = nullptr;
        if (left > 0)
            return step - 1;
        check(step);
    }
}

namespace {
const char* describe(lease::Obstacle why) {
    switch (why) {
    case lease::Obstacle::guestPresent:
        return "guestPresent";
    case lease::Obstacle::sameGuest:
        return "sameGuest";
    case lease::Obstacle::beingTaken:
        return "beingTaken";
    case lease::Obstacle::foreignLock:
        return "foreignLock";
    case lease::Obstacle::stateTaken:
        return "stateTaken";
    }
    return "?";
}
} // namespace

::testing::AssertionResult granted(const lease::Answer& answer) {
    if (!answer)
        return ::testing::AssertionSuccess() << "granted";
    return ::testing::AssertionFailure() << "refused: " << describe(answer->obstacle);
}

::testing::AssertionResult granted(const lease::Registration& registration) {
    return granted(registration.refusal);
}

::testing::AssertionResult refused(const lease::Answer& answer, lease::Obstacle why) {
    if (!answer)
        return ::testing::AssertionFailure() << "granted";
    if (answer->obstacle != why)
        return ::testing::AssertionFailure() << "refused, but: " << describe(answer->obstacle);
    return ::testing::AssertionSuccess();
}

} // namespace leasehold::unit

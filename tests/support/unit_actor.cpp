// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/unit_actor.hpp"

#include "core/lease/byte_range.hpp"

#include <algorithm>
#include <cstdlib>

#include <fcntl.h>
#include <sys/stat.h>

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
    return medium_->tryPlace(mark, type);
}

void SteppedMedium::remove(const Mark& mark) {
    step();
    medium_->remove(mark);
}

void SteppedMedium::removeHandoff() {
    step();
    medium_->removeHandoff();
}

void SteppedMedium::removeAll() {
    step();
    medium_->removeAll();
}

bool SteppedMedium::any(lease::MarkKind first, lease::MarkKind last) const {
    step();
    return medium_->any(first, last);
}

lease::Rivals SteppedMedium::findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const {
    step();
    return medium_->findRivals(domain, mode, quoted);
}

std::vector<Mark> SteppedMedium::lookToJoin(std::uint32_t domain, Mode mode) const {
    step();
    return medium_->lookToJoin(domain, mode);
}

std::vector<Mark> SteppedMedium::lookAt(std::uint32_t domain, Mode mode) const {
    step();
    return medium_->lookAt(domain, mode);
}

std::vector<Mark> SteppedMedium::look() const {
    step();
    return medium_->look();
}

lease::Note SteppedMedium::note() const {
    step();
    return medium_->note();
}

void SteppedMedium::setNote(const lease::Note& note) {
    step();
    medium_->setNote(note);
}

bool marksAreFiles() {
    static const bool files = getenv("LEASEHOLD_MARKS") && std::string(getenv("LEASEHOLD_MARKS")) == "files";
    return files;
}

os::Fd lockOutside(const std::string& image, os::LockType type, std::int64_t length) {
    os::Fd program = os::openFile(image, O_RDWR);
    auto outcome = marksAreFiles() ? os::tryFlock(program.get(), type, image)
                                   : os::tryLock(program.get(), type, {0, length}, image);
    demand(outcome == os::LockOutcome::granted, image + " is locked already");
    return program;
}

Actor::Actor(std::uint32_t domain, Mode mode, const std::vector<std::string>& images)
    : self_{domain, lease::drawId()}, mode_(mode) {
    for (const std::string& image : images) {
        media_.emplace_back(openMedium(image), before);
        shares_.push_back({&media_.back(), mode});
    }
}

std::unique_ptr<lease::Medium> Actor::openMedium(const std::string& image) {
    bool writable = mode_ != Mode::readOnly;
    os::Fd fd = os::openFile(image, writable ? O_RDWR : O_RDONLY);
    if (!marksAreFiles()) {
        const Opened& opened = opened_.emplace_back(Opened{image, std::move(fd), {}, {}});
        return std::make_unique<lease::ByteRangeMedium>(opened.lease.get(), writable, opened.name);
    }
    std::string folder = image + ".marks";
    demand(mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST, "no directory " + folder);
    os::Fd directory = os::openFile(folder, O_RDONLY | O_DIRECTORY);
    os::Fd marks = lease::openMarkFile(directory.get(), self_, image, image);
    const Opened& opened = opened_.emplace_back(Opened{image, std::move(marks), std::move(directory), std::move(fd)});
    return std::make_unique<lease::FileSetMedium>(opened.lease.get(), opened.directory.get(), opened.image.get(), self_,
                                                  opened.name);
}

lease::Patience Actor::patience() {
    return {[this](std::chrono::milliseconds) { return pause(); }, std::chrono::seconds(pause ? 60 : 0), lingering};
}

lease::Registration Actor::enter(lease::Entry entry) {
    return lease::registerAll(self_, shares_, patience(), entry);
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
    std::vector<lease::Share> writing = shares_;
    for (lease::Share& share : writing)
        share.mode = Mode::exclusive;
    auto answer = lease::upgradeAll(self_, shares_, writing, patience());
    if (!answer) {
        shares_ = writing;
        mode_ = Mode::exclusive;
    }
    return answer;
}

void Actor::die() {
    opened_.clear();
}

std::vector<lease::Placed> Actor::marks(std::size_t image) const {
    int fd = opened_[image].lease.get();
    if (marksAreFiles()) {
        std::string text(4096, '\0');
        ssize_t length = pread(fd, text.data(), text.size(), 0);
        demand(length > 0, "no marks to read");
        return lease::decodeMarks(std::string_view(text).substr(0, static_cast<std::size_t>(length)), self_);
    }
    std::vector<lease::Placed> marks;
    for (const os::FoundLock& lock : os::inspectOwnLocks(fd))
        for (const Mark& mark : lease::decodeRange(lock.range))
            marks.push_back({mark, lock.type});
    return marks;
}

bool Actor::has(const Mark& mark, std::size_t image) const {
    auto all = marks(image);
    return std::any_of(all.begin(), all.end(), [&](const lease::Placed& placed) { return placed.mark == mark; });
}

bool Actor::owns(std::size_t image) const {
    Mark mark = mode_ == Mode::shared ? Mark{MarkKind::sharedOwner, self_.domain, 0} : kOwner;
    auto all = marks(image);
    return std::find(all.begin(), all.end(), lease::Placed{mark, os::LockType::write}) != all.end();
}

bool Actor::present(std::size_t image) const {
    return has(presentMark(mode_, self_), image);
}

std::size_t Actor::count(std::size_t image) const {
    return marks(image).size();
}

std::optional<std::uint32_t> Actor::handoff(std::size_t image) const {
    for (const lease::Placed& placed : marks(image))
        if (placed.mark.kind == MarkKind::handoff)
            return placed.mark.id;
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

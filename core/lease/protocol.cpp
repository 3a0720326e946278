// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/lease/protocol.hpp"

#include "core/os/error.hpp"

#include <algorithm>

namespace leasehold::lease {

namespace {

using os::LockOutcome;
using os::LockType;
using std::chrono::milliseconds;

// What others have up on one resource, as far as one share of it is concerned.
struct View {
    std::vector<Mark> marks;
    bool foreign = false;
    bool strangers = false;   // incompatible guests
    bool entryBusy = false;   // somebody holds `owner`
    bool ownerBusy = false;   // somebody holds this share's owner mark
    std::size_t peers = 0;    // other incarnations of my domain in my mode
    std::size_t handoffs = 0; // and how many handoffs they have up
};

// The mark that decides between the incarnations of one domain.
Mark ownerMark(Mode mode, const Incarnation& self) {
    return mode == Mode::shared ? Mark{MarkKind::sharedOwner, self.domain, 0} : Mark{MarkKind::owner, 0, 0};
}

View viewOf(const Incarnation& self, const Share& share, std::vector<Mark> marks) {
    View view;
    view.marks = std::move(marks);
    for (const Mark& mark : view.marks) {
        bool mine = mark.domain == self.domain;
        view.entryBusy = view.entryBusy || mark.kind == MarkKind::owner;
        if (mark.kind == MarkKind::foreign)
            view.foreign = true;
        else if (mark == ownerMark(share.mode, self))
            view.ownerBusy = true;
        else if (auto mode = presentMode(mark)) {
            // Incarnations of one domain are rivals for the owner mark, not strangers. Readers need no owner.
            if (mine && *mode == share.mode && share.mode != Mode::readOnly)
                view.peers++;
            else if (!compatible(*mode, share.mode))
                view.strangers = true;
        } else if (mine && mark.kind == MarkKind::handoff)
            view.handoffs++;
    }
    return view;
}

View look(const Incarnation& self, const Share& share) {
    return viewOf(self, share, share.medium->look());
}

bool isAlone(const Share& share) {
    return !share.medium->any(MarkKind::owner, MarkKind::taken);
}

// What the other incarnations of this domain have up. Beside an exclusive guest there is nobody else, but for an
// instant.
View lookAtOwnDomain(const Incarnation& self, const Share& share) {
    if (share.mode == Mode::exclusive)
        return look(self, share);
    return isAlone(share) ? View{} : viewOf(self, share, share.medium->lookAt(self.domain, share.mode));
}

// Whether anybody is in the way of this share. There may be a thousand guests who are not: they are not looked at, and
// those who are in the way are named, for the refusal. Where others change their modes meanwhile the answer holds if
// `owner` is ours: they need it too.
View ask(const Incarnation& self, const Share& share) {
    static_assert(static_cast<int>(MarkKind::presentShared) == static_cast<int>(MarkKind::presentExclusive) + 1);
    auto any = [&](MarkKind first, MarkKind last) { return share.medium->any(first, last); };
    switch (share.mode) {
    case Mode::readOnly:
        return any(MarkKind::presentExclusive, MarkKind::presentShared) ? look(self, share) : View{};
    case Mode::shared:
        if (isAlone(share))
            return {};
        if (any(MarkKind::presentExclusive, MarkKind::presentExclusive) ||
            any(MarkKind::presentReadOnly, MarkKind::presentReadOnly))
            return look(self, share);
        return viewOf(self, share, share.medium->lookToJoin(self.domain, share.mode));
    case Mode::exclusive:
        break;
    }
    if (isAlone(share))
        return {};
    View view = viewOf(self, share, share.medium->lookToJoin(self.domain, share.mode));
    return view.peers > 0 && !view.strangers && !view.foreign ? view : look(self, share);
}

Answer refuse(std::size_t share, Obstacle obstacle, View& view) {
    return Refusal{share, obstacle, std::move(view.marks)};
}

Answer refuseStrangers(std::size_t share, View& view) {
    if (view.foreign)
        return refuse(share, Obstacle::foreignLock, view);
    if (view.strangers)
        return refuse(share, Obstacle::guestPresent, view);
    return std::nullopt;
}

// A mark that nobody else can have up: its number was drawn by us.
void place(const Share& share, const Mark& mark, LockType type = LockType::write) {
    if (share.medium->tryPlace(mark, type) == LockOutcome::contended)
        throw Error(Fault::system, "a lock that belongs to this guest alone is held by somebody else; try again");
}

// Waiting for the event would need a lock call that blocks, which nobody could end when the QEMU dies. So the lock is
// tried again, at growing distances: often enough for a handoff that takes milliseconds, rarely enough to cost nothing.
class Waiter {
public:
    explicit Waiter(const Patience& patience) : Waiter(patience, patience.limit) {}
    Waiter(const Patience& patience, milliseconds limit)
        : patience_(patience), deadline_(std::chrono::steady_clock::now() + limit) {}

    bool again() {
        auto left = std::chrono::ceil<milliseconds>(deadline_ - std::chrono::steady_clock::now());
        if (left <= milliseconds(0))
            return false;
        milliseconds step = std::min(left, step_);
        step_ = std::min(step_ * 2, milliseconds(100));
        return patience_.pause(step);
    }

private:
    const Patience& patience_;
    std::chrono::steady_clock::time_point deadline_;
    milliseconds step_{2};
};

// The steps of registerAll, with what they know of each share.
class Registrar {
public:
    Registrar(const Incarnation& self, std::span<const Share> shares, const Patience& patience, Entry entry)
        : self_(self), shares_(shares), waiter_(patience), entry_(entry), joined_(shares.size(), false),
          asked_(shares.size(), false) {}

    Registration run() {
        Registration result;
        result.refusal = takeAll();
        // One step per resource: a libvirtd that dies here takes the rest along with its descriptors.
        std::uint32_t token = entry_ == Entry::waiting && !result.refusal ? drawId() : 0;
        for (std::size_t i = 0; i < shares_.size(); i++) {
            if (result.refusal)
                shares_[i].medium->removeAll();
            else if (!joined_[i] && shares_[i].mode != Mode::readOnly)
                own(shares_[i], token);
        }
        result.joined = joined_;
        return result;
    }

private:
    void own(const Share& share, std::uint32_t token) {
        if (token != 0)
            place(share, {MarkKind::handoff, self_.domain, token});
        share.medium->setNote({.owner = true, .leaving = false, .token = token});
    }

    Answer takeAll() {
        // Whoever looks first never touches an owner mark while somebody is present: a rogue start cannot make a
        // rightful Acquire fail.
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = lookFirst(i))
                return refusal;
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = joined_[i] ? std::nullopt : takeOwner(i))
                return refusal;
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = joined_[i] ? std::nullopt : placePresent(i))
                return refusal;
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = joined_[i] ? std::nullopt : lookAgain(i))
                return refusal;
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = joined_[i] ? join(i) : std::nullopt)
                return refusal;
        return std::nullopt;
    }

    Answer lookFirst(std::size_t i) {
        View view = ask(self_, shares_[i]);
        joined_[i] = asked_[i] = view.peers > 0;
        return joined_[i] ? mayJoin(i, view) : refuseStrangers(i, view);
    }

    // The entry: `owner` for writing keeps everybody else out for exclusive mode and while a shared guest comes in;
    // for reading it keeps writers out. Only the granted lock decides; the look explains a busy one.
    Answer takeOwner(std::size_t i) {
        const Share& share = shares_[i];
        LockType type = share.mode == Mode::readOnly ? LockType::read : LockType::write;
        while (share.medium->tryPlace({MarkKind::owner, 0, 0}, type) == LockOutcome::contended) {
            View view = ask(self_, share);
            if (view.strangers)
                return refuse(i, Obstacle::guestPresent, view);
            if (view.peers > 0) {
                joined_[i] = true;
                return std::nullopt;
            }
            // Nobody is present: another guest is between its owner and its present mark, or on its way out. Or there
            // is a reader on another host whose locks F_OFD_GETLK does not show (NFSv3): the lock that was refused is
            // all that tells. A lock that is not ours may be that of a dying QEMU, whose descriptors go one by one.
            if (waiter_.again())
                continue;
            view = look(self_, share);
            return refuse(i,
                          view.foreign                        ? Obstacle::foreignLock
                          : view.entryBusy && !view.strangers ? Obstacle::beingTaken
                                                              : Obstacle::guestPresent,
                          view);
        }
        // Among the incarnations of a shared domain sharedOwner decides. It has to be up before `present` is, or two
        // that start at once would each take the other for one that lets it join.
        if (share.mode == Mode::shared &&
            share.medium->tryPlace(ownerMark(share.mode, self_), LockType::write) == LockOutcome::contended) {
            share.medium->remove({MarkKind::owner, 0, 0});
            joined_[i] = true;
        }
        return std::nullopt;
    }

    Answer placePresent(std::size_t i) {
        const Share& share = shares_[i];
        // Busy only if two incarnations drew the same number.
        if (share.medium->tryPlace(presentMark(share.mode, self_), LockType::write) == LockOutcome::granted)
            return std::nullopt;
        View view = look(self_, share);
        return refuse(i, Obstacle::beingTaken, view);
    }

    Answer lookAgain(std::size_t i) {
        const Share& share = shares_[i];
        View view = ask(self_, share);
        if (Answer refusal = refuseStrangers(i, view))
            return refusal;
        if (share.mode == Mode::readOnly)
            return std::nullopt;
        joined_[i] = view.peers > 0;
        if (joined_[i])
            share.medium->remove(ownerMark(share.mode, self_));
        // A shared guest keeps others out only while it enters.
        if (share.mode == Mode::shared)
            share.medium->remove({MarkKind::owner, 0, 0});
        return std::nullopt;
    }

    // Another incarnation of this domain has the resource. It must be willing to hand over, or have given up the
    // owner mark already (a guest that arrived suspended has none). Asked before our present mark is up, because even
    // a passing one can make a rival's cold start fail; and after, because only now nobody can slip in between.
    Answer join(std::size_t i) {
        if (Answer refusal = asked_[i] ? std::nullopt : askToJoin(i))
            return refusal;
        if (Answer refusal = placePresent(i))
            return refusal;
        return askToJoin(i);
    }

    Answer askToJoin(std::size_t i) {
        View view = ask(self_, shares_[i]);
        if (view.peers == 0 && shares_[i].mode == Mode::shared) // gone meanwhile: by whom is `owner` held?
            view = lookAtOwnDomain(self_, shares_[i]);
        return mayJoin(i, view);
    }

    Answer mayJoin(std::size_t i, View& view) {
        if (Answer refusal = refuseStrangers(i, view))
            return refusal;
        // Never a third: with two others one cannot tell whose state is the newest. The QEMU that an unfinished
        // migration left behind has to go first.
        if (view.peers > 1 || (view.handoffs == 0 && view.ownerBusy))
            return refuse(i, Obstacle::sameGuest, view);
        // Also where `owner` is only the entry (shared): it may be in the hands of one that found nobody and is about
        // to remove the lease file.
        if (view.handoffs == 0 && view.entryBusy)
            return refuse(i, Obstacle::beingTaken, view);
        return std::nullopt;
    }

    const Incarnation& self_;
    std::span<const Share> shares_;
    Waiter waiter_;
    Entry entry_;
    std::vector<bool> joined_;
    std::vector<bool> asked_; // whether it may join, at the first look
};

// The steps of acquireAll.
class Acquirer {
public:
    Acquirer(const Incarnation& self, std::span<const Share> shares, std::optional<std::uint32_t> quoted,
             const Patience& patience)
        : self_(self), shares_(shares), quoted_(quoted), patience_(patience), turn_(shares.size()) {}

    Answer run() {
        Answer refusal = takeAll();
        if (!refusal) {
            clear();
            return std::nullopt;
        }
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (turn_[i].took)
                shares_[i].medium->remove(ownerMark(shares_[i].mode, self_));
        return refusal;
    }

private:
    struct Turn {
        Note before;             // what we had up when the call began
        bool took = false;       // the owner mark is ours since this call
        bool succeeding = false; // the state quotes another incarnation's handoff
    };

    Answer takeAll() {
        for (std::size_t i = 0; i < shares_.size(); i++)
            turn_[i].before = shares_[i].mode == Mode::readOnly ? Note{.owner = true} : shares_[i].medium->note();
        // Whoever had all owner marks before has looked with them in hand already, and whoever came since merely
        // joined. Nothing is asked: each question is a round trip on network storage, and a walk over all locks of the
        // image elsewhere.
        if (std::all_of(turn_.begin(), turn_.end(), [](const Turn& turn) { return turn.before.owner; }))
            return std::nullopt;
        waiter_.emplace(patience_);
        briefly_.emplace(patience_, patience_.lingering);
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = waitForTurn(i))
                return refusal;
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (Answer refusal = takeOwner(i))
                return refusal;
        // With the owner marks in hand the answer cannot change any more: look again whether it is still yes.
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (auto obstacle = findObstacle(i))
                return refuseTurn(i, *obstacle);
        return std::nullopt;
    }

    // Why this incarnation may not run now; nothing if it may.
    std::optional<Obstacle> findObstacle(std::size_t i) {
        const Share& share = shares_[i];
        if (share.mode == Mode::readOnly)
            return std::nullopt;
        const Rivals rivals = share.medium->findRivals(self_.domain, share.mode, quoted_);
        Turn& turn = turn_[i];
        turn.succeeding = false;
        if (!rivals.present)
            return std::nullopt;
        // We had it all along, and whoever else is there merely joined. Beside a handoff of somebody else it proves
        // nothing: a libvirtd that died between taking the mark and the second look has left it.
        if (turn.before.owner && !rivals.handoff)
            return std::nullopt;
        if (quoted_ && turn.before.token == *quoted_)
            return rivals.taken ? std::optional(Obstacle::stateTaken) : std::nullopt;
        // Others that merely joined do not matter: it is enough that somebody's handoff is quoted.
        turn.succeeding = rivals.quoted;
        return turn.succeeding ? std::nullopt : std::optional(Obstacle::sameGuest);
    }

    // With the names of those who are in the way.
    Answer refuseTurn(std::size_t i, Obstacle obstacle) {
        View view = lookAtOwnDomain(self_, shares_[i]);
        return refuse(i, obstacle, view);
    }

    // A state may come before the release that it belongs to: wait for it. Without one, and where it was taken, nothing
    // comes; but whoever is in the way may have died just now, and its marks may go in an instant.
    Answer waitForTurn(std::size_t i) {
        for (;;) {
            auto obstacle = findObstacle(i);
            if (!obstacle)
                return std::nullopt;
            bool comes = quoted_ && *obstacle != Obstacle::stateTaken;
            if (!(comes && waiter_->again()) && !briefly_->again())
                return refuseTurn(i, *obstacle);
        }
    }

    Answer takeOwner(std::size_t i) {
        const Share& share = shares_[i];
        if (turn_[i].before.owner)
            return std::nullopt;
        // One that no note tells of is worth nothing, and must not be placed once more: ceph-fuse 16.2 never releases a
        // lock that was placed twice, not even when its holder dies (measured, tests/lab).
        share.medium->remove(ownerMark(share.mode, self_));
        while (share.medium->tryPlace(ownerMark(share.mode, self_), LockType::write) == LockOutcome::contended) {
            if (waiter_->again() || briefly_->again())
                continue;
            View view = look(self_, share);
            return refuse(i,
                          view.foreign     ? Obstacle::foreignLock
                          : view.peers > 0 ? Obstacle::sameGuest
                          : view.strangers ? Obstacle::guestPresent
                                           : Obstacle::beingTaken,
                          view);
        }
        turn_[i].took = true;
        return std::nullopt;
    }

    void clear() {
        for (std::size_t i = 0; i < shares_.size(); i++)
            if (turn_[i].succeeding)
                // Up already if the call is repeated. A conversion in between makes it one lock on ceph-fuse, see
                // above.
                for (LockType type : {LockType::read, LockType::write})
                    // Granted always: the token is the source's, and only its successor may quote it. If it is busy
                    // nevertheless, somebody else has marked the token as used, which is all that matters.
                    (void)shares_[i].medium->tryPlace({MarkKind::taken, self_.domain, *quoted_}, type);
        // Not before all owners are ours: until here a refusal only gives back. Whoever died between a note and its
        // mark may have left a handoff that no note tells of.
        for (std::size_t i = 0; i < shares_.size(); i++) {
            if (shares_[i].mode == Mode::readOnly)
                continue;
            if (turn_[i].before != Note{.owner = true})
                shares_[i].medium->setNote({.owner = true});
            shares_[i].medium->removeHandoff();
        }
    }

    const Incarnation& self_;
    std::span<const Share> shares_;
    std::optional<std::uint32_t> quoted_;
    const Patience& patience_;
    // Both from the same instant on: together they are no longer than the longer one. Whoever asks nothing has none.
    std::optional<Waiter> waiter_, briefly_;
    std::vector<Turn> turn_;
};

} // namespace

Registration registerAll(const Incarnation& self, std::span<const Share> shares, const Patience& patience,
                         Entry entry) {
    return Registrar(self, shares, patience, entry).run();
}

Answer acquireAll(const Incarnation& self, std::span<const Share> shares, std::optional<std::uint32_t> quoted,
                  const Patience& patience) {
    return Acquirer(self, shares, quoted, patience).run();
}

namespace {

// What may be up already, though no note tells of it: a libvirtd that died has left it.
enum class Remains {
    go,   // at once
    stay, // until the next acquire or inquire: nobody was told their token, and they let nobody in but a joiner
};

// Offers the resource to whoever quotes the token, and to nobody with one that was told. Gives what is noted now.
Note raiseHandoff(const Incarnation& self, const Share& share, const Note& before, std::uint32_t token, bool leaving,
                  Remains remains) {
    Note note{.owner = before.owner};
    if (before != note)
        share.medium->setNote(note);
    if (remains == Remains::go || before != note)
        share.medium->removeHandoff();
    if (leaving)
        place(share, {MarkKind::leaving, self.domain, self.id});
    place(share, {MarkKind::handoff, self.domain, token});
    note.leaving = leaving;
    note.token = token;
    share.medium->setNote(note);
    return note;
}

} // namespace

std::uint32_t releaseAll(const Incarnation& self, std::span<const Share> shares) {
    std::vector<Note> notes(shares.size());
    std::uint32_t token = 0;
    bool agreed = true;
    for (std::size_t i = 0; i < shares.size(); i++) {
        if (shares[i].mode == Mode::readOnly)
            continue; // readers are compatible: there is nothing to hand over
        notes[i] = shares[i].medium->note();
        agreed = agreed && (token == 0 || notes[i].token == 0 || token == notes[i].token);
        token = notes[i].token ? notes[i].token : token;
    }
    // A token that was just drawn is up nowhere. That of another resource may be, and a mark must not be placed twice
    // (ceph-fuse, see Acquirer::takeOwner).
    const Remains remains = token == 0 ? Remains::stay : Remains::go;
    // A libvirtd that died while it changed the token leaves two: neither can be quoted for all resources any more.
    if (token == 0 || !agreed)
        token = drawId();
    // Who has nothing to hand over must not offer it: a joiner that never ran.
    for (std::size_t i = 0; i < shares.size(); i++)
        if ((notes[i].owner || notes[i].token != 0) && notes[i].token != token)
            notes[i] = raiseHandoff(self, shares[i], notes[i], token, notes[i].leaving, remains);
    // Owner stays: QEMU still drains, and the image of a suspended guest is nobody else's. Only a live migration needs
    // it, because the destination acquires before we are dead: then a joiner is there, which alone has no handoff up.
    for (std::size_t i = 0; i < shares.size(); i++) {
        if (!notes[i].leaving)
            continue;
        View view = lookAtOwnDomain(self, shares[i]);
        if (view.peers <= view.handoffs)
            continue;
        notes[i].owner = false;
        shares[i].medium->setNote(notes[i]);
        shares[i].medium->remove(ownerMark(shares[i].mode, self));
    }
    return token;
}

std::uint32_t inquireAll(const Incarnation& self, std::span<const Share> shares) {
    std::uint32_t token = drawId();
    for (const Share& share : shares)
        if (share.mode != Mode::readOnly)
            raiseHandoff(self, share, share.medium->note(), token, true, Remains::go);
    return token;
}

void offer(const Incarnation& self, const Share& share, std::uint32_t token) {
    if (share.mode == Mode::readOnly)
        return;
    if (Note note = share.medium->note(); note.token != token) // or it is up
        raiseHandoff(self, share, note, token, false, Remains::go);
}

namespace {

// Whether anybody but this incarnation itself is in the way of its writing. Its other description shows as a reader.
View lookPastOneself(const Incarnation& self, const Share& share) {
    View view = look(self, share);
    Mark own = presentMark(Mode::readOnly, self);
    view.strangers = std::any_of(view.marks.begin(), view.marks.end(), [&](const Mark& mark) {
        auto mode = presentMode(mark);
        return mode && mark != own && !compatible(*mode, Mode::exclusive);
    });
    return view;
}

// `owner` for reading, again. Whoever is in the way has looked, or will look, sees our `present` and goes.
bool takeOwnerForReading(const Share& share, const Patience& patience) {
    Waiter waiter(patience);
    while (share.medium->tryPlace({MarkKind::owner, 0, 0}, LockType::read) == LockOutcome::contended)
        if (!waiter.again())
            return false;
    return true;
}

} // namespace

void downgrade(const Incarnation& self, const Share& share) {
    share.medium->setNote({});
    share.medium->removeHandoff();
    place(share, presentMark(Mode::readOnly, self));
    // Our own write lock becomes a read lock in one step that cannot be refused: nobody else holds the byte.
    if (!takeOwnerForReading(share, {[](milliseconds) { return false; }, milliseconds(0)}))
        throw Error(Fault::system, "a lease for reading is kept busy by somebody who wants to write; try again");
    share.medium->remove(presentMark(Mode::exclusive, self));
}

Answer upgradeAll(const Incarnation& self, std::span<const Share> reading, std::span<const Share> writing,
                  const Patience& patience) {
    constexpr Mark owner{MarkKind::owner, 0, 0};
    auto inPlace = [&](std::size_t i) { return reading[i].medium == writing[i].medium; };
    auto giveBack = [&](std::size_t i) {
        if (inPlace(i)) {
            place(reading[i], owner, LockType::read);
            writing[i].medium->remove(presentMark(Mode::exclusive, self));
            return;
        }
        writing[i].medium->removeAll();
        // Whoever is refused it is a reader by its `present` alone, until the next call makes the lease whole.
        (void)takeOwnerForReading(reading[i], patience);
    };
    auto giveBackAll = [&](std::size_t count) {
        for (std::size_t i = 0; i < count; i++)
            giveBack(i);
    };
    for (std::size_t i = 0; i < writing.size(); i++) {
        // Two descriptions of one file are strangers to the kernel. `present` keeps writers out meanwhile.
        if (!inPlace(i))
            reading[i].medium->remove(owner);
        if (writing[i].medium->tryPlace(owner, LockType::write) == LockOutcome::granted)
            continue;
        // A refused conversion leaves the lock for reading (fcntl(2), unlike flock(2)).
        View view = lookPastOneself(self, writing[i]);
        giveBackAll(inPlace(i) ? i : i + 1);
        return refuse(i, view.foreign ? Obstacle::foreignLock : Obstacle::guestPresent, view);
    }
    for (const Share& share : writing)
        place(share, presentMark(Mode::exclusive, self));
    for (std::size_t i = 0; i < writing.size(); i++) {
        View view = lookPastOneself(self, writing[i]);
        if (Answer refusal = refuseStrangers(i, view)) {
            giveBackAll(writing.size());
            return refusal;
        }
    }
    for (std::size_t i = 0; i < writing.size(); i++) {
        reading[i].medium->remove(presentMark(Mode::readOnly, self));
        writing[i].medium->setNote({.owner = true});
    }
    return std::nullopt;
}

} // namespace leasehold::lease

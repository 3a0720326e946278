// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What the lease protocol needs of a storage: named marks that vanish with the open file description that placed
// them. The protocol (protocol.hpp) is written once over this; each kind of storage implements it.
// Every call of tryPlace, remove and removeAll is one atomic step for everybody who looks. Failures throw.

#include "core/lease/mark.hpp"
#include "core/os/file_lock.hpp"

#include <vector>

namespace leasehold::lease {

// The marks of one's own open file description that decisions depend on.
struct OwnMarks {
    bool owner = false; // `owner`, held for writing
    bool sharedOwner = false;
    bool leaving = false;
    std::optional<std::uint32_t> handoff; // its token
};

struct HandoffNote {
    std::uint32_t token = 0; // 0: none is up for certain
    bool leaving = false;
};

class Medium {
public:
    virtual ~Medium() = default;

    // Places a mark. `type` matters for `owner` only: all other marks have one placer. Placing a mark that one has
    // already is granted; placing `owner` with the other type converts it in one step and never loses it.
    [[nodiscard]] virtual os::LockOutcome tryPlace(const Mark& mark, os::LockType type) = 0;
    virtual void remove(const Mark& mark) = 0;
    // All of one's own handoff and leaving marks, in one step.
    virtual void removeHandoff() = 0;
    // All of one's own marks, in one step.
    virtual void removeAll() = 0;

    // The marks of all others. Each is read at an instant of its own; a mark that stays up during the whole call is
    // always among them.
    virtual std::vector<Mark> look() const = 0;
    // Slow (a /proc file): for the rare case in which another incarnation is present.
    virtual OwnMarks inspectOwn() const = 0;

    // A note that lives as long as our open file description, 0 at first: which handoff we have up, so that a release
    // need not look for our own marks. Taken down before those marks change and put up after: it is never true of
    // marks that are not there.
    virtual HandoffNote note() const = 0;
    virtual void setNote(const HandoffNote& note) = 0;
};

} // namespace leasehold::lease

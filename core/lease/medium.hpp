// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What the lease protocol needs of a storage: named marks that vanish with the open file description that placed
// them. The protocol (protocol.hpp) is written once over this; each kind of storage implements it.
// Every call of tryPlace, remove and removeAll is one atomic step for everybody who looks. Failures throw.

#include "core/lease/mark.hpp"
#include "core/os/file_lock.hpp"

#include <optional>
#include <vector>

namespace leasehold::lease {

// What one's own open file description is known to have up: F_OFD_GETLK shows the marks of others only, and reading
// one's own from /proc/self/fdinfo costs more than all other steps of a call together.
struct Note {
    bool owner = false;      // the owner mark of this share's mode
    bool leaving = false;    // with the token
    std::uint32_t token = 0; // of the handoff; 0: none, or not for certain

    bool operator==(const Note&) const = default;
};

// What decides whether one of several incarnations of a domain may run: what the others have up.
struct Rivals {
    bool present = false; // somebody is there in this mode; if not, nothing else was asked
    bool handoff = false; // with any token
    bool quoted = false;  // with the one that the state quotes
    bool taken = false;   // a successor has used that one
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

    // Whether anybody else has a mark of these kinds up, from `first` to `last`, or a foreign lock among them: one
    // question, however many there are.
    virtual bool any(MarkKind first, MarkKind last) const = 0;

    // On network storage each question is a round trip, while the guest stands still: one where nobody is there, three
    // where it is handed over. Several instants, as in lookAt.
    virtual Rivals findRivals(std::uint32_t domain, Mode mode, std::optional<std::uint32_t> quoted) const = 0;

    // What decides between the incarnations of one domain in one mode: `owner`, whoever has it; their owner mark and
    // their presents; and where there are presents, handoffs and takens. Few, however many other guests there are.
    virtual std::vector<Mark> lookAt(std::uint32_t domain, Mode mode) const = 0;

    // Who is present: of this domain in this mode, and of all in exclusive mode, beside which there is hardly anybody.
    // And of those who are there, whether one would hand over: one handoff of the domain, or `owner` and its owner mark
    // if there is none. These are asked for after the presents; the other way round each of two that start at once
    // could see a free `owner` and then the other, join it, and neither would run (tests/model).
    virtual std::vector<Mark> lookToJoin(std::uint32_t domain, Mode mode) const = 0;

    // The marks of all others: for a refusal that names them, and where hardly anybody can be there. Here and in
    // lookAt each is read at an instant of its own; a mark that stays up during the whole call is always among them.
    virtual std::vector<Mark> look() const = 0;

    // Kept with our open file description, and gone with it. At first nothing is noted. Taken back before a mark goes
    // and put down after it is up, so that a note is never more than the truth, whoever dies in between.
    virtual Note note() const = 0;
    virtual void setNote(const Note& note) = 0;
};

} // namespace leasehold::lease

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The lease protocol: who may use a resource, decided by marks alone. Written once for every medium. Knows no paths,
// no processes, no libvirt; the engine calls it with the resources of one guest and turns its answers into words.
//
// DESIGN.md, "The lease protocol", explains the steps; tests/model checks them. Do not change their order without it:
// a crash may come between any two, and somebody else may look between any two.
//
//                      registerAll                    acquireAll
//      (nothing) ───────────────────▶ owned, present ───────────▶ owned, present ◀───────┐
//          │                                            running        │                 │ acquireAll
//          │ another incarnation                                       │ releaseAll      │ (own state)
//          │ shows a handoff                                           ▼                 │
//          └────────────▶ present ────────────┐             + handoff (suspended) ───────┘
//                          joined             │                        │
//                                             │ acquireAll             │ releaseAll after inquireAll, a joiner is there
//                                             │ (its state)            ▼
//                                             └───▶ owned     present, handoff, leaving; owner given up
//
// Every call works on all resources of a request, which the caller has brought into an order that is the same on
// every host: all owners first, then all presents, then all looks. Otherwise two guests that share two images could
// refuse each other.

#include "core/lease/medium.hpp"

#include <chrono>
#include <functional>
#include <span>

namespace leasehold::lease {

// One resource as one guest uses it.
struct Share {
    Medium* medium = nullptr;
    Mode mode = Mode::exclusive;
};

enum class Obstacle {
    guestPresent, // guests of other domains, or of this one in another mode, use the resource
    sameGuest,    // this domain runs elsewhere, and does not let us take over
    beingTaken,   // somebody is just taking it or dropping it, for longer than we wait
    foreignLock,  // a lock on the mark area that is not leasehold's
    stateTaken,   // a successor has already used the handoff of this very incarnation
};

// Why not, and for which share. The marks are those seen at the decision.
struct Refusal {
    std::size_t share = 0;
    Obstacle obstacle = Obstacle::guestPresent;
    std::vector<Mark> marks;
};

// Granted when empty.
using Answer = std::optional<Refusal>;

// Waits a little, at most the given time; false when there is nobody left to wait for (the QEMU has died).
using Pause = std::function<bool(std::chrono::milliseconds)>;

struct Patience {
    Pause pause;
    std::chrono::milliseconds limit{0};
    // For the marks of an incarnation that has just died, in acquireAll: whoever was looking at its leases (a command,
    // a libvirtd's helper) has them an instant longer.
    std::chrono::milliseconds lingering{0};
};

// Before QEMU opens the images: take the lease where nobody else is, join where another incarnation of this domain
// would hand over. A refusal leaves no mark. `joined`, one for each share, tells which are not owned yet.
//
// `waiting`: the guest does not run before the next acquireAll, and shows a handoff until then, as one that is
// suspended does: libvirt calls nothing when a guest migrates that never ran.
struct Registration {
    Answer refusal;
    std::vector<bool> joined;
};
enum class Entry { waiting, running };
Registration registerAll(const Incarnation& self, std::span<const Share> shares, const Patience& patience,
                         Entry entry = Entry::waiting);

// Before the guest runs. `quoted` is the token of the state that libvirt passed, if it is one of this domain.
// Idempotent. A refusal gives back what this call took, and keeps what was held before.
Answer acquireAll(const Incarnation& self, std::span<const Share> shares, std::optional<std::uint32_t> quoted,
                  const Patience& patience);

// The guest has stopped, or is about to. Gives the token of the handoff that is up now.
std::uint32_t releaseAll(const Incarnation& self, std::span<const Share> shares);

// A live migration begins. Gives the token that a successor has to quote.
std::uint32_t inquireAll(const Incarnation& self, std::span<const Share> shares);

// A resource that was added to a suspended guest: puts up the handoff that its others show.
void offer(const Incarnation& self, const Share& share, std::uint32_t token);

// From exclusive to read-only without a moment in which an exclusive guest could come in. Also what heals an upgrade or
// a downgrade that was interrupted: whatever marks of these are up, those of a reader are afterwards.
void downgrade(const Incarnation& self, const Share& share);

// From read-only to exclusive, all of them or none: granted when no other reader is there. A refusal leaves the
// read-only leases. `writing` are the same resources through descriptors that may place `owner` for writing; the same
// media as those of `reading` where these may.
Answer upgradeAll(const Incarnation& self, std::span<const Share> reading, std::span<const Share> writing,
                  const Patience& patience);

} // namespace leasehold::lease

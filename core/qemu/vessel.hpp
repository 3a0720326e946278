// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// The vessel: where a guest's leases live. A socketpair that QEMU inherits and never touches; in its queue travel the
// descriptors whose open file descriptions carry the locks (unix(7), SCM_RIGHTS). When QEMU dies the kernel drops the
// pair, what is in flight in it, and the locks: nobody has to notice a crash.
//
// The queue holds generations, each one or more messages with the complete set of leases. A change appends the new
// generation and then consumes what was before it, so that at no instant a lease is in nobody's hands. Whoever died in
// between has left more than one: the newest complete one counts.
//
// Any process can keep a socket with a vessel's words in it: only what root has made is one, or who runs as we do.
// Everything read from a vessel is hostile input: the guest's QEMU may be in the hands of an attacker. Sizes, counts
// and numbers are checked here; that a descriptor is the file the caller means (device and inode) is checked here too,
// against what the message claims, and by the caller against what it wants. Only where a call uses leases as they are,
// and asks for no file, is that left out (Taking::asTheyAre): QEMU decides what is in its vessel, and could as well
// have changed the words.
//
// Knows nothing of marks or locks.

#include "core/mode.hpp"
#include "core/os/error.hpp"
#include "core/os/fd.hpp"
#include "core/os/process.hpp"

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace leasehold::qemu {

// Whose vessel it is.
struct GuestTag {
    std::array<unsigned char, 16> uuid{};
    std::uint32_t incarnation = 0;
    std::string name;

    bool operator==(const GuestTag&) const = default;
};

// How far a change of a lease has come; what has to be looked at again before the lease is relied on.
enum class Stage : std::uint8_t {
    settled,  // marks, vessel and QEMU's descriptors agree
    planted,  // by Register: the guest has not run in this QEMU yet
    added,    // QEMU is about to open the image, or to open it for writing
    changing, // the marks may still say another mode than this
};

// A lease in one piece: what libvirt calls it, what carries its marks, and how far it has come.
struct StoredLease {
    os::FileId file;      // the image, or the lease file where there is no image
    os::FileId leaseFile; // what the marks are in: the image, a lease file, or the directory of a file set
    Mode mode = Mode::exclusive;
    Stage stage = Stage::settled;
    bool lower = false;               // QEMU has the file open below a top image: libvirt does not name it
    bool writable = false;            // `lease` is open for writing
    bool joined = false;              // another incarnation had the lease when this one registered
    bool remote = false;              // calls on its storage may hang
    bool guarded = false;             // the image's description also holds the guard (image_locks.hpp)
    bool flocksImage = false;         // and a flock while the lease is owned
    bool named = false;               // a <lease> element: there is no image
    std::string path;                 // as libvirt names it: with QEMU's descriptors, what a lease is known by
    std::vector<std::string> aliases; // further paths of the same guest that led to the file when it was started
    os::Fd lease;                     // carries the marks
    os::Fd image;                     // open where `lease` is not the image itself
    os::Fd directory;                 // open where the marks are files of a directory; `lease` is one of them
    // A lease that goes by a name has another one of this host by device and inode (place.hpp). Nothing else of it is
    // its own but what its marks are in.
    std::unique_ptr<StoredLease> companion;

    // Of something below a device that the guest uses (place.hpp, Below). It has no image, its path is words, and its
    // aliases are the files of those leases that it is there for, each behind a "+". A path never begins like that, so
    // versions that know no layers keep it for a lease whose end nobody tells.
    bool isLayer() const { return !aliases.empty() && aliases.front().starts_with('+'); }

    // Whether the marks are on the image itself.
    bool onImage() const { return leaseFile == file && !named; }
    // The image; nothing to look at where the lease is a named one.
    int imageFd() const { return image.open() ? image.get() : lease.get(); }
    bool isNamed(const std::string& name) const;
};

// The lease itself, then its companion.
template <typename Lease, typename Visit>
void visitParts(Lease& lease, Visit visit) {
    visit(lease);
    if (lease.companion)
        visit(*lease.companion);
}

// It has nothing open afterwards.
void closeLater(StoredLease& lease, os::ClosedTogether& closed);

// The two ends, in the process that will become QEMU. They stay open across exec once they are left to it.
class VesselEnds {
public:
    VesselEnds();

    // Puts the first set of leases in. Also from a process that was forked from this one: the leases' descriptors need
    // not exist here.
    void plant(const GuestTag& tag, std::span<const StoredLease> leases) const;
    void leaveToQemu();
    std::array<int, 2> numbers() const { return {in_.get(), out_.get()}; }

private:
    os::Fd in_, out_;
};

// What a vessel says, without the descriptors: for a guest whose storage may hang, where even closing a duplicate can
// (close(2) writes back on NFS). It has not been checked against the files.
struct Manifest {
    GuestTag tag;
    std::vector<StoredLease> leases;
};

// A lease is on storage that may hang (StoredLease::remote), and whoever wanted the leases must not wait for that. None
// of their descriptors was touched.
class RemoteLeases : public Error {
public:
    RemoteLeases() : Error(Fault::system, "a lease in its QEMU is on storage that may not answer") {}
};

// What becomes of the descriptors of a vessel whose words are known.
enum class Taking {
    none,      // RemoteLeases
    compared,  // each is the file that the words say it is
    asTheyAre, // until compareFiles() is called
};

class Vessel {
public:
    // By the words of all leases and companions.
    using Choice = std::function<Taking(const std::vector<const StoredLease*>&)>;

    // A full vessel is read in a quarter of this.
    static constexpr std::chrono::milliseconds kReadLimit{2000};

    // Finds the vessel of this guest in the process: null when it has none. Throws Error(Fault::invalid) on a
    // vessel that is not what VesselEnds and tryReplace make; RemoteLeases where `choose` says so. Without one all
    // descriptors are taken, and compared. The process must outlive the vessel. `limit` is for who reads it or keeps it
    // locked at the same time, QEMU itself for instance: then it throws too.
    static std::unique_ptr<Vessel> retrieve(const os::Process& process, const std::array<unsigned char, 16>& uuid,
                                            const Choice& choose = {}, std::chrono::milliseconds limit = kReadLimit);

    // The same without touching a single lease.
    static std::optional<Manifest> readManifest(const os::Process& process, const std::array<unsigned char, 16>& uuid,
                                                std::chrono::milliseconds limit = kReadLimit);

    const GuestTag& tag() const { return tag_; }
    std::vector<StoredLease>& leases() { return leases_; }
    const std::vector<StoredLease>& leases() const { return leases_; }

    // Who changed it last: a number of the libvirtd that did, 0 for Register.
    std::uint64_t caller() const { return caller_; }

    // Throws Error(Fault::invalid) where a descriptor is not what the words say. Done already, unless `choose` chose.
    void compareFiles();

    // What is closed with the leases.
    os::Fd takeEnd() { return std::move(out_); }

    // More than one generation is in the queue: an earlier change was interrupted. tryReplace() cures it.
    bool disordered() const { return disordered_; }

    // Makes this the set of leases: those of leases(), as they are now. On failure the old set stands. False when
    // somebody else has changed the vessel since it was read: nothing was done, and what we know of it is old. Once the
    // new set counts, nothing is thrown: what could not be taken out is left to the next change.
    [[nodiscard]] bool tryReplace(std::uint64_t caller = 0);

private:
    enum class Contents { words, everything };
    using Clock = std::chrono::steady_clock;

    Vessel(const os::Process& process, std::chrono::milliseconds limit)
        : process_(&process), deadline_(Clock::now() + limit) {}
    bool tryRead(const std::array<unsigned char, 16>& uuid, Contents contents, const Choice& choose);
    bool tryReadAtOnce(const std::array<unsigned char, 16>& uuid, Contents contents, const Choice& choose);
    void readAll(Contents contents);
    bool tryWalk(Contents contents);
    bool tryTakeOut(std::size_t count);

    const os::Process* process_;
    Clock::time_point deadline_; // for reading
    GuestTag tag_;
    os::Fd out_;                            // the end whose queue holds the generations
    std::array<std::int32_t, 2> numbers_{}; // of the two ends in QEMU: sending, receiving
    std::array<std::uint64_t, 2> socketInodes_{};
    std::uint64_t generation_ = 0;
    std::uint64_t caller_ = 0;
    std::uint64_t firstGeneration_ = 0; // of the first message in the queue
    int queuedBytes_ = 0;
    std::size_t queued_ = 0; // messages in the queue
    std::size_t stale_ = 0;  // of these, those before the newest complete generation
    bool disordered_ = false;
    bool compared_ = true; // compareFiles
    std::vector<StoredLease> leases_;
};

// Who keeps leases on this host: a guest's QEMU, or a command of `leasehold run`.
struct RunningGuest {
    GuestTag tag;
    pid_t pid = 0;              // who was given the vessel; when that one has ended, another one who has it
    std::vector<pid_t> holders; // all who have it: what a command starts inherits it
};

// All vessels of this host, each of them once, whoever has it and under whichever numbers. A process that is gone,
// forbidden or hostile has none. Nobody but who has a trusted user's sockets can make us wait, and nobody for longer
// than the limit: then `complete` is false, as where processes are hidden from us.
struct HostGuests {
    std::vector<RunningGuest> guests;
    std::size_t hidden = 0; // processes that may not be looked at
    bool complete = true;   // false: there was no time to look at all of them

    // Whose leases the process keeps; null if it keeps none.
    const RunningGuest* of(pid_t pid) const;
};
HostGuests findGuests(std::chrono::milliseconds limit);

// What a guest does below its own disks and images, for messages: nothing where its vessel cannot be read.
struct BelowUse {
    std::string layer;  // in the words of its own lease, what of it stands on the device or file with that lease file
    bool reads = false; // it keeps a lease of the file because it reads it below an image of its own
};
BelowUse findBelowUse(const RunningGuest& guest, const os::FileId& file, const os::FileId& leaseFile);

} // namespace leasehold::qemu

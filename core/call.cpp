// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/call.hpp"

#include "core/explain.hpp"
#include "core/lease/state.hpp"
#include "core/loss.hpp"
#include "core/os/error.hpp"
#include "core/os/text.hpp"
#include "core/qemu/image_locks.hpp"

#include <algorithm>
#include <ctime>
#include <iterator>
#include <thread>

#include <sys/stat.h>

namespace leasehold {

namespace {

using lease::Incarnation;
using lease::Share;
using os::FileId;
using os::OpenFiles;
using qemu::Stage;
using qemu::StoredLease;
using std::chrono::milliseconds;

// How long a newcomer waits for somebody who is between two steps: microseconds, unless that somebody is stopped.
constexpr milliseconds kEntryWait{500};

// How long a call begins anew because its guest's vessel was changed by somebody else; the wait for a handoff apart.
constexpr milliseconds kInsistence{5000};

[[noreturn]] void unusable(const std::string& path, const std::string& problem) {
    throw Error(Fault::unsupported, "cannot lease '" + path + "': " + problem);
}

[[noreturn]] void refuseTwice(const std::string& one, const std::string& other) {
    unusable(one, "the guest has it twice" + (one == other ? "" : ", the second time as '" + other + "'") +
                      "; detach one of them, or mark both disks <shareable/> or <readonly/> if they have one path");
}

void setMode(StoredLease& lease, Mode mode) {
    visitParts(lease, [&](StoredLease& part) { part.mode = mode; });
}

// QEMU keeps no directory open that it makes a disk of (VVFAT).
bool isDirectory(const StoredLease& lease) {
    mode_t type = 0;
    os::identify(lease.imageFd(), lease.path, &type);
    return S_ISDIR(type);
}

template <typename Leases>
std::vector<const StoredLease*> pointersTo(const Leases& leases) {
    return {leases.begin(), leases.end()};
}

// What the guest writes to: readers are compatible and have nothing to hand over.
std::vector<const StoredLease*> writtenOf(const std::vector<StoredLease>& leases) {
    std::vector<const StoredLease*> written;
    for (const StoredLease& lease : leases)
        if (lease.mode != Mode::readOnly)
            written.push_back(&lease);
    return written;
}

// The token of the handoff that the guest has up on the leases it holds: it is suspended, or has not run yet.
std::optional<std::uint32_t> handoffOf(const Incarnation& self, const std::vector<const StoredLease*>& leases) {
    for (const StoredLease* lease : leases) {
        lease::Note note = AnyMedium(*lease, self)->note();
        if (note.owner && note.token != 0)
            return note.token;
    }
    return std::nullopt;
}

const std::string kGranted; // no refusal to tell

} // namespace

// Looks for things one after the other. They nearly always come in the order in which they are stored, so each look
// goes on where the one before has found what it wanted.
class Call::Cursor {
public:
    template <typename Things, typename Test>
    bool find(const Things& things, Test test) {
        for (std::size_t i = 0; i < things.size(); i++)
            if (test(things[(next_ + i) % things.size()])) {
                next_ += i + 1;
                return true;
            }
        return false;
    }

private:
    std::size_t next_ = 0;
};

// Which of the guest's leases libvirt speaks of.
class Call::Mentions {
public:
    Mentions(const std::vector<Resource>& resources, Naming naming) : resources_(resources), naming_(naming) {}

    Naming naming() const { return naming_; }
    // All disks of the guest are named.
    bool everything() const { return naming_ == Naming::all && !resources_.empty(); }

    // By its path. Two <lease> elements may look alike to people, so those go by their files.
    bool means(const StoredLease& lease) const {
        return !lease.named && cursor_.find(resources_, [&](const Resource& resource) {
            return !resource.named && lease.isNamed(resource.path);
        });
    }

    // What is let go under another path than it came by goes by its file.
    void findReleased(Holdings& holdings, const Settings& settings) {
        if (naming_ != Naming::released)
            return;
        for (const Resource& resource : resources_)
            if (resource.named || !holdings.findNamed(resource.path)) {
                auto file = identifyResource(resource, settings);
                if (!file && resource.named)
                    lost_.push_back(nameOf(resource));
                released_.push_back(file);
            }
    }

    bool releases(const StoredLease& lease) const {
        if (naming_ != Naming::released)
            return false;
        bool lost = lease.named && std::find(lost_.begin(), lost_.end(), lease.path) != lost_.end();
        return lost || means(lease) || std::find(released_.begin(), released_.end(), lease.file) != released_.end();
    }

private:
    const std::vector<Resource>& resources_;
    const Naming naming_;
    mutable Cursor cursor_;
    std::vector<std::optional<FileId>> released_;
    std::vector<std::string> lost_; // of <lease> elements whose file is gone
};

Call::Call(const Surroundings& surroundings, const Guest& guest, const std::vector<Resource>& resources,
           std::optional<os::Process> process)
    : surroundings_(surroundings), settings_(surroundings.settings), guest_(guest), resources_(resources),
      deadline_(std::chrono::steady_clock::now() + kInsistence + settings_.handoffWait), process_(std::move(process)) {}

// What came together has neighbouring numbers, and is closed together.
Call::~Call() {
    os::ClosedTogether closed; // in the order in which they were opened
    if (process_)
        closed.add(process_->takePidfd());
    if (holdings_)
        holdings_->closeLater(closed);
    for (StoredLease& lease : dropped_)
        qemu::closeLater(lease, closed);
}

void Call::about(const std::string& path) {
    if (report_)
        report_[path.copy(report_, reportSize_ - 1)] = '\0';
}

bool Call::pause(milliseconds time) const {
    if (process_)
        return !process_->diedWithin(time);
    std::this_thread::sleep_for(time);
    return true;
}

// What is fresh is the guest's when the vessel is stored.
void Call::keepFresh() {
    for (Place& place : fresh_)
        holdings_->leases().push_back(std::move(place.stored));
    fresh_.clear();
}

void Call::restart() {
    holdings_.reset();
    fresh_.clear();
    dropped_.clear();
    replaced_.clear();
    looked_ = changed_ = false;
    kept_.clear();
}

// By the words of the vessel. What may hang is left to a process that can be given up: leases on storage of others, and
// where this host has such mounts, paths that the vessel does not know and files that are not leased yet.
//
// A suspend or a resume where all is as it was takes the descriptors as they are: it puts marks up and down through
// them and reads none of them. Whichever files they are, QEMU could do to them what we do, and could have let the words
// say that they are these. Whoever goes on to decide something by a file calls compareFiles() before.
qemu::Taking Call::choose(const std::vector<const StoredLease*>& leases) const {
    auto any = [&](auto test) { return std::any_of(leases.begin(), leases.end(), test); };
    if (any([](const StoredLease* lease) { return lease->remote; }))
        return qemu::Taking::none;
    Cursor cursor;
    auto isKnown = [&](const Resource& resource) {
        const std::string built = resource.named ? nameOf(resource) : std::string();
        const std::string& name = resource.named ? built : resource.path;
        return cursor.find(leases, [&](const StoredLease* lease) { return lease->isNamed(name); });
    };
    bool plain = !any([](const StoredLease* lease) { return lease->stage != Stage::settled || lease->joined; }) &&
                 std::all_of(resources_.begin(), resources_.end(), isKnown);
    if (plain)
        return qemu::Taking::asTheyAre;
    return surroundings_.mounts.hasRemote() ? qemu::Taking::none : qemu::Taking::compared;
}

bool Call::tryOpen() {
    restart();
    qemu::Vessel::Choice choice;
    if (!mayWait())
        choice = [this](const std::vector<const StoredLease*>& leases) { return choose(leases); };
    holdings_ = Holdings::open(*process_, guest_.uuid, surroundings_.caller, choice, deadline_);
    if (holdings_)
        self_ = holdings_->self();
    return holdings_ != nullptr;
}

void Call::recordOwner(const StoredLease& whole, const StoredLease& part) const {
    if (whole.mode == Mode::readOnly && !(whole.isLayer() && whole.named))
        return; // read-only media are not written to, not even beside their data
    writeOwner(part, {.domain = guest_.name,
                      .uuid = guest_.uuid,
                      .incarnation = self_.id,
                      .host = os::hostName(),
                      .bootId = surroundings_.bootId,
                      .pid = guest_.pid,
                      .mode = whole.mode,
                      .since = time(nullptr),
                      .as = whole.isLayer() ? whole.path : ""});
}

void Call::checkStillHeld(const StoredLease& part) {
    about(part.path);
    if (auto loss = findLoss(part, self_))
        throw Error(Fault::invalid, "the lease on '" + part.path + "' " + *loss +
                                        ": another guest may have written to it; destroy this guest and start it "
                                        "again");
}

// A program outside leasehold that has the image: in words, or nothing. The guest's own QEMU may have it: the base of a
// block commit, a lower file.
std::optional<std::string> Call::findOutsider(const StoredLease& stored, bool hidesQemu, Mode mode) const {
    if (stored.named)
        return std::nullopt;
    pid_t own = process_ ? process_->pid() : 0;
    auto conflict = qemu::findImageConflict(stored.imageFd(), mode, hidesQemu, stored.path);
    if (!conflict)
        return std::nullopt;
    os::LockHolders holders =
        os::findLockHolders(stored.file, conflict->byte, conflict->byte, surroundings_.neighbours.deadline());
    // Who could not be looked at may be one more.
    if (holders.complete && holders.pids == std::vector{own})
        return std::nullopt;
    return explainOutsider(stored, conflict->words, holders, own, surroundings_.neighbours);
}

// In a lockspace the lease of a file goes by its path. Where the guest has it already, of the file that had the name
// before, it is the lease of the new one as well: it says that the name is this guest's, and goes when neither file is
// open. Apart from it each of them has a companion, by its number.
Place Call::openNew(const Resource& resource) const {
    auto goesByName = [](const StoredLease& lease) {
        return !lease.onImage() && !lease.named && !lease.isLayer() && lease.image.open();
    };
    if (!holdings_ || resource.named ||
        std::none_of(holdings_->leases().begin(), holdings_->leases().end(), goesByName))
        return openPlace(resource, self_, settings_);
    // Before it is opened: a file set would meet the guest's own mark.
    const Place found = findPlace(resource, settings_);
    for (const StoredLease& lease : holdings_->leases()) {
        if (!goesByName(lease) || lease.leaseFile != found.stored.leaseFile || lease.file == found.stored.file)
            continue;
        if (lease.mode != resource.mode)
            unusable(resource.path, std::string("the guest has another file that had this name, ") +
                                        describeMode(lease.mode) + ", and in a lockspace their lease is the same: " +
                                        "detach that one first, or attach this one under another name");
        return openBeside(lease, resource, self_, settings_);
    }
    return openPlace(resource, self_, settings_);
}

// One lease for each resource, however many names lead to it.
void Call::openAll(const std::vector<Resource>& resources) {
    std::vector<std::optional<FileId>> files;
    std::vector<std::size_t> places;
    for (const Resource& resource : resources) {
        about(resource.path);
        // Before it is opened a second time: what is there by then would be in our own way.
        auto file = resources.size() > 1 ? identifyResource(resource, settings_) : std::nullopt;
        auto twin = file ? std::find(files.begin(), files.end(), file) : files.end();
        if (twin == files.end()) {
            places.push_back(fresh_.size());
            fresh_.push_back(openNew(resource));
            openLayers(resource, fresh_);
        } else {
            auto at = static_cast<std::size_t>(twin - files.begin());
            const Resource& other = resources[at];
            if (resource.mode != other.mode || resource.mode == Mode::exclusive)
                refuseTwice(other.path, resource.path);
            places.push_back(places[at]);
            if (StoredLease& stored = fresh_[places[at]].stored; !stored.isNamed(nameOf(resource)))
                stored.aliases.push_back(nameOf(resource));
        }
        files.push_back(file);
    }
    checkNotThere();
}

// What lies below the last of the places. One layer may be below several of the guest's disks.
void Call::openLayers(const Resource& resource, std::vector<Place>& places) {
    const FileId user = places.back().stored.file;
    std::vector<Below> all = findBelow(resource, places.back(), settings_);
    for (const Below& below : all) {
        auto file = identifyBelow(below);
        StoredLease* known = nullptr;
        auto compare = [&](StoredLease& lease) { known = file && lease.leaseFile == *file ? &lease : known; };
        for (Place& place : fresh_)
            compare(place.stored);
        for (Place& place : places)
            compare(place.stored);
        if (holdings_)
            for (StoredLease& lease : holdings_->leases())
                compare(lease);
        if (!known) {
            places.push_back(openBelow(below, user, self_, settings_));
            continue;
        }
        if (!known->isLayer() || known->mode != below.mode || below.mode == Mode::exclusive)
            refuseTwice(known->path, below.words);
        known->aliases.push_back(layerUser(user));
        changed_ = true;
    }
}

// Layers that are below none of the guest's disks any more, when these go.
Call::Leases Call::orphansOf(const Leases& closed) {
    Leases orphans;
    for (StoredLease& layer : holdings_->leases()) {
        if (!layer.isLayer())
            continue;
        std::vector<std::string> left = layer.aliases;
        for (const StoredLease* lease : closed)
            std::erase(left, layerUser(lease->file));
        if (left.empty())
            orphans.push_back(&layer);
        else
            layer.aliases = std::move(left);
    }
    return orphans;
}

// What comes to a lease file that the guest has already would be in its own way.
void Call::checkNotThere() const {
    using Taken = std::pair<FileId, const std::string*>;
    std::vector<Taken> files;
    auto collect = [&](const StoredLease& part) { files.emplace_back(part.leaseFile, &part.path); };
    auto before = [](const Taken& one, const Taken& other) {
        return std::pair(one.first.inode, one.first.device) < std::pair(other.first.inode, other.first.device);
    };
    auto same = [](const Taken& one, const Taken& other) { return one.first == other.first; };
    if (holdings_)
        for (const StoredLease& lease : holdings_->leases())
            visitParts(lease, collect);
    std::sort(files.begin(), files.end(), before);
    files.erase(std::unique(files.begin(), files.end(), same), files.end()); // of two files of one name
    for (const Place& place : fresh_)
        visitParts(place.stored, [&](const StoredLease& part) {
            if (!place.shared || &part != &place.stored)
                collect(part);
        });
    std::stable_sort(files.begin(), files.end(), before);
    if (auto twice = std::adjacent_find(files.begin(), files.end(), same); twice != files.end())
        refuseTwice(*twice[0].second, *twice[1].second);
}

// What is not to be entered, or given back, for a lease that shares it.
std::vector<FileId> Call::heldFiles() const {
    return holdings_ ? holdings_->leaseFiles() : std::vector<FileId>();
}

// Whose guest is between two steps, or whose QEMU has just died, is waited for.
lease::Registration Call::registerPatiently(const Shares& shares, lease::Entry entry) const {
    lease::Patience patience{[this](milliseconds time) { return pause(time); }, kEntryWait};
    auto deadline = std::chrono::steady_clock::now() + kEntryWait;
    lease::Registration registration = lease::registerAll(self_, shares.all(), patience, entry);
    while (registration.refusal &&
           areLingering(shares.partOf(registration.refusal->share), *registration.refusal, surroundings_.bootId) &&
           std::chrono::steady_clock::now() < deadline && pause(milliseconds(5)))
        registration = lease::registerAll(self_, shares.all(), patience, entry);
    return registration;
}

// Whether anybody has the image whom no mark shows: a refusal, or where the settings say so a line in the log.
std::optional<std::string> Call::refuseOutsider(const StoredLease& stored, bool hidesQemu, Mode mode) const {
    if (settings_.outsiders == Settings::Outsiders::ignore)
        return std::nullopt;
    auto outsider = findOutsider(stored, hidesQemu, mode);
    if (outsider && settings_.outsiders == Settings::Outsiders::refuse)
        return outsider;
    if (outsider)
        surroundings_.warn(*outsider);
    return std::nullopt;
}

// A lease whose marks are up: does it still count, and is anybody else there?
Call::Attempt Call::confirm(Place& place) const {
    if (!place.caution.empty())
        surroundings_.warn(place.caution);
    StoredLease& stored = place.stored;
    bool listed = true;
    visitParts(stored, [&](const StoredLease& part) { listed = listed && isListed(part, self_); });
    if (!listed)
        return std::nullopt; // a lease file was swept between opening and locking it
    if (auto refusal = findWholeUse(place, settings_))
        return refusal;
    stored.guarded = place.guardable && stored.joined && !stored.named;
    if (stored.guarded)
        qemu::putUpGuard(stored.imageFd(), stored.path);
    // The source of a migration holds QEMU's locks rightfully until the guest runs here. If it is no migration QEMU
    // dies of them, and libvirt shows what the guest's log says since.
    if (!stored.joined && place.tellsOutsiders)
        if (auto outsider = refuseOutsider(stored, place.hidesQemu, stored.mode))
            return outsider;
    visitParts(stored, [&](const StoredLease& part) { part.joined ? void() : recordOwner(stored, part); });
    return kGranted;
}

// Lets the guest in on freshly opened leases.
Call::Attempt Call::admit(std::span<Place> places, lease::Entry entry) {
    std::vector<const StoredLease*> leases;
    for (const Place& place : places)
        leases.push_back(&place.stored);
    Shares shares(self_, leases, heldFiles());
    lease::Registration registration = registerPatiently(shares, entry);
    if (registration.refusal) {
        const StoredLease& refused = shares.partOf(registration.refusal->share);
        return explainRefusal(guest_, refused, refused.mode, *registration.refusal, surroundings_.neighbours);
    }
    const StoredLease* joined = nullptr;
    std::size_t joins = 0;
    for (Place& place : places) {
        visitParts(place.stored, [&](StoredLease& part) {
            auto share = shares.findIndex(part);
            part.joined = share && registration.joined[*share];
        });
        if (Attempt refusal = confirm(place); refusal != kGranted)
            return refusal;
        if (place.stored.joined) {
            joined = &place.stored;
            joins++;
        }
    }
    if (joined)
        surroundings_.warn(explainJoin(guest_, *joined, joins));
    return kGranted;
}

std::string Call::enter(const qemu::VesselEnds& ends, lease::Entry entry) {
    std::string refusal = insist(deadline_, [&] {
        restart();
        self_ = {lease::hashDomain(guest_.uuid), lease::drawId()};
        openAll(resources_);
        return admit(fresh_, entry);
    });
    if (!refusal.empty())
        return refusal;
    for (Place& place : fresh_) {
        place.stored.stage =
            entry == lease::Entry::waiting && !place.stored.isLayer() ? Stage::planted : Stage::settled;
        dropped_.push_back(std::move(place.stored));
    }
    ends.plant({guest_.uuid, self_.id, guest_.name}, dropped_);
    return kGranted;
}

bool Call::isFirstRun() {
    return std::any_of(holdings_->leases().begin(), holdings_->leases().end(),
                       [](const StoredLease& lease) { return lease.stage == Stage::planted; });
}

void Call::leavePlanted() {
    for (StoredLease& lease : holdings_->leases())
        if (lease.stage == Stage::planted) {
            lease.stage = looked_ ? Stage::settled : Stage::added; // the next call looks
            changed_ = true;
        }
}

// Where somebody died between vessel and marks: the marks follow the vessel.
bool Call::heal() {
    bool healed = false;
    for (StoredLease& lease : holdings_->leases()) {
        if (lease.stage != Stage::changing)
            continue;
        about(lease.path);
        if (lease.mode == Mode::readOnly) {
            Shares shares(self_, {&lease});
            for (const Share& share : shares.all())
                lease::downgrade(self_, share);
        }
        lease.stage = Stage::settled;
        healed = true;
    }
    return healed;
}

// What the guest's QEMU has closed, or nobody but QEMU itself keeps: its marks go with its descriptors. At once where
// that asks no server: a process that another thread has just forked may have copies.
void Call::giveBack(std::size_t number) {
    // Of two of one name the last one gives back what is of both.
    std::vector<FileId> held = heldFiles();
    for (std::size_t later = number + 1; later < dropped_.size(); later++)
        held.push_back(dropped_[later].leaseFile);
    Shares shares(self_, {&dropped_[number]}, held);
    for (std::size_t i = 0; i < shares.all().size(); i++) {
        shares.all()[i].medium->removeAll();
        sweepLease(shares.partOf(i));
    }
}

// From writing to reading. False: somebody else changes the vessel.
bool Call::lower(const Leases& leases) {
    for (StoredLease* lease : leases) {
        setMode(*lease, Mode::readOnly);
        lease->lower = true;
        lease->stage = Stage::changing;
    }
    // The vessel must never claim more than the marks hold: it says read-only first.
    if (!holdings_->tryStore())
        return false;
    for (StoredLease* lease : leases) {
        about(lease->path);
        Shares shares(self_, {lease});
        for (const Share& share : shares.all())
            lease::downgrade(self_, share);
        lease->stage = Stage::settled;
    }
    changed_ = true;
    return true;
}

// Whether a look at QEMU can show anything: it costs more than the rest of the call.
bool Call::mayDisagree(const Mentions& mentions) const {
    if (mentions.naming() != Naming::all || holdings_->inherited())
        return true;
    auto isUnsettled = [&](const StoredLease& lease) {
        if (lease.stage != Stage::settled)
            return true;
        if (lease.isLayer())
            return false;
        // What is written to below an image is so while a block job lasts, and of the end of one libvirt says nothing.
        bool committing = lease.lower && lease.mode == Mode::exclusive;
        return committing || (mentions.everything() && !lease.lower && !lease.named && !mentions.means(lease));
    };
    return std::any_of(holdings_->leases().begin(), holdings_->leases().end(), isUnsettled);
}

void Call::lookAtQemu() {
    Holdings& h = *holdings_;
    h.compareFiles();
    const OpenFiles& opened = h.opened();
    if (!mayWait() && anyOnUnseenMount(opened))
        throw qemu::RemoteLeases();
    looked_ = opened.complete();
    changed_ = heal() || (h.inherited() && looked_ && !isFirstRun());
    if (!looked_) {
        h.leaveInherited();
        surroundings_.warn("guest '" + guest_.name + "': what its QEMU (pid " + std::to_string(guest_.pid) +
                           ") has open cannot be told (" + opened.gap() + "): its leases stay as they are");
    }
}

// Of two of one name, the one that QEMU has open is what libvirt means.
bool Call::isOtherOfItsName(const StoredLease& lease) {
    return std::any_of(holdings_->leases().begin(), holdings_->leases().end(), [&](const StoredLease& twin) {
        return &twin != &lease && !twin.lower && !twin.named && twin.isNamed(lease.path) &&
               holdings_->opened().useOf(twin.file) != OpenFiles::Use::none;
    });
}

// Of a file that QEMU does not have open. `pending`: it may be about to open it.
Call::Fate Call::fateOfClosed(const StoredLease& lease, const Mentions& mentions, bool pending) {
    const bool let = mentions.releases(lease);
    if (!looked_ && let)
        kept_ = lease.path;
    if (!looked_ || (!let && isDirectory(lease)))
        return Fate::stays;
    if (let)
        return Fate::goes;
    bool wanted = !lease.lower && mentions.everything() && mentions.means(lease) && !isOtherOfItsName(lease);
    return pending || wanted ? Fate::stays : Fate::goes;
}

// Of a file that QEMU has open.
Call::Fate Call::fateOfOpen(StoredLease& lease, const Mentions& mentions, bool pending) {
    const bool let = mentions.releases(lease), disk = mentions.everything() && mentions.means(lease);
    const bool reads = holdings_->opened().useOf(lease.file) == OpenFiles::Use::reads;
    if (lease.lower && lease.mode == Mode::exclusive && disk) {
        // The base of an active commit, which the guest now has for its own.
        lease.lower = false;
        changed_ = true;
    }
    if (reads && lease.mode == Mode::exclusive && looked_) {
        // A top image that is open for reading only may still be written to: with auto-read-only QEMU opens it for
        // writing when the guest runs. So libvirt has to say that it is none any more.
        bool base = !pending && (lease.lower || (mentions.everything() && !disk));
        if ((let || base) && !holdings_->isShared(lease))
            return Fate::falls;
    }
    const bool beginsCommit = pending && lease.lower && lease.mode == Mode::exclusive && reads;
    if (lease.stage == Stage::added && !beginsCommit) {
        lease.stage = Stage::settled;
        changed_ = true;
    } else if (let && lease.stage == Stage::settled && !lease.lower && reads && lease.mode == Mode::shared) {
        surroundings_.warn("guest '" + guest_.name + "': its lease of '" + lease.path +
                           "' stays as it is: its QEMU still has it open");
    }
    return Fate::stays;
}

// What is to become of a lease, by what QEMU has open and by what libvirt says. `over`: no plug and no commit is going
// on any more.
Call::Fate Call::fateOf(StoredLease& lease, const Mentions& mentions, bool over) {
    if (lease.isLayer())
        return Fate::stays; // as long as those that it is below
    if (lease.named)
        return mentions.releases(lease) ? Fate::goes : Fate::stays; // QEMU does not open it
    // A plug that this very libvirtd is about, and Register's leases of a QEMU that never ran.
    const bool pending = lease.stage == Stage::planted || (lease.stage == Stage::added && !over);
    return holdings_->opened().useOf(lease.file) == OpenFiles::Use::none ? fateOfClosed(lease, mentions, pending)
                                                                         : fateOfOpen(lease, mentions, pending);
}

// A QEMU that opens a file anew has it open all the time, but a look is not one instant.
void Call::lookAgain(Leases& closed) {
    if (std::all_of(closed.begin(), closed.end(), [](const StoredLease* lease) { return lease->named; }))
        return;
    const OpenFiles& again = holdings_->lookAgain();
    std::erase_if(closed, [&](const StoredLease* lease) {
        return !lease->named && (!again.complete() || again.useOf(lease->file) != OpenFiles::Use::none);
    });
}

// With what lies below them.
void Call::drop(Leases closed) {
    if (closed.empty())
        return;
    for (StoredLease* orphan : orphansOf(closed))
        closed.push_back(orphan);
    for (StoredLease* lease : closed)
        dropped_.push_back(std::move(*lease));
    std::erase_if(holdings_->leases(), [](const StoredLease& lease) { return !lease.lease.open(); });
    changed_ = true;
}

// Makes the three agree: the marks, the vessel, and what QEMU has open. `runs`: the guest is about to. False: somebody
// else changes the vessel.
bool Call::agree(Naming naming, bool runs) {
    Holdings& h = *holdings_;
    Mentions mentions(resources_, naming);
    if (!mayDisagree(mentions))
        return true;
    lookAtQemu();
    mentions.findReleased(h, settings_);
    // A plug or a commit is one job of libvirt's, and so is letting the guest run: the former is over, done or not. A
    // stop may come in the middle of one, by itself.
    const bool over = h.inherited() || runs;
    Leases falling, closed;
    for (StoredLease& lease : h.leases())
        switch (fateOf(lease, mentions, over)) {
        case Fate::stays:
            break;
        case Fate::falls:
            falling.push_back(&lease);
            break;
        case Fate::goes:
            closed.push_back(&lease);
            break;
        }
    lookAgain(closed);
    if (!falling.empty() && !lower(falling))
        return false;
    drop(std::move(closed));
    if (!changed_)
        return true;
    if (!h.tryStore())
        return false;
    changed_ = false;
    for (std::size_t i = 0; i < dropped_.size(); i++)
        // Nobody waits for a server because of what is gone: closing gives the lock back too, after the answer.
        if (naming == Naming::released || !dropped_[i].remote || mentions.means(dropped_[i]))
            giveBack(i);
    return true;
}

// The lease that the guest has of a resource, if it has one.
StoredLease* Call::findHeld(const Resource& resource, Naming naming, Plan& plan) {
    Holdings& h = *holdings_;
    StoredLease* lease = resource.named ? nullptr : h.findNamed(resource.path);
    if (lease && (lease->lower || naming != Naming::one))
        return lease;
    about(resource.path);
    if (lease) {
        // The guest has it. Is it about to open another file of the same name?
        const bool only = h.countTops() == 1; // then one is all
        auto file = only ? tryIdentifyResource(resource, settings_) : identifyResource(resource, settings_);
        if (file == lease->file)
            return lease;
        if (!only)
            return file ? h.findFile(*file) : nullptr; // of two of one name
        if (file)
            plan.doubtful = resource;
        return lease;
    }
    h.compareFiles();
    if (auto file = identifyResource(resource, settings_))
        lease = h.findFile(*file);
    if (!lease && resource.named) // one whose file was deleted by hand is still this guest's
        for (StoredLease& known : h.leases())
            if (known.named && known.path == nameOf(resource))
                lease = &known;
    return lease;
}

// What is to be done with a lease that the guest has.
void Call::planHeld(const Resource& resource, StoredLease& lease, Naming naming, Plan& plan) {
    Holdings& h = *holdings_;
    if (resource.mode == Mode::exclusive && lease.mode == Mode::readOnly && lease.lower) {
        plan.rising.push_back(&lease);
        plan.written.push_back(resource);
    } else if (resource.mode == Mode::readOnly && lease.mode == Mode::exclusive) {
        // The end of a block commit; or a second disk that QEMU will refuse.
        const bool reads = looked_ && h.opened().useOf(lease.file) != OpenFiles::Use::writes;
        (naming == Naming::one && reads && !h.isShared(lease) ? plan.falling : plan.known).push_back(&lease);
    } else if (resource.mode != lease.mode) {
        unusable(resource.path, std::string("the guest has it already, ") + describeMode(lease.mode) +
                                    ", and cannot have it " + describeMode(resource.mode) +
                                    " as well: detach the other disk first");
    } else {
        plan.known.push_back(&lease);
        // Named alone it may be the base of a commit that was refused, which libvirt makes read-only again.
        if (naming == Naming::all && lease.lower && resource.mode == Mode::readOnly) {
            lease.lower = false; // a disk of its own as well
            lease.path = resource.path;
            changed_ = true;
        }
    }
}

// Which lease belongs to which disk. A path is looked up for what is new, and where it is the only thing that can tell
// whether something is.
Call::Plan Call::plan(Naming naming) {
    Plan plan;
    plan.known.reserve(resources_.size());
    for (const Resource& resource : resources_) {
        StoredLease* lease = findHeld(resource, naming, plan);
        if (naming == Naming::one)
            plan.runs = lease && !lease->lower && holdings_->countTops() == 1;
        if (lease)
            planHeld(resource, *lease, naming, plan);
        else
            plan.added.push_back(resource);
    }
    auto tidy = [](Leases& leases) {
        std::sort(leases.begin(), leases.end());
        leases.erase(std::unique(leases.begin(), leases.end()), leases.end());
    };
    tidy(plan.known);
    tidy(plan.falling);
    return plan;
}

// The path of the guest's only image leads to another file now. If the guest is about to run, that does not concern it.
// If it is about to open that file as well, nothing of it must be written to without a lease. Either way holds here:
// the lease is taken if it can be had (and given back when QEMU does not open the file), and where somebody else has it
// QEMU's own image locks have to be in the way of a second writer.
Call::Attempt Call::admitDoubtful(const Resource& resource) {
    std::string refusal;
    std::vector<Place> places(1);
    try {
        // Before it is opened: a file set would meet the guest's own mark.
        FileId file = findPlace(resource, settings_).stored.file;
        if (holdings_->findFile(file))
            return kGranted; // under another name
        places[0] = openNew(resource);
        openLayers(resource, places);
        Attempt attempt = admit(places, lease::Entry::running);
        if (!attempt)
            return attempt;
        refusal = *attempt;
    } catch (const Error& error) {
        refusal = error.what();
    }
    Place& place = places[0];
    if (refusal.empty()) {
        place.stored.stage = Stage::added;
        std::move(places.begin(), places.end(), std::back_inserter(fresh_));
        return kGranted;
    }
    bool qemuRefuses = place.stored.lease.open() &&
                       qemu::findImageConflict(place.stored.imageFd(), resource.mode, false, resource.path).has_value();
    if (resource.mode == Mode::readOnly || qemuRefuses) {
        surroundings_.warn("guest '" + guest_.name + "': '" + resource.path +
                           "' leads to another file than the one its QEMU has open. It keeps its lease of that one and "
                           "has none of the other (" +
                           refusal + ")");
        return kGranted;
    }
    return "'" + resource.path + "' leads to another file than the one that guest '" + guest_.name +
           "' has open, and it may be about to open that one: restore the path, and try again (" + refusal + ")";
}

// What carries the marks of a lease that goes from reading to writing. Throws where it may not.
Place Call::openRising(const StoredLease& lease, const Resource& resource) const {
    const Holdings& h = *holdings_;
    // A lease on the image itself has a descriptor for reading; the others are files of leasehold's own.
    const bool anew = lease.onImage() && !lease.writable;
    Place place = anew ? openPlace(resource, self_, settings_) : findPlace(resource, settings_);
    if (place.stored.file != lease.file)
        unusable(resource.path, "it is not the file that the guest has open below its image");
    if (h.isShared(lease))
        unusable(resource.path, "the guest also has the file that had this name before, and in a lockspace their lease "
                                "is the same: detach that one first");
    // Those of what it reads as a whole would have to rise as well; one is of the parts of the device itself.
    auto wholes = std::count_if(h.leases().begin(), h.leases().end(), [&](const StoredLease& layer) {
        return layer.isLayer() && layer.mode == Mode::shared &&
               std::find(layer.aliases.begin(), layer.aliases.end(), layerUser(lease.file)) != layer.aliases.end();
    });
    if (wholes > 1)
        unusable(resource.path, "what lies below that device is leased for reading since the guest was started; shut "
                                "it down, and use qemu-img commit");
    // There a look does not see that this guest reads it, while the lease goes from one descriptor to the other.
    if (place.hidesQemu && anew)
        unusable(resource.path, "on NFSv3 a running guest cannot write into a file that was below its image when it "
                                "was started; shut it down, and use qemu-img commit");
    return place;
}

// The marks go up, or are those of a reader again.
std::string Call::raiseMarks(const Plan& plan, std::span<const Place> places) const {
    Shares reading(self_, pointersTo(plan.rising));
    std::vector<AnyMedium> media; // does not grow: shares point into it
    media.reserve(places.size());
    std::vector<Share> writing;
    for (std::size_t i = 0; i < reading.all().size(); i++) {
        const StoredLease& part = reading.partOf(i);
        auto at = std::find(plan.rising.begin(), plan.rising.end(), &part) - plan.rising.begin();
        writing.push_back({reading.all()[i].medium, Mode::exclusive});
        if (&part != &reading.wholeOf(i) || !part.onImage() || part.writable)
            continue;
        media.emplace_back(places[static_cast<std::size_t>(at)].stored, self_);
        writing.back().medium = &*media.back();
    }
    lease::Patience patience{[this](milliseconds time) { return pause(time); }, kEntryWait};
    auto refusal = lease::upgradeAll(self_, reading.all(), writing, patience);
    return refusal ? explainRefusal(guest_, reading.partOf(refusal->share), Mode::exclusive, *refusal,
                                    surroundings_.neighbours)
                   : kGranted;
}

// Its marks are up: the lease says so as well.
void Call::becomeExclusive(StoredLease& lease, Place& place, const Resource& resource) {
    if (lease.onImage() && !lease.writable) {
        replaced_.push_back(std::exchange(lease.lease, std::move(place.stored.lease)));
        lease.writable = true;
    }
    setMode(lease, Mode::exclusive);
    lease.path = resource.path;
    lease.stage = Stage::added;
    visitParts(lease, [&](const StoredLease& part) { recordOwner(lease, part); });
}

// From reading to writing, all of them or none: a block commit into a lower file.
Call::Attempt Call::raise(const Plan& plan) {
    if (plan.rising.empty())
        return kGranted;
    Holdings& h = *holdings_;
    h.compareFiles();
    std::vector<Place> places;
    for (std::size_t i = 0; i < plan.rising.size(); i++) {
        about(plan.written[i].path);
        places.push_back(openRising(*plan.rising[i], plan.written[i]));
        if (auto outsider = refuseOutsider(*plan.rising[i], places[i].hidesQemu, Mode::exclusive))
            return outsider;
    }
    for (StoredLease* lease : plan.rising)
        lease->stage = Stage::changing;
    if (!h.tryStore())
        return std::nullopt;
    const std::string refusal = raiseMarks(plan, places);
    for (StoredLease* lease : plan.rising)
        lease->stage = Stage::settled;
    if (refusal != kGranted)
        // If this fails the next call finds `changing`, and nothing to do.
        return h.tryStore() ? Attempt(refusal) : std::nullopt;
    for (std::size_t i = 0; i < plan.rising.size(); i++)
        becomeExclusive(*plan.rising[i], places[i], plan.written[i]);
    changed_ = true;
    return kGranted;
}

// What is thrown is an answer here: a guest does not do without its image because a file below it is on storage that
// has no locks. The log says so, and status shows it.
Call::Attempt Call::admitLower(const Resource& resource, const FileId& file) {
    const auto closed = [&] {
        FileId now;
        return os::tryIdentify(resource.through, now) != 0 || now != file;
    };
    try {
        return insist(deadline_, [&]() -> Attempt {
            about(resource.path);
            std::vector<Place> places;
            places.push_back(openNew(resource));
            Place& place = places[0];
            if (place.stored.file != file)
                return kGranted; // QEMU has closed it meanwhile
            visitParts(place.stored, [&](StoredLease& part) {
                part.lower = true;
                if (place.shared && &part == &place.stored)
                    return;
                for (const StoredLease& lease : holdings_->leases())
                    visitParts(lease, [&](const StoredLease& other) {
                        if (other.leaseFile == part.leaseFile)
                            refuseTwice(other.path, part.path);
                    });
            });
            openLayers(resource, places);
            Attempt attempt = admit(places, lease::Entry::running);
            if (attempt == kGranted)
                std::move(places.begin(), places.end(), std::back_inserter(fresh_));
            else if (closed())
                return kGranted;
            return attempt;
        });
    } catch (const Error& error) {
        if (closed())
            return kGranted;
        surroundings_.warn("guest '" + guest_.name + "' reads '" + resource.path +
                           "' below its image without a lease: " + error.what());
        return kGranted;
    }
}

// The files that QEMU has open for reading and that libvirt does not name: what lies below the images. Refuses where a
// guest that has not run yet would read what somebody writes. One that runs is not harmed.
Call::Attempt Call::leaseLower(bool firstRun) {
    if (!settings_.leaseBackingFiles || !looked_)
        return kGranted;
    Holdings& h = *holdings_;
    const OpenFiles opened = h.opened();
    std::vector<FileId> seen;
    for (const Place& place : fresh_)
        if (!place.stored.isLayer())
            seen.push_back(place.stored.file);
    for (const os::OpenFile& open : opened.all()) {
        if (open.writable || h.findFile(open.file) || opened.useOf(open.file) != OpenFiles::Use::reads ||
            std::find(seen.begin(), seen.end(), open.file) != seen.end())
            continue;
        seen.push_back(open.file);
        std::string through = os::pathThrough(*process_, open.number), path = os::targetOf(through);
        if (os::isOfKernel(open, path))
            continue;
        Resource resource{.path = std::move(path), .mode = Mode::readOnly, .named = std::nullopt, .through = through};
        Attempt refusal = admitLower(resource, open.file);
        if (refusal != kGranted && firstRun)
            return refusal;
        if (refusal != kGranted)
            surroundings_.warn(*refusal);
    }
    changed_ = changed_ || !fresh_.empty();
    return kGranted;
}

std::string Call::acquire(std::string_view state) {
    return insist(deadline_, [&]() -> Attempt {
        if (tryOpen())
            return acquireHere(state);
        if (process_->diedWithin(milliseconds(0)))
            throw Error(Fault::system, "its QEMU has ended: start the guest");
        return settings_.guestsWithoutLease == Settings::Unleased::allow ? kGranted : explainNoVessel(guest_);
    });
}

// What the guest gets, or gets for another use. What it gets is stored at the end of the call.
Call::Attempt Call::change(const Plan& plan, bool waiting) {
    openAll(plan.added);
    if (Attempt refusal = admit(fresh_, lease::Entry::running); refusal != kGranted)
        return refusal;
    for (Place& place : fresh_)
        place.stored.stage = plan.runs || place.stored.isLayer() ? Stage::settled
                             : waiting                           ? Stage::planted
                                                                 : Stage::added;
    if (plan.doubtful)
        if (Attempt refusal = admitDoubtful(*plan.doubtful); refusal != kGranted)
            return refusal;
    if (Attempt refusal = raise(plan); refusal != kGranted)
        return refusal;
    return plan.falling.empty() || lower(plan.falling) ? Attempt(kGranted) : std::nullopt;
}

// The guest runs, or goes on to: what it writes to is its own, and offered to no successor any more. Refuses where its
// successor has it, and where its predecessor does not give it.
std::string Call::takeOver(const Leases& known, std::string_view state) {
    std::vector<const StoredLease*> written;
    written.reserve(known.size());
    for (StoredLease* lease : known)
        if (lease->mode != Mode::readOnly) {
            visitParts(*lease, [&](const StoredLease& part) { checkStillHeld(part); });
            written.push_back(lease);
        }
    for (const Place& place : fresh_)
        if (place.stored.mode != Mode::readOnly)
            written.push_back(&place.stored);
    Shares shares(self_, written);
    auto begun = std::chrono::steady_clock::now();
    lease::Patience patience{[this](milliseconds time) { return pause(time); }, settings_.handoffWait, kEntryWait};
    auto refusal = lease::acquireAll(self_, shares.all(), lease::parseState(state, guest_.uuid), patience);
    if (!refusal)
        return kGranted;
    const StoredLease& refused = shares.partOf(refusal->share);
    std::string text = explainRefusal(guest_, refused, refused.mode, *refusal, surroundings_.neighbours);
    if (settings_.handoffWait > milliseconds(0) && std::chrono::steady_clock::now() - begun >= settings_.handoffWait)
        text += "; waited " + std::to_string(settings_.handoffWait.count() / 1000) +
                " s for the image to be handed over (option handoff_wait in qemu-leasehold.conf)";
    return text;
}

// What a suspended guest gets, by a plug or for a commit, goes along when that guest migrates: libvirt calls nothing
// then.
void Call::offerGained(const Plan& plan) {
    if (plan.runs || (plan.rising.empty() && fresh_.empty()))
        return;
    std::vector<const StoredLease*> gained(plan.rising.begin(), plan.rising.end());
    for (const Place& place : fresh_)
        gained.push_back(&place.stored);
    auto token = handoffOf(self_, writtenOf(holdings_->leases()));
    if (!token)
        return;
    for (const StoredLease* lease : gained) {
        Shares added(self_, {lease});
        for (const Share& share : added.all())
            lease::offer(self_, share, *token);
    }
}

// The handoff is complete: the guard may go, and from now on the record names us.
void Call::complete(StoredLease& lease) {
    if (lease.guarded)
        qemu::takeDownGuard(lease.imageFd(), lease.path);
    visitParts(lease, [&](StoredLease& part) {
        if (part.joined)
            recordOwner(lease, part);
        changed_ = changed_ || part.joined;
        part.guarded = part.joined = false;
    });
}

Call::Attempt Call::acquireHere(std::string_view state) {
    Holdings& h = *holdings_;
    // libvirt names all disks of a guest that is about to run, and quotes the state that it was given when the guest
    // stopped. It names one disk, and no state, where that is plugged or its use changes.
    Naming naming = resources_.size() == 1 && state.empty() ? Naming::one : Naming::all;
    const bool waiting = isFirstRun();
    if (!agree(naming, naming == Naming::all && !resources_.empty()))
        return std::nullopt;
    Plan plan = this->plan(naming);
    if (plan.changes())
        if (Attempt refusal = change(plan, waiting); refusal != kGranted)
            return refusal;
    // What was offered when it stopped is offered no more: the base of a block commit too, which libvirt does not name.
    if (plan.runs) {
        const auto named = static_cast<std::ptrdiff_t>(plan.known.size()); // in order
        for (StoredLease& lease : h.leases())
            if (lease.mode != Mode::readOnly &&
                !std::binary_search(plan.known.begin(), plan.known.begin() + named, &lease))
                plan.known.push_back(&lease);
    }
    if (std::string refusal = takeOver(plan.known, state); refusal != kGranted)
        return refusal;
    // Not of a guest that waits for its first run while a disk is plugged.
    const bool firstRun = waiting && plan.runs;
    if (!waiting || firstRun)
        if (Attempt refusal = leaseLower(firstRun); refusal != kGranted)
            return refusal;
    offerGained(plan);
    for (StoredLease* lease : plan.known)
        complete(*lease);
    for (Place& place : fresh_)
        complete(place.stored);
    if (firstRun)
        leavePlanted();
    changed_ = changed_ || !fresh_.empty();
    keepFresh();
    if (changed_ && !h.tryStore())
        return std::nullopt; // what is fresh vanishes with our descriptors
    return kGranted;
}

void Call::detach() {
    insist(deadline_, [&]() -> Attempt {
        if (!tryOpen())
            return kGranted;
        return detachHere();
    });
}

Call::Attempt Call::detachHere() {
    if (!agree(Naming::released, false))
        return std::nullopt;
    if (!isFirstRun())
        leaseLower(false);
    keepFresh();
    if (changed_ && !holdings_->tryStore())
        return std::nullopt;
    if (!kept_.empty())
        throw Error(Fault::system, "whether its QEMU has closed '" + kept_ + "' cannot be told (" +
                                       holdings_->opened().gap() +
                                       "): the lease stays until that can be told, or "
                                       "until the guest ends");
    return kGranted;
}

std::string Call::changeHandoff(HandoffStep step) {
    return insist(deadline_, [&]() -> Attempt {
        if (!tryOpen())
            return kGranted;
        return changeHandoffHere(step);
    });
}

Call::Attempt Call::changeHandoffHere(HandoffStep step) {
    Holdings& h = *holdings_;
    if (!agree(Naming::all, false))
        return std::nullopt;
    if (looked_ && !isFirstRun())
        leaseLower(false);
    keepFresh();
    if (changed_ && !h.tryStore())
        return std::nullopt;
    Shares shares(self_, writtenOf(h.leases()));
    return lease::encodeState(guest_.uuid, step(self_, shares.all()));
}

} // namespace leasehold

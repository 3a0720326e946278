// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold watch: asks the storage, again and again, whether the leases of this host's guests are still theirs, and
// does what a guest's on_lockfailure says when one is lost. Guests are protected without it; what it adds is that a
// loss has consequences before the guest is resumed the next time.
//
// A loss counts when two rounds have seen it. Silence is no loss: a server that is started anew gives the locks back to
// who had them, and one that has given them away says so when it is back. Who wants to wait no longer says --silence.
//
// While leases are asked about, duplicates of their descriptors exist, and with them the leases, even if QEMU dies in
// that moment. So each guest is asked about alone, and for a short time. On a host with storage that may hang only
// helpers have such duplicates: whoever has one may have to wait for that storage, also when killed.

#include "core/inspect.hpp"
#include "core/os/deadline.hpp"
#include "core/os/process.hpp"
#include "core/os/text.hpp"
#include "core/storage/mount.hpp"
#include "tools/guests.hpp"
#include "tools/libvirt.hpp"
#include "tools/metrics.hpp"
#include "tools/options.hpp"
#include "tools/storage.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <thread>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

struct WatchOrders {
    int interval = 10, timeout = 5, silence = 0;
    std::string fallback = "pause", textfile;
    bool once = false, dryRun = false, json = false;
};

// libvirt waits for QEMU, which waits for its storage: a guest on storage that does not answer is paused as soon as
// that answers, whether we still wait or not.
constexpr int kActionTimeout = 30;

// sd_notify(3): what systemd is told, if it has asked. The protocol is a datagram.
void tellServiceManager(const std::string& text) {
    const char* path = getenv("NOTIFY_SOCKET");
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    if (!path || (path[0] != '/' && path[0] != '@') || std::string_view(path).size() >= sizeof address.sun_path)
        return;
    std::string_view name = path;
    std::copy(name.begin(), name.end(), address.sun_path);
    if (path[0] == '@')
        address.sun_path[0] = '\0';
    os::Fd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    (void)!sendto(socket.get(), text.data(), text.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address),
                  static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size()));
}

// syslog(3); journald understands them in front of a line (sd-daemon(3)).
enum class Urgency { critical = 2, error = 3, warning = 4, notice = 5 };

// What systemd's catalogue and people who look for it know these events by (journald, MESSAGE_ID=); leasehold(8) lists
// them. Never changed.
const char* messageId(std::string_view event) {
    return event == "lost"     ? "227211fdaee94e16b697a64f66c6fe84"
           : event == "acted"  ? "8540b60097854147bc355e9ee6a58ad0"
           : event == "failed" ? "4a820a7195c84e3db8cdc4bd75f04c10"
                               : nullptr;
}

// systemd's native journal protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL): NAME=VALUE, a line each, in a
// datagram. False: nobody takes it.
bool sendToJournal(const std::vector<std::pair<std::string, std::string>>& fields) {
    std::string text;
    for (const auto& [name, value] : fields)
        text += name + "=" + os::printable(value) + "\n";
    constexpr char kSocket[] = "/run/systemd/journal/socket";
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    std::copy(std::begin(kSocket), std::end(kSocket), address.sun_path);
    os::Fd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    return sendto(socket.get(), text.data(), text.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address),
                  sizeof address) == static_cast<ssize_t>(text.size());
}

// One line for each thing that happens, not for each time that it is seen.
class Journal {
public:
    explicit Journal(bool json) : json_(json), prefix_(!json && isJournal()) {}

    void write(Urgency urgency, const char* event, const Json& about, const std::string& text) const {
        if (json_) {
            Json line{{"version", kJsonVersion}, {"time", timeToJson(time(nullptr))}, {"event", event}};
            line.update(about);
            line["text"] = os::printable(text);
            std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
        } else if (!prefix_ || !writeFields(urgency, event, about, text)) {
            std::string level = prefix_ ? "<" + std::to_string(static_cast<int>(urgency)) + ">" : "";
            std::cout << level << os::printable(text) << std::endl;
        }
    }

private:
    // The same line with fields, for what somebody may want to be told of.
    static bool writeFields(Urgency urgency, const char* event, const Json& about, const std::string& text) {
        const char* id = messageId(event);
        if (!id)
            return false;
        std::vector<std::pair<std::string, std::string>> fields{{"MESSAGE", text},
                                                                {"MESSAGE_ID", id},
                                                                {"PRIORITY", std::to_string(static_cast<int>(urgency))},
                                                                {"SYSLOG_IDENTIFIER", "leasehold"},
                                                                {"LEASEHOLD_EVENT", event}};
        for (const auto& [name, value] : about.items()) {
            std::string field = "LEASEHOLD_" + name;
            std::transform(field.begin(), field.end(), field.begin(), [](char c) { return g_ascii_toupper(c); });
            fields.emplace_back(field, value.is_string() ? value.get<std::string>() : value.dump());
        }
        return sendToJournal(fields);
    }

    // sd-daemon(3): others inherit the variable, too.
    static bool isJournal() {
        const char* stream = getenv("JOURNAL_STREAM");
        struct stat status;
        return stream && fstat(STDOUT_FILENO, &status) == 0 &&
               stream == std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
    }

    bool json_, prefix_;
};

class Watcher {
public:
    explicit Watcher(const WatchOrders& orders) : orders_(orders), journal_(orders.json) {}

    // Asks about every lease of this host once.
    void look() {
        guests_ = leases_ = lost_ = unclear_ = 0;
        guestRows_.clear();
        leaseRows_.clear();
        silentNow_.clear();
        answeredNow_.clear();
        // Only a process can be given up; on a host where nothing can hang none is needed.
        remoteMounts_ = storage::hostHasRemoteMounts();
        HostView host = findGuests();
        reportBlindness(host.blindSpots);
        addKnown(host.guests);
        std::set<Key> there;
        for (GuestView& guest : host.guests) {
            there.insert(keyOf(guest));
            examine(guest);
            tellServiceManager("WATCHDOG=1");
        }
        std::erase_if(known_, [&](const auto& each) { return !there.contains(each.first); });
        reportAnswers();
        payDebts();
    }

    // Whether something was seen for the first time that has to be seen twice.
    bool suspects() const {
        return std::any_of(known_.begin(), known_.end(), [](const auto& each) { return each.second.unconfirmed; });
    }

    // Whether a guest was powered off that has not been started again.
    bool owes() const { return !debts_.empty(); }

    void giveUp() const {
        for (const auto& [uuid, debt] : debts_)
            journal_.write(Urgency::critical, "failed", debt.about,
                           debt.name + ": it was to be started anew, and " +
                               (debt.problem.empty() ? "libvirt does not power it off" : "that was not done") +
                               "; see to both");
    }

    bool fine() const { return lost_ == 0 && unclear_ == 0 && debts_.empty() && blindness_.empty(); }

    std::string summary() const {
        return std::to_string(guests_) + (guests_ == 1 ? " guest, " : " guests, ") + std::to_string(leases_) +
               (leases_ == 1 ? " lease, " : " leases, ") + std::to_string(lost_) + " lost" +
               (unclear_ ? ", " + std::to_string(unclear_) + " that cannot be told" : "");
    }

    // For Prometheus: one series for each guest and lease, until the next round.
    std::string metrics() const {
        Metrics metrics;
        metrics.begin("leasehold_watch_last_round_timestamp_seconds", "When leases were looked at last, Unix time.");
        metrics.add(Json::object(), static_cast<double>(time(nullptr)));
        metrics.begin("leasehold_guest", "Guests of this host, by how they are protected.");
        for (const GuestRow& row : guestRows_) {
            Json labels = row.about;
            labels["protection"] = row.protection;
            metrics.add(labels, 1);
        }
        metrics.begin("leasehold_guest_lost_leases", "How many leases the guest has lost.");
        for (const GuestRow& row : guestRows_)
            metrics.add(row.about, static_cast<double>(row.lost));
        metrics.begin("leasehold_lease", "Leases of the guests of this host.");
        for (const LeaseRow& row : leaseRows_) {
            Json labels = row.labels();
            labels["mode"] = row.mode;
            labels["medium"] = row.medium;
            metrics.add(labels, 1);
        }
        metrics.begin("leasehold_lease_lost", "1 if the storage has lost the lease: somebody else may write.");
        for (const LeaseRow& row : leaseRows_)
            metrics.add(row.labels(), row.lost);
        metrics.begin("leasehold_lease_silent", "1 if it cannot be told whether the lease is lost.");
        for (const LeaseRow& row : leaseRows_)
            metrics.add(row.labels(), row.silent);
        metrics.begin("leasehold_sees_all", "0 if there may be guests that the watcher may not look at.");
        metrics.add(Json::object(), blindness_.empty());
        return metrics.text();
    }

    // A textfile that cannot be written is reported once, and is nothing that guests should suffer from.
    void publish() {
        if (orders_.textfile.empty())
            return;
        auto problem = attempt([&] { writeTextfile(orders_.textfile, metrics()); });
        if (problem && unpublished_ != *problem)
            journal_.write(Urgency::warning, "unpublished", {{"path", orders_.textfile}},
                           "the metrics cannot be written: " + *problem);
        unpublished_ = problem.value_or("");
    }

    void conclude() const {
        journal_.write(Urgency::notice, "checked", {{"guests", guests_}, {"leases", leases_}, {"lost", lost_}},
                       summary());
    }

private:
    struct GuestRow {
        Json about;
        std::string protection;
        std::size_t lost;
    };

    struct LeaseRow {
        Json about;
        std::string path, mode, medium;
        bool lost, silent;

        Json labels() const {
            Json all = about;
            all["path"] = path;
            return all;
        }
    };

    struct Findings {
        std::map<std::string, std::string> losses; // image: how
        std::set<std::string> unclear;             // images
    };

    // One process may keep the leases of several guests (`leasehold run` within another).
    using Key = std::pair<pid_t, lease::Uuid>;

    static Key keyOf(const GuestView& guest) { return {guest.pid, guest.tag.uuid}; }

    // A guest that was powered off, or may have been, and has to be started again.
    struct Debt {
        Json about;
        std::string name;
        pid_t pid; // of the QEMU that was to be powered off
        Json xml;
        bool doubtful;       // whether libvirt has got the order: libvirtd was gone before it answered
        std::string problem; // why it is not known whether it was started
    };

    // What is remembered of one QEMU.
    struct Known {
        qemu::GuestTag tag;
        std::optional<os::Process> process; // whether it is still that one
        std::uint32_t incarnation = 0;
        std::set<std::string> suspects; // images
        std::vector<pid_t> stuck;       // helpers that have asked about it and were left behind
        bool unconfirmed = false;       // one of them was seen once
        bool acted = false;
        std::optional<Clock::time_point> notBefore; // libvirt still has an order that it did not answer
        std::set<std::string> reported;             // sentences, until all is well again
    };

    // "guest 'db' (pid 52)"
    static std::string nameOf(const GuestView& guest) {
        return "guest '" + lease::cleanName(guest.tag.name) + "' (pid " + std::to_string(guest.pid) + ")";
    }

    static Json about(const GuestView& guest) {
        return {{"guest", lease::cleanName(guest.tag.name)},
                {"uuid", lease::formatUuid(guest.tag.uuid)},
                {"pid", guest.pid}};
    }

    void reportOnce(Known& known, Urgency urgency, const char* event, const GuestView& guest, const std::string& text,
                    const Json& more = Json::object()) {
        Json who = about(guest);
        who.update(more);
        if (known.reported.insert(text).second)
            journal_.write(urgency, event, who, nameOf(guest) + ": " + text);
    }

    // A QEMU that has dropped its vessel is not found by it any more, nor has its command line to say who it is.
    void addKnown(std::vector<GuestView>& guests) {
        std::set<Key> found;
        for (const GuestView& guest : guests)
            found.insert(keyOf(guest));
        for (const auto& [key, known] : known_)
            if (known.incarnation != 0 && !found.contains(key) && known.process &&
                !known.process->diedWithin(std::chrono::milliseconds(0))) {
                const pid_t pid = key.first; // Clang before 16 lets no lambda capture a structured binding
                std::erase_if(guests,
                              [&](const GuestView& guest) { return guest.pid == pid && guest.tag.incarnation == 0; });
                guests.push_back({known.tag, pid});
            }
    }

    void reportBlindness(const std::vector<std::string>& blindSpots) {
        for (const std::string& blind : blindSpots)
            if (std::find(blindness_.begin(), blindness_.end(), blind) == blindness_.end())
                journal_.write(Urgency::warning, "unseen", Json::object(), "not seen: " + blind);
        blindness_ = blindSpots;
    }

    void examine(GuestView& guest) {
        Protection protection = Protection::gone;
        auto damage = attempt([&] { protection = surveyLeases(guest); });
        // A stranger is its user's, and that user's to watch.
        if (!damage && (protection == Protection::gone || protection == Protection::foreign))
            return;
        guests_++;
        Known& known = known_[keyOf(guest)];
        if (known.process && known.process->diedWithin(std::chrono::milliseconds(0)))
            known = {}; // the pid is another one's by now
        if (!known.process)
            known.process = os::Process::openIfExists(guest.pid);
        if (protection == Protection::leased) {
            known.incarnation = guest.tag.incarnation;
            known.tag = guest.tag;
        }
        if (protection != Protection::foreign || known.incarnation != 0)
            guestRows_.push_back({about(guest), damage ? "damaged" : protectionName(protection), 0});
        Findings found;
        if (damage) {
            found.unclear = known.suspects;
            unclear_++;
            reportOnce(known, Urgency::error, "unreadable", guest, *damage);
        } else if (protection == Protection::hidden) {
            found.unclear = known.suspects;
            unclear_++;
            reportOnce(
                known, Urgency::error, "unreadable", guest,
                "its leases may not be looked at: run this as root, with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH");
        } else if (protection != Protection::leased && known.incarnation != 0) {
            found.losses["all its images"] = "were dropped by its QEMU, which may be in the hands of an attacker";
        } else if (protection == Protection::none) {
            reportOnce(
                known, Urgency::warning, "unprotected", guest,
                "its QEMU was started without leasehold, and nothing protects its images; shut it down and start "
                "it again");
        } else {
            found = ask(guest, known);
        }
        respond(guest, known, found);
    }

    // File system by file system: one that does not answer must not hide what others would say.
    Findings ask(const GuestView& guest, Known& known) {
        std::map<std::uint64_t, std::vector<std::string>> byDevice; // images
        for (const StoredView& lease : guest.leases)
            byDevice[lease.stored.leaseFile.device].push_back(lease.path);
        for (const qemu::StoredLease& stored : guest.companions)
            byDevice[stored.leaseFile.device].push_back(os::printable(stored.path));
        leases_ += guest.leases.size();
        Findings found;
        // One more in each round would only be one more that keeps duplicates.
        std::vector<pid_t> stuck = os::stuckHelpers();
        const bool heldUp =
            std::find_first_of(stuck.begin(), stuck.end(), known.stuck.begin(), known.stuck.end()) != stuck.end();
        if (!heldUp)
            known.stuck.clear();
        for (const auto& entry : byDevice) {
            // Not a structured binding: Clang before 16 lets no lambda capture one.
            const std::uint64_t device = entry.first;
            const std::vector<std::string>& images = entry.second;
            std::optional<Json> answer;
            auto problem = attempt([&] { answer = askDevice(device, guest, heldUp); });
            if (!answer) {
                unclear_ += images.size();
                found.unclear.insert(images.begin(), images.end());
                if (problem)
                    reportOnce(known, Urgency::error, "unreadable", guest, *problem);
                else if (silentNow_.contains(device))
                    addSilence(device, images.front(), found);
                else
                    reportOnce(known, Urgency::warning, "unreadable", guest,
                               "whether its leases are lost cannot be told as long as storage of its disks does not "
                               "answer: the last who asked cannot let go of it");
                continue;
            }
            for (const Json& each : *answer) {
                std::string image = each["path"];
                if (each.contains("how")) {
                    found.losses[image] = each["how"];
                } else {
                    unclear_++;
                    found.unclear.insert(image);
                    reportOnce(known, Urgency::error, "unreadable", guest,
                               "whether the lease on '" + image +
                                   "' is lost cannot be told: " + each["error"].get<std::string>());
                }
            }
            tellServiceManager("WATCHDOG=1");
        }
        for (pid_t pid : os::stuckHelpers())
            if (std::find(stuck.begin(), stuck.end(), pid) == stuck.end())
                known.stuck.push_back(pid);
        return found;
    }

    // What is wrong with which of the guest's leases there; nothing where the storage does not answer.
    std::optional<Json> askDevice(std::uint64_t device, const GuestView& guest, bool heldUp) {
        // Helpers that cannot be killed keep duplicates: no more of them than this where an answer is not expected, and
        // in all no more than leave some for what is asked of libvirt.
        constexpr std::size_t kEnoughStuck = 4, kMostStuck = os::kMaxStuckHelpers - 16;
        if (silentNow_.contains(device))
            return std::nullopt;
        const bool silent = silentSince_.contains(device);
        if (mayHang(guest, remoteMounts_) &&
            (heldUp || os::stuckHelpers().size() >= (silent ? kEnoughStuck : kMostStuck))) {
            if (silent)
                silentNow_.insert(device);
            return std::nullopt;
        }
        auto work = [device](const GuestView& open) {
            Json answer = Json::array();
            auto look = [&](const qemu::StoredLease& lease) {
                if (lease.leaseFile.device != device)
                    return;
                std::optional<std::string> how;
                auto problem = attempt([&] { how = findLoss(lease, open.tag); });
                if (problem)
                    answer.push_back({{"path", os::printable(lease.path)}, {"error", *problem}});
                else if (how)
                    answer.push_back({{"path", os::printable(lease.path)}, {"how", *how}});
            };
            for (const StoredView& lease : open.leases)
                look(lease.stored);
            std::for_each(open.companions.begin(), open.companions.end(), look);
            return answer;
        };
        auto answer = tryAskGuest(guest, remoteMounts_, orders_.timeout, work);
        (answer ? answeredNow_ : silentNow_).insert(device);
        return answer;
    }

    void addSilence(std::uint64_t device, const std::string& image, Findings& found) {
        auto [silent, first] = silentSince_.try_emplace(device, Clock::now(), image);
        auto passed = std::chrono::duration_cast<seconds>(Clock::now() - silent->second.first).count();
        if (first)
            journal_.write(Urgency::warning, "silent", {{"path", silent->second.second}},
                           "the storage of '" + silent->second.second +
                               "' does not answer: whether leases there are "
                               "lost cannot be told");
        if (orders_.silence > 0 && passed >= orders_.silence)
            found.losses[image] = "counts as lost: its storage has not answered for " +
                                  std::to_string(orders_.silence) + " s (--silence)";
    }

    void reportAnswers() {
        std::erase_if(silentSince_, [&](const auto& each) {
            auto passed = std::chrono::duration_cast<seconds>(Clock::now() - each.second.first).count();
            if (answeredNow_.contains(each.first))
                journal_.write(Urgency::notice, "answers", {{"path", each.second.second}},
                               "the storage of '" + each.second.second + "' answers again, after " +
                                   std::to_string(passed) + " s");
            return !silentNow_.contains(each.first); // or nobody uses it any more
        });
    }

    void respond(const GuestView& guest, Known& known, const Findings& found) {
        bool confirmed = false;
        known.unconfirmed = false;
        for (const auto& [image, how] : found.losses) {
            if (!known.suspects.contains(image)) {
                known.unconfirmed = true;
                continue;
            }
            confirmed = true;
            lost_++;
            guestRows_.back().lost++;
            std::string what =
                image.starts_with('/') ? "the lease on '" + image + "' " : "the leases on " + image + " ";
            reportOnce(known, Urgency::critical, "lost", guest,
                       what + how +
                           ": another guest may have written to it; see who has it (leasehold inspect), then "
                           "destroy this guest and start it again",
                       {{"path", image.starts_with('/') ? Json(image) : Json()}});
        }
        for (const StoredView& lease : guest.leases)
            leaseRows_.push_back({about(guest), lease.path, modeName(lease.mode), lease.medium,
                                  known.suspects.contains(lease.path) && found.losses.contains(lease.path),
                                  found.unclear.contains(lease.path)});
        // What cannot be told now is as suspect as it was.
        std::erase_if(known.suspects, [&](const std::string& image) {
            return !found.losses.contains(image) && !found.unclear.contains(image);
        });
        for (const auto& [image, how] : found.losses)
            known.suspects.insert(image);
        if (found.losses.empty() && found.unclear.empty() && known.incarnation != 0) {
            known.reported.clear();
            debts_.erase(lease::formatUuid(guest.tag.uuid));
            stayWhileOwing();
        }
        if (confirmed && (!known.notBefore || Clock::now() > *known.notBefore))
            act(guest, known);
    }

    // In a process that can be given up. Nothing: libvirt did not answer in time, and may still do it.
    template <typename Work>
    std::optional<Json> order(const GuestView& guest, Known& known, Work work) {
        known.notBefore.reset();
        std::optional<Json> answer;
        auto problem = attempt([&] { answer = tryAskWithin(kActionTimeout, {}, work); });
        tellServiceManager("WATCHDOG=1");
        if (answer && !answer->contains("refused"))
            return answer;
        if (answer)
            problem = (*answer)["refused"];
        if (!problem) {
            // Each order that waits in libvirtd for a QEMU that waits for its storage keeps one of its threads.
            known.notBefore = Clock::now() + std::chrono::minutes(5);
            problem = "libvirt did not do within " + std::to_string(kActionTimeout) +
                      " s what was asked of it, and may still do it; it is asked again after 5 minutes";
        } else {
            *problem += "; this is tried again every " + std::to_string(orders_.interval) + " s";
        }
        reportOnce(known, Urgency::critical, "failed", guest, *problem);
        return answer;
    }

    // Again in each round: libvirtd may have been away, and somebody may have let the guest run again.
    void act(const GuestView& guest, Known& known) {
        std::string uuid = lease::formatUuid(guest.tag.uuid);
        auto plan = order(guest, known, [&] { return planResponse(uuid, guest.pid, orders_.fallback); });
        if (!plan)
            return;
        std::string action = (*plan)["action"];
        Json deed{{"did", false}, {"text", "nothing was done (--dry-run)"}};
        if (action == "ignore") {
            deed["text"] = "it goes on as if nothing had happened";
        } else if (!orders_.dryRun) {
            // Before it is powered off: whoever does not get an answer owes it the start all the same.
            if (action == "restart") {
                debts_.insert_or_assign(uuid, Debt{about(guest), nameOf(guest), guest.pid, (*plan)["xml"], false, ""});
                stayWhileOwing();
            }
            auto done = order(guest, known, [&] { return respondToLoss(uuid, guest.pid, action); });
            if (!done || done->contains("refused")) {
                if (done)
                    debts_.erase(uuid); // it runs on
                else if (auto debt = debts_.find(uuid); debt != debts_.end() && !known.notBefore)
                    debt->second.doubtful = true;
                stayWhileOwing();
                return;
            }
            deed = *done;
        }
        if (deed["did"].get<bool>() || !known.acted)
            journal_.write(
                Urgency::critical, "acted", about(guest),
                nameOf(guest) + ": " + deed["text"].get<std::string>() +
                    ((*plan)["asked_by"] == "guest" ? " (its on_lockfailure is " : " (it has no on_lockfailure: ") +
                    action + ")");
        known.acted = true;
        payDebts();
    }

    // Guests that were powered off to be started again. One try that libvirt has answered.
    void payDebts() {
        for (auto each = debts_.begin(); each != debts_.end();)
            each = pay(each->first, each->second) ? debts_.erase(each) : std::next(each);
        stayWhileOwing();
    }

    // Whether nothing is owed any more.
    bool pay(const std::string& uuid, Debt& debt) {
        std::optional<Json> answer;
        auto start = [&] { return startAgain(uuid, debt.pid, debt.xml); };
        auto problem = attempt([&] { answer = tryAskWithin(kActionTimeout, {}, start); });
        if (!answer && !problem)
            problem = "libvirt does not answer within " + std::to_string(kActionTimeout) + " s";
        if (problem) { // libvirtd may have died in the middle of either order
            if (debt.problem != *problem)
                journal_.write(Urgency::critical, "failed", debt.about,
                               debt.name + ": it could not be started again: " + *problem + "; this is tried again");
            debt.problem = *problem;
            return false;
        }
        if (!(*answer)["over"].get<bool>())
            return debt.doubtful; // it runs on; or else it is not off yet
        journal_.write(Urgency::critical, "acted", debt.about, debt.name + ": " + (*answer)["text"].get<std::string>());
        return true;
    }

    // Whoever tells us to end waits until all guests are on again that we have powered off: systemd for TimeoutStopSec.
    // But not who types ^C.
    void stayWhileOwing() const {
        sigset_t ends;
        sigemptyset(&ends);
        for (int number : {SIGTERM, SIGHUP})
            sigaddset(&ends, number);
        pthread_sigmask(owes() ? SIG_BLOCK : SIG_UNBLOCK, &ends, nullptr);
    }

    WatchOrders orders_;
    Journal journal_;
    std::map<Key, Known> known_;
    std::vector<std::string> blindness_;
    std::map<std::string, Debt> debts_;                                              // by UUID
    std::map<std::uint64_t, std::pair<Clock::time_point, std::string>> silentSince_; // device: since, an image there
    std::set<std::uint64_t> silentNow_, answeredNow_;
    std::vector<GuestRow> guestRows_; // of the last round
    std::vector<LeaseRow> leaseRows_;
    std::string unpublished_; // why the metrics could not be written
    bool remoteMounts_ = true;
    std::size_t guests_ = 0, leases_ = 0, lost_ = 0, unclear_ = 0;
};

} // namespace

int watch(const Words& arguments) {
    WatchOrders orders;
    Options options(
        "watch", "",
        "Watches the leases of this host's guests, and does what a guest's <on_lockfailure> says when its storage\n"
        "has lost one: poweroff, restart, pause or ignore. Usually run by leasehold-watch.service.");
    options.add("interval", orders.interval, "How often each lease is looked at (10)", 1);
    options.add("timeout", orders.timeout, "How long storage may take to answer (5)", 1);
    options.add("silence", orders.silence, "After this time without an answer a lease counts as lost (0: never)");
    options.add("default", orders.fallback, "For guests without <on_lockfailure> (pause)", "ACTION");
    options.add("textfile", orders.textfile, "Write metrics there after each look, for Prometheus' node_exporter",
                "FILE");
    options.add("once", orders.once, "Look, confirm what was found, act, and end: 0 if all is well, 3 if not");
    options.add("dry-run", orders.dryRun, "Report only");
    options.add("json", orders.json, "Print one JSON object a line for each event");
    if (!options.parse(arguments).empty())
        throw UsageError("watch takes no operands; see leasehold watch --help");
    if (!isFailureAction(orders.fallback))
        throw UsageError("--default is poweroff, restart, pause or ignore, not '" + os::printable(orders.fallback) +
                         "'; see leasehold watch --help");

    (void)allowManyDescriptors();
    Watcher watcher(orders);
    // Before the first look: storage may be silent at boot.
    tellServiceManager("READY=1");
    constexpr int kMostLooks = 4;  // what is lost now and then is not lost
    constexpr int kMostWaits = 60; // for libvirt to power a guest off
    for (int looks = 1;; looks++) {
        watcher.look();
        watcher.publish();
        tellServiceManager("STATUS=" + watcher.summary());
        if (orders.once && (watcher.owes() ? looks >= kMostWaits : watcher.suspects() ? looks >= kMostLooks : true))
            break;
        for (int left = watcher.suspects() || watcher.owes() ? 1 : orders.interval; left > 0; left -= 60) {
            tellServiceManager("WATCHDOG=1");
            std::this_thread::sleep_for(seconds(std::min(left, 60)));
        }
    }
    watcher.giveUp();
    watcher.conclude();
    return watcher.fine() ? kDone : kWarnings;
}

} // namespace leasehold::tools

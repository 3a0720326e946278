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
// that moment. So each guest is asked about alone, and for a short time.

#include "core/inspect.hpp"
#include "core/os/process.hpp"
#include "core/os/text.hpp"
#include "core/storage/mount.hpp"
#include "tools/libvirt.hpp"
#include "tools/options.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <map>
#include <set>
#include <thread>

#include <sys/socket.h>
#include <sys/un.h>

namespace leasehold::tools {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

struct Orders {
    int interval = 10, timeout = 5, silence = 0;
    std::string fallback = "pause";
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

// One line for each thing that happens, not for each time that it is seen.
class Journal {
public:
    explicit Journal(bool json) : json_(json), prefix_(!json && getenv("JOURNAL_STREAM")) {}

    void write(Urgency urgency, const char* event, const Json& about, const std::string& text) const {
        if (json_) {
            Json line{{"time", timeToJson(time(nullptr))}, {"event", event}};
            line.update(about);
            line["text"] = os::printable(text);
            std::cout << line.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
        } else {
            std::string level = prefix_ ? "<" + std::to_string(static_cast<int>(urgency)) + ">" : "";
            std::cout << level << os::printable(text) << std::endl;
        }
    }

private:
    bool json_, prefix_;
};

class Watcher {
public:
    explicit Watcher(const Orders& orders) : orders_(orders), journal_(orders.json) {}

    // Asks about every lease of this host once.
    void look() {
        guests_ = leases_ = lost_ = unclear_ = 0;
        silentNow_.clear();
        answeredNow_.clear();
        // Only a process can be given up; on a host where nothing can hang none is needed.
        mayHang_ = storage::hostHasRemoteMounts();
        std::set<pid_t> there;
        for (GuestView& guest : findGuests()) {
            there.insert(guest.pid);
            examine(guest);
            tellServiceManager("WATCHDOG=1");
        }
        std::erase_if(known_, [&](const auto& each) { return !there.contains(each.first); });
        reportAnswers();
    }

    // Whether something was seen for the first time that has to be seen twice.
    bool suspects() const {
        return std::any_of(known_.begin(), known_.end(), [](const auto& each) { return each.second.unconfirmed; });
    }

    bool fine() const { return lost_ == 0 && unclear_ == 0; }

    std::string summary() const {
        return std::to_string(guests_) + (guests_ == 1 ? " guest, " : " guests, ") + std::to_string(leases_) +
               (leases_ == 1 ? " lease, " : " leases, ") + std::to_string(lost_) + " lost" +
               (unclear_ ? ", " + std::to_string(unclear_) + " that cannot be told" : "");
    }

    void conclude() const {
        journal_.write(Urgency::notice, "checked", {{"guests", guests_}, {"leases", leases_}, {"lost", lost_}},
                       summary());
    }

private:
    using Losses = std::map<std::string, std::string>; // image: how

    // What is remembered of one QEMU.
    struct Known {
        std::optional<os::Process> process; // whether it is still that one
        std::uint32_t incarnation = 0;
        std::set<std::string> suspects; // images
        bool unconfirmed = false;       // one of them was seen once
        bool acted = false, ignored = false;
        std::set<std::string> reported; // sentences
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

    void reportOnce(Known& known, Urgency urgency, const char* event, const GuestView& guest, const std::string& text) {
        if (known.reported.insert(text).second)
            journal_.write(urgency, event, about(guest), nameOf(guest) + ": " + text);
    }

    void examine(GuestView& guest) {
        Protection protection = Protection::gone;
        auto damage = attempt([&] { protection = readLeases(guest); });
        if (!damage && protection == Protection::gone)
            return;
        guests_++;
        Known& known = known_[guest.pid];
        if (known.process && known.process->diedWithin(std::chrono::milliseconds(0)))
            known = {}; // the pid is another one's by now
        if (!known.process)
            known.process = os::Process::openIfExists(guest.pid);
        if (protection == Protection::leased)
            known.incarnation = guest.tag.incarnation;
        Losses losses;
        if (damage) {
            unclear_++;
            reportOnce(known, Urgency::error, "unreadable", guest, *damage);
        } else if (protection == Protection::hidden) {
            unclear_++;
            reportOnce(
                known, Urgency::error, "unreadable", guest,
                "its leases may not be looked at: run this as root, with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH");
        } else if (protection == Protection::none && known.incarnation != 0) {
            losses["all its images"] = "were dropped by its QEMU, which may be in the hands of an attacker";
        } else if (protection == Protection::none) {
            reportOnce(
                known, Urgency::warning, "unprotected", guest,
                "its QEMU was started without leasehold, and nothing protects its images; shut it down and start "
                "it again");
        } else {
            losses = ask(guest, known);
        }
        respond(guest, known, losses);
    }

    // File system by file system: one that does not answer must not hide what others would say.
    Losses ask(GuestView& guest, Known& known) {
        std::map<std::uint64_t, std::vector<const qemu::StoredLease*>> byDevice;
        for (const StoredView& lease : guest.leases)
            byDevice[lease.stored.leaseFile.device].push_back(&lease.stored);
        for (const qemu::StoredLease& stored : guest.companions)
            byDevice[stored.leaseFile.device].push_back(&stored);
        leases_ += guest.leases.size();
        Losses losses;
        for (const auto& [device, leases] : byDevice) {
            auto answer = askDevice(device, leases, guest.tag);
            if (!answer) {
                unclear_ += leases.size();
                addSilence(device, *leases.front(), losses);
            } else if (answer->contains("problem")) {
                unclear_ += leases.size();
                reportOnce(known, Urgency::error, "unreadable", guest,
                           "cannot be told: " + (*answer)["problem"].get<std::string>());
            } else {
                for (const Json& loss : (*answer)["losses"])
                    losses[loss["image"]] = loss["how"];
            }
        }
        return losses;
    }

    std::optional<Json> askDevice(std::uint64_t device, std::span<const qemu::StoredLease* const> leases,
                                  const qemu::GuestTag& tag) {
        if (silentNow_.contains(device))
            return std::nullopt;
        auto work = [&]() -> Json {
            Json losses = Json::array();
            auto problem = attempt([&] {
                for (const Loss& loss : findLosses(leases, tag))
                    losses.push_back({{"image", loss.path}, {"how", loss.how}});
            });
            return problem ? Json{{"problem", *problem}} : Json{{"losses", losses}};
        };
        std::optional<Json> answer;
        auto problem =
            attempt([&] { answer = mayHang_ ? tryAskWithin(orders_.timeout, descriptorsOf(leases), work) : work(); });
        if (problem)
            return Json{{"problem", *problem}};
        (answer ? answeredNow_ : silentNow_).insert(device);
        return answer;
    }

    void addSilence(std::uint64_t device, const qemu::StoredLease& lease, Losses& losses) {
        auto [silent, first] = silentSince_.try_emplace(device, Clock::now(), os::printable(lease.path));
        auto passed = std::chrono::duration_cast<seconds>(Clock::now() - silent->second.first).count();
        if (first)
            journal_.write(Urgency::warning, "silent", {{"image", silent->second.second}},
                           "the storage of '" + silent->second.second +
                               "' does not answer: whether leases there are "
                               "lost cannot be told");
        if (orders_.silence > 0 && passed >= orders_.silence)
            losses[os::printable(lease.path)] = "counts as lost: its storage has not answered for " +
                                                std::to_string(orders_.silence) + " s (--silence)";
    }

    void reportAnswers() {
        std::erase_if(silentSince_, [&](const auto& each) {
            auto passed = std::chrono::duration_cast<seconds>(Clock::now() - each.second.first).count();
            if (answeredNow_.contains(each.first))
                journal_.write(Urgency::notice, "answers", {{"image", each.second.second}},
                               "the storage of '" + each.second.second + "' answers again, after " +
                                   std::to_string(passed) + " s");
            return !silentNow_.contains(each.first); // or nobody uses it any more
        });
    }

    void respond(GuestView& guest, Known& known, const Losses& losses) {
        guest.leases.clear(); // what follows takes its time, and the leases must not outlive QEMU
        guest.companions.clear();
        std::set<std::string> suspects;
        for (const auto& [image, how] : losses) {
            suspects.insert(image);
            if (!known.suspects.contains(image))
                continue;
            lost_++;
            std::string what =
                image.starts_with('/') ? "the lease on '" + image + "' " : "the leases on " + image + " ";
            reportOnce(known, Urgency::critical, "lost", guest,
                       what + how +
                           ": another guest may have written to it; see who has it (leasehold inspect), then "
                           "destroy this guest and start it again");
        }
        std::swap(known.suspects, suspects);
        auto isOld = [&](const std::string& image) { return suspects.contains(image); };
        known.unconfirmed = !std::all_of(known.suspects.begin(), known.suspects.end(), isOld);
        if (!known.ignored && std::any_of(known.suspects.begin(), known.suspects.end(), isOld))
            act(guest, known);
    }

    // Again in each round: libvirtd may have been away, and somebody may have let the guest run again.
    void act(const GuestView& guest, Known& known) {
        std::optional<Json> answer;
        auto problem = attempt([&] {
            answer = tryAskWithin(kActionTimeout, {}, [&] {
                return respondToLoss(lease::formatUuid(guest.tag.uuid), guest.pid, orders_.fallback, orders_.dryRun);
            });
        });
        if (!problem && !answer)
            problem = "libvirt did not do within " + std::to_string(kActionTimeout) + " s what was asked of it";
        if (problem) {
            reportOnce(known, Urgency::critical, "failed", guest,
                       *problem + "; this is tried again every " + std::to_string(orders_.interval) + " s");
            return;
        }
        const Json& done = *answer;
        known.ignored = done["action"] == "ignore";
        if (done["did"].get<bool>() || !known.acted)
            journal_.write(
                Urgency::critical, "acted", about(guest),
                nameOf(guest) + ": " + done["text"].get<std::string>() +
                    (done["asked_by"] == "guest" ? " (its on_lockfailure is " : " (it has no on_lockfailure: ") +
                    done["action"].get<std::string>() + ")");
        known.acted = true;
    }

    Orders orders_;
    Journal journal_;
    std::map<pid_t, Known> known_;
    std::map<std::uint64_t, std::pair<Clock::time_point, std::string>> silentSince_; // device: since, an image there
    std::set<std::uint64_t> silentNow_, answeredNow_;
    bool mayHang_ = true;
    std::size_t guests_ = 0, leases_ = 0, lost_ = 0, unclear_ = 0;
};

} // namespace

int watch(const Words& arguments) {
    Orders orders;
    Options options(
        "watch", "",
        "Watches the leases of this host's guests, and does what a guest's <on_lockfailure> says when its storage\n"
        "has lost one: poweroff, restart, pause or ignore. Usually run by leasehold-watch.service.");
    options.add("interval", orders.interval, "How often each lease is looked at (10)");
    options.add("timeout", orders.timeout, "How long storage may take to answer (5)");
    options.add("silence", orders.silence, "After this time without an answer a lease counts as lost (0: never)");
    options.add("default", orders.fallback, "For guests without <on_lockfailure> (pause)", "ACTION");
    options.add("once", orders.once, "Look, confirm what was found, act, and end: 0 if all is well, 3 if not");
    options.add("dry-run", orders.dryRun, "Report only");
    options.add("json", orders.json, "Print one JSON object a line for each event");
    if (!options.parse(arguments).empty())
        throw UsageError("watch takes no operands; see leasehold watch --help");
    if (!isFailureAction(orders.fallback))
        throw UsageError("--default is poweroff, restart, pause or ignore, not '" + os::printable(orders.fallback) +
                         "'; see leasehold watch --help");
    if (orders.interval == 0 || orders.timeout == 0)
        throw UsageError("--interval and --timeout are at least 1; see leasehold watch --help");

    allowManyDescriptors();
    Watcher watcher(orders);
    for (;;) {
        watcher.look();
        tellServiceManager("READY=1\nSTATUS=" + watcher.summary());
        if (orders.once && !watcher.suspects())
            break;
        for (int left = watcher.suspects() ? 1 : orders.interval; left > 0; left -= 60) {
            tellServiceManager("WATCHDOG=1");
            std::this_thread::sleep_for(seconds(std::min(left, 60)));
        }
    }
    watcher.conclude();
    return watcher.fine() ? kDone : kWarnings;
}

} // namespace leasehold::tools

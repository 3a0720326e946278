// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold status [GUEST]

#include "core/os/text.hpp"
#include "core/storage/mount.hpp"
#include "tools/guests.hpp"
#include "tools/libvirt.hpp"
#include "tools/metrics.hpp"
#include "tools/options.hpp"
#include "tools/storage.hpp"

#include <algorithm>
#include <iostream>
#include <map>
#include <set>

namespace leasehold::tools {

namespace {

// What only the storage can tell. Asked once for each guest and file system; storage that did not answer is not asked
// again.
class StorageFacts {
public:
    StorageFacts(bool mayHang, int timeout) : mayHang_(mayHang), timeout_(timeout) {}

    // Adds them to the leases of the guest, in place of "device".
    void add(Json& leases, const GuestView& guest) {
        std::map<std::uint64_t, Json> byDevice; // "storage", and "since" by path
        for (const StoredView& lease : guest.leases)
            byDevice.try_emplace(lease.stored.leaseFile.device);
        for (auto& [device, facts] : byDevice)
            facts = ask(device, guest);
        for (Json& lease : leases) {
            const Json& facts = byDevice[lease["device"].get<std::uint64_t>()];
            auto path = lease["path"].get<std::string>();
            lease["storage"] = facts.is_null() ? Json() : facts["storage"];
            lease["since"] = facts.is_null() ? Json() : timeToJson(facts["since"].value(path, std::int64_t{0}));
            lease.erase("device");
        }
    }

private:
    Json ask(std::uint64_t device, const GuestView& guest) {
        if (silent_.contains(device))
            return {};
        auto work = [&](const GuestView& open) {
            Json facts{{"storage", storages_[device]}, {"since", Json::object()}};
            for (const StoredView& lease : open.leases) {
                if (lease.stored.leaseFile.device != device)
                    continue;
                if (facts["storage"].is_null())
                    facts["storage"] = storageToJson(storage::classify(lease.stored.lease.get(), lease.path));
                facts["since"][lease.path] = heldSince(lease, open.tag);
            }
            return facts;
        };
        auto facts = tryAskGently(guest, mayHang_, timeout_, work);
        if (!facts)
            silent_.insert(device);
        else if (!facts->is_null())
            storages_[device] = (*facts)["storage"];
        return facts.value_or(Json());
    }

    bool mayHang_;
    int timeout_;
    std::map<std::uint64_t, Json> storages_;
    std::set<std::uint64_t> silent_;
};

// What a lease of a file below an image is for, in a word of its own.
std::string useOf(const Json& lease) {
    return lease["mode"].get<std::string>() + (lease["backing"].get<bool>() ? ", as a backing file" : "");
}

// Their states only the descriptors know.
Json leasesToJson(const GuestView& guest) {
    Json leases = Json::array();
    for (const StoredView& lease : guest.leases) {
        bool known = lease.stored.lease.open();
        leases.push_back({{"path", lease.path},
                          {"mode", modeName(lease.mode)},
                          {"state", describe(known ? lease.state : LeaseState::unclear)},
                          {"backing", lease.lower},
                          {"owned", known ? Json(lease.owned) : Json()},
                          {"medium", lease.medium},
                          {"device", lease.stored.leaseFile.device}});
    }
    return leases;
}

Json openToJson(const GuestView& guest) {
    return {{"leases", leasesToJson(guest)}, {"unleased", findUnleased(guest)}};
}

Json guestToJson(GuestView& guest, StorageFacts& facts, bool mayHang, int timeout) {
    Protection protection = Protection::leased;
    Json leases = Json::array(), unleased;
    auto trouble = attemptToRead([&] {
        protection = surveyLeases(guest);
        if (protection != Protection::leased)
            return;
        auto answer = tryAskGently(guest, mayHang, timeout, openToJson);
        if (answer && answer->is_null())
            return; // it has ended
        Json found = answer ? std::move((*answer)["leases"]) : leasesToJson(guest);
        if (answer)
            unleased = std::move((*answer)["unleased"]);
        facts.add(found, guest);
        leases = std::move(found);
    });
    return {{"guest", orNull(lease::cleanName(guest.tag.name))},
            {"uuid", lease::formatUuid(guest.tag.uuid)},
            {"pid", guest.pid},
            {"user", guest.stranger ? Json(*guest.stranger) : Json()},
            {"incarnation", os::hexadecimal(guest.tag.incarnation)},
            {"protection", trouble ? (trouble->damaged ? "damaged" : "unreadable") : protectionName(protection)},
            {"runs_without_lease", false},
            {"error", trouble ? Json(trouble->text) : Json()},
            {"leases", std::move(leases)},
            {"unleased", std::move(unleased)}};
}

bool lacksLease(const Json& guest) {
    return std::any_of(guest["leases"].begin(), guest["leases"].end(),
                       [](const Json& lease) { return lease["mode"] != "read-only" && lease["owned"] == false; });
}

// Somebody said `cont` to a QEMU whose lease is with its successor, behind libvirt's back. Only libvirt knows who runs.
void findRunningWithoutLease(Json& guests) {
    if (std::none_of(guests.begin(), guests.end(), lacksLease))
        return;
    Json running = Json::array();
    if (attempt([&] { running = askLibvirt(kStorageTimeout, listRunningGuests); }))
        return;
    for (Json& guest : guests)
        guest["runs_without_lease"] =
            lacksLease(guest) && std::find(running.begin(), running.end(), guest["uuid"]) != running.end();
}

std::string explain(const Json& guest) {
    std::string who = "guest '" + orEmpty(guest["guest"]) + "' (pid " + std::to_string(guest["pid"].get<int>()) + ") ";
    if (guest["protection"] == "none")
        return who + "has no leases: its QEMU was started without leasehold, and nothing protects its images; shut it "
                     "down and start it again";
    if (guest["protection"] == "hidden")
        return who + "may not be looked at: run this as root";
    if (!guest["error"].is_null())
        return who + "cannot be read: " + guest["error"].get<std::string>();
    if (guest["runs_without_lease"].get<bool>())
        return who + "runs although its lease was handed over: it was resumed behind libvirt's back (cont in the QEMU "
                     "monitor); destroy it, or whoever took over";
    return "";
}

std::string scopeOf(const Json& lease) {
    const Json& storage = lease["storage"];
    return storage.is_null() ? "no answer" : storage["scope"].is_null() ? "none" : storage["scope"].get<std::string>();
}

// What is shown of it is not all: storage, or a second look at its leases, gave no answer.
bool isIncomplete(const Json& guest) {
    return std::any_of(guest["leases"].begin(), guest["leases"].end(),
                       [](const Json& lease) { return lease["storage"].is_null() || lease["owned"].is_null(); });
}

Colour colourOf(const std::string& state) {
    return state == "held" ? Colour::green : Colour::yellow;
}

void printForPeople(const Json& guests, const Json& notSeen) {
    std::vector<std::vector<std::string>> rows{{"GUEST", "PID", "IMAGE", "MODE", "STATE", "MEDIUM", "SCOPE", "SINCE"}};
    std::vector<std::string> notes;
    for (const Json& guest : guests) {
        if (std::string note = explain(guest); !note.empty())
            notes.push_back(note);
        std::string name = orEmpty(guest["guest"]), pid = std::to_string(guest["pid"].get<int>());
        if (guest["protection"] == "foreign")
            name = "(of user " + std::to_string(guest["user"].get<uid_t>()) + ")";
        if (guest["protection"] != "leased")
            rows.push_back({name, pid, "-", "-", guest["protection"]});
        else if (guest["leases"].empty())
            rows.push_back({name, pid, "(no images)"});
        for (const Json& lease : guest["leases"])
            rows.push_back({name, pid, lease["path"], useOf(lease), lease["state"], lease["medium"], scopeOf(lease),
                            lease["since"].is_null() ? "unknown" : lease["since"].get<std::string>()});
        for (const Json& file : guest["unleased"]) // of null: none
            rows.push_back({name, pid, file, "backing file", "no lease"});
    }
    if (rows.size() > 1)
        printTable(rows, 4, [](const std::string& cell) { return colourOf(cell); });
    else
        std::cerr << (notSeen.empty() ? "no guests\n" : "no guests that can be seen\n");
    // Not among what scripts read.
    std::cout.flush();
    for (const std::string& note : notes)
        std::cerr << "leasehold: " << os::printable(note) << '\n';
    for (const Json& blind : notSeen)
        std::cerr << "leasehold: not seen: " << os::printable(blind.get<std::string>()) << '\n';
}

Json labelsOf(const Json& guest) {
    return {{"guest", guest["guest"]}, {"uuid", guest["uuid"]}, {"pid", guest["pid"]}};
}

void printForPrometheus(const Json& guests, bool seesAll) {
    Metrics metrics;
    metrics.begin("leasehold_guest", "Guests of this host, by how they are protected.");
    for (const Json& guest : guests) {
        if (guest["protection"] == "foreign") // what it is called it says itself
            continue;
        Json labels = labelsOf(guest);
        labels["protection"] = guest["protection"];
        metrics.add(labels, 1);
    }
    metrics.begin("leasehold_guest_runs_without_lease", "1 if the guest runs although its lease was handed over.");
    for (const Json& guest : guests)
        if (guest["protection"] != "foreign")
            metrics.add(labelsOf(guest), guest["runs_without_lease"].get<bool>());
    metrics.begin("leasehold_lease", "Leases of the guests of this host.");
    for (const Json& guest : guests)
        for (const Json& lease : guest["leases"]) {
            Json labels = labelsOf(guest);
            for (const char* name : {"path", "mode", "state", "medium"})
                labels[name] = lease[name];
            labels["scope"] = scopeOf(lease);
            metrics.add(labels, 1);
        }
    metrics.begin("leasehold_sees_all", "0 if there may be guests that who asked may not look at.");
    metrics.add(Json::object(), seesAll);
    std::cout << metrics.text();
}

} // namespace

int status(const Words& arguments) {
    bool json = false, prometheus = false;
    int timeout = kStorageTimeout;
    Options options(
        "status", "[GUEST]",
        "Lists the guests of this host with their leases, read from where they are kept: in QEMU. GUEST is\n"
        "a name or a UUID. QEMUs that keep no leases are named.");
    options.add("json", json, "Print JSON");
    options.add("prometheus", prometheus, "Print Prometheus' text format");
    options.add("timeout", timeout, "How long storage may take to answer (10)", 1);
    Words operands = options.parse(arguments);
    if (operands.size() > 1)
        throw UsageError("one guest at a time; see leasehold status --help");
    if (json && prometheus)
        throw UsageError("--json or --prometheus, not both");

    (void)allowManyDescriptors();
    const bool mayHang = storage::hostHasRemoteMounts();
    StorageFacts facts(mayHang, timeout);
    Json guests = Json::array();
    HostView host = findGuests();
    for (GuestView& guest : host.guests) {
        if (!operands.empty() && guest.tag.name != operands[0] && lease::formatUuid(guest.tag.uuid) != operands[0])
            continue;
        Json found = guestToJson(guest, facts, mayHang, timeout);
        if (found["protection"] != "gone")
            guests.push_back(std::move(found));
    }
    if (!operands.empty() && guests.empty())
        throw Error(Fault::invalid, "no guest '" + operands[0] + "' runs on this host" +
                                        (host.blindSpots.empty() ? "" : ", as far as can be seen") +
                                        "; leasehold status lists them");
    findRunningWithoutLease(guests);

    const Json notSeen = host.blindSpots;
    if (json)
        printJson({{"guests", guests}, {"not_seen", notSeen}});
    else if (prometheus)
        printForPrometheus(guests, notSeen.empty());
    else
        printForPeople(guests, notSeen);
    bool fine = notSeen.empty() && std::all_of(guests.begin(), guests.end(), [](const Json& guest) {
                    return explain(guest).empty() && !isIncomplete(guest);
                });
    return fine ? kDone : kWarnings;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold inspect IMAGE...

#include "core/inspect.hpp"
#include "core/os/text.hpp"
#include "tools/options.hpp"
#include "tools/output.hpp"
#include "tools/storage.hpp"

#include <array>
#include <iostream>

namespace leasehold::tools {

namespace {

Json toJson(const ProcessName& name) {
    return {{"pid", name.pid > 0 ? Json(name.pid) : Json()},
            {"command", orNull(name.command)},
            {"guest", orNull(name.guest)}};
}

const char* nameOf(LeaseView::Source source) {
    switch (source) {
    case LeaseView::Source::vessel:
        return "vessel";
    case LeaseView::Source::record:
        return "record";
    case LeaseView::Source::olderRecord:
        return "older-record";
    case LeaseView::Source::nobody:
        break;
    }
    return "nobody";
}

Json toJson(const LeaseView& lease) {
    bool named = lease.source != LeaseView::Source::nobody;
    return {{"mode", modeName(lease.mode)},
            {"state", describe(lease.state)},
            {"backing", lease.lower},
            {"layer", lease.layer.empty() ? Json() : Json(lease.layer)},
            {"incarnation", os::hexadecimal(lease.incarnation)},
            {"named_by", nameOf(lease.source)},
            {"guest", orNull(lease.guest)},
            {"uuid", named ? Json(lease::formatUuid(lease.uuid)) : Json()},
            {"host", orNull(lease.host)},
            {"pid", lease.pid > 0 ? Json(lease.pid) : Json()},
            {"since", timeToJson(lease.since)}};
}

Json toJson(const lease::OwnerRecord& record, bool current) {
    return {{"current", current},
            {"guest", orNull(record.domain)},
            {"uuid", lease::formatUuid(record.uuid)},
            {"incarnation", os::hexadecimal(record.incarnation)},
            {"host", orNull(record.host)},
            {"pid", record.pid},
            {"mode", modeName(record.mode)},
            {"since", timeToJson(record.since)}};
}

Json toJson(const QemuView& qemu) {
    Json json = toJson(qemu.who);
    json["elsewhere"] = qemu.elsewhere;
    json["uses"] = json["does_not_share"] = Json::array();
    json["bytes"] = qemu.bytes;
    for (std::int64_t byte : qemu.bytes)
        json[byte < qemu::kDeniesBase ? "uses" : "does_not_share"].push_back(permissionOf(byte));
    return json;
}

Json toJson(const LockView& view) {
    constexpr std::array kTypes{"ofd", "posix", "flock", "lease", "delegation"};
    constexpr std::array kPurposes{"libvirt-labels", "virtlockd", "other"};
    Json json = toJson(view.holder);
    json["elsewhere"] = view.elsewhere;
    json["type"] = kTypes[static_cast<std::size_t>(view.lock.kind)];
    json["access"] = view.lock.type == os::LockType::read ? "read" : "write";
    json["start"] = view.lock.range.start;
    json["length"] = view.lock.range.length;
    json["waiting"] = view.lock.waiting;
    json["purpose"] = kPurposes[static_cast<std::size_t>(view.purpose)];
    return json;
}

template <typename View>
Json listToJson(const std::vector<View>& views) {
    Json list = Json::array();
    for (const View& view : views)
        list.push_back(toJson(view));
    return list;
}

Json toJson(const ImageView& image) {
    constexpr std::array kKinds{"file", "block", "directory"};
    return {{"path", image.path},
            {"error", nullptr},
            {"target", image.target},
            {"kind", kKinds[static_cast<std::size_t>(image.kind)]},
            {"storage", storageToJson(image.storage)},
            {"lease_file", orNull(image.leaseFile)},
            {"leases", listToJson(image.leases)},
            {"record", image.record ? toJson(*image.record, image.recordCurrent) : Json()},
            {"foreign_mark", image.foreignMark},
            {"qemu", listToJson(image.qemu)},
            {"locks", listToJson(image.locks)},
            {"open_without_lock", listToJson(image.openers)},
            {"qemu_reader", orNull(image.reader)},
            {"qemu_writer", orNull(image.writer)},
            {"not_seen", image.blindSpots},
            {"next", adviseOn(image)}};
}

// For people, from the same JSON.

std::string text(const Json& value) {
    return os::printable(orEmpty(value));
}

std::string join(const Json& words) {
    std::string list;
    for (const Json& word : words)
        list += (list.empty() ? "" : ", ") + text(word);
    return list;
}

void line(const char* label, const std::string& words, Colour colour = Colour::none) {
    std::cout << "  " << paint(Colour::bold, label) << std::string(10 - std::string_view(label).size(), ' ')
              << paint(colour, words) << '\n';
}

std::string describeHolder(const Json& who) {
    if (who["elsewhere"].get<bool>())
        return "a program on another host";
    if (who["pid"].is_null())
        return "a program that may not be looked at";
    constexpr std::size_t kMax = 100;
    std::string command = text(who["command"]);
    // Cut between characters, not within one.
    if (command.size() > kMax)
        command = os::printable(command.substr(0, kMax)) + "...";
    std::string guest = text(who["guest"]);
    return (guest.empty() ? "" : "guest '" + guest + "', ") + "pid " + std::to_string(who["pid"].get<int>()) + ": " +
           command;
}

std::string describeLease(const Json& lease, bool ofThisHost) {
    std::string by = lease["named_by"], who;
    if (by == "nobody")
        who = std::string("a guest ") +
              (ofThisHost ? "of this host that could not be looked at"
                          : "on another host, or of another user, that left no record") +
              " (incarnation " + text(lease["incarnation"]) + ")";
    else
        who = "guest '" + text(lease["guest"]) + "' (UUID " + text(lease["uuid"]) +
              (by == "older-record" ? ", last recorded as pid " : ", pid ") +
              (lease["pid"].is_null() ? "unknown" : std::to_string(lease["pid"].get<int>())) + " on host '" +
              text(lease["host"]) + "')";
    std::string since = lease["since"].is_null() ? "" : ", since " + text(lease["since"]);
    if (!lease["layer"].is_null())
        return who + ", using " + text(lease["layer"]) + ", " + text(lease["state"]) + since;
    return who + ", " + text(lease["mode"]) + (lease["backing"].get<bool>() ? ", as a backing file, " : ", ") +
           text(lease["state"]) + since;
}

std::string describeLock(const Json& lock) {
    std::int64_t start = lock["start"], length = lock["length"];
    std::string range = start == 0 && length == 0 ? "whole file"
                        : length == 1             ? "byte " + std::to_string(start)
                        : length == 0             ? "from byte " + std::to_string(start) + " on"
                                      : "bytes " + std::to_string(start) + "-" + std::to_string(start + (length - 1));
    std::string purpose = lock["purpose"] == "libvirt-labels" ? " (as libvirt does while it relabels)"
                          : lock["purpose"] == "virtlockd"    ? " (as virtlockd does)"
                                                              : "";
    return text(lock["type"]) + " " + text(lock["access"]) + " lock, " + range + purpose + ", " + describeHolder(lock);
}

void print(const Json& image) {
    std::string path = text(image["path"]), target = text(image["target"]);
    std::cout << paint(Colour::bold, path) << (path == target || target.empty() ? "" : " -> " + target) << '\n';
    if (!image["error"].is_null()) {
        line("error", text(image["error"]), Colour::red);
        return;
    }
    line("storage", describeStorage(image["storage"]));
    for (const Json& lease : image["leases"])
        line("lease", describeLease(lease, image["storage"]["scope"] == "this-host"), Colour::yellow);
    if (image["foreign_mark"].get<bool>())
        line("lease", "a program that is not leasehold locks the bytes that leases are made of", Colour::red);
    if (image["leases"].empty())
        line("lease", "none", Colour::green);
    const Json& record = image["record"];
    if (!record.is_null() && !record["current"].get<bool>())
        line("record", "stale: guest '" + text(record["guest"]) + "' (UUID " + text(record["uuid"]) + ", pid " +
                           std::to_string(record["pid"].get<int>()) + " on host '" + text(record["host"]) +
                           "') had it" + (record["since"].is_null() ? "" : " from " + text(record["since"]) + " on"));
    for (const Json& qemu : image["qemu"]) {
        std::string denies = join(qemu["does_not_share"]);
        line("QEMU", describeHolder(qemu) + "; uses: " + (qemu["uses"].empty() ? "nothing" : join(qemu["uses"])) +
                         (denies.empty() ? "; shares all" : "; does not share: " + denies));
    }
    for (const Json& lock : image["locks"])
        line(lock["waiting"].get<bool>() ? "waits" : "lock", describeLock(lock));
    for (const Json& opener : image["open_without_lock"]) {
        Json here = opener;
        here["elsewhere"] = false;
        line("open", describeHolder(here) + ", without a lock");
    }
    for (const char* use : {"reader", "writer"}) {
        std::string answer = text(image[std::string("qemu_") + use]);
        line(use, answer.empty() ? "QEMU would open it" : "QEMU would say: " + answer,
             answer.empty() ? Colour::green : Colour::yellow);
    }
    for (const Json& blind : image["not_seen"])
        line("not seen", text(blind));
    for (const Json& advice : image["next"])
        line("next", text(advice));
}

Json look(const std::string& image, const Settings& settings, const Processes& processes) {
    std::optional<Place> place;
    auto problem = attempt([&] { place = findPlace({.path = image, .mode = lease::Mode::readOnly}, settings); });
    ImageView view = inspectImage(image, place ? &*place : nullptr, processes, settings.storageLocks);
    Json storage = leaseToJson(image, settings);
    if (storage["lease"] == "none")
        view.unleasable = orEmpty(storage["note"]);
    else if (problem)
        view.blindSpots.push_back("where its lease is: " + *problem);
    Json seen = toJson(view);
    seen["storage"] = storage;
    return seen;
}

} // namespace

int inspect(const Words& arguments) {
    bool json = false;
    int timeout = kStorageTimeout;
    std::string config = LEASEHOLD_CONF;
    Options options("inspect", "IMAGE...",
                    "Says who uses each image: leases with names, QEMU's own locks in words, all other locks with\n"
                    "their processes, what QEMU would say to a reader and to a writer, and what to do next.");
    options.add("json", json, "Print JSON");
    options.add("timeout", timeout, "How long storage may take to answer (10)", 1);
    options.add("config", config, "Another configuration (" LEASEHOLD_CONF ")", "FILE");
    Words images = options.parse(arguments);
    if (images.empty())
        throw UsageError("which image? See leasehold inspect --help");
    Settings settings = loadSettings(config);
    bool failed = false;
    Json all = Json::array();
    std::optional<Processes> processes; // in the process that looks
    auto lookAt = [&](std::size_t i) {
        if (!processes)
            processes = lookAtProcesses();
        return look(images[i], settings, *processes);
    };
    auto take = [&](std::size_t i, const EachAnswer& each) {
        const std::string& image = images[i];
        Json seen = each.problem ? Json{{"path", image}, {"target", nullptr}, {"error", *each.problem}} : each.answer;
        failed = failed || each.problem;
        if (!json)
            print(seen);
        all.push_back(std::move(seen));
    };
    askEachStorage(images, timeout, lookAt, take);
    if (json)
        printJson({{"images", all}});
    return failed ? kFailed : kDone;
}

} // namespace leasehold::tools

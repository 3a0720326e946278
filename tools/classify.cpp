// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold classify PATH...

#include "core/inspect.hpp"
#include "core/os/text.hpp"
#include "core/settings.hpp"
#include "tools/options.hpp"
#include "tools/storage.hpp"

#include <iostream>

#include <sys/stat.h>

namespace leasehold::tools {

const char* modeName(lease::Mode mode) {
    return mode == lease::Mode::exclusive ? "exclusive" : mode == lease::Mode::shared ? "shared" : "read-only";
}

Json storageToJson(const storage::Storage& storage) {
    bool none = storage.lock == storage::LockKind::none;
    return {{"name", storage.name},
            {"lease", none                                       ? "none"
                      : storage.lock == storage::LockKind::flock ? "file-set"
                                                                 : "byte-range"},
            {"scope", none                                        ? Json()
                      : storage.scope == storage::Scope::allHosts ? Json("all-hosts")
                                                                  : Json("this-host")},
            {"readers", none && storage.readersMayStay ? Json("this-host") : Json()},
            {"note", orNull(storage.reason)}};
}

std::string describeStorage(const Json& storage) {
    std::string name = os::printable(storage["name"].get<std::string>()),
                note = os::printable(orEmpty(storage["note"]));
    if (storage["lease"] == "none")
        return name + ": no lease can be taken; " + note +
               (storage["readers"].is_null() ? "" : "; a <readonly/> disk is leased on this host only");
    std::string where = !storage.contains("where")   ? ""
                        : storage["where"].is_null() ? ", on the image"
                                                     : " in " + os::printable(storage["where"].get<std::string>());
    return name + ": leases hold for " + (storage["scope"] == "all-hosts" ? "all hosts" : "this host") + " (" +
           storage["lease"].get<std::string>() + where + ")" + (note.empty() ? "" : "; " + note);
}

Json leaseToJson(const std::string& path, const Settings& settings, lease::Mode mode) {
    storage::Storage storage = classifyPath(path, settings.storageLocks);
    Json found = storageToJson(storage);
    if (settings.requireClusterLeases)
        found["readers"] = nullptr;
    struct stat status;
    const bool there = stat(path.c_str(), &status) == 0;
    if (!there && errno != ENOENT)
        throw SystemError(errno, "stat", path);
    if (!there || S_ISDIR(status.st_mode))
        return found; // of what is in it
    Place place;
    // A refusal says more than the storage alone.
    if (auto refusal = attempt([&] { place = findPlace({.path = path, .mode = mode}, settings); })) {
        found["lease"] = "none";
        found["scope"] = nullptr;
        found["note"] = *refusal;
        return found;
    }
    if (place.storage.name.empty())
        return found; // its lockspace is made with the first lease
    found["readers"] = nullptr;
    const os::Fd& opened = place.stored.directory.open() ? place.stored.directory : place.stored.lease;
    bool elsewhere = !place.stored.onImage();
    found["lease"] = !elsewhere                                       ? "byte-range"
                     : place.storage.lock == storage::LockKind::flock ? "file-set"
                                                                      : "lease-file";
    found["scope"] = place.storage.scope == storage::Scope::allHosts ? "all-hosts" : "this-host";
    found["where"] = elsewhere && opened.open() ? Json(os::pathOf(opened.get(), "")) : Json();
    if (!place.caution.empty())
        found["note"] = place.caution;
    return found;
}

int classify(const Words& arguments) {
    bool json = false;
    int timeout = kStorageTimeout;
    std::string config = LEASEHOLD_CONF;
    Options options("classify", "PATH...",
                    "Says what storage each path is on, which lock a lease there is made of, whom it keeps out, and\n"
                    "what it cannot promise.");
    options.add("json", json, "Print JSON");
    options.add("timeout", timeout, "How long storage may take to answer (10)", 1);
    options.add("config", config, "Another configuration (" LEASEHOLD_CONF ")", "FILE");
    Words paths = options.parse(arguments);
    if (paths.empty())
        throw UsageError("which path? See leasehold classify --help");
    Settings settings = loadSettings(config);
    int result = kDone;
    Json all = Json::array();
    auto print = [&](std::size_t i, const EachAnswer& each) {
        const std::string& path = paths[i];
        Json found = each.problem ? Json{{"error", *each.problem}} : each.answer;
        bool none = !each.problem && found["lease"] == "none";
        if (each.problem)
            result = kFailed;
        else if (none && result == kDone)
            result = kProblems;
        Colour colour = each.problem ? Colour::red : none ? Colour::yellow : Colour::green;
        if (!json)
            std::cout << paint(Colour::bold, os::printable(path)) << ": "
                      << paint(colour, each.problem ? os::printable(*each.problem) : describeStorage(found)) << '\n';
        Json entry{{"path", path}, {"error", nullptr}};
        entry.update(found);
        all.push_back(std::move(entry));
    };
    askEachStorage(
        paths, timeout, [&](std::size_t i) { return leaseToJson(paths[i], settings); }, print);
    if (json)
        printJson({{"paths", all}});
    return result;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold classify PATH...

#include "core/inspect.hpp"
#include "core/os/text.hpp"
#include "tools/options.hpp"
#include "tools/storage.hpp"

#include <iostream>

namespace leasehold::tools {

const char* modeName(lease::Mode mode) {
    return mode == lease::Mode::exclusive ? "exclusive" : mode == lease::Mode::shared ? "shared" : "read-only";
}

Json storageToJson(const storage::Storage& storage) {
    bool none = storage.lock == storage::LockKind::none;
    return {{"name", storage.name},
            {"lease", none ? "none" : "byte-range"},
            {"scope", none                                        ? Json()
                      : storage.scope == storage::Scope::allHosts ? Json("all-hosts")
                                                                  : Json("this-host")},
            {"note", storage.reason}};
}

std::string describeStorage(const Json& storage) {
    std::string name = os::printable(storage["name"].get<std::string>()),
                note = os::printable(storage["note"].get<std::string>());
    if (storage["lease"] == "none")
        return name + ": no lease can be taken; " + note;
    return name + ": leases hold for " + (storage["scope"] == "all-hosts" ? "all hosts" : "this host") + " (" +
           storage["lease"].get<std::string>() + " locks)" + (note.empty() ? "" : "; " + note);
}

int classify(const Words& arguments) {
    bool json = false;
    int timeout = kStorageTimeout;
    Options options("classify", "PATH...",
                    "Says what storage each path is on, which lock a lease there is made of, whom it keeps out, and\n"
                    "what it cannot promise.");
    options.add("json", json, "Print JSON");
    options.add("timeout", timeout, "How long storage may take to answer (10)");
    Words paths = options.parse(arguments);
    if (paths.empty())
        throw UsageError("which path? See leasehold classify --help");
    int result = kDone;
    Json all = Json::array();
    for (const std::string& path : paths) {
        Json found;
        auto problem =
            attempt([&] { found = askWithin(timeout, {}, [&] { return storageToJson(classifyPath(path)); }); });
        if (problem) {
            found = {{"error", *problem}};
            result = kFailed;
        } else if (found["lease"] == "none" && result == kDone) {
            result = kProblems;
        }
        Colour colour = problem ? Colour::red : found["lease"] == "none" ? Colour::yellow : Colour::green;
        if (!json)
            std::cout << paint(Colour::bold, os::printable(path)) << ": "
                      << paint(colour, problem ? os::printable(*problem) : describeStorage(found)) << '\n';
        Json entry{{"path", path}};
        entry.update(found);
        all.push_back(std::move(entry));
    }
    if (json)
        printJson({{"paths", all}});
    return result;
}

} // namespace leasehold::tools

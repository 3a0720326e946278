// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Tests of the whole engine that hold wherever the leases of an image are.

#include "tests/support/sanitizers.hpp"
#include "tests/support/unit_engine.hpp"

#include <filesystem>

namespace leasehold::unit {

// Where the leases of an image are.
struct Where {
    const char* name;
    Configure configure;
};

inline Settings lockspaceIn(const TempDir& dir) {
    Settings settings;
    settings.fileLockspaceDir = dir.path("lockspace");
    std::filesystem::create_directory(settings.fileLockspaceDir);
    std::filesystem::permissions(settings.fileLockspaceDir, std::filesystem::perms::owner_all);
    return settings;
}

inline auto everywhere() {
    return testing::Values(
        Where{"OnTheImage", [](const TempDir&) { return Settings{}; }}, Where{"InALockspace", lockspaceIn},
        Where{"FilesBesideTheImage",
              [](const TempDir& dir) {
                  Settings settings;
                  settings.storageLocks = {{dir.path(), storage::LockKind::flock, storage::Scope::allHosts}};
                  return settings;
              }},
        Where{"FilesInALockspace", [](const TempDir& dir) {
                  Settings settings = lockspaceIn(dir);
                  settings.storageLocks = {
                      {settings.fileLockspaceDir, storage::LockKind::flock, storage::Scope::allHosts}};
                  return settings;
              }});
}

inline std::string nameOfWhere(const testing::TestParamInfo<Where>& info) {
    return info.param.name;
}

// Of the places where a process dies or a call fails: each, or every so manieth. With AddressSanitizer each takes ten
// times as long, and is the same: there it is what comes after it that is looked at.
inline int placesPerTry() {
    return support::kAddressSanitizer && !isLongRun() ? 7 : 1;
}

class EngineWithMedia : public EngineTest, public testing::WithParamInterface<Where> {
protected:
    explicit EngineWithMedia(const std::string& parent = "/tmp") : EngineTest(GetParam().configure, parent) {}

    using Answer = std::string; // "" is granted
    static Answer answerOf(const Engine::Answer& answer) { return answer.value_or(""); }

    // A libvirtd that was just started makes the call: which is another one, with another number. Gives what it
    // refuses or throws.
    Answer inNewLibvirtd(const std::function<Answer(const Engine&)>& call) const {
        Child libvirtd([&](Line&) {
            Engine fresh(settings, [](const std::string&) {});
            Answer answer = call(fresh);
            if (!answer.empty())
                throw std::runtime_error(answer);
        });
        return libvirtd.join();
    }

    // The guest is suspended and runs again.
    static Answer pauseAndRun(const Engine& engine, const Guest& guest, const std::vector<Resource>& disks) {
        try {
            return answerOf(engine.acquire(guest, disks, engine.release(guest, disks)));
        } catch (const Error& error) {
            return std::string("thrown: ") + error.what();
        }
    }

    // The kinds of marks that are up, as somebody sees who has nothing to do with them: of the lease, and of its
    // companion.
    std::string marksOf(const std::string& path) const {
        static constexpr const char* kNames[] = {"owner",   "sharedOwner", "exclusive", "shared", "reading",
                                                 "handoff", "leaving",     "taken",     "foreign"};
        lease::Incarnation stranger{12345, lease::drawId()};
        Place place = openPlace(Resource{.path = path}, stranger, settings);
        std::optional<std::string> words;
        visitParts(place.stored, [&](const qemu::StoredLease& part) {
            std::set<std::string> kinds;
            for (const lease::Mark& mark : AnyMedium(part, stranger)->look())
                kinds.insert(kNames[static_cast<std::size_t>(mark.kind)]);
            std::string here;
            for (const std::string& kind : kinds)
                here += (here.empty() ? "" : " ") + kind;
            if (!words)
                words = here;
            else if (*words != here)
                *words += " but the companion: " + here;
        });
        return *words;
    }

    // What the guest has of the file: "free", "exclusive", "shared" or "reading" where vessel and marks agree, and
    // what each says where they do not.
    std::string leaseOf(const StandIn& qemu, const Guest& guest, const std::string& path) const {
        auto vessel = qemu::Vessel::retrieve(qemu.process(), guest.uuid);
        if (!vessel)
            return "there is no vessel";
        if (vessel->disordered())
            return "the vessel is disordered";
        std::string said = "free", marks = marksOf(path);
        os::FileId file;
        if (os::tryIdentify(path, file) != 0)
            return "there is no file";
        for (const qemu::StoredLease& lease : vessel->leases())
            if (lease.file == file)
                said = std::string(lease.mode == Mode::exclusive ? "exclusive"
                                   : lease.mode == Mode::shared  ? "shared"
                                                                 : "reading") +
                       (lease.stage == qemu::Stage::changing ? ", changing" : "");
        std::string due = said == "free" ? "" : said == "exclusive" ? "exclusive owner" : said;
        std::string up = marks == "owner reading" ? "reading" : marks;
        return up == due || (said == "shared" && up == "shared sharedOwner")
                   ? said
                   : "the vessel says " + said + ", marks are: " + marks;
    }

    using Mode = lease::Mode;
};

} // namespace leasehold::unit

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// Guests for tests of the whole engine. Registrations happen in a child that becomes a stand-in for QEMU, all other
// calls in the test itself, which plays libvirtd.

#include "core/engine.hpp"
#include "tests/support/unit_support.hpp"

#include <set>
#include <stdexcept>

namespace leasehold::unit {

// What the settings are may depend on where the test has its directory.
using Configure = std::function<Settings(const TempDir&)>;

class EngineTest : public LeavesNoDescriptor {
protected:
    explicit EngineTest(
        const Configure& configure = [](const TempDir&) { return Settings{}; }, const std::string& parent = "/tmp")
        : dir(parent), settings(configure(dir)) {}

    static Guest named(const std::string& name, unsigned char number) {
        Guest guest;
        guest.name = name;
        guest.uuid[15] = number;
        return guest;
    }

    // A QEMU that registered. Throws the refusal as text.
    struct Qemu : StandIn {
        Qemu(const Engine& engine, Guest& guest, const std::vector<Resource>& images)
            : StandIn([&] {
                  guest.pid = getpid();
                  if (auto refusal = engine.registerGuest(guest, images))
                      throw std::runtime_error(*refusal);
              }) {
            guest.pid = pid();
            for (const Resource& each : images)
                if (!each.named)
                    each.mode == lease::Mode::readOnly ? reads(each.path) : writes(each.path);
        }
    };

    Qemu start(Guest& guest, const std::vector<Resource>& images) const { return Qemu(engine, guest, images); }

    std::string refusalOf(Guest guest, const std::vector<Resource>& images) const {
        try {
            Qemu qemu = start(guest, images);
            return "granted";
        } catch (const std::runtime_error& error) {
            return error.what();
        }
    }

    // How many resources the QEMU keeps leases of; a lease may have a companion.
    std::size_t storedFor(const StandIn& qemu, const Guest& guest) const {
        std::set<os::FileId> files;
        auto vessel = qemu::Vessel::retrieve(qemu.process(), guest.uuid);
        for (const auto& lease : vessel->leases())
            files.insert(lease.file);
        return files.size();
    }

    // Whether the owner mark is kept from a stranger, wherever the lease lives.
    bool held(const Resource& resource) const {
        lease::Incarnation stranger{12345, lease::drawId()};
        Place place = openPlace(resource, stranger, settings);
        AnyMedium medium(place.stored, stranger);
        return medium->tryPlace({lease::MarkKind::owner, 0, 0}, os::LockType::write) == os::LockOutcome::contended;
    }
    bool held(const std::string& path) const { return held(Resource{.path = path}); }

    // The leases of this host are not those of the real one.
    static const Settings& inDirectory(Settings& settings, const TempDir& dir) {
        if (settings.hostLockspaceDir == Settings().hostLockspaceDir)
            settings.hostLockspaceDir = dir.path("host");
        return settings;
    }

    TempDir dir;
    std::string image = dir.file("disk.img"), second = dir.file("second.img");
    Settings settings;
    std::vector<std::string> warnings;
    Engine engine{inDirectory(settings, dir), [this](const std::string& text) { warnings.push_back(text); }};
    Guest web = named("web", 1), mail = named("mail", 2), db = named("db", 3);
};

} // namespace leasehold::unit

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/libvirt.hpp"

#include "core/os/fd.hpp"

#include <cstdlib>
#include <cstring>
#include <memory>

#include <glib.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

namespace leasehold::tools {

namespace {

using Connection = std::unique_ptr<virConnect, decltype(&virConnectClose)>;
using Domain = std::unique_ptr<virDomain, decltype(&virDomainFree)>;

[[noreturn]] void unreachable() {
    throw Error(Fault::system, std::string("libvirt does not answer: ") + virGetLastErrorMessage());
}

enum class Rights { look, act };

Connection connect(Rights rights = Rights::look) {
    virSetErrorFunc(nullptr, [](void*, virErrorPtr) {}); // by default it prints them
    auto open = rights == Rights::act ? virConnectOpen : virConnectOpenReadOnly;
    Connection connection(open("qemu:///system"), virConnectClose);
    if (!connection)
        unreachable();
    return connection;
}

std::vector<Domain> listDomains(const Connection& connection, unsigned flags) {
    virDomainPtr* list = nullptr;
    int count = virConnectListAllDomains(connection.get(), &list, flags);
    if (count < 0)
        unreachable();
    std::vector<Domain> domains;
    domains.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; i++)
        domains.emplace_back(list[i], virDomainFree);
    free(list);
    return domains;
}

Json uuidsOf(unsigned flags) {
    Json uuids = Json::array();
    Connection connection = connect();
    for (const Domain& domain : listDomains(connection, flags)) {
        char uuid[VIR_UUID_STRING_BUFLEN];
        if (virDomainGetUUIDString(domain.get(), uuid) == 0)
            uuids.push_back(uuid);
    }
    return uuids;
}

// Of a domain's XML: the disks, whose top images are what a lock manager hears of, and on_lockfailure.
struct DomainReader {
    Json disks = Json::array();
    std::string onLockFailure;
    std::vector<std::string> path; // the elements that are open

    explicit DomainReader(const char* xml) {
        GMarkupParser parser{};
        parser.start_element = open;
        parser.end_element = close;
        parser.text = read;
        std::unique_ptr<GMarkupParseContext, decltype(&g_markup_parse_context_free)> context(
            g_markup_parse_context_new(&parser, static_cast<GMarkupParseFlags>(0), this, nullptr),
            g_markup_parse_context_free);
        (void)g_markup_parse_context_parse(context.get(), xml, -1, nullptr);
    }

    static void open(GMarkupParseContext*, const char* element, const char** names, const char** values, void* self,
                     GError**) {
        auto& reader = *static_cast<DomainReader*>(self);
        bool disk = reader.path.size() == 2 && reader.path[1] == "devices" && !strcmp(element, "disk");
        bool source = reader.path.size() == 3 && reader.path[2] == "disk" && !strcmp(element, "source");
        reader.path.emplace_back(element);
        for (; *names; names++, values++) {
            std::string_view name = *names;
            if (disk && name == "type")
                reader.disks.push_back({{"type", *values}, {"path", ""}});
            else if (source && !reader.disks.empty() && (name == "file" || name == "dev" || name == "dir"))
                reader.disks.back()["path"] = *values;
        }
    }
    static void close(GMarkupParseContext*, const char*, void* self, GError**) {
        static_cast<DomainReader*>(self)->path.pop_back();
    }
    static void read(GMarkupParseContext*, const char* text, gsize size, void* self, GError**) {
        auto& reader = *static_cast<DomainReader*>(self);
        if (reader.path.size() == 2 && reader.path[1] == "on_lockfailure")
            reader.onLockFailure.append(text, size);
    }
};

std::string lastError() {
    return virGetLastErrorMessage();
}

using Text = std::unique_ptr<char, decltype(&free)>;

Text describe(const Domain& domain, unsigned flags = 0) {
    return {virDomainGetXMLDesc(domain.get(), flags), free};
}

// The process that libvirt takes for the guest's QEMU: it writes that down where only root can (virPidFileBuildPath).
// No public API tells.
pid_t qemuOf(const Domain& domain) {
    std::string file = std::string("/run/libvirt/qemu/") + virDomainGetName(domain.get()) + ".pid";
    return static_cast<pid_t>(std::strtol(os::readFileIfPossible(file, 32).value_or("").c_str(), nullptr, 10));
}

// Off and on again: with its configuration of today where it has one, as libvirt does at a restart.
std::string restart(const Connection& connection, const Domain& domain) {
    Text xml = describe(domain, VIR_DOMAIN_XML_SECURE);
    bool persistent = virDomainIsPersistent(domain.get()) == 1;
    if (virDomainDestroy(domain.get()) < 0)
        throw Error(Fault::system, "it could not be powered off: " + lastError());
    Domain transient(persistent || !xml ? nullptr : virDomainCreateXML(connection.get(), xml.get(), 0), virDomainFree);
    bool runs = persistent ? virDomainCreate(domain.get()) == 0 : transient != nullptr;
    return runs ? "it was started anew" : "it was powered off, and could not be started again: " + lastError();
}

// What was done, and whether anything was.
struct Deed {
    std::string text;
    bool did = true;
};

Deed perform(const Connection& connection, const Domain& domain, const std::string& action) {
    if (action == "ignore")
        return {"it goes on as if nothing had happened", false};
    if (action == "restart")
        return {restart(connection, domain)};
    if (action == "poweroff") {
        if (virDomainDestroy(domain.get()) < 0)
            throw Error(Fault::system, "it could not be powered off: " + lastError());
        return {"it was powered off"};
    }
    int state = VIR_DOMAIN_NOSTATE;
    if (virDomainGetState(domain.get(), &state, nullptr, 0) == 0 && state != VIR_DOMAIN_RUNNING)
        return {"it does not run, and will not be let resume", false};
    if (virDomainSuspend(domain.get()) < 0)
        throw Error(Fault::system, "it could not be paused: " + lastError());
    return {"it was paused"};
}

} // namespace

Json listRunningGuests() {
    return uuidsOf(VIR_CONNECT_LIST_DOMAINS_RUNNING);
}

Json listActiveGuests() {
    return uuidsOf(VIR_CONNECT_LIST_DOMAINS_ACTIVE);
}

Json describeLibvirt() {
    Connection connection = connect();
    unsigned long version = 0;
    if (virConnectGetLibVersion(connection.get(), &version) < 0)
        unreachable();
    Json guests = Json::array();
    for (const Domain& domain : listDomains(connection, 0)) {
        // One that was undefined meanwhile has no XML.
        if (Text xml = describe(domain))
            guests.push_back({{"name", virDomainGetName(domain.get())}, {"disks", DomainReader(xml.get()).disks}});
    }
    return {{"version", version}, {"guests", guests}};
}

bool isFailureAction(std::string_view word) {
    return word == "poweroff" || word == "restart" || word == "pause" || word == "ignore";
}

Json respondToLoss(const std::string& uuid, pid_t pid, const std::string& fallback, bool dryRun) {
    Connection connection = connect(Rights::act);
    Domain domain(virDomainLookupByUUIDString(connection.get(), uuid.c_str()), virDomainFree);
    if (!domain || qemuOf(domain) != pid)
        throw Error(Fault::invalid, "libvirt does not know process " + std::to_string(pid) +
                                        " as the QEMU of a guest with this UUID: see who it is, and end it");
    Text xml = describe(domain);
    std::string asked = xml ? DomainReader(xml.get()).onLockFailure : "";
    bool known = isFailureAction(asked);
    std::string action = known ? asked : fallback;
    Deed deed = dryRun ? Deed{"nothing was done (--dry-run)", false} : perform(connection, domain, action);
    return {{"action", action}, {"asked_by", known ? "guest" : "default"}, {"did", deed.did}, {"text", deed.text}};
}

} // namespace leasehold::tools

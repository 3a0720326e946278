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
        bool readonly = reader.path.size() == 3 && reader.path[2] == "disk" && !strcmp(element, "readonly");
        if (readonly && !reader.disks.empty())
            reader.disks.back()["readonly"] = true;
        reader.path.emplace_back(element);
        for (; *names; names++, values++) {
            std::string_view name = *names;
            if (disk && name == "type")
                reader.disks.push_back({{"type", *values}, {"path", ""}, {"readonly", false}});
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

// Nothing if libvirt knows none.
Domain tryFindDomain(const Connection& connection, const std::string& uuid) {
    Domain domain(virDomainLookupByUUIDString(connection.get(), uuid.c_str()), virDomainFree);
    if (!domain && virGetLastErrorCode() != VIR_ERR_NO_DOMAIN)
        unreachable();
    return domain;
}

Domain findDomain(const Connection& connection, const std::string& uuid) {
    Domain domain = tryFindDomain(connection, uuid);
    if (!domain)
        throw Error(Fault::invalid,
                    "libvirt does not know a guest with its UUID: if it is none of qemu:///session, see "
                    "who it is and end it");
    return domain;
}

// The vessel that said whose QEMU this process is may be forged. The file of a guest that is off may have been left
// behind by a libvirtd that was killed, and the number is somebody else's by now.
void checkIsQemuOf(const Domain& domain, pid_t pid) {
    if (virDomainIsActive(domain.get()) != 1 || qemuOf(domain) != pid)
        throw Error(Fault::invalid, "libvirt does not know process " + std::to_string(pid) +
                                        " as the QEMU of the guest with its UUID: see who it is, and end it");
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

Json planResponse(const std::string& uuid, pid_t pid, const std::string& fallback) {
    Connection connection = connect();
    Domain domain = findDomain(connection, uuid);
    checkIsQemuOf(domain, pid);
    Text xml = describe(domain);
    if (!xml)
        throw Error(Fault::system, "its configuration cannot be read: " + lastError());
    std::string asked = DomainReader(xml.get()).onLockFailure;
    bool known = isFailureAction(asked);
    std::string action = known ? asked : fallback;
    Json plan{{"action", action}, {"asked_by", known ? "guest" : "default"}, {"xml", nullptr}};
    if (action == "restart" && virDomainIsPersistent(domain.get()) != 1) {
        connection = connect(Rights::act); // the secrets in it are for those who may act
        domain = findDomain(connection, uuid);
        if (Text secure = describe(domain, VIR_DOMAIN_XML_SECURE))
            plan["xml"] = secure.get();
    }
    return plan;
}

namespace {

Json respond(const Connection& connection, const std::string& uuid, pid_t pid, const std::string& action) {
    Domain domain = findDomain(connection, uuid);
    int state = VIR_DOMAIN_NOSTATE;
    (void)virDomainGetState(domain.get(), &state, nullptr, 0);
    checkIsQemuOf(domain, pid);
    if (action != "pause") {
        if (virDomainDestroy(domain.get()) < 0)
            throw Error(Fault::system, "it could not be powered off: " + lastError());
        return {{"did", true}, {"text", "it was powered off"}};
    }
    if (state != VIR_DOMAIN_RUNNING && state != VIR_DOMAIN_NOSTATE)
        return {{"did", false}, {"text", "it does not run, and will not be let resume"}};
    if (virDomainSuspend(domain.get()) < 0)
        throw Error(Fault::system, "it could not be paused: " + lastError());
    // libvirt may have kept us waiting while somebody started it anew.
    if (pid_t now = qemuOf(domain); now != 0 && now != pid && virDomainResume(domain.get()) == 0)
        return {{"did", false}, {"text", "it was started anew meanwhile, and left alone"}};
    return {{"did", true}, {"text", "it was paused"}};
}

} // namespace

Json respondToLoss(const std::string& uuid, pid_t pid, const std::string& action) {
    const Connection connection = connect(Rights::act);
    try {
        return respond(connection, uuid, pid, action);
    } catch (const Error& error) {
        if (virConnectIsAlive(connection.get()) != 1)
            throw;
        return {{"refused", error.what()}};
    }
}

Json startAgain(const std::string& uuid, pid_t pid, const Json& xml) {
    const Connection connection = connect(Rights::act);
    Domain domain = tryFindDomain(connection, uuid);
    if (domain && virDomainIsActive(domain.get()) == 1)
        return qemuOf(domain) == pid ? Json{{"over", false}} : Json{{"over", true}, {"text", "it was started anew"}};
    bool runs = false;
    if (xml.is_string()) {
        domain.reset(virDomainCreateXML(connection.get(), xml.get<std::string>().c_str(), 0));
        runs = domain != nullptr;
    } else if (domain) {
        runs = virDomainCreate(domain.get()) == 0;
    }
    if (runs)
        return {{"over", true}, {"text", "it was started anew"}};
    const std::string why = lastError();
    if (virConnectIsAlive(connection.get()) != 1)
        unreachable();
    return {{"over", true}, {"text", "it could not be started again: " + why}};
}

} // namespace leasehold::tools

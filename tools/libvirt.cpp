// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/libvirt.hpp"

#include <cstring>
#include <memory>
#include <string_view>

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

Connection connect() {
    virSetErrorFunc(nullptr, [](void*, virErrorPtr) {}); // by default it prints them
    Connection connection(virConnectOpenReadOnly("qemu:///system"), virConnectClose);
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

// The disks of a domain's XML; only the top image of each is what a lock manager hears of.
struct DiskReader {
    Json disks = Json::array();
    std::vector<std::string> path; // the elements that are open

    static void open(GMarkupParseContext*, const char* element, const char** names, const char** values, void* self,
                     GError**) {
        auto& reader = *static_cast<DiskReader*>(self);
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
        static_cast<DiskReader*>(self)->path.pop_back();
    }
};

Json disksIn(const char* xml) {
    DiskReader reader;
    GMarkupParser parser{};
    parser.start_element = DiskReader::open;
    parser.end_element = DiskReader::close;
    std::unique_ptr<GMarkupParseContext, decltype(&g_markup_parse_context_free)> context(
        g_markup_parse_context_new(&parser, static_cast<GMarkupParseFlags>(0), &reader, nullptr),
        g_markup_parse_context_free);
    (void)g_markup_parse_context_parse(context.get(), xml, -1, nullptr);
    return reader.disks;
}

} // namespace

Json listRunningGuests() {
    Json running = Json::array();
    Connection connection = connect();
    for (const Domain& domain : listDomains(connection, VIR_CONNECT_LIST_DOMAINS_RUNNING)) {
        char uuid[VIR_UUID_STRING_BUFLEN];
        if (virDomainGetUUIDString(domain.get(), uuid) == 0)
            running.push_back(uuid);
    }
    return running;
}

Json describeLibvirt() {
    Connection connection = connect();
    unsigned long version = 0;
    if (virConnectGetLibVersion(connection.get(), &version) < 0)
        unreachable();
    Json guests = Json::array();
    for (const Domain& domain : listDomains(connection, 0)) {
        // One that was undefined meanwhile has no XML.
        std::unique_ptr<char, decltype(&free)> xml(virDomainGetXMLDesc(domain.get(), 0), free);
        if (xml)
            guests.push_back({{"name", virDomainGetName(domain.get())}, {"disks", disksIn(xml.get())}});
    }
    return {{"version", version}, {"guests", guests}};
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold fenced HOST --i-made-sure-it-is-off
//
// Only fencing may end the lease of a host that is silent. Where the storage waits for that host to come back, this
// tells it that the host is dead: an NFSv3 server by the notice that the host's next boot would send, CephFS by
// evicting its clients. The stock tools do it, sm-notify(8) and ceph(8). Nothing is told about a host that answers.

#include "core/os/text.hpp"
#include "core/storage/mount.hpp"
#include "tools/options.hpp"
#include "tools/output.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <iostream>
#include <memory>
#include <set>
#include <system_error>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

using storage::Mount;

// --- other programs

struct Output {
    int status = -1; // 127: there is no such program; 124: no answer in time (timeout(1))
    std::string text, errors;
};

// `limit` is in seconds.
Output capture(int limit, Words words) {
    words.insert(words.begin(), {"timeout", "-k", "2", std::to_string(limit)});
    std::vector<char*> arguments;
    for (std::string& word : words)
        arguments.push_back(word.data());
    arguments.push_back(nullptr);
    char *text = nullptr, *errors = nullptr;
    int status = 0;
    GError* problem = nullptr;
    if (!g_spawn_sync(nullptr, arguments.data(), nullptr, G_SPAWN_SEARCH_PATH, nullptr, nullptr, &text, &errors,
                      &status, &problem)) {
        std::string why = problem->message;
        g_error_free(problem);
        throw Error(Fault::system, "cannot run " + words[0] + ": " + why);
    }
    std::unique_ptr<char, decltype(&g_free)> holdText(text, g_free), holdErrors(errors, g_free);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text, errors};
}

// What went wrong, in the program's last words.
std::string lastWords(const Output& output, const std::string& program) {
    if (output.status == 127)
        return program + " is not installed";
    if (output.status == 124)
        return program + " got no answer";
    std::string words = output.errors.empty() ? output.text : output.errors;
    while (words.ends_with('\n'))
        words.pop_back();
    return program + " says: " + words.substr(words.rfind('\n') + 1);
}

Json parse(const Output& output, const std::string& program) {
    Json json = output.status == 0 ? Json::parse(output.text, nullptr, false) : Json(Json::value_t::discarded);
    if (json.is_discarded())
        throw Error(Fault::system, lastWords(output, program));
    return json;
}

// --- the host

std::set<std::string> addressesOf(const std::string& name) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    std::set<std::string> addresses;
    if (getaddrinfo(name.c_str(), nullptr, &hints, &found) != 0)
        return addresses;
    for (addrinfo* each = found; each; each = each->ai_next) {
        char text[NI_MAXHOST];
        if (getnameinfo(each->ai_addr, each->ai_addrlen, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0)
            addresses.insert(text);
    }
    freeaddrinfo(found);
    return addresses;
}

// "h1" and "h1.example.org" are one; "h1.example.org" and "h1.example.net" are not.
bool sameName(const std::string& one, const std::string& other) {
    bool qualified = one.find('.') != std::string::npos && other.find('.') != std::string::npos;
    return qualified ? one == other : one.substr(0, one.find('.')) == other.substr(0, other.find('.'));
}

bool isLocal(const std::string& address) {
    for (const Json& link : parse(capture(10, {"ip", "-j", "addr", "show"}), "ip"))
        for (const Json& own : link.value("addr_info", Json::array()))
            if (own.value("local", "") == address)
                return true;
    return address.starts_with("127.");
}

// Whether anything listens there, or says that nothing does: either is the work of a kernel that runs.
bool answersTcp(const std::string& address) {
    constexpr std::array kPorts{"22", "111", "16509", "16514", "49152"}; // ssh, rpcbind, libvirt, a migration
    std::vector<pollfd> waiting;
    std::vector<os::Fd> sockets;
    bool answered = false;
    for (const char* port : kPorts) {
        addrinfo hints{}, *found = nullptr;
        hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
        hints.ai_socktype = SOCK_STREAM;
        if (getaddrinfo(address.c_str(), port, &hints, &found) != 0)
            continue;
        os::Fd connection(socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
        int error = connect(connection.get(), found->ai_addr, found->ai_addrlen) == 0 ? 0 : errno;
        freeaddrinfo(found);
        answered = answered || error == 0 || error == ECONNREFUSED;
        if (error == EINPROGRESS) {
            waiting.push_back({connection.get(), POLLOUT, 0});
            sockets.push_back(std::move(connection));
        }
    }
    for (int round = 0; round < 30 && !answered; round++) {
        (void)poll(waiting.data(), waiting.size(), 100);
        for (pollfd& each : waiting) {
            int error = 0;
            socklen_t size = sizeof error;
            if (each.revents && getsockopt(each.fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0)
                answered = answered || error == 0 || error == ECONNREFUSED;
            if (each.revents)
                each.fd = -1;
        }
    }
    return answered;
}

// A sign that the host at this address lives, as the end of a sentence; "" if there is none. In one's own network a
// host that lets nothing through still answers for its address, once what is remembered of it is forgotten.
std::string signOfLife(const std::string& address) {
    (void)capture(10, {"ip", "neigh", "flush", "to", address});
    if (capture(10, {"ping", "-n", "-q", "-c", "2", "-i", "0.5", "-W", "1", address}).status == 0)
        return "answers ping";
    if (answersTcp(address))
        return "answers on TCP";
    Output neighbour = capture(10, {"ip", "neigh", "show", "to", address, "nud", "reachable"});
    return neighbour.text.find(address) != std::string::npos ? "answers for its address (ARP)" : "";
}

struct Host {
    std::string name;
    std::set<std::string> addresses;
};

// --- NFSv3: what sm-notify does

struct Server {
    std::string address, mountPoint;
};

// Where the host's own notice would come from. A Linux server frees the locks of whom the notice names, and those of
// whom it comes from (nfs-utils utils/statd/stat.c, sm_notify_1_svc), so it must not come from a living host.
struct Way {
    std::string device, gateway, source; // source: the host's address, with the length of the network's prefix
};

bool inOneNetwork(const std::string& one, const std::string& other, int bits) {
    for (int family : {AF_INET, AF_INET6}) {
        unsigned char a[16] = {}, b[16] = {};
        if (inet_pton(family, one.c_str(), a) != 1 || inet_pton(family, other.c_str(), b) != 1)
            continue;
        for (int bit = 0; bit < bits; bit++)
            if ((a[bit / 8] ^ b[bit / 8]) & (128 >> bit % 8))
                return false;
        return true;
    }
    return false;
}

Way findWay(const Server& server, const Host& host) {
    Json routes = parse(capture(10, {"ip", "-j", "route", "get", server.address}), "ip");
    if (routes.empty() || !routes[0].contains("dev"))
        throw Error(Fault::system, "there is no route to the server " + server.address);
    Way way{routes[0].value("dev", ""), routes[0].value("gateway", ""), ""};
    for (const Json& link : parse(capture(10, {"ip", "-j", "addr", "show", "dev", way.device}), "ip"))
        for (const Json& own : link.value("addr_info", Json::array()))
            for (const std::string& address : host.addresses)
                if (inOneNetwork(own.value("local", ""), address, own.value("prefixlen", 128)))
                    way.source = address + "/" + std::to_string(own.value("prefixlen", 128));
    if (way.source.empty())
        throw Error(Fault::unsupported,
                    "the server " + server.address + " is reached by " + way.device + ", and no address of '" +
                        host.name + "' that is known here is in its network: say with --address which one it used " +
                        "there, or run this on a host of its network");
    return way;
}

// In a network of its own, which goes with the process: nobody is left with the dead host's address. Its state number
// is not this host's (/proc/sys/fs/nfs), nor is its configuration.
constexpr const char* kNotify = R"(
outside="nsenter --net=/proc/$1/ns/net ip link add link $2 name fenced netns $$"
$outside type ipvlan mode l2 || $outside type macvlan mode bridge
ip link set lo up
ip addr add "$3" dev fenced nodad
ip link set fenced up
[ -z "$4" ] || ip route add default via "$4"
for file in /proc/sys/fs/nfs/nsm_local_state /etc/nfs.conf; do
    [ ! -e $file ] || mount --bind /dev/null $file
done
exec sm-notify -d -f -m 1 -P "$5"
)";

class StateDirectory {
public:
    // As statd keeps it (nfs-utils support/nsm/file.c): whom to notify, what number the last boot had, and who boots.
    StateDirectory(const std::string& server, const std::string& host) : StateDirectory() {
        for (const char* folder : {"/sm", "/sm.bak"})
            if (mkdir((path_ + folder).c_str(), 0700) < 0)
                throw SystemError(errno, "make", path_ + folder);
        // Another number than that of any boot before: they count up from 1.
        auto state = static_cast<std::int32_t>(time(nullptr) & 0x7ffffffe) | 1;
        write("/state", {reinterpret_cast<const char*>(&state), sizeof state});
        write("/sm/" + server,
              "0100007f 000186b5 00000003 00000010 " + std::string(32, '0') + " " + server + " " + host + "\n");
    }
    ~StateDirectory() {
        std::error_code error;
        for (int tries = 0; tries < 2; tries++) // what fails once leaves nothing behind
            if (std::filesystem::remove_all(path_, error); !error)
                return;
        std::cerr << "leasehold: cannot remove " << path_ << ": " << error.message() << "; it is of no use any more\n";
    }
    StateDirectory(const StateDirectory&) = delete;
    StateDirectory& operator=(const StateDirectory&) = delete;
    const std::string& path() const { return path_; }

private:
    // By itself: what fails afterwards leaves nothing behind.
    StateDirectory() {
        if (!mkdtemp(path_.data()))
            throw SystemError(errno, "make", path_);
    }

    void write(const std::string& name, const std::string& text) {
        if (!g_file_set_contents((path_ + name).c_str(), text.data(), static_cast<gssize>(text.size()), nullptr))
            throw Error(Fault::system, "cannot write " + path_ + name);
    }

    std::string path_ = "/run/leasehold-fenced-XXXXXX";
};

void notify(const Server& server, const Host& host) {
    Way way = findWay(server, host);
    StateDirectory state(server.address, host.name);
    Output told = capture(90, {"unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", kNotify, "sh",
                               std::to_string(getpid()), way.device, way.source, way.gateway, state.path()});
    if (told.status != 0)
        throw Error(Fault::system, lastWords(told, "sm-notify"));
}

// --- CephFS: the eviction of its clients

struct Client {
    std::string mds, id, host, address;
};

Json askCeph(const Words& words) {
    Words all{"ceph", "--connect-timeout", "10", "--format", "json"};
    all.insert(all.end(), words.begin(), words.end());
    return parse(capture(60, all), "ceph");
}

std::vector<Client> clientsOf(const Host& host) {
    std::vector<Client> clients;
    const Json all = askCeph({"fs", "dump"});
    for (const Json& cephfs : all.at("filesystems"))
        for (const auto& [gid, mds] : cephfs.at("mdsmap").at("info").items()) {
            if (mds.value("state", "") != "up:active")
                continue;
            std::string name = "mds." + mds.value("name", "");
            for (const Json& session : askCeph({"tell", name, "session", "ls"})) {
                std::string address = session.at("entity").at("addr").value("addr", "");
                address = address.substr(0, address.rfind(':'));
                std::string called = session.value("client_metadata", Json::object()).value("hostname", "");
                if (host.addresses.contains(address) || (!called.empty() && sameName(called, host.name)))
                    clients.push_back({name, session.at("id").dump(), os::printable(called), address});
            }
        }
    return clients;
}

void evict(const Client& client) {
    Output done =
        capture(60, {"ceph", "--connect-timeout", "10", "tell", client.mds, "client", "evict", "id=" + client.id});
    if (done.status != 0)
        throw Error(Fault::system, lastWords(done, "ceph"));
}

// --- what this host has mounted, and what has to be done there

struct Storages {
    std::vector<Server> nfs3;
    bool ceph = false;
    std::set<std::string> others; // a sentence each
};

Storages findStorages() {
    Storages found;
    const std::vector<Mount> mounts = storage::allMounts();
    if (mounts.empty())
        throw Error(Fault::system, "the mounts of this host cannot be read (/proc/self/mountinfo), so no storage was "
                                   "told anything: try again");
    for (const Mount& mount : mounts) {
        if (mount.type == "nfs" && mount.value("vers").value_or("").starts_with("3")) {
            std::string server = mount.value("addr").value_or("");
            bool known = std::any_of(found.nfs3.begin(), found.nfs3.end(),
                                     [&](const Server& each) { return each.address == server; });
            if (!server.empty() && !known)
                found.nfs3.push_back({server, mount.point});
        } else if (mount.type == "ceph" || mount.type == "fuse.ceph" || mount.type == "fuse.ceph-fuse") {
            found.ceph = true;
        } else if (mount.type == "nfs4") {
            found.others.insert("NFSv4: nothing has to be done; locks of a dead host are free after the server's lease "
                                "time (90 s by default), as soon as somebody asks");
        } else if (mount.type == "fuse.glusterfs") {
            found.others.insert("GlusterFS: nothing has to be done; locks of a dead host are free after "
                                "server.tcp-user-timeout (42 s by default)");
        } else if (mount.type == "gfs2" || mount.type == "ocfs2") {
            found.others.insert((mount.type == "gfs2" ? std::string("GFS2") : std::string("OCFS2")) +
                                ": nothing has to be done; locks of a dead host are free when the cluster has fenced "
                                "it or counted it out (about a minute)");
        }
    }
    return found;
}

void line(const std::string& text) {
    std::cout << os::printable(text) << '\n';
}

// What speaks against it: a sign that the host lives, as a sentence.
std::optional<std::string> findLife(const Host& host, const std::vector<Client>& clients) {
    std::set<std::string> addresses = host.addresses;
    for (const Client& client : clients)
        addresses.insert(client.address);
    for (const std::string& address : addresses) {
        if (isLocal(address))
            throw Error(Fault::invalid, "'" + host.name + "' (" + address + ") is this host");
        std::string sign = signOfLife(address);
        if (!sign.empty())
            return std::string("'" + host.name + "' lives: " + address)
                .append(" " + sign)
                .append("; nothing was done. Turn it off first, or fence it");
    }
    return std::nullopt;
}

// Each storage for itself: one that cannot be told must not keep the others from it.
bool tellAll(const Host& host, const Storages& storages, const std::vector<Client>& clients) {
    bool all = true;
    auto tell = [&](const std::string& what, const std::string& done, const std::function<void()>& work) {
        auto problem = attempt(work);
        all = all && !problem;
        line(what + ": " + problem.value_or(done));
    };
    for (const Server& server : storages.nfs3)
        tell("NFSv3, server " + server.address, "told that '" + host.name + "' is dead; its locks are free",
             [&] { notify(server, host); });
    for (const Client& client : clients)
        tell("CephFS, client " + client.id, "evicted by " + client.mds, [&] { evict(client); });
    return all;
}

} // namespace

int fenced(const Words& arguments) {
    bool isOff = false;
    std::string address;
    Options options("fenced", "HOST",
                    "Tells storage that waits for a dead host to come back that it is dead, so that its guests can\n"
                    "start elsewhere: NFSv3 servers and CephFS, those that this host has mounted. For a cluster\n"
                    "manager to call when its fencing has succeeded. HOST is what that host calls itself. Without\n"
                    "--i-made-sure-it-is-off it only shows what would be done.");
    options.add("i-made-sure-it-is-off", isOff, "The host is off, and stays so until this has ended");
    options.add("address", address, "The address by which it uses the storage, where its name has another", "ADDRESS");
    Words hosts = options.parse(arguments);
    if (hosts.size() != 1 || hosts[0].empty())
        throw UsageError("which host? See leasehold fenced --help");
    if (geteuid() != 0)
        throw Error(Fault::invalid, "leasehold fenced needs root");

    Host host{hosts[0], addressesOf(hosts[0])};
    if (sameName(host.name, os::hostName()))
        throw Error(Fault::invalid, "'" + host.name + "' is this host");
    if (!address.empty() && addressesOf(address) != std::set{address})
        throw UsageError("--address " + address + " is not an address");
    if (!address.empty())
        host.addresses.insert(address);

    Storages storages = findStorages();
    std::vector<Client> clients;
    std::optional<std::string> cephProblem;
    if (storages.ceph)
        cephProblem = attempt([&] { clients = clientsOf(host); });
    if (host.addresses.empty() && clients.empty() && !cephProblem)
        throw Error(Fault::invalid, "nobody knows a host '" + host.name + "': it has no address" +
                                        (storages.ceph ? ", and CephFS has no client of that name" : "") +
                                        "; say what it calls itself, or its --address");
    if (auto life = findLife(host, clients)) {
        std::cerr << "leasehold: " << os::printable(*life) << '\n';
        return kRefused;
    }

    for (const std::string& other : storages.others)
        line(other);
    if (cephProblem)
        line("CephFS: " + *cephProblem);
    else if (storages.ceph && clients.empty())
        line("CephFS: nothing has to be done; it has no client on '" + host.name + "'");
    if (storages.nfs3.empty() && !storages.ceph && storages.others.empty())
        line("this host has no storage mounted that would have to be told");
    if (!isOff) {
        for (const Server& server : storages.nfs3)
            line("NFSv3, server " + server.address + " (" + server.mountPoint + "): would free all locks of '" +
                 host.name + "'");
        for (const Client& client : clients)
            line("CephFS, client " + client.id + " (host '" + client.host + "', " + client.address +
                 "): would be evicted; what it has not written is lost");
        if (!storages.nfs3.empty() || !clients.empty())
            throw UsageError("nothing was done. Make sure that '" + host.name +
                             "' is off: if it runs, its guests lose their disks to others. Then say so with "
                             "--i-made-sure-it-is-off");
        return cephProblem ? kFailed : kDone;
    }
    return tellAll(host, storages, clients) && !cephProblem ? kDone : kFailed;
}

} // namespace leasehold::tools

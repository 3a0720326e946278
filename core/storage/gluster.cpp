// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/gluster.hpp"

#include "core/os/error.hpp"
#include "core/os/text.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>

#include <fcntl.h>
#include <sys/stat.h>

namespace leasehold::storage {

namespace {

constexpr const char* kClient = "protocol/client";
constexpr const char* kGraph = ".meta/graphs/active/volfile";
constexpr std::size_t kLargestGraph = 8 << 20; // a brick has about 1200 bytes in it

// One paragraph of a volfile.
struct Translator {
    std::string name, type;
    std::map<std::string, std::string> options;

    std::string option(const std::string& key) const {
        auto found = options.find(key);
        return found == options.end() ? "" : found->second;
    }
};

// The first word of the text, which goes from it.
std::string_view takeWord(std::string_view& text) {
    text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
    std::string_view word = text.substr(0, text.find(' '));
    text.remove_prefix(word.size());
    return word;
}

std::string_view takeLine(std::string_view& text) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    return line;
}

// Nothing where the text is not a whole graph.
std::vector<Translator> parseGraph(std::string_view text) {
    std::vector<Translator> graph;
    for (bool inside = false; !text.empty() || inside;) {
        if (text.empty())
            return {}; // cut off
        std::string_view line = takeLine(text), word = takeWord(line), first = takeWord(line);
        line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
        if (word.empty())
            continue;
        if (word == "volume" && !inside) {
            graph.push_back({std::string(first), "", {}});
            inside = true;
        } else if (word == "type" && inside) {
            graph.back().type = first;
        } else if (word == "option" && inside) {
            graph.back().options[std::string(first)] = line;
        } else if (word == "end-volume" && inside && !graph.back().type.empty()) {
            inside = false;
        } else if (word != "subvolumes" || !inside) {
            return {};
        }
    }
    return graph;
}

// Translators through which locks and writes of one descriptor go to one brick, by one connection, or that have nothing
// to do with them.
bool isHarmless(const std::string& type) {
    constexpr std::array<std::string_view, 6> kTypes{kClient,          "cluster/distribute",       "features/utime",
                                                     "debug/io-stats", "features/snapview-client", "meta"};
    return type.starts_with("performance/") || std::find(kTypes.begin(), kTypes.end(), type) != kTypes.end();
}

// Measured (tests/lab/test_gluster.py).
GlusterDoubt doubtType(const std::string& type) {
    if (type == "features/shard")
        return {"its volume is sharded (features.shard): a client that lost a lock could still write to all but the "
                "first part of an image",
                true};
    if (type == "cluster/replicate")
        return {"its volume is replicated: only one of the bricks is asked who holds a lock, and it has forgotten when "
                "it was restarted",
                true};
    return {"how locks behave with its volume's " + os::printable(type) + " has not been tried", true};
}

// The words of glusterfs for yes.
bool isOn(const std::string& value) {
    constexpr std::array<std::string_view, 5> kWords{"on", "yes", "true", "enable", "1"};
    return std::find(kWords.begin(), kWords.end(), value) != kWords.end();
}

// "server:/volume", or "server:/volume/directory".
std::string volumeOf(const Mount& mount) {
    std::size_t at = mount.source.find(":/");
    std::string name = at == std::string::npos ? "" : mount.source.substr(at + 2);
    name = name.substr(0, name.find('/'));
    return name.empty() ? "VOLUME" : os::printable(name);
}

std::string doubtClient(const Translator& client, const Mount& mount) {
    // Before version 10 some descriptors were opened again all the same (glusterfs issues 1977 and 2581).
    std::string version = client.option("client-version");
    int major = 0;
    (void)std::from_chars(version.data(), version.data() + version.size(), major);
    if (major < 10)
        return "its client is version '" + os::printable(version) +
               "', and before 10 one that lost a lock may write all the same: update it";
    if (isOn(client.option("strict-locks")))
        return "";
    std::string volume = volumeOf(mount), point = os::printable(mount.point);
    return "a client that was cut off, and so has lost its locks, could still write, because the volume option "
           "client.strict-locks was not on when it was mounted: run gluster volume set " +
           volume + " client.strict-locks on, and then, when nobody uses the mount, on each host: umount " + point +
           " && mount " + point;
}

} // namespace

GlusterDoubt doubtGluster(std::string_view volfile, const Mount& mount) {
    std::vector<Translator> graph = parseGraph(volfile);
    for (const Translator& translator : graph)
        if (!isHarmless(translator.type))
            return doubtType(translator.type);
    bool anyClient = false;
    for (const Translator& translator : graph) {
        if (translator.type != kClient)
            continue;
        anyClient = true;
        if (std::string doubt = doubtClient(translator, mount); !doubt.empty())
            return {doubt};
    }
    return {anyClient ? "" : "what its mount tells about itself (" + std::string(kGraph) + ") cannot be understood"};
}

GlusterGraph readGlusterGraph(const std::string& point, std::uint64_t device) {
    std::string path = (point == "/" ? "" : point) + "/" + kGraph;
    os::Fd fd;
    struct stat status;
    int error = os::tryOpen(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, fd);
    if (error == 0 && fstat(fd.get(), &status) < 0)
        error = errno;
    if (error != 0)
        return {"", SystemError(error, "open", os::printable(path)).what()};
    if (status.st_dev != device || !S_ISREG(status.st_mode) || status.st_uid != 0 ||
        (status.st_mode & (S_IWUSR | S_IWGRP | S_IWOTH)) != 0)
        return {"", "'" + os::printable(path) + "' is not GlusterFS's own"};
    auto text = os::readFileIfPossible("/proc/self/fd/" + std::to_string(fd.get()), kLargestGraph);
    return text ? GlusterGraph{*text, ""} : GlusterGraph{"", "'" + os::printable(path) + "' cannot be read"};
}

namespace {

// `.meta` is in the root of the volume only, and a bind mount may show another directory of it: then another mount of
// the same file system tells.
GlusterGraph findGraph(const Mount& mount, std::uint64_t device) {
    GlusterGraph graph = readGlusterGraph(mount.point, device);
    for (const Mount& other : graph.problem.empty() ? std::vector<Mount>() : allMounts())
        if (other.device == mount.device && other.point != mount.point)
            if (GlusterGraph there = readGlusterGraph(other.point, device); there.problem.empty())
                return there;
    return graph;
}

GlusterDoubt doubtMount(const Mount& mount, int fd) {
    // Whoever mounts a FUSE file system decides what it says and what it is called (mount.fuse(8), subtype).
    if (mount.value("user_id") != "0")
        return {"it was not mounted by root, so what it tells about itself is not believed"};
    struct stat status;
    if (fstat(fd, &status) < 0)
        throw SystemError(errno, "stat", mount.point);
    GlusterGraph graph = findGraph(mount, status.st_dev);
    if (graph.problem.empty())
        return doubtGluster(graph.text, mount);
    return {"whether its volume option client.strict-locks is on cannot be told: " + graph.problem +
            "; a directory of a volume needs the volume itself mounted, too"};
}

} // namespace

Storage classifyGluster(const Mount& mount, int fd) {
    Storage storage{.name = "GlusterFS", .remote = true, .reason = ""};
    GlusterDoubt doubt = doubtMount(mount, fd);
    if (!doubt.reason.empty()) {
        storage.readersMayStay = doubt.ofVolume;
        storage.reason = doubt.reason;
        return storage;
    }
    storage.lock = LockKind::byteRange;
    storage.scope = Scope::allHosts;
    storage.reason = "client.strict-locks has to stay on: what this mount tells about it stays the same when it is "
                     "turned off";
    return storage;
}

} // namespace leasehold::storage

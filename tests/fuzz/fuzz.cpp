// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Everything that leasehold reads and others may write, as targets of libFuzzer: no input crashes, hangs, leaks, or
// makes an answer that breaks its promise. One program; the environment variable LEASEHOLD_FUZZ_TARGET says which
// target, and without it the program lists them. run.sh runs them all.

#include "core/lease/file_index.hpp"
#include "core/lease/file_set.hpp"
#include "core/lease/record.hpp"
#include "core/lease/state.hpp"
#include "core/os/lock_table.hpp"
#include "core/os/process.hpp"
#include "core/os/socket_pairs.hpp"
#include "core/os/text.hpp"
#include "core/qemu/vessel.hpp"
#include "core/settings.hpp"
#include "core/storage/classify.hpp"
#include "core/storage/device.hpp"
#include "core/storage/lockspace.hpp"
#include "core/storage/override.hpp"
#include "plugin/lock_driver.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <fuzzer/FuzzedDataProvider.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold {
namespace {

namespace fs = std::filesystem;

void require(bool truth, const char* promise) {
    if (truth)
        return;
    std::fprintf(stderr, "broken: %s\n", promise);
    std::abort();
}

#define REQUIRE(condition) require(condition, #condition)

constexpr lease::Uuid kUuid{0xee, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr lease::Incarnation kPlacer{0x123, 0x456};

bool isPrintable(const std::string& text) {
    return os::printable(text) == text;
}

// A message for people: what the plugin reports goes through printable() anyway, but nothing else does.
void checkMessage(const std::string& text) {
    REQUIRE(!text.empty() && text.size() < 16 * 1024);
}

std::size_t countDescriptors() {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator("/proc/self/fd"), {}));
}

// What an input may not leave behind.
class Descriptors {
public:
    ~Descriptors() { REQUIRE(countDescriptors() == before_); }

private:
    std::size_t before_ = countDescriptors();
};

// A folder of this process, gone with it if that ends in peace.
const fs::path& folder() {
    static const struct Folder {
        fs::path path;
        Folder() {
            std::string name = fs::temp_directory_path() / "leasehold-fuzz-XXXXXX"; // TMPDIR
            REQUIRE(mkdtemp(name.data()));
            path = name;
        }
        ~Folder() {
            std::error_code ignored;
            fs::remove_all(path, ignored);
        }
    } folder;
    return folder.path;
}

// Words that inputs are made of are cut at a byte that hardly anybody uses otherwise.
std::vector<std::string_view> split(std::string_view text) {
    std::vector<std::string_view> parts;
    for (std::size_t end = 0; end != text.npos; text.remove_prefix(end == text.npos ? 0 : end + 1))
        parts.push_back(text.substr(0, end = text.find('\x1e')));
    return parts;
}

// Any bytes either are a configuration or are refused with "FILE:LINE: ...", LINE being a line that exists.
void configuration(std::string_view text) {
    try {
        const Settings settings = parseSettings(text, "a.conf");
        REQUIRE(settings.handoffWait.count() >= 0 && settings.handoffWait.count() <= 60'000);
        REQUIRE(settings.storageTimeout.count() >= 1000 && settings.storageTimeout.count() <= 600'000);
        for (const storage::Override& each : settings.storageLocks)
            REQUIRE(storage::findOverride(settings.storageLocks, each.prefix));
    } catch (const SettingsError& error) {
        const std::string what = error.what();
        REQUIRE(what.starts_with("a.conf:") && what.find("; ") != what.npos);
        REQUIRE(isPrintable(what) && what.size() < 4 * text.size() + 1000);
        const long line = std::strtol(what.c_str() + 7, nullptr, 10);
        REQUIRE(line >= 1 && line <= 1 + std::count(text.begin(), text.end(), '\n'));
    }
}

// "PATH=WORD" of storage_locks, and a path.
void override(std::string_view text) {
    const auto parts = split(text);
    const auto parsed = storage::parseOverride(parts.front());
    if (!parsed)
        return;
    REQUIRE(parsed->prefix.starts_with('/') && parsed->prefix.find("//") == std::string::npos);
    const std::vector<storage::Override> all{*parsed};
    REQUIRE(storage::findOverride(all, parsed->prefix));
    (void)storage::findOverride(all, parts.back());
}

void record(std::string_view text) {
    const auto parsed = lease::parseRecord(text);
    if (!parsed)
        return;
    REQUIRE(isPrintable(parsed->domain) && isPrintable(parsed->host) && isPrintable(parsed->bootId));
    REQUIRE(!parsed->domain.empty());
    REQUIRE(lease::parseRecord(lease::encodeRecord(*parsed)) == parsed);
}

void state(std::string_view text) {
    const auto token = lease::parseState(text, kUuid);
    if (token)
        REQUIRE(*token != 0 && *token >> lease::kIdBits == 0 &&
                lease::parseState(lease::encodeState(kUuid, *token), kUuid) == token);
    if (const auto uuid = lease::parseUuid(text))
        REQUIRE(lease::parseUuid(lease::formatUuid(*uuid)) == uuid);
}

// What a mark file says is either marks of its placer or "foreign", which counts as everything.
void marks(std::string_view text) {
    // Behind the magic all is blanks, in a whole file.
    std::string padded(text);
    padded.resize(511, ' ');
    for (const std::string& each : {std::string(text), padded + '\n'}) {
        const auto decoded = lease::decodeMarks(each, kPlacer);
        if (std::find(decoded.begin(), decoded.end(), lease::Placed{}) != decoded.end()) {
            REQUIRE(decoded.size() == 1);
            continue;
        }
        for (const lease::Placed& placed : decoded)
            REQUIRE(placed.mark.kind == lease::MarkKind::owner || placed.mark.domain == kPlacer.domain);
        REQUIRE(lease::decodeMarks(lease::encodeMarks(decoded), kPlacer) == decoded);
    }
    if (const auto who = lease::parseMarkFileName(text))
        REQUIRE(lease::parseMarkFileName(lease::encodeMarkFileName(*who)) == who);
    if (const auto index = lease::parseIndex(text))
        REQUIRE(lease::encodeIndex(*index) == text);
}

// The text of a lease file, which a guest's QEMU may have written.
void title(std::string_view text) {
    const Descriptors descriptors;
    const std::string path = folder() / "lease";
    const os::Fd file(open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    REQUIRE(pwrite(file.get(), text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()));
    const bool trusted = storage::isTrusted(file.get(), path);
    REQUIRE(!trusted || storage::mayCarryLease(file.get(), path));
    if (const auto owner = lease::readRecordAt(file.get(), storage::kRecordOffset))
        REQUIRE(isPrintable(owner->domain));
    try {
        storage::inscribe(file.get(), "the image", path);
        REQUIRE(storage::isTrusted(file.get(), path)); // it says whose it is
    } catch (const Error& error) {
        REQUIRE(isPrintable(error.what()) && std::strlen(error.what()) < 16 * 1024);
    }
}

void lockTable(std::string_view text) {
    const auto locks = os::parseLockTable(text);
    for (const os::TableLock& lock : locks) {
        REQUIRE(lock.range.start >= 0 && lock.range.length >= 0);
        REQUIRE(lock.range.length == 0 || lock.range.start <= INT64_MAX - lock.range.length);
        REQUIRE(os::overlap(lock.range, lock.range) && os::overlap(lock.range, {0, 0}));
    }
    (void)os::parseUnixTable(text);
}

void fdinfo(std::string_view text) {
    for (const os::FoundLock& lock : os::parseFdinfoLocks(std::string(text)))
        REQUIRE(lock.range.start >= 0 && lock.range.length >= 0);
    lockTable(text);
}

void mountinfo(std::string_view text) {
    for (int id : {-1, 0, 1, 36}) {
        const auto mount = storage::findMount(text, id);
        if (!mount)
            continue;
        for (const char* key : {"lowerdir", "upperdir", "local_lock", "vers"})
            REQUIRE(mount->value(key).has_value() == !mount->values(key).empty());
        (void)storage::overlayLayers(*mount);
        for (unsigned magic :
             {0x6969u, 0x65735546u, 0x01161970u, 0x7461636fu, 0xff534d42u, 0x0bd00bd0u, 0xef53u, 0x794c7630u})
            REQUIRE(!storage::classifyMount(magic, mount).name.empty());
    }
    (void)storage::anyRemote(text);
    (void)storage::unescape(text);
}

// What sysfs and udev say about a device: files, one after the other, each empty where it is not there.
void udev(std::string_view text) {
    static const fs::path root = folder() / "udev";
    static const fs::path device = root / "sys/dev/block/8:1", data = root / "run/udev/data/b8:1";
    static constexpr std::array kFiles{"device/vpd_pg83", "device/wwid",       "wwid",  "dm/name", "dm/uuid",
                                       "partition",       "loop/backing_file", "uevent"};
    static const bool made = [] {
        for (const char* file : kFiles)
            fs::create_directories((device / file).parent_path());
        fs::create_directories(data.parent_path());
        fs::create_symlink("../../../../../bus/scsi", device / "device/subsystem");
        return true;
    }();
    (void)made;
    const auto parts = split(text);
    const auto put = [&](const fs::path& path, std::size_t part) {
        if (part >= parts.size() || parts[part].empty())
            (void)unlink(path.c_str());
        else
            std::ofstream(path) << parts[part];
    };
    put(data, 0);
    for (std::size_t i = 0; i < kFiles.size(); i++)
        put(device / kFiles[i], i + 1);
    const Descriptors descriptors;
    const storage::Device found = storage::identifyDevice(makedev(8, 1), root);
    REQUIRE(found.identity.size() <= 200 && isPrintable(found.words) && !found.words.empty());
    REQUIRE(found.identity.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-%") ==
            std::string::npos);
}

// The answer to an inquiry of a device (SPC, vital product data page 0x83).
void vpd(std::string_view text) {
    const std::string name = storage::parseDeviceIdentification(text);
    REQUIRE(name.size() <= 2 * text.size() + 16);
}

// A vessel of our own, into which messages are put that are as hostile as the input:
//     FLAGS (1: with this vessel's numbers and UUID)  DESCRIPTORS  LENGTH (two bytes)  their kinds, one byte each  text
// "FILE" and a number in the place of a file's device and inode become those of the descriptor of that kind.
class HostileVessel {
public:
    HostileVessel() : process_(getpid()) {
        const fs::path image = folder() / "image", lease = folder() / "lease-file", directory = folder() / "directory";
        std::ofstream(image) << "image";
        std::ofstream(lease) << "leasehold lease of image\n";
        fs::create_directory(directory);
        files_.push_back(os::openFile(image, O_RDWR));
        files_.push_back(os::openFile(lease, O_RDWR));
        files_.push_back(os::openFile(directory, O_RDONLY | O_DIRECTORY));
        files_.push_back(os::openFile("/dev/null", O_RDWR));
        files_.push_back(os::openFile(image, O_PATH));
        for (const os::Fd& file : files_)
            ids_.push_back(os::identify(file.get(), "a file"));
        ends_ = ends().numbers();
    }

    void run(std::string_view input) {
        while (input.size() >= 4)
            send(input);
        {
            const Descriptors descriptors;
            read();
        }
        char rest;
        int off = -1;
        (void)setsockopt(ends_[1], SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off);
        while (recv(ends_[1], &rest, sizeof rest, MSG_DONTWAIT) >= 0)
            continue;
    }

private:
    static const qemu::VesselEnds& ends() {
        static const qemu::VesselEnds ends;
        return ends;
    }

    void send(std::string_view& input) {
        const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(input[at]); };
        const bool ours = byte(0) & 1;
        const std::size_t count = byte(1), length = byte(2) | byte(3) << 8;
        input.remove_prefix(4);
        std::vector<int> numbers;
        for (char kind : input.substr(0, count))
            numbers.push_back(files_[static_cast<unsigned char>(kind) % files_.size()].get());
        input.remove_prefix(numbers.size());
        std::string text(input.substr(0, length));
        input.remove_prefix(text.size());
        nameFiles(text);
        if (ours && text.size() >= 88) {
            std::copy(kUuid.begin(), kUuid.end(), text.begin() + 16);
            std::memcpy(text.data() + 64, ends_.data(), sizeof ends_);
            for (std::size_t i : {0, 1}) {
                const std::uint64_t inode = os::identify(ends_[i], "the vessel").inode;
                std::memcpy(text.data() + 72 + i * 8, &inode, sizeof inode);
            }
        }
        iovec data{text.data(), text.size()};
        msghdr header{};
        header.msg_iov = &data;
        header.msg_iovlen = 1;
        alignas(cmsghdr) char control[CMSG_SPACE(256 * sizeof(int))] = {};
        if (!numbers.empty()) {
            header.msg_control = control;
            header.msg_controllen = CMSG_SPACE(numbers.size() * sizeof(int));
            cmsghdr* rights = CMSG_FIRSTHDR(&header);
            rights->cmsg_level = SOL_SOCKET;
            rights->cmsg_type = SCM_RIGHTS;
            rights->cmsg_len = CMSG_LEN(numbers.size() * sizeof(int));
            std::memcpy(CMSG_DATA(rights), numbers.data(), numbers.size() * sizeof(int));
        }
        (void)sendmsg(ends_[0], &header, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    void nameFiles(std::string& text) const {
        for (std::size_t at = text.find("FILE"); at != text.npos && at + 16 <= text.size();
             at = text.find("FILE", at + 1))
            std::memcpy(text.data() + at, &ids_[static_cast<unsigned char>(text[at + 8]) % ids_.size()], 16);
    }

    void read() {
        try {
            const auto words = qemu::Vessel::readManifest(process_, kUuid);
            if (words)
                REQUIRE(words->tag.uuid == kUuid && words->leases.size() <= 2048);
        } catch (const Error& error) {
            checkMessage(error.what());
        }
        try {
            // As a call does that relies on nothing in it yet.
            if (auto chosen = qemu::Vessel::retrieve(process_, kUuid, [](const auto& words) {
                    return std::any_of(words.begin(), words.end(), [](const auto* lease) { return lease->remote; })
                               ? qemu::Taking::none
                               : qemu::Taking::asTheyAre;
                }))
                chosen->compareFiles();
        } catch (const Error& error) {
            checkMessage(error.what());
        }
        std::unique_ptr<qemu::Vessel> vessel, again;
        try {
            vessel = qemu::Vessel::retrieve(process_, kUuid);
            if (!vessel)
                return;
            for (const qemu::StoredLease& lease : vessel->leases())
                REQUIRE(lease.lease.open() && lease.path.size() <= 4096);
            if (vessel->tryReplace(7))
                again = qemu::Vessel::retrieve(process_, kUuid);
        } catch (const Error& error) {
            checkMessage(error.what());
        }
        // QEMU may spoil its own vessel (empty messages among others hide what comes after them). But what leasehold
        // has written itself is what it reads.
        if (!again || again->caller() != 7)
            return;
        REQUIRE(again->tag() == vessel->tag() && again->leases().size() == vessel->leases().size());
        for (std::size_t i = 0; i < again->leases().size(); i++)
            REQUIRE(again->leases()[i].path == vessel->leases()[i].path &&
                    again->leases()[i].file == vessel->leases()[i].file &&
                    again->leases()[i].mode == vessel->leases()[i].mode &&
                    again->leases()[i].stage == vessel->leases()[i].stage);
    }

    os::Process process_;
    std::vector<os::Fd> files_;
    std::vector<os::FileId> ids_;
    std::array<int, 2> ends_{};
};

void vessel(std::string_view text) {
    static HostileVessel vessel;
    vessel.run(text);
}

// libvirt's calls, with parameters of whatever kinds, for guests that are not there.
class PluginCalls {
public:
    explicit PluginCalls(std::string_view text)
        : data_(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()) {}

    void run() {
        static const LockDriver& driver = virLockDriverImpl.table;
        static const bool ready = driver.init(LOCK_DRIVER_VERSION, nullptr, 0) == 0;
        REQUIRE(ready);
        const Descriptors descriptors;
        LockManager manager{&driver, nullptr};
        const auto parameters = draw();
        const unsigned type = small(), flags = small();
        if (driver.create(&manager, type, parameters.size(), parameters.data(), flags) != 0) {
            REQUIRE(manager.privateData == nullptr);
            return;
        }
        bool known = true;
        for (int i = data_.ConsumeIntegralInRange(0, 4); i > 0; i--) {
            const auto more = draw();
            const unsigned resource = small(), resourceFlags = small();
            const char* name = string();
            known = driver.addResource(&manager, resource, name, more.size(), more.data(), resourceFlags) == 0 && known;
        }
        if (known)
            call(driver, manager);
        driver.destroy(&manager);
        REQUIRE(manager.privateData == nullptr);
    }

private:
    void call(const LockDriver& driver, LockManager& manager) {
        const unsigned which = small(), flags = small();
        int fd = 5;
        char* state = nullptr;
        // Nobody is there who could have a lease.
        if (which == 0) {
            const char* text = string();
            REQUIRE(driver.acquire(&manager, text, flags, 0, &fd) == -1 && fd == -1);
        } else if (which == 1)
            (void)driver.release(&manager, data_.ConsumeBool() ? &state : nullptr, flags);
        else
            (void)driver.inquire(&manager, data_.ConsumeBool() ? &state : nullptr, flags);
        REQUIRE(!state);
    }

    unsigned small() { return data_.ConsumeIntegralInRange(0u, 3u); }

    const char* string() {
        if (data_.ConsumeProbability<float>() < 0.05F)
            return nullptr;
        return texts_.emplace_back(data_.ConsumeRandomLengthString(300)).c_str();
    }

    std::vector<LockParam> draw() {
        constexpr std::array kKeys{"uuid", "name", "pid", "id", "uri", "path", "lockspace", "offset"};
        const int pids[] = {0, -1, getpid(), 0x7fffffff};
        std::vector<LockParam> parameters(data_.ConsumeIntegralInRange<std::size_t>(0, 6));
        for (LockParam& each : parameters) {
            each.key = data_.ConsumeBool() ? data_.PickValueInArray(kKeys) : string();
            each.type = data_.ConsumeIntegralInRange(0, 8);
            if (each.type == LOCK_PARAM_STRING || each.type == LOCK_PARAM_CSTRING)
                each.value.cstr = string();
            else if (each.type == LOCK_PARAM_UINT)
                each.value.ui = static_cast<unsigned>(data_.PickValueInArray(pids));
            else if (each.type == LOCK_PARAM_UUID)
                data_.ConsumeData(each.value.uuid, sizeof each.value.uuid);
            else
                each.value.ul = data_.ConsumeIntegral<unsigned long long>();
        }
        return parameters;
    }

    FuzzedDataProvider data_;
    std::deque<std::string> texts_; // live until the calls are over
};

void plugin(std::string_view text) {
    PluginCalls(text).run();
}

struct Target {
    const char* name;
    void (*run)(std::string_view);
};

constexpr Target kTargets[] = {
    {"vessel", vessel},     {"plugin", plugin},       {"configuration", configuration},
    {"override", override}, {"record", record},       {"state", state},
    {"marks", marks},       {"title", title},         {"locks", lockTable},
    {"fdinfo", fdinfo},     {"mountinfo", mountinfo}, {"udev", udev},
    {"vpd", vpd},
};

const Target* chosen = nullptr;

} // namespace
} // namespace leasehold

// libvirt's, as the plugin finds it.
extern "C" [[gnu::visibility("default")]] void virReportErrorHelper(int, int code, const char*, const char*,
                                                                    std::size_t, const char* format, ...) {
    char text[64 * 1024];
    std::va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    using leasehold::require;
    REQUIRE(length > 0 && length < static_cast<int>(sizeof text) && leasehold::isPrintable(text));
    REQUIRE(code != 1); // an internal error
}

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    const char* wanted = std::getenv("LEASEHOLD_FUZZ_TARGET");
    for (const auto& target : leasehold::kTargets)
        if (!wanted)
            std::puts(target.name);
        else if (std::strcmp(target.name, wanted) == 0)
            leasehold::chosen = &target;
    if (!leasehold::chosen)
        std::exit(wanted ? 2 : 0);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    leasehold::chosen->run({reinterpret_cast<const char*>(data), size});
    return 0;
}

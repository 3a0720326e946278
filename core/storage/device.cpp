// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/device.hpp"

#include "core/os/error.hpp"
#include "core/os/fd.hpp"
#include "core/os/hash.hpp"
#include "core/os/text.hpp"
#include "core/storage/mount.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <optional>

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

namespace leasehold::storage {

namespace {

bool isHex(std::string_view text) {
    return !text.empty() && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::string lower(std::string_view text) {
    std::string result(text);
    for (char& c : result)
        if (c >= 'A' && c <= 'Z')
            c = static_cast<char>(c - 'A' + 'a');
    return result;
}

std::string hex(std::string_view bytes) {
    std::string result;
    char digits[3];
    for (unsigned char byte : bytes) {
        std::snprintf(digits, sizeof digits, "%02x", byte);
        result += digits;
    }
    return result;
}

// Names are padded with spaces and zeros; udev makes underscores of them (scsi_id), the kernel does not.
std::string squeeze(std::string_view text) {
    std::string result;
    for (char c : text) {
        bool gap = c == ' ' || c == '_' || c == '\0' || c == '\t' || c == '\n';
        if (!gap)
            result += c;
        else if (!result.empty() && result.back() != '_')
            result += '_';
    }
    if (result.ends_with('_'))
        result.pop_back();
    return result;
}

// A name that says nothing is shared by many devices.
bool meaningless(std::string_view name) {
    return name.find_first_not_of("0_. -") == std::string_view::npos;
}

std::string named(const char* kind, const std::string& name) {
    return meaningless(name) ? "" : kind + name;
}

// The kernel's words in sysfs (Linux drivers/scsi/scsi_lib.c, scsi_vpd_lun_id; drivers/nvme/host/sysfs.c).
std::string fromWwid(std::string_view wwid) {
    if (wwid.starts_with("t10."))
        return named("t10.", squeeze(wwid.substr(4)));
    std::string name = squeeze(wwid);
    std::string small = lower(name);
    for (const char* kind : {"naa.", "eui."})
        if (small.starts_with(kind) && isHex(std::string_view(small).substr(4)))
            return named(kind, small.substr(4));
    return meaningless(name) ? "" : name;
}

// udev's and multipath's words: the kind of designator is a digit in front (systemd, scsi_serial.c).
std::string fromScsiId(std::string_view id) {
    if (id.size() < 2)
        return "";
    std::string name = lower(id.substr(1));
    bool number = isHex(name) && (name.size() == 16 || name.size() == 24 || name.size() == 32);
    if (id[0] == '3' && number)
        return named("naa.", name);
    if (id[0] == '2' && number)
        return named("eui.", name);
    if (id[0] == '1')
        return named("t10.", squeeze(id.substr(1)));
    return "";
}

// Good as part of a file's name, and not too long for one: the end of a long name becomes a number.
std::string asFileName(std::string_view text) {
    constexpr std::size_t kLongest = 200;
    std::string name;
    for (unsigned char c : text) {
        bool plain = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '.' ||
                     c == '_' || c == '-';
        char escaped[4];
        std::snprintf(escaped, sizeof escaped, plain ? "%c" : "%%%02X", c);
        name += escaped;
    }
    if (name.size() <= kLongest)
        return name;
    char number[18];
    std::snprintf(number, sizeof number, "-%016llx", static_cast<unsigned long long>(os::fnv1a(text)));
    return name.substr(0, kLongest - 17) + number;
}

// What stands in a file of sysfs; nothing where there is none.
std::optional<std::string> readLine(const std::string& path) {
    auto text = os::readFileIfPossible(path, 65536);
    while (text && text->ends_with('\n'))
        text->pop_back();
    return text;
}

std::uint64_t readNumber(const std::string& path) {
    std::string text = readLine(path).value_or("");
    std::uint64_t number = 0;
    (void)std::from_chars(text.data(), text.data() + text.size(), number);
    return number;
}

std::string folderOf(dev_t device, const std::string& root) {
    return root + "/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

// What sysfs and udev say about one device.
class Look {
public:
    Look(dev_t device, const std::string& root)
        : number_(std::to_string(major(device)) + ":" + std::to_string(minor(device))),
          folder_(root + "/sys/dev/block/" + number_), udev_(root + "/run/udev/data/b" + number_) {}

    Device identify() const {
        // Each is read once: a device may vanish while it is looked at.
        auto mapped = file("dm/name"), part = mapped ? std::nullopt : file("partition");
        Device device = mapped ? deviceMapper(*mapped) : part ? partition(*part) : disk(folder_);
        if (!device.identity.empty())
            device.identity = asFileName(device.identity);
        device.words = os::printable(device.words);
        return device;
    }

private:
    static std::optional<std::string> read(const std::string& path) { return readLine(path); }

    std::optional<std::string> file(const std::string& name) const { return read(folder_ + "/" + name); }

    // The value of `KEY=value` in a text of lines.
    static std::string value(const std::string& text, const std::string& key) {
        std::string lines = "\n" + text + "\n";
        std::size_t at = lines.find("\n" + key + "=");
        if (at == std::string::npos)
            return "";
        at += key.size() + 2;
        return lines.substr(at, lines.find('\n', at) - at);
    }

    // Linux drivers/md/dm-sysfs.c. The prefixes are those of lvm2, of multipath-tools (libmultipath/devmapper.h) and of
    // kpartx (kpartx/devmapper.c).
    Device deviceMapper(const std::string& name) const {
        std::string uuid = file("dm/uuid").value_or("");
        std::string part;
        std::string in;
        if (std::size_t dash = uuid.find('-'); uuid.starts_with("part") && dash != std::string::npos) {
            std::string digits = uuid.substr(4, dash - 4);
            uuid.erase(0, dash + 1);
            part = "-part" + digits;
            in = "partition " + digits + " of ";
        }
        if (uuid.starts_with("LVM-") && uuid.size() >= 68)
            // What follows the identifiers of group and volume names an inner layer of the same volume.
            return {Device::Kind::logicalVolume, uuid.substr(4, 64) + part, in + "logical volume " + name};
        if (uuid.starts_with("mpath-"))
            return {Device::Kind::scsi, onDisk(multipath(uuid.substr(6)), part), in + "multipath device " + name};
        return {Device::Kind::other, "", in + "device-mapper device " + name};
    }

    // An administrator may have multipath name its devices by something else. Then the paths know.
    std::string multipath(const std::string& id) const {
        std::string wwid = fromScsiId(id);
        for (const char* kind : {"naa.", "eui.", "nvme.", "uuid."})
            if (wwid.empty() && id.starts_with(kind))
                wwid = fromWwid(id);
        std::error_code error;
        for (std::filesystem::directory_iterator slave(folder_ + "/slaves", error), end;
             wwid.empty() && !error && slave != end; slave.increment(error))
            wwid = wwidOf(slave->path());
        return wwid;
    }

    Device partition(const std::string& number) const {
        // The disk's folder is above that of the partition, and sysfs is reached through a symbolic link.
        Device whole = disk(folder_ + "/..");
        whole.words = "partition " + number + " of " + whole.words;
        if (!whole.identity.empty())
            whole.identity += "-part" + number;
        return whole;
    }

    Device disk(const std::string& folder) const {
        std::string name = value(read(folder + "/uevent").value_or(""), "DEVNAME");
        if (name.empty())
            name = number_;
        std::error_code error;
        std::string bus = std::filesystem::read_symlink(folder + "/device/subsystem", error).filename();
        if (bus == "scsi" || bus.starts_with("nvme"))
            return {Device::Kind::scsi, onDisk(wwidOf(folder), ""),
                    (bus == "scsi" ? "SCSI disk " : "NVMe disk ") + name};
        if (auto backing = read(folder + "/loop/backing_file"))
            return {Device::Kind::other, "", "loop device " + name + " (of '" + *backing + "')"};
        return {Device::Kind::other, "", (bus == "virtio" ? "virtio disk " : "block device ") + name};
    }

    static std::string onDisk(const std::string& wwid, const std::string& part) {
        return wwid.empty() ? "" : wwid + part;
    }

    std::string wwidOf(const std::string& folder) const {
        std::string wwid =
            parseDeviceIdentification(os::readFileIfPossible(folder + "/device/vpd_pg83", 65536).value_or(""));
        for (const char* name : {"/device/wwid", "/wwid"})
            if (wwid.empty())
                wwid = fromWwid(read(folder + name).value_or(""));
        if (!wwid.empty())
            return wwid;
        // Partitions have their disk's properties. On other buses than SCSI the name is put together differently.
        std::string properties = read(udev_).value_or("");
        return value(properties, "E:ID_BUS") == "scsi" ? fromScsiId(value(properties, "E:ID_SERIAL")) : "";
    }

    std::string number_, folder_, udev_;
};

} // namespace

std::string parseDeviceIdentification(std::string_view page) {
    constexpr std::size_t kHeader = 4;
    if (page.size() < kHeader || page[1] != '\x83')
        return "";
    auto byte = [](std::string_view text, std::size_t at) { return static_cast<unsigned char>(text[at]); };
    std::size_t length = static_cast<std::size_t>(byte(page, 2)) << 8 | byte(page, 3);
    page = page.substr(kHeader, length);

    std::string best;
    int bestRank = 0;
    auto offer = [&](int rank, const std::string& name) {
        if (rank > bestRank && !name.empty()) {
            best = name;
            bestRank = rank;
        }
    };
    while (page.size() > kHeader) {
        bool binary = (byte(page, 0) & 0xf) == 1;
        bool ofTheUnit = (byte(page, 1) & 0x30) == 0; // others are of its port or target
        unsigned type = byte(page, 1) & 0xf;
        std::size_t size = byte(page, 3);
        if (size > page.size() - kHeader)
            break; // cut off
        std::string_view name = page.substr(kHeader, size);
        page.remove_prefix(kHeader + size);
        if (!ofTheUnit || name.empty())
            continue;
        if (type == 3 && binary && (size == 8 || size == 16)) {
            unsigned format = byte(name, 0) >> 4;
            offer(format == 6 ? 6 : format == 5 ? 5 : 4, named("naa.", hex(name)));
        } else if (type == 2 && binary && (size == 8 || size == 12 || size == 16)) {
            offer(3, named("eui.", hex(name)));
        } else if (type == 1 && !binary) {
            offer(2, named("t10.", squeeze(name)));
        } else if (type == 8 && !binary) {
            offer(1, fromWwid(name));
        }
    }
    return best;
}

namespace {

// The number in a device's `dev` file.
std::optional<dev_t> numberIn(const std::string& folder) {
    unsigned first = 0, second = 0;
    if (std::sscanf(readLine(folder + "/dev").value_or("").c_str(), "%u:%u", &first, &second) != 2)
        return std::nullopt;
    return makedev(first, second);
}

std::vector<std::string> listFolder(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
        names.push_back(entry->path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

std::string nameIn(const std::string& folder, dev_t device) {
    std::string name = std::filesystem::path(folder).filename();
    std::error_code error;
    std::filesystem::path real = std::filesystem::canonical(folder, error);
    return os::printable(error ? std::to_string(major(device)) + ":" + std::to_string(minor(device))
                               : real.filename().string());
}

// Goes down a stack, which is a graph: a layer that is reached as a whole and as parts counts as a whole.
class Descent {
public:
    explicit Descent(const std::string& root) : root_(root) {}

    std::vector<Layer> run(dev_t device) {
        go(device, true, "", 0);
        return std::move(layers_);
    }

private:
    // Stacks of the kernel are a few layers high, and a volume group may have some hundred disks.
    static constexpr int kDeepest = 16;
    static constexpr std::size_t kMost = 1024;

    void go(dev_t device, bool whole, const std::string& part, int depth) {
        std::string folder = folderOf(device, root_);
        if (depth == kDeepest || layers_.size() > kMost)
            throw Error(Fault::unsupported, "it stands on more layers than leasehold looks at");
        Device here = identifyDevice(device, root_);
        if (auto number = readLine(folder + "/partition")) {
            if (auto disk = numberIn(folder + "/.."))
                down(*disk, here, false, "-part" + *number, depth);
            return;
        }
        if (major(device) == kLoopMajor) {
            loop(folder, device, whole, part);
            return;
        }
        std::string uuid = readLine(folder + "/dm/uuid").value_or("");
        std::string inner = uuid.starts_with("part") ? "-" + uuid.substr(0, uuid.find('-')) : "";
        bool slice = uuid.starts_with("LVM-") || !inner.empty();
        std::uint64_t size = readNumber(folder + "/size");
        const std::string slaves = folder + "/slaves/";
        for (const std::string& slave : listFolder(slaves))
            if (const std::string path = slaves + slave; auto below = numberIn(path)) {
                // Two devices that each cover more than half of a third one overlap.
                bool covers = size > readNumber(path + "/size") / 2;
                down(*below, here, whole && !slice && covers, inner, depth);
            }
    }

    void down(dev_t device, const Device& above, bool whole, const std::string& part, int depth) {
        Device here = identifyDevice(device, root_);
        // A path of a multipath device is that device; and an inner layer of a logical volume is nobody's but its own.
        bool same = !here.identity.empty() && here.identity == above.identity;
        bool inner = readLine(folderOf(device, root_) + "/dm/uuid").value_or("").starts_with("LVM-") &&
                     above.kind == Device::Kind::logicalVolume;
        auto known = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const Layer& layer) { return layer.file.empty() && layer.number == device; });
        if (known != layers_.end()) {
            if (known->whole || !whole)
                return;
            known->whole = true;
        } else if (!same && !inner) {
            layers_.push_back({.number = device, .device = here, .whole = whole, .file = "", .loop = "", .part = ""});
        }
        go(device, whole, part, depth + 1);
    }

    void loop(const std::string& folder, dev_t device, bool whole, const std::string& part) {
        std::string name = nameIn(folder, device);
        auto file = readLine(folder + "/loop/backing_file");
        if (!file || file->empty())
            throw Error(Fault::invalid, "loop device " + name + " has no file behind it; attach one (losetup)");
        if (file->ends_with(" (deleted)"))
            throw Error(Fault::invalid, "the file behind loop device " + name + " was deleted ('" +
                                            os::printable(*file) + "'); detach the loop device, and attach the image");
        bool all = readNumber(folder + "/loop/offset") == 0 && readNumber(folder + "/loop/sizelimit") == 0;
        layers_.push_back({.number = device,
                           .device = {},
                           .whole = whole && all,
                           .file = *file,
                           .loop = name,
                           .part = all ? part : ""});
    }

    static constexpr unsigned kLoopMajor = 7; // Linux include/uapi/linux/major.h

    std::string root_;
    std::vector<Layer> layers_;
};

} // namespace

std::vector<Layer> findLayers(dev_t device, const std::string& root) {
    return Descent(root).run(device);
}

namespace {

// 0, or the error number.
int tryAskLoop(const std::string& loop, loop_info64& info) {
    os::Fd fd;
    if (int error = os::tryOpen("/dev/" + loop, O_RDONLY | O_NONBLOCK, fd))
        return error;
    return ioctl(fd.get(), LOOP_GET_STATUS64, &info) < 0 ? errno : 0;
}

bool isFileOf(const loop_info64& info, const struct stat& file) {
    return info.lo_inode == file.st_ino && info.lo_device == file.st_dev;
}

} // namespace

bool isBehindLoop(const std::string& loop, const struct stat& file) {
    loop_info64 info{};
    if (int error = tryAskLoop(loop, info))
        throw SystemError(error, "ask which file is behind", "/dev/" + loop);
    return isFileOf(info, file);
}

std::vector<dev_t> findLoops(const struct stat& file) {
    std::vector<dev_t> loops;
    for (const std::string& name : listFolder("/sys/block")) {
        if (!name.starts_with("loop") || !readLine("/sys/block/" + name + "/loop/backing_file"))
            continue;
        auto number = numberIn("/sys/block/" + name);
        loop_info64 info{};
        // Not by its path: that may lead elsewhere, or to a server that does not answer.
        if (number && tryAskLoop(name, info) == 0 && isFileOf(info, file))
            loops.push_back(*number);
    }
    return loops;
}

bool isReadOnly(dev_t device) {
    return readNumber(folderOf(device, "") + "/ro") == 1;
}

std::string findHostUse(dev_t device) {
    std::string folder = folderOf(device, "");
    std::string name = nameIn(folder, device);
    const std::string inside = folder + "/";
    std::vector<std::pair<std::string, dev_t>> all{{name, device}};
    for (const std::string& child : listFolder(folder))
        if (auto part = child.starts_with(name) ? numberIn(inside + child) : std::nullopt)
            all.emplace_back(child, *part);
    const std::vector<Mount> mounts = allMounts();
    std::string swaps = os::readFileIfPossible("/proc/swaps", 65536).value_or("");
    for (const auto& [known, number] : all) {
        std::vector<std::string> holders = listFolder(folderOf(number, "") + "/holders");
        if (!holders.empty()) {
            auto holder = numberIn("/sys/class/block/" + holders.front());
            return (holder ? identifyDevice(*holder).words : os::printable(holders.front())) + " is made of " + known;
        }
        if (isAmong(mounts, number))
            return known + " is mounted";
        if (("\n" + swaps).find("\n/dev/" + known + " ") != std::string::npos)
            return "it swaps to " + known;
    }
    return "";
}

Device identifyDevice(dev_t device, const std::string& root) {
    return Look(device, root).identify();
}

} // namespace leasehold::storage

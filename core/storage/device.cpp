// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/storage/device.hpp"

#include "core/os/fd.hpp"
#include "core/os/hash.hpp"
#include "core/os/text.hpp"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

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

// What sysfs and udev say about one device.
class Look {
public:
    Look(dev_t device, const std::string& root)
        : number_(std::to_string(major(device)) + ":" + std::to_string(minor(device))),
          folder_(root + "/sys/dev/block/" + number_), udev_(root + "/run/udev/data/b" + number_) {}

    Device identify() const {
        Device device = file("dm/name") ? deviceMapper() : file("partition") ? partition() : disk(folder_);
        if (!device.identity.empty())
            device.identity = asFileName(device.identity);
        device.words = os::printable(device.words);
        return device;
    }

private:
    static std::optional<std::string> read(const std::string& path) {
        auto text = os::readFileIfPossible(path, 65536);
        while (text && text->ends_with('\n'))
            text->pop_back();
        return text;
    }

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
    Device deviceMapper() const {
        std::string uuid = file("dm/uuid").value_or("");
        std::string name = *file("dm/name");
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

    Device partition() const {
        // The disk's folder is above that of the partition, and sysfs is reached through a symbolic link.
        Device whole = disk(folder_ + "/..");
        std::string number = *file("partition");
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

Device identifyDevice(dev_t device, const std::string& root) {
    return Look(device, root).identify();
}

} // namespace leasehold::storage

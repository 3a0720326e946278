// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

#include "core/os/error.hpp"
#include "core/storage/device.hpp"
#include "tests/support/unit_support.hpp"

#include <cerrno>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold::storage {
namespace {

using namespace std::string_literals;
namespace fs = std::filesystem;

// One designator of a Device Identification page. `where`: 0 the logical unit, 1 its port, 2 its target.
std::string designator(int type, int code, const std::string& name, int where = 0) {
    return ""s + static_cast<char>(code) + static_cast<char>(where << 4 | type) + "\0"s +
           static_cast<char>(name.size()) + name;
}

std::string page(const std::string& designators) {
    return "\0\x83"s + static_cast<char>(designators.size() >> 8) + static_cast<char>(designators.size()) + designators;
}

const std::string kNaa6 = "\x60\x01\x40\x5a\xbc\xde\xf0\x12\x34\x56\x78\x9a\xbc\xde\xf0\x12"s;
const std::string kNaa6Hex = "6001405abcdef0123456789abcdef012";
const std::string kNaa5 = "\x50\x01\x40\x5a\xbc\xde\xf0\x12"s;
const std::string kEui = "\x00\x25\x38\x5a\xbc\xde\xf0\x12"s;

TEST(DeviceIdentification, TheBestNameOfTheUnitIsTaken) {
    struct Row {
        std::string page, name;
    };
    const std::string naa6 = designator(3, 1, kNaa6), naa5 = designator(3, 1, kNaa5), eui = designator(2, 1, kEui),
                      t10 = designator(1, 2, "ATA     DISK   1 "), name = designator(8, 3, "iqn.2003-01.org.x:1\0\0"s);
    for (const Row& row : {
             Row{page(naa6), "naa." + kNaa6Hex},
             Row{page(naa5), "naa.5001405abcdef012"},
             Row{page(eui), "eui.0025385abcdef012"},
             Row{page(t10), "t10.ATA_DISK_1"},
             Row{page(name), "iqn.2003-01.org.x:1"},
             Row{page(designator(8, 3, "NAA.6001405ABCDEF012")), "naa.6001405abcdef012"},
             Row{page(name + t10 + eui + naa5 + naa6), "naa." + kNaa6Hex},
             Row{page(naa6 + naa5 + eui + t10 + name), "naa." + kNaa6Hex},
             Row{page(name + t10 + eui + naa5), "naa.5001405abcdef012"},
             Row{page(name + t10 + eui), "eui.0025385abcdef012"},
             Row{page(name + t10), "t10.ATA_DISK_1"},
             Row{page(designator(3, 1, kNaa6, 1) + designator(3, 1, kNaa6, 2) + naa5), "naa.5001405abcdef012"},
         })
        EXPECT_EQ(parseDeviceIdentification(row.page), row.name);
}

TEST(DeviceIdentification, APageThatNamesNoUnitHasNoName) {
    const std::string naa = designator(3, 1, kNaa6);
    for (const std::string& bad : {
             ""s,
             "\0\x83"s,
             "\0\x83\0"s,
             page(""),
             "\0\x80\0\x14"s + naa,               // empty, cut, another page
             page(designator(3, 1, kNaa6, 1)),    // of the port
             page(designator(3, 1, "\x60\x01"s)), // no such length
             page(designator(3, 2, kNaa6)),
             page(designator(2, 1, "\x01\x02")),            // wrong code, wrong length
             page(designator(3, 1, std::string(16, '\0'))), // says nothing
             page(designator(1, 2, "    ")),
             page(designator(0, 2, "drive-scsi0-0-0")), // of no world-wide kind
             page(designator(3, 1, "")),
         })
        EXPECT_EQ(parseDeviceIdentification(bad), "");
}

TEST(DeviceIdentification, APageCutAnywhereIsReadUpToTheCut) {
    const std::string whole = page(designator(3, 1, kNaa5) + designator(3, 1, kNaa6));
    for (std::size_t length = 0; length < whole.size(); length++) {
        std::string name = parseDeviceIdentification(std::string(whole.data(), length));
        EXPECT_EQ(name, length < 16 ? "" : "naa.5001405abcdef012") << length;
    }
    std::string lies = whole;
    lies[2] = lies[3] = '\xff';
    EXPECT_EQ(parseDeviceIdentification(lies), "naa." + kNaa6Hex) << "longer than what is there";
    lies = whole;
    lies[3] = 12;
    EXPECT_EQ(parseDeviceIdentification(lies), "naa.5001405abcdef012") << "what is behind the page is not of it";
}

// A sysfs and a udev database with the shape of the real ones: devices are symbolic links into a tree.
class FakeSysfs : public unit::LeavesNoDescriptor {
protected:
    const dev_t kSda = makedev(8, 0), kSdb = makedev(8, 16), kSda1 = makedev(8, 1), kDm = makedev(253, 0),
                kNvme = makedev(259, 0);

    void write(const std::string& path, const std::string& text) {
        // libstdc++ 10 does not take a symbolic link to a folder for one.
        if (fs::path folder = fs::path(root_.path(path)).parent_path(); !fs::is_directory(folder))
            fs::create_directories(folder);
        std::ofstream(root_.path(path)) << text;
    }
    // `place` is below /sys/devices.
    std::string add(dev_t device, const std::string& place) {
        std::string folder = "sys/devices/" + place;
        write(folder + "/uevent", "DEVTYPE=disk\nDEVNAME=" + fs::path(place).filename().string() + "\n");
        fs::create_directories(root_.path("sys/dev/block"));
        fs::create_symlink("../../devices/" + place, root_.path("sys/dev/block/" + number(device)));
        return folder;
    }
    std::string addScsi(dev_t device, const std::string& name) {
        std::string folder = add(device, "pci/host/" + name + "-lun/block/" + name);
        fs::create_directory_symlink("../..", root_.path(folder + "/device"));
        fs::create_symlink("../../bus/scsi", root_.path(folder + "/device/subsystem"));
        return folder;
    }
    std::string addPartition(dev_t device, const std::string& disk, int partition) {
        std::string folder = disk.substr(std::string("sys/devices/").size());
        folder = add(device, folder + "/" + fs::path(folder).filename().string() + std::to_string(partition));
        write(folder + "/partition", std::to_string(partition) + "\n");
        return folder;
    }
    std::string addMapped(const std::string& name, const std::string& uuid) {
        std::string folder = add(kDm, "virtual/block/dm-0");
        write(folder + "/dm/name", name + "\n");
        write(folder + "/dm/uuid", uuid + "\n");
        return folder;
    }
    void remove(dev_t device) {
        std::string link = root_.path("sys/dev/block/" + number(device));
        fs::remove_all(fs::canonical(link));
        fs::remove(link);
    }
    Device look(dev_t device) { return identifyDevice(device, root_.path()); }
    static std::string number(dev_t device) {
        return std::to_string(major(device)) + ":" + std::to_string(minor(device));
    }

    unit::TempDir root_;
};

const std::string kVolume = "pZ6WsPaTyc1zXF0gbmE0JLAfSn3qcCLTv4kSvbWqdLkR0dgFVXNuH8sm2OlJ9Qtw";

TEST_F(FakeSysfs, MappedDevicesAreKnownByTheirUuid) {
    struct Row {
        std::string name, uuid;
        Device::Kind kind;
        std::string identity, words;
    };
    const auto volume = Device::Kind::logicalVolume, scsi = Device::Kind::scsi, other = Device::Kind::other;
    for (const Row& row : {
             Row{"vg-lv", "LVM-" + kVolume, volume, kVolume, "logical volume vg-lv"},
             Row{"vg-lv-real", "LVM-" + kVolume + "-real", volume, kVolume, "logical volume vg-lv-real"},
             Row{"vg-lv1", "part1-LVM-" + kVolume, volume, kVolume + "-part1", "partition 1 of logical volume vg-lv1"},
             Row{"mpatha", "mpath-3" + kNaa6Hex, scsi, "naa." + kNaa6Hex, "multipath device mpatha"},
             Row{"mpatha-part2", "part2-mpath-3" + kNaa6Hex, scsi, "naa." + kNaa6Hex + "-part2",
                 "partition 2 of multipath device mpatha-part2"},
             Row{"mpathb", "mpath-20025385abcdef012", scsi, "eui.0025385abcdef012", "multipath device mpathb"},
             Row{"mpathc", "mpath-1ATA_DISK_1", scsi, "t10.ATA_DISK_1", "multipath device mpathc"},
             Row{"mpathd", "mpath-eui.0025385ABCDEF012", scsi, "eui.0025385abcdef012", "multipath device mpathd"},
             Row{"mpathe", "mpath-Sserial", scsi, "", "multipath device mpathe"},
             Row{"mpathf", "mpath-", scsi, "", "multipath device mpathf"},
             Row{"mpathf1", "part1-mpath-Sserial", scsi, "", "partition 1 of multipath device mpathf1"},
             Row{"secret", "CRYPT-LUKS2-00112233445566778899aabbccddeeff-secret", other, "",
                 "device-mapper device secret"},
             Row{"cut", "LVM-short", other, "", "device-mapper device cut"},
             Row{"plain", "", other, "", "device-mapper device plain"},
             Row{"part", "part", other, "", "device-mapper device part"},
             Row{"a\nb", "CRYPT-x", other, "", "device-mapper device a?b"},
         }) {
        addMapped(row.name, row.uuid);
        Device device = look(kDm);
        EXPECT_EQ(device.kind, row.kind) << row.name;
        EXPECT_EQ(device.identity, row.identity) << row.name;
        EXPECT_EQ(device.words, row.words);
        remove(kDm);
    }
}

TEST_F(FakeSysfs, AMultipathDeviceAndItsPathsAndTheirPartitionsAgree) {
    addMapped("mpatha", "mpath-3" + kNaa6Hex);
    std::string sda = addScsi(kSda, "sda"), sdb = addScsi(kSdb, "sdb");
    write(sda + "/device/vpd_pg83", page(designator(8, 3, "iqn.2003-01.org.x:1") + designator(3, 1, kNaa6)));
    write(sdb + "/device/wwid", "naa." + kNaa6Hex + "\n");
    addPartition(kSda1, sda, 1);
    EXPECT_EQ(look(kSda).words, "SCSI disk sda");
    EXPECT_EQ(look(kSda).kind, Device::Kind::scsi);
    EXPECT_EQ(look(kSda).identity, look(kDm).identity);
    EXPECT_EQ(look(kSdb).identity, look(kDm).identity);
    EXPECT_EQ(look(kSda1).words, "partition 1 of SCSI disk sda");
    EXPECT_EQ(look(kSda1).kind, Device::Kind::scsi);
    std::string part = look(kSda1).identity;
    remove(kDm);
    addMapped("mpatha1", "part1-mpath-3" + kNaa6Hex);
    EXPECT_EQ(part, look(kDm).identity);
    EXPECT_NE(part, look(kSda).identity);
}

TEST_F(FakeSysfs, AMultipathDeviceNamedBySomethingElseIsKnownByItsPaths) {
    std::string map = addMapped("mpatha", "mpath-lun-of-my-own");
    std::string sda = addScsi(kSda, "sda");
    write(sda + "/device/vpd_pg83", page(designator(3, 1, kNaa6)));
    fs::create_directories(root_.path(map + "/slaves"));
    fs::create_directory_symlink(root_.path(sda), root_.path(map + "/slaves/sda"));
    EXPECT_EQ(look(kDm).identity, "naa." + kNaa6Hex);
}

TEST_F(FakeSysfs, T10NamesAgreeHoweverTheyArePadded) {
    std::string sda = addScsi(kSda, "sda"), sdb = addScsi(kSdb, "sdb");
    write(sda + "/device/wwid", "t10.ATA     QEMU HARDDISK           QM00001   \n");
    write(sdb + "/device/vpd_pg83", page(designator(1, 2, "ATA     QEMU HARDDISK   QM00001")));
    addMapped("mpatha", "mpath-1ATA_QEMU_HARDDISK_QM00001");
    EXPECT_EQ(look(kSda).identity, "t10.ATA_QEMU_HARDDISK_QM00001");
    EXPECT_EQ(look(kSdb).identity, look(kSda).identity);
    EXPECT_EQ(look(kDm).identity, look(kSda).identity);
}

TEST_F(FakeSysfs, NvmeDisksAreKnownByTheirWwid) {
    std::string nvme = add(kNvme, "pci/nvme/nvme0/nvme0n1");
    fs::create_directory_symlink("..", root_.path(nvme + "/device"));
    fs::create_symlink("../../class/nvme", root_.path(nvme + "/device/subsystem"));
    write(nvme + "/wwid", "eui.0025385abcdef012\n");
    EXPECT_EQ(look(kNvme).identity, "eui.0025385abcdef012");
    EXPECT_EQ(look(kNvme).words, "NVMe disk nvme0n1");
    EXPECT_EQ(look(kNvme).kind, Device::Kind::scsi);
}

TEST_F(FakeSysfs, UdevKnowsAScsiDiskThatSysfsSaysNothingOf) {
    addScsi(kSda, "sda");
    EXPECT_EQ(look(kSda).identity, "");
    write("run/udev/data/b8:0", "S:disk/by-id/x\nE:ID_SERIAL=3" + kNaa6Hex + "\nE:ID_BUS=scsi\n");
    EXPECT_EQ(look(kSda).identity, "naa." + kNaa6Hex);
    write("run/udev/data/b8:0", "E:ID_SERIAL=3" + kNaa6Hex + "\nE:ID_BUS=usb\n");
    EXPECT_EQ(look(kSda).identity, "") << "the bus decides what the serial number means";
}

TEST_F(FakeSysfs, WhatHasNoNameOfItsOwnIsOnlyDescribed) {
    std::string loop = add(makedev(7, 0), "virtual/block/loop0");
    write(loop + "/loop/backing_file", "/srv/x.img\n");
    EXPECT_EQ(look(makedev(7, 0)).words, "loop device loop0 (of '/srv/x.img')");
    addPartition(makedev(259, 7), loop, 2);
    EXPECT_EQ(look(makedev(259, 7)).words, "partition 2 of loop device loop0 (of '/srv/x.img')");
    EXPECT_EQ(look(makedev(259, 7)).kind, Device::Kind::other);
    EXPECT_EQ(look(makedev(259, 7)).identity, "");
    add(makedev(9, 0), "virtual/block/md0");
    EXPECT_EQ(look(makedev(9, 0)).words, "block device md0");
    EXPECT_EQ(look(makedev(66, 6)).words, "block device 66:6") << "is not there";
    EXPECT_EQ(look(makedev(66, 6)).kind, Device::Kind::other);
}

// A stack of fakes, each named by its device number.
class Stacks : public FakeSysfs {
protected:
    // What is below `device`, in words, the wholes in capitals.
    std::string below(dev_t device) {
        std::string text;
        for (const Layer& layer : findLayers(device, root_.path())) {
            std::string name = layer.file.empty() ? number(layer.number) : layer.file + layer.part;
            text += (text.empty() ? "" : " ") + name + (layer.whole ? "!" : "");
        }
        return text;
    }
    std::string addSized(dev_t device, const std::string& name, int size, const std::string& uuid = "none") {
        std::string folder = add(device, "virtual/block/" + name);
        write(folder + "/size", std::to_string(size) + "\n");
        write(folder + "/dev", number(device) + "\n");
        if (uuid != "none") {
            write(folder + "/dm/name", name + "\n");
            write(folder + "/dm/uuid", uuid + "\n");
        }
        return folder;
    }
    void stand(const std::string& upper, const std::string& lower) {
        fs::create_directories(root_.path(upper + "/slaves"));
        fs::create_directory_symlink(root_.path(lower),
                                     root_.path(upper + "/slaves/" + fs::path(lower).filename().string()));
    }
    const dev_t kLv = makedev(253, 1), kInner = makedev(253, 2), kMd = makedev(9, 0), kLoop = makedev(7, 3),
                kLoop1 = makedev(259, 3);
};

TEST_F(Stacks, APartitionIsAPartOfItsDisk) {
    std::string sda = addScsi(kSda, "sda");
    write(sda + "/dev", "8:0\n");
    addPartition(kSda1, sda, 1);
    EXPECT_EQ(below(kSda), "");
    EXPECT_EQ(below(kSda1), "8:0");
}

TEST_F(Stacks, ALogicalVolumeIsAPartOfItsPhysicalVolumesAndOfTheirDisks) {
    std::string sda = addScsi(kSda, "sda"), sdb = addScsi(kSdb, "sdb");
    for (auto [folder, name] : {std::pair(sda, "8:0\n"), std::pair(sdb, "8:16\n")}) {
        write(folder + "/dev", name);
        write(folder + "/size", "100\n");
    }
    std::string part = addPartition(kSda1, sda, 1);
    write(part + "/dev", "8:1\n");
    std::string lv = addSized(kLv, "vg-lv", 150, "LVM-" + kVolume),
                inner = addSized(kInner, "vg-lv-real", 150, "LVM-" + kVolume + "-real");
    stand(lv, inner);
    stand(inner, part);
    stand(inner, sdb);
    EXPECT_EQ(below(kLv), "8:1 8:0 8:16") << "its inner layers are its own";
}

TEST_F(Stacks, WhatCoversADeviceIsTheWholeOfIt) {
    std::string sda = addScsi(kSda, "sda"), sdb = addScsi(kSdb, "sdb");
    for (auto [folder, name] : {std::pair(sda, "8:0\n"), std::pair(sdb, "8:16\n")}) {
        write(folder + "/dev", name);
        write(folder + "/size", "100\n");
    }
    std::string md = addSized(kMd, "md0", 98), crypt = addSized(kDm, "secret", 90, "CRYPT-LUKS2-x-secret");
    stand(md, sda);
    stand(md, sdb);
    stand(crypt, md);
    EXPECT_EQ(below(kMd), "8:0! 8:16!");
    EXPECT_EQ(below(kDm), "9:0! 8:0! 8:16!");
    std::string slice = addSized(kLv, "slice", 40, "");
    stand(slice, md);
    EXPECT_EQ(below(kLv), "9:0 8:0 8:16");
}

TEST_F(Stacks, TheFileBehindALoopDeviceIsTheLastLayer) {
    std::string loop = addSized(kLoop, "loop3", 100);
    EXPECT_TRUE(unit::says(unit::errorOf([&] { below(kLoop); }), "loop device loop3 has no file behind it"));
    write(loop + "/loop/backing_file", "/srv/x.img\n");
    write(loop + "/loop/offset", "0\n");
    addPartition(kLoop1, loop, 2);
    EXPECT_EQ(below(kLoop), "/srv/x.img!");
    EXPECT_EQ(below(kLoop1), "7:3 /srv/x.img-part2");
    write(loop + "/loop/offset", "512\n");
    EXPECT_EQ(below(kLoop), "/srv/x.img");
    EXPECT_EQ(below(kLoop1), "7:3 /srv/x.img");
    write(loop + "/loop/backing_file", "/srv/x.img (deleted)\n");
    EXPECT_TRUE(unit::says(unit::errorOf([&] { below(kLoop1); }), "the file behind loop device loop3 was deleted"));
}

TEST_F(Stacks, PathsOfAMultipathDeviceAreNoLayers) {
    std::string map = addMapped("mpatha", "mpath-3" + kNaa6Hex), sda = addScsi(kSda, "sda");
    write(sda + "/dev", "8:0\n");
    write(sda + "/device/vpd_pg83", page(designator(3, 1, kNaa6)));
    stand(map, sda);
    EXPECT_EQ(below(kDm), "");
}

TEST_F(Stacks, OneThatHasNoEndIsRefused) {
    std::string one = addSized(kLv, "one", 10, ""), two = addSized(kInner, "two", 10, "");
    stand(one, two);
    stand(two, one);
    EXPECT_LE(below(kLv).size(), 20u) << "each layer once";
    EXPECT_EQ(below(makedev(66, 6)), "") << "is not there";
}

TEST_F(FakeSysfs, IdentityIsAFileNameWhateverTheDeviceSays) {
    std::string sda = addScsi(kSda, "sda");
    struct Row {
        std::string wwid, identity;
    };
    for (const Row& row :
         {Row{"../../etc/passwd", "..%2F..%2Fetc%2Fpasswd"}, Row{"iqn.x:1%", "iqn.x%3A1%25"}, Row{"naa.xyz", "naa.xyz"},
          Row{"\xff", "%FF"}, Row{"", ""}, Row{" \n ", ""}, Row{"naa.0000000000000000", ""}}) {
        write(sda + "/device/wwid", row.wwid);
        EXPECT_EQ(look(kSda).identity, row.identity);
    }
    std::string previous;
    for (const std::string& end : {"1"s, "2"s}) {
        write(sda + "/device/wwid", std::string(300, '/') + end);
        std::string identity = look(kSda).identity;
        EXPECT_EQ(identity.size(), 200U);
        EXPECT_NE(identity, previous) << "the end is part of the name";
        previous = identity;
    }
}

TEST(Device, ALoopDeviceOfThisHostIsDescribedByItsFile) {
    unit::TempDir dir;
    os::Fd control, loop, file = os::openFile(dir.file("disk.img", std::string(65536, '\0')), O_RDWR);
    if (os::tryOpen("/dev/loop-control", O_RDWR, control) != 0)
        GTEST_SKIP() << "no loop devices here";
    // Somebody else may be quicker to take the free one.
    int number = -1;
    for (int tries = 0; tries < 20; tries++) {
        number = ioctl(control.get(), LOOP_CTL_GET_FREE);
        loop_config config{};
        config.fd = static_cast<__u32>(file.get());
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR; // gone when `loop` is closed
        if (number < 0 || os::tryOpen("/dev/loop" + std::to_string(number), O_RDWR, loop) != 0)
            GTEST_SKIP() << "no loop device can be had";
        if (ioctl(loop.get(), LOOP_CONFIGURE, &config) == 0)
            break;
        ASSERT_EQ(errno, EBUSY);
        number = -1;
    }
    ASSERT_GE(number, 0);
    struct stat status;
    ASSERT_EQ(fstat(loop.get(), &status), 0);
    Device device = identifyDevice(status.st_rdev);
    EXPECT_EQ(device.words, "loop device loop" + std::to_string(number) + " (of '" + dir.path("disk.img") + "')");
    EXPECT_EQ(device.identity, "");
}

TEST(Device, TheDiskOfThisVirtualMachineIsDescribed) {
    struct stat status;
    if (stat("/dev/vda", &status) < 0)
        GTEST_SKIP() << "no /dev/vda here";
    EXPECT_EQ(identifyDevice(status.st_rdev).words, "virtio disk vda");
    EXPECT_EQ(identifyDevice(status.st_rdev).identity, "");
}

} // namespace
} // namespace leasehold::storage

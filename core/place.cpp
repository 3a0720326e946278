// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/place.hpp"

#include "core/os/error.hpp"
#include "core/storage/device.hpp"
#include "core/storage/lockspace.hpp"
#include "core/storage/mount.hpp"

#include <algorithm>
#include <cstdio>

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

namespace leasehold {

namespace {

using lease::Incarnation;
using lease::Mode;
using os::FileId;
using storage::LockKind;
using storage::Lockspace;
using storage::Missing;
using storage::Scope;
using storage::Storage;

// Where the lease of an image lives that has to have one beside it.
constexpr const char* kBesideName = ".leasehold";

[[noreturn]] void unusable(const Resource& resource, const std::string& problem, Fault fault = Fault::unsupported) {
    throw Error(fault, "cannot lease '" + resource.path + "': " + problem);
}

// 0, or the error number.
int tryStat(const std::string& path, os::Wanted wanted, const Settings& settings, struct stat& status) {
    auto attempt = [&] { return os::tryStatAt(AT_FDCWD, path.c_str(), 0, wanted, status); };
    const int error = attempt();
    if (error != EACCES || !settings.imageUser || geteuid() != 0)
        return error;
    // A server that squashes root (exports(5)) may keep it out of the directory, too.
    os::FileSystemUser user(*settings.imageUser, settings.imageGroup.value_or(getegid()));
    return attempt();
}

// The name by which it is opened.
const std::string& wayTo(const Resource& resource) {
    return resource.through.empty() ? resource.path : resource.through;
}

struct stat statResource(const Resource& resource, const Settings& settings) {
    struct stat status, link;
    int error = tryStat(wayTo(resource), os::Wanted::owner, settings, status);
    if (error == 0)
        return status;
    if (error == ENOENT && lstat(resource.path.c_str(), &link) == 0)
        unusable(resource,
                 "the path is a symbolic link to a file that does not exist; restore the file or correct the link",
                 Fault::invalid);
    if (error == ENOENT || error == ENOTDIR)
        unusable(resource, "there is no such file; restore it or correct the path in the guest's configuration",
                 Fault::invalid);
    if (error == EACCES)
        unusable(resource, std::string(SystemError(error, "stat", resource.path).what()) +
                               "; where the server does not let root into the directory, name a user that it does let "
                               "in (image_user in qemu-leasehold.conf)");
    throw Error(Fault::system, std::string("cannot lease the image: ") +
                                   SystemError(error, "look at", resource.path).what() + nextStep(error));
}

// A hint for the errors that an administrator can do something about.
std::string hintFor(int error, Mode mode) {
    if (mode != Mode::readOnly && (error == EROFS || error == EACCES || error == EPERM))
        return "; a guest that writes needs it writable: change the storage, or mark the disk <readonly/>";
    if (error == EACCES || error == EPERM)
        return "; libvirtd must be allowed to read it";
    return nextStep(error);
}

struct OpenImage {
    os::Fd fd;
    struct stat status;
};

// The image as this mode needs it. A device only for looking: closing one that was open for writing makes udev examine
// it anew (udev(7), "watch").
OpenImage openImage(const Resource& resource, const Settings& settings, bool look) {
    struct stat status = statResource(resource, settings);
    bool device = S_ISBLK(status.st_mode), directory = S_ISDIR(status.st_mode);
    if (directory && resource.mode != Mode::readOnly)
        unusable(resource, "it is a directory, which can only be leased read-only: mark the disk <readonly/>");
    if (!device && !directory && !S_ISREG(status.st_mode))
        unusable(resource, "it is neither a regular file, nor a block device, nor a directory");
    // Never waits for the other end of a FIFO, or for a lease (fcntl(2), F_SETLEASE) to be broken.
    OpenImage image{{}, status};
    bool writable = resource.mode != Mode::readOnly && !device;
    // Who only looks breaks no lease and needs no permission.
    int flags = look ? O_PATH : (writable ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_NOCTTY;
    int error = os::tryOpen(wayTo(resource), flags, image.fd);
    // Where root is squashed only the image's owner may open it. The descriptor can be locked and read by root
    // afterwards: permissions are checked at open.
    if (error == EACCES && geteuid() == 0) {
        os::FileSystemUser user(settings.imageUser.value_or(status.st_uid),
                                settings.imageGroup.value_or(status.st_gid));
        error = os::tryOpen(wayTo(resource), flags, image.fd);
    }
    if (error != 0)
        throw Error(Fault::system, std::string("cannot lease the image: ") +
                                       SystemError(error, "open", resource.path).what() +
                                       hintFor(error, resource.mode));
    if (os::identify(image.fd.get(), resource.path) != os::fileIdOf(status))
        unusable(resource, "it was replaced while it was opened; try again", Fault::invalid);
    return image;
}

std::string directoryOf(const std::string& path) {
    std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// Who has no incarnation only looks.
Missing ifMissing(const Incarnation* self) {
    return self ? Missing::made : Missing::left;
}

// Whoever enters needs `owner` first, and waits a moment for it; who is suspended, and may not, has a mark up.
bool whileUnused(int fd, const std::function<void()>& work) {
    const std::string name = "a lease file";
    lease::ByteRangeMedium medium(fd, true, name);
    auto anybody = [&] { return medium.any(lease::MarkKind::owner, lease::MarkKind::taken); };
    if (anybody() || medium.tryPlace({lease::MarkKind::owner, 0, 0}, os::LockType::write) != os::LockOutcome::granted)
        return false;
    bool unused = !anybody();
    if (unused)
        work();
    medium.removeAll();
    return unused;
}

// The lease's file, or the directory and file of a set. Only here it is known who needs a lease and who named the
// lockspace, which whoever has to make room there wants to be told.
void makeIn(const Lockspace& lockspace, const std::string& name, const std::string& about, const Incarnation& self,
            qemu::StoredLease& stored) {
    try {
        if (lockspace.storage.lock != LockKind::flock) {
            stored.lease = storage::openLeaseFile(lockspace, name, about, whileUnused);
            return;
        }
        stored.directory = storage::openLeaseDirectory(lockspace, name);
        stored.lease = lease::openMarkFile(stored.directory.get(), self, about, stored.path);
    } catch (const SystemError& error) {
        if (error.error() != ENOSPC && error.error() != EDQUOT)
            throw;
        throw Error(Fault::unsupported, "lockspace '" + lockspace.path + "' (" + lockspace.origin +
                                            ") cannot be used: no space is left in it for the lease of '" +
                                            stored.path + "'; make room there, and try again");
    }
}

// Puts the lease into a lockspace, where its kind of lock is that of the lockspace's storage.
void putInto(Place& place, const Lockspace& lockspace, const std::string& name, const std::string& about,
             const Incarnation* self) {
    qemu::StoredLease& stored = place.stored;
    bool files = lockspace.storage.lock == LockKind::flock;
    os::Fd& opened = files ? stored.directory : stored.lease;
    place.storage = lockspace.storage;
    if (!lockspace.directory.open())
        return;
    if (self)
        makeIn(lockspace, name, about, *self, stored);
    else
        opened = storage::openLeaseIfExists(lockspace, name);
    if (opened.open())
        stored.leaseFile = os::identify(opened.get(), stored.path);
    stored.writable = true;
    stored.remote = stored.remote || lockspace.storage.remote;
}

Lockspace openHostLockspace(const Settings& settings, const Incarnation* self) {
    // libvirtd of a user (qemu:///session). A directory of that user's own would keep nobody out but that user.
    if (geteuid() != 0 && access(settings.hostLockspaceDir.c_str(), W_OK) != 0 && self)
        throw Error(Fault::unsupported, "its lease has to be in '" + settings.hostLockspaceDir +
                                            "', for all guests of this host, and that is root's: a guest of "
                                            "qemu:///session can have images in files on storage that has locks of its "
                                            "own, such as ext4, xfs or NFS; run guests with other disks under "
                                            "qemu:///system");
    return storage::openLockspace(settings.hostLockspaceDir, "leases of this host", {}, ifMissing(self));
}

// By which this host knows any file or device again, whatever its name.
std::string nameOnHost(const FileId& file) {
    char known[48];
    std::snprintf(known, sizeof known, "%llx-%llx", static_cast<unsigned long long>(file.device),
                  static_cast<unsigned long long>(file.inode));
    return known;
}

void putIntoHost(Place& place, const FileId& file, const Incarnation* self, const Settings& settings) {
    std::string known = nameOnHost(file);
    putInto(place, openHostLockspace(settings, self), "file-" + known, "device and inode " + known, self);
}

// A lease by the image's path, or beside it, does not protect one that can be reached in another way.
void refuseOtherNames(const Resource& resource, const OpenImage& image) {
    if (!S_ISREG(image.status.st_mode))
        return;
    if (image.status.st_nlink > 1)
        unusable(resource, "it has " + std::to_string(image.status.st_nlink) +
                               " names (hard links), and its lease goes by one of them; remove the others");
    if (os::isMountRoot(image.fd.get(), resource.path))
        unusable(resource, "it is a mount of its own (a bind mount of a file), and its lease goes by where the file "
                           "itself is; give the guest that path");
}

// The path that the lease goes by, without symbolic links.
std::string identifyingPath(const Resource& resource, const OpenImage& image) {
    std::string path = os::pathOf(image.fd.get());
    FileId file;
    // QEMU may have a file open whose name has gone, or that was never here (another mount namespace).
    if (!resource.through.empty() && (os::tryIdentify(path, file) != 0 || file != os::fileIdOf(image.status)))
        unusable(resource, "its lease goes by its path, and the path does not lead to the file that QEMU has open");
    return path;
}

// The rest of the message that storage without a lock to trust is refused with.
const char* const kOtherwise = " (or set file_lockspace_dir, or storage_locks if you know better, in "
                               "qemu-leasehold.conf)";

// The usual reason is that what should be mounted there is not.
[[noreturn]] void refuseUnshared(const Resource& resource, const Lockspace& lockspace, const std::string& reach) {
    unusable(resource, "its lockspace '" + lockspace.path + "' (" + lockspace.origin + ") is on " +
                           lockspace.storage.name + ", which only this host locks, but " + reach +
                           ": is it mounted? Put it on storage that all hosts share, or set single_host in "
                           "qemu-leasehold.conf if there is only one");
}

void refuseLocalLockspace(const Resource& resource, const Storage& image, const Lockspace& lockspace) {
    if (!lockspace.directory.open())
        return; // not made yet, and who only looks does not make it
    bool othersReachIt = image.scope == Scope::allHosts || (image.remote && image.lock == LockKind::none);
    if (othersReachIt && lockspace.storage.scope == Scope::thisHost)
        refuseUnshared(resource, lockspace, "other hosts reach the image on " + image.name);
}

// A guest that only reads, on storage without a lock to trust: nobody gets the image for writing there, on any host. So
// it is enough to keep this host's word.
void placeReader(Place& place, const Resource& resource, OpenImage image, const Storage& found, const Incarnation* self,
                 const Settings& settings) {
    place.stored.image = std::move(image.fd);
    putIntoHost(place, place.stored.file, self, settings);
    place.ofThisHost = true;
    place.tellsOutsiders = false;
    place.caution = "'" + resource.path + "' is leased for reading on this host only: it is on " + found.name +
                    ", and " + found.reason;
}

void placeFile(Place& place, const Resource& resource, OpenImage image, const Storage& found, const Incarnation* self,
               const Settings& settings) {
    qemu::StoredLease& stored = place.stored;
    stored.remote = found.remote;
    place.hidesQemu = found.hidesReadLocks;
    // Not on FUSE, also where its flock is vouched for: there a byte-range lock may outlive its holder (tests/lab).
    place.guardable = found.hidesReadLocks || found.flockImage;
    if (!settings.fileLockspaceDir.empty()) {
        refuseOtherNames(resource, image);
        Lockspace lockspace = storage::openLockspace(settings.fileLockspaceDir, "file_lockspace_dir",
                                                     settings.storageLocks, Missing::refused);
        if (!settings.singleHost)
            refuseLocalLockspace(resource, found, lockspace);
        std::string path = identifyingPath(resource, image);
        stored.image = std::move(image.fd);
        putInto(place, lockspace, "file-" + storage::hashName(path), "file '" + path + "'", self);
        stored.flocksImage = found.flockImage && stored.directory.open();
        return;
    }
    if (found.lock == LockKind::none && found.readersMayStay && resource.mode == Mode::readOnly) {
        placeReader(place, resource, std::move(image), found, self, settings);
        return;
    }
    if (found.lock == LockKind::none)
        unusable(resource, "it is on " + found.name + ", and " + found.reason + kOtherwise);
    if (found.lock == LockKind::flock) {
        refuseOtherNames(resource, image);
        std::string directory = directoryOf(identifyingPath(resource, image)) + "/" + kBesideName;
        Lockspace lockspace = storage::openLockspace(directory, "beside image '" + resource.path + "'",
                                                     settings.storageLocks, ifMissing(self));
        refuseLocalLockspace(resource, found, lockspace);
        std::string number = std::to_string(image.status.st_ino);
        stored.image = std::move(image.fd);
        putInto(place, lockspace, number, "the image with inode number " + number, self);
        stored.flocksImage = found.flockImage;
        return;
    }
    stored.lease = std::move(image.fd);
    stored.leaseFile = stored.file;
    place.storage = found;
}

// Where the lease of a device is, and what it is called there.
struct DeviceLease {
    std::string lockspace, option; // no option: of this host
    std::string name, about;
};

using Kind = storage::Device::Kind;

// The part of it that is the same for whoever uses the device itself and whoever uses something that stands on it.
// Nothing where a lockspace would know it by its path alone.
std::optional<DeviceLease> locateDevice(const storage::Device& device, dev_t number, const Settings& settings) {
    const std::string& identity = device.identity;
    if (device.kind == Kind::logicalVolume && !settings.lvmLockspaceDir.empty() && !identity.empty())
        return DeviceLease{settings.lvmLockspaceDir, "lvm_lockspace_dir", "lvm-" + identity,
                           "logical volume " + identity};
    if (device.kind == Kind::scsi && !settings.scsiLockspaceDir.empty() && !identity.empty())
        return DeviceLease{settings.scsiLockspaceDir, "scsi_lockspace_dir", "scsi-" + identity,
                           "SCSI device " + identity};
    if (!settings.fileLockspaceDir.empty()) {
        if (identity.empty())
            return std::nullopt;
        return DeviceLease{settings.fileLockspaceDir, "file_lockspace_dir", "device-" + storage::hashName(identity),
                           "device " + identity};
    }
    std::string known =
        identity.empty() ? std::to_string(major(number)) + ":" + std::to_string(minor(number)) : identity;
    return DeviceLease{settings.hostLockspaceDir, "", "device-" + known, "device " + known};
}

Lockspace openLockspaceOf(const DeviceLease& lease, const Incarnation* self, const Settings& settings) {
    return lease.option.empty()
               ? openHostLockspace(settings, self)
               : storage::openLockspace(lease.lockspace, lease.option, settings.storageLocks, Missing::refused);
}

// The kernel knows: whoever mounts a device, swaps to it or makes another one of it has it open exclusively, and nobody
// else can (open(2), O_EXCL). What sysfs says gives the reason.
void refuseHostUse(Place& place, const Resource& resource, dev_t number, const storage::Device& device,
                   const Settings& settings) {
    if (settings.hostDevices == Settings::Outsiders::ignore)
        return;
    std::string path = "/proc/self/fd/" + std::to_string(place.stored.image.get()), use;
    // Another libvirtd may be asking the same for the length of two system calls.
    constexpr int kTries = 20;
    for (int tries = 0;; tries++) {
        os::Fd alone;
        if (os::tryOpen(path, O_RDONLY | O_EXCL | O_NONBLOCK, alone) != EBUSY)
            return;
        use = storage::findHostUse(number);
        if (!use.empty() || tries == kTries)
            break;
        usleep(10000);
    }
    if (use.empty())
        use = "a program has it open for itself alone (O_EXCL)";
    std::string text = "'" + resource.path + "' (" + device.words + ") is in use by this host itself: " + use;
    if (settings.hostDevices == Settings::Outsiders::refuse)
        throw Error(Fault::unsupported, "cannot lease " + text +
                                            ". End that, or say that you know better (option host_devices in "
                                            "qemu-leasehold.conf)");
    place.caution += (place.caution.empty() ? "" : ". ") + text;
}

// Locks on a device node stay on this host, and a flock on one stops udev (systemd's "Locking Block Device Access"):
// the lease of a device is always elsewhere.
void placeDevice(Place& place, const Resource& resource, OpenImage image, const Incarnation* self,
                 const Settings& settings) {
    place.stored.image = std::move(image.fd);
    dev_t number = image.status.st_rdev;
    storage::Device device = storage::identifyDevice(number);
    if (device.kind == Kind::logicalVolume && !settings.lvmLockspaceDir.empty() && device.identity.empty())
        unusable(resource, "it is a " + device.words + " without a UUID that other hosts would know it by");
    if (device.kind == Kind::scsi && !settings.scsiLockspaceDir.empty() && device.identity.empty())
        unusable(resource, "it is the " + device.words +
                               ", which tells no identity (VPD page 0x83) that other hosts would know it by; set "
                               "one on its target, or use another lockspace");
    std::string path = "path " + resource.path;
    DeviceLease at = locateDevice(device, number, settings)
                         .value_or(DeviceLease{settings.fileLockspaceDir, "file_lockspace_dir",
                                               "device-" + storage::hashName(path), "device " + path});
    Lockspace lockspace = openLockspaceOf(at, self, settings);
    place.ofThisHost = at.option.empty();
    bool known = lockspace.directory.open();
    if (!place.ofThisHost && !settings.singleHost && known && lockspace.storage.scope == Scope::thisHost)
        refuseUnshared(resource, lockspace, "other hosts may reach the " + device.words);
    putInto(place, lockspace, at.name, at.about, self);
    if (place.storage.scope == Scope::allHosts)
        place.guardable = true;
    else if (!settings.singleHost) {
        std::string option = device.kind == Kind::logicalVolume ? "lvm_lockspace_dir"
                             : device.kind == Kind::scsi        ? "scsi_lockspace_dir"
                                                                : "file_lockspace_dir";
        place.caution = "'" + resource.path + "' (" + device.words +
                        ") is leased on this host only: guests of other hosts are not kept from it. Set " + option +
                        " in qemu-leasehold.conf to a directory that all hosts share";
        if (settings.requireClusterLeases)
            throw Error(Fault::unsupported, place.caution + " (require_cluster_leases forbids it as it is)");
    }
    // CDs and the like: nobody writes to what cannot be written to.
    bool still = resource.mode == Mode::readOnly && storage::isReadOnly(number);
    if (self && !still)
        refuseHostUse(place, resource, number, device, settings);
}

// Which directory and name the lease of a <lease> element has. One target may serve many keys.
struct NamedPlace {
    std::string lockspace, name, about;
    bool create;
};

NamedPlace locateNamed(const Resource& resource, const struct stat& target) {
    const NamedLease& lease = *resource.named;
    std::string about =
        "lockspace '" + lease.lockspace + "' key '" + lease.key + "' offset " + std::to_string(lease.offset);
    if (S_ISDIR(target.st_mode))
        return {resource.path, "lease-" + storage::hashName(about), about, false};
    about += " target inode " + std::to_string(target.st_ino);
    return {directoryOf(resource.path) + "/" + kBesideName, "lease-" + storage::hashName(about), about, true};
}

void placeNamed(Place& place, const Resource& resource, const Incarnation* self, const Settings& settings) {
    struct stat target = statResource(resource, settings), link;
    if (lstat(resource.path.c_str(), &link) == 0 && S_ISLNK(link.st_mode))
        unusable(resource, "the target of the <lease> is a symbolic link, and its lease is beside the link; name the "
                           "target itself");
    if (!S_ISREG(target.st_mode) && !S_ISDIR(target.st_mode))
        unusable(resource, "the target of a <lease> has to be a regular file or a directory");
    if (S_ISREG(target.st_mode) && target.st_nlink > 1)
        unusable(resource, "the target of the <lease> has several names (hard links), and its lease is beside one of "
                           "them; remove the others");
    NamedPlace at = locateNamed(resource, target);
    Lockspace lockspace = storage::openLockspace(at.lockspace, "for the <lease> with target '" + resource.path + "'",
                                                 settings.storageLocks, at.create ? ifMissing(self) : Missing::refused);
    place.stored.named = true;
    putInto(place, lockspace, at.name, at.about, self);
    place.stored.file = place.stored.leaseFile;
    if (place.storage.scope == Scope::allHosts)
        return;
    place.caution = "the lease '" + place.stored.path + "' is on " + place.storage.name +
                    ", which only this host locks: guests of other hosts are not kept from it";
    if (settings.requireClusterLeases)
        unusable(resource, "it is on " + place.storage.name +
                               ", which only this host locks (require_cluster_leases); put the target on storage that "
                               "all hosts share");
}

} // namespace

std::string nameOf(const Resource& resource) {
    return resource.named ? resource.named->key + " in " + resource.path : resource.path;
}

namespace {

// Without an incarnation nothing is made.
Place placeResource(const Resource& resource, const Incarnation* self, const Settings& settings) {
    Place place;
    place.stored.mode = resource.mode;
    place.stored.writable = resource.mode != Mode::readOnly;
    place.stored.path = nameOf(resource);
    if (resource.named) {
        placeNamed(place, resource, self, settings);
        return place;
    }
    OpenImage image = openImage(resource, settings, self == nullptr);
    place.stored.file = os::fileIdOf(image.status);
    if (S_ISBLK(image.status.st_mode)) {
        placeDevice(place, resource, std::move(image), self, settings);
        return place;
    }
    Storage found = storage::classify(image.fd.get(), resource.path, settings.storageLocks);
    placeFile(place, resource, std::move(image), found, self, settings);
    bool known = !place.storage.name.empty();
    if (settings.requireClusterLeases && found.remote && known && place.storage.scope == Scope::thisHost)
        unusable(resource, "it is on " + found.name +
                               " and would be leased on this host only, which "
                               "require_cluster_leases in qemu-leasehold.conf forbids; set file_lockspace_dir to a "
                               "directory that all hosts share, or correct storage_locks");
    return place;
}

} // namespace

namespace {

os::Fd duplicate(const os::Fd& fd, const std::string& path) {
    os::Fd copy(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
    if (!copy.open())
        throw SystemError(errno, "duplicate a descriptor of", path);
    return copy;
}

void addCompanion(Place& place, const Incarnation& self, const Settings& settings) {
    const qemu::StoredLease& main = place.stored;
    if (place.ofThisHost || main.named || !main.image.open())
        return;
    Place companion;
    qemu::StoredLease& stored = companion.stored;
    stored.file = main.file;
    stored.mode = main.mode;
    stored.path = main.path;
    stored.image = duplicate(main.image, main.path);
    putIntoHost(companion, main.file, &self, settings);
    place.stored.companion = std::make_unique<qemu::StoredLease>(std::move(stored));
}

} // namespace

Place openPlace(const Resource& resource, const Incarnation& self, const Settings& settings) {
    Place place = placeResource(resource, &self, settings);
    addCompanion(place, self, settings);
    return place;
}

Place openBeside(const qemu::StoredLease& known, const Resource& resource, const Incarnation& self,
                 const Settings& settings) {
    Place place = findPlace(resource, settings);
    qemu::StoredLease& stored = place.stored;
    OpenImage image = openImage(resource, settings, false);
    if (stored.leaseFile != known.leaseFile || os::fileIdOf(image.status) != stored.file)
        unusable(resource, "it was replaced while it was opened; try again", Fault::invalid);
    stored.image = std::move(image.fd);
    stored.lease = duplicate(known.lease, known.path);
    stored.directory = known.directory.open() ? duplicate(known.directory, known.path) : os::Fd();
    stored.flocksImage = false; // the marks are up already
    addCompanion(place, self, settings);
    place.shared = true;
    return place;
}

namespace {

// All that is below one device or above one file.
class BelowFinder {
public:
    BelowFinder(const Resource& resource, const Place& place, const Settings& settings)
        : resource_(resource), place_(place), settings_(settings) {}

    std::vector<Below> run() {
        struct stat image;
        if (int error = os::tryStatAt(place_.stored.imageFd(), "", AT_EMPTY_PATH, os::Wanted::identity, image))
            throw SystemError(error, "stat", resource_.path);
        if (S_ISBLK(image.st_mode))
            device(image.st_rdev);
        else if (S_ISREG(image.st_mode))
            file(image);
        return std::move(found_);
    }

private:
    void device(dev_t number) {
        if (resource_.mode == Mode::readOnly)
            parts(leaseOf(storage::identifyDevice(number), number), Mode::shared, "'" + resource_.path + "' itself");
        std::vector<storage::Layer> layers;
        try {
            layers = storage::findLayers(number);
        } catch (const Error& error) {
            unusable(resource_, error.what(), Fault::invalid);
        }
        for (const storage::Layer& layer : layers) {
            std::string words = ", which '" + resource_.path + "' is on";
            if (layer.file.empty())
                node(leaseOf(layer.device, layer.number), layer.whole, layer.device.words + words);
            else
                behindLoop(layer, "the file '" + layer.file + "'" + words);
        }
    }

    // Whoever has a part of a loop device has no lease of its file: that would put a descriptor of the whole file into
    // the hands of its QEMU. So whoever uses a file with loop devices has the lease by which this host knows them.
    void file(const struct stat& image) {
        std::vector<dev_t> loops = storage::findLoops(image);
        if (loops.empty())
            return;
        for (dev_t loop : loops)
            if (std::string use = storage::findHostUse(loop); !use.empty() && resource_.mode != Mode::readOnly &&
                                                              settings_.hostDevices != Settings::Outsiders::ignore)
                refuseUse(use);
        DeviceLease at = ofThisHost(place_.stored.file);
        std::string words = "'" + resource_.path + "' itself";
        if (!place_.stored.companion && !place_.ofThisHost)
            add(at, resource_.mode, words);
        if (resource_.mode == Mode::readOnly)
            parts(at, Mode::shared, words);
    }

    [[noreturn]] void refuseUse(const std::string& use) const {
        unusable(resource_, "this host itself uses it by way of a loop device: " + use +
                                ". End that, or say that you know better (option host_devices in qemu-leasehold.conf)");
    }

    void behindLoop(const storage::Layer& layer, const std::string& words) {
        struct stat status;
        if (stat(layer.file.c_str(), &status) < 0 || !storage::isBehindLoop(layer.loop, status))
            unusable(resource_,
                     "its path '" + layer.file + "' no longer leads to the file behind loop device " + layer.loop +
                         "; detach the loop device, and attach the image by its path",
                     Fault::invalid);
        DeviceLease at = ofThisHost(os::fileIdOf(status));
        node(at, layer.whole, words);
        if (!layer.whole)
            found_.back().partOf = layer.file;
        if (!layer.part.empty())
            add({at.lockspace, "", at.name + layer.part, at.about + layer.part}, resource_.mode, words);
        os::Fd fd;
        if (!layer.whole || os::tryOpen(layer.file, O_PATH, fd) != 0 ||
            storage::classify(fd.get(), layer.file, settings_.storageLocks).lock == LockKind::none)
            return;
        Mode mode = storage::isReadOnly(layer.number) ? Mode::readOnly : resource_.mode;
        found_.push_back(
            {.lockspace = "", .option = "", .name = "", .about = "", .file = layer.file, .mode = mode, .words = words});
    }

    void node(const DeviceLease& at, bool whole, const std::string& words) {
        add(at, whole ? resource_.mode : Mode::readOnly, words);
        if (!whole || resource_.mode == Mode::readOnly)
            parts(at, whole ? Mode::shared : Mode::readOnly, words);
    }

    void parts(const DeviceLease& at, Mode mode, const std::string& words) {
        add({at.lockspace, at.option, at.name + "-parts", "the parts of " + at.about}, mode, words);
    }

    void add(const DeviceLease& at, Mode mode, const std::string& words) {
        found_.push_back({.lockspace = at.lockspace,
                          .option = at.option,
                          .name = at.name,
                          .about = at.about,
                          .file = "",
                          .mode = mode,
                          .words = words});
    }

    // What a lockspace would know by a path has a companion, too.
    DeviceLease leaseOf(const storage::Device& device, dev_t number) const {
        struct stat status {};
        status.st_mode = S_IFBLK;
        status.st_rdev = number;
        return locateDevice(device, number, settings_).value_or(ofThisHost(os::fileIdOf(status)));
    }

    DeviceLease ofThisHost(const FileId& file) const {
        std::string known = nameOnHost(file);
        return {settings_.hostLockspaceDir, "", "file-" + known, "device and inode " + known};
    }

    const Resource& resource_;
    const Place& place_;
    const Settings& settings_;
    std::vector<Below> found_;
};

} // namespace

std::vector<Below> findBelow(const Resource& resource, const Place& place, const Settings& settings) {
    if (!settings.deviceLayers || place.stored.named)
        return {};
    return BelowFinder(resource, place, settings).run();
}

std::optional<FileId> identifyBelow(const Below& below) {
    if (below.file.empty())
        return storage::findLease(below.lockspace, below.name);
    FileId file;
    return os::tryIdentify(below.file, file) == 0 ? std::optional(file) : std::nullopt;
}

std::optional<std::string> findWholeUse(const Place& place, const Settings& settings) {
    os::Fd fd;
    if (place.partOf.empty() || os::tryOpen(place.partOf, O_RDONLY | O_NONBLOCK | O_NOCTTY, fd) != 0 ||
        storage::classify(fd.get(), place.partOf, settings.storageLocks).lock != LockKind::byteRange ||
        !lease::ByteRangeMedium(fd.get(), false, place.partOf)
             .any(lease::MarkKind::presentExclusive, lease::MarkKind::presentReadOnly))
        return std::nullopt;
    return place.stored.path + ", is in use by a guest as a whole, from before there was a loop device: 'leasehold " +
           "inspect " + place.partOf + "' says by which; shut it down or detach it there, and try again";
}

std::string layerUser(const FileId& user) {
    return "+" + nameOnHost(user);
}

Place openBelow(const Below& below, const FileId& user, const Incarnation& self, const Settings& settings) {
    Place place;
    qemu::StoredLease& stored = place.stored;
    if (!below.file.empty()) {
        place = placeResource({.path = below.file, .mode = below.mode}, &self, settings);
        place.guardable = false;
    } else {
        Lockspace lockspace =
            openLockspaceOf({below.lockspace, below.option, below.name, below.about}, &self, settings);
        stored.mode = below.mode;
        stored.named = true;
        putInto(place, lockspace, below.name, below.about, &self);
        stored.file = stored.leaseFile;
    }
    place.caution.clear();
    place.partOf = below.partOf;
    stored.lower = true;
    stored.path = below.words;
    stored.aliases = {layerUser(user)};
    return place;
}

Place findPlace(const Resource& resource, const Settings& settings) {
    return placeResource(resource, nullptr, settings);
}

std::optional<FileId> tryIdentifyResource(const Resource& resource, const Settings& settings) {
    struct stat status;
    return tryStat(resource.path, os::Wanted::identity, settings, status) == 0 ? std::optional(os::fileIdOf(status))
                                                                               : std::nullopt;
}

std::optional<FileId> identifyResource(const Resource& resource, const Settings& settings) {
    struct stat status;
    int error = tryStat(resource.path, os::Wanted::identity, settings, status);
    if (error == ENOENT || error == ENOTDIR || error == ELOOP)
        return std::nullopt;
    if (error != 0)
        throw SystemError(error, "stat", resource.path);
    if (!resource.named)
        return os::fileIdOf(status);
    NamedPlace at = locateNamed(resource, status);
    return storage::findLease(at.lockspace, at.name);
}

bool anyOnUnseenMount(const os::OpenFiles& opened) {
    std::optional<std::vector<storage::Mount>> mounts; // hardly ever asked for
    return std::any_of(opened.all().begin(), opened.all().end(), [&](const os::OpenFile& open) {
        if (major(open.file.device) != 0)
            return false;
        if (!mounts)
            mounts = storage::allMounts();
        return !storage::isAmong(*mounts, open.file.device);
    });
}

void checkOurs(const qemu::StoredLease& lease) {
    visitParts(lease, [](const qemu::StoredLease& part) {
        bool directory = part.directory.open();
        if (part.onImage() && !directory)
            return;
        if (!storage::mayCarryLease((directory ? part.directory : part.lease).get(), part.path))
            throw Error(Fault::invalid, "the lease of '" + part.path + "' is in a " +
                                            (directory ? "directory" : "file") +
                                            " that leasehold has not made, or that others than root may change: "
                                            "destroy the guest and start it again");
    });
}

namespace {

std::variant<lease::ByteRangeMedium, lease::FileSetMedium> mediumOf(const qemu::StoredLease& stored,
                                                                    const Incarnation& self) {
    if (stored.directory.open()) {
        // A step makes and removes files there, with rights that QEMU does not have.
        checkOurs(stored);
        return lease::FileSetMedium(stored.lease.get(), stored.directory.get(),
                                    stored.flocksImage ? stored.image.get() : -1, self, stored.path);
    }
    return lease::ByteRangeMedium(stored.lease.get(), stored.writable, stored.path);
}

// Where the record of a lease stands that is not on the image.
struct RecordFile {
    os::Fd opened;
    int fd = -1;
};

RecordFile recordFileOf(const qemu::StoredLease& stored) {
    if (!stored.directory.open())
        return {{}, stored.lease.get()};
    RecordFile file;
    if (os::tryOpenAt(stored.directory.get(), lease::kGateName, O_RDWR | O_NOFOLLOW | O_NONBLOCK, 0, file.opened) == 0)
        file.fd = file.opened.get();
    return file;
}

} // namespace

AnyMedium::AnyMedium(const qemu::StoredLease& stored, const Incarnation& self) : medium_(mediumOf(stored, self)) {}

lease::Medium& AnyMedium::operator*() {
    return std::visit([](auto& medium) -> lease::Medium& { return medium; }, medium_);
}

void writeOwner(const qemu::StoredLease& stored, const lease::OwnerRecord& record) {
    // With root's rights an attribute can be set through a descriptor that is open for reading: not where the vessel
    // might have it from a QEMU that was broken into.
    int flags = fcntl(stored.lease.get(), F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY)
        return;
    if (stored.onImage())
        lease::writeRecord(stored.lease.get(), record);
    else
        lease::writeRecordAt(recordFileOf(stored).fd, storage::kRecordOffset, record);
}

std::optional<lease::OwnerRecord> readOwner(const qemu::StoredLease& stored) {
    return stored.onImage() ? lease::readRecord(stored.lease.get())
                            : lease::readRecordAt(recordFileOf(stored).fd, storage::kRecordOffset);
}

bool isListed(const qemu::StoredLease& stored, const Incarnation& self) {
    if (stored.onImage())
        return true;
    if (stored.directory.open())
        return lease::isMarkFileListed(stored.directory.get(), stored.lease.get(), self, stored.path);
    struct stat status;
    if (fstat(stored.lease.get(), &status) == 0) {
        // An NFS client keeps a file that was removed while somebody on this host has it open, under the hidden name
        // .nfsNUMBER (Linux fs/nfs/unlink.c, nfs_sillyrename): hosts that come later do not find it. No lease file has
        // such a name.
        std::string path = os::pathOf(stored.lease.get());
        return status.st_nlink > 0 && !path.substr(path.rfind('/') + 1).starts_with('.');
    }
    if (errno == ESTALE) // NFS
        return false;
    throw SystemError(errno, "stat the lease file of", stored.path);
}

void sweepLease(const qemu::StoredLease& stored) {
    if (stored.directory.open()) {
        // A gate is never removed. Its file of marks is dead without a flock, whoever has a copy of the descriptor.
        os::unflock(stored.lease.get(), stored.path);
        return;
    }
    if (stored.onImage())
        return;
    // A QEMU that was broken into would have us remove whatever it has open.
    if (!storage::isTrusted(stored.lease.get(), stored.path))
        return;
    // Whoever enters looks afterwards whether the file still has a name.
    whileUnused(stored.lease.get(), [&] {
        std::string path = os::pathOf(stored.lease.get(), "");
        FileId file;
        if (!path.empty() && os::tryIdentify(path, file) == 0 && file == stored.leaseFile)
            (void)unlink(path.c_str());
    });
}

} // namespace leasehold

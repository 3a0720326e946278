// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// What nobody should ask for, and what libvirt of another version or a broken machine asks for all the same. Every
// refusal says what is wrong with what, leaves no lease, and leaves nothing open in libvirtd.

#include "tests/plugin/libvirtd.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/fs.h> // after sys/mount.h, whose names it makes macros (Linux 5.10)

namespace leasehold::plugin_test {
namespace {

constexpr unsigned kReadOnly = LOCK_RESOURCE_READONLY, kShared = LOCK_RESOURCE_SHARED;

class BadImage : public PluginTest {
protected:
    // At the start of a guest and at a hot-plug, alone and beside a good disk.
    void expectRefused(const Disk& bad, int code, const std::vector<std::string>& words) {
        const std::size_t before = host_.descriptors();
        EXPECT_TRUE(refused(host_.start(guest_, {bad}), code, words));
        EXPECT_TRUE(refused(host_.start(guest_, {{good_}, bad}), code, words));
        EXPECT_TRUE(kernelLocksOn(good_).empty());
        const Started running = boot(host_, guest_, {});
        EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), {bad}), code, words));
        EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), {{good_}, bad}), code, words));
        EXPECT_TRUE(kernelLocksOn(good_).empty());
        EXPECT_TRUE(granted(host_.detach(guest_, running.pid(), {{good_}, bad}))) << "what libvirt calls to undo it";
        EXPECT_EQ(host_.descriptors(), before);
    }

    std::string good_ = image("good.img");
    Libvirtd host_;
};

TEST_F(BadImage, MissingFileIsNamed) {
    expectRefused({path("missing.img")}, kFailed, {path("missing.img"), "no such file"});
    expectRefused({path("missing.img"), kReadOnly}, kFailed, {path("missing.img"), "no such file"});
    expectRefused({path("no/such/folder.img")}, kFailed, {path("no/such/folder.img"), "no such file"});
    expectRefused({good_ + "/below"}, kFailed, {good_ + "/below", "no such file"});
}

TEST_F(BadImage, DanglingSymbolicLinkIsCalledOne) {
    std::filesystem::create_symlink("nowhere", path("link"));
    expectRefused({path("link")}, kFailed, {path("link"), "symbolic link"});
}

TEST_F(BadImage, SymbolicLinkToItselfEnds) {
    std::filesystem::create_symlink("loop", path("loop"));
    expectRefused({path("loop")}, kSystem, {path("loop")});
}

TEST_F(BadImage, DirectoryIsOnlyForReaders) {
    std::filesystem::create_directory(path("folder"));
    expectRefused({path("folder")}, kUnsupported, {path("folder"), "directory", "<readonly/>"});
    const Started reader = boot(host_, guest_, {{path("folder"), kReadOnly}});
    EXPECT_TRUE(granted(reader));
    EXPECT_TRUE(free(path("folder"), kReadOnly));
}

TEST_F(BadImage, FifoIsRefusedWithoutWaitingForItsOtherEnd) {
    ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
    expectRefused({path("fifo")}, kUnsupported,
                  {path("fifo"), "neither a regular file, nor a block device, nor a directory"});
    expectRefused({path("fifo"), kReadOnly}, kUnsupported, {path("fifo")});
}

TEST_F(BadImage, SocketIsRefused) {
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{AF_UNIX, {}};
    path("socket").copy(address.sun_path, sizeof address.sun_path - 1);
    ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    expectRefused({path("socket")}, kUnsupported,
                  {path("socket"), "neither a regular file, nor a block device, nor a directory"});
    close(fd);
}

TEST_F(BadImage, CharacterDeviceIsRefused) {
    expectRefused({"/dev/null"}, kUnsupported, {"/dev/null"});
}

TEST_F(BadImage, FileSystemWithoutTrustedLocksIsNamed) {
    expectRefused({"/proc/version"}, kUnsupported, {"/proc/version", "proc", "file_lockspace_dir"});
}

TEST_F(BadImage, EmptyAndAbsurdNamesAreRefused) {
    EXPECT_TRUE(refused(host_.start(guest_, {{""}}), kFailed, {"'web'", "without a path"}));
    EXPECT_TRUE(refused(host_.start(guest_, {{"/" + std::string(300, 'x')}}), kSystem, {"File name too long"}));
    EXPECT_TRUE(refused(host_.start(guest_, {{std::string(5000, 'x')}}), kSystem, {"xxx"}));
    EXPECT_FALSE(host_.start(guest_, {{std::string("bad\nname")}}));
}

TEST_F(BadImage, NameOfAnImageCannotForgeALineOfTheLog) {
    const Outcome outcome = host_.start(guest_, {{path("a\nb %s %n.img")}});
    EXPECT_TRUE(refused(outcome, kFailed, {"b %s %n.img"}));
}

TEST_F(BadImage, ImmutableImageIsForReadersOnly) {
    const int fd = open(good_.c_str(), O_RDONLY | O_CLOEXEC);
    int immutable = FS_IMMUTABLE_FL, none = 0;
    if (ioctl(fd, FS_IOC_SETFLAGS, &immutable) < 0) {
        close(fd);
        GTEST_SKIP() << "this file system or user has no immutable files";
    }
    EXPECT_TRUE(refused(host_.start(guest_, {{good_}}), kSystem, {good_, "not permitted", "<readonly/>"}));
    const Started running = boot(host_, guest_, {});
    EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), {{good_}}), kSystem, {good_, "not permitted"}));
    EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), {{good_, kReadOnly}})));
    ioctl(fd, FS_IOC_SETFLAGS, &none);
    close(fd);
}

TEST_F(BadImage, ReadOnlyFileSystemIsForReadersOnly) {
    const std::string answer = inOwnProcess([&](support::PluginHost& host) -> std::string {
        std::string folder = path("");
        if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0 ||
            mount(folder.c_str(), folder.c_str(), nullptr, MS_BIND, nullptr) < 0 ||
            mount("none", folder.c_str(), nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY, nullptr) < 0)
            return "SKIP";
        host.init(path("no.conf"));
        const std::vector<Disk> writer{{good_}}, sharer{{good_, kShared}}, reader{{good_, kReadOnly}};
        for (const std::vector<Disk>& disks : {writer, sharer})
            if (const auto outcome = refused(host.registerGuest(guest_, disks), kSystem,
                                             {good_, "Read-only file system", "<readonly/>"});
                !outcome)
                return outcome.message();
        const auto started = host.registerGuest(guest_, reader);
        return started ? "" : started.message();
    });
    if (answer == "SKIP")
        GTEST_SKIP() << "mounts are not allowed here";
    EXPECT_EQ(answer, "");
    EXPECT_TRUE(kernelLocksOn(good_).empty());
}

TEST_F(BadImage, LockedAsAWholeBySomebodyElseIsRefused) {
    const int fd = open(good_.c_str(), O_RDWR | O_CLOEXEC);
    struct flock lock {};
    lock.l_type = F_WRLCK;
    ASSERT_EQ(fcntl(fd, F_OFD_SETLK, &lock), 0);
    EXPECT_TRUE(refused(host_.start(guest_, {{good_}}), kBusy,
                        {good_, "locked as a whole", "(pid " + std::to_string(getpid()) + ")"}));
    close(fd);
    EXPECT_TRUE(granted(host_.start(guest_, {{good_}})));
}

// A full descriptor table, wherever it strikes.
class FullTable : public PluginTest {
protected:
    std::vector<Disk> disks_ = images(3);
    std::vector<Disk> added_{{image("added.img")}};
    Libvirtd host_;
};

TEST_F(FullTable, StartsOrIsRefusedWithALeaseForAllOrNone) {
    bool worked = false, failed = false;
    for (unsigned limit = 4; limit < 40; limit++) {
        const Started started = host_.start(guest_, disks_, {.childDescriptorLimit = limit});
        (started.ok ? worked : failed) = true;
        for (const Disk& disk : disks_)
            ASSERT_EQ(kernelLocksOn(disk.path).empty(), !started.ok) << "limit " << limit;
        if (started) {
            ASSERT_TRUE(granted(host_.acquire(guest_, started.pid(), disks_))) << "limit " << limit;
        } else {
            ASSERT_TRUE(refused(started, kSystem, {"Too many open files"})) << "limit " << limit;
        }
    }
    EXPECT_TRUE(worked);
    EXPECT_TRUE(failed);
}

// In libvirtd, on a vessel where libvirtd looks first, and on one that it has to search for.
class FullTableOfLibvirtd : public FullTable, public testing::WithParamInterface<bool> {
protected:
    void SetUp() override {
        running_ = host_.start(guest_, disks_, GetParam() ? CallOptions{.childDescriptorLimit = 60} : CallOptions{});
        ASSERT_TRUE(granted(running_));
        ASSERT_TRUE(granted(host_.acquire(guest_, running_.pid(), disks_)));
        before_ = host_.descriptors();
    }
    // Calls with no descriptors left, one, two... until it works; `check` sees every outcome.
    void sweep(
        const std::function<Outcome()>& call, const std::function<void(const Outcome&)>& check,
        const std::function<void()>& prepare = [] {}) {
        bool failed = false;
        for (unsigned free = 0; free < 40 && !HasFailure(); free++) {
            prepare();
            host_.limitFreeDescriptors(free);
            const Outcome outcome = call();
            host_.limitFreeDescriptors({});
            SCOPED_TRACE("with " + std::to_string(free) +
                         " free descriptors: " + (outcome.ok ? "yes" : outcome.message()));
            EXPECT_TRUE(outcome.ok || refused(outcome, kSystem, {"Too many open files"}));
            EXPECT_EQ(host_.descriptors(), before_);
            for (const Disk& disk : disks_)
                EXPECT_GE(locksOnByte(disk.path, 1LL << 62), 1u) << "a lease was lost";
            check(outcome);
            failed = failed || !outcome.ok;
        }
        EXPECT_TRUE(failed);
    }

    Started running_;
    std::size_t before_ = 0;
};

TEST_P(FullTableOfLibvirtd, AcquireSaysWhatIsFullAndLosesNothing) {
    sweep([&] { return host_.acquire(guest_, running_.pid(), disks_); }, [](const Outcome&) {});
}

TEST_P(FullTableOfLibvirtd, AttachSaysWhatIsFullAndLeavesNoLease) {
    sweep([&] { return host_.acquire(guest_, running_.pid(), added_); },
          [&](const Outcome& outcome) {
              EXPECT_EQ(kernelLocksOn(added_[0].path).empty(), !outcome.ok);
              EXPECT_TRUE(granted(host_.detach(guest_, running_.pid(), added_)));
          });
}

TEST_P(FullTableOfLibvirtd, ReleaseGivesAStateOrSaysWhatIsFull) {
    sweep(
        [&] {
            StateOutcome outcome = host_.release(guest_, running_.pid(), disks_);
            EXPECT_EQ(outcome.state.has_value(), outcome.ok) << "a suspended guest without a state";
            return outcome;
        },
        [](const Outcome&) {});
}

TEST_P(FullTableOfLibvirtd, InquireGivesAStateOrSaysWhatIsFull) {
    sweep(
        [&] {
            StateOutcome outcome = host_.inquire(guest_, running_.pid(), disks_);
            EXPECT_EQ(outcome.state.has_value(), outcome.ok) << "a migration without a state";
            return outcome;
        },
        [](const Outcome&) {});
}

TEST_P(FullTableOfLibvirtd, DetachFreesTheImageOrSaysWhatIsFull) {
    sweep([&] { return host_.detach(guest_, running_.pid(), added_); },
          [&](const Outcome& outcome) { EXPECT_EQ(kernelLocksOn(added_[0].path).empty(), outcome.ok); },
          [&] { EXPECT_TRUE(granted(host_.acquire(guest_, running_.pid(), added_))); });
}

INSTANTIATE_TEST_SUITE_P(Vessel, FullTableOfLibvirtd, testing::Values(false, true),
                         [](const auto& value) { return value.param ? "SearchedFor" : "WhereItIsLookedForFirst"; });

TEST_F(FullTable, ThreeHundredLeasesNeedTheirDescriptorsAndSaySo) {
    const std::vector<Disk> many = images(300);
    Libvirtd host;
    const Started running = boot(host, support::makeGuest("big", 3), many);
    host.limitFreeDescriptors(100);
    EXPECT_TRUE(
        refused(host.acquire(support::makeGuest("big", 3), running.pid(), many), kSystem, {"Too many open files"}));
    host.limitFreeDescriptors({});
    EXPECT_TRUE(granted(host.acquire(support::makeGuest("big", 3), running.pid(), many)));
    EXPECT_TRUE(leased(many[299].path));
}

// At three in the morning: which guest, and which limit of which program?
TEST_F(FullTable, MessageNamesTheGuestAndTheLimitToRaise) {
    const Started running = boot(host_, guest_, disks_);
    for (unsigned free : {0u, 2u, 4u}) {
        host_.limitFreeDescriptors(free);
        EXPECT_TRUE(refused(host_.acquire(guest_, running.pid(), disks_), kSystem, {"'web'", "LimitNOFILE"})) << free;
        host_.limitFreeDescriptors({});
    }
    EXPECT_TRUE(refused(host_.start(rival_, added_, {.childDescriptorLimit = 6}), kSystem, {"'rival'", "LimitNOFILE"}));
}

class BadState : public PluginTest {
protected:
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
    Libvirtd host_{{.config = "handoff_wait = 0\n"}};
};

TEST_F(BadState, IsTheSameAsNone) {
    const Started running = boot(host_, guest_, disks_);
    const std::string good = host_.release(guest_, running.pid(), disks_).state.value();
    std::vector<std::string> bad{"",
                                 "x",
                                 "leasehold1:",
                                 "leasehold2" + good.substr(10),
                                 good + "0",
                                 good + " ",
                                 "\xff\xfe",
                                 "%s%s%n",
                                 std::string(100'000, 'A'),
                                 good.substr(0, good.size() - 8) + "00000000",
                                 good.substr(0, good.size() - 8) + "ffffffff",
                                 good.substr(0, good.size() - 8) + "-0000001",
                                 "<state/>"};
    for (std::size_t length = 1; length < good.size(); length++)
        bad.push_back(good.substr(0, length));
    for (const std::string& state : bad) {
        EXPECT_TRUE(granted(host_.acquire(guest_, running.pid(), disks_, {.state = state}))) << state.substr(0, 80);
        EXPECT_TRUE(granted(host_.release(guest_, running.pid(), disks_, {.state = state}))) << state.substr(0, 80);
    }
    EXPECT_TRUE(leased(disk_));
}

TEST_F(BadState, EntitlesToNothingWhileTheGuestIsElsewhere) {
    Libvirtd source;
    const Started here = boot(source, guest_, disks_);
    const std::string good = source.inquire(guest_, here.pid(), disks_).state.value();
    const Started there = host_.start(guest_, disks_);
    ASSERT_TRUE(granted(there));
    source.release(guest_, here.pid(), disks_);
    std::string otherUuid = good, otherToken = good;
    otherUuid[12] = otherUuid[12] == '0' ? '1' : '0';
    otherToken.back() = otherToken.back() == '0' ? '1' : '0';
    for (const std::string& forged : {otherUuid, otherToken, good.substr(0, 20), std::string("garbage"), good + "0"})
        EXPECT_TRUE(refused(host_.acquire(guest_, there.pid(), disks_, {.state = forged}), kBusy, {"'web'", disk_}))
            << forged;
    EXPECT_TRUE(granted(host_.acquire(guest_, there.pid(), disks_, {.state = good})));
}

TEST_F(BadState, OfAnotherGuestIsNotQuoted) {
    const Started running = boot(host_, guest_, disks_);
    const std::string mine = host_.release(guest_, running.pid(), disks_).state.value();
    EXPECT_TRUE(refused(host_.start(rival_, disks_), kBusy, {"'web'"}));
    const Started rival = boot(host_, rival_, {});
    EXPECT_TRUE(refused(host_.acquire(rival_, rival.pid(), disks_, {.state = mine}), kBusy, {"'web'", "'rival'"}));
}

class BadProcess : public PluginTest {
protected:
    // All the calls that take a pid.
    std::vector<Outcome> callAll(pid_t pid) {
        return {host_.acquire(guest_, pid, disks_), host_.release(guest_, pid, disks_),
                host_.inquire(guest_, pid, disks_), host_.detach(guest_, pid, disks_)};
    }
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
    Libvirtd host_;
};

TEST_F(BadProcess, DeadQemuIsCalledDead) {
    Started running = boot(host_, guest_, disks_);
    running.qemu->kill();
    const std::size_t before = host_.descriptors(); // and it is reaped
    EXPECT_TRUE(
        refused(host_.acquire(guest_, running.pid(), disks_), kSystem, {"'web'", std::to_string(running.pid())}));
    for (const Outcome& outcome : callAll(running.pid()))
        EXPECT_TRUE(outcome.ok || outcome.message().find("'web'") != std::string::npos) << outcome.message();
    EXPECT_EQ(host_.descriptors(), before);
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(BadProcess, AbsurdPidsAreRefused) {
    for (pid_t pid : {0, -1, 1 << 30})
        EXPECT_TRUE(refused(host_.acquire(guest_, pid, disks_), kSystem, {"'web'"})) << pid;
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(BadProcess, ProcessThatIsNoQemuKeepsNoLeases) {
    EXPECT_TRUE(refused(host_.acquire(guest_, getpid(), disks_), kBusy, {"'web'", std::to_string(getpid())}));
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

// The number of a dead QEMU was given to the QEMU of another guest.
TEST_F(BadProcess, QemuOfAnotherGuestIsNotTouched) {
    const Started other = boot(host_, rival_, disks_);
    const std::size_t before = kernelLocksOn(disk_).size();
    EXPECT_TRUE(refused(host_.acquire(guest_, other.pid(), disks_), kBusy, {"'web'"}));
    callAll(other.pid());
    EXPECT_EQ(kernelLocksOn(disk_).size(), before);
    Libvirtd elsewhere;
    EXPECT_TRUE(refused(elsewhere.start(guest_, disks_), kBusy, {"'rival'"}));
    EXPECT_TRUE(granted(host_.acquire(rival_, other.pid(), disks_)));
}

// Calls that PluginHost would not make: the C table itself.
class Interface : public PluginTest {
protected:
    static LockParam parameter(int type, const char* key) {
        LockParam made{};
        made.type = type;
        made.key = key;
        return made;
    }
    std::vector<LockParam> domain(const char* name, unsigned pid) {
        std::vector<LockParam> made{parameter(LOCK_PARAM_UUID, "uuid"), parameter(LOCK_PARAM_STRING, "name"),
                                    parameter(LOCK_PARAM_UINT, "id"), parameter(LOCK_PARAM_UINT, "pid"),
                                    parameter(LOCK_PARAM_CSTRING, "uri")};
        std::copy(guest_.uuid.begin(), guest_.uuid.end(), made[0].value.uuid);
        made[1].value.cstr = name;
        made[3].value.ui = pid;
        return made;
    }
    std::string write(const std::string& text) {
        std::ofstream(path("leasehold.conf")) << text;
        return path("leasehold.conf");
    }
    std::string disk_ = image("disk.img");
    std::vector<Disk> disks_{{disk_}};
};

// gtest's answer as inOwnProcess() wants it.
std::string problemOf(const testing::AssertionResult& result) {
    return result ? "" : result.message();
}

TEST_F(Interface, UnknownOptionKeepsTheDriverFromStarting) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) {
                  const std::string file = write("# a comment\nauto_disk_lease = 1\n");
                  const Outcome outcome = host.init(file);
                  return problemOf(refused(outcome, kFailed, {file + ":2:", "auto_disk_lease", "auto_disk_leases"}));
              }),
              "");
}

TEST_F(Interface, NothingWorksAfterARefusedInit) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  if (host.init(write("nonsense = 1\n")))
                      return "init took nonsense";
                  return problemOf(refused(host.registerGuest(guest_, disks_), kFailed, {"before it was initialised"}));
              }),
              "");
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Interface, MissingConfigurationMeansTheDefaults) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) { return problemOf(granted(host.init(path("none")))); }), "");
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) {
                  return host.driver().init(LOCK_DRIVER_VERSION, nullptr, 0) == 0 ? "" : "no file name at all";
              }),
              "");
}

TEST_F(Interface, InitComesOnceForEachDriverOfLibvirtd) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  for (int i = 0; i < 5; i++)
                      if (const auto outcome = granted(host.init(path("none"), LOCK_DRIVER_VERSION, 0)); !outcome)
                          return outcome.message();
                  if (const auto outcome = refused(host.init(write("x = 1\n")), kFailed, {":1:"}); !outcome)
                      return "a later mistake: " + std::string(outcome.message());
                  return problemOf(granted(host.registerGuest(guest_, disks_)));
              }),
              "");
}

TEST_F(Interface, VersionThatIsTooOldIsRefusedAndNewerOnesAreNot) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  for (unsigned version : {0u, 1u, 999'999u})
                      if (const auto outcome = refused(host.init(path("none"), version), kUnsupported, {"1.0.0"});
                          !outcome)
                          return outcome.message();
                  return problemOf(granted(host.init(path("none"), 9'000'000, ~0u)));
              }),
              "");
}

TEST_F(Interface, CallsAfterDeinitStillWork) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  auto started = host.registerGuest(guest_, disks_);
                  if (!started || !host.deinit())
                      return "start or deinit: " + started.message();
                  if (const auto outcome = granted(host.acquire(guest_, started.process->pid(), disks_)); !outcome)
                      return outcome.message();
                  host.init(path("none"));
                  return problemOf(granted(host.acquire(guest_, started.process->pid(), disks_)));
              }),
              "");
}

TEST_F(Interface, UnknownFlagsParametersAndResourcesOfALaterLibvirtAreIgnored) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  LockParam odd = parameter(99, "colour"), nameless = parameter(LOCK_PARAM_DOUBLE, nullptr);
                  const CallOptions options{.createFlags = 0xff00,
                                            .callFlags = 0xfff0,
                                            .extraParameters = {odd, nameless},
                                            .failureAction = 77};
                  const std::vector<Disk> disks{{disk_, 0xff00}, {"/nowhere", 0, 17, {odd}}};
                  auto started = host.registerGuest(guest_, disks, options);
                  if (!started)
                      return started.message();
                  const pid_t pid = started.process->pid();
                  if (const auto outcome = granted(host.acquire(guest_, pid, disks, options)); !outcome)
                      return outcome.message();
                  if (kernelLocksOn(disk_).empty())
                      return "no lease";
                  if (!host.release(guest_, pid, disks, options) || !host.inquire(guest_, pid, disks, options))
                      return "release or inquire";
                  support::order(pid, 'c', disk_);
                  if (!host.detach(guest_, pid, disks, options))
                      return "detach";
                  return kernelLocksOn(disk_).empty() ? "" : "still leased";
              }),
              "");
}

TEST_F(Interface, LeaseElementWithoutItsTargetIsRefused) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  LockParam parameters[] = {parameter(LOCK_PARAM_STRING, "path"),
                                            parameter(LOCK_PARAM_STRING, "lockspace"),
                                            parameter(LOCK_PARAM_ULONG, "offset")};
                  parameters[0].value.cstr = "/nowhere/lease";
                  const std::vector<Disk> disks{
                      {disk_}, {"somekey", 0, LOCK_RESOURCE_LEASE, {std::begin(parameters), std::end(parameters)}}};
                  return problemOf(refused(host.registerGuest(guest_, disks), kFailed, {"'web'", "/nowhere/lease"}));
              }),
              "");
    EXPECT_TRUE(kernelLocksOn(disk_).empty());
}

TEST_F(Interface, ObjectThatIsNoGuestIsRefused) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  LockManager manager{&host.driver(), &manager};
                  auto params = domain("web", 1);
                  for (unsigned type : {1u, 2u, ~0u})
                      if (host.driver().create(&manager, type, params.size(), params.data(), 0) == 0)
                          return "took object type " + std::to_string(type);
                  if (manager.privateData)
                      return "left a request behind";
                  host.driver().destroy(&manager);
                  return "";
              }),
              "");
}

TEST_F(Interface, NullNamesAndMissingParametersAreRefused) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  const LockDriver& driver = host.driver();
                  LockManager manager{&driver, nullptr};
                  auto params = domain(nullptr, 1);
                  if (driver.create(&manager, 0, params.size(), params.data(), 0) == 0)
                      return "took a guest without a name";
                  params = domain("web", 1);
                  if (driver.create(&manager, 0, 1, params.data(), 0) == 0)
                      return "took a guest with nothing but a UUID";
                  if (driver.create(&manager, 0, 0, nullptr, 0) == 0)
                      return "took no parameters";
                  if (driver.create(&manager, 0, params.size() - 1, params.data() + 1, 0) == 0)
                      return "took a guest without a UUID";
                  if (driver.create(&manager, 0, params.size(), params.data(), 0) != 0)
                      return "refused a good one";
                  if (driver.addResource(&manager, LOCK_RESOURCE_DISK, nullptr, 0, nullptr, 0) == 0)
                      return "took a disk without a name";
                  if (driver.addResource(&manager, LOCK_RESOURCE_LEASE, nullptr, 0, nullptr, 0) == 0)
                      return "took a lease without a name";
                  if (driver.addResource(&manager, LOCK_RESOURCE_LEASE, "key", 0, nullptr, 0) == 0)
                      return "took a lease without a target";
                  if (driver.addResource(&manager, 5, nullptr, 0, nullptr, 0) != 0)
                      return "refused an unknown resource without a name";
                  if (driver.inquire(&manager, nullptr, 0) != 0)
                      return "inquire without a state pointer";
                  driver.destroy(&manager);
                  return "";
              }),
              "");
}

TEST_F(Interface, ParametersOfTheWrongTypeAreNotTakenForSomethingElse) {
    EXPECT_EQ(inOwnProcess([&](support::PluginHost& host) -> std::string {
                  host.init(path("none"));
                  LockManager manager{&host.driver(), nullptr};
                  auto params = domain("web", 1);
                  params[1].type = LOCK_PARAM_UINT; // "name", now a number: must not be read as a pointer
                  params[1].value.ul = 0x1234;
                  if (host.driver().create(&manager, 0, params.size(), params.data(), 0) == 0)
                      return "took a number for a name";
                  return "";
              }),
              "");
}

// libvirtd shows what the child said last.
TEST_F(Interface, RefusalInTheChildIsReportedOnce) {
    Libvirtd host;
    const Outcome outcome = host.start(guest_, {{path("missing")}});
    EXPECT_EQ(outcome.reports.size(), 1u);
}

TEST_F(Interface, NamesOfGuestsCannotForgeMessages) {
    Libvirtd host;
    const Guest odd{"evil\n%s%n\x1b[2J'", guest_.uuid, 1};
    const Started running = boot(host, odd, disks_);
    const Outcome outcome = stranger().start(rival_, disks_);
    EXPECT_TRUE(refused(outcome, kBusy, {"evil", "%s%n"}));
    EXPECT_EQ(outcome.message().find('\x1b'), std::string::npos);
    EXPECT_TRUE(refused(host.start(odd, {{path("missing")}}), kFailed, {path("missing")}));
    EXPECT_TRUE(refused(host.acquire(odd, 0, disks_), kSystem, {"evil"}));
    EXPECT_TRUE(refused(host.acquire(odd, running.pid(), {{""}}), kFailed, {"evil"}));
}

} // namespace
} // namespace leasehold::plugin_test

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold check: everything that has to be right on a host before leases protect anybody, one line each.

#include "core/os/process.hpp"
#include "core/os/text.hpp"
#include "core/settings.hpp"
#include "core/storage/mount.hpp"
#include "tools/daemons.hpp"
#include "tools/guests.hpp"
#include "tools/libvirt.hpp"
#include "tools/options.hpp"
#include "tools/plugin_file.hpp"
#include "tools/storage.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <iostream>
#include <optional>
#include <sstream>

#include <glob.h>
#include <signal.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

enum class Level { ok, warning, problem };

struct Finding {
    const char* about;
    Level level;
    std::string text, remedy;
};

Finding checkKernel() {
    utsname name{};
    unsigned major = 0, minor = 0;
    (void)uname(&name);
    std::string text = std::string("Linux ") + name.release;
    if (std::sscanf(name.release, "%u.%u", &major, &minor) != 2 || std::pair(major, minor) < std::pair(5u, 9u))
        return {"kernel", Level::problem, text + " has no close_range", "leasehold needs Linux 5.9 or later"};
    return {"kernel", Level::ok, text, ""};
}

// Whether a child of ours lets us take its descriptors. libvirtd does the same to QEMU, as root and under its own
// security profile, which is why the profiles are looked at as well.
bool mayTakeFromChild() {
    pid_t child = fork();
    if (child < 0)
        throw SystemError(errno, "fork", "a process to test with");
    if (child == 0) {
        pause();
        _exit(0);
    }
    bool may = os::Process(child).mayTakeDescriptors();
    kill(child, SIGKILL);
    (void)waitpid(child, nullptr, 0);
    return may;
}

std::vector<Finding> checkPermissions() {
    std::vector<Finding> found;
    constexpr const char* kAbout = "pidfd_getfd";
    std::string yama = os::readFileIfPossible("/proc/sys/kernel/yama/ptrace_scope", 1).value_or("0");
    if (yama == "3")
        found.push_back({kAbout, Level::problem, "kernel.yama.ptrace_scope is 3: nobody may take descriptors",
                         "set it to 0, 1 or 2 and reboot: 3 cannot be taken back"});
    else if (!mayTakeFromChild())
        found.push_back({kAbout, Level::problem, "the descriptors of another process cannot be taken",
                         geteuid() == 0 ? "see the audit log for what forbids ptrace to root"
                                        : "run this as root, as libvirtd runs"});
    else
        found.push_back({kAbout, Level::ok, "the descriptors of other processes can be taken", ""});
    if (os::readFileIfPossible("/sys/fs/selinux/enforce", 1) == "1") {
        // Where semodule(8) keeps what is loaded: POLICY/active/modules/PRIORITY/NAME.
        glob_t modules{};
        bool loaded = glob("/var/lib/selinux/*/active/modules/*/leasehold", 0, nullptr, &modules) == 0;
        globfree(&modules);
        found.push_back({"SELinux", loaded ? Level::ok : Level::warning,
                         loaded ? "leasehold's policy module is loaded"
                                : "SELinux is enforcing without leasehold's policy module: guests will be refused, and "
                                  "the audit log does not show all of the reasons",
                         loaded ? "" : "install leasehold-selinux, or semodule -i leasehold.pp"});
    }
    const bool confines = os::readFileIfPossible("/sys/module/apparmor/parameters/enabled", 1) == "Y";
    for (const std::string daemon : {"libvirtd", "virtqemud"}) {
        auto profile = os::readFileIfPossible("/etc/apparmor.d/usr.sbin." + daemon, 1 << 20);
        if (!confines || !profile)
            continue;
        bool allows = profile->find("ptrace (read,trace)") != std::string::npos;
        found.push_back(
            {"AppArmor", allows ? Level::ok : Level::warning,
             daemon + (allows ? "'s profile has the ptrace rule" : "'s profile has no ptrace rule"),
             allows ? "" : "add `ptrace (read,trace) peer=libvirt-*,` to /etc/apparmor.d/local/usr.sbin." + daemon});
    }
    return found;
}

// The first `lock_manager = "NAME"`, in libvirt's own syntax: of several it takes that (virConfGetValue).
std::string lockManagerIn(const std::string& text) {
    std::istringstream lines(text);
    std::string line, name;
    while (name.empty() && std::getline(lines, line)) {
        char value[64];
        if (std::sscanf(line.c_str(), " lock_manager = \"%63[^\"]\"", value) == 1 ||
            std::sscanf(line.c_str(), " lock_manager = '%63[^']'", value) == 1)
            name = value;
    }
    return name;
}

// A finding has its remedy beside it.
std::string withoutStep(const std::string& problem) {
    return problem.substr(0, problem.rfind("; "));
}

Finding checkLockManager(const std::string& file) {
    std::string enabling = "leasehold enable: sets lock_manager = \"leasehold\" in " + file;
    std::string text;
    if (auto problem = attempt([&] { text = os::readFile(file, 1 << 20); }))
        return {"lock_manager", Level::problem, withoutStep(*problem),
                remedy(file, R_OK,
                       access(file.c_str(), F_OK) < 0 && errno == ENOENT
                           ? enabling
                           : "libvirt cannot read it either: make it a file that it can read")};
    std::string name = lockManagerIn(text);
    if (name != "leasehold")
        return {"lock_manager", Level::problem,
                name.empty() ? "no lock manager is set in " + file : "the lock manager is \"" + name + "\"", enabling};
    return {"lock_manager", Level::ok, "libvirt is told to use leasehold", ""};
}

// libvirtd reads its configuration when it starts, and goes on with the driver that it has loaded then.
std::vector<Finding> checkDaemons() {
    std::vector<Finding> found;
    for (const Daemon& daemon : findDaemons()) {
        std::string who = daemon.name + " (pid " + std::to_string(daemon.pid) + ") ";
        switch (daemon.driver) {
        case Daemon::Driver::loaded:
            found.push_back({"daemon", Level::ok, who + "has loaded leasehold", ""});
            break;
        case Daemon::Driver::replaced:
            found.push_back(
                {"daemon", Level::warning, who + "goes on with a leasehold that has been replaced", daemon.restart()});
            break;
        case Daemon::Driver::absent:
            found.push_back({"daemon", Level::problem,
                             who + "has not loaded leasehold: guests that it starts are not protected",
                             daemon.restart()});
            break;
        case Daemon::Driver::hidden:
            found.push_back({"daemon", Level::warning, who + "may not be looked at", "run this as root"});
            break;
        }
    }
    if (found.empty())
        found.push_back({"daemon", Level::ok, "neither libvirtd nor virtqemud runs", ""});
    return found;
}

Finding checkPlugin(const std::string& file) {
    std::string version;
    if (auto problem = attempt([&] { version = versionOfPlugin(file); }))
        return {"plugin", Level::problem, withoutStep(*problem),
                remedy(file, R_OK, "install leasehold, or find out where libvirtd looks for its lock drivers")};
    if (version != LEASEHOLD_VERSION)
        return {"plugin", Level::problem, file + " is of version " + version + ", this command is " LEASEHOLD_VERSION,
                "install both from one version, and restart libvirtd"};
    return {"plugin", Level::ok, file + ", version " + version, ""};
}

Finding checkSettings(const std::string& file) {
    auto mistake = attempt([&] { (void)loadSettings(file); });
    if (mistake)
        return {"configuration", Level::problem, *mistake,
                remedy(file, R_OK, "libvirtd's driver will not start with it: correct it")};
    return {"configuration", Level::ok, file + (access(file.c_str(), F_OK) == 0 ? "" : " does not exist: the defaults"),
            ""};
}

// What should be mounted there may not be.
std::vector<Finding> checkLockspaces(const Settings& settings, int timeout) {
    std::vector<Finding> found;
    const std::pair<const char*, const std::string*> all[] = {{"file_lockspace_dir", &settings.fileLockspaceDir},
                                                              {"lvm_lockspace_dir", &settings.lvmLockspaceDir},
                                                              {"scsi_lockspace_dir", &settings.scsiLockspaceDir}};
    for (const auto& entry : all) {
        const char* option = entry.first;
        const std::string* path = entry.second; // a lambda captures no binding, says clang
        if (path->empty())
            continue;
        Json storage;
        std::string about = std::string(option) + " '" + *path + "' ";
        if (auto problem =
                attempt([&] { storage = askStorage(*path, timeout, [&] { return leaseToJson(*path, settings); }); }))
            found.push_back({"lockspace", Level::problem, about + "cannot be used: " + *problem,
                             "make it, on storage that all hosts share"});
        else if (storage["scope"] != "all-hosts" && !settings.singleHost)
            found.push_back(
                {"lockspace", Level::problem,
                 about + "is on " + storage["name"].get<std::string>() + ", which only this host locks: is it mounted?",
                 "mount the storage that all hosts share, or set single_host if there is only one host"});
        else
            found.push_back({"lockspace", Level::ok, about + "is on " + storage["name"].get<std::string>(), ""});
    }
    return found;
}

Finding checkDisk(const std::string& guest, const Json& disk, const Settings& settings, int timeout) {
    std::string path = disk["path"], where = "guest '" + guest + "', " + path + ": ";
    if (path.empty())
        return {"disk", Level::warning,
                "guest '" + guest + "' has a disk of type " + disk["type"].get<std::string>() +
                    ", which libvirt does not mention to lock managers",
                "protect it on its server"};
    lease::Mode mode = disk["readonly"].get<bool>() ? lease::Mode::readOnly : lease::Mode::exclusive;
    Json storage;
    if (auto problem =
            attempt([&] { storage = askStorage(path, timeout, [&] { return leaseToJson(path, settings, mode); }); }))
        return {"disk", Level::warning, where + *problem,
                remedy(path, R_OK, "restore the file, or correct the guest's configuration")};
    if (storage["lease"] == "none")
        return {"disk", Level::problem, where + describeStorage(storage), "the guest will be refused: move the image"};
    return {"disk", Level::ok, where + describeStorage(storage), ""};
}

std::vector<Finding> checkLibvirt(const Settings& settings, int timeout) {
    Json libvirt;
    if (auto problem = attempt([&] { libvirt = askLibvirt(timeout, describeLibvirt); }))
        return {{"libvirt", Level::warning, *problem + "; the disks of its guests were not checked",
                 geteuid() == 0 ? "start libvirtd (or virtqemud) and run this again"
                                : "run this as root; and start libvirtd (or virtqemud) if it does not run"}};
    unsigned long version = libvirt["version"];
    std::string text = "libvirt " + std::to_string(version / 1000000) + "." + std::to_string(version / 1000 % 1000) +
                       "." + std::to_string(version % 1000);
    std::vector<Finding> found{version < 1000006
                                   ? Finding{"libvirt", Level::problem, text, "leasehold needs libvirt 1.0.6 or later"}
                                   : Finding{"libvirt", Level::ok, text, ""}};
    for (const Json& guest : libvirt["guests"])
        for (const Json& disk : guest["disks"])
            found.push_back(checkDisk(guest["name"], disk, settings, timeout));
    return found;
}

std::vector<Finding> checkGuests(int timeout) {
    std::vector<Finding> found;
    const bool mayHang = storage::hostHasRemoteMounts();
    HostView host = findGuests();
    for (GuestView& guest : host.guests) {
        Protection protection = Protection::leased;
        auto trouble = attemptToRead([&] {
            protection = surveyLeases(guest);
            if (protection == Protection::leased)
                (void)tryAskGently(guest, mayHang, timeout, [](const GuestView&) { return Json(); });
        });
        std::string who = "guest '" + guest.tag.name + "' (pid " + std::to_string(guest.pid) + ") ";
        if (trouble && trouble->damaged)
            found.push_back(
                {"guest", Level::problem, who + "has damaged leases: " + trouble->text, "restart the guest"});
        else if (trouble)
            found.push_back({"guest", Level::warning, who + "cannot be read: " + trouble->text, "run this again"});
        else if (protection == Protection::none)
            found.push_back({"guest", Level::warning, who + "runs without leases: it was started without leasehold",
                             "shut it down and start it again"});
    }
    for (const std::string& blind : host.blindSpots)
        found.push_back({"guest", Level::warning, "not seen: " + blind, "run this as root"});
    return found;
}

// Whether somebody would notice that storage has lost a lease while its guest runs.
Finding checkWatcher() {
    if (pid_t pid = findWatcher())
        return {"watcher", Level::ok, "leases are watched by process " + std::to_string(pid), ""};
    const std::optional<bool> needed = storage::remoteMounts();
    if (needed == false)
        return {"watcher", Level::ok, "no watcher runs, and no network storage is mounted that could lose a lease", ""};
    if (geteuid() != 0)
        return {"watcher", Level::warning, "whether a watcher runs may not be looked at", "run this as root"};
    return {"watcher", Level::warning,
            needed ? "no watcher runs: when network storage loses a lease its guest runs on"
                   : "no watcher runs, and whether network storage is mounted cannot be read: when it loses a lease "
                     "its guest runs on",
            "systemctl enable --now leasehold-watch"};
}

constexpr std::array kLevels{"ok", "warning", "problem"};

void print(const Finding& finding) {
    constexpr std::array kColours{Colour::green, Colour::yellow, Colour::red};
    std::size_t level = static_cast<std::size_t>(finding.level);
    std::cout << paint(kColours[level], kLevels[level]) << std::string(9 - std::string_view(kLevels[level]).size(), ' ')
              << paint(Colour::bold, finding.about) << ": " << os::printable(finding.text) << '\n';
    if (!finding.remedy.empty())
        std::cout << "         -> " << os::printable(finding.remedy) << '\n';
}

} // namespace

int check(const Words& arguments) {
    bool json = false;
    int timeout = kStorageTimeout;
    std::string config = LEASEHOLD_CONF, qemuConfig = LIBVIRT_QEMU_CONF, plugin = kLockDriver;
    Options options(
        "check", "",
        "Looks whether this host is set up so that leases protect its guests. The exit status tells the worst:\n"
        "0 for ok, 3 for a warning, 4 for a problem.");
    options.add("json", json, "Print JSON");
    options.add("timeout", timeout, "How long storage and libvirt may take to answer (10)", 1);
    options.add("config", config, "Another configuration (" LEASEHOLD_CONF ")", "FILE");
    options.add("qemu-conf", qemuConfig, "Another configuration of libvirt (" LIBVIRT_QEMU_CONF ")", "FILE");
    options.add("plugin", plugin, kLockDriverHelp, "FILE");
    if (!options.parse(arguments).empty())
        throw UsageError("check takes no operands; see leasehold check --help");

    std::vector<Finding> findings{checkKernel()};
    auto append = [&](std::vector<Finding> more) { std::move(more.begin(), more.end(), std::back_inserter(findings)); };
    append(checkPermissions());
    Finding manager = checkLockManager(qemuConfig);
    append({manager, checkPlugin(plugin), checkSettings(config)});
    if (manager.level == Level::ok)
        append(checkDaemons());
    Settings settings;
    (void)attempt([&] { settings = loadSettings(config); }); // a mistake in it was found above
    append(checkLockspaces(settings, timeout));
    append(checkLibvirt(settings, timeout));
    append(checkGuests(timeout));
    append({checkWatcher()});
    Level worst = Level::ok;
    Json list = Json::array();
    for (const Finding& finding : findings) {
        worst = std::max(worst, finding.level);
        if (!json)
            print(finding);
        list.push_back({{"about", finding.about},
                        {"level", kLevels[static_cast<std::size_t>(finding.level)]},
                        {"text", os::printable(finding.text)},
                        {"remedy", orNull(os::printable(finding.remedy))}});
    }
    constexpr const char* kReminder = "libvirt does not compare lock managers in a migration: every host that guests "
                                      "migrate to has to pass this check as well";
    if (json)
        printJson({{"findings", list}, {"worst", kLevels[static_cast<std::size_t>(worst)]}, {"reminder", kReminder}});
    else
        std::cout << "remember " << kReminder << '\n';
    return worst == Level::ok ? kDone : worst == Level::warning ? kWarnings : kProblems;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold enable, leasehold disable: one line of libvirt's qemu.conf, by augeas, which leaves all others as they are.

#include "core/inspect.hpp"
#include "core/os/fd.hpp"
#include "core/os/text.hpp"
#include "core/settings.hpp"
#include "tools/daemons.hpp"
#include "tools/libvirt.hpp"
#include "tools/options.hpp"
#include "tools/plugin_file.hpp"

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>

#include <augeas.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

constexpr const char* kLens = "Libvirtd_qemu.lns"; // libvirt ships it
constexpr std::size_t kMaxConfig = 1 << 20;

// Nothing where there is no file. What augeas would not explain is refused here.
std::optional<std::string> readConf(const std::string& file) {
    struct stat status;
    if (lstat(file.c_str(), &status) < 0 && errno == ENOENT)
        return std::nullopt;
    if (stat(file.c_str(), &status) < 0 && errno == ENOENT)
        throw Error(Fault::invalid, file +
                                        " is a symbolic link to a file that does not exist, so libvirt reads nothing; "
                                        "make the file, or remove the link");
    if (access(file.c_str(), R_OK) < 0) {
        int error = errno;
        throw Error(Fault::system, SystemError(error, "read", file).what() + std::string("; ") +
                                       remedy(file, R_OK, "libvirt could not read it either: put that right"));
    }
    std::string text = os::readFile(file, kMaxConfig);
    if (text.find("\r\n") != std::string::npos)
        throw Error(Fault::invalid, file +
                                        " has lines that end in CR LF, as on Windows, which augeas does not read; "
                                        "nothing was changed. Convert it first: sed -i 's/\\r$//' " +
                                        file);
    return text;
}

// qemu.conf as augeas sees it.
class QemuConf {
public:
    explicit QemuConf(const std::string& file)
        : file_(file), text_(readConf(file)),
          augeas_(aug_init(nullptr, nullptr, AUG_NO_LOAD | AUG_NO_MODL_AUTOLOAD | AUG_NO_ERR_CLOSE), aug_close) {
        if (!augeas_ || aug_error(augeas_.get()) != AUG_NOERROR)
            fail("augeas does not start");
        // An absolute path: augeas knows no other.
        tree_ = "/files" + escaped(file);
        if (aug_transform(augeas_.get(), kLens, file.c_str(), 0) < 0 || aug_load(augeas_.get()) < 0)
            fail("augeas cannot read it");
        if (auto problem = get("/augeas" + tree_ + "/error/message")) {
            auto line = get("/augeas" + tree_ + "/error/line");
            fail((line ? "line " + *line + " is not understood" : "it is not understood") + " (augeas: " + *problem +
                 ")");
        }
        // Without an error and without a tree: there is no lens, or no file.
        if (text_ && aug_match(augeas_.get(), tree_.c_str(), nullptr) != 1)
            fail("augeas has no lens for it (" + std::string(kLens) + ", which comes with libvirt)");
    }

    // libvirt takes the first of several (tests/e2e/test_command.py).
    std::optional<std::string> lockManager() const { return get(entry() + "[1]"); }

    void setLockManager(const std::string& name) {
        // What is behind the first would only lead people astray.
        (void)aug_rm(augeas_.get(), (entry() + "[position() > 1]").c_str());
        if (!lockManager()) {
            // Where the shipped file explains the option, if it still does.
            std::string comment = tree_ + "/#comment[. =~ regexp('lock_manager *=.*')][1]";
            if (aug_match(augeas_.get(), comment.c_str(), nullptr) == 1)
                (void)aug_insert(augeas_.get(), comment.c_str(), "lock_manager", 0);
        }
        if (aug_set(augeas_.get(), entry().c_str(), name.c_str()) < 0)
            fail("augeas cannot change it");
    }

    void removeLockManager() { (void)aug_rm(augeas_.get(), entry().c_str()); }

    std::string before() const { return text_.value_or(""); }

    // The file with the changes, before they are saved.
    std::string after() {
        // The lens wants the last line to have an end.
        std::string text = before() + (before().empty() || before().ends_with('\n') ? "" : "\n");
        if (aug_set(augeas_.get(), "/before", text.c_str()) < 0 ||
            aug_text_retrieve(augeas_.get(), kLens, "/before", tree_.c_str(), "/after") < 0)
            fail("augeas cannot write it");
        return get("/after").value_or("");
    }

    // Whole or not at all, with the file's owner and rights (augeas writes a new one and renames it).
    void save() {
        // A new one gets the rights that libvirt's own has: it may hold passwords.
        mode_t before = umask(text_ ? 022 : 077);
        int result = aug_save(augeas_.get());
        (void)umask(before);
        if (result == 0)
            return;
        auto problem = get("/augeas" + tree_ + "/error/message");
        if (geteuid() != 0)
            throw Error(Fault::system, file_ + " cannot be written; nothing was changed. Run this as root");
        fail("it cannot be written" + (problem ? ": " + *problem : ""));
    }

private:
    [[noreturn]] void fail(const std::string& problem) const {
        throw Error(
            Fault::system,
            file_ + ": " + problem +
                "; nothing was changed. By hand it is the line lock_manager = \"leasehold\", to set or to remove");
    }

    std::string entry() const { return tree_ + "/lock_manager"; }

    std::optional<std::string> get(const std::string& path) const {
        const char* value = nullptr;
        return aug_get(augeas_.get(), path.c_str(), &value) == 1 && value ? std::optional<std::string>(value)
                                                                          : std::nullopt;
    }

    std::string escaped(const std::string& path) const {
        std::string result;
        std::istringstream names(path);
        for (std::string name; std::getline(names, name, '/');) {
            if (name.empty())
                continue;
            char* safe = nullptr;
            (void)aug_escape_name(augeas_.get(), name.c_str(), &safe);
            result += "/" + (safe ? std::string(safe) : name);
            free(safe);
        }
        return result;
    }

    std::string file_;
    std::optional<std::string> text_;
    std::unique_ptr<augeas, decltype(&aug_close)> augeas_;
    std::string tree_;
};

std::vector<std::string> linesOf(const std::string& text) {
    std::vector<std::string> lines;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);)
        lines.push_back(line);
    return lines;
}

// The lines that go and come, with the one before them.
void printChange(const std::string& file, const std::string& before, const std::string& after) {
    std::vector<std::string> old = linesOf(before), fresh = linesOf(after);
    std::size_t top = 0, common = std::min(old.size(), fresh.size());
    while (top < common && old[top] == fresh[top])
        top++;
    std::size_t bottom = 0;
    while (bottom < common - top && old[old.size() - 1 - bottom] == fresh[fresh.size() - 1 - bottom])
        bottom++;
    std::cout << paint(Colour::bold, file + ", line " + std::to_string(top + 1) + ":") << '\n';
    if (top > 0)
        std::cout << "  " << os::printable(old[top - 1]) << '\n';
    for (std::size_t i = top; i < old.size() - bottom; i++)
        std::cout << paint(Colour::red, "- " + os::printable(old[i])) << '\n';
    for (std::size_t i = top; i < fresh.size() - bottom; i++)
        std::cout << paint(Colour::green, "+ " + os::printable(fresh[i])) << '\n';
}

// The guests of this host that have leases, or those that have none: names, in quotes.
std::vector<std::string> guestsWith(Protection wanted, int timeout) {
    // A QEMU that is not libvirt's is nobody's business here. Where libvirt does not say, all count.
    Json running;
    bool answers = !attempt([&] { running = askLibvirt(timeout, listActiveGuests); });
    std::vector<std::string> names;
    HostView host = findGuests();
    for (GuestView& guest : host.guests) {
        // One that cannot be read may be either.
        Protection protection = wanted;
        (void)attempt([&] { protection = surveyLeases(guest); });
        if (protection == Protection::hidden)
            protection = wanted;
        bool isItsGuest = std::find(running.begin(), running.end(), lease::formatUuid(guest.tag.uuid)) != running.end();
        if (protection == wanted && (!answers || isItsGuest))
            names.push_back("'" + lease::cleanName(guest.tag.name) + "'");
    }
    std::sort(names.begin(), names.end());
    return names;
}

std::string listed(const std::vector<std::string>& names) {
    std::string text = std::to_string(names.size()) + (names.size() == 1 ? " guest (" : " guests (");
    for (std::size_t i = 0; i < names.size() && i < 10; i++)
        text += (i ? ", " : "") + names[i];
    return text + (names.size() > 10 ? ", ...)" : ")");
}

// What has to be started anew, as far as it runs.
void tellWhatToRestart(bool enabled) {
    std::vector<Daemon> daemons = findDaemons();
    if (daemons.empty())
        std::cout << "Neither libvirtd nor virtqemud runs: it counts from their next start.\n";
    for (const Daemon& daemon : daemons)
        std::cout << "To put it into force: " << daemon.restart() << '\n';
    if (enabled)
        std::cout << "Do the same on every host that can reach the images: libvirt does not compare lock managers.\n"
                     "To have lost leases acted upon: systemctl enable --now leasehold-watch\n";
}

struct SwitchOrders {
    bool dryRun = false, force = false;
    int timeout = kStorageTimeout;
    std::string config = LEASEHOLD_CONF, qemuConfig = LIBVIRT_QEMU_CONF, plugin = kLockDriver;
};

SwitchOrders parse(Options& options, const char* verb, const Words& arguments, bool enables) {
    SwitchOrders orders;
    options.add("dry-run", orders.dryRun, "Show the change, and do not make it");
    options.add("force", orders.force, "Also while guests are in the way");
    options.add("timeout", orders.timeout, "How long libvirt may take to answer (10)", 1);
    options.add("qemu-conf", orders.qemuConfig, "Another configuration of libvirt (" LIBVIRT_QEMU_CONF ")", "FILE");
    if (enables) {
        options.add("config", orders.config, "Another configuration (" LEASEHOLD_CONF ")", "FILE");
        options.add("plugin", orders.plugin, kLockDriverHelp, "FILE");
    }
    if (!options.parse(arguments).empty())
        throw UsageError(std::string(verb) + " takes no operands; see leasehold " + verb + " --help");
    if (!orders.qemuConfig.starts_with('/'))
        throw UsageError("--qemu-conf takes an absolute path; see leasehold " + std::string(verb) + " --help");
    return orders;
}

// Shows and makes the change, unless guests are in the way of it.
int apply(const SwitchOrders& orders, QemuConf& conf, Protection inTheWay, const std::string& consequence,
          bool enables) {
    printChange(orders.qemuConfig, conf.before(), conf.after());
    std::vector<std::string> guests = guestsWith(inTheWay, orders.timeout);
    bool refused = !guests.empty() && !orders.force;
    if (!guests.empty())
        std::cerr << "leasehold: " << listed(guests) << ' ' << consequence
                  << (refused ? "; nothing was changed. Shut them down first, or say --force" : "") << '\n';
    if (refused)
        return kRefused;
    if (orders.dryRun) {
        std::cout << "Nothing was changed (--dry-run).\n";
        return kDone;
    }
    conf.save();
    tellWhatToRestart(enables);
    return kDone;
}

} // namespace

int enable(const Words& arguments) {
    Options options(
        "enable", "",
        "Makes leasehold libvirt's lock manager: shows the change to qemu.conf, makes it, and says what to\n"
        "restart. Refuses while guests run that have no leases.");
    SwitchOrders orders = parse(options, "enable", arguments, true);
    // With either of them wrong libvirtd's QEMU driver would not start.
    (void)loadSettings(orders.config);
    if (std::string version = versionOfPlugin(orders.plugin); version != LEASEHOLD_VERSION)
        throw Error(Fault::invalid, orders.plugin + " is of version " + version +
                                        ", this command is " LEASEHOLD_VERSION ": install both from one version");
    QemuConf conf(orders.qemuConfig);
    if (conf.lockManager() == "leasehold") {
        std::cout << "leasehold is the lock manager in " << orders.qemuConfig << " already.\n";
        for (const Daemon& daemon : findDaemons())
            if (daemon.driver == Daemon::Driver::absent || daemon.driver == Daemon::Driver::replaced)
                std::cout << daemon.name << " (pid " << daemon.pid << ") has not loaded "
                          << (daemon.driver == Daemon::Driver::replaced ? "this version of it" : "it")
                          << ". To put it into force: " << daemon.restart() << '\n';
        return kDone;
    }
    conf.setLockManager("leasehold");
    return apply(
        orders, conf, Protection::none,
        "would go on without leases, and may neither resume after a pause nor get another disk until they have "
        "been shut down and started again (guests_without_lease in qemu-leasehold.conf)",
        true);
}

int disable(const Words& arguments) {
    Options options("disable", "",
                    "Makes libvirt go without leasehold: shows the change to qemu.conf, makes it, and says what to\n"
                    "restart. Refuses while guests run that have leases.");
    SwitchOrders orders = parse(options, "disable", arguments, false);
    QemuConf conf(orders.qemuConfig);
    auto manager = conf.lockManager();
    if (manager != "leasehold") {
        std::cout << "leasehold is not the lock manager in " << orders.qemuConfig
                  << (manager ? ": that is \"" + os::printable(*manager) + "\"" : "") << ".\n";
        return kDone;
    }
    conf.removeLockManager();
    return apply(orders, conf, Protection::leased,
                 "would keep their leases until they end, but nobody would hand those over: they could not migrate to "
                 "hosts that use leasehold, nor could anybody else have disks that are detached from them",
                 false);
}

} // namespace leasehold::tools

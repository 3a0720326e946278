// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// What a lease costs: register, acquire and release through the lock-driver ABI, leasehold against virtlockd, against
// its own system calls without anything else, and against the bare open, lock and close, in one run. Within a
// repetition the contestants take turns operation by operation, in another order every time, so that a noisy minute,
// and the cold caches after a fork or a neighbour, hit all alike. Times are reported, never asserted: exit code 0 means
// that it measured, 1 that it could not, 2 wrong usage.

#include "tests/bench/calls.hpp"
#include "tests/bench/contestants.hpp"
#include "tests/bench/replay.hpp"
#include "tests/bench/report.hpp"
#include "tests/bench/scale.hpp"
#include "tests/bench/virtlockd.hpp"

#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <thread>

namespace leasehold::bench {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kWarmUps = 3; // per size, not recorded: first touches of inodes, lazy initialisations
constexpr rlim_t kFileLimit = 8192; // systemd's limit for libvirtd is higher still
constexpr std::uintmax_t kImageSize = 1 << 20;
constexpr std::array<std::size_t, 5> kSizes = {1, 4, 16, 64, 256};

volatile std::sig_atomic_t interruptedBy = 0;

struct Operation {
    const char* name;
    Contestant::Time (Contestant::*run)(const std::vector<support::Disk>&);
};

constexpr Operation kOperations[] = {
    {"register", &Contestant::registerGuest},
    {"acquire", &Contestant::acquire},
    {"release", &Contestant::release},
    {"resume", &Contestant::acquire}, // with the state that release gave
};

bool isReplayed(std::size_t operation) {
    return std::string_view(kOperations[operation].name) != "register";
}

struct Options {
    fs::path leasehold;
    fs::path leaseholdConfig;
    fs::path lockd;
    std::string virtlockd = "/usr/sbin/virtlockd";
    fs::path sanlockPlugin;
    std::string sanlock = "/usr/sbin/sanlock";
    fs::path standIn;
    fs::path directory;
    fs::path command;
    fs::path json;
    std::vector<std::size_t> crowds{1, 100};
    std::size_t crowdRepetitions = 10;
    std::size_t storm = 40;
    std::size_t repetitions = 200;
    std::vector<std::size_t> sizes{kSizes.begin(), kSizes.end()};
    std::set<std::string> without;
};

struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void printHelp(const Options& options) {
    std::cout
        << "Usage: bench [OPTION]...\n"
           "Times register, acquire and release of leases: leasehold, virtlockd, sanlock, the bare system calls.\n\n"
           "  --leasehold SO         leasehold's plugin (default "
        << options.leasehold.string()
        << ")\n"
           "  --leasehold-config F   its qemu-leasehold.conf (default: none, built-in defaults)\n"
           "  --lockd SO             virtlockd's plugin (default "
        << options.lockd.string()
        << ")\n"
           "  --virtlockd PROGRAM    the daemon (default "
        << options.virtlockd
        << ")\n"
           "  --sanlock-plugin SO    sanlock's plugin (default "
        << options.sanlockPlugin.string()
        << ")\n"
           "  --sanlock PROGRAM      the daemon (default "
        << options.sanlock
        << ")\n"
           "  --stand-in PROGRAM     plays QEMU (default "
        << options.standIn.string()
        << ")\n"
           "  --directory DIR        where the images are made and removed again (default "
        << options.directory.string()
        << ")\n"
           "  --repetitions N        per size and operation (default "
        << options.repetitions
        << ")\n"
           "  --sizes N,N,...        numbers of disks (default 1,4,16,64,256)\n"
           "  --without NAME         leave out leasehold, virtlockd or sanlock; may be repeated\n"
           "  --crowds N,N,...       numbers of other guests of one image (default 1,100; 0: none)\n"
           "  --storm N              guests that start at once, and 2/3 of them on each of two hosts that evacuate\n"
           "                         (default 40; 0: none)\n"
           "  --command PROGRAM      the leasehold command (default "
        << options.command.string()
        << ")\n"
           "  --whole                all sizes: --crowds 1,10,100,1000 --storm 300, and more of each\n"
           "  --json FILE            the same as JSON, besides the table\n"
           "  --help\n\n"
           "Needs root for virtlockd, which gets a private /run. An operation is timed from create to destroy of\n"
           "the lock manager object; register in the forked child that then becomes QEMU.\n";
}

std::size_t parseNumber(std::string_view text) {
    std::size_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value == 0)
        throw UsageError("not a positive number: " + std::string(text));
    return value;
}

std::vector<std::size_t> parseNumbers(std::string_view text) {
    std::vector<std::size_t> numbers;
    for (;;) {
        const std::size_t comma = text.find(',');
        numbers.push_back(parseNumber(text.substr(0, comma)));
        if (comma == std::string_view::npos)
            return numbers;
        text.remove_prefix(comma + 1);
    }
}

// The directory of libvirt's lock drivers is the distribution's choice.
fs::path findDriver(const std::string& name) {
    for (const char* directory : {"/usr/lib/*-linux-gnu*/libvirt/lock-driver/", "/usr/lib{64,}/libvirt/lock-driver/"}) {
        glob_t found{};
        const int result = glob((directory + name).c_str(), GLOB_BRACE, nullptr, &found);
        fs::path first = result == 0 ? found.gl_pathv[0] : "";
        globfree(&found);
        if (!first.empty())
            return first;
    }
    return "/usr/lib64/libvirt/lock-driver/" + name;
}

// Of the build tree that this program is in: BUILD/tests/bench/bench.
Options defaultOptions() {
    const fs::path here = fs::read_symlink("/proc/self/exe").parent_path();
    Options options;
    options.leasehold = (here / "../../plugin/leasehold.so").lexically_normal();
    options.command = (here / "../../tools/leasehold").lexically_normal();
    options.standIn = (here / "../fake_qemu").lexically_normal();
    options.directory = here;
    options.lockd = findDriver("lockd.so");
    options.sanlockPlugin = findDriver("sanlock.so");
    return options;
}

// False: help was asked for and given.
bool parseOptions(int argc, char** argv, Options& options) {
    const option known[] = {{"leasehold", required_argument, nullptr, 'l'},
                            {"leasehold-config", required_argument, nullptr, 'c'},
                            {"lockd", required_argument, nullptr, 'k'},
                            {"virtlockd", required_argument, nullptr, 'v'},
                            {"sanlock-plugin", required_argument, nullptr, 'S'},
                            {"sanlock", required_argument, nullptr, 'L'},
                            {"stand-in", required_argument, nullptr, 's'},
                            {"directory", required_argument, nullptr, 'd'},
                            {"repetitions", required_argument, nullptr, 'n'},
                            {"sizes", required_argument, nullptr, 'z'},
                            {"without", required_argument, nullptr, 'w'},
                            {"json", required_argument, nullptr, 'j'},
                            {"crowds", required_argument, nullptr, 'r'},
                            {"storm", required_argument, nullptr, 't'},
                            {"command", required_argument, nullptr, 'm'},
                            {"whole", no_argument, nullptr, 'a'},
                            {"help", no_argument, nullptr, 'h'},
                            {}};
    for (int letter; (letter = getopt_long(argc, argv, "h", known, nullptr)) != -1;) {
        switch (letter) {
        case 'l':
            options.leasehold = optarg;
            break;
        case 'c':
            options.leaseholdConfig = optarg;
            break;
        case 'k':
            options.lockd = optarg;
            break;
        case 'v':
            options.virtlockd = optarg;
            break;
        case 'S':
            options.sanlockPlugin = optarg;
            break;
        case 'L':
            options.sanlock = optarg;
            break;
        case 's':
            options.standIn = optarg;
            break;
        case 'd':
            options.directory = optarg;
            break;
        case 'n':
            options.repetitions = parseNumber(optarg);
            break;
        case 'z':
            options.sizes = parseNumbers(optarg);
            break;
        case 'w':
            if (std::string_view(optarg) != kLeasehold && std::string_view(optarg) != kVirtlockd &&
                std::string_view(optarg) != kSanlock)
                throw UsageError("--without takes leasehold, virtlockd or sanlock");
            options.without.insert(optarg);
            break;
        case 'r':
            options.crowds = std::string_view(optarg) == "0" ? std::vector<std::size_t>() : parseNumbers(optarg);
            break;
        case 't':
            options.storm = std::string_view(optarg) == "0" ? 0 : parseNumber(optarg);
            break;
        case 'm':
            options.command = optarg;
            break;
        case 'a':
            options.crowds = {1, 10, 100, 1000};
            options.crowdRepetitions = 50;
            options.storm = 300;
            break;
        case 'j':
            options.json = optarg;
            break;
        case 'h':
            printHelp(options);
            return false;
        default:
            throw UsageError("see --help");
        }
    }
    if (optind < argc)
        throw UsageError("unexpected argument: " + std::string(argv[optind]));
    return true;
}

class TemporaryDirectory {
public:
    explicit TemporaryDirectory(const fs::path& parent) {
        std::string name = (fs::canonical(parent) / "bench-XXXXXX").string();
        if (mkdtemp(name.data()) == nullptr)
            throw std::system_error(errno, std::generic_category(), name);
        path_ = name;
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory() {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    const fs::path& path() const { return path_; }

private:
    fs::path path_;
};

// By the longest mount point that begins the path: st_dev does not name a btrfs subvolume's mount.
std::string fileSystemType(const fs::path& path) {
    std::ifstream mounts("/proc/self/mountinfo");
    std::string best;
    std::string type = "unknown";
    for (std::string line; std::getline(mounts, line);) {
        std::istringstream fields(line);
        std::string word;
        std::string mountPoint;
        for (int i = 0; i < 5; ++i)
            fields >> mountPoint; // ID parent major:minor root mount-point
        while (fields >> word && word != "-") {
        }
        const fs::path mount = mountPoint;
        const bool begins = std::ranges::mismatch(mount, path).in1 == mount.end();
        if (begins && mountPoint.size() >= best.size()) { // the later mount hides the earlier
            best = mountPoint;
            fields >> type;
        }
    }
    return type;
}

void onSignal(int number) {
    interruptedBy = number;
}

// Ends by unwinding, so that the daemon, the guest and the images go as they do after an error.
void stopIfInterrupted() {
    if (interruptedBy != 0)
        throw std::runtime_error("interrupted");
}

void raiseFileLimit() {
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        throw std::system_error(errno, std::generic_category(), "getrlimit");
    limit.rlim_cur = std::max(limit.rlim_cur, std::min(limit.rlim_max, kFileLimit));
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        throw std::system_error(errno, std::generic_category(), "setrlimit");
}

struct Entry {
    std::unique_ptr<Contestant> contestant;
    std::vector<support::Disk> disks;                                            // of the largest size
    std::array<std::vector<Contestant::Time>, std::size(kOperations)> samples{}; // of the current size
    std::size_t mostDisks = std::numeric_limits<std::size_t>::max();             // that it takes of one guest
};

std::vector<support::Disk> makeImages(const fs::path& directory, std::size_t count) {
    fs::create_directories(directory);
    std::vector<support::Disk> disks;
    for (std::size_t i = 0; i < count; ++i) {
        char name[32];
        std::snprintf(name, sizeof name, "disk-%04zu.img", i);
        std::ofstream(directory / name).close();
        fs::resize_file(directory / name, kImageSize);
        disks.push_back({directory / name});
    }
    return disks;
}

// order: the contestants' turns, by index.
void repeatOnce(std::vector<Entry>& entries, const std::vector<std::size_t>& order, std::size_t disks, bool record) {
    for (std::size_t operation = 0; operation < std::size(kOperations); ++operation) {
        for (const std::size_t index : order) {
            Entry& entry = entries[index];
            if (disks > entry.mostDisks)
                continue;
            const std::vector<support::Disk> part(entry.disks.begin(),
                                                  entry.disks.begin() + static_cast<std::ptrdiff_t>(disks));
            const Contestant::Time elapsed = ((*entry.contestant).*kOperations[operation].run)(part);
            if (record)
                entry.samples[operation].push_back(elapsed);
        }
    }
    for (Entry& entry : entries)
        entry.contestant->endGuest();
}

// Leaves out what cannot run here, aloud; a contestant that is there but fails is an error.
bool wanted(const Options& options, const char* name, std::initializer_list<fs::path> needs) {
    if (options.without.contains(name))
        return false;
    for (const fs::path& need : needs) {
        if (!fs::exists(need)) {
            std::cerr << "bench: without " << name << ": there is no " << need.string() << '\n';
            return false;
        }
    }
    return true;
}

using Calls = std::array<std::optional<long>, std::size(kOperations)>;

Calls countOnce(Contestant& contestant, const std::vector<support::Disk>& disks) {
    Calls calls;
    calls[0] = countSystemCalls([&] { contestant.registerHere(disks); });
    (void)contestant.registerGuest(disks);
    for (std::size_t operation = 1; operation < std::size(kOperations); ++operation) {
        // Counted in a child, which changes nothing that the next one needs, and then done here.
        const auto member = kOperations[operation].run;
        auto run = [&] { [[maybe_unused]] auto took = (contestant.*member)(disks); };
        calls[operation] = countSystemCalls(run);
        run();
    }
    contestant.endGuest();
    return calls;
}

// The system calls of one contestant, by operation. The fewest of three guests: a first acquire may meet a stand-in
// that still has its libraries open.
Calls countCalls(std::vector<Entry>& entries, const char* name, std::size_t disks) {
    const auto entry = std::ranges::find_if(
        entries, [&](const Entry& each) { return each.contestant->name() == name && disks <= each.mostDisks; });
    if (entry == entries.end())
        return {};
    const std::vector<support::Disk> part(entry->disks.begin(),
                                          entry->disks.begin() + static_cast<std::ptrdiff_t>(disks));
    Calls calls = countOnce(*entry->contestant, part);
    for (int again = 0; again < 2; ++again) {
        const Calls others = countOnce(*entry->contestant, part);
        std::ranges::transform(calls, others, calls.begin(),
                               [](const auto& one, const auto& other) { return std::min(one, other); });
    }
    return calls;
}

// One row: how long the command takes for so many images that nobody uses.
ScaleRow measureCommand(const Options& options, const fs::path& directory, const char* verb, std::size_t count) {
    std::vector<std::string> words{options.command, verb, "--json"};
    for (const support::Disk& disk : makeImages(directory / verb, count))
        words.push_back(disk.path);
    std::vector<char*> arguments;
    for (std::string& word : words)
        arguments.push_back(word.data());
    arguments.push_back(nullptr);
    stopIfInterrupted();
    const auto begin = std::chrono::steady_clock::now();
    const pid_t pid = fork();
    if (pid < 0)
        throw std::system_error(errno, std::generic_category(), "fork");
    if (pid == 0) {
        dup2(open("/dev/null", O_WRONLY), STDOUT_FILENO);
        execv(arguments[0], arguments.data());
        _exit(EXIT_FAILURE);
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - begin;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != EXIT_SUCCESS)
        throw std::runtime_error("leasehold " + std::string(verb) + " has failed");
    return {.scene = "command", .medium = "", .guests = count, .operation = verb, .time = summarise({elapsed})};
}

// Where many guests are, or many images.
std::vector<ScaleRow> measureScale(const Options& options, const fs::path& directory) {
    const ScaleOptions scale{options.leasehold, options.standIn, directory, stopIfInterrupted};
    std::vector<ScaleRow> all;
    auto add = [&](std::vector<ScaleRow> rows) { std::ranges::move(rows, std::back_inserter(all)); };
    if (!options.crowds.empty())
        add(measureCrowds(scale, options.crowds, options.crowdRepetitions));
    if (options.storm > 0) {
        add(measureStarts(scale, options.storm));
        add(measureEvacuation(scale, std::max<std::size_t>(options.storm * 2 / 3, 1)));
        add(measureIncoming(scale, 256, std::max<std::size_t>(options.crowdRepetitions / 5, 3)));
        add(measureLibvirtd(scale, options.crowds.empty() ? 1 : std::ranges::max(options.crowds)));
    }
    if (wanted(options, "the command", {options.command})) {
        all.push_back(measureCommand(options, directory, "classify", 2000));
        all.push_back(measureCommand(options, directory, "inspect", 300));
    }
    return all;
}

std::vector<Row> measure(std::vector<Entry>& entries, const Options& options) {
    std::vector<Row> rows;
    std::vector<std::size_t> order(entries.size());
    std::iota(order.begin(), order.end(), 0);
    for (const std::size_t disks : options.sizes) {
        for (Entry& entry : entries)
            entry.samples = {};
        for (std::size_t i = 0; i < kWarmUps + options.repetitions; ++i) {
            stopIfInterrupted();
            repeatOnce(entries, order, disks, i >= kWarmUps);
            std::ranges::next_permutation(order);
        }
        const Calls calls = countCalls(entries, kLeasehold, disks);
        const Calls replayed = countCalls(entries, kReplay, disks);
        for (std::size_t operation = 0; operation < std::size(kOperations); ++operation) {
            Row row{disks, kOperations[operation].name, {}, calls[operation]};
            if (isReplayed(operation) && replayed[operation] && replayed[operation] != calls[operation])
                std::cerr << "bench: " << row.operation << " of " << disks << ": leasehold makes " << *calls[operation]
                          << " system calls, the replay " << *replayed[operation] << ": mend tests/bench/replay\n";
            for (const Entry& entry : entries)
                if (disks <= entry.mostDisks && (entry.contestant->name() != kReplay || isReplayed(operation)))
                    row.contestants[entry.contestant->name()] = summarise(entry.samples[operation]);
            rows.push_back(std::move(row));
        }
    }
    return rows;
}

bool wantDaemon(const Options& options, const char* name, std::initializer_list<fs::path> needs,
                const fs::path& directory) {
    if (!wanted(options, name, needs))
        return false;
    if (geteuid() != 0) {
        std::cerr << "bench: without " << name << ": it needs root, for a private /run\n";
        return false;
    }
    if (directory.string().starts_with("/run/"))
        throw UsageError(std::string(name) + " gets a private /run: --directory must be elsewhere");
    return true;
}

// Its daemon ends where it cannot lift its limit of locked memory ("cannot set the limits for memlock"), as in many
// containers.
bool mayRunSanlock() {
    const rlimit unlimited{RLIM_INFINITY, RLIM_INFINITY};
    if (setrlimit(RLIMIT_MEMLOCK, &unlimited) == 0)
        return true;
    std::cerr << "bench: without " << kSanlock
              << ": this machine does not let its daemon lock memory: " << std::strerror(errno) << '\n';
    return false;
}

void run(const Options& options) {
    // Opened first: the path may be in the /run that is about to be hidden, and a typing error shall not cost a run.
    std::ofstream json;
    if (!options.json.empty()) {
        json.open(options.json);
        if (!json)
            throw std::system_error(errno, std::generic_category(), options.json);
    }
    raiseFileLimit();
    const TemporaryDirectory temporary(options.directory);
    const fs::path& directory = temporary.path();

    Run result;
    utsname system{};
    uname(&system);
    result.kernel = system.release;
    result.cpus = std::thread::hardware_concurrency();
    getloadavg(&result.loadBefore, 1);
    result.fileSystem = fileSystemType(directory);
    result.directory = options.directory;
    result.repetitions = options.repetitions;

    const std::size_t most = std::ranges::max(options.sizes);
    // Outlive the entries: a guest that dies after them cannot give back its leases.
    std::unique_ptr<Virtlockd> virtlockd;
    std::unique_ptr<Sanlock> sanlock;
    std::vector<Entry> entries;
    if (wanted(options, kLeasehold, {options.leasehold})) {
        const fs::path config =
            options.leaseholdConfig.empty() ? directory / "qemu-leasehold.conf" : options.leaseholdConfig;
        entries.push_back({std::make_unique<PluginContestant>(kLeasehold, options.leasehold, config, options.standIn),
                           makeImages(directory / kLeasehold, most)});
        entries.push_back({std::make_unique<Replay>(options.leasehold, config, options.standIn),
                           makeImages(directory / kReplay, most),
                           {},
                           Replay::kMostDisks});
    }
    const bool withVirtlockd = wantDaemon(options, kVirtlockd, {options.lockd, options.virtlockd}, directory);
    const bool withSanlock =
        wantDaemon(options, kSanlock, {options.sanlockPlugin, options.sanlock}, directory) && mayRunSanlock();
    if (withVirtlockd || withSanlock)
        enterPrivateRun();
    if (withVirtlockd) {
        virtlockd = std::make_unique<Virtlockd>(options.virtlockd, directory / "daemon");
        entries.push_back({std::make_unique<PluginContestant>(kVirtlockd, options.lockd, virtlockd->pluginConfig(),
                                                              options.standIn, loadLibvirt()),
                           makeImages(directory / kVirtlockd, most)});
    }
    if (withSanlock) {
        sanlock = std::make_unique<Sanlock>(options.sanlock, directory / "sanlock-daemon");
        entries.push_back({std::make_unique<PluginContestant>(kSanlock, options.sanlockPlugin, sanlock->pluginConfig(),
                                                              options.standIn, loadLibvirt()),
                           makeImages(directory / kSanlock, most),
                           {},
                           Sanlock::kMostDisks});
    }
    entries.push_back({std::make_unique<BareContestant>(), makeImages(directory / kBare, most)});

    result.rows = measure(entries, options);
    printTable(std::cout, result);
    if (wanted(options, kLeasehold, {options.leasehold})) {
        result.scale = measureScale(options, directory);
        printScale(std::cout, result);
    }
    printGoals(std::cout, result);
    if (json.is_open()) {
        printJson(json, result);
        json.close();
        if (!json)
            throw std::runtime_error("cannot write " + options.json.string());
    }
}

int benchMain(int argc, char** argv) {
    struct sigaction action {};
    action.sa_handler = onSignal; // no SA_RESTART: a wait ends, too
    for (const int number : {SIGINT, SIGTERM, SIGHUP})
        sigaction(number, &action, nullptr);
    try {
        Options options = defaultOptions();
        if (parseOptions(argc, argv, options))
            run(options);
        return EXIT_SUCCESS;
    } catch (const UsageError& error) {
        std::cerr << "bench: " << error.what() << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "bench: " << error.what() << '\n';
        return EXIT_FAILURE;
    }
}

} // namespace
} // namespace leasehold::bench

int main(int argc, char** argv) {
    return leasehold::bench::benchMain(argc, argv);
}

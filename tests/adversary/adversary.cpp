// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// A guest is handed from one host to the other and back, suspended and resumed, handed over in vain, hundreds of times,
// while two strangers on a third host try to get its image as fast as they can: one starts a guest on it, one hot-plugs
// it into a guest that runs already. Counts how often they try, and how often they get it although somebody else has
// it. leasehold: never, or the exit status is 1. With --virtlockd the same is measured with virtlockd, for comparison.
//
// Each host is a process that plays libvirtd (PluginHost). With virtlockd each has a daemon and a /run of its own.
// Must not export virReportErrorHelper: virtlockd's plugin brings libvirt's own.

#include "tests/bench/virtlockd.hpp"
#include "tests/support/plugin_host.hpp"
#include "tests/support/throw_errno.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using leasehold::bench::Virtlockd;
using leasehold::support::Disk;
using leasehold::support::Guest;
using leasehold::support::makeGuest;
using leasehold::support::Outcome;
using leasehold::support::PluginHost;
using leasehold::support::Registration;
using leasehold::support::StateOutcome;
using leasehold::support::throwErrno;
using Clock = std::chrono::steady_clock;

// QEMU drains after it has stopped; libvirt's destination acquires 14-80 ms after the source's release.
constexpr std::chrono::milliseconds kDrain{14};
constexpr std::chrono::seconds kPatience{120};
constexpr std::size_t kMaxMessage = 4096;

struct Settings {
    std::string plugin;
    std::string standIn;
    std::string virtlockd; // empty: the plugin needs no daemon
    int rounds = 200;
    fs::path directory;
    fs::path image;
};

enum Way { kStart, kHotPlug, kWays };
constexpr const char* kWayNames[kWays] = {"starts", "hot-plugs"};

// Shared between the processes.
struct Counters {
    std::atomic<long> tries[kWays];
    std::atomic<long> successes[kWays];
    std::atomic<bool> stop;
};

Counters* shareCounters() {
    void* memory = mmap(nullptr, sizeof(Counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        throwErrno("mmap");
    return new (memory) Counters{};
}

// One host: its plugin, and its daemon if it needs one. Made in a process of its own.
class Host {
public:
    Host(const Settings& settings, const std::string& name) {
        fs::path config = settings.directory / "no-such-file.conf";
        if (!settings.virtlockd.empty()) {
            leasehold::bench::enterPrivateRun();
            daemon_ = std::make_unique<Virtlockd>(settings.virtlockd, settings.directory / name);
            config = daemon_->pluginConfig();
            initializeLibvirt();
        }
        plugin_ = std::make_unique<PluginHost>(settings.plugin, settings.standIn);
        if (Outcome outcome = plugin_->init(config); !outcome)
            throw std::runtime_error("the plugin does not start: " + outcome.message());
    }

    PluginHost& operator*() { return *plugin_; }
    PluginHost* operator->() { return plugin_.get(); }

private:
    static void initializeLibvirt() {
        void* libvirt = dlopen("libvirt.so.0", RTLD_NOW | RTLD_LOCAL);
        const auto initialize = libvirt ? reinterpret_cast<int (*)()>(dlsym(libvirt, "virInitialize")) : nullptr;
        if (initialize == nullptr || initialize() < 0)
            throw std::runtime_error("libvirt.so.0 does not initialise");
        // Its own handler prints every refusal.
        using Handler = void (*)(void*, void*);
        if (const auto set = reinterpret_cast<void (*)(void*, Handler)>(dlsym(libvirt, "virSetErrorFunc")))
            set(nullptr, [](void*, void*) {});
    }

    std::unique_ptr<Virtlockd> daemon_;
    std::unique_ptr<PluginHost> plugin_;
};

// A child process that runs body, and dies with us.
class Process {
public:
    explicit Process(const std::function<void()>& body) {
        const pid_t parent = getpid();
        pid_ = fork();
        if (pid_ < 0)
            throwErrno("fork");
        if (pid_ == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                _exit(EXIT_FAILURE);
            try {
                body();
                _exit(EXIT_SUCCESS);
            } catch (const std::exception& error) {
                std::printf("adversary: %s\n", error.what());
                std::fflush(stdout);
            }
            _exit(EXIT_FAILURE);
        }
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;
    ~Process() { wait(); }

    // Its exit status; only the first call has one.
    int wait() {
        int status = 0;
        if (const pid_t pid = std::exchange(pid_, -1); pid > 0)
            while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
            }
        return status;
    }

private:
    pid_t pid_ = -1;
};

// A host that does what it is told: one word and perhaps a state go in, "+state" (done) or "-message" (refused) out.
// The guest's QEMU of this host, if it has one, is the host's child.
class RemoteHost {
public:
    RemoteHost(const Settings& settings, const std::string& name, const Guest& guest) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
            throwErrno("socketpair");
        ours_ = ends[0];
        process_ = std::make_unique<Process>([&] {
            close(ends[0]);
            serve(settings, name, guest, ends[1]);
        });
        close(ends[1]);
        if (!receive())
            throw std::runtime_error("host " + name + " does not start");
    }
    ~RemoteHost() { close(ours_); } // and the host ends, with its guest

    bool start() { return call("start"); }
    bool acquire(const std::string& state) { return call("acquire " + state); }
    std::string release() { return state("release"); }
    std::string inquire() { return state("inquire"); }
    void kill() { call("kill"); }
    const std::string& message() const { return answer_; }

private:
    bool call(const std::string& command) {
        if (send(ours_, command.data(), command.size(), MSG_NOSIGNAL) < 0)
            throwErrno("send");
        return receive();
    }

    std::string state(const std::string& command) {
        if (!call(command))
            throw std::runtime_error(command + " was refused: " + answer_);
        return answer_;
    }

    bool receive() {
        char buffer[kMaxMessage];
        const ssize_t got = recv(ours_, buffer, sizeof buffer, 0);
        if (got <= 0)
            throw std::runtime_error("a host has died");
        answer_.assign(buffer + 1, static_cast<std::size_t>(got) - 1);
        return buffer[0] == '+';
    }

    static void serve(const Settings& settings, const std::string& name, const Guest& guest, int fd) {
        Host host(settings, name);
        const std::vector<Disk> disks{{settings.image}};
        std::optional<leasehold::support::GuestProcess> qemu;
        reply(fd, true, "");
        char buffer[kMaxMessage];
        for (ssize_t got = 0; (got = recv(fd, buffer, sizeof buffer, 0)) > 0;) {
            const std::string line(buffer, static_cast<std::size_t>(got));
            const std::string command = line.substr(0, line.find(' '));
            if (command == "start") {
                Registration registration = host->registerGuest(guest, disks);
                reply(fd, registration.ok, registration.message());
                qemu = std::move(registration.process);
            } else if (command == "acquire") {
                const std::string given = line.size() > 8 ? line.substr(8) : "";
                const Outcome outcome = host->acquire(guest, qemu->pid(), disks,
                                                      {.state = given.empty() ? std::nullopt : std::optional(given)});
                reply(fd, outcome.ok, outcome.message());
            } else if (command == "kill") {
                qemu.reset();
                reply(fd, true, "");
            } else {
                const StateOutcome outcome = command == "inquire" ? host->inquire(guest, qemu->pid(), disks)
                                                                  : host->release(guest, qemu->pid(), disks);
                reply(fd, outcome.ok, outcome.ok ? outcome.state.value_or("") : outcome.message());
            }
        }
    }

    static void reply(int fd, bool ok, const std::string& text) {
        const std::string message = (ok ? "+" : "-") + text.substr(0, kMaxMessage - 1);
        if (send(fd, message.data(), message.size(), MSG_NOSIGNAL) < 0)
            throwErrno("send");
    }

    int ours_ = -1;
    std::string answer_;
    std::unique_ptr<Process> process_;
};

// The strangers. They give back at once what they get: there is more to try.
void startStranger(Host& host, const std::vector<Disk>& disks, Counters& counters) {
    const Guest stranger = makeGuest("stranger", 666);
    Registration registration = host->registerGuest(stranger, disks);
    // virtlockd decides only here, when QEMU has opened the image already.
    if (registration && host->acquire(stranger, registration.process->pid(), disks))
        counters.successes[kStart]++;
    counters.tries[kStart]++;
}

void hotPlug(Host& host, const Guest& plugger, pid_t pid, const std::vector<Disk>& disks, Counters& counters) {
    if (host->acquire(plugger, pid, disks)) {
        counters.successes[kHotPlug]++;
        host->detach(plugger, pid, disks);
    }
    counters.tries[kHotPlug]++;
}

void attack(const Settings& settings, Counters& counters) {
    Host host(settings, "gamma");
    const std::vector<Disk> disks{{settings.image}};
    const Guest plugger = makeGuest("plugger", 667);
    Registration running = host->registerGuest(plugger, {});
    if (!running || !host->acquire(plugger, running.process->pid(), {}))
        throw std::runtime_error("the adversary's own guest does not start: " + running.message());
    // leasehold prints its refusals where no libvirt takes them; there will be thousands.
    if (std::freopen("/dev/null", "w", stderr) == nullptr)
        throwErrno("/dev/null");
    while (!counters.stop) {
        startStranger(host, disks, counters);
        for (int i = 0; i < 5 && !counters.stop; i++)
            hotPlug(host, plugger, running.process->pid(), disks, counters);
    }
}

struct Score {
    std::string scene;
    int rounds;
    int failed; // the guest did not get its own image back
    long tries[kWays];
    long successes[kWays];
};

// virtlockd's strangers may have the image at this moment: the guest asks again until they have given it back.
bool acquireAtLast(RemoteHost& host, const std::string& state) {
    if (host.acquire(state))
        return true;
    for (const auto limit = Clock::now() + kPatience; !host.acquire(state);)
        if (Clock::now() > limit)
            throw std::runtime_error("the guest never gets its image back: " + host.message());
    return false;
}

class Scenes {
public:
    Scenes(const Settings& settings, Counters& counters)
        : settings_(settings), counters_(counters), alpha_(settings, "alpha", guest_), beta_(settings, "beta", guest_) {
        if (!here().start() || !here().acquire(""))
            throw std::runtime_error("the guest does not start: " + here().message());
    }

    // Live migrations, there and back.
    Score handoffs() {
        return play("live migrations", [this] {
            const std::string cookie = here().inquire();
            startAtLast();
            here().release();
            std::this_thread::sleep_for(kDrain);
            const bool smooth = acquireAtLast(there(), cookie);
            here().kill();
            current_ = 1 - current_;
            return smooth;
        });
    }

    // The destination dies when the source has released already.
    Score handoffsInVain() {
        return play("failed migrations", [this] {
            here().inquire();
            startAtLast();
            const std::string state = here().release();
            std::this_thread::sleep_for(kDrain);
            there().kill();
            return acquireAtLast(here(), state);
        });
    }

    Score pauses() {
        return play("pauses", [this] {
            const std::string state = here().release();
            std::this_thread::sleep_for(kDrain);
            return acquireAtLast(here(), state);
        });
    }

    // When the guest is dead its image is there for everybody: the strangers were not refused for some other reason.
    bool freeAtLast() {
        here().kill();
        const long before = counters_.successes[kStart] + counters_.successes[kHotPlug];
        for (const auto limit = Clock::now() + kPatience; Clock::now() < limit; std::this_thread::yield())
            if (counters_.successes[kStart] + counters_.successes[kHotPlug] > before)
                return true;
        return false;
    }

    int repeated() const { return repeated_; }

private:
    // Where everybody shares one processor, two incarnations of the guest are seen at times shortly after one of them
    // has died, and a third one is refused for that moment. It was on the safe side, and is counted.
    void startAtLast() {
        for (const auto limit = Clock::now() + kPatience; !there().start(); repeated_++)
            if (Clock::now() > limit)
                throw std::runtime_error("the destination is refused: " + there().message());
    }

    RemoteHost& here() { return current_ == 0 ? alpha_ : beta_; }
    RemoteHost& there() { return current_ == 0 ? beta_ : alpha_; }

    Score play(const std::string& name, const std::function<bool()>& scene) {
        Score score{name, settings_.rounds, 0, {}, {}};
        for (int way = 0; way < kWays; way++) {
            score.tries[way] = -counters_.tries[way];
            score.successes[way] = -counters_.successes[way];
        }
        for (int round = 0; round < settings_.rounds; round++)
            score.failed += scene() ? 0 : 1;
        for (int way = 0; way < kWays; way++) {
            score.tries[way] += counters_.tries[way];
            score.successes[way] += counters_.successes[way];
        }
        return score;
    }

    const Settings& settings_;
    Counters& counters_;
    Guest guest_ = makeGuest("mover", 1);
    RemoteHost alpha_, beta_;
    int current_ = 0;
    int repeated_ = 0;
};

void print(const Score& score) {
    std::printf("%-18s %6d", score.scene.c_str(), score.rounds);
    for (int way = 0; way < kWays; way++)
        std::printf(" %8ld tries %6ld got it", score.tries[way], score.successes[way]);
    std::printf(" %6d times the guest was locked out\n", score.failed);
    std::fflush(stdout);
}

int run(const Settings& settings) {
    Counters& counters = *shareCounters();
    Scenes scenes(settings, counters);
    Process adversary([&] { attack(settings, counters); });
    // Whatever happens here, it ends, or we would wait for it for ever.
    using Flag = std::atomic<bool>;
    const std::unique_ptr<Flag, void (*)(Flag*)> end{&counters.stop, [](Flag* stop) { *stop = true; }};
    for (const auto limit = Clock::now() + kPatience; counters.tries[kStart] == 0;) {
        if (Clock::now() > limit)
            throw std::runtime_error("the adversary does not start");
        std::this_thread::yield();
    }
    std::printf("%-18s %6s %21s %28s\n", "", "times", kWayNames[kStart], kWayNames[kHotPlug]);
    long successes = 0;
    int failed = 0;
    for (const Score& score : {scenes.handoffs(), scenes.handoffsInVain(), scenes.pauses()}) {
        print(score);
        successes += score.successes[kStart] + score.successes[kHotPlug];
        failed += score.failed;
    }
    std::printf("a destination was refused at first: %d times\n", scenes.repeated());
    const bool free = scenes.freeAtLast();
    counters.stop = true;
    const bool ended = adversary.wait() == 0;
    std::printf("got the image while the guest had it: %ld; when the guest was dead: %s\n", successes,
                free ? "yes" : "no");
    if (!settings.virtlockd.empty())
        return EXIT_SUCCESS; // measured, not judged
    return successes == 0 && failed == 0 && free && ended ? EXIT_SUCCESS : EXIT_FAILURE;
}

Settings parse(int argc, char** argv) {
    Settings settings;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string option = argv[i], value = argv[i + 1];
        if (option == "--plugin")
            settings.plugin = value;
        else if (option == "--stand-in")
            settings.standIn = value;
        else if (option == "--virtlockd")
            settings.virtlockd = value;
        else if (option == "--rounds")
            settings.rounds = std::stoi(value);
        else
            settings.plugin.clear();
    }
    if (settings.plugin.empty() || settings.standIn.empty())
        throw std::invalid_argument("usage: adversary --plugin leasehold.so --stand-in PROGRAM [--rounds 200]\n"
                                    "       adversary --plugin lockd.so --virtlockd /usr/sbin/virtlockd --stand-in "
                                    "PROGRAM [--rounds 200]");
    return settings;
}

class TemporaryDirectory {
public:
    TemporaryDirectory() {
        std::string pattern = fs::temp_directory_path() / "leasehold-adversary-XXXXXX";
        if (mkdtemp(pattern.data()) == nullptr)
            throwErrno(pattern);
        path_ = pattern;
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

} // namespace

int main(int argc, char** argv) {
    try {
        Settings settings = parse(argc, argv);
        if (geteuid() != 0) {
            std::puts("skipped: needs root");
            return 77;
        }
        const TemporaryDirectory directory;
        settings.directory = directory.path();
        settings.image = directory.path() / "disk.img";
        const int fd = open(settings.image.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, 1 << 20) < 0)
            throwErrno(settings.image);
        close(fd);
        return run(settings);
    } catch (const std::exception& error) {
        std::cerr << "adversary: " << error.what() << '\n';
    }
    return EXIT_FAILURE;
}

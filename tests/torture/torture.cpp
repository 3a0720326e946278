// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Guests that start, stop, migrate, plug, snapshot and commit at random on a few images and two hosts, while their
// QEMUs, their libvirtds and the leasehold command are killed at random moments. Nobody is spared: what counts is that
//   - no image ever has two who may not have it together: the QEMUs are witnesses (witness_qemu.c) and look, and the
//     history that they write is checked once more in the end;
//   - whoever was suspended and left alone runs again;
//   - when all are dead nothing is locked, and each image can be had by a fresh guest on each host;
//   - nothing hangs, crashes, or has more descriptors than before.
//
// A run is a row of epochs, each with a seed, images, and a place for its leases of its own. In an epoch every guest
// has a process that plays its part, with random numbers of its own, and for each host a process that plays libvirtd's
// thread for it (--libvirtd). What each does follows from the seed; the instants at which they meet do not.
//
//     torture --plugin leasehold.so --stand-in witness_qemu [--command leasehold] [--seed N] [--seconds 30]
//     torture --plugin no_leases.so ... --expect-double     the torture itself is tested
//
// Uses nothing of core/.

#include "tests/support/orders.hpp"
#include "tests/support/plugin_host.hpp"
#include "tests/support/throw_errno.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using leasehold::support::CallOptions;
using leasehold::support::Disk;
using leasehold::support::Guest;
using leasehold::support::makeGuest;
using leasehold::support::Outcome;
using leasehold::support::PluginHost;
using leasehold::support::StateOutcome;
using leasehold::support::throwErrno;
using Clock = std::chrono::steady_clock;

constexpr int kHosts = 2, kGuests = 5, kImages = 5, kMedia = 4;
constexpr int kPatienceMs = 60'000;             // who takes longer hangs
constexpr int kTries = 20;                      // each takes half a second or more where it is refused
constexpr int kServerSocket = 9, kLifeline = 8; // descriptors of the processes that play libvirtd

struct Settings {
    std::string self, plugin, standIn, command;
    unsigned long seed = 0;
    long seconds = 30;
    int epochs = 0;  // 0: as many as the time allows
    int steps = 120; // of each guest in an epoch
    bool expectDouble = false;
};

// What is counted, by all processes.
enum Count {
    kSteps,
    kStarts,
    kRuns,
    kRefusals,
    kSuspends,
    kResumes,
    kPlugs,
    kSnapshots,
    kCommits,
    kMigrations,
    kArrivals,
    kReturns,
    kLateResumes,
    kTriedAgain,
    kQemuKills,
    kLibvirtdKills,
    kCommandKills,
    kCommands,
    kCounts
};
constexpr const char* kCountNames[kCounts] = {"steps",
                                              "starts",
                                              "guests that ran",
                                              "refusals",
                                              "suspends",
                                              "resumes",
                                              "plugs",
                                              "snapshots",
                                              "commits",
                                              "migrations",
                                              "of them arrived",
                                              "of them went back",
                                              "resumes of a source that was left behind",
                                              "resumes that had to be tried again",
                                              "QEMUs killed",
                                              "libvirtds killed in a call",
                                              "commands killed",
                                              "commands run"};
struct Counts {
    std::atomic<long> number[kCounts];
};

// One epoch: its directory, and what all of its processes know.
struct Epoch {
    const Settings& settings;
    Counts& counts;
    unsigned long seed;
    fs::path directory;
    std::vector<std::string> images;
    std::string config;
    int lifelineRead = -1, lifelineWrite = -1;
    int history = -1;

    // One line, in one write: whole beside those of others.
    void note(const std::string& text) const {
        timespec now{};
        clock_gettime(CLOCK_MONOTONIC, &now);
        char stamp[48];
        std::snprintf(stamp, sizeof stamp, "%lld.%09ld %d ", static_cast<long long>(now.tv_sec), now.tv_nsec, getpid());
        const std::string line = stamp + text + "\n";
        (void)!write(history, line.data(), line.size());
    }
    void fail(const std::string& text) const { note("FAILED " + text); }
    // QEMUs read it, and die when its writer is closed.
    void openLifeline() {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0)
            throwErrno("pipe");
        lifelineRead = ends[0];
        lifelineWrite = ends[1];
    }
    void count(Count what) const { counts.number[what]++; }
};

// Random numbers of the standard library differ between its versions only in the distributions: these are our own.
class Dice {
public:
    explicit Dice(unsigned long seed) : engine_(seed) {}
    unsigned below(unsigned limit) { return static_cast<unsigned>(engine_() % limit); }
    bool oneIn(unsigned n) { return below(n) == 0; }
    // From 30 us to 30 ms, the short ones as often as the long ones: most calls take a millisecond.
    std::chrono::microseconds moment() {
        const unsigned magnitudes[] = {30, 100, 300, 1000, 3000, 10'000};
        const unsigned least = magnitudes[below(6)];
        return std::chrono::microseconds(least + below(2 * least));
    }

private:
    std::mt19937_64 engine_;
};

// --- libvirtd

// A request and its answer are rows of words, each on a line of its own. No path here has a line's end in it.
std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words)
        text += word + "\n";
    return text;
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> words;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);)
        words.push_back(line);
    return words;
}

struct Request {
    std::string what; // start, acquire, release, inquire, detach, descriptors
    int guest = 0;
    pid_t pid = -1;
    std::optional<std::string> state{};
    std::vector<Disk> disks{};

    std::string text() const {
        std::vector<std::string> words{what, std::to_string(guest), std::to_string(pid), state ? "+" + *state : "-"};
        for (const Disk& disk : disks)
            words.insert(words.end(), {disk.path, std::to_string(disk.flags)});
        return joined(words);
    }
    static Request parse(const std::string& text) {
        const std::vector<std::string> words = split(text);
        Request request{words.at(0), std::stoi(words.at(1)), std::stoi(words.at(2))};
        if (words.at(3)[0] == '+')
            request.state = words[3].substr(1);
        for (std::size_t i = 4; i + 1 < words.size(); i += 2)
            request.disks.push_back({words[i], static_cast<unsigned>(std::stoul(words[i + 1]))});
        return request;
    }
};

struct Answer {
    bool ok = false, answered = false;
    int number = -1; // a QEMU's pid, a number of descriptors
    std::optional<std::string> state{};
    std::string message{};

    std::string text() const {
        return joined({ok ? "+" : "-", std::to_string(number), state ? "+" + *state : "-", message});
    }
    static Answer parse(const std::string& text) {
        std::vector<std::string> words = split(text);
        words.resize(std::max<std::size_t>(words.size(), 4));
        Answer answer{words[0] == "+", true, std::stoi(words[1])};
        if (words[2].substr(0, 1) == "+")
            answer.state = words[2].substr(1);
        answer.message = words[3];
        return answer;
    }
};

Guest guestNumbered(int number) {
    return makeGuest("guest" + std::to_string(number), static_cast<unsigned>(number) + 1);
}

Answer serve(PluginHost& host, std::vector<leasehold::support::GuestProcess>& qemus, const Request& request) {
    const Guest guest = guestNumbered(request.guest);
    auto answer = [](const Outcome& outcome) { return Answer{outcome.ok, true, -1, {}, outcome.message()}; };
    if (request.what == "descriptors")
        return {true, true, static_cast<int>(leasehold::support::countDescriptorsOf(getpid()))};
    if (request.what == "start") {
        auto registration = host.registerGuest(guest, request.disks);
        Answer started = answer(registration);
        if (registration.process) {
            started.number = registration.process->pid();
            qemus.push_back(std::move(*registration.process));
        }
        return started;
    }
    const CallOptions options{.state = request.state};
    if (request.what == "acquire")
        return answer(host.acquire(guest, request.pid, request.disks, options));
    if (request.what == "detach")
        return answer(host.detach(guest, request.pid, request.disks, options));
    const StateOutcome outcome = request.what == "release" ? host.release(guest, request.pid, request.disks, options)
                                                           : host.inquire(guest, request.pid, request.disks, options);
    Answer given = answer(outcome);
    given.state = outcome.state;
    return given;
}

// A host has a name and leases of this host of its own.
void enterHost(const std::string& name, const std::string& leases) {
    if (unshare(CLONE_NEWNS | CLONE_NEWUTS) < 0)
        throwErrno("unshare");
    (void)mkdir("/run/leasehold", 0700);
    if (sethostname(name.data(), name.size()) < 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0 ||
        mount(leases.c_str(), "/run/leasehold", nullptr, MS_BIND, nullptr) < 0)
        throwErrno("a host of its own");
}

// The whole life of the process that plays libvirtd: --libvirtd PLUGIN STAND-IN CONFIG HOST LEASES
int playLibvirtd(char** words) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0); // with what it starts, so that a start ends with it (libvirt: virCommandHandshakeChild)
    enterHost(words[3], words[4]);
    PluginHost host(words[0], words[1]);
    host.setCommonLifeline(kLifeline);
    if (const Outcome outcome = host.init(words[2]); !outcome)
        throw std::runtime_error("init: " + outcome.message());
    if (std::freopen("/dev/null", "w", stderr) == nullptr) // it logs its refusals there, thousands of them
        throwErrno("/dev/null");
    auto* qemus = new std::vector<leasehold::support::GuestProcess>; // never destroyed: they outlive us
    std::string buffer(1 << 16, '\0');
    for (ssize_t length = 0; (length = recv(kServerSocket, buffer.data(), buffer.size(), 0)) > 0;) {
        while (waitpid(-1, nullptr, WNOHANG) > 0)
            continue;
        const std::string text(buffer.data(), static_cast<std::size_t>(length));
        const std::string reply = serve(host, *qemus, Request::parse(text)).text();
        if (send(kServerSocket, reply.data(), reply.size(), MSG_NOSIGNAL) < 0)
            break;
    }
    return EXIT_SUCCESS;
}

pid_t spawnLibvirtd(const Epoch& epoch, int host, int socket) {
    const std::string name = "host" + std::to_string(host), leases = epoch.directory / ("run-" + std::to_string(host));
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid > 0)
        return pid;
    setenv("WITNESS_DIR", epoch.directory.c_str(), 1);
    // Out of the way first: each may have the other's number. The second time without close-on-exec.
    const int ours = fcntl(socket, F_DUPFD_CLOEXEC, 100), lifeline = fcntl(epoch.lifelineRead, F_DUPFD_CLOEXEC, 100);
    dup2(ours, kServerSocket);
    dup2(lifeline, kLifeline);
    execl("/proc/self/exe", epoch.settings.self.c_str(), "--libvirtd", epoch.settings.plugin.c_str(),
          epoch.settings.standIn.c_str(), epoch.config.c_str(), name.c_str(), leases.c_str(),
          static_cast<char*>(nullptr));
    _exit(127);
}

// Who is killed while a call is under way.
struct Kill {
    enum Whom { nobody, libvirtd, qemu } whom = nobody;
    std::chrono::microseconds after{0};
    std::function<void()> killQemu{};
};

// One host's libvirtd, as far as it is one guest's. It is killed, and there is another one.
class Libvirtd {
public:
    Libvirtd(const Epoch& epoch, int host) : epoch_(epoch), host_(host) {}
    Libvirtd(const Libvirtd&) = delete;
    Libvirtd& operator=(const Libvirtd&) = delete;
    ~Libvirtd() { end(); }

    Answer call(const Request& request, const Kill& kill = {}) {
        begin(request);
        pollfd event{socket_, POLLIN, 0};
        if (kill.whom != Kill::nobody && !answersWithin(kill.after)) {
            if (kill.whom == Kill::libvirtd) {
                epoch_.count(kLibvirtdKills);
                epoch_.note("libvirtd of host " + std::to_string(host_) + " is killed");
                die(request.what == "start");
                return {};
            }
            kill.killQemu();
        }
        if (poll(&event, 1, kPatienceMs) <= 0) {
            epoch_.fail("libvirtd hangs in " + request.what);
            die(true);
            return {};
        }
        return finish(request);
    }

    // For who asks two of them at once.
    void begin(const Request& request) {
        if (pid_ < 0)
            start();
        const std::string text = request.text();
        (void)!send(socket_, text.data(), text.size(), MSG_NOSIGNAL); // if it is dead, that is seen where it answers
    }
    Answer finish(const Request& request) {
        std::string buffer(1 << 16, '\0');
        const ssize_t length = recv(socket_, buffer.data(), buffer.size(), 0);
        if (length > 0)
            return Answer::parse(buffer.substr(0, static_cast<std::size_t>(length)));
        epoch_.fail("libvirtd died in " + request.what);
        die(true);
        return {};
    }

    // It ends as libvirtd does. A descriptor that was leaked on the way is seen before.
    void end() {
        if (pid_ < 0)
            return;
        if (const int now = call({"descriptors"}).number; now > descriptors_)
            epoch_.fail("libvirtd has " + std::to_string(now) + " descriptors, at its start it had " +
                        std::to_string(descriptors_));
        close(std::exchange(socket_, -1));
        waitpid(std::exchange(pid_, -1), nullptr, 0);
    }

private:
    void start() {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
            throwErrno("socketpair");
        socket_ = ends[0];
        pid_ = spawnLibvirtd(epoch_, host_, ends[1]);
        close(ends[1]);
        descriptors_ = call({"descriptors"}).number;
    }

    bool answersWithin(std::chrono::microseconds time) const {
        pollfd event{socket_, POLLIN, 0};
        const timespec limit{0, time.count() * 1000};
        return ppoll(&event, 1, &limit, nullptr) > 0;
    }

    void die(bool withWhatItStarts) {
        if (pid_ <= 0)
            return; // it has never started; and kill(2) takes such numbers for everybody
        ::kill(pid_, SIGKILL);
        if (withWhatItStarts)
            ::kill(-pid_, SIGKILL); // before it is reaped: nobody else can have its number
        waitpid(std::exchange(pid_, -1), nullptr, 0);
        close(std::exchange(socket_, -1));
    }

    const Epoch& epoch_;
    int host_;
    pid_t pid_ = -1;
    int socket_ = -1, descriptors_ = 0;
};

// --- QEMU

// Closed on exec (pidfd_open(2)); -1: there is no such process any more.
int openPidfd(pid_t pid) {
    return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
}

struct Image {
    std::string path;
    char mode;          // E, S, R: as the witness claims it
    bool lower = false; // a backing file: libvirt does not name it
};

// One QEMU of a guest.
class Qemu {
public:
    Qemu(const Epoch& epoch, int host, pid_t pid, std::vector<Image> its)
        : images(std::move(its)), epoch_(epoch), host_(host), pid_(pid), pidfd_(openPidfd(pid)) {}
    Qemu(const Qemu&) = delete;
    Qemu& operator=(const Qemu&) = delete;
    ~Qemu() {
        kill();
        close(pidfd_);
        if (connection_ >= 0)
            close(connection_);
    }

    pid_t pid() const { return pid_; }
    int host() const { return host_; }

    bool alive() const {
        pollfd event{pidfd_, POLLIN, 0};
        return pidfd_ >= 0 && poll(&event, 1, 0) == 0;
    }

    // SIGKILL, and back when it is dead.
    void kill() {
        if (!alive())
            return;
        epoch_.count(kQemuKills);
        epoch_.note("killing " + std::to_string(pid_));
        syscall(SYS_pidfd_send_signal, pidfd_, SIGKILL, nullptr, 0);
        pollfd event{pidfd_, POLLIN, 0};
        if (poll(&event, 1, kPatienceMs) <= 0)
            epoch_.fail("QEMU does not die");
    }

    // False if it is dead. What it sees beside its orders stands in the history.
    bool order(const std::string& text) {
        if (connection_ < 0 && !connectTo())
            return false;
        const std::string line = text + "\n";
        char answer[600];
        pollfd event{connection_, POLLIN, 0};
        if (send(connection_, line.data(), line.size(), MSG_NOSIGNAL) < 0 || poll(&event, 1, kPatienceMs) <= 0)
            return false;
        const ssize_t got = recv(connection_, answer, sizeof answer - 1, 0);
        if (got > 1 && std::string(answer, static_cast<std::size_t>(got) - 1) != "ok" &&
            std::strncmp(answer, "DOUBLE", 6) != 0)
            epoch_.fail("order '" + text + "': " + std::string(answer, static_cast<std::size_t>(got) - 1));
        return got > 0;
    }

    // It runs, and uses what it has.
    void run() {
        for (const Image& image : images)
            order(std::string(1, image.mode) + " " + image.path);
        order("g");
        running = ran = true;
    }

    // What libvirt names.
    std::vector<Disk> disks() const { return named(images); }
    static std::vector<Disk> named(const std::vector<Image>& images) {
        std::vector<Disk> named;
        for (const Image& image : images)
            if (!image.lower)
                named.push_back(diskOf(image));
        return named;
    }
    static Disk diskOf(const Image& image) {
        return {image.path, image.mode == 'R'   ? static_cast<unsigned>(LOCK_RESOURCE_READONLY)
                            : image.mode == 'S' ? static_cast<unsigned>(LOCK_RESOURCE_SHARED)
                                                : 0U};
    }
    Image* find(const std::string& path) {
        auto found = std::ranges::find(images, path, &Image::path);
        return found == images.end() ? nullptr : &*found;
    }
    void forget(const std::string& path) {
        std::erase_if(images, [&](const Image& image) { return image.path == path; });
    }

    std::vector<Image> images;
    bool running = false, ran = false;
    std::optional<std::string> state{};

private:
    bool connectTo() {
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        const int length = std::snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "leasehold-torture-%d", pid_);
        const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<unsigned>(length));
        connection_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        while (connect(connection_, reinterpret_cast<const sockaddr*>(&name), size) < 0) {
            if (!alive()) {
                close(std::exchange(connection_, -1));
                return false;
            }
            usleep(300); // it is still being loaded
        }
        return true;
    }

    const Epoch& epoch_;
    int host_;
    pid_t pid_;
    int pidfd_, connection_ = -1;
};

// --- a guest, and the person who has it

class Operator {
public:
    Operator(const Epoch& epoch, int guest)
        : epoch_(epoch), guest_(guest), dice_(epoch.seed * 1000 + static_cast<unsigned long>(guest)) {
        for (int host = 0; host < kHosts; host++)
            libvirtds_.emplace_back(epoch, host);
    }

    void live() {
        for (int step = 0; step < epoch_.settings.steps; step++) {
            epoch_.count(kSteps);
            bury();
            if (here_)
                doSomething();
            else
                start();
            if (dice_.oneIn(3))
                usleep(static_cast<unsigned>(dice_.moment().count()));
        }
    }

private:
    void note(const std::string& text) const { epoch_.note("guest" + std::to_string(guest_) + " " + text); }

    // One call, in the middle of which somebody may be killed, and what came of it.
    Answer call(Qemu& qemu, const std::string& what, const std::vector<Disk>& disks,
                const std::optional<std::string>& state = {}, unsigned killOneIn = 8) {
        Kill kill;
        if (dice_.oneIn(killOneIn))
            kill = {dice_.oneIn(3) ? Kill::qemu : Kill::libvirtd, dice_.moment(), [&] { qemu.kill(); }};
        const Answer answer = libvirtds_[qemu.host()].call({what, guest_, qemu.pid(), state, disks}, kill);
        record(qemu.host(), what, qemu.pid(), disks, answer);
        return answer;
    }
    std::unique_ptr<Qemu> launch(int host, const std::vector<Image>& images) {
        const std::vector<Disk> disks = Qemu::named(images);
        Kill kill;
        if (dice_.oneIn(8))
            kill = {Kill::libvirtd, dice_.moment()};
        const Answer answer = libvirtds_[host].call({"start", guest_, -1, {}, disks}, kill);
        record(host, "start", answer.number, disks, answer);
        if (!answer.ok)
            return nullptr;
        auto qemu = std::make_unique<Qemu>(epoch_, host, answer.number, images);
        for (const Image& image : images)
            if (image.lower)
                qemu->order("r " + image.path);
        return qemu;
    }

    void record(int host, const std::string& what, pid_t pid, const std::vector<Disk>& disks, const Answer& answer) {
        std::string text = what + " on host " + std::to_string(host) + ", pid " + std::to_string(pid) + ",";
        for (const Disk& disk : disks)
            text += " " + fs::path(disk.path).filename().string() +
                    (disk.flags == 0U   ? ""
                     : disk.flags == 1U ? "(ro)"
                                        : "(shared)");
        if (answer.answered && !answer.ok)
            epoch_.count(kRefusals);
        note(text + ": " + (!answer.answered ? "no answer" : answer.ok ? "granted" : "refused: " + answer.message));
    }

    // Whoever has died is no more. If the guest has gone on elsewhere the old one is what is left of it.
    void bury() {
        if (left_ && !left_->alive())
            left_.reset();
        if (here_ && !here_->alive())
            here_ = std::move(left_);
    }

    std::vector<Image> drawImages() {
        std::vector<std::string> paths = epoch_.images;
        std::vector<Image> drawn;
        for (unsigned count = 1 + dice_.below(2); count > 0; count--) {
            const auto at = static_cast<std::ptrdiff_t>(dice_.below(static_cast<unsigned>(paths.size())));
            drawn.push_back({paths[static_cast<std::size_t>(at)], "EEEEEESSR"[dice_.below(9)]});
            paths.erase(paths.begin() + at);
        }
        return drawn;
    }
    // One that the guest has not; empty: it has all.
    std::string drawOther(const Qemu& qemu) {
        std::vector<std::string> others;
        for (const std::string& path : epoch_.images)
            if (std::ranges::find(qemu.images, path, &Image::path) == qemu.images.end())
                others.push_back(path);
        return others.empty() ? "" : others[dice_.below(static_cast<unsigned>(others.size()))];
    }
    Image* drawHeld(char mode, bool lower) {
        std::vector<Image*> fitting;
        for (Image& image : here_->images)
            if (image.mode == mode && image.lower == lower)
                fitting.push_back(&image);
        return fitting.empty() ? nullptr : fitting[dice_.below(static_cast<unsigned>(fitting.size()))];
    }

    void start() {
        const int host = static_cast<int>(dice_.below(kHosts));
        epoch_.count(kStarts);
        here_ = launch(host, drawImages());
        if (!here_)
            return;
        if (dice_.oneIn(6))
            return; // virsh start --paused
        // The stale state of a former life, which libvirt quotes, entitles to nothing.
        if (!resume(*here_, dice_.oneIn(2) ? stale_ : std::nullopt))
            here_.reset();
        else
            epoch_.count(kRuns);
    }

    // The Acquire before `cont`.
    bool resume(Qemu& qemu, const std::optional<std::string>& state) {
        const Answer answer = call(qemu, "acquire", qemu.disks(), state, 12);
        if (!answer.ok || !qemu.alive())
            return false;
        qemu.run();
        return true;
    }

    void doSomething() {
        if (dice_.oneIn(14))
            return here_->kill(); // destroyed
        if (left_ && dice_.oneIn(3))
            return tryTheOneLeftBehind();
        if (!here_->running)
            return dice_.oneIn(4) ? migrate() : dice_.oneIn(5) ? plug() : goOn();
        switch (dice_.below(10)) {
        case 0:
        case 1:
            return suspend();
        case 2:
            return plug();
        case 3:
            return unplug();
        case 4:
        case 5:
            return takeSnapshot();
        case 6:
        case 7:
            return commit();
        default:
            return migrate();
        }
    }

    void suspend() {
        epoch_.count(kSuspends);
        here_->order("p");
        here_->running = false;
        here_->state.reset();
        for (int i = 0; i < 2 && here_->alive(); i++) { // the STOP event, and after QMP's answer
            const Answer answer = call(*here_, "release", here_->disks(), here_->state);
            if (answer.ok)
                stale_ = here_->state = answer.state;
        }
    }

    // A guest that was suspended and left alone runs again, whatever else happens. Whoever looks at the leases of a
    // successor that has just died has them until he has looked: on a busy machine it has to be tried again then, as
    // the refusal says.
    void goOn() {
        epoch_.count(kResumes);
        runHere(" was locked out: ", !left_ && here_->ran);
    }
    void runHere(const char* refused, bool mustSucceed) {
        if (!here_->alive())
            return;
        Answer answer = call(*here_, "acquire", here_->disks(), here_->state);
        for (int tries = 0; mustSucceed && tries < kTries && answer.answered && !answer.ok && here_->alive(); tries++) {
            epoch_.count(kTriedAgain);
            answer = call(*here_, "acquire", here_->disks(), here_->state);
        }
        if (!here_->alive())
            return;
        if (answer.ok)
            here_->run();
        else if (answer.answered && mustSucceed)
            epoch_.fail("guest" + std::to_string(guest_) + refused + answer.message);
    }

    // Hot-plug. QEMU may fail to open the image after all, and libvirt takes it back then, as it does when it is
    // refused.
    void plug() {
        const std::string path = drawOther(*here_);
        if (path.empty())
            return;
        epoch_.count(kPlugs);
        const Image image{path, "EEESR"[dice_.below(5)]};
        const std::vector<Disk> disks{Qemu::diskOf(image)};
        const Answer answer = call(*here_, "acquire", disks);
        if (answer.ok && !dice_.oneIn(4) && here_->order((image.mode == 'R' ? "r " : "w ") + path)) {
            here_->order(std::string(1, image.mode) + " " + path);
            here_->images.push_back(image);
        } else if (answer.answered && here_->alive()) {
            call(*here_, "detach", disks);
        }
    }

    void unplug() {
        if (here_->images.empty())
            return;
        const Image image = here_->images[dice_.below(static_cast<unsigned>(here_->images.size()))];
        if (image.lower)
            return;
        here_->order("d " + image.path);
        here_->order("c " + image.path);
        here_->forget(image.path);
        call(*here_, "detach", {Qemu::diskOf(image)});
    }

    void takeSnapshot() {
        Image* base = drawHeld('E', false);
        const std::string overlay = drawOther(*here_);
        if (!base || overlay.empty())
            return;
        const std::string below = base->path;
        epoch_.count(kSnapshots);
        const Answer answer = call(*here_, "acquire", {{overlay}});
        if (!answer.ok || !here_->order("w " + overlay)) {
            if (answer.answered && here_->alive())
                call(*here_, "detach", {{overlay}});
            return;
        }
        here_->order("E " + overlay);
        here_->order("r " + below);
        here_->order("R " + below);
        here_->order("C " + below);
        *here_->find(below) = {below, 'R', true};
        here_->images.push_back({overlay, 'E'});
        call(*here_, "detach", {{below}});
    }

    // Into a lower file; then the top goes (--pivot), or the lower file is one again.
    void commit() {
        Image* lower = drawHeld('R', true);
        if (!lower)
            return;
        const std::string base = lower->path;
        epoch_.count(kCommits);
        const Answer answer = call(*here_, "acquire", {{base}});
        if (!answer.ok || !here_->order("w " + base))
            return;
        here_->order("E " + base);
        if (dice_.oneIn(3))
            usleep(static_cast<unsigned>(dice_.moment().count()));
        const Image* top = drawHeld('E', false);
        if (top && dice_.oneIn(2)) {
            const std::string overlay = top->path;
            *here_->find(base) = {base, 'E', false};
            here_->order("d " + overlay);
            here_->order("c " + overlay);
            here_->forget(overlay);
            call(*here_, "detach", {{overlay}});
        } else {
            here_->order("R " + base);
            here_->order("C " + base);
            call(*here_, "acquire", {{base, LOCK_RESOURCE_READONLY}});
        }
    }

    // To the other host. One that runs goes live, a suspended one is asked nothing on its way.
    void migrate() {
        if (left_)
            return left_.reset(); // libvirt has killed the source long ago
        epoch_.count(kMigrations);
        const bool live = here_->running;
        const int target = 1 - here_->host();
        std::optional<std::string> cookie = here_->state;
        if (live) {
            const Answer begun = call(*here_, "inquire", here_->disks());
            if (!begun.ok)
                return;
            cookie = begun.state;
        }
        auto there = launch(target, here_->images);
        if (!there || !here_->alive()) {
            epoch_.count(kReturns);
            return; // its QEMU is killed on the way out, and the guest runs on
        }
        if (live)
            handOver(std::move(there), cookie);
        else
            moveSuspended(std::move(there), cookie);
    }

    void moveSuspended(std::unique_ptr<Qemu> there, const std::optional<std::string>& state) {
        if (dice_.oneIn(4)) {
            epoch_.count(kReturns);
            return; // the destination dies, the guest is where it was
        }
        there->state = state;
        here_ = std::move(there); // and the source is dead
        epoch_.count(kArrivals);
    }

    void handOver(std::unique_ptr<Qemu> there, const std::optional<std::string>& cookie) {
        // At STOP, before QEMU has drained: it still writes.
        const Answer stopped = call(*here_, "release", here_->disks());
        here_->order("x");
        here_->running = false;
        here_->state = stopped.state;
        if (dice_.oneIn(6))
            there->kill();
        if (dice_.oneIn(6))
            here_->kill();
        if (dice_.oneIn(5) && there->alive() && here_->alive())
            return bothWantIt(std::move(there), cookie);
        if (there->alive() && resume(*there, cookie)) {
            epoch_.count(kArrivals);
            left_ = std::move(here_);
            here_ = std::move(there);
            if (dice_.oneIn(2))
                left_.reset();
            return;
        }
        there->kill();
        goBack();
    }

    // The destination is gone, and has never run.
    void goBack() {
        epoch_.count(kReturns);
        runHere(" cannot go back: ", true);
    }

    // Nobody waits for anybody: at most one of the two gets it.
    void bothWantIt(std::unique_ptr<Qemu> there, const std::optional<std::string>& cookie) {
        const Request mine{"acquire", guest_, here_->pid(), here_->state, here_->disks()},
            its{"acquire", guest_, there->pid(), cookie, there->disks()};
        libvirtds_[there->host()].begin(its);
        libvirtds_[here_->host()].begin(mine);
        const Answer theirs = libvirtds_[there->host()].finish(its), ours = libvirtds_[here_->host()].finish(mine);
        record(there->host(), "acquire (both at once)", there->pid(), there->disks(), theirs);
        record(here_->host(), "acquire (both at once)", here_->pid(), here_->disks(), ours);
        if (theirs.ok)
            there->run();
        if (ours.ok)
            here_->run();
        if (theirs.ok) {
            epoch_.count(kArrivals);
            left_ = std::move(here_);
            here_ = std::move(there);
        } else if (!ours.ok) {
            there->kill();
            goBack();
        } else {
            epoch_.count(kReturns);
        }
    }

    // Somebody resumes by hand what a migration has left: not while its successor is there.
    void tryTheOneLeftBehind() {
        epoch_.count(kLateResumes);
        resume(*left_, dice_.oneIn(2) ? left_->state : std::nullopt); // and the witness says whether that was wrong
    }

    const Epoch& epoch_;
    int guest_;
    Dice dice_;
    std::deque<Libvirtd> libvirtds_;    // of each host
    std::unique_ptr<Qemu> here_, left_; // the guest, and the QEMU that it has migrated from
    std::optional<std::string> stale_;
};

// --- the command

// What administrators do meanwhile: they look, and they run programs on images under a lease. One command at a time.
class Commands {
public:
    explicit Commands(const Epoch& epoch) : epoch_(epoch), dice_(epoch.seed * 1000 + 999) {}

    // Until the guests have had enough.
    void work(const std::function<bool()>& goesOn) {
        while (goesOn()) {
            const std::string& image = epoch_.images[dice_.below(kImages)];
            if (dice_.oneIn(2))
                run({"run", "--config", epoch_.config, image, "--", epoch_.settings.standIn, "--program", image}, true);
            else if (dice_.oneIn(2))
                run({"status"}, dice_.oneIn(3));
            else
                run({"inspect", "--config", epoch_.config, image}, dice_.oneIn(3));
        }
    }

private:
    void run(const std::vector<std::string>& words, bool toBeKilled) {
        epoch_.count(kCommands);
        int input[2];
        if (pipe2(input, O_CLOEXEC) < 0)
            throwErrno("pipe");
        const pid_t pid = fork();
        if (pid < 0)
            throwErrno("fork");
        if (pid == 0)
            become(words, input[0]);
        const int pidfd = openPidfd(pid);
        pollfd event{pidfd, POLLIN, 0};
        if (toBeKilled) {
            const timespec limit{0, dice_.moment().count() * 1000 * 4};
            if (ppoll(&event, 1, &limit, nullptr) == 0) {
                epoch_.count(kCommandKills);
                epoch_.note("killing " + std::to_string(pid));
                kill(pid, SIGKILL);
            }
        } else if (poll(&event, 1, kPatienceMs) == 0) {
            epoch_.fail("the command hangs: " + words[0]);
            kill(pid, SIGKILL);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL)
            epoch_.fail("the command " + words[0] + " died of signal " + std::to_string(WTERMSIG(status)));
        for (const int fd : {pidfd, input[0], input[1]})
            close(fd);
    }

    [[noreturn]] void become(const std::vector<std::string>& words, int input) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setenv("WITNESS_DIR", epoch_.directory.c_str(), 1);
        dup2(input, STDIN_FILENO);
        const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
        dup2(nowhere, STDOUT_FILENO);
        dup2(nowhere, STDERR_FILENO);
        std::vector<char*> arguments{const_cast<char*>(epoch_.settings.command.c_str())};
        for (const std::string& word : words)
            arguments.push_back(const_cast<char*>(word.c_str()));
        arguments.push_back(nullptr);
        execv(arguments[0], arguments.data());
        _exit(127);
    }

    const Epoch& epoch_;
    Dice dice_;
};

// --- an epoch

// Where leases are: on the images, in a lockspace, in files beside the images, in files in a lockspace.
std::string configuration(const Epoch& epoch, unsigned medium) {
    const std::string lockspace = epoch.directory / "lockspace", images = epoch.directory / "images";
    // Who comes too late is refused at once, in every second epoch: one who waits keeps others from coming to it.
    std::string text = "handoff_wait = " + std::to_string(epoch.seed / 2 % 2) + "\n";
    if (medium % 2 == 1)
        text += "file_lockspace_dir = \"" + lockspace + "\"\n";
    if (medium >= 2)
        text += "storage_locks = [ \"" + (medium == 2 ? images : lockspace) + "=flock\" ]\n";
    return text;
}

void furnish(Epoch& epoch, unsigned medium) {
    for (const char* name : {"images", "lockspace", "run-0", "run-1"})
        fs::create_directory(epoch.directory / name), fs::permissions(epoch.directory / name, fs::perms::owner_all);
    for (int i = 0; i < kImages; i++) {
        epoch.images.push_back(epoch.directory / "images" / ("image" + std::to_string(i)));
        std::ofstream(epoch.images.back()) << "an image";
        fs::resize_file(epoch.images.back(), 1 << 20);
    }
    epoch.config = epoch.directory / "leasehold.conf";
    std::ofstream(epoch.config) << configuration(epoch, medium);
    epoch.openLifeline();
    epoch.history = open((epoch.directory / "history").c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (epoch.history < 0)
        throwErrno("history");
}

pid_t inChild(const Epoch& epoch, const std::function<void()>& body) {
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid > 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(epoch.lifelineWrite); // it is the parent's alone: QEMUs die with that
    try {
        body();
    } catch (const std::exception& error) {
        epoch.fail(std::string("the torture itself: ") + error.what());
    }
    _exit(EXIT_SUCCESS);
}

// Everybody is dead, whoever's child it was: orphans become those of a namespace's first process.
void buryAll() {
    while (waitpid(-1, nullptr, 0) > 0 || errno == EINTR)
        continue;
}

void play(Epoch& epoch) {
    std::vector<pid_t> operators;
    for (int guest = 0; guest < kGuests; guest++)
        operators.push_back(inChild(epoch, [&epoch, guest] { Operator(epoch, guest).live(); }));
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throwErrno("pipe");
    if (!epoch.settings.command.empty())
        inChild(epoch, [&epoch, &ends] {
            close(ends[1]);
            Commands(epoch).work([&ends] {
                pollfd event{ends[0], POLLIN, 0};
                return poll(&event, 1, 0) == 0;
            });
        });
    for (const pid_t pid : operators)
        while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR)
            continue;
    close(ends[0]);
    close(ends[1]);
    close(std::exchange(epoch.lifelineWrite, -1));
    buryAll();
}

// --- afterwards

// Nobody is left, so no file is locked in any way.
void checkThatNothingIsLocked(const Epoch& epoch) {
    for (const auto& entry : fs::recursive_directory_iterator(epoch.directory)) {
        if (!entry.is_regular_file())
            continue;
        const int fd = open(entry.path().c_str(), O_RDWR | O_CLOEXEC);
        struct flock lock {};
        lock.l_type = F_WRLCK;
        if (fd < 0 || fcntl(fd, F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK || flock(fd, LOCK_EX | LOCK_NB) < 0)
            epoch.fail("all are dead, and this is locked: " + entry.path().string());
        close(fd);
    }
}

void checkThatAllCanBeHad(Epoch& epoch) {
    epoch.openLifeline();
    inChild(epoch, [&epoch] {
        for (int host = 0; host < kHosts; host++) {
            Libvirtd libvirtd(epoch, host);
            for (std::size_t i = 0; i < epoch.images.size(); i++) {
                const int guest = 100 + static_cast<int>(i);
                const std::vector<Disk> disks{{epoch.images[i]}};
                const Answer started = libvirtd.call({"start", guest, -1, {}, disks});
                if (!started.ok) {
                    epoch.fail("stuck: " + started.message);
                    continue;
                }
                Qemu qemu(epoch, host, started.number, {{epoch.images[i], 'E'}});
                if (const Answer ran = libvirtd.call({"acquire", guest, started.number, {}, disks}); !ran.ok)
                    epoch.fail("stuck: " + ran.message);
                qemu.run();
            }
        }
    });
    close(std::exchange(epoch.lifelineRead, -1));
    buryAll();
    close(std::exchange(epoch.lifelineWrite, -1));
}

// What the QEMUs said that they had, from when to when, put side by side. They write it down when they have it already
// and while they have it still, so what overlaps here did overlap.
class History {
public:
    std::vector<std::string> wrong; // lines

    explicit History(const fs::path& path) {
        std::ifstream lines(path);
        for (std::string line; std::getline(lines, line);)
            read(line);
    }

private:
    void read(const std::string& line) {
        std::istringstream words(line);
        std::string when, who, what, mode, image;
        words >> when >> who >> what >> mode >> image;
        if (what == "FAILED" || what == "DOUBLE")
            wrong.push_back(line);
        else if (what == "killing")
            for (auto& [name, holders] : holders_)
                holders.erase(mode);
        else if (what == "unclaim")
            holders_[image].erase(who);
        else if (what == "claim")
            enter(line, image, who, mode);
    }

    void enter(const std::string& line, const std::string& image, const std::string& who, const std::string& mode) {
        auto& holders = holders_[image];
        for (const auto& [other, its] : holders)
            if (other != who && (mode != its || mode == "E"))
                wrong.push_back("history: " + other + " has it (" + its + ") at " + line);
        holders[who] = mode;
    }

    std::map<std::string, std::map<std::string, std::string>> holders_; // image -> pid -> mode
};

struct Result {
    bool good = true, doubled = false;
};

Result judge(const Epoch& epoch, unsigned medium) {
    const History history(epoch.directory / "history");
    Result result;
    for (const std::string& line : history.wrong) {
        result.good = false;
        result.doubled = result.doubled || line.find("DOUBLE") != std::string::npos;
    }
    if (result.good || epoch.settings.expectDouble)
        return result;
    std::printf("epoch with seed %lu, leases %u: this went wrong\n", epoch.seed, medium);
    for (std::size_t i = 0; i < std::min<std::size_t>(history.wrong.size(), 20); i++)
        std::printf("  %s\n", history.wrong[i].c_str());
    const fs::path kept = fs::temp_directory_path() / ("leasehold-torture-" + std::to_string(epoch.seed) + ".history");
    fs::copy_file(epoch.directory / "history", kept, fs::copy_options::overwrite_existing);
    std::printf("all of it is in %s; again: torture ... --seed %lu --epochs 1\n", kept.c_str(), epoch.seed);
    std::fflush(stdout);
    return result;
}

Result runEpoch(const Settings& settings, Counts& counts, unsigned long seed) {
    std::string directory = "/dev/shm/leasehold-torture-XXXXXX"; // files of marks are written through to a disk
    if (mkdtemp(directory.data()) == nullptr)
        throwErrno(directory);
    const auto medium = static_cast<unsigned>(seed % kMedia);
    Epoch epoch{settings, counts, seed, directory, {}, {}};
    furnish(epoch, medium);
    play(epoch);
    close(epoch.lifelineRead);
    if (!settings.expectDouble) {
        checkThatNothingIsLocked(epoch);
        checkThatAllCanBeHad(epoch);
    }
    const Result result = judge(epoch, medium);
    close(epoch.history);
    fs::remove_all(directory);
    return result;
}

void report(const Counts& counts, int epochs, std::chrono::seconds took) {
    std::printf("%d epochs in %ld s", epochs, static_cast<long>(took.count()));
    for (int i = 0; i < kCounts; i++)
        std::printf(", %ld %s", counts.number[i].load(), kCountNames[i]);
    std::printf("\n");
    std::fflush(stdout);
}

int torture(const Settings& settings) {
    void* memory = mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        throwErrno("mmap");
    Counts& counts = *new (memory) Counts{};
    std::printf("seed %lu\n", settings.seed);
    std::fflush(stdout);
    const auto begin = Clock::now();
    auto elapsed = [&] { return std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begin); };
    int epochs = 0, bad = 0, doubled = 0;
    for (auto lastReport = elapsed();
         settings.epochs > 0 ? epochs < settings.epochs : elapsed().count() < settings.seconds;) {
        const Result result = runEpoch(settings, counts, settings.seed + static_cast<unsigned long>(epochs));
        epochs++;
        bad += result.good ? 0 : 1;
        doubled += result.doubled ? 1 : 0;
        if (elapsed() - lastReport > std::chrono::minutes(5)) {
            lastReport = elapsed();
            report(counts, epochs, elapsed());
        }
    }
    report(counts, epochs, elapsed());
    if (settings.expectDouble) {
        std::printf("without leases two wrote to one image in %d of %d epochs\n", doubled, epochs);
        return doubled == epochs ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    std::printf("%d epochs went wrong\n", bad);
    return bad == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// Processes of our own only, so that nobody else can be hit: who kills at random had better be alone. And refusals,
// which look at all processes, look at few. A network of our own, too: QEMUs' sockets, which are named after their
// pids, are there.
int inNamespace(const std::function<int()>& body) {
    if (unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET) < 0)
        throwErrno("a PID namespace");
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) < 0 ||
            mount("proc", "/proc", "proc", 0, nullptr) < 0)
            throwErrno("/proc");
        std::exit(body());
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_FAILURE;
}

Settings parse(int argc, char** argv) {
    Settings settings;
    settings.self = argv[0];
    settings.seed = std::random_device{}() % 1'000'000'000UL;
    for (int i = 1; i < argc; i++) {
        const std::string option = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
        if (option == "--expect-double") {
            settings.expectDouble = true;
            continue;
        }
        if (option == "--plugin")
            settings.plugin = value;
        else if (option == "--stand-in")
            settings.standIn = value;
        else if (option == "--command")
            settings.command = value;
        else if (option == "--seed")
            settings.seed = std::stoul(value);
        else if (option == "--seconds")
            settings.seconds = std::stol(value);
        else if (option == "--steps")
            settings.steps = std::stoi(value);
        else if (option == "--epochs")
            settings.epochs = std::stoi(value);
        else
            settings.plugin.clear();
        i++;
    }
    if (settings.plugin.empty() || settings.standIn.empty())
        throw std::invalid_argument(
            "usage: torture --plugin leasehold.so --stand-in witness_qemu [--command leasehold] "
            "[--seed N] [--seconds 30 | --epochs N] [--steps 120] [--expect-double]");
    return settings;
}

} // namespace

int main(int argc, char** argv) {
    try {
        if (argc == 7 && std::string(argv[1]) == "--libvirtd")
            return playLibvirtd(argv + 2);
        const Settings settings = parse(argc, argv);
        if (geteuid() != 0) {
            std::puts("skipped: needs root");
            return 77;
        }
        return inNamespace([&] { return torture(settings); });
    } catch (const std::exception& error) {
        std::cerr << "torture: " << error.what() << '\n';
    }
    return EXIT_FAILURE;
}

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/bench/scale.hpp"

#include "tests/bench/calls.hpp"
#include "tests/support/plugin_host.hpp"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

namespace leasehold::bench {
namespace {

namespace fs = std::filesystem;
using support::Disk;
using support::Guest;
using Time = std::chrono::nanoseconds;
using Clock = std::chrono::steady_clock;

// As many as libvirtd has workers (max_workers in libvirtd.conf).
constexpr std::size_t kWorkers = 20;

void demand(const support::Outcome& outcome, const char* operation) {
    if (!outcome)
        throw std::runtime_error(std::string("refused: ") + operation + ": " + outcome.message());
}

std::string makeImage(const fs::path& path) {
    std::ofstream(path).close();
    fs::resize_file(path, 1 << 20);
    return path;
}

fs::path makeConfig(const fs::path& directory, bool files) {
    fs::create_directories(directory);
    fs::path config = directory / "qemu-leasehold.conf";
    std::ofstream text(config);
    if (files)
        text << "storage_locks = [ \"" << directory.string() << "=flock\" ]\n";
    return config;
}

class Host {
public:
    // A copy of the plugin: one that is loaded already has another configuration.
    Host(const ScaleOptions& options, const fs::path& config)
        : host_(copyOf(options.plugin, config.parent_path()), options.standIn) {
        demand(host_.init(config), "init");
    }

    support::PluginHost& operator*() { return host_; }
    support::PluginHost* operator->() { return &host_; }

private:
    static std::string copyOf(const std::string& plugin, const fs::path& directory) {
        const fs::path copy = directory / "plugin.so";
        fs::copy_file(plugin, copy);
        return copy;
    }

    support::PluginHost host_;
};

support::Registration start(support::PluginHost& host, const Guest& guest, const std::vector<Disk>& disks,
                            const support::CallOptions& options = {}) {
    support::Registration registration = host.registerGuest(guest, disks, options);
    demand(registration, "register");
    return registration;
}

// Takes the time of bare calls on a file that so many have locks of: Linux keeps them in a list (fs/locks.c). No call
// of leasehold's can be flatter than that.
class Bare {
public:
    explicit Bare(const std::string& image) : image_(image), fd_(open(image.c_str(), O_RDWR | O_CLOEXEC)) {
        check(fd_);
    }
    Bare(const Bare&) = delete;
    ~Bare() { close(fd_); }

    // One F_OFD_GETLK where nobody has a lock, or an F_OFD_SETLK and its unlock.
    std::vector<Time> look() {
        return timesOf([] { return 0; }, [&](int) { lock(F_OFD_GETLK, F_WRLCK); });
    }
    std::vector<Time> lockAndUnlock() {
        return timesOf([] { return 0; },
                       [&](int) {
                           lock(F_OFD_SETLK, F_WRLCK);
                           lock(F_OFD_SETLK, F_UNLCK);
                       });
    }
    // close(2) of a duplicate looks for locks of this process (locks_remove_posix).
    std::vector<Time> closeOne() {
        return timesOf([&] { return check(dup(fd_)); }, [](int fd) { close(fd); });
    }

private:
    int check(int result) const {
        if (result < 0)
            throw std::system_error(errno, std::generic_category(), image_);
        return result;
    }

    void lock(int command, short type) const {
        struct flock lock {};
        lock.l_type = type;
        lock.l_whence = SEEK_SET;
        lock.l_start = 50; // where nobody has one
        lock.l_len = 1;
        check(fcntl(fd_, command, &lock));
    }

    template <typename Prepare, typename Work>
    std::vector<Time> timesOf(Prepare prepare, Work work) const {
        std::vector<Time> times;
        for (int i = 0; i < 1000; i++) {
            const int prepared = prepare();
            const auto begin = Clock::now();
            work(prepared);
            times.push_back(Clock::now() - begin);
        }
        return times;
    }

    const std::string& image_;
    int fd_;
};

std::vector<ScaleRow> measureCrowd(const ScaleOptions& options, const std::vector<std::size_t>& sizes,
                                   std::size_t repetitions, bool files, bool shared) {
    const fs::path directory =
        options.directory / (std::string(files ? "files-" : "bytes-") + (shared ? "shared" : "reader"));
    Host host(options, makeConfig(directory, files));
    const std::vector<Disk> disks{
        {.path = makeImage(directory / "image"),
         .flags = static_cast<unsigned>(shared ? LOCK_RESOURCE_SHARED : LOCK_RESOURCE_READONLY)}};
    std::vector<support::GuestProcess> there;
    unsigned next = 1;
    std::vector<ScaleRow> rows;
    for (const std::size_t size : sizes) {
        while (there.size() < size) {
            options.pulse();
            const Guest guest = support::makeGuest("crowd", next++);
            there.push_back(std::move(*start(*host, guest, disks).process));
            demand(host->acquire(guest, there.back().pid(), disks), "acquire");
        }
        std::vector<Time> times[3];
        std::optional<long> calls[3];
        for (std::size_t i = 0; i < repetitions; i++) {
            options.pulse();
            const Guest guest = support::makeGuest("newcomer", next++);
            if (i == 0)
                calls[0] = countSystemCalls([&] { demand(host->registerHere(guest, disks), "register"); });
            support::Registration newcomer = start(*host, guest, disks);
            const pid_t pid = newcomer.process->pid();
            if (i == 0) {
                calls[1] = countSystemCalls([&] { demand(host->acquire(guest, pid, disks), "acquire"); });
                calls[2] = countSystemCalls([&] { demand(host->release(guest, pid, disks), "release"); });
            }
            const support::Outcome acquired = host->acquire(guest, pid, disks);
            demand(acquired, "acquire");
            const support::StateOutcome released = host->release(guest, pid, disks);
            demand(released, "release");
            times[0].push_back(newcomer.elapsed);
            times[1].push_back(acquired.elapsed);
            times[2].push_back(released.elapsed);
        }
        const char* const names[] = {"register", "acquire", "release"};
        for (int i = 0; i < 3; i++)
            rows.push_back({.scene = shared ? "shared" : "reader",
                            .medium = files ? "files" : "bytes",
                            .guests = size,
                            .operation = names[i],
                            .time = summarise(times[i]),
                            .calls = calls[i]});
        if (files)
            continue;
        Bare bare(disks.front().path);
        auto add = [&](const char* operation, std::vector<Time> measured, long made) {
            rows.push_back({.scene = shared ? "shared" : "reader",
                            .medium = "bytes",
                            .guests = size,
                            .operation = operation,
                            .time = summarise(std::move(measured)),
                            .calls = made});
        };
        add(kBareLook, bare.look(), 1);
        add(kBareLock, bare.lockAndUnlock(), 2);
        add(kBareClose, bare.closeOne(), 1);
    }
    return rows;
}

// Work for `count` guests, done by so many workers as a libvirtd has. The first exception of any of them comes out.
void inParallel(std::size_t count, const std::function<void(std::size_t)>& work) {
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::exception_ptr problem;
    std::vector<std::thread> workers;
    for (std::size_t worker = 0; worker < std::min(count, kWorkers); worker++)
        workers.emplace_back([&] {
            try {
                for (std::size_t i; (i = next++) < count;)
                    work(i);
            } catch (...) {
                next = count;
                std::lock_guard lock(mutex);
                problem = std::current_exception();
            }
        });
    for (std::thread& worker : workers)
        worker.join();
    if (problem)
        std::rethrow_exception(problem);
}

// A guest with a disk of its own, and what all of them read.
struct Member {
    Guest guest;
    std::vector<Disk> disks;
    std::optional<support::GuestProcess> process{};
};

void makeShared(const fs::path& directory) {
    makeImage(directory / "template");
    makeImage(directory / "iso");
}

std::vector<Member> makeMembers(const fs::path& directory, std::size_t count, const char* name, unsigned first) {
    std::vector<Member> members;
    for (std::size_t i = 0; i < count; i++)
        members.push_back({support::makeGuest(name, first + static_cast<unsigned>(i)),
                           {{makeImage(directory / (std::string(name) + std::to_string(i)))},
                            {directory / "template", LOCK_RESOURCE_READONLY},
                            {directory / "iso", LOCK_RESOURCE_READONLY}}});
    return members;
}

ScaleRow rowOf(const char* scene, bool files, std::size_t guests, const char* operation, std::vector<Time> times) {
    return {.scene = scene,
            .medium = files ? "files" : "bytes",
            .guests = guests,
            .operation = operation,
            .time = summarise(std::move(times)),
            .calls = std::nullopt};
}

void startAll(Host& host, std::vector<Member>& members, std::vector<Time>& times) {
    inParallel(members.size(), [&](std::size_t i) {
        Member& member = members[i];
        support::Registration registration = start(*host, member.guest, member.disks);
        member.process = std::move(registration.process);
        const support::Outcome acquired = host->acquire(member.guest, member.process->pid(), member.disks);
        demand(acquired, "acquire");
        times[i] = registration.elapsed + acquired.elapsed;
    });
}

// Of this process, which plays libvirtd (proc(5), /proc/PID/status).
long residentKilobytes() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (long kilobytes = 0; word == "RssAnon:" && status >> kilobytes)
            return kilobytes;
    throw std::runtime_error("/proc/self/status does not tell what memory is used");
}

Time timeOfFork() {
    const auto begin = Clock::now();
    const pid_t pid = fork();
    if (pid == 0)
        _exit(EXIT_SUCCESS);
    if (pid < 0)
        throw std::system_error(errno, std::generic_category(), "fork");
    while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
    }
    return Clock::now() - begin;
}

} // namespace

std::vector<ScaleRow> measureIncoming(const ScaleOptions& options, std::size_t disks, std::size_t repetitions) {
    std::vector<ScaleRow> rows;
    for (const bool files : {false, true}) {
        const fs::path directory = options.directory / (files ? "incoming-files" : "incoming-bytes");
        Host host(options, makeConfig(directory, files));
        std::vector<Disk> images;
        for (std::size_t i = 0; i < disks; i++)
            images.push_back({makeImage(directory / ("disk" + std::to_string(i)))});
        std::vector<Time> cold, incoming;
        for (std::size_t i = 0; i < repetitions; i++) {
            options.pulse();
            const Guest guest = support::makeGuest("incoming", 400000 + static_cast<unsigned>(i));
            support::Registration source = start(*host, guest, images);
            demand(host->acquire(guest, source.process->pid(), images), "acquire");
            demand(host->inquire(guest, source.process->pid(), images), "inquire");
            cold.push_back(source.elapsed);
            incoming.push_back(start(*host, guest, images).elapsed);
        }
        const std::string of = ", " + std::to_string(disks) + " disks";
        rows.push_back(rowOf("incoming", files, 1, ("cold" + of).c_str(), cold));
        rows.push_back(rowOf("incoming", files, 1, ("incoming" + of).c_str(), incoming));
    }
    return rows;
}

std::vector<ScaleRow> measureLibvirtd(const ScaleOptions& options, std::size_t guests) {
    constexpr std::size_t kDisks = 10, kTimes = 200;
    const fs::path directory = options.directory / "libvirtd";
    Host host(options, makeConfig(directory, false));
    std::vector<ScaleRow> rows;
    struct There {
        Guest guest;
        std::vector<Disk> disks;
        support::GuestProcess process;
    };
    std::vector<There> there;
    there.reserve(guests);
    auto add = [&](std::size_t number) {
        Guest guest = support::makeGuest("beside", 500000 + static_cast<unsigned>(number));
        std::vector<Disk> disks;
        for (std::size_t i = 0; i < kDisks; i++)
            disks.push_back({makeImage(directory / (std::to_string(number) + "-" + std::to_string(i)))});
        support::Registration registration = start(*host, guest, disks);
        demand(host->acquire(guest, registration.process->pid(), disks), "acquire");
        there.push_back({std::move(guest), std::move(disks), std::move(*registration.process)});
    };
    auto release = [&](const There& one) {
        support::StateOutcome released = host->release(one.guest, one.process.pid(), one.disks);
        demand(released, "release");
        return released.state;
    };
    auto resume = [&](const There& one, const std::optional<std::string>& state) {
        const support::Outcome outcome = host->acquire(one.guest, one.process.pid(), one.disks, {.state = state});
        demand(outcome, "acquire");
        return outcome.elapsed;
    };
    for (std::size_t number = 0; number < guests; number++) {
        options.pulse();
        add(number);
        if (number != 0 && number + 1 != guests)
            continue;
        std::vector<Time> resumes, forks;
        std::optional<long> calls;
        const There& first = there.front();
        for (std::size_t i = 0; i < kTimes; i++) {
            const std::optional<std::string> state = release(first);
            if (i == 0)
                calls = countSystemCalls([&] { (void)resume(first, state); });
            resumes.push_back(resume(first, state));
            forks.push_back(timeOfFork());
        }
        const long before = residentKilobytes();
        for (const There& one : there)
            (void)resume(one, release(one));
        rows.push_back(rowOf("libvirtd", false, number + 1, "resume", resumes));
        rows.back().calls = calls;
        rows.push_back(rowOf("libvirtd", false, number + 1, "fork", forks));
        rows.push_back(rowOf("libvirtd", false, number + 1, "memory kept", {Time(0)}));
        rows.back().kilobytes = residentKilobytes() - before;
    }
    return rows;
}

std::vector<ScaleRow> measureCrowds(const ScaleOptions& options, const std::vector<std::size_t>& others,
                                    std::size_t repetitions) {
    std::vector<ScaleRow> all;
    for (const bool files : {false, true})
        for (const bool shared : {false, true})
            for (ScaleRow& row : measureCrowd(options, others, repetitions, files, shared))
                all.push_back(std::move(row));
    return all;
}

std::vector<ScaleRow> measureStarts(const ScaleOptions& options, std::size_t guests) {
    std::vector<ScaleRow> rows;
    for (const bool files : {false, true}) {
        const fs::path directory = options.directory / (files ? "storm-files" : "storm-bytes");
        Host host(options, makeConfig(directory, files));
        makeShared(directory);
        std::vector<Member> members = makeMembers(directory, guests, "storm", 100000);
        std::vector<Time> times(guests);
        options.pulse();
        const auto begin = Clock::now();
        startAll(host, members, times);
        rows.push_back(rowOf("storm", files, guests, "all start", {Clock::now() - begin}));
        rows.push_back(rowOf("storm", files, guests, "start", times));
    }
    return rows;
}

std::vector<ScaleRow> measureEvacuation(const ScaleOptions& options, std::size_t guests) {
    std::vector<ScaleRow> rows;
    for (const bool files : {false, true}) {
        const fs::path directory = options.directory / (files ? "evacuation-files" : "evacuation-bytes");
        Host host(options, makeConfig(directory, files));
        makeShared(directory);
        std::vector<Member> sides[] = {makeMembers(directory, guests, "left", 200000),
                                       makeMembers(directory, guests, "right", 300000)};
        std::vector<Time> ignored(guests), times[2] = {std::vector<Time>(guests), std::vector<Time>(guests)};
        for (auto& side : sides)
            startAll(host, side, ignored);
        options.pulse();
        // From where it stops here to where it may run there: what nobody works meanwhile.
        auto migrate = [&](Member& member) {
            const support::StateOutcome begun = host->inquire(member.guest, member.process->pid(), member.disks);
            demand(begun, "inquire");
            support::Registration incoming = start(*host, member.guest, member.disks);
            const support::StateOutcome stopped = host->release(member.guest, member.process->pid(), member.disks);
            demand(stopped, "release");
            const support::Outcome runs =
                host->acquire(member.guest, incoming.process->pid(), member.disks, {.state = begun.state});
            demand(runs, "acquire of a destination");
            member.process = std::move(incoming.process);
            return stopped.elapsed + runs.elapsed;
        };
        const auto begin = Clock::now();
        std::exception_ptr problem;
        std::thread other([&] {
            try {
                inParallel(guests, [&](std::size_t i) { times[1][i] = migrate(sides[1][i]); });
            } catch (...) {
                problem = std::current_exception();
            }
        });
        try {
            inParallel(guests, [&](std::size_t i) { times[0][i] = migrate(sides[0][i]); });
        } catch (...) {
            other.join();
            throw;
        }
        other.join();
        if (problem)
            std::rethrow_exception(problem);
        rows.push_back(rowOf("evacuation", files, 2 * guests, "all migrate", {Clock::now() - begin}));
        times[0].insert(times[0].end(), times[1].begin(), times[1].end());
        rows.push_back(rowOf("evacuation", files, 2 * guests, "stop and go on", times[0]));
    }
    return rows;
}

} // namespace leasehold::bench

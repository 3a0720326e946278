// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/plugin/libvirtd.hpp"

#include "tests/support/built.hpp"
#include "tests/support/throw_errno.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

// In builds with a leak checker: whether anything has leaked so far.
extern "C" [[gnu::weak]] int __lsan_do_recoverable_leak_check();

namespace leasehold::plugin_test {
namespace {

using support::throwErrno;

constexpr const char* kPlugin = "plugin/leasehold.so";
constexpr const char* kFakeQemu = "tests/fake_qemu";

// Nothing in these tests takes longer; who waits longer waits for ever.
constexpr int kPatience = 120'000; // ms

// Out of the way of the low numbers, which limitFreeDescriptors() would have to fill up.
constexpr int kServerSocket = 9;

// The guests' lifeline: its writing end is in no other process than the test's.
int commonLifeline() {
    static const int readEnd = [] {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0)
            throwErrno("pipe2");
        return ends[0];
    }();
    return readEnd;
}

// One request or reply: a row of fields, in the order in which both sides know them.
class Writer {
public:
    Writer& add(std::int64_t number) {
        text_.append(reinterpret_cast<const char*>(&number), sizeof number);
        return *this;
    }
    Writer& add(const std::string& field) {
        add(static_cast<std::int64_t>(field.size()));
        text_ += field;
        return *this;
    }
    Writer& add(const std::optional<std::string>& field) { return add(field ? 1 : 0).add(field.value_or("")); }
    const std::string& text() const { return text_; }

private:
    std::string text_;
};

class Reader {
public:
    explicit Reader(std::string_view text) : text_(text) {}
    std::int64_t number() {
        std::int64_t value = 0;
        if (text_.size() - at_ < sizeof value)
            throw std::runtime_error("a message is too short");
        std::memcpy(&value, text_.data() + at_, sizeof value);
        at_ += sizeof value;
        return value;
    }
    std::string field() {
        const auto size = static_cast<std::size_t>(number());
        std::string value(text_.substr(at_, size));
        at_ += size;
        return value;
    }
    std::optional<std::string> maybeField() {
        const bool there = number() != 0;
        std::string value = field();
        return there ? std::optional(value) : std::nullopt;
    }

private:
    std::string_view text_;
    std::size_t at_ = 0;
};

enum Operation { kStart, kAcquire, kRelease, kInquire, kDetach, kDescriptors, kLimit };

std::string encodeCall(Operation operation, const Guest& guest, pid_t pid, const std::vector<Disk>& disks,
                       const CallOptions& options) {
    Writer writer;
    writer.add(operation).add(guest.name).add(std::string(guest.uuid.begin(), guest.uuid.end())).add(guest.id).add(pid);
    writer.add(static_cast<std::int64_t>(disks.size()));
    for (const Disk& disk : disks) {
        const support::LeaseTarget target = disk.target.value_or(support::LeaseTarget{});
        writer.add(disk.path).add(disk.flags).add(disk.type).add(disk.target ? 1 : 0);
        writer.add(target.path).add(target.lockspace).add(static_cast<std::int64_t>(target.offset));
    }
    writer.add(options.createFlags).add(options.callFlags).add(options.state).add(options.failureAction);
    writer.add(options.childDescriptorLimit ? 1 : 0).add(options.childDescriptorLimit.value_or(0));
    return writer.text();
}

struct CallToMake {
    Guest guest;
    pid_t pid = -1;
    std::vector<Disk> disks;
    CallOptions options;
};

CallToMake decodeCall(Reader& reader) {
    CallToMake call;
    call.guest.name = reader.field();
    const std::string uuid = reader.field();
    std::copy(uuid.begin(), uuid.end(), call.guest.uuid.begin());
    call.guest.id = static_cast<unsigned>(reader.number());
    call.pid = static_cast<pid_t>(reader.number());
    for (std::int64_t count = reader.number(); count > 0; --count) {
        Disk disk;
        disk.path = reader.field();
        disk.flags = static_cast<unsigned>(reader.number());
        disk.type = static_cast<unsigned>(reader.number());
        const bool targeted = reader.number() != 0;
        support::LeaseTarget target{reader.field(), reader.field(), static_cast<unsigned long long>(reader.number())};
        if (targeted)
            disk.target = std::move(target);
        call.disks.push_back(std::move(disk));
    }
    call.options.createFlags = static_cast<unsigned>(reader.number());
    call.options.callFlags = static_cast<unsigned>(reader.number());
    call.options.state = reader.maybeField();
    call.options.failureAction = static_cast<int>(reader.number());
    const bool limited = reader.number() != 0;
    const auto limit = static_cast<unsigned>(reader.number());
    if (limited)
        call.options.childDescriptorLimit = limit;
    return call;
}

std::string encodeOutcome(const Outcome& outcome, const std::optional<std::string>& state = {}, pid_t pid = -1,
                          int fdForLabelling = -1) {
    Writer writer;
    writer.add(outcome.ok ? 1 : 0).add(state).add(pid).add(fdForLabelling).add(outcome.elapsed.count());
    writer.add(static_cast<std::int64_t>(outcome.reports.size()));
    for (const support::Report& report : outcome.reports)
        writer.add(report.domain).add(report.code).add(report.message);
    return writer.text();
}

std::vector<int> openDescriptors() {
    std::vector<int> numbers;
    DIR* directory = opendir("/proc/self/fd");
    if (directory == nullptr)
        throwErrno("/proc/self/fd");
    while (const dirent* entry = readdir(directory))
        if (entry->d_name[0] != '.' && std::atoi(entry->d_name) != dirfd(directory))
            numbers.push_back(std::atoi(entry->d_name));
    closedir(directory);
    return numbers;
}

// The other process.
class Server {
public:
    Server(int socket, support::PluginHost& host) : socket_(socket), host_(host) {}

    // Until the test hangs up.
    void run() {
        std::string buffer(1 << 20, '\0');
        for (;;) {
            const ssize_t length = recv(socket_, buffer.data(), buffer.size(), 0);
            if (length < 0 && errno == EINTR)
                continue;
            if (length <= 0)
                return;
            reap();
            const std::string reply = serve(Reader({buffer.data(), static_cast<std::size_t>(length)}));
            if (send(socket_, reply.data(), reply.size(), MSG_NOSIGNAL) < 0)
                return;
        }
    }

private:
    // A real QEMU is a daemon and has init for a parent: nobody leaves it lying about.
    void reap() {
        for (const support::GuestProcess& guest : guests_)
            waitpid(guest.pid(), nullptr, WNOHANG);
    }

    std::string serve(Reader reader) {
        const auto operation = static_cast<Operation>(reader.number());
        if (operation == kDescriptors)
            return encodeOutcome({}, std::nullopt, static_cast<pid_t>(openDescriptors().size()));
        if (operation == kLimit) {
            limit(reader.number());
            return encodeOutcome({});
        }
        const CallToMake call = decodeCall(reader);
        const auto& [guest, pid, disks, options] = call;
        switch (operation) {
        case kStart: {
            support::Registration started = host_.registerGuest(guest, disks, options);
            const pid_t qemu = started.process ? started.process->pid() : -1;
            if (started.process)
                guests_.push_back(std::move(*started.process));
            return encodeOutcome(started, std::nullopt, qemu, started.fdForLabelling);
        }
        case kAcquire:
            return encodeOutcome(host_.acquire(guest, pid, disks, options));
        case kRelease: {
            const StateOutcome outcome = host_.release(guest, pid, disks, options);
            return encodeOutcome(outcome, outcome.state);
        }
        case kInquire: {
            const StateOutcome outcome = host_.inquire(guest, pid, disks, options);
            return encodeOutcome(outcome, outcome.state);
        }
        default:
            return encodeOutcome(host_.detach(guest, pid, disks, options));
        }
    }

    // Fills the holes below the highest number, so that the limit leaves just `free` numbers.
    void limit(std::int64_t free) {
        rlimit limit{};
        getrlimit(RLIMIT_NOFILE, &limit);
        for (int filler : fillers_)
            close(filler);
        fillers_.clear();
        limit.rlim_cur = limit.rlim_max;
        if (free >= 0) {
            const int highest = openDescriptors().back();
            int filler;
            while ((filler = fcntl(0, F_DUPFD_CLOEXEC, 3)) < highest)
                fillers_.push_back(filler);
            close(filler);
            limit.rlim_cur = static_cast<rlim_t>(highest + 1 + free);
        }
        if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
            throwErrno("setrlimit");
    }

    int socket_;
    support::PluginHost& host_;
    std::vector<support::GuestProcess> guests_; // never destroyed: they outlive us
    std::vector<int> fillers_;
};

[[noreturn]] void serve(int socket, const Libvirtd::Setup& setup) {
    int status = EXIT_FAILURE;
    try {
        if (!setup.control.empty())
            setenv("HOSTILE_QEMU_CONTROL", setup.control.c_str(), 1);
        const std::string config = "/tmp/leasehold-test-" + std::to_string(getpid()) + ".conf";
        if (!setup.config.empty())
            std::ofstream(config) << setup.config;
        auto* host = new support::PluginHost(support::built(kPlugin),
                                             support::built(setup.hostile ? "tests/plugin/hostile_qemu" : kFakeQemu));
        host->setCommonLifeline(commonLifeline());
        const Outcome outcome = host->init(config);
        unlink(config.c_str());
        if (!outcome)
            throw std::runtime_error("init: " + outcome.message());
        static Server* server; // reachable, for the leak checker
        server = new Server(socket, *host);
        server->run();
        status = __lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check() ? EXIT_FAILURE : EXIT_SUCCESS;
    } catch (const std::exception& error) {
        std::cerr << "the process that plays libvirtd: " << error.what() << std::endl;
    }
    _exit(status);
}

int pidfdOf(pid_t pid) {
    const int fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (fd < 0)
        throwErrno("pidfd_open");
    return fd;
}

int reap(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    return status;
}

} // namespace

Qemu::Qemu(pid_t pid) : pid_(pid), pidfd_(pidfdOf(pid)) {}

Qemu::Qemu(Qemu&& other) noexcept : pid_(other.pid_), pidfd_(std::exchange(other.pidfd_, -1)) {}

Qemu& Qemu::operator=(Qemu&& other) noexcept {
    std::swap(pid_, other.pid_);
    std::swap(pidfd_, other.pidfd_);
    return *this;
}

Qemu::~Qemu() {
    if (pidfd_ < 0)
        return;
    kill();
    close(pidfd_);
}

bool Qemu::alive() const {
    pollfd event{pidfd_, POLLIN, 0};
    return poll(&event, 1, 0) == 0;
}

void Qemu::signal(int number) const {
    syscall(SYS_pidfd_send_signal, pidfd_, number, nullptr, 0);
}

void Qemu::kill() {
    signal(SIGKILL);
    pollfd event{pidfd_, POLLIN, 0};
    poll(&event, 1, kPatience);
}

struct Libvirtd::Reply {
    StateOutcome outcome;
    pid_t number = -1;
    int fdForLabelling = -1;
};

Libvirtd::Libvirtd(Setup setup) : hostile_(setup.hostile) {
    commonLifeline(); // made before the fork, so that all share it
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
        throwErrno("socketpair");
    int size = 1 << 20;
    for (int end : ends)
        setsockopt(end, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    const int lifeline = commonLifeline();
    pid_ = fork();
    if (pid_ < 0)
        throwErrno("fork");
    if (pid_ == 0) {
        setpgid(0, 0); // so that a child of its own that hangs can be ended with it
        // Whatever else the test has open, above all the writing end of the lifeline, is none of libvirtd's.
        dup2(ends[1], kServerSocket);
        for (int number : openDescriptors())
            if (number > 2 && number != lifeline && number != kServerSocket)
                close(number);
        serve(kServerSocket, setup);
    }
    close(ends[1]);
    socket_ = ends[0];
    timeval limit{kPatience / 1000, 0};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

Libvirtd::Libvirtd(Libvirtd&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)), socket_(std::exchange(other.socket_, -1)), hostile_(other.hostile_) {}

Libvirtd& Libvirtd::operator=(Libvirtd&& other) noexcept {
    std::swap(pid_, other.pid_);
    std::swap(socket_, other.socket_);
    std::swap(hostile_, other.hostile_);
    return *this;
}

Libvirtd::~Libvirtd() {
    if (socket_ >= 0)
        close(socket_);
    if (pid_ > 0) {
        const int status = reap(pid_);
        EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "libvirtd ended badly: wait status " << status;
    }
}

void Libvirtd::kill() {
    if (pid_ > 0) {
        ::kill(pid_, SIGKILL);
        reap(std::exchange(pid_, -1));
    }
}

void Libvirtd::tell(const std::string& request) {
    if (send(socket_, request.data(), request.size(), MSG_NOSIGNAL) < 0)
        throwErrno("ask libvirtd");
}

Libvirtd::Reply Libvirtd::ask(const std::string& request) {
    tell(request);
    std::string buffer(1 << 18, '\0');
    ssize_t length;
    while ((length = recv(socket_, buffer.data(), buffer.size(), 0)) < 0 && errno == EINTR)
        continue;
    if (length <= 0) {
        const bool hangs = length < 0 && errno == EAGAIN;
        if (pid_ > 0)
            ::kill(-pid_, SIGKILL);
        kill();
        throw std::runtime_error(hangs ? "libvirtd hangs in the plugin" : "libvirtd died in the plugin");
    }
    Reader reader({buffer.data(), static_cast<std::size_t>(length)});
    Reply reply;
    reply.outcome.ok = reader.number() != 0;
    reply.outcome.state = reader.maybeField();
    reply.number = static_cast<pid_t>(reader.number());
    reply.fdForLabelling = static_cast<int>(reader.number());
    reply.outcome.elapsed = std::chrono::nanoseconds(reader.number());
    for (std::int64_t count = reader.number(); count > 0; --count) {
        support::Report report;
        report.domain = static_cast<int>(reader.number());
        report.code = static_cast<int>(reader.number());
        report.message = reader.field();
        reply.outcome.reports.push_back(std::move(report));
    }
    return reply;
}

Started Libvirtd::start(const Guest& guest, const std::vector<Disk>& disks, const CallOptions& options) {
    const Reply reply = ask(encodeCall(kStart, guest, -1, disks, options));
    Started started;
    static_cast<Outcome&>(started) = reply.outcome;
    started.fdForLabelling = reply.fdForLabelling;
    if (started.ok)
        started.qemu.emplace(reply.number);
    return started;
}

Outcome Libvirtd::acquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks, const CallOptions& options) {
    return ask(encodeCall(kAcquire, guest, pid, disks, options)).outcome;
}

StateOutcome Libvirtd::release(const Guest& guest, pid_t pid, const std::vector<Disk>& disks,
                               const CallOptions& options) {
    return ask(encodeCall(kRelease, guest, pid, disks, options)).outcome;
}

StateOutcome Libvirtd::inquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks,
                               const CallOptions& options) {
    return ask(encodeCall(kInquire, guest, pid, disks, options)).outcome;
}

namespace {

// libvirt says that it detaches what QEMU has closed.
void letGo(pid_t pid, const std::vector<Disk>& disks) {
    for (const Disk& disk : disks)
        if (support::hasOpen(pid, disk.path))
            support::order(pid, 'c', disk.path);
}

} // namespace

Outcome Libvirtd::detach(const Guest& guest, pid_t pid, const std::vector<Disk>& disks, const CallOptions& options) {
    if (!options.stillOpen && !hostile_)
        letGo(pid, disks);
    return ask(encodeCall(kDetach, guest, pid, disks, options)).outcome;
}

std::size_t Libvirtd::descriptors() {
    return static_cast<std::size_t>(ask(Writer().add(kDescriptors).text()).number);
}

void Libvirtd::limitFreeDescriptors(std::optional<unsigned> free) {
    ask(Writer().add(kLimit).add(free ? static_cast<std::int64_t>(*free) : -1).text());
}

void Libvirtd::beginAcquire(const Guest& guest, pid_t pid, const std::vector<Disk>& disks) {
    tell(encodeCall(kAcquire, guest, pid, disks, {}));
}

void Libvirtd::beginDetach(const Guest& guest, pid_t pid, const std::vector<Disk>& disks) {
    if (!hostile_)
        letGo(pid, disks);
    tell(encodeCall(kDetach, guest, pid, disks, {}));
}

std::string inOwnProcess(const Body& body) {
    const int lifeline = commonLifeline();
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throwErrno("pipe2");
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid == 0) {
        setpgid(0, 0); // so that a child of its own that hangs can be ended with it
        std::string problem;
        try {
            support::PluginHost host(support::built(kPlugin), support::built(kFakeQemu));
            host.setCommonLifeline(lifeline);
            problem = body(host);
        } catch (const std::exception& error) {
            problem = std::string("thrown: ") + error.what();
        }
        (void)!write(ends[1], problem.data(), problem.size());
        _exit(EXIT_SUCCESS);
    }
    close(ends[1]);
    std::string problem;
    pollfd event{ends[0], POLLIN, 0};
    if (poll(&event, 1, kPatience) == 0) {
        ::kill(-pid, SIGKILL);
        problem = "it hangs";
    }
    char buffer[4096];
    for (ssize_t length; (length = read(ends[0], buffer, sizeof buffer)) > 0;)
        problem.append(buffer, static_cast<std::size_t>(length));
    close(ends[0]);
    const int status = reap(pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        problem += " (wait status " + std::to_string(status) + ")";
    return problem;
}

Puppeteer::Puppeteer(const std::string& path) : listener_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{AF_UNIX, {}};
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0 || listen(listener_, 8) < 0)
        throwErrno(path);
}

Puppeteer::~Puppeteer() {
    if (connection_ >= 0)
        close(connection_);
    close(listener_);
}

void Puppeteer::takeOver() {
    pollfd event{listener_, POLLIN, 0};
    if (poll(&event, 1, kPatience) <= 0)
        throw std::runtime_error("the hostile QEMU does not call");
    if (connection_ >= 0)
        close(connection_);
    connection_ = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
}

std::string Puppeteer::command(const std::string& line) {
    if (write(connection_, line.data(), line.size()) < 0)
        throwErrno("command the hostile QEMU");
    pollfd event{connection_, POLLIN, 0};
    char reply[256];
    const ssize_t length = poll(&event, 1, kPatience) > 0 ? read(connection_, reply, sizeof reply) : -1;
    return length > 0 ? std::string(reply, static_cast<std::size_t>(length)) : "no answer";
}

testing::AssertionResult granted(const Outcome& outcome) {
    if (outcome.ok && outcome.reports.empty())
        return testing::AssertionSuccess();
    return testing::AssertionFailure() << (outcome.ok ? "granted, but reported: " : "refused: ") << outcome.message();
}

testing::AssertionResult refused(const Outcome& outcome, int code, const std::vector<std::string>& words) {
    if (outcome.ok)
        return testing::AssertionFailure() << "granted";
    if (outcome.reports.size() != 1)
        return testing::AssertionFailure() << outcome.reports.size() << " reports instead of one";
    const support::Report& report = outcome.reports.front();
    // 42 is VIR_FROM_LOCKING.
    if (report.domain != 42 || report.code != code)
        return testing::AssertionFailure()
               << "domain " << report.domain << ", code " << report.code << ": " << report.message;
    for (const std::string& word : words)
        if (report.message.find(word) == std::string::npos)
            return testing::AssertionFailure() << "no \"" << word << "\" in: " << report.message;
    if (report.message.find('\n') != std::string::npos)
        return testing::AssertionFailure() << "more than one line: " << report.message;
    return testing::AssertionSuccess() << report.message;
}

PluginTest::PluginTest() {
    std::string name = (std::filesystem::temp_directory_path() / "leasehold-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr)
        throwErrno(name);
    directory_ = name;
}

PluginTest::~PluginTest() {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
}

std::string PluginTest::image(const std::string& name) const {
    std::ofstream(path(name)) << std::string(4096, 'i');
    return path(name);
}

std::vector<Disk> PluginTest::images(std::size_t count, const std::string& prefix) const {
    std::vector<Disk> disks;
    for (std::size_t i = 0; i < count; i++)
        disks.push_back({image(prefix + std::to_string(i))});
    return disks;
}

Started PluginTest::boot(Libvirtd& host, const Guest& guest, const std::vector<Disk>& disks) {
    Started started = host.start(guest, disks);
    if (started.ok) {
        const Outcome outcome = host.acquire(guest, started.pid(), disks);
        EXPECT_TRUE(granted(outcome));
    }
    return started;
}

Libvirtd& PluginTest::stranger() {
    if (!stranger_)
        stranger_ = std::make_unique<Libvirtd>();
    return *stranger_;
}

testing::AssertionResult PluginTest::free(const std::string& image, unsigned flags) {
    const Started started = stranger().start(rival_, {{image, flags}});
    return started.ok ? testing::AssertionSuccess() : testing::AssertionFailure() << started.message();
}

std::vector<LockedRange> kernelLocksOn(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        throwErrno(path);
    std::vector<LockedRange> found;
    std::vector<LockedRange> unseen{{0, std::numeric_limits<long long>::max()}};
    while (!unseen.empty()) {
        const LockedRange range = unseen.back();
        unseen.pop_back();
        struct flock lock {};
        lock.l_type = F_WRLCK;
        lock.l_start = range.first;
        lock.l_len = range.last == std::numeric_limits<long long>::max() ? 0 : range.last - range.first + 1;
        if (fcntl(fd, F_OFD_GETLK, &lock) < 0)
            throwErrno("F_OFD_GETLK");
        if (lock.l_type == F_UNLCK)
            continue;
        const LockedRange hit{lock.l_start, lock.l_len == 0 ? range.last : lock.l_start + lock.l_len - 1};
        found.push_back(hit);
        if (hit.first > range.first)
            unseen.push_back({range.first, hit.first - 1});
        if (hit.last < range.last)
            unseen.push_back({hit.last + 1, range.last});
    }
    close(fd);
    return found;
}

std::size_t locksOnByte(const std::string& path, long long byte) {
    const auto locks = kernelLocksOn(path);
    return static_cast<std::size_t>(std::count_if(
        locks.begin(), locks.end(), [&](const LockedRange& lock) { return lock.first <= byte && byte <= lock.last; }));
}

} // namespace leasehold::plugin_test

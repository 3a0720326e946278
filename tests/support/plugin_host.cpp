// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/plugin_host.hpp"

#include "tests/support/throw_errno.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace leasehold::support {
namespace {

constexpr char kUri[] = "qemu:///system";

// A plugin has no argument through which to say where its errors go, so neither have we. libvirt keeps the last error
// of each thread apart, too.
std::vector<Report>& pendingReports() {
    static thread_local std::vector<Report> reports;
    return reports;
}

// Ends of a pipe that no other guest inherits: a copy of a lifeline in another guest would outlive us, a copy of a
// report pipe would keep us from seeing its end.
struct Pipe {
    Pipe() {
        if (pipe2(ends, O_CLOEXEC) < 0)
            throwErrno("pipe2");
    }
    Pipe(const Pipe&) = delete;
    Pipe& operator=(const Pipe&) = delete;
    ~Pipe() {
        closeEnd(0);
        closeEnd(1);
    }
    void closeEnd(int index) {
        if (ends[index] >= 0)
            close(std::exchange(ends[index], -1));
    }
    int releaseEnd(int index) { return std::exchange(ends[index], -1); }

    int ends[2] = {-1, -1};
};

// glibc 2.31 knows neither close_range() nor its SYS_ number, the kernel's headers beside it do.
void closeRange(unsigned first, unsigned last) {
    if (first <= last && syscall(__NR_close_range, first, last, 0) < 0)
        throwErrno("close_range");
}

rlim_t limitDescriptors(rlim_t limit) {
    struct rlimit current {};
    getrlimit(RLIMIT_NOFILE, &current);
    const rlim_t before = std::exchange(current.rlim_cur, limit);
    if (setrlimit(RLIMIT_NOFILE, &current) < 0)
        throwErrno("setrlimit");
    return before;
}

int waitFor(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0) {
        if (errno != EINTR)
            throwErrno("waitpid");
    }
    return status;
}

// What the child says over the report pipe: a header, the reports, and, only if the exec failed, its errno. A
// successful exec is the end of the pipe, because our end in the child is close-on-exec.
struct ReportHeader {
    std::int64_t elapsed;
    std::int32_t ok;
    std::int32_t fdForLabelling;
    std::uint32_t count;
};

struct ReportEntry {
    std::int32_t domain;
    std::int32_t code;
    std::uint32_t length;
};

template <typename T>
void append(std::string& buffer, const T& value) {
    buffer.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
bool take(std::string_view& buffer, T& value) {
    if (buffer.size() < sizeof value)
        return false;
    std::memcpy(&value, buffer.data(), sizeof value);
    buffer.remove_prefix(sizeof value);
    return true;
}

void writeAll(int fd, std::string_view text) {
    while (!text.empty()) {
        const ssize_t written = write(fd, text.data(), text.size());
        if (written < 0 && errno != EINTR)
            throwErrno("write to the report pipe");
        if (written > 0)
            text.remove_prefix(static_cast<std::size_t>(written));
    }
}

std::string readToEnd(int fd) {
    std::string all;
    char buffer[4096];
    for (;;) {
        const ssize_t got = read(fd, buffer, sizeof buffer);
        if (got == 0)
            return all;
        if (got > 0)
            all.append(buffer, static_cast<std::size_t>(got));
        else if (errno != EINTR)
            throwErrno("read from the report pipe");
    }
}

std::string encodeReport(const Outcome& outcome, int fdForLabelling) {
    std::string text;
    append(text, ReportHeader{outcome.elapsed.count(), outcome.ok, fdForLabelling,
                              static_cast<std::uint32_t>(outcome.reports.size())});
    for (const Report& report : outcome.reports) {
        append(text, ReportEntry{report.domain, report.code, static_cast<std::uint32_t>(report.message.size())});
        text += report.message;
    }
    return text;
}

// False if the text ends too early, which is a child that died. execErrno stays 0 if the exec worked.
bool decodeReport(std::string_view text, Registration& registration, int& execErrno) {
    ReportHeader header{};
    if (!take(text, header))
        return false;
    registration.ok = header.ok != 0;
    registration.elapsed = std::chrono::nanoseconds(header.elapsed);
    registration.fdForLabelling = header.fdForLabelling;
    for (std::uint32_t i = 0; i < header.count; ++i) {
        ReportEntry entry{};
        if (!take(text, entry) || text.size() < entry.length)
            return false;
        registration.reports.push_back({entry.domain, entry.code, std::string(text.substr(0, entry.length))});
        text.remove_prefix(entry.length);
    }
    return text.empty() || take(text, execErrno);
}

LockParam makeParam(int type, const char* key) {
    LockParam param{};
    param.type = type;
    param.key = key;
    return param;
}

// uuid, name, id, pid, uri: libvirt's order in domain_lock.c.
std::vector<LockParam> domainParameters(const Guest& guest, pid_t pid, const char* uri) {
    std::vector<LockParam> params = {makeParam(LOCK_PARAM_UUID, "uuid"), makeParam(LOCK_PARAM_STRING, "name"),
                                     makeParam(LOCK_PARAM_UINT, "id"), makeParam(LOCK_PARAM_UINT, "pid"),
                                     makeParam(LOCK_PARAM_CSTRING, "uri")};
    std::ranges::copy(guest.uuid, params[0].value.uuid);
    params[1].value.str = const_cast<char*>(guest.name.c_str());
    params[2].value.ui = guest.id;
    params[3].value.ui = static_cast<unsigned>(pid);
    params[4].value.cstr = uri;
    return params;
}

// libvirt owns the state strings, so both directions go through malloc and free.
class StateString {
public:
    explicit StateString(const std::optional<std::string>& text) : text_(text ? strdup(text->c_str()) : nullptr) {}
    StateString(const StateString&) = delete;
    StateString& operator=(const StateString&) = delete;
    ~StateString() { std::free(text_); }

    char** pointer() { return &text_; }
    std::optional<std::string> get() const { return text_ ? std::optional<std::string>(text_) : std::nullopt; }

private:
    char* text_;
};

} // namespace

// libvirt's signature (src/util/virerror.h). The plugin looks it up with dlsym, hence C linkage and visible whatever
// the executable's default is.
extern "C" __attribute__((visibility("default"), format(printf, 6, 7))) void
virReportErrorHelper(int domain, int code, const char*, const char*, std::size_t, const char* format, ...) {
    const int savedErrno = errno; // libvirt's own keeps it, and callers rely on that
    char message[4096];           // libvirt's own is cut at 1024
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    pendingReports().push_back({domain, code, message});
    errno = savedErrno;
}

std::string Outcome::message() const {
    return reports.empty() ? std::string() : reports.back().message;
}

GuestProcess::GuestProcess(GuestProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)), lifeline_(std::exchange(other.lifeline_, -1)) {}

GuestProcess& GuestProcess::operator=(GuestProcess&& other) noexcept {
    std::swap(pid_, other.pid_);
    std::swap(lifeline_, other.lifeline_);
    return *this;
}

void GuestProcess::kill() {
    if (pid_ > 0)
        ::kill(pid_, SIGKILL);
    reap();
}

void GuestProcess::quit() {
    if (lifeline_ >= 0)
        close(std::exchange(lifeline_, -1));
    reap();
}

void GuestProcess::reap() {
    if (pid_ > 0)
        waitFor(std::exchange(pid_, -1));
    if (lifeline_ >= 0)
        close(std::exchange(lifeline_, -1));
}

PluginHost::PluginHost(const std::string& plugin, std::string standIn) : standIn_(std::move(standIn)) {
    if (access(standIn_.c_str(), X_OK) < 0)
        throwErrno(standIn_);
    handle_ = dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr)
        throw std::runtime_error(dlerror());
    driver_ = static_cast<const LockDriver*>(dlsym(handle_, "virLockDriverImpl"));
    if (driver_ == nullptr) {
        dlclose(handle_);
        throw std::runtime_error(plugin + ": no symbol virLockDriverImpl");
    }
}

PluginHost::~PluginHost() {
    if (initialised_)
        driver_->deinit();
    dlclose(handle_);
}

void PluginHost::finish(Outcome& outcome, bool ok) {
    outcome.ok = ok;
    outcome.reports = std::exchange(pendingReports(), {});
    if (!ok && outcome.reports.empty() && errorSource_)
        outcome.reports.push_back({0, 0, errorSource_()});
}

Outcome PluginHost::init(const std::string& configFile, unsigned version, unsigned flags) {
    Outcome outcome;
    pendingReports().clear();
    const auto begin = std::chrono::steady_clock::now();
    const int result = driver_->init(version, configFile.c_str(), flags);
    outcome.elapsed = std::chrono::steady_clock::now() - begin;
    finish(outcome, result == 0);
    initialised_ = initialised_ || outcome.ok;
    return outcome;
}

Outcome PluginHost::deinit() {
    Outcome outcome;
    pendingReports().clear();
    finish(outcome, driver_->deinit() == 0);
    initialised_ = false;
    return outcome;
}

namespace {

// libvirt, src/locking/domain_lock.c.
void addTarget(std::vector<LockParam>& parameters, const LeaseTarget& target) {
    LockParam path{LOCK_PARAM_STRING, "path", {}}, offset{LOCK_PARAM_ULONG, "offset", {}},
        lockspace{LOCK_PARAM_STRING, "lockspace", {}};
    path.value.cstr = target.path.c_str();
    offset.value.ul = target.offset;
    lockspace.value.cstr = target.lockspace.c_str();
    parameters.insert(parameters.end(), {path, offset});
    if (!target.lockspace.empty())
        parameters.push_back(lockspace);
}

} // namespace

// Every operation of libvirt is New, AddResource*, one call, Free. When New refuses there is nothing to free.
Outcome PluginHost::request(const Guest& guest, pid_t pid, const char* uri, std::span<const Disk> disks,
                            unsigned createFlags, const CallOptions& options, const Call& call) {
    std::vector<LockParam> params = domainParameters(guest, pid, uri);
    params.insert(params.end(), options.extraParameters.begin(), options.extraParameters.end());
    pendingReports().clear();
    LockManager manager{driver_, nullptr};
    Outcome outcome;

    const auto begin = std::chrono::steady_clock::now();
    bool ok = driver_->create(&manager, LOCK_OBJECT_DOMAIN, params.size(), params.data(),
                              createFlags | options.createFlags) == 0;
    if (ok) {
        for (const Disk& disk : disks) {
            std::vector<LockParam> parameters = disk.parameters;
            if (disk.target)
                addTarget(parameters, *disk.target);
            ok = driver_->addResource(&manager, disk.type, disk.path.c_str(), parameters.size(), parameters.data(),
                                      disk.flags) == 0;
            if (!ok)
                break;
        }
        ok = ok && call(manager) == 0;
        driver_->destroy(&manager);
    }
    outcome.elapsed = std::chrono::steady_clock::now() - begin;

    finish(outcome, ok);
    return outcome;
}

Outcome PluginHost::registerHere(const Guest& guest, std::span<const Disk> disks, const CallOptions& options,
                                 int& fdForLabelling) {
    return request(guest, getpid(), kUri, disks, LOCK_NEW_STARTED, options, [&](LockManager& manager) {
        return driver_->acquire(&manager, options.state ? options.state->c_str() : nullptr,
                                LOCK_ACQUIRE_REGISTER_ONLY | LOCK_ACQUIRE_RESTRICT | options.callFlags,
                                options.failureAction, &fdForLabelling);
    });
}

Outcome PluginHost::registerHere(const Guest& guest, std::span<const Disk> disks, const CallOptions& options) {
    int fdForLabelling = -1;
    return registerHere(guest, disks, options, fdForLabelling);
}

void PluginHost::becomeGuest(const Guest& guest, std::span<const Disk> disks, const CallOptions& options,
                             int reportPipe) {
    // libvirt closes what its child inherited before it calls the lock driver: a plugin that relies on a descriptor
    // from init must fail here as it would there.
    closeRange(3, static_cast<unsigned>(reportPipe) - 1);
    closeRange(static_cast<unsigned>(reportPipe) + 1, ~0U);

    int fdForLabelling = -1;
    std::optional<rlim_t> limit;
    if (options.childDescriptorLimit)
        limit = limitDescriptors(*options.childDescriptorLimit);
    const Outcome outcome = registerHere(guest, disks, options, fdForLabelling);
    if (limit)
        limitDescriptors(*limit); // the stand-in's dynamic linker has to open files
    writeAll(reportPipe, encodeReport(outcome, fdForLabelling));
    if (!outcome)
        _exit(EXIT_FAILURE);

    // QEMU has its images open before anything else is asked of it.
    for (const Disk& disk : disks)
        if (disk.type == LOCK_RESOURCE_DISK)
            (void)!open(disk.path.c_str(), (disk.flags & LOCK_RESOURCE_READONLY ? O_RDONLY : O_RDWR) | O_NONBLOCK);
    const std::string name = "guest=" + guest.name;
    execl(standIn_.c_str(), standIn_.c_str(), "-name", name.c_str(), static_cast<char*>(nullptr));
    const int execErrno = errno;
    std::string text;
    append(text, execErrno);
    writeAll(reportPipe, text);
    _exit(EXIT_FAILURE);
}

Registration PluginHost::registerGuest(const Guest& guest, std::span<const Disk> disks, const CallOptions& options) {
    Pipe report;
    Pipe lifeline;
    const pid_t pid = fork();
    if (pid < 0)
        throwErrno("fork");
    if (pid == 0) {
        // Nothing may unwind into the parent's frames: their destructors would kill the parent's guests.
        try {
            if (dup2(commonLifeline_ >= 0 ? commonLifeline_ : lifeline.ends[0], STDIN_FILENO) < 0)
                throwErrno("dup2");
            becomeGuest(guest, disks, options, report.ends[1]);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "guest %s: %s\n", guest.name.c_str(), error.what());
        }
        _exit(EXIT_FAILURE);
    }

    GuestProcess process(pid, commonLifeline_ >= 0 ? -1 : lifeline.releaseEnd(1));
    report.closeEnd(1);
    Registration registration;
    int execErrno = 0;
    if (!decodeReport(readToEnd(report.ends[0]), registration, execErrno)) {
        // It closed the pipe without a report, so it is dying or dead: the kill in ~GuestProcess finds nothing to do.
        siginfo_t info{};
        waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT);
        throw std::runtime_error("the child of guest " + guest.name + " died before it reported: " +
                                 (info.si_code == CLD_EXITED ? "exit code " : "signal ") +
                                 std::to_string(info.si_status));
    }
    if (execErrno != 0)
        throw std::system_error(execErrno, std::generic_category(), standIn_);
    if (registration.ok)
        registration.process.emplace(std::move(process));
    else
        process.quit();
    return registration;
}

Outcome PluginHost::acquire(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options) {
    return request(guest, pid, kUri, disks, 0, options, [&](LockManager& manager) {
        return driver_->acquire(&manager, options.state ? options.state->c_str() : nullptr, options.callFlags,
                                options.failureAction, nullptr);
    });
}

StateOutcome PluginHost::release(const Guest& guest, pid_t pid, std::span<const Disk> disks,
                                 const CallOptions& options) {
    StateString state(options.state);
    StateOutcome outcome;
    static_cast<Outcome&>(outcome) = request(guest, pid, nullptr, disks, 0, options, [&](LockManager& manager) {
        return driver_->release(&manager, state.pointer(), options.callFlags);
    });
    outcome.state = state.get();
    return outcome;
}

StateOutcome PluginHost::inquire(const Guest& guest, pid_t pid, std::span<const Disk> disks,
                                 const CallOptions& options) {
    StateString state(options.state);
    StateOutcome outcome;
    static_cast<Outcome&>(outcome) = request(guest, pid, nullptr, disks, 0, options, [&](LockManager& manager) {
        return driver_->inquire(&manager, state.pointer(), options.callFlags);
    });
    outcome.state = state.get();
    return outcome;
}

Outcome PluginHost::detach(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options) {
    return request(guest, pid, nullptr, disks, 0, options,
                   [&](LockManager& manager) { return driver_->release(&manager, nullptr, options.callFlags); });
}

Guest makeGuest(std::string_view name, unsigned number) {
    Guest guest{std::string(name), {0x6c, 0x65, 0x61, 0x73, 0x65, 0x68, 0x4f, 0x6c, 0x84}, number};
    for (int i = 0; i < 4; ++i)
        guest.uuid[15 - i] = static_cast<unsigned char>(number >> (8 * i));
    return guest;
}

} // namespace leasehold::support

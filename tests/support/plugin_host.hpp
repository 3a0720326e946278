// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#ifndef LEASEHOLD_TESTS_SUPPORT_PLUGIN_HOST_HPP
#define LEASEHOLD_TESTS_SUPPORT_PLUGIN_HOST_HPP

// Plays libvirtd towards a lock-driver plugin: loads it, calls it in libvirtd's order and with libvirtd's parameters,
// and starts guests whose QEMU is a stand-in that is really exec'ed, so that what a plugin leaves inheritable is
// inherited and what it does not is gone. Knows the C ABI and nothing of the plugin behind it: it hosts leasehold.so as
// well as virtlockd's lockd.so. It does not use core/, so that a mistake there cannot hide itself here.
// Called by tests/plugin and tests/bench. One thread for each guest at a time, as in libvirtd; a refusal is an answer
// (Outcome), breakage throws.
//
// Link the executable with -rdynamic (meson: export_dynamic) if the plugin shall find our virReportErrorHelper, which
// records its error texts. Without it they go wherever the plugin sends them when there is no libvirt. An executable
// that loads lockd.so must not export it: it would come between libvirt.so and libvirt's own error reporting.

#include "plugin/lock_driver.h"

#include <sys/types.h>

#include <array>
#include <chrono>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace leasehold::support {

// One call of virReportErrorHelper.
struct Report {
    int domain = 0; // 42: VIR_FROM_LOCKING
    int code = 0;   // 87: VIR_ERR_RESOURCE_BUSY, 38: VIR_ERR_SYSTEM_ERROR, ...
    std::string message;
};

struct Outcome {
    bool ok = false;
    std::vector<Report> reports;         // in the order in which they came; users of libvirt see the last one
    std::chrono::nanoseconds elapsed{0}; // from before create until after destroy, in the process that made the calls

    explicit operator bool() const { return ok; }
    // The text of the last report, or "".
    std::string message() const;
};

struct StateOutcome : Outcome {
    std::optional<std::string> state;
};

struct Guest {
    std::string name;
    std::array<unsigned char, 16> uuid{};
    unsigned id = 1;
};

// What libvirt says of a <lease> element beside its key.
struct LeaseTarget {
    std::string path;
    std::string lockspace{}; // libvirt leaves it out when the element has none
    unsigned long long offset = 0;
};

struct Disk {
    std::string path;
    unsigned flags = 0;                  // LOCK_RESOURCE_READONLY, LOCK_RESOURCE_SHARED, or what a test makes up
    unsigned type = LOCK_RESOURCE_DISK;  // LOCK_RESOURCE_LEASE: `path` is the key
    std::vector<LockParam> parameters{}; // passed as they are: what they point at must outlive the call
    std::optional<LeaseTarget> target{}; // of a <lease> element: makes its parameters
};

// What libvirtd would not normally say. The defaults are what libvirtd 9 does.
struct CallOptions {
    unsigned createFlags = 0;                 // added to what the operation passes anyway
    unsigned callFlags = 0;                   // the same for acquire, release, inquire
    std::vector<LockParam> extraParameters{}; // after uuid, name, id, pid, uri
    std::optional<std::string> state{};       // acquire: the state; release, inquire: what *state holds before the call
    int failureAction = 0;                    // DEFAULT
    bool stillOpen = false;                   // detach: QEMU keeps the images open
    // RLIMIT_NOFILE of the forked child while it calls the plugin. It has 0, 1, 2 and one more descriptor open.
    std::optional<unsigned> childDescriptorLimit{};
};

// A guest's QEMU: our child, which runs the stand-in. Killed and reaped when the object goes.
class GuestProcess {
public:
    GuestProcess(pid_t pid, int lifeline) : pid_(pid), lifeline_(lifeline) {}
    GuestProcess(GuestProcess&& other) noexcept;
    GuestProcess& operator=(GuestProcess&& other) noexcept;
    ~GuestProcess() { kill(); }

    // -1 once it is dead.
    pid_t pid() const { return pid_; }
    // A crash: SIGKILL, and returns when it is dead and reaped.
    void kill();
    // An orderly end: the stand-in returns from main. Returns when it is reaped.
    void quit();

private:
    void reap();

    pid_t pid_;
    int lifeline_; // the stand-in waits for the end of this pipe, so it dies with us however we die
};

struct Registration : Outcome {
    std::optional<GuestProcess> process; // set if ok
    int fdForLabelling = -1;             // what acquire wrote to *fd in the child: a number only
};

class PluginHost {
public:
    // Loads the plugin as libvirtd does, but calls nothing in it. standIn: the program that plays QEMU
    // (tests/support/fake_qemu.c).
    PluginHost(const std::string& plugin, std::string standIn);
    PluginHost(const PluginHost&) = delete;
    PluginHost& operator=(const PluginHost&) = delete;
    ~PluginHost(); // deinit if init succeeded, then dlclose, as libvirtd does

    const LockDriver& driver() const { return *driver_; }

    // For plugins that report through a real libvirt.so: called after a refusal without reports, in the process of the
    // refusal.
    void setErrorSource(std::function<std::string()> source) { errorSource_ = std::move(source); }

    // Guests that outlive us, as those of a real libvirtd do: they read this end of a pipe, and die with its last
    // writer.
    void setCommonLifeline(int readEnd) { commonLifeline_ = readEnd; }

    Outcome init(const std::string& configFile, unsigned version = LOCK_DRIVER_VERSION, unsigned flags = 0);
    Outcome deinit();

    // The forked child before it becomes QEMU: every descriptor above 2 closed, create(STARTED), addResource*,
    // acquire(REGISTER_ONLY|RESTRICT, &fd), destroy, exec. Returns after the exec, or when a refused child is reaped.
    Registration registerGuest(const Guest& guest, std::span<const Disk> disks, const CallOptions& options = {});

    // The calls of that child alone, in this process, which becomes no guest: for who counts them.
    Outcome registerHere(const Guest& guest, std::span<const Disk> disks, const CallOptions& options = {});

    // The calls of libvirtd itself, with the pid of the guest's QEMU.
    Outcome acquire(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options = {});
    StateOutcome release(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options = {});
    StateOutcome inquire(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options = {});
    // Hot-unplug and the undo of a hot-plug: release without a state pointer.
    Outcome detach(const Guest& guest, pid_t pid, std::span<const Disk> disks, const CallOptions& options = {});

private:
    using Call = std::function<int(LockManager&)>;

    Outcome request(const Guest& guest, pid_t pid, const char* uri, std::span<const Disk> disks, unsigned createFlags,
                    const CallOptions& options, const Call& call);
    Outcome registerHere(const Guest& guest, std::span<const Disk> disks, const CallOptions& options,
                         int& fdForLabelling);
    [[noreturn]] void becomeGuest(const Guest& guest, std::span<const Disk> disks, const CallOptions& options,
                                  int reportPipe);
    void finish(Outcome& outcome, bool ok);

    std::string standIn_;
    std::function<std::string()> errorSource_;
    int commonLifeline_ = -1;
    void* handle_ = nullptr;
    const LockDriver* driver_ = nullptr;
    bool initialised_ = false;
};

// The shape of a libvirt domain with a uuid made of the number.
Guest makeGuest(std::string_view name, unsigned number);

} // namespace leasehold::support

#endif

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// libvirt's lock-driver interface on one side, the engine on the other, and the wall between: nothing that is thrown
// crosses extern "C". Each entry translates in, calls the engine once, translates out. Every call of libvirt is a
// request of its own (create, addResource..., one of acquire/release/inquire, destroy): the lease does not live here,
// and destroying a request releases nothing.

#include "core/engine.hpp"
#include "core/os/error.hpp"
#include "plugin/lock_driver.h"
#include "plugin/report.hpp"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>

#include <unistd.h>

namespace leasehold::plugin {

namespace {

struct Request {
    Guest guest;
    std::vector<Resource> resources;
    bool unleasedDisk = false; // a disk that only its guest may write to, and that is not leased
    bool starting = false;     // its process is no QEMU yet
};

// Set once by the first init and never taken back: other threads may be in a call when deinit comes.
std::atomic<const Engine*> engine{nullptr};
std::mutex initMutex;
pid_t libvirtd = 0;

ErrorCode codeOf(Fault fault) {
    switch (fault) {
    case Fault::system:
        return ErrorCode::systemError;
    case Fault::unsupported:
        return ErrorCode::configUnsupported;
    case Fault::invalid:
        return ErrorCode::operationFailed;
    }
    return ErrorCode::internal;
}

// The wall. What was thrown decided nothing, so the answer is -1: in doubt the guest is refused. The guest is named
// here, because what was thrown from the depths does not know it.
template <typename Body>
int guarded(const Request* request, Body body) noexcept {
    auto about = [&] { // a call that is granted pays nothing for it
        return request ? "guest '" + request->guest.name + "'" +
                             (request->starting ? "" : " (pid " + std::to_string(request->guest.pid) + ")") + ": "
                       : std::string();
    };
    try {
        try {
            return body();
        } catch (const Error& error) {
            report(codeOf(error.fault()), about() + error.what());
        } catch (const std::exception& error) {
            report(ErrorCode::internal, about() + error.what());
        }
    } catch (const std::exception& error) {
        report(ErrorCode::systemError, error.what()); // no memory even for the message
    }
    return -1;
}

int answer(const Engine::Answer& refusal) {
    if (refusal)
        report(ErrorCode::resourceBusy, *refusal);
    return refusal ? -1 : 0;
}

const Engine& theEngine() {
    const Engine* current = engine;
    if (!current)
        throw Error(Fault::invalid, "the leasehold lock manager is used before it was initialised");
    return *current;
}

Request& requestOf(LockManager* manager) {
    return *static_cast<Request*>(manager->privateData);
}

// libvirt takes a state that was allocated with malloc.
void giveState(char** state, const std::string& text) {
    char* copy = text.empty() ? nullptr : strdup(text.c_str());
    if (!text.empty() && !copy)
        throw std::bad_alloc();
    free(*state); // a second release of one suspend passes the state of the first
    *state = copy;
}

int init(unsigned int version, const char* configFile, unsigned int) {
    return guarded(nullptr, [&] {
        std::lock_guard lock(initMutex);
        findReporter();
        libvirtd = getpid();
        if (version < LOCK_DRIVER_VERSION)
            throw Error(Fault::unsupported, "leasehold needs the lock-driver interface of libvirt 1.0.0 or later");
        // Once for each of libvirt's drivers, but there is one configuration. It is checked every time.
        Settings settings = configFile ? loadSettings(configFile) : Settings();
        if (!engine)
            engine = new Engine(settings, warn);
        return 0;
    });
}

// libvirtd calls this on its way out only; the guests go on, and so do their leases.
int deinit() {
    return 0;
}

int create(LockManager* manager, unsigned int objectType, std::size_t parameterCount, const LockParam* parameters,
           unsigned int flags) {
    manager->privateData = nullptr;
    return guarded(nullptr, [&] {
        theEngine();
        if (objectType != LOCK_OBJECT_DOMAIN)
            throw Error(Fault::unsupported,
                        "leasehold locks guests only, not objects of type " + std::to_string(objectType));
        auto request = std::make_unique<Request>();
        request->starting = flags & LOCK_NEW_STARTED;
        for (const LockParam& parameter : std::span(parameters, parameterCount)) {
            std::string_view key = parameter.key ? parameter.key : "";
            if (key == "uuid" && parameter.type == LOCK_PARAM_UUID)
                std::copy(std::begin(parameter.value.uuid), std::end(parameter.value.uuid),
                          request->guest.uuid.begin());
            else if (key == "name" && (parameter.type == LOCK_PARAM_STRING || parameter.type == LOCK_PARAM_CSTRING))
                request->guest.name = parameter.value.cstr ? parameter.value.cstr : "";
            else if (key == "pid" && parameter.type == LOCK_PARAM_UINT)
                request->guest.pid = static_cast<pid_t>(parameter.value.ui);
            // Others (id, uri, and what later versions bring) say nothing that a lease depends on.
        }
        if (request->guest.name.empty() || request->guest.uuid == lease::Uuid{})
            throw Error(Fault::invalid, "libvirt named a guest without name or UUID");
        manager->privateData = request.release();
        return 0;
    });
}

void destroy(LockManager* manager) {
    delete static_cast<Request*>(manager->privateData);
    manager->privateData = nullptr;
}

// A <lease> element: lockspace, key (the name), and the target's path and offset (libvirt's conf/domain_lock.c).
Resource namedLease(const char* name, std::span<const LockParam> parameters) {
    Resource resource;
    resource.named.emplace();
    resource.named->key = name ? name : "";
    for (const LockParam& parameter : parameters) {
        std::string_view key = parameter.key ? parameter.key : "";
        bool text = parameter.type == LOCK_PARAM_STRING || parameter.type == LOCK_PARAM_CSTRING;
        if (key == "path" && text)
            resource.path = parameter.value.cstr ? parameter.value.cstr : "";
        else if (key == "lockspace" && text)
            resource.named->lockspace = parameter.value.cstr ? parameter.value.cstr : "";
        else if (key == "offset" && parameter.type == LOCK_PARAM_ULONG)
            resource.named->offset = parameter.value.ul;
    }
    if (resource.named->key.empty() || resource.path.empty())
        throw Error(Fault::invalid, "libvirt named a <lease> without a key or without the path of its target");
    return resource;
}

int addResource(LockManager* manager, unsigned int type, const char* name, std::size_t parameterCount,
                const LockParam* parameters, unsigned int flags) {
    Request& request = requestOf(manager);
    return guarded(&request, [&] {
        if (type == LOCK_RESOURCE_LEASE) {
            request.resources.push_back(namedLease(name, std::span(parameters, parameterCount)));
            return 0;
        }
        if (type != LOCK_RESOURCE_DISK)
            return 0; // of a later libvirt: not ours to lock
        if (!name || !*name)
            throw Error(Fault::invalid, "libvirt named a disk without a path");
        // Both flags: nothing is written, so read-only is all that is used.
        lease::Mode mode = flags & LOCK_RESOURCE_READONLY ? lease::Mode::readOnly
                           : flags & LOCK_RESOURCE_SHARED ? lease::Mode::shared
                                                          : lease::Mode::exclusive;
        if (theEngine().settings().autoDiskLeases) {
            Resource& disk = request.resources.emplace_back();
            disk.path = name;
            disk.mode = mode;
        } else
            request.unleasedDisk = request.unleasedDisk || mode == lease::Mode::exclusive;
        return 0;
    });
}

// The end of the process that is to become QEMU, if Register does not come to one: libvirt would wait for it for ever.
// Where that process was forked while another thread of libvirtd was throwing an exception, no exception can be thrown
// in it: the lock that dl_iterate_phdr(3) takes stays taken (glibc before 2.35, GCC before 12; on Debian 11 as soon as
// two threads do nothing else). No more threads are there to end it, and it holds no leases yet, so a signal may.
class LastResort {
public:
    explicit LastResort(std::chrono::seconds limit) {
        sigset_t alone;
        sigemptyset(&alone);
        sigaddset(&alone, SIGALRM);
        struct sigaction byDefault {};
        byDefault.sa_handler = SIG_DFL;
        sigaction(SIGALRM, &byDefault, &action_);
        pthread_sigmask(SIG_UNBLOCK, &alone, &mask_);
        (void)alarm(static_cast<unsigned>(limit.count()));
    }
    LastResort(const LastResort&) = delete;
    ~LastResort() {
        (void)alarm(0);
        pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
        sigaction(SIGALRM, &action_, nullptr);
    }

    // Longer than any wait of Register's own, also where a busy host hardly gives it a turn.
    static std::chrono::seconds limitFor(const Settings& settings) {
        constexpr std::chrono::seconds kBeyond{60};
        return std::chrono::ceil<std::chrono::seconds>(settings.storageTimeout + settings.handoffWait) + kBeyond;
    }

private:
    struct sigaction action_ {};
    sigset_t mask_{};
};

int acquire(LockManager* manager, const char* state, unsigned int flags, int, int* fd) {
    // A descriptor for libvirt to label. The vessel needs none, and QEMU inherits it by itself.
    if (fd)
        *fd = -1;
    Request& request = requestOf(manager);
    return guarded(&request, [&] {
        const Engine& current = theEngine();
        const bool starts = flags & LOCK_ACQUIRE_REGISTER_ONLY;
        // libvirt's Xen driver asks without forking: the leases would be put into libvirtd and stay there.
        if (starts && getpid() == libvirtd)
            throw Error(Fault::unsupported, "leasehold protects QEMU guests only: remove lock_manager from the "
                                            "configuration of this driver");
        std::optional<LastResort> lastResort;
        if (starts)
            lastResort.emplace(LastResort::limitFor(current.settings()));
        if (request.resources.empty() && request.unleasedDisk && current.settings().requireLeaseForDisks)
            throw Error(Fault::unsupported, "it has disks that it writes to but no lease: set auto_disk_leases = 1 or "
                                            "require_lease_for_disks = 0 in qemu-leasehold.conf");
        if (starts)
            return answer(current.registerGuest(request.guest, request.resources));
        return answer(current.acquire(request.guest, request.resources, state ? state : ""));
    });
}

int release(LockManager* manager, char** state, unsigned int) {
    Request& request = requestOf(manager);
    return guarded(&request, [&] {
        // No state pointer: the images are detached. With one, even an empty one: the guest stops.
        if (state)
            giveState(state, theEngine().release(request.guest, request.resources));
        else
            theEngine().detach(request.guest, request.resources);
        return 0;
    });
}

int inquire(LockManager* manager, char** state, unsigned int) {
    Request& request = requestOf(manager);
    return guarded(&request, [&] {
        if (!state)
            return 0;
        *state = nullptr; // not ours to free
        giveState(state, theEngine().inquire(request.guest, request.resources));
        return 0;
    });
}

} // namespace

} // namespace leasehold::plugin

extern "C" [[gnu::visibility("default")]] const LockDriverExport virLockDriverImpl = {
    .table =
        {
            .version = LOCK_DRIVER_VERSION,
            .flags = 0,
            .init = leasehold::plugin::init,
            .deinit = leasehold::plugin::deinit,
            .create = leasehold::plugin::create,
            .destroy = leasehold::plugin::destroy,
            .addResource = leasehold::plugin::addResource,
            .acquire = leasehold::plugin::acquire,
            .release = leasehold::plugin::release,
            .inquire = leasehold::plugin::inquire,
        },
    .padding = {},
};

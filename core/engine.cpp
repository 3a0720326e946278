// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/engine.hpp"

#include "core/call.hpp"
#include "core/os/deadline.hpp"
#include "core/os/error.hpp"
#include "core/os/hash.hpp"

#include <algorithm>
#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

namespace leasehold {

namespace {

os::Process openQemu(const Guest& guest) {
    auto process = guest.pid > 0 ? os::Process::openIfExists(guest.pid) : std::nullopt;
    if (!process)
        throw Error(Fault::system, "it has no QEMU to keep its leases (there is no process " +
                                       std::to_string(guest.pid) + "): start the guest");
    return std::move(*process);
}

Engine::Answer answerOf(std::string refusal) {
    return refusal.empty() ? std::nullopt : Engine::Answer(std::move(refusal));
}

// Which process of which boot: its number, and when it was started (proc(5), /proc/PID/stat, field 22).
std::uint64_t numberOfThisProcess(const std::string& bootId) {
    std::string stat = os::readFileIfPossible("/proc/self/stat", 4096).value_or("");
    std::size_t at = std::min(stat.rfind(')'), stat.size()); // the name before it may hold anything
    for (int field = 2; field < 22 && at != std::string::npos; field++)
        at = stat.find(' ', at + 1);
    std::string start = at == std::string::npos ? "" : stat.substr(at, stat.find(' ', at + 1) - at);
    std::uint64_t number = os::fnv1a(bootId + " " + std::to_string(getpid()) + start);
    return number ? number : 1; // 0 is Register's
}

// A page of memory that a helper process shares with us.
class SharedText {
public:
    static constexpr std::size_t kSize = 4096;
    SharedText()
        : text_(static_cast<char*>(mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
        if (text_ == MAP_FAILED)
            throw SystemError(errno, "allocate", "a page of memory");
    }
    SharedText(const SharedText&) = delete;
    ~SharedText() { munmap(text_, kSize); }

    char* get() { return text_; }
    // Whoever was writing it may have been stopped in the middle.
    std::string read() const { return {text_, strnlen(text_, kSize)}; }

private:
    char* text_;
};

} // namespace

Engine::Engine(const Settings& settings, Warn warn)
    : settings_(settings), warn_(std::move(warn)),
      bootId_(os::readFileIfPossible("/proc/sys/kernel/random/boot_id", 36).value_or("")),
      caller_(numberOfThisProcess(bootId_)) {}

std::string Engine::bounded(bool mayHang, Call& call, std::span<const int> keep, const Work& work) const {
    if (!mayHang) {
        try {
            return work(call);
        } catch (const qemu::RemoteLeases&) { // whatever the mounts of this host say
        }
    }
    SharedText where;
    call.reportTo(where.get(), SharedText::kSize);
    // Waiting for a handoff is not waiting for the storage.
    auto result =
        os::runWithDeadline(settings_.storageTimeout + settings_.handoffWait, keep, [&] { return work(call); });
    call.reportTo(nullptr, 0);
    if (result)
        return *result;
    std::string path = where.read();
    if (path.empty() && !call.resources().empty())
        path = call.resources().front().path;
    throw Error(Fault::system, "the storage of its disks ('" + path + "') did not answer for " +
                                   std::to_string(settings_.storageTimeout.count() / 1000) +
                                   " s: see whether its server and its cluster are up, and try again (option "
                                   "storage_timeout in qemu-leasehold.conf)" +
                                   storage::causeOfSilence(path));
}

// Whether storage may hang the guest's vessel tells (Call::choose).
std::string Engine::callFor(Call& call, const Work& work) const {
    return bounded(false, call, call.process().descriptor(), work);
}

Engine::Answer Engine::registerGuest(const Guest& guest, const std::vector<Resource>& resources) const {
    return enter(guest, resources, lease::Entry::waiting);
}

Engine::Answer Engine::registerProgram(const Guest& guest, const std::vector<Resource>& resources) const {
    return enter(guest, resources, lease::Entry::running);
}

Engine::Answer Engine::enter(const Guest& guest, const std::vector<Resource>& resources, lease::Entry entry) const {
    qemu::VesselEnds ends;
    auto numbers = ends.numbers();
    bool remote = !resources.empty() && storage::hostHasRemoteMounts();
    Surroundings surroundings{settings_, warn_, bootId_, caller_, mounts_};
    Call call(surroundings, guest, resources);
    std::string refusal = bounded(remote, call, numbers, [&](Call& here) { return here.enter(ends, entry); });
    if (!refusal.empty())
        return refusal;
    ends.leaveToQemu();
    return std::nullopt;
}

Engine::Answer Engine::acquire(const Guest& guest, const std::vector<Resource>& resources,
                               std::string_view state) const {
    Surroundings surroundings{settings_, warn_, bootId_, caller_, mounts_};
    Call call(surroundings, guest, resources, openQemu(guest));
    return answerOf(callFor(call, [&](Call& here) { return here.acquire(state); }));
}

// A QEMU that has died meanwhile holds nothing: there is nothing to do for it in the three calls that follow.

std::string Engine::changeHandoff(const Guest& guest, const std::vector<Resource>& resources,
                                  std::uint32_t (*step)(const lease::Incarnation&,
                                                        std::span<const lease::Share>)) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return {};
    Surroundings surroundings{settings_, warn_, bootId_, caller_, mounts_};
    Call call(surroundings, guest, resources, std::move(process));
    return callFor(call, [&](Call& here) { return here.changeHandoff(step); });
}

std::string Engine::release(const Guest& guest, const std::vector<Resource>& resources) const {
    return changeHandoff(guest, resources, lease::releaseAll);
}

std::string Engine::inquire(const Guest& guest, const std::vector<Resource>& resources) const {
    return changeHandoff(guest, resources, lease::inquireAll);
}

void Engine::detach(const Guest& guest, const std::vector<Resource>& resources) const {
    auto process = os::Process::openIfExists(guest.pid);
    if (!process)
        return;
    Surroundings surroundings{settings_, warn_, bootId_, caller_, mounts_};
    Call call(surroundings, guest, resources, std::move(process));
    callFor(call, [&](Call& here) {
        here.detach();
        return std::string();
    });
}

} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold probe DIR, on two hosts: do locks cross between them? Whoever comes first holds locks, in a child that it
// kills in the end; whoever comes second tries to get them. They meet in DIR/.leasehold-probe, where each writes
// what it has done into a file of its own, which it alone writes: the locks are what is being tested, so the meeting
// must not need any. A file is opened anew for each look, because that is when network file systems ask their server
// (NFS: close-to-open consistency, nfs(5)).
//
// Others may be allowed to write to DIR, and to put there whatever they like: what is there is only used if it is ours
// (class Folder).
//
//     first:    hold all locks ─▶ "holds"              ─▶ kill the child ─▶ "killed"             ─▶ print, remove
//     second:                      try, look ─▶ "tried"                      try ─▶ the result ─▶ print

#include "core/inspect.hpp"
#include "core/os/file_lock.hpp"
#include "core/os/process.hpp"
#include "core/os/text.hpp"
#include "tools/options.hpp"
#include "tools/storage.hpp"

#include <array>
#include <chrono>
#include <iostream>
#include <optional>
#include <thread>

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr milliseconds kPoll{100};
// A first one that does not count on for so long has died. Longer than NFS caches attributes (nfs(5), acregmin=3).
constexpr seconds kSilence{8};
// How long the storage may take to notice that a process has died.
constexpr seconds kForgetting{10};

constexpr os::Range kLow{10, 1};
constexpr os::Range kHigh{(std::int64_t{1} << 62) + 5, 1};
constexpr os::Range kRead{100, 1}; // where QEMU has its own

constexpr const char* kMeetingPlace = ".leasehold-probe";
constexpr std::array kFiles{"first", "second", "flock", "ofd"};
constexpr mode_t kOthersWrite = S_IWGRP | S_IWOTH;

struct stat statOf(int fd, const std::string& path) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        throw SystemError(errno, "stat", path);
    return status;
}

// DIR/.leasehold-probe. Everything in it is reached through one descriptor, no link is followed, and nothing waits: in
// a directory that others may write to it may be anything that they have made. What belongs to somebody else, or what
// others may change, is neither read nor written nor locked.
class Folder {
public:
    // Nothing if there is one already.
    static std::optional<Folder> make(const std::string& directory) {
        Folder folder(directory);
        if (mkdirat(folder.parent_.get(), kMeetingPlace, 0700) < 0) {
            if (errno == EEXIST)
                return std::nullopt;
            throw SystemError(errno, "create", folder.path_);
        }
        if (!folder.tryOpen())
            throw SystemError(ENOENT, "open", folder.path_);
        return folder;
    }
    // Nothing if there is none any more.
    static std::optional<Folder> find(const std::string& directory) {
        Folder folder(directory);
        return folder.tryOpen() ? std::optional(std::move(folder)) : std::nullopt;
    }

    const std::string& path() const { return path_; }

    // 0, or the error number. Throws where it is not our own.
    int tryFile(const char* name, int flags, os::Fd& fd) const {
        int error = os::tryOpenAt(folder_.get(), name, flags | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0600, fd);
        if (error == ELOOP || error == ENXIO || error == EISDIR)
            refuse("'" + std::string(name) + "' in it is no regular file");
        if (error != 0)
            return error;
        struct stat status = statOf(fd.get(), path_ + "/" + name);
        if (!S_ISREG(status.st_mode) || status.st_nlink > 1 || status.st_uid != owner_ ||
            (status.st_mode & kOthersWrite) != 0)
            refuse("'" + std::string(name) + "' in it is not a file of its own that only its owner may write to");
        return 0;
    }
    os::Fd file(const char* name, int flags) const {
        os::Fd fd;
        if (int error = tryFile(name, flags, fd))
            throw SystemError(error, "open", path_ + "/" + name);
        return fd;
    }

    // Nothing but what a probe leaves: there is an error if there is more in it.
    void remove() const {
        for (const char* name : kFiles)
            if (unlinkat(folder_.get(), name, 0) < 0 && errno != ENOENT)
                throw SystemError(errno, "remove what a probe left:", path_ + "/" + name);
        if (unlinkat(parent_.get(), kMeetingPlace, AT_REMOVEDIR) < 0 && errno != ENOENT)
            throw SystemError(errno, "remove what a probe left:", path_);
    }

private:
    explicit Folder(const std::string& directory)
        : path_(directory + "/" + kMeetingPlace), parent_(os::openFile(directory, O_RDONLY | O_DIRECTORY)) {}

    [[noreturn]] void refuse(const std::string& problem) const {
        throw Error(Fault::invalid, "'" + path_ + "' cannot be used: " + problem +
                                        "; see who made it, remove it, and run leasehold probe again, on both hosts "
                                        "as the same user");
    }

    bool tryOpen() {
        int error = os::tryOpenAt(parent_.get(), kMeetingPlace, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, folder_);
        if (error == ENOENT)
            return false;
        if (error == ENOTDIR || error == ELOOP)
            refuse("it is not a directory");
        if (error != 0)
            throw SystemError(error, "open", path_);
        struct stat status = statOf(folder_.get(), path_);
        owner_ = whomWeAre();
        if (status.st_uid != owner_)
            refuse("it belongs to user " + std::to_string(status.st_uid));
        if ((status.st_mode & kOthersWrite) != 0)
            refuse("others than its owner may write to it");
        return true;
    }

    // As whom the storage knows us: a server may take root for somebody else (exports(5), root_squash). To find out
    // makes a file without a name, or with one that nobody knows before.
    uid_t whomWeAre() const {
        os::Fd fd;
        if (os::tryOpenAt(parent_.get(), ".", O_TMPFILE | O_RDWR, 0600, fd) == 0)
            return statOf(fd.get(), path_).st_uid;
        std::string name = "." + os::hostName() + "-" + std::to_string(getpid()) + "-leasehold-probe";
        if (int error = os::tryOpenAt(parent_.get(), name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600, fd))
            throw SystemError(error, "make a file beside", path_);
        (void)unlinkat(parent_.get(), name.c_str(), 0);
        return statOf(fd.get(), path_).st_uid;
    }

    std::string path_;
    os::Fd parent_, folder_;
    uid_t owner_ = 0;
};

// One side's file: the other reads it.
class Board {
public:
    Board(const Folder& folder, const char* mine, const char* other) : folder_(folder), mine_(mine), other_(other) {}

    void write(Json json) {
        written_ = std::move(json);
        beat();
    }
    // Shows that we are alive.
    void beat() {
        written_["beat"] = ++beats_;
        os::Fd fd = folder_.file(mine_, O_WRONLY | O_CREAT);
        // In one write, and always of one size, so that a reader sees the old or the new text, or no JSON at all.
        std::string text = written_.dump();
        text.resize(kBoardSize, ' ');
        if (pwrite(fd.get(), text.data(), text.size(), 0) != static_cast<ssize_t>(text.size()) || fsync(fd.get()) < 0)
            throw SystemError(errno, "write", folder_.path() + "/" + mine_);
    }
    // Nothing yet, or half of something.
    Json read() const {
        os::Fd fd;
        char text[kBoardSize];
        ssize_t length =
            folder_.tryFile(other_, O_RDONLY, fd) == 0 ? TEMP_FAILURE_RETRY(pread(fd.get(), text, sizeof text, 0)) : 0;
        Json json = Json::parse(text, text + std::max(length, ssize_t{0}), nullptr, false);
        return json.is_object() && json.contains("step") ? json : Json::object({{"step", ""}, {"beat", 0}});
    }
    // Waits until the other side has got there.
    std::optional<Json> await(const std::string& step, steady_clock::time_point deadline) {
        while (steady_clock::now() < deadline) {
            Json json = read();
            if (json["step"] == step)
                return json;
            beat();
            std::this_thread::sleep_for(kPoll);
        }
        return std::nullopt;
    }

private:
    static constexpr std::size_t kBoardSize = 4096;
    const Folder& folder_;
    const char *mine_, *other_;
    Json written_ = Json::object({{"step", ""}});
    std::uint64_t beats_ = 0;
};

Json whoAmI() {
    return {{"host", os::hostName()},
            {"boot", os::readFileIfPossible("/proc/sys/kernel/random/boot_id", 36).value_or("")}};
}

std::string pathOf(const os::Fd& fd) {
    return os::pathOf(fd.get(), "a file");
}

// "busy": somebody has it; "free": we could have it, and have given it back; or why it cannot be locked at all.
std::string tryFlock(const os::Fd& fd) {
    if (flock(fd.get(), LOCK_EX | LOCK_NB) == 0)
        return "free";
    int error = errno;
    return error == EWOULDBLOCK || error == EACCES ? "busy" : SystemError(error, "flock", pathOf(fd)).what();
}

std::string tryRange(const os::Fd& fd, os::Range range) {
    std::string outcome;
    auto failure = attempt([&] {
        bool free = os::tryLock(fd.get(), os::LockType::write, range, pathOf(fd)) == os::LockOutcome::granted;
        outcome = free ? "free" : "busy";
    });
    return failure.value_or(outcome);
}

// Whether F_OFD_GETLK shows just that lock.
bool isSeen(const os::Fd& fd, os::Range range, os::LockType type) {
    bool seen = false;
    (void)attempt([&] {
        auto found = os::findConflict(fd.get(), os::LockType::write, {range.start - 2, 5}, pathOf(fd));
        seen = found && found->range == range && found->type == type;
    });
    return seen;
}

// flock and byte ranges each on a file of their own: on NFS they are one table.
Json tryAll(const Folder& folder) {
    return {{"flock", tryFlock(folder.file("flock", O_RDWR))},
            {"ofd", tryRange(folder.file("ofd", O_RDWR), kLow)},
            {"ofd_high", tryRange(folder.file("ofd", O_RDWR), kHigh)},
            {"ofd_read", tryRange(folder.file("ofd", O_RDWR), kRead)}};
}

// The child that holds one lock of each kind, until it is killed.
class Holder {
public:
    explicit Holder(const Folder& folder) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0)
            throw SystemError(errno, "create", "a pipe");
        os::Fd reader(ends[0]), writer(ends[1]);
        pid_ = fork();
        if (pid_ < 0)
            throw SystemError(errno, "fork", "a process that holds locks");
        if (pid_ == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            reader.reset();
            hold(folder, writer.get());
        }
        writer.reset();
        char problem[512];
        ssize_t length = read(reader.get(), problem, sizeof problem);
        if (length != 1)
            throw Error(Fault::unsupported,
                        "locks cannot be taken in " + folder.path() + ": " +
                            std::string(problem, length > 0 ? static_cast<std::size_t>(length) : 0));
    }
    Holder(const Holder&) = delete;
    ~Holder() { end(); }

    void end() {
        if (pid_ <= 0)
            return;
        (void)::kill(pid_, SIGKILL);
        (void)waitpid(pid_, nullptr, 0);
        pid_ = -1;
    }

private:
    [[noreturn]] static void hold(const Folder& folder, int pipe) {
        os::Fd first, second, third;
        const std::string flocked = folder.path() + "/flock", ranged = folder.path() + "/ofd";
        auto problem = attempt([&] {
            first = folder.file("flock", O_RDWR);
            second = folder.file("ofd", O_RDWR);
            if (flock(first.get(), LOCK_EX | LOCK_NB) < 0)
                throw SystemError(errno, "flock", flocked);
            for (os::Range range : {kLow, kHigh})
                if (os::tryLock(second.get(), os::LockType::write, range, ranged) != os::LockOutcome::granted)
                    throw Error(Fault::unsupported, "'" + ranged + "', a new file, is locked already");
            if (os::tryLock(second.get(), os::LockType::read, kRead, ranged) != os::LockOutcome::granted)
                throw Error(Fault::unsupported, "'" + ranged + "', a new file, is locked already");
        });
        std::string report = problem.value_or(".");
        (void)!write(pipe, report.data(), report.size());
        if (!problem)
            pause();
        _exit(1);
    }

    pid_t pid_ = -1;
};

Json conclude(const Json& held, const Json& looked, const Json& freed, double after, const Json& first,
              const Json& second) {
    auto forgotten = [&](const char* kind) { return freed[kind] == "free"; };
    bool cross = held["ofd"] == "busy" && held["ofd_high"] == "busy";
    return {{"met", true},
            {"first", first["host"]},
            {"second", second["host"]},
            {"same_host", first["boot"] == second["boot"]},
            {"flock_crosses", held["flock"] == "busy"},
            {"ofd_crosses", held["ofd"] == "busy"},
            {"ofd_high_crosses", held["ofd_high"] == "busy"},
            {"read_locks_cross", held["ofd_read"] == "busy"},
            {"locks_seen", looked["write"]},
            {"read_locks_seen", looked["read"]},
            // Where a lock did not cross nothing was proved by its being free.
            {"dead_holder_forgotten",
             cross ? Json(forgotten("ofd") && forgotten("ofd_high") && forgotten("ofd_read")) : Json()},
            {"forgotten_after_seconds", cross ? Json(after) : Json()},
            {"answers", {{"held", held}, {"freed", freed}}}};
}

Json beFirst(const Folder& folder, int wait) {
    for (const char* name : {"flock", "ofd", "second"})
        (void)folder.file(name, O_RDWR | O_CREAT | O_EXCL);
    struct Remover {
        const Folder& folder;
        ~Remover() {
            (void)attempt([&] { folder.remove(); });
        }
    } remover{folder};
    Holder holder(folder);
    Board board(folder, "first", "second");
    Json me = whoAmI();
    board.write({{"step", "holds"}, {"me", me}});
    if (!board.await("tried", steady_clock::now() + seconds(wait)))
        return {{"met", false}};
    holder.end();
    board.write({{"step", "killed"}, {"me", me}});
    auto done = board.await("done", steady_clock::now() + kForgetting + kSilence);
    if (!done)
        throw Error(Fault::system, "the other probe has gone before it was done: run both again");
    return (*done)["result"];
}

// Nothing when there is nobody: the folder was left by a probe that was killed.
std::optional<Json> beSecond(const Folder& folder) {
    Board board(folder, "second", "first");
    Json first = board.read();
    for (auto deadline = steady_clock::now() + kSilence;;) {
        Json now = board.read();
        if (now["step"] == "holds" && now["beat"] != first["beat"]) {
            first = now;
            break;
        }
        if (steady_clock::now() > deadline)
            return std::nullopt;
        std::this_thread::sleep_for(kPoll);
    }
    Json held = tryAll(folder);
    Json looked{{"write", isSeen(folder.file("ofd", O_RDWR), kHigh, os::LockType::write)},
                {"read", isSeen(folder.file("ofd", O_RDWR), kRead, os::LockType::read)}};
    board.write({{"step", "tried"}});
    if (!board.await("killed", steady_clock::now() + kSilence))
        throw Error(Fault::system, "the other probe has gone before it was done: run both again");
    auto killed = steady_clock::now();
    Json freed = tryAll(folder);
    auto someBusy = [&] {
        return std::any_of(freed.begin(), freed.end(), [](const Json& answer) { return answer == "busy"; });
    };
    while (someBusy() && steady_clock::now() < killed + kForgetting) {
        std::this_thread::sleep_for(kPoll);
        freed = tryAll(folder);
    }
    double after = std::chrono::duration<double>(steady_clock::now() - killed).count();
    Json result = conclude(held, looked, freed, after, first["me"], whoAmI());
    board.write({{"step", "done"}, {"result", result}});
    return result;
}

Json meet(const std::string& directory, int wait) {
    for (;;) {
        if (auto folder = Folder::make(directory))
            return beFirst(*folder, wait);
        auto folder = Folder::find(directory);
        if (!folder)
            continue; // the other probe has just removed it
        if (auto result = beSecond(*folder))
            return *result;
        folder->remove();
    }
}

void say(const char* what, bool good, const char* yes, const char* no) {
    std::cout << "  " << what << ": " << paint(good ? Colour::green : Colour::red, good ? yes : no) << '\n';
}

void print(const Json& result, const std::string& directory) {
    std::string first = result["first"], second = result["second"];
    std::cout << paint(Colour::bold, os::printable(directory)) << ": '" << os::printable(first) << "' held locks, '"
              << os::printable(second) << "' tried to get them\n";
    if (result["same_host"].get<bool>())
        std::cout << "  both are the same host: this proves nothing about other hosts\n";
    say("flock", result["flock_crosses"], "crosses", "does not cross");
    say("open-file-description locks", result["ofd_crosses"], "cross", "do not cross");
    say("the same beyond 2^62, where leases are", result["ofd_high_crosses"], "cross", "do not cross");
    say("read locks, which QEMU takes", result["read_locks_cross"], "cross", "do not cross");
    say("F_OFD_GETLK shows them", result["locks_seen"], "yes", "no");
    say("F_OFD_GETLK shows read locks", result["read_locks_seen"], "yes", "no");
    if (!result["dead_holder_forgotten"].is_null())
        say("a killed holder's locks", result["dead_holder_forgotten"], "are free at once, or nearly", "stay");
    std::cout << "  on this host: " << describeStorage(result["storage"]) << '\n';
}

} // namespace

int probe(const Words& arguments) {
    bool json = false;
    int wait = 60;
    Options options(
        "probe", "DIR",
        "Run it on two hosts that share DIR, within --wait seconds: proves with real locks whether they cross\n"
        "between the two, whether they are seen, and whether a holder that was killed is forgotten.");
    options.add("json", json, "Print JSON");
    options.add("wait", wait, "How long to wait for the other one (60)");
    Words operands = options.parse(arguments);
    if (operands.size() != 1)
        throw UsageError("which directory? See leasehold probe --help");

    // Lock calls may hang as everything else.
    constexpr int kRest = 45;
    Json result = askStorage(operands[0], wait + kRest, [&] {
        Json storage, met;
        auto problem = attempt([&] { storage = storageToJson(classifyPath(operands[0], {})); });
        if (problem)
            throw Error(Fault::system, "'" + operands[0] + "': " + *problem);
        problem = attempt([&] { met = meet(operands[0], wait); });
        if (problem)
            throw Error(Fault::system, *problem);
        met["path"] = operands[0];
        met["storage"] = storage;
        return met;
    });
    bool met = result["met"];
    if (json)
        printJson(result);
    else if (met)
        print(result, operands[0]);
    else
        std::cout << "nobody came within " << wait << " s: run leasehold probe on another host that shares "
                  << os::printable(operands[0]) << ", at the same time\n";
    if (!met)
        return kNotMet;
    bool good = result["ofd_crosses"] && result["ofd_high_crosses"] && result["locks_seen"] &&
                result["dead_holder_forgotten"] == true;
    return good ? kDone : kProblems;
}

} // namespace leasehold::tools

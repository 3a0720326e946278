// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// Each system call of the leasehold command fails, in its helper processes, too. Whatever fails, it ends, and not by a
// signal; what it says is what it would have said, or something else comes with it: another exit status, or a
// complaint. So nobody is told that all is well who has not been looked at. And nobody is told to shut down a guest
// that is well. Guests keep their leases, nothing is left locked, and a file is the old one or the new one.
//
// Default: a part of the calls, each with one of its errors. All of them: LEASEHOLD_LONG=1
// build/tests/unit/command_test. It prints a table of what was made to fail.

#include "tests/support/built.hpp"
#include "tests/support/unit_faults.hpp"
#include "tests/support/unit_media.hpp"

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold {
namespace {

namespace fs = std::filesystem;

// In a namespace of its own there are few processes, so few calls to look at them, and no libvirt. Before anything
// else: this process only waits, and its child is the test.
[[maybe_unused]] const bool kAlone = [] {
    if (unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET) < 0)
        return false;
    pid_t pid = fork();
    if (pid > 0) {
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            continue;
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)mkdir("/run/leasehold", 0700);
    bool alone = pid == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                 mount("proc", "/proc", "proc", 0, nullptr) == 0 &&
                 mount("none", "/run/leasehold", "tmpfs", 0, "mode=0700") == 0 &&
                 (!fs::exists("/run/libvirt") || mount("none", "/run/libvirt", "tmpfs", 0, "mode=0755") == 0);
    if (!alone)
        std::perror("a namespace of its own");
    return alone;
}();

std::string contentOf(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

std::string command() {
    return support::built("tools/leasehold");
}

// A program that has leases, as a guest has.
class Holder {
public:
    Holder(const std::vector<std::string>& options, const std::string& image) {
        int ends[2];
        unit::demand(pipe2(ends, O_CLOEXEC) == 0, "no pipe");
        input_ = os::Fd(ends[1]);
        os::Fd reader(ends[0]);
        pid_ = fork();
        if (pid_ == 0) {
            dup2(reader.get(), STDIN_FILENO);
            std::vector<std::string> words{command(), "run"};
            words.insert(words.end(), options.begin(), options.end());
            words.insert(words.end(), {image, "--", "/bin/cat"});
            std::vector<char*> arguments;
            for (std::string& word : words)
                arguments.push_back(word.data());
            arguments.push_back(nullptr);
            execv(arguments[0], arguments.data());
            _exit(127);
        }
        for (int tries = 0; tries < 6000 && os::commandName(pid_) != "cat"; tries++)
            usleep(10'000);
        unit::demand(os::commandName(pid_) == "cat", "the holder does not start");
    }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;
    ~Holder() {
        input_.reset();
        waitpid(pid_, nullptr, 0);
    }

private:
    os::Fd input_;
    pid_t pid_ = -1;
};

// Where leases are: the words of a configuration that puts them there.
struct Medium {
    const char* name;
    bool lockspace, files;
};

class Command : public testing::TestWithParam<Medium> {
protected:
    static void TearDownTestSuite() { std::printf("%s\n", unit::tellFaults().c_str()); }

    void SetUp() override {
        if (!kAlone)
            GTEST_SKIP() << "needs root, for a PID namespace of its own";
        fs::create_directory(dir.path("lockspace"));
        fs::permissions(dir.path("lockspace"), fs::perms::owner_all);
        fs::create_directory(dir.path("probed"));
        const std::string lockspace = "file_lockspace_dir = \"" + dir.path("lockspace") + "\"\n";
        dir.file("lockspace.conf", lockspace);
        std::ofstream(conf) << (GetParam().lockspace ? lockspace : "")
                            << (GetParam().files ? "storage_locks = [ \"" + dir.path() + "=flock\" ]\n" : "");
    }

    // One verb: what it says without a fault is what counts. `after` sees each end.
    void failEverywhere(
        const std::string& name, const std::vector<std::string>& words,
        const std::function<void(const unit::ProgramEnd&)>& after = [](const unit::ProgramEnd&) {},
        int sampled = kSampled) {
        if (!isFirstMedium())
            sampled /= 8;
        std::vector<std::string> all{command()};
        all.insert(all.end(), words.begin(), words.end());
        std::optional<unit::ProgramEnd> right;
        int faults = unit::failAtEverySystemCallOf(
            {name, GetParam().name}, all, unit::isLongRun() ? 5 : 1, unit::isLongRun() ? 0 : sampled,
            [&](const unit::ProgramEnd& end) {
                SCOPED_TRACE(testing::Message() << name << ", " << end.what << ": status " << end.status << "\nsaid "
                                                << end.said << "\ncomplained " << end.complained);
                EXPECT_FALSE(end.hangs);
                EXPECT_TRUE(WIFEXITED(end.status));
                if (!right)
                    right = end;
                EXPECT_TRUE(tells(end, *right) || isAnswer(end) || end.said == right->said)
                    << "without a fault it says: " << right->said;
                EXPECT_EQ(harms(end, *right), "");
                after(end);
            });
        if (faults < 0)
            GTEST_SKIP() << "tracing is forbidden here";
        EXPECT_GT(faults, 0);
    }

    // Whoever asks nothing about leases is tested there only.
    static bool isFirstMedium() { return !GetParam().lockspace && !GetParam().files; }

    // Whether anybody has the lease of the image.
    bool isLeased() const {
        if (isFirstMedium())
            return !unit::isFree(image, std::int64_t{1} << 62);
        const int status = system(
            ("exec >/dev/null 2>&1 " + command() + " run --config " + conf + " " + image + " -- /bin/true").c_str());
        return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }

    // What is in the directory.
    std::set<std::string> names() const {
        std::set<std::string> found;
        for (const auto& entry : fs::directory_iterator(dir.path("")))
            found.insert(entry.path().filename());
        return found;
    }

    static constexpr int kSampled = 24; // so many calls of each verb

    // What is not there has not failed: "it is gone", or "nothing waits".
    static bool isAnswer(const unit::ProgramEnd& end) {
        return end.error == ENOENT || end.error == ESRCH || end.error == EBADF || end.error == ENOTCONN ||
               (end.error == EAGAIN && end.what.find("recv") != std::string::npos);
    }

    static std::set<std::string> linesOf(const unit::ProgramEnd& end) {
        std::set<std::string> lines;
        std::istringstream text(end.said + "\n" + end.complained);
        for (std::string line; std::getline(text, line);)
            lines.insert(line);
        return lines;
    }

    // The first line that it says and that was not said without a fault, with one of these words in it.
    static std::string newLine(const unit::ProgramEnd& end, const unit::ProgramEnd& right,
                               const std::vector<const char*>& words) {
        const std::set<std::string> known = linesOf(right);
        for (const std::string& line : linesOf(end))
            for (const char* word : words)
                if (known.count(line) == 0 && line.find(word) != std::string::npos)
                    return line;
        return "";
    }

    // What nobody may be told of guests that are well, nor more of one that is not.
    static std::string harms(const unit::ProgramEnd& end, const unit::ProgramEnd& right) {
        return newLine(end, right,
                       {"shut it down", "without leases", "has no leases", "destroy", "damaged", "\"none\"",
                        "was started without", "were dropped"});
    }
    // What could not be had is called so.
    static bool tells(const unit::ProgramEnd& end, const unit::ProgramEnd& right) {
        return end.status != right.status || end.complained != right.complained ||
               !newLine(end, right,
                        {strerror(end.error), "cannot be", "cannot lease", "not seen", "could not", "unclear",
                         "no answer", "unreadable", "may not be", "does not answer", "sees_all 0", ": null", "unknown"})
                    .empty();
    }

    unit::TempDir dir{"/dev/shm"};
    std::string image = dir.file("disk.img", "data"), other = dir.file("other.img", "data");
    std::string conf = dir.file("leasehold.conf", "");
};

// One guest whose lease is well, and one whose lease is lost: both have to be seen.
class CommandThatLooks : public Command {
protected:
    void SetUp() override {
        Command::SetUp();
        if (IsSkipped())
            return;
        lost.emplace(std::vector<std::string>{"--config", dir.path("lockspace.conf")}, other);
        for (const auto& entry : fs::directory_iterator(dir.path("lockspace")))
            fs::remove(entry.path());
        well.emplace(std::vector<std::string>{"--config", conf}, image);
    }

    std::optional<Holder> well, lost;
};

constexpr Medium kOnTheImage{"OnTheImage", false, false};
const auto kEverywhere =
    testing::Values(kOnTheImage, Medium{"InALockspace", true, false}, Medium{"FilesBesideTheImage", false, true},
                    Medium{"FilesInALockspace", true, true});

std::string nameOf(const testing::TestParamInfo<Medium>& info) {
    return info.param.name;
}

TEST_P(CommandThatLooks, MissesNoGuestInSilence) {
    auto guestIsLeased = [&](const unit::ProgramEnd&) { EXPECT_TRUE(isLeased()); };
    failEverywhere("status", {"status"}, guestIsLeased);
    if (isFirstMedium() || unit::isLongRun()) {
        failEverywhere("status --json", {"status", "--json"}, guestIsLeased);
        failEverywhere("status --prometheus", {"status", "--prometheus"}, guestIsLeased);
    }
    failEverywhere("inspect", {"inspect", "--config", conf, image}, guestIsLeased);
    failEverywhere("watch --once", {"watch", "--once", "--dry-run"}, guestIsLeased);
    failEverywhere("check", {"check"}, guestIsLeased);
}

// What is asked last is whether anybody watches, and whether that is needed: at each of these calls, not at one now and
// then.
TEST_P(Command, ChecksTheWatcherOrSaysThatItCannot) {
    const std::vector<std::string> words{command(), "check"};
    unit::ProgramEnd right;
    try {
        right = unit::failOneSystemCallOf(words, 0, 0);
    } catch (const std::system_error&) {
        GTEST_SKIP() << "tracing is forbidden here";
    }
    const std::size_t calls = right.fallible.size(), last = 24;
    ASSERT_GT(calls, last);
    for (std::size_t i = calls - last; i < calls; i++) {
        const unit::ProgramEnd end = unit::failOneSystemCallOf(words, right.fallible[i].first, 0);
        EXPECT_TRUE(tells(end, right) || isAnswer(end) || end.said == right.said)
            << "check, " << end.what << ", said:\n"
            << end.said << "instead of:\n"
            << right.said;
    }
}

class CommandThatLeases : public Command {};

TEST_P(CommandThatLeases, SaysWhatALeaseIsWorthOrNothing) {
    failEverywhere("classify", {"classify", "--config", conf, image});
}

TEST_P(Command, LeavesNothingBehindThatAProbeHasMade) {
    // It waits for what others do each time.
    failEverywhere(
        "probe", {"probe", "--wait", "1", dir.path("probed")}, [](const unit::ProgramEnd&) {}, kSampled / 2);
}

// There is nobody to tell here: what a server is told, and what not, tests/lab sees.
TEST_P(Command, TellsStorageThatAHostIsDeadOrSaysThatItDidNot) {
    // It waits for a sign of life each time.
    failEverywhere(
        "fenced", {"fenced", "dead", "--address", "192.0.2.77", "--i-made-sure-it-is-off"},
        [](const unit::ProgramEnd&) {}, kSampled / 3);
}

TEST_P(CommandThatLeases, RunsAProgramWithALeaseOrNotAtAll) {
    std::string trace = dir.path("ran");
    failEverywhere("run", {"run", "--config", conf, image, "--", "/usr/bin/touch", trace},
                   [&](const unit::ProgramEnd& end) {
                       EXPECT_EQ(fs::remove(trace), end.status == 0) << "it ran without a word, or not";
                       EXPECT_FALSE(isLeased()) << "left locked";
                   });
    Holder holder({"--config", conf}, image);
    failEverywhere("run on what is taken", {"run", "--config", conf, image, "--", "/usr/bin/touch", trace},
                   [&](const unit::ProgramEnd& end) {
                       EXPECT_FALSE(fs::exists(trace)) << "granted what another one has";
                       EXPECT_NE(end.status, 0);
                       EXPECT_TRUE(isLeased());
                   });
}

TEST_P(Command, WritesTheWholeConfigurationOrNoneOfIt) {
    const std::string old = "# before\nuser = \"root\"\n#lock_manager = \"lockd\"\n# after\n",
                      fresh = "# before\nuser = \"root\"\n#lock_manager = \"lockd\"\nlock_manager = \"leasehold\"\n"
                              "# after\n";
    for (const bool enables : {true, false}) {
        const std::string& before = enables ? old : fresh;
        const std::string file = dir.file("qemu.conf", before);
        std::vector<std::string> words{enables ? "enable" : "disable", "--force", "--qemu-conf", file};
        if (enables)
            words.insert(words.end(), {"--config", conf, "--plugin", support::built("plugin/leasehold.so")});
        const std::set<std::string> there = names();
        std::optional<std::string> after;
        failEverywhere(words[0], words, [&](const unit::ProgramEnd& end) {
            const std::string now = contentOf(file);
            if (!after)
                after = now;
            EXPECT_TRUE(now == before || now == *after) << now;
            EXPECT_TRUE(now == *after || end.status != 0) << "it says that it has changed it";
            for (const std::string& name : names())
                if (there.count(name) == 0) {
                    EXPECT_TRUE(name.starts_with("qemu.conf.")) << "left behind; augeas leaves what it could not write";
                    fs::remove(dir.path(name));
                }
            std::ofstream(file) << before;
        });
        ASSERT_TRUE(after);
        EXPECT_NE(*after, before);
    }
}

INSTANTIATE_TEST_SUITE_P(Everywhere, CommandThatLooks, kEverywhere, nameOf);
INSTANTIATE_TEST_SUITE_P(Everywhere, CommandThatLeases, kEverywhere, nameOf);
INSTANTIATE_TEST_SUITE_P(Anywhere, Command, testing::Values(kOnTheImage), nameOf);

} // namespace
} // namespace leasehold

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tests/support/unit_faults.hpp"

#include "core/os/error.hpp"
#include "core/os/fd.hpp"
#include "tests/support/unit_support.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iomanip>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

namespace leasehold::unit {

namespace {

// Of one entry on one medium.
struct Tally {
    int faults = 0, unharmed = 0, deaths = 0;
    std::map<std::pair<std::string, std::string>, int> kinds; // call, error: how often

    void add(const std::string& call, const std::string& error, bool didItAllTheSame) {
        faults++;
        unharmed += didItAllTheSame;
        kinds[{call, error}]++;
    }
    void add(const Tally& other) {
        faults += other.faults;
        unharmed += other.unharmed;
        deaths += other.deaths;
        for (const auto& [kind, times] : other.kinds)
            kinds[kind] += times;
    }

    std::string row(const Entry& entry) const {
        std::set<std::string> calls, errors;
        for (const auto& [kind, times] : kinds) {
            calls.insert(kind.first);
            errors.insert(kind.second);
        }
        std::ostringstream line;
        line << std::left << std::setw(46) << entry.name << std::setw(24) << entry.medium << std::right << std::setw(7)
             << faults << std::setw(7) << calls.size() << std::setw(8) << errors.size() << std::setw(10) << unharmed
             << std::setw(8) << deaths << '\n';
        return line.str();
    }
};

std::vector<std::pair<Entry, Tally>> tallies; // in the order in which they came

Tally& tallyOf(const Entry& entry) {
    for (auto& [known, tally] : tallies)
        if (known.name == entry.name && known.medium == entry.medium)
            return tally;
    return tallies.emplace_back(entry, Tally{}).second;
}

} // namespace

void countDeaths(const Entry& entry, int deaths) {
    tallyOf(entry).deaths += deaths;
}

std::string tellFaults() {
    if (tallies.empty())
        return "";
    std::ostringstream text;
    text << std::left << std::setw(46) << "made to fail" << std::setw(24) << "leases are" << std::right << std::setw(7)
         << "faults" << std::setw(7) << "calls" << std::setw(8) << "errors" << std::setw(10) << "unharmed"
         << std::setw(8) << "killed" << '\n';
    Tally sum;
    for (const auto& [entry, tally] : tallies) {
        text << tally.row(entry);
        sum.add(tally);
        for (const auto& [kind, times] : tally.kinds)
            if (isLongRun())
                text << "    " << entry.name << ", " << entry.medium << ", " << kind.first << ", " << kind.second
                     << ": " << times << '\n';
    }
    text << sum.row({"all", ""});
    tallies.clear();
    return text.str();
}

#if defined(__x86_64__)

namespace {

struct Made {
    long number = 0;
    unsigned long second = 0; // argument
};

// The errors that such a call gives in life, the most telling ones first. None for calls that do not fail, and for
// memory: without that nothing is promised.
std::vector<int> errorsOf(const Made& made) {
    switch (made.number) {
    case SYS_fcntl:
        if (made.second == F_OFD_SETLK)
            return {ENOLCK, EAGAIN, EIO, EINTR};
        if (made.second == F_OFD_GETLK)
            return {EIO, EINTR};
        return made.second == F_DUPFD_CLOEXEC ? std::vector<int>{EMFILE} : std::vector<int>{EINVAL};
    case SYS_flock:
        return {ENOLCK, EAGAIN, EINTR};
    case SYS_openat:
    case SYS_open:
        return {EIO, EMFILE, ENOENT, EACCES, EINTR};
    case __NR_pidfd_open:
        return {EMFILE, ESRCH};
    case __NR_pidfd_getfd:
        return {EMFILE, EPERM, EBADF};
    case SYS_recvmsg:
    case SYS_recvfrom:
        return {ENOMEM, EAGAIN, EINTR};
    case SYS_sendmsg:
        return {ETOOMANYREFS, ENOBUFS, EAGAIN, EINTR};
    case SYS_statx:
    case SYS_newfstatat:
    case SYS_fstat:
    case SYS_stat:
    case SYS_lstat:
        return {EIO, ENOENT, ESTALE, EACCES};
    case SYS_fstatfs:
    case SYS_statfs:
        return {EIO, EINTR};
    case SYS_getdents64:
    case SYS_ftruncate:
    case SYS_ioctl:
        return {EIO};
    case SYS_pwrite64:
    case SYS_write:
        return {ENOSPC, EIO, EINTR};
    case SYS_pread64:
    case SYS_read:
        return {EIO, EINTR};
    case SYS_fsetxattr:
    case SYS_fgetxattr:
    case SYS_lgetxattr:
        return {ENOSPC, EIO};
    case SYS_readlink:
    case SYS_readlinkat:
        return {EACCES, ENOENT};
    case SYS_unlink:
    case SYS_unlinkat:
    case SYS_mkdir:
    case SYS_mkdirat:
        return {EIO, EACCES};
    case SYS_lseek:
        return {EINVAL};
    case SYS_getpeername:
        return {ENOTCONN};
    case SYS_getrandom:
    case SYS_poll:
    case SYS_ppoll:
    case SYS_wait4:
        return {EINTR};
    case SYS_clone:
    case SYS_clone3:
    case SYS_fork:
    case SYS_vfork:
        return {EAGAIN};
    case SYS_pipe2:
    case SYS_socket:
    case SYS_socketpair:
    case SYS_memfd_create:
    case SYS_dup:
    case SYS_dup2:
    case SYS_dup3:
        return {EMFILE};
    case SYS_connect:
        return {ECONNREFUSED, EINTR};
    case SYS_access:
    case SYS_faccessat:
    case __NR_faccessat2:
        return {EACCES, EIO};
    case SYS_rename:
    case SYS_renameat:
    case SYS_renameat2:
    case SYS_link:
    case SYS_symlink:
        return {EIO, ENOSPC};
    case SYS_fsync:
    case SYS_fdatasync:
        return {EIO, ENOSPC};
    case SYS_chmod:
    case SYS_fchmod:
    case SYS_fchown:
    case SYS_setxattr:
        return {EPERM, EIO};
    case SYS_getsockopt:
    case SYS_setsockopt:
    case SYS_prlimit64:
    case SYS_setrlimit:
        return {EPERM};
    default:
        return {};
    }
}

std::string nameOf(const Made& made) {
    static const std::map<long, const char*> names{{SYS_flock, "flock"},
                                                   {SYS_getrandom, "getrandom"},
                                                   {SYS_openat, "openat"},
                                                   {SYS_open, "open"},
                                                   {__NR_pidfd_open, "pidfd_open"},
                                                   {__NR_pidfd_getfd, "pidfd_getfd"},
                                                   {SYS_recvmsg, "recvmsg"},
                                                   {SYS_recvfrom, "recvfrom"},
                                                   {SYS_sendmsg, "sendmsg"},
                                                   {SYS_statx, "statx"},
                                                   {SYS_newfstatat, "newfstatat"},
                                                   {SYS_fstat, "fstat"},
                                                   {SYS_stat, "stat"},
                                                   {SYS_lstat, "lstat"},
                                                   {SYS_fstatfs, "fstatfs"},
                                                   {SYS_getdents64, "getdents64"},
                                                   {SYS_ioctl, "ioctl"},
                                                   {SYS_pwrite64, "pwrite64"},
                                                   {SYS_write, "write"},
                                                   {SYS_pread64, "pread64"},
                                                   {SYS_read, "read"},
                                                   {SYS_fsetxattr, "fsetxattr"},
                                                   {SYS_fgetxattr, "fgetxattr"},
                                                   {SYS_readlink, "readlink"},
                                                   {SYS_unlink, "unlink"},
                                                   {SYS_unlinkat, "unlinkat"},
                                                   {SYS_lseek, "lseek"},
                                                   {SYS_clone, "clone"},
                                                   {SYS_pipe2, "pipe2"},
                                                   {SYS_socket, "socket"},
                                                   {SYS_connect, "connect"},
                                                   {SYS_access, "access"},
                                                   {SYS_rename, "rename"},
                                                   {SYS_fsync, "fsync"},
                                                   {SYS_statfs, "statfs"},
                                                   {SYS_poll, "poll"},
                                                   {SYS_prlimit64, "prlimit64"},
                                                   {SYS_mkdirat, "mkdirat"},
                                                   {SYS_mkdir, "mkdir"},
                                                   {SYS_fchmod, "fchmod"},
                                                   {SYS_fchown, "fchown"},
                                                   {SYS_getsockopt, "getsockopt"},
                                                   {SYS_setsockopt, "setsockopt"}};
    if (made.number == SYS_fcntl)
        return made.second == F_OFD_SETLK   ? "fcntl(F_OFD_SETLK)"
               : made.second == F_OFD_GETLK ? "fcntl(F_OFD_GETLK)"
                                            : "fcntl(" + std::to_string(made.second) + ")";
    auto name = names.find(made.number);
    return name == names.end() ? "system call " + std::to_string(made.number) : name->second;
}

// A call of no consequence, between which and the next such call the work is done.
constexpr long kFence = SYS_getpgrp;

[[noreturn]] void runFenced(const std::function<std::string()>& work, int report) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) < 0)
        _exit(77);
    raise(SIGSTOP);
    std::size_t before = countDescriptors();
    std::string text;
    syscall(kFence);
    try {
        text = work();
    } catch (const Error& error) {
        text = std::string("thrown: ") + error.what();
    } catch (const std::exception& error) {
        text = std::string("CRASH, thrown was no Error: ") + error.what();
    }
    syscall(kFence);
    if (countDescriptors() != before) {
        std::string open;
        for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
            std::error_code ignored;
            open += " " + std::filesystem::read_symlink(entry.path(), ignored).string();
        }
        text = "CRASH, descriptors were leaked, open are" + open + ": " + text;
    }
    (void)!write(report, text.data(), text.size());
    _exit(0);
}

// The call that begins is not made, and gives this.
void answer(pid_t pid, user_regs_struct registers, int with) {
    registers.orig_rax = static_cast<unsigned long>(-1);
    ptrace(PTRACE_SETREGS, pid, nullptr, &registers);
    ptrace(PTRACE_SYSCALL, pid, nullptr, nullptr);
    int status = 0;
    waitpid(pid, &status, __WALL);
    ptrace(PTRACE_GETREGS, pid, nullptr, &registers);
    registers.rax = static_cast<unsigned long>(with);
    ptrace(PTRACE_SETREGS, pid, nullptr, &registers);
}

// The call that begins, number `failing`, is not made; it gives that one of the errors that fit it. The error, or 0:
// there are not so many, and it goes on.
int tryFail(pid_t pid, const Made& here, const user_regs_struct& registers, int failing, int choice) {
    std::vector<int> fitting = errorsOf(here);
    if (choice >= static_cast<int>(fitting.size()))
        return 0;
    // With fewer errors than fit, calls of one kind take turns at them.
    int error = fitting[static_cast<std::size_t>(choice + failing) % fitting.size()];
    answer(pid, registers, -error);
    return error;
}

// Runs the work and counts its calls. Number `failing` (from 1) gives an error that fits it, of those that do the one
// with the number `choice`; says which, where one does.
std::string runTraced(const std::function<std::string()>& work, int failing, int choice, int& count,
                      std::string& failed) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        throw std::runtime_error("pipe failed");
    os::Fd from(ends[0]), to(ends[1]);
    pid_t pid = fork();
    if (pid < 0)
        throw std::runtime_error("fork failed");
    if (pid == 0)
        runFenced(work, to.get());
    to.reset();
    int status = 0;
    waitpid(pid, &status, 0); // the SIGSTOP
    if (WIFEXITED(status))
        throw std::system_error(EPERM, std::generic_category());
    ptrace(PTRACE_SETOPTIONS, pid, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
    bool inside = false, entering = true;
    int signal = 0; // that it gets when it goes on: of a helper's end, or one that it dies of
    count = 0;
    for (;;) {
        ptrace(PTRACE_SYSCALL, pid, nullptr, signal);
        signal = 0;
        if (waitpid(pid, &status, 0) < 0 || !WIFSTOPPED(status))
            break;
        if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
            if (WSTOPSIG(status) != SIGSTOP && WSTOPSIG(status) != SIGCONT)
                signal = WSTOPSIG(status);
            continue;
        }
        if (entering) {
            user_regs_struct registers;
            ptrace(PTRACE_GETREGS, pid, nullptr, &registers);
            Made here{static_cast<long>(registers.orig_rax), registers.rsi};
            if (here.number == kFence) {
                if (inside) {
                    ptrace(PTRACE_DETACH, pid, nullptr, nullptr);
                    break;
                }
                inside = true;
            } else if (inside) {
                if (++count == failing) {
                    if (int error = tryFail(pid, here, registers, failing, choice))
                        failed = nameOf(here) + ": " + std::strerror(error);
                    ptrace(PTRACE_DETACH, pid, nullptr, nullptr);
                    break;
                }
            }
        }
        entering = !entering;
    }
    std::string text;
    char buffer[1024];
    for (ssize_t got; (got = read(from.get(), buffer, sizeof buffer)) > 0;)
        text.append(buffer, static_cast<std::size_t>(got));
    if (!WIFSIGNALED(status))
        waitpid(pid, &status, 0);
    if (WIFSIGNALED(status))
        text = "CRASH, died of signal " + std::to_string(WTERMSIG(status));
    return text;
}

// The tracer of a program and of what it starts: each process is between two calls, or in one.
class ProgramTracer {
public:
    ProgramTracer(const std::vector<std::string>& words, int failing, int choice)
        : failing_(failing), choice_(choice), said_(memfd_create("said", MFD_CLOEXEC)),
          complained_(memfd_create("complained", MFD_CLOEXEC)) {
        first_ = fork();
        if (first_ < 0)
            throw std::runtime_error("fork failed");
        if (first_ == 0)
            become(words);
        int status = 0;
        waitpid(first_, &status, 0); // the SIGSTOP
        if (WIFEXITED(status))
            throw std::system_error(EPERM, std::generic_category());
        ptrace(PTRACE_SETOPTIONS, first_, nullptr,
               PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK |
                   PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC);
        entering_[first_] = true;
        go(first_, 0);
    }

    ProgramEnd run() {
        // waitpid(2) has no limit of its own: the signal ends it.
        struct sigaction action {};
        action.sa_handler = [](int) {};
        sigaction(SIGALRM, &action, nullptr);
        alarm(kPatience);
        ProgramEnd end;
        int status = 0;
        bool ended = false;
        while (!entering_.empty()) {
            pid_t pid = waitpid(-1, &status, __WALL);
            if (pid < 0) {
                end.hangs = errno == EINTR && !ended;
                break;
            }
            if (WIFSTOPPED(status)) {
                entering_.emplace(pid, true);
                handle(pid, status);
                continue;
            }
            entering_.erase(pid);
            if (pid != first_)
                continue;
            end.status = status;
            ended = true;
            alarm(kAfterwards); // what it leaves behind is its helpers', and they end too
        }
        alarm(0);
        for (const auto& [pid, entering] : entering_) {
            end.hangs = true;
            kill(pid, SIGKILL);
            waitpid(pid, &status, __WALL);
        }
        end.what = failed_;
        end.call = call_;
        end.fallible = fallible_;
        end.error = error_;
        end.said = readAgain(said_.get());
        end.complained = readAgain(complained_.get());
        return end;
    }

private:
    static constexpr unsigned kPatience = 120, kAfterwards = 60; // s

    [[noreturn]] void become(const std::vector<std::string>& words) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(open("/dev/null", O_RDONLY | O_CLOEXEC), STDIN_FILENO);
        dup2(said_.get(), STDOUT_FILENO);
        dup2(complained_.get(), STDERR_FILENO);
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) < 0)
            _exit(77);
        raise(SIGSTOP);
        std::vector<char*> arguments;
        for (const std::string& word : words)
            arguments.push_back(const_cast<char*>(word.c_str()));
        arguments.push_back(nullptr);
        execv(arguments[0], arguments.data());
        _exit(127);
    }

    // On to its next stop: the next call, as long as one is to fail.
    void go(pid_t pid, int signal) const { ptrace(done_ ? PTRACE_CONT : PTRACE_SYSCALL, pid, nullptr, signal); }

    void handle(pid_t pid, int status) {
        int signal = WSTOPSIG(status);
        if (signal == (SIGTRAP | 0x80))
            return handleCall(pid);
        if (status >> 16 == PTRACE_EVENT_EXEC && pid == first_) {
            programs_++;
            done_ = done_ || programs_ > 1; // what it has become is not tested
        } else if (status >> 16 == PTRACE_EVENT_EXEC) {
            others_.insert(pid); // nor are programs that it starts
        }
        bool ours = signal == SIGTRAP || signal == SIGSTOP;
        go(pid, ours ? 0 : signal);
    }

    void handleCall(pid_t pid) {
        bool& entering = entering_[pid];
        if (entering && programs_ == 1 && others_.count(pid) == 0) {
            user_regs_struct registers;
            ptrace(PTRACE_GETREGS, pid, nullptr, &registers);
            Made here{static_cast<long>(registers.orig_rax), registers.rsi};
            // Where it sleeps for a second there is nothing that fails.
            if (here.number == SYS_clock_nanosleep &&
                ptrace(PTRACE_PEEKDATA, pid, registers.rdx, nullptr) > 0) { // seconds (clock_nanosleep(2))
                answer(pid, registers, 0);
                return go(pid, 0);
            }
            // The loader's last call: its cache is not needed any more.
            if (!loaded_)
                loaded_ = here.number == SYS_munmap;
            else
                countCall(pid, here, registers);
        }
        entering = !entering;
        go(pid, 0);
    }

    // Who waits for a helper makes more calls or fewer: where none that can fail has the number, the next one does.
    void countCall(pid_t pid, const Made& here, const user_regs_struct& registers) {
        count_++;
        if (errorsOf(here).empty())
            return;
        if (failing_ == 0)
            fallible_.emplace_back(count_, nameOf(here));
        else if (count_ >= failing_)
            fail(pid, here, registers);
    }

    void fail(pid_t pid, const Made& here, const user_regs_struct& registers) {
        done_ = true;
        error_ = tryFail(pid, here, registers, failing_, choice_);
        if (error_ != 0)
            failed_ = "call " + std::to_string(failing_) + ", " + nameOf(here) + ": " + std::strerror(error_);
        call_ = nameOf(here);
    }

    static std::string readAgain(int fd) {
        std::string text;
        char buffer[4096];
        for (ssize_t got; (got = pread(fd, buffer, sizeof buffer, static_cast<off_t>(text.size()))) > 0;)
            text.append(buffer, static_cast<std::size_t>(got));
        return text;
    }

    int failing_, choice_, count_ = 0, error_ = 0;
    std::string failed_, call_;
    std::vector<std::pair<int, std::string>> fallible_;
    os::Fd said_, complained_;
    pid_t first_;
    std::map<pid_t, bool> entering_;
    std::set<pid_t> others_;
    int programs_ = 0;
    bool loaded_ = false, done_ = false;
};

} // namespace

ProgramEnd failOneSystemCallOf(const std::vector<std::string>& words, int failing, int choice) {
    return ProgramTracer(words, failing, choice).run();
}

int failAtEverySystemCallOf(const Entry& entry, const std::vector<std::string>& words, int errors, int limit,
                            const std::function<void(const ProgramEnd&)>& check) {
    int faults = 0;
    ProgramEnd right;
    try {
        right = failOneSystemCallOf(words, 0, 0);
        check(right);
    } catch (const std::system_error&) {
        return -1;
    }
    const std::size_t every =
        limit == 0 ? 1 : std::max<std::size_t>(1, right.fallible.size() / static_cast<std::size_t>(limit));
    for (std::size_t i = 0; i < right.fallible.size(); i += every)
        for (int choice = 0; choice < errors; choice++) {
            ProgramEnd end = failOneSystemCallOf(words, right.fallible[i].first, choice);
            check(end); // also where it made another call this time
            if (end.what.empty())
                break;
            faults++;
            tallyOf(entry).add(end.call, std::strerror(end.error),
                               end.said == right.said && end.status == right.status);
        }
    return faults;
}

int failAtEverySystemCall(const Entry& entry, int errors, int every, const std::function<void()>& scene,
                          const std::function<std::string()>& work,
                          const std::function<void(const InjectedFault&)>& check) {
    int calls = 0, ignored = 0;
    std::string failed;
    scene();
    try {
        std::string plain = runTraced(work, 0, 0, calls, failed);
        if (!plain.empty())
            throw std::runtime_error("the work, when nothing failed, gave: " + plain);
    } catch (const std::system_error&) {
        return -1;
    }
    check({"nothing failed", ""});
    int faults = 0;
    for (int i = 1; i <= calls; i += every)
        for (int choice = 0; choice < errors; choice++) {
            scene();
            failed.clear();
            std::string outcome = runTraced(work, i, choice, ignored, failed);
            if (failed.empty())
                break;
            faults++;
            const auto colon = failed.find(": ");
            tallyOf(entry).add(failed.substr(0, colon), failed.substr(colon + 2), outcome.empty());
            check({"call " + std::to_string(i) + ", " + failed, outcome});
        }
    return faults;
}

#else

int failAtEverySystemCall(const Entry&, int, int, const std::function<void()>&, const std::function<std::string()>&,
                          const std::function<void(const InjectedFault&)>&) {
    return -1;
}

ProgramEnd failOneSystemCallOf(const std::vector<std::string>&, int, int) {
    throw std::system_error(ENOSYS, std::generic_category());
}

int failAtEverySystemCallOf(const Entry&, const std::vector<std::string>&, int, int,
                            const std::function<void(const ProgramEnd&)>&) {
    return -1;
}

#endif

} // namespace leasehold::unit

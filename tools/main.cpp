// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold(8): finds the verb, and is the wall at which everything that was thrown becomes one line on stderr.

#include "core/os/error.hpp"
#include "core/os/text.hpp"
#include "tools/options.hpp"

#include <algorithm>
#include <array>
#include <clocale>
#include <iostream>

namespace leasehold::tools {

namespace {

struct Verb {
    const char* name;
    int (*run)(const Words&);
    const char* summary;
};

constexpr std::array kVerbs{
    Verb{"inspect", inspect, "who uses an image: leases, QEMU's locks, all other locks, and what to do"},
    Verb{"status", status, "the guests of this host and their leases"},
    Verb{"classify", classify, "what a lease on this storage is worth"},
    Verb{"check", check, "whether this host is set up well"},
    Verb{"probe", probe, "whether locks in a directory really cross between hosts"},
    Verb{"run", run, "run a command (qemu-img, ...) with a lease on its images"},
    Verb{"watch", watch, "act when the storage has lost a lease of a running guest"},
    Verb{"fenced", fenced, "tell the storage that a host is dead, once it is off"},
    Verb{"enable", enable, "make leasehold libvirt's lock manager"},
    Verb{"disable", disable, "make libvirt go without it"},
};

void printHelp() {
    std::cout << "Usage: leasehold VERB [OPTION...] ...\n\nThe leases that guests have on their disk images.\n\n";
    for (const Verb& verb : kVerbs)
        std::cout << "  " << verb.name << std::string(10 - std::string(verb.name).size(), ' ') << verb.summary << '\n';
    std::cout
        << "\nleasehold help VERB lists its options; --version (-V) prints the version; leasehold(8) has it all.\n";
}

const Verb& findVerb(const std::string& name) {
    auto verb = std::find_if(kVerbs.begin(), kVerbs.end(), [&](const Verb& each) { return each.name == name; });
    if (verb == kVerbs.end())
        throw UsageError("no verb '" + os::printable(name) + "'; see leasehold --help");
    return *verb;
}

// help, help VERB.
int help(const Words& words) {
    if (words.size() > 1)
        throw UsageError("help takes one verb; see leasehold --help");
    if (!words.empty())
        return findVerb(words[0]).run({"--help"});
    printHelp();
    return kDone;
}

int dispatch(const Words& words) {
    if (words.empty())
        throw UsageError("no verb; see leasehold --help");
    if (words[0] == "--help" || words[0] == "-h" || words[0] == "help")
        return help({words.begin() + 1, words.end()});
    if (words[0] == "--version" || words[0] == "-V") {
        std::cout << "leasehold " LEASEHOLD_VERSION "\n";
        return kDone;
    }
    return findVerb(words[0]).run({words.begin() + 1, words.end()});
}

bool isOfPath(int error) {
    return error == ENOENT || error == ENOTDIR || error == EISDIR || error == ELOOP || error == ENAMETOOLONG;
}

// The wall. What failed has a next step, too. `failure` is the exit status for what is not the user's mistake.
int guarded(const std::function<int()>& work, std::string& problem, int failure) {
    try {
        return work();
    } catch (const UsageError& error) {
        problem = error.what();
        return kUsage;
    } catch (const SystemError& error) {
        problem = error.what();
        if (problem.find("; ") == problem.npos)
            problem += isOfPath(error.error()) && problem.find("/proc/") == problem.npos ? "; correct the path"
                                                                                         : nextStep(error.error());
        return failure;
    } catch (const std::exception& error) {
        problem = error.what();
        return failure;
    }
}

} // namespace

std::optional<std::string> attempt(const std::function<void()>& work) {
    std::string problem;
    int result = guarded([&] { return work(), kDone; }, problem, kFailed);
    return result == kDone ? std::nullopt : std::optional(problem);
}

} // namespace leasehold::tools

int main(int argc, char** argv) {
    using namespace leasehold::tools;
    (void)setlocale(LC_ALL, "");
    Words words(argv + 1, argv + argc);
    // Whoever runs a command must be able to tell our failure from its.
    bool runs = !words.empty() && words[0] == "run";
    std::string problem;
    int result = guarded([&] { return dispatch(words); }, problem, runs ? kRunFailed : kFailed);
    if (!problem.empty())
        std::cerr << "leasehold: " << leasehold::os::printable(problem) << '\n';
    std::cout.flush();
    return std::cout.good() ? result : kFailed;
}

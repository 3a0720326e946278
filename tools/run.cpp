// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// leasehold run [--read-only] [--wait SECONDS] IMAGE... -- COMMAND
//
// Does what the plugin does for a guest: registers a domain of its own, with a random UUID, in this very process, and
// then becomes the command. So the command keeps the vessel as a QEMU does. Nobody is left who could be killed
// while the command goes on, exit status and signals need no passing on, and the lease ends at the instant at
// which the command and all that inherited its descriptors have ended.

#include "core/engine.hpp"
#include "core/os/text.hpp"
#include "tools/options.hpp"
#include "tools/output.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>
#include <memory>
#include <thread>

#include <unistd.h>

namespace leasehold::tools {

namespace {

Guest makeGuest(const std::string& command) {
    std::unique_ptr<char, decltype(&g_free)> uuid(g_uuid_string_random(), g_free);
    return {.name = "leasehold run " + os::printable(command.substr(command.rfind('/') + 1)),
            .uuid = lease::parseUuid(uuid.get()).value(),
            .pid = getpid()};
}

std::string absolute(const std::string& path) {
    std::unique_ptr<char, decltype(&g_free)> name(g_canonicalize_filename(path.c_str(), nullptr), g_free);
    return name.get();
}

// Others than root may lack the rights; what open(2) says names no way out.
void checkRights(const std::string& path, bool readOnly) {
    if (!remedy(path, R_OK, "").empty())
        throw Error(Fault::system, "you may not read '" + path + "': run this as root");
    if (!readOnly && !remedy(path, W_OK, "").empty())
        throw Error(Fault::system, "you may not write to '" + path +
                                       "': run this as root, or with --read-only if the command only reads it");
}

// A command that only reads what a running guest writes would read half of it.
constexpr const char* kInsteadOfReading =
    ". To read the image of a guest that runs, let the guest make a backup (virsh backup-begin), or give it an overlay "
    "(virsh snapshot-create-as GUEST --disk-only --no-metadata) and read what is below that with leasehold run "
    "--read-only";

} // namespace

int run(const Words& arguments) {
    auto separator = std::find(arguments.begin(), arguments.end(), "--");
    bool readOnly = false;
    int wait = 0;
    std::string config = LEASEHOLD_CONF;
    Options options(
        "run", "IMAGE... -- COMMAND [ARGUMENT...]",
        "Runs the command with a lease on the images, as if it were a guest: guests and other runs that want\n"
        "them are refused, and are told who has them. The lease ends with the command, however that ends.");
    options.add("read-only", readOnly, "The command only reads: others may read as well");
    options.add("wait", wait, "How long to wait for images that are in use (0)");
    options.add("config", config, "Another configuration (" LEASEHOLD_CONF ")", "FILE");
    Words paths = options.parse({arguments.begin(), separator});
    Words command(separator == arguments.end() ? separator : separator + 1, arguments.end());
    if (paths.empty() || command.empty())
        throw UsageError("leasehold run IMAGE... -- COMMAND: images and command are needed; see leasehold run --help");

    std::vector<Resource> images;
    for (const std::string& path : paths) {
        checkRights(path, readOnly);
        images.push_back({.path = absolute(path), .mode = readOnly ? lease::Mode::readOnly : lease::Mode::exclusive});
    }
    // An image needs descriptors while its lease is taken. The command gets the limit that was there.
    const rlimit limit = allowManyDescriptors();
    Engine engine(loadSettings(config),
                  [](const std::string& warning) { std::cerr << "leasehold: " << os::printable(warning) << '\n'; });
    Guest guest = makeGuest(command[0]);
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(wait);
    Engine::Answer refusal;
    while ((refusal = engine.registerProgram(guest, images)) && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(200)); // marks that go wake nobody up
    if (refusal) {
        std::cerr << "leasehold: " << os::printable(*refusal) << (readOnly ? kInsteadOfReading : "") << '\n';
        return kRefused;
    }

    std::vector<char*> words;
    for (std::string& word : command)
        words.push_back(word.data());
    words.push_back(nullptr);
    (void)setrlimit(RLIMIT_NOFILE, &limit);
    execvp(words[0], words.data());
    int error = errno;
    std::cerr << "leasehold: " << os::printable(command[0]) << ": " << strerror(error)
              << "; name a command that this machine can execute\n";
    return error == ENOENT ? kNoCommand : kCannotExecute;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/metrics.hpp"

#include "core/os/fd.hpp"
#include "core/os/text.hpp"

#include <cstdio>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

// \, " and newline are escaped in label values; what is no UTF-8 would make the whole text unreadable.
std::string escaped(const Json& value) {
    std::string result;
    for (char c : os::printable(value.is_string() ? value.get<std::string>() : value.dump()))
        result += c == '\\' ? "\\\\" : c == '"' ? "\\\"" : c == '\n' ? "\\n" : std::string(1, c);
    return result;
}

} // namespace

Metrics::Metrics() {
    begin("leasehold_build_info", "The version of leasehold, always 1.");
    add({{"version", LEASEHOLD_VERSION}}, 1);
}

void Metrics::begin(const std::string& name, const std::string& help) {
    name_ = name;
    text_ += "# HELP " + name + " " + help + "\n# TYPE " + name + " gauge\n";
}

void Metrics::add(const Json& labels, double value) {
    std::string list, number = Json(value).dump();
    for (const auto& [name, text] : labels.items())
        list += (list.empty() ? "" : ",") + name + "=\"" + escaped(text) + "\"";
    std::string series = name_ + (list.empty() ? "" : "{" + list + "}");
    if (seen_.insert(series).second)
        text_ += series + " " + number + "\n";
}

void writeTextfile(const std::string& path, const std::string& text) {
    const auto slash = path.rfind('/');
    const std::string name = path.substr(slash + 1), freshName = name + ".new", fresh = path + ".new";
    const std::string above = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    os::Fd directory, file;
    if (int error = os::tryOpen(above, O_RDONLY | O_DIRECTORY, directory))
        throw SystemError(error, "make", fresh);
    // The collector reads what ends in .prom. Whoever else may write to the directory could have put a name of another
    // file there.
    if (unlinkat(directory.get(), freshName.c_str(), 0) < 0 && errno != ENOENT)
        throw SystemError(errno, "remove", fresh);
    if (int error = os::tryOpenAt(directory.get(), freshName, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0644, file))
        throw SystemError(error, "make", fresh);
    ssize_t written = TEMP_FAILURE_RETRY(write(file.get(), text.data(), text.size()));
    if (written != static_cast<ssize_t>(text.size()))
        throw SystemError(written < 0 ? errno : ENOSPC, "write", fresh);
    // Whatever the umask says.
    if (fchmod(file.get(), 0644) < 0)
        throw SystemError(errno, "chmod", fresh);
    if (renameat(directory.get(), freshName.c_str(), directory.get(), name.c_str()) < 0)
        throw SystemError(errno, "rename " + fresh + " to", path);
}

} // namespace leasehold::tools

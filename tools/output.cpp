// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/output.hpp"

#include "core/os/deadline.hpp"
#include "core/os/fd.hpp"
#include "core/storage/mount.hpp"
#include "tools/options.hpp"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string_view>

#include <glib.h>
#include <sys/mman.h>
#include <unistd.h>

namespace leasehold::tools {

namespace {

constexpr std::size_t kMaxAnswers = std::size_t{1} << 30;

bool onTerminal() {
    static const bool terminal = isatty(STDOUT_FILENO);
    return terminal;
}

std::string formatWith(std::int64_t seconds, const char* format) {
    std::unique_ptr<GDateTime, decltype(&g_date_time_unref)> time(
        seconds > 0 ? g_date_time_new_from_unix_utc(seconds) : nullptr, g_date_time_unref);
    if (!time)
        return "";
    std::unique_ptr<char, decltype(&g_free)> text(g_date_time_format(time.get(), format), g_free);
    return text ? text.get() : "";
}

} // namespace

std::string paint(Colour colour, const std::string& text) {
    static const bool colours = [] {
        const char* terminal = getenv("TERM");
        return onTerminal() && !getenv("NO_COLOR") && terminal && std::string_view(terminal) != "dumb";
    }();
    if (!colours || colour == Colour::none || text.empty())
        return text;
    const char* code = colour == Colour::bold     ? "1"
                       : colour == Colour::green  ? "32"
                       : colour == Colour::yellow ? "33"
                                                  : "31";
    return std::string("\033[") + code + "m" + text + "\033[0m";
}

void printTable(const std::vector<std::vector<std::string>>& rows, std::size_t coloured,
                const std::function<Colour(const std::string&)>& colourOf) {
    auto widthOf = [](const std::string& cell) { return static_cast<std::size_t>(g_utf8_strlen(cell.c_str(), -1)); };
    std::vector<std::size_t> widths;
    for (const auto& row : rows)
        for (std::size_t i = 0; i < row.size(); i++) {
            widths.resize(std::max(widths.size(), i + 1));
            widths[i] = std::max(widths[i], widthOf(row[i]));
        }
    bool heading = true;
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); i++) {
            std::cout << paint(heading ? Colour::bold : i == coloured ? colourOf(row[i]) : Colour::none, row[i]);
            if (i + 1 < row.size())
                std::cout << (onTerminal() ? std::string(widths[i] - widthOf(row[i]) + 2, ' ') : "\t");
        }
        std::cout << '\n';
        heading = false;
    }
}

void printJson(const Json& json) {
    Json versioned{{"version", kJsonVersion}};
    versioned.update(json);
    std::cout << versioned.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
}

Json orNull(const std::string& text) {
    return text.empty() ? Json() : Json(text);
}

std::string orEmpty(const Json& text) {
    return text.is_string() ? text.get<std::string>() : "";
}

std::string formatTime(std::int64_t seconds) {
    std::string text = formatWith(seconds, "%Y-%m-%d %H:%M:%S UTC");
    return text.empty() ? "an unknown time" : text;
}

Json timeToJson(std::int64_t seconds) {
    std::string text = formatWith(seconds, "%Y-%m-%dT%H:%M:%SZ");
    return text.empty() ? Json() : Json(text);
}

std::optional<Json> tryAskWithin(int seconds, const std::vector<int>& keep, const std::function<Json()>& work) {
    auto answer = os::runWithDeadline(std::chrono::seconds(seconds), keep,
                                      [&] { return work().dump(-1, ' ', false, Json::error_handler_t::replace); });
    return answer ? std::optional(Json::parse(*answer)) : std::nullopt;
}

namespace {

Json orNoStorage(std::optional<Json> answer, const std::string& path, int seconds) {
    if (answer)
        return std::move(*answer);
    throw Error(Fault::system, "the storage of '" + path + "' did not answer within " + std::to_string(seconds) +
                                   " s (--timeout): see whether its server or cluster is up" +
                                   storage::causeOfSilence(path));
}

} // namespace

Json askStorage(const std::string& path, int seconds, const std::function<Json()>& work) {
    return orNoStorage(tryAskWithin(seconds, {}, work), path, seconds);
}

Json askLibvirt(int seconds, const std::function<Json()>& work) {
    if (auto answer = tryAskWithin(seconds, {}, work))
        return std::move(*answer);
    throw Error(Fault::system, "libvirt did not answer within " + std::to_string(seconds) +
                                   " s (--timeout): see whether libvirtd or virtqemud hangs");
}

void askEachStorage(const std::vector<std::string>& paths, int seconds, const std::function<Json(std::size_t)>& work,
                    const std::function<void(std::size_t, const EachAnswer&)>& take) {
    for (std::size_t next = 0; next < paths.size();) {
        // A line for each answer. What a process has written stays when it is given up.
        os::Fd lines(memfd_create("answers", MFD_CLOEXEC));
        if (!lines.open())
            throw SystemError(errno, "make room for", "the answers");
        auto answerAll = [&] {
            for (std::size_t i = next; i < paths.size(); i++) {
                Json line{{"answer", nullptr}};
                if (auto problem = attempt([&] { line["answer"] = work(i); }))
                    line["problem"] = *problem;
                std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n';
                if (write(lines.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
                    throw SystemError(errno, "keep", "an answer");
            }
            return Json();
        };
        auto failed =
            attempt([&] { (void)orNoStorage(tryAskWithin(seconds, {lines.get()}, answerAll), paths[next], seconds); });
        std::string text = os::readFile("/proc/self/fd/" + std::to_string(lines.get()), kMaxAnswers);
        const std::size_t first = next;
        for (std::size_t begin = 0, end; (end = text.find('\n', begin)) != text.npos; begin = end + 1) {
            Json line = Json::parse(text.substr(begin, end - begin));
            bool problem = line.contains("problem");
            take(next++, {line["answer"], problem ? std::optional(line["problem"].get<std::string>()) : std::nullopt});
        }
        // Who is asked in the middle may have had less time than the limit: he is the first of the next ones.
        if (failed && next == first)
            take(next++, {{}, failed});
    }
}

rlimit allowManyDescriptors() {
    rlimit before{}, limit;
    if (getrlimit(RLIMIT_NOFILE, &before) == 0) {
        limit = before;
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    return before;
}

std::string remedy(const std::string& path, int access, const std::string& usual) {
    bool forbidden = geteuid() != 0 && ::access(path.c_str(), access) < 0 && (errno == EACCES || errno == EPERM);
    return forbidden ? "run this as root" : usual;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#pragma once

// What the verbs have in common when they print, and when they ask storage that may not answer.

#include "core/os/error.hpp"

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <sys/resource.h>

namespace leasehold::tools {

using Json = nlohmann::ordered_json;

// Colours on a terminal that has them and is not told otherwise (NO_COLOR).
enum class Colour { none, bold, green, yellow, red };
std::string paint(Colour colour, const std::string& text);

// Columns: aligned on a terminal, separated by one tab elsewhere. The first row is the heading. One column has colours.
void printTable(const std::vector<std::vector<std::string>>& rows, std::size_t coloured,
                const std::function<Colour(const std::string&)>& colourOf);

// With the version of the format in front (packaging/schema): 1 until a member goes or means something else.
constexpr int kJsonVersion = 1;
void printJson(const Json& json);

// What is not known is null, not an empty text; and back.
Json orNull(const std::string& text);
std::string orEmpty(const Json& text);

// "2026-11-22 01:23:44 UTC"; RFC 3339 for JSON, null if it is not known.
std::string formatTime(std::int64_t seconds);
Json timeToJson(std::int64_t seconds);

// Asks in a process of its own, which ends with the limit: storage may never answer, and that is nothing. Throws where
// the work throws.
constexpr int kStorageTimeout = 10;
std::optional<Json> tryAskWithin(int seconds, const std::vector<int>& keep, const std::function<Json()>& work);
// The same where no answer is a failure too, which names the path, or libvirt.
Json askStorage(const std::string& path, int seconds, const std::function<Json()>& work);
Json askLibvirt(int seconds, const std::function<Json()>& work);

// What is said of each of many things: an answer, or what is wrong.
struct EachAnswer {
    Json answer;
    std::optional<std::string> problem;
};
// The same for many in one process: `work` there, one after the other, and `take` here, in their order. One that does
// not answer within the limit has a problem, and a new process goes on behind it.
void askEachStorage(const std::vector<std::string>& paths, int seconds, const std::function<Json(std::size_t)>& work,
                    const std::function<void(std::size_t, const EachAnswer&)>& take);

// A guest may have more images than a process may have files open. Gives the limit that was there.
rlimit allowManyDescriptors();

// What to do about something that cannot be read or changed: `usual`, or, where the rights are missing, be root.
std::string remedy(const std::string& path, int access, const std::string& usual);

} // namespace leasehold::tools

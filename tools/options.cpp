// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "tools/options.hpp"

namespace leasehold::tools {

Options::Options(const char* verb, const char* operands, const char* summary)
    : verb_(verb), context_(g_option_context_new(operands), g_option_context_free) {
    g_option_context_set_summary(context_.get(), summary);
    g_option_context_set_description(context_.get(), "leasehold(8) describes the output and the exit status.");
}

void Options::add(const char* name, GOptionArg kind, void* place, const char* help, const char* unit) {
    GOptionEntry entries[2] = {{name, 0, 0, kind, place, help, unit}, {}};
    g_option_context_add_main_entries(context_.get(), entries, nullptr);
}

void Options::add(const char* name, bool& value, const char* help) {
    flags_.push_back({value, &value});
    add(name, G_OPTION_ARG_NONE, &flags_.back().parsed, help, nullptr);
}

void Options::add(const char* name, int& value, const char* help, int least, const char* unit) {
    numbers_.push_back({name, &value, least});
    add(name, G_OPTION_ARG_INT, &value, help, unit);
}

void Options::add(const char* name, std::string& value, const char* help, const char* unit) {
    texts_.push_back({nullptr, &value});
    add(name, G_OPTION_ARG_FILENAME, &texts_.back().parsed, help, unit);
}

Words Options::parse(const Words& arguments) {
    g_set_prgname(("leasehold " + verb_).c_str());
    // g_option_context_parse_strv() frees what it takes out.
    char** vector = g_new0(char*, arguments.size() + 2);
    *vector = g_strdup(g_get_prgname());
    for (std::size_t i = 0; i < arguments.size(); i++)
        vector[i + 1] = g_strdup(arguments[i].c_str());
    GError* error = nullptr;
    bool parsed = g_option_context_parse_strv(context_.get(), &vector, &error);
    Words operands;
    for (char** word = vector + (*vector ? 1 : 0); *word; word++)
        if (!(operands.empty() && std::string(*word) == "--"))
            operands.emplace_back(*word);
    g_strfreev(vector);
    for (Flag& flag : flags_)
        *flag.value = flag.parsed;
    for (Text& text : texts_) {
        if (text.parsed)
            *text.value = text.parsed;
        g_free(text.parsed);
    }
    if (!parsed) {
        std::string message = error->message;
        g_error_free(error);
        throw UsageError(message + "; see leasehold " + verb_ + " --help");
    }
    for (const Number& number : numbers_)
        if (*number.value < number.least)
            throw UsageError("--" + std::string(number.name) + " is at least " + std::to_string(number.least) +
                             "; see leasehold " + verb_ + " --help");
    return operands;
}

} // namespace leasehold::tools

// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors
#include "core/os/text.hpp"

#include <glib.h>
#include <unistd.h>

namespace leasehold::os {

// No GLib function here that allocates: GLib before 2.76 has an allocator with locks of its own, and the forked child
// must not wait for one that a thread of libvirtd held.
std::string printable(std::string_view text) {
    std::string clean;
    while (!text.empty()) {
        gunichar c = g_utf8_get_char_validated(text.data(), static_cast<gssize>(text.size()));
        bool valid = c != static_cast<gunichar>(-1) && c != static_cast<gunichar>(-2);
        std::size_t length = valid ? static_cast<std::size_t>(g_utf8_skip[static_cast<unsigned char>(text[0])]) : 1;
        if (valid && g_unichar_isprint(c))
            clean += text.substr(0, length);
        else
            clean += '?';
        text.remove_prefix(length);
    }
    return clean;
}

std::string hostName() {
    char name[256] = "";
    (void)gethostname(name, sizeof name - 1);
    return printable(name);
}

std::string hexadecimal(std::uint32_t number) {
    std::string digits(8, '0');
    for (std::size_t i = digits.size(); number != 0; number >>= 4)
        digits[--i] = "0123456789abcdef"[number & 15];
    return digits;
}

} // namespace leasehold::os

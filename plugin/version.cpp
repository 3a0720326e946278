// SPDX-License-Identifier: LGPL-2.1-or-later
// SPDX-FileCopyrightText: The leasehold authors

// For `leasehold check`, which looks for it in the file: libvirt's interface has no place for a plugin's version.

namespace {
[[gnu::used]] const char kVersion[] = "leasehold-plugin-version=" LEASEHOLD_VERSION ";";
}

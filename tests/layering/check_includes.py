#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""The folder tree is the architecture: every #include "..." of ours is checked against the table below. Tests are checked
for what they use and do not include."""

import pathlib
import re
import sys
import tempfile

# What a unit may include besides itself. A unit is the longest of these paths that a file's path begins with, up to a
# slash or a dot: core/os/fd.hpp belongs to core/os, core/settings.cpp to core/settings.
MAY_INCLUDE = {
    'core/os': [],
    'core/storage': ['core/os'],
    'core/mode': [],
    'core/lease': ['core/os', 'core/storage', 'core/mode'],
    'core/qemu': ['core/os', 'core/mode'],
    'core/settings': ['core/os', 'core/storage/override'],
    'core/place': ['core/os', 'core/storage', 'core/lease', 'core/qemu', 'core/settings'],
    'core/loss': ['core/os', 'core/lease', 'core/qemu', 'core/place'],
    'core/holdings': ['core/os', 'core/lease', 'core/qemu', 'core/place'],
    'core/call': ['core/os', 'core/lease', 'core/qemu', 'core/settings', 'core/place', 'core/loss', 'core/holdings',
                  'core/engine', 'core/explain'],
    'core/engine': ['core/os', 'core/storage', 'core/lease', 'core/qemu', 'core/settings', 'core/place', 'core/call'],
    'core/explain': ['core/os', 'core/storage', 'core/lease', 'core/qemu', 'core/place', 'core/engine'],
    # The names in engine.hpp's signatures are part of it: modes and UUIDs. And what it throws.
    'plugin': ['core/engine', 'core/settings', 'core/os/error', 'core/os/text', 'core/lease/mark'],
    'core/inspect': ['core/os', 'core/storage', 'core/lease', 'core/qemu', 'core/place', 'core/loss', 'core/settings'],
    # The command asks the engine for a lease (run) and core/inspect for facts; probe takes bare locks of its own.
    'tools': ['core/engine', 'core/inspect', 'core/settings', 'core/place', 'core/os',
              'core/storage/classify', 'core/storage/mount', 'core/lease/mark'],
}

# Words of the layers above, which no file of core may know.
FORBIDDEN_HEADERS = {'core': re.compile(r'^(libvirt/|syslog\.h|systemd/)')}

# Tests have a precompiled header, which hides what they forget to include. What tells that they use one of its headers:
PRECOMPILED = 'tests/support/pch/tests.hpp'
USES = {header: re.compile(words, re.MULTILINE) for header, words in {
    'algorithm': r'\bstd::(ranges::)?(all_of|any_of|none_of|count|count_if|copy|equal|fill|find|find_if|for_each'
                 r'|generate|max|max_element|min|min_element|mismatch|remove|remove_if|replace|reverse|rotate|search|shuffle|sort'
                 r'|transform|unique)\(',
    'chrono': r'\bstd::chrono\b',
    'filesystem': r'\bstd::filesystem\b',
    'fstream': r'\bstd::(i|o)?fstream\b',
    'functional': r'\bstd::(function|hash|greater|less|ref|cref)\b',
    'map': r'\bstd::(multi)?map\b',
    'memory': r'\bstd::(unique_ptr|shared_ptr|weak_ptr|make_unique|make_shared)\b',
    'optional': r'\bstd::(optional|nullopt)\b',
    'string': r'\bstd::(string|to_string|getline|stoi|stol|stoul|stoull)\b',
    'thread': r'\bstd::(thread|this_thread)\b',
    'vector': r'\bstd::vector\b',
    'gtest/gtest.h': r'^(TEST|TEST_F|TEST_P)\(|\btesting::|\b(EXPECT|ASSERT)_[A-Z]+\(',
}.items()}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SUFFIXES = {'.h', '.hpp', '.c', '.cpp'}


def belongs(path, unit):
    return path == unit or path.startswith((unit + '/', unit + '.'))


def unit_of(path):
    return max((unit for unit in MAY_INCLUDE if belongs(path, unit)), key=len, default=None)


def complaints_about(root):
    root = pathlib.Path(root)
    complaints = []
    checked = 0
    for folder in sorted({unit.split('/')[0] for unit in MAY_INCLUDE}):
        for file in sorted((root / folder).rglob('*')):
            if file.suffix not in SUFFIXES:
                continue
            checked += 1
            name = file.relative_to(root).as_posix()
            unit = unit_of(name)
            if unit is None:
                complaints.append(f'{name}: belongs to no unit of the table in tests/layering/check_includes.py')
                continue
            for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                bracket, target = match.groups()
                where = f'{name}:{number}: '
                if bracket == '<':
                    forbidden = FORBIDDEN_HEADERS.get(folder)
                    if forbidden and forbidden.match(target):
                        complaints.append(where + f'<{target}> has no place in {folder}/')
                    continue
                if not (root / target).is_file():
                    complaints.append(where + f'"{target}": includes are written from the top of the tree')
                elif not belongs(target, unit) and not any(belongs(target, may) for may in MAY_INCLUDE[unit]):
                    complaints.append(where + f'{unit} must not include {target}')
    if checked == 0:
        complaints.append(f'{root}: nothing to check')
    return complaints


def includes_of(root, name, known):
    """The headers in <> that a file names, itself or by what it includes of ours."""
    if name not in known:
        known[name] = found = set()
        for line in (root / name).read_text(encoding='utf-8').splitlines():
            if match := INCLUDE.match(line):
                bracket, target = match.groups()
                if bracket == '<':
                    found.add(target)
                elif (root / target).is_file():
                    found |= includes_of(root, target, known)
    return known[name]


def hidden_by_precompiled(root):
    """What tests use of their precompiled header and do not include."""
    root = pathlib.Path(root)
    complaints = []
    known = {}
    precompiled = includes_of(root, PRECOMPILED, known)
    complaints += [f'{PRECOMPILED}: tests/layering/check_includes.py does not know how a use of <{header}> looks'
                   for header in sorted(precompiled - USES.keys())]
    sources = sorted(file for folder in ('unit', 'plugin', 'support') for file in (root / 'tests' / folder).glob('*.[ch]pp'))
    for file in sources:
        name = file.relative_to(root).as_posix()
        text = re.sub(r'//.*|R"\((.|\n)*?\)"|"(\\.|[^"\\\n])*"', '', file.read_text(encoding='utf-8'))
        complaints += [f'{name}: uses <{header}> and does not include it' for header, use in USES.items()
                       if use.search(text) and header not in includes_of(root, name, known)]
    if not sources:
        complaints.append(f'{root}: no test to check')
    return complaints


def self_test():
    cases = [  # file, what it includes, is it a violation
        ('core/os/fd.cpp', '"core/os/fd.hpp"', False),
        ('core/lease/mark.cpp', '"core/os/fd.hpp"', False),
        ('core/explain.cpp', '"core/engine.hpp"', False),
        ('plugin/plugin.cpp', '"core/engine.hpp"', False),
        ('plugin/plugin.cpp', '<libvirt/libvirt.h>', False),
        ('tools/run.cpp', '"core/engine.hpp"', False),
        ('tools/run.cpp', '"core/qemu/vessel.hpp"', True),
        ('core/os/fd.cpp', '"core/lease/mark.hpp"', True),
        ('core/storage/classify.cpp', '"core/lease/mark.hpp"', True),
        ('core/lease/mark.cpp', '"core/qemu/vessel.hpp"', True),
        ('core/qemu/vessel.cpp', '"core/lease/mark.hpp"', True),
        ('core/settings.cpp', '"core/engine.hpp"', True),
        ('core/lease/mark.cpp', '"core/engine.hpp"', True),
        ('core/os/fd.cpp', '"plugin/plugin.hpp"', True),
        ('core/engine.cpp', '"plugin/plugin.hpp"', True),
        ('plugin/plugin.cpp', '"core/qemu/vessel.hpp"', True),
        ('plugin/plugin.cpp', '"core/os/fd.hpp"', True),
        ('core/os/fd.cpp', '"fd.hpp"', True),
        ('core/engine.cpp', '<libvirt/libvirt.h>', True),
        ('core/stray.cpp', '<vector>', True),
    ]
    headers = ['core/os/fd.hpp', 'core/lease/mark.hpp', 'core/qemu/vessel.hpp', 'core/engine.hpp', 'plugin/plugin.hpp']
    for file, target, violation in cases:
        with tempfile.TemporaryDirectory() as root:
            for path in headers + [file]:
                path = pathlib.Path(root, path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            pathlib.Path(root, file).write_text(f'#include {target}\n', encoding='utf-8')
            found = complaints_about(root)
            if bool(found) != violation:
                return f'{file} includes {target}: expected a complaint: {violation}, got: {found}'
    with tempfile.TemporaryDirectory() as root:
        if not complaints_about(root):
            return 'an empty tree passes'
    for text, violation in (('', False), ('std::map<int, int> a;', True), ('#include <map>\nstd::map<int, int> a;', False),
                            ('#include "tests/support/a.hpp"\nstd::map<int, int> a;', False), ('// std::map', False),
                            ('"std::map"', False), ('  EXPECT_EQ(1, 1);', True), ('std::multimap<int, int> a;', True)):
        with tempfile.TemporaryDirectory() as root:
            files = {PRECOMPILED: '#include <map>\n#include <gtest/gtest.h>\n',
                     'tests/support/a.hpp': '#include <map>\n', 'tests/unit/a_test.cpp': text}
            for name, content in files.items():
                pathlib.Path(root, name).parent.mkdir(parents=True, exist_ok=True)
                pathlib.Path(root, name).write_text(content, encoding='utf-8')
            found = hidden_by_precompiled(root)
            if bool(found) != violation:
                return f'a test of {text!r}: expected a complaint: {violation}, got: {found}'
            pathlib.Path(root, PRECOMPILED).write_text('#include <list>\n', encoding='utf-8')
            if not any('<list>' in each for each in hidden_by_precompiled(root)):
                return 'a precompiled header may have what nobody looks for'
    return None


def main():
    if sys.argv[1:] == ['--self-test']:
        problem = self_test()
        complaints = [problem] if problem else []
    else:
        root = sys.argv[1] if len(sys.argv) > 1 else '.'
        complaints = complaints_about(root) + hidden_by_precompiled(root)
    print('\n'.join(complaints) or 'ok')
    return 1 if complaints else 0


if __name__ == '__main__':
    sys.exit(main())

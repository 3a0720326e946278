#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""The folder tree is the architecture: every #include "..." of ours is checked against the table below."""

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
    return None


def main():
    if sys.argv[1:] == ['--self-test']:
        problem = self_test()
        complaints = [problem] if problem else []
    else:
        complaints = complaints_about(sys.argv[1] if len(sys.argv) > 1 else '.')
    print('\n'.join(complaints) or 'ok')
    return 1 if complaints else 0


if __name__ == '__main__':
    sys.exit(main())

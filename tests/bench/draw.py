#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-FileCopyrightText: The leasehold authors
"""draw.py RESULT.json DIRECTORY: the curves of one run of the benchmark as SVG, for docs/MEASURED.md. Needs nothing but Python."""
import json
import math
import pathlib
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 150, 40, 48
COLOURS = ["#0b6e4f", "#c44900", "#5b5ea6", "#8a8d91", "#b0308f", "#1f77b4"]


def decades(values):
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)


def chart(title, across, up, curves):
    """curves: a list of (name, [(x, y), ...]); both axes are logarithmic."""
    points = [point for _, curve in curves for point in curve]
    xs = sorted({x for x, _ in points})
    low, high = decades([y for _, y in points])
    high = max(high, low + 1)
    wide = math.log10(xs[-1] / xs[0]) or 1

    def at(x, y):
        return (LEFT + (WIDTH - LEFT - RIGHT) * math.log10(x / xs[0]) / wide,
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log10(y) - low) / (high - low))

    def text(x, y, words, **style):
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{words}</text>'

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           text(LEFT, 22, title, font_size=14, font_weight="bold"),
           text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across, text_anchor="middle"),
           text(8, 36, up)]
    for decade in range(low, high + 1):
        x, y = at(xs[0], 10 ** decade)
        svg.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        svg.append(text(x - 6, y + 4, f"{10.0 ** decade:,.0f}" if decade >= 0 else f"{10.0 ** decade:g}", text_anchor="end"))
    for x in xs:
        svg.append(text(at(x, 10 ** low)[0], HEIGHT - BOTTOM + 16, x, text_anchor="middle"))
    labels = []
    for (name, curve), colour in zip(curves, COLOURS):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curve))
        svg.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        labels.append([at(*curve[-1])[1] + 4, name, colour])
    labels.sort()
    for before, label in zip(labels, labels[1:]):
        label[0] = max(label[0], before[0] + 14)
    svg += [text(WIDTH - RIGHT + 8, y, name, fill=colour) for y, name, colour in labels]
    return "\n".join(svg) + "\n</svg>\n"


def main(result, directory):
    run = json.loads(pathlib.Path(result).read_text())
    directory = pathlib.Path(directory)
    names = {"virtlockd": "virtlockd", "sanlock": "sanlock", "leasehold": "leasehold", "replay": "its calls alone",
             "bare": "open, lock, close"}
    for operation in ("register", "acquire", "release", "resume"):
        rows = [row for row in run["rows"] if row["operation"] == operation]
        curves = [(words, [(row["disks"], row[name]["median"]) for row in rows if name in row])
                  for name, words in names.items() if any(name in row for row in rows)]
        (directory / f"{operation}.svg").write_text(
            chart(f"{operation}: median of {run['repetitions']}", "disks of the guest", "microseconds", curves))
    crowds = [row for row in run["scale"] if row["scene"] in ("reader", "shared")]
    for operation in ("register", "acquire"):
        kinds = sorted({(row["scene"], row["medium"]) for row in crowds if row["operation"] == operation})
        if kinds:
            curves = [(f"{scene}, {medium}", [(row["guests"], row["median"]) for row in crowds
                                             if (row["operation"], row["scene"], row["medium"]) == (operation, scene, medium)])
                      for scene, medium in kinds]
            (directory / f"{operation}-beside-others.svg").write_text(
                chart(f"{operation} of one more guest of an image", "guests that have it already", "microseconds", curves))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Draws the type map of a model as an SVG: `tally inspect MODEL --json | python3 tools/picture/type_map.py > OUT.svg`.

One column a layer, one row a kind of matrix, one colour a type. Norms and the router, F32 in every mix, are left out.
The picture brings its own background, so that it can be read on a light and on a dark page.
"""

import json
import sys
from html import escape

CELL, GAP, LEFT, TOP, PAD = 14, 2, 130, 56, 20
# More bits are darker, so that types can be told apart without colour vision.
FILLS = {
    "Q2_K": "#b3e2cd", "Q3_K": "#8fd3c8", "Q4_K": "#7cb9e8", "Q4_0": "#7cb9e8", "Q4_1": "#6aa9dd", "Q5_K": "#a78bda",
    "Q5_0": "#a78bda", "Q5_1": "#9678cc", "Q6_K": "#e8833a", "Q8_0": "#c2410c", "F16": "#64748b", "BF16": "#64748b",
    "F32": "#475569",
}


def draw(model):
    kinds = {
        kind: {layer: dtype for dtype, layers in types.items() for layer in layers}
        for kind, types in model["type_map"]["layers"].items()
        if set(types) != {"F32"}
    }
    layers = 1 + max(layer for types in kinds.values() for layer in types)
    step = CELL + GAP
    width, height = LEFT + layers * step + PAD, TOP + len(kinds) * step + 52
    title = f"{model['file_type']}, {layers} layers: which type each matrix has in which layer"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label="{escape(title)}">',
        "<style>text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328}"
        ".t{font-size:14px;font-weight:600}.d{fill:#59636e}.b{fill:#fff;stroke:#d1d9e0}"
        "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.d{fill:#9198a1}.b{fill:#0d1117;stroke:#3d444d}}</style>",
        f'<rect class="b" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="t" x="{PAD}" y="27">{escape(title)}</text>',
    ]
    for layer in range(0, layers, 6 if layers > 16 else 1):
        out.append(f'<text class="d" x="{LEFT + layer * step + CELL / 2}" y="{TOP - 6}" text-anchor="middle">{layer}</text>')
    squares = {}
    for row, (kind, types) in enumerate(kinds.items()):
        y = TOP + row * step
        out.append(f'<text x="{PAD}" y="{y + 11}">{escape(kind)}</text>')
        for layer, dtype in sorted(types.items()):
            squares.setdefault(dtype, []).append((LEFT + layer * step, y))
    x, y = LEFT, height - 34
    for dtype in sorted(squares):
        # A wide stroke with round joins rounds the corners, at a tenth of the bytes of as many `rect`s.
        path = "".join(f"M{x + 2} {y + 2}h{CELL - 4}v{CELL - 4}h{4 - CELL}z" for x, y in [*squares[dtype], (x, y)])
        fill = FILLS[dtype]
        out.append(f'<path d="{path}" fill="{fill}" stroke="{fill}" stroke-width="4" stroke-linejoin="round"/>')
        out.append(f'<text x="{x + step + 4}" y="{y + 11}">{escape(dtype)}</text>')
        x += step + 64
    return "\n".join([*out, "</svg>\n"])


sys.stdout.write(draw(json.load(sys.stdin)))

"""Draw docs/algorithm.svg, the way of a picture through the network: python docs/algorithm.py

A scene of 6 x 6 patches, K = 4 chunks; one unit is a patch.
"""

import random
from pathlib import Path

SIDE, CHUNKS, CELL = 6, 4, 15  # patches a side, K, pixels of a patch in the small panels
COLOURS = ("#e4572e", "#2e86ab", "#8d6cab", "#3a9d5d")
SCENE = (
    '<rect width="6" height="6" fill="#bfe3f5"/><circle cx="4.5" cy="1.4" r="0.8" fill="#ffd166"/>'
    '<path d="M0 4 L1.8 1.7 L3 3.2 L3.9 2.4 L6 4.4 V6 H0Z" fill="#6b7a8f"/>'
    '<path d="M0 4.6 Q1.6 3.9 3.2 4.7 T6 4.5 V6 H0Z" fill="#7cb36b"/>'
    '<rect x="1.1" y="3.9" width="1.3" height="1.2" fill="#f4ecd8"/>'
    '<path d="M0.9 3.95 L1.75 3.1 L2.6 3.95Z" fill="#a23b2a"/>'
    '<rect x="1.6" y="4.4" width="0.35" height="0.7" fill="#5b4636"/>'
)


def cells(places: list[int], size: float = 1) -> str:
    return "".join(f'<rect x="{i % SIDE}" y="{i // SIDE}" width="{size}" height="{size}"/>' for i in places)


def panel(x: float, y: float, scale: float, *content: str) -> str:
    """Content in patch units at (x, y), with a thin grid over it."""
    grid = '<use href="#grid"/>'
    return f'<g transform="translate({x} {y}) scale({scale})">{"".join(content)}{grid}</g>'


def text(x: float, y: float, *lines: str, style: str = "note") -> str:
    return "".join(f'<text class="{style}" x="{x}" y="{y + 15 * i}">{line}</text>' for i, line in enumerate(lines))


def arrow(x: float, y: float, width: float) -> str:
    return f'<path d="M{x} {y} h{width}" stroke="#444" stroke-width="1.5" marker-end="url(#tip)"/>'


def draw() -> str:
    rng = random.Random(3)
    order = list(range(SIDE * SIDE))
    rng.shuffle(order)
    size = len(order) // CHUNKS
    chunks = [order[k * size : (k + 1) * size] for k in range(CHUNKS)]
    specks = "".join(
        f'<rect x="{x / 6:.2f}" y="{y / 6:.2f}" width=".17" height=".17" fill="#{rng.choice(["222", "777", "ddd"])}"/>'
        for x in range(6)
        for y in range(6)
    )
    lines = "".join(f"M{i} 0V{SIDE}M0 {i}H{SIDE}" for i in range(SIDE + 1))
    defs = [
        f'<g id="scene">{SCENE}</g>',
        f'<pattern id="noise" width="1" height="1" patternUnits="userSpaceOnUse">{specks}</pattern>',
        f'<path id="grid" d="{lines}" stroke="#fff" stroke-width=".07" fill="none"/>',
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8Z" fill="#444"/></marker>',
    ]
    for k, places in enumerate(chunks):
        defs.append(f'<g id="cells{k}">{cells(places)}</g>')
        defs.append(f'<clipPath id="only{k}">{cells(places)}</clipPath>')

    rows, middle = [70 + 108 * k for k in range(CHUNKS)], 70 + 54 * CHUNKS - 9
    scene, big = '<use href="#scene"/>', 21
    top = middle - 3 * big
    out = [panel(20, top, big, scene)]
    out.append(text(83, top - 30, "picture", style="head"))
    out.append(text(83, top + 6 * big + 20, "+ Draws: order and", "noise of every patch,", "made beforehand"))

    tinted = "".join(f'<use href="#cells{k}" fill="{colour}" opacity=".6"/>' for k, colour in enumerate(COLOURS))
    out += [arrow(150, middle, 28), panel(184, top, big, scene, tinted)]
    out.append(text(247, top - 30, "cut at random", "in K chunks", style="head"))
    out.append(text(247, top + 6 * big + 20, "L patches,", "M = L / K each"))

    for k, (places, colour, y) in enumerate(zip(chunks, COLOURS, rows, strict=True)):
        out.append(f'<path d="M314 {middle} C336 {middle} 326 {y + 45} 348 {y + 45}" stroke="{colour}" fill="none"/>')
        for pass_ in range(2):  # the chunk's patches, clean and noised
            x = 354 + 58 * pass_
            for i, place in enumerate(places):
                spot = f'x="{x + 17 * (i % 3)}" y="{y + 20 + 17 * (i // 3)}" width="15" height="15"'
                out.append(f'<svg {spot} viewBox="{place % SIDE} {place // SIDE} 1 1">{scene}</svg>')
                if pass_:
                    out.append(f'<rect {spot} fill="url(#specks)" opacity=".55"/>')
        out.append(f'<rect x="346" y="{y + 12}" width="124" height="65" rx="6" fill="none" stroke="{colour}"/>')
        out += [f'<path d="M470 {y + 45} h16" stroke="{colour}"/>', arrow(492, y + 45, 16)]
        hidden = f'<use href="#cells{k}" fill="url(#noise)"/>'
        out += [panel(512, y, CELL, scene, hidden), arrow(610, y + 45, 16), arrow(662, y + 45, 16)]
        kept = f'<g clip-path="url(#only{k})">{scene}</g>'
        out.append(panel(684, y, CELL, '<rect width="6" height="6" fill="#e9e9e9"/>', kept))
        out.append(f'<path d="M782 {y + 45} C806 {y + 45} 796 {middle} 818 {middle}" stroke="{colour}" fill="none"/>')
    below = rows[-1] + 90 + 24
    out.append(text(408, 30, "encode every chunk", "alone, clean and noised", style="head"))
    out.append(text(408, below, "no chunk sees another;", "all replicas get all latents"))
    out.append(text(557, 30, "replica i:", "chunk i hidden", style="head"))
    out.append(text(557, below, "in its place: its own", "noised latents"))
    tall = f'y="{rows[0] + 12}" height="{rows[-1] - rows[0] + 65}"'
    out.append(f'<rect x="486" {tall} width="6" fill="#444"/>')  # every replica gets latents of every chunk
    out.append(f'<rect x="628" {tall} width="32" rx="6" fill="#f3f3f3" stroke="#444"/>')
    out.append(
        f'<g transform="translate(649 {middle}) rotate(-90)">{text(0, 0, "decode every replica", style="head")}</g>'
    )
    out.append(text(729, 30, "keep the", "hidden chunk", style="head"))
    out.append(text(729, below, "rebuilt from the others", "and its noised latents"))
    out.append(panel(826, top, big, scene))
    out.append(text(889, top - 30, "assemble", style="head"))
    out.append(text(889, top + 6 * big + 20, "a 3 x 3 convolution", "over the joints"))

    pixels = 'width="15" height="15" patternUnits="userSpaceOnUse"'
    defs.append(f'<pattern id="specks" {pixels}><g transform="scale(15)">{specks}</g></pattern>')
    style = "text{font:13px sans-serif;text-anchor:middle}.head{font-weight:bold;fill:#222}.note{fill:#555}"
    width, height = 972, below + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{style}</style>\n<defs>{''.join(defs)}</defs>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>\n' + "\n".join(out) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())

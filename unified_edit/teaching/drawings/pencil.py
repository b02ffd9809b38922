"""A small vocabulary for line drawings, as SVG that stands in the page itself.

Every word of it returns the text of one SVG element, and `drawn` puts a sheet around them. Sheets
are at most `WIDEST` units wide, and no letter is smaller than `SMALLEST` units, so that all of it
can be read on a phone. Lines and letters have the colour of the text around the drawing; the two
other colours are CSS variables, which a page may set for light and dark. Ids are never used: a
drawing may stand twice on a page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

Point = tuple[float, float]

#: Units: the widest sheet, and the smallest letters on it.
WIDEST, SMALLEST = 520, 13
#: Sizes of text, and of formulas, whose letters are lower; their indices are as small as may be.
TEXT, MATH = 15, 18

#: The palette: the text's own colour, and two of seaborn's "colorblind" for where a fact is and
#: for what an edit (or noise) changes. Tints are the same colours, thinned by `tint`.
INK = "currentColor"
BLUE = "var(--ue-blue, #0173b2)"
ORANGE = "var(--ue-orange, #d55e00)"
PALETTE = (INK, BLUE, ORANGE)

#: Widths of lines.
HAIR, LINE, BOLD = 1.0, 1.5, 2.5

_SERIF = "MJXTEX, 'STIX Two Text', 'Times New Roman', 'Liberation Serif', serif"
_ITALIC = _SERIF.replace("MJXTEX", "MJXTEX-I")
_LETTER = r"[A-Za-zα-ωℓ]"
_SIGNS = re.compile(r"([_^])\{([^}]+)\}|([_^])(.)|\{([^}]+)\}|([^_^{]+)")


@dataclass(frozen=True)
class Drawing:
    """A drawing; notebooks and pages show its HTML.

    name: which one. svg: the whole of it. description: what one who cannot see it must know.
    """

    name: str
    svg: str
    description: str

    def _repr_html_(self) -> str:
        return f'<div class="ue-drawing">\n{self.svg}\n</div>'

    def __repr__(self) -> str:
        return f"Drawing({self.name!r})"


def drawn(name: str, width: int, height: int, parts: Iterable[str], *, description: str) -> Drawing:
    """The sheet with these parts, the first of them at the bottom; `width` and `height` in units.

    On a page it takes the width that there is, up to a tenth more than one pixel for a unit.
    """
    said = " ".join(description.split())
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(said)}" fill="none" stroke-linecap="round" stroke-linejoin="round" '
        f'style="display: block; width: 100%; max-width: {width * 1.1:g}px; height: auto; '
        f'margin: 0 auto; font-synthesis: none">\n' + "\n".join(parts) + "\n</svg>"
    )
    return Drawing(name, svg, said)


def units(*numbers: float) -> str:
    """Coordinates as they are written: a tenth of a unit is finer than any screen."""
    return " ".join(f"{round(number, 1) + 0.0:g}" for number in numbers)


# --- shapes ---------------------------------------------------------------------------------------


def path(
    steps: str,
    *,
    ink: str = INK,
    width: float = LINE,
    fade: float = 1,
    dash: str = "",
    fill: str = "none",
    tint: float = 1,
) -> str:
    """An outline in SVG's own language of steps; all other shapes are made of it.

    ink, width, fade, dash: colour, width, opacity and dashes of the line; width 0 draws none.
    fill, tint: colour inside, and how opaque it is.
    """
    look = f'fill="{fill}"'
    if fill != "none" and tint < 1:
        look += f' fill-opacity="{tint:g}"'
    if width:
        look += f' stroke="{ink}" stroke-width="{width:g}"'
        look += f' stroke-opacity="{fade:g}"' if fade < 1 else ""
        look += f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{steps}" {look}/>'


def line(*points: Point, **look: Any) -> str:
    """Straight from point to point."""
    steps = " L".join(units(*point) for point in points)
    return path(f"M{steps}", **look)


def shape(*points: Point, **look: Any) -> str:
    """The polygon with these corners."""
    steps = " L".join(units(*point) for point in points)
    return path(f"M{steps} Z", **look)


def box(x: float, y: float, across: float, down: float, *, round_by: float = 0, **look: Any) -> str:
    """A rectangle from its upper left corner; `round_by` is the radius of its corners."""
    if not round_by:
        right, low = x + across, y + down
        return shape((x, y), (right, y), (right, low), (x, low), **look)
    r, arc = round_by, f"a{units(round_by, round_by)} 0 0 1"
    h, v = across - 2 * r, down - 2 * r
    steps = (
        f"M{units(x + r, y)} h{units(h)} {arc} {units(r, r)} v{units(v)} {arc} {units(-r, r)} "
        f"h{units(-h)} {arc} {units(-r, -r)} v{units(-v)} {arc} {units(r, -r)} Z"
    )
    return path(steps, **look)


def dot(at: Point, radius: float = 3, **look: Any) -> str:
    """A disc of ink, or with `fill` and `width` whatever circle one likes."""
    half = f"a{units(radius, radius)} 0 1 0"
    x, y = at
    steps = (
        f"M{units(x - radius, y)} {half} {units(2 * radius, 0)} {half} {units(-2 * radius, 0)} Z"
    )
    return path(steps, **{"fill": INK, "width": 0, **look})


def dots(at: Point, *, step: Point = (0, 7), **look: Any) -> str:
    """Three small dots around a point: and so on."""
    (x, y), (across, down) = at, step
    return "\n".join(
        dot((x + place * across, y + place * down), 1.4, **look) for place in (-1, 0, 1)
    )


def head(tip: Point, towards: float, size: float = 8, ink: str = INK) -> str:
    """The head of an arrow that points into a direction, in radians clockwise from the right."""
    sides = [
        (tip[0] - size * math.cos(towards + turn), tip[1] - size * math.sin(towards + turn))
        for turn in (-0.38, 0.38)
    ]
    return shape(tip, *sides, width=0, fill=ink)


def arrow(*points: Point, ink: str = INK, size: float = 8, **look: Any) -> str:
    """From point to point, with a head at the last one."""
    (x0, y0), (x, y) = points[-2:]
    towards = math.atan2(y - y0, x - x0)
    short = (x - 0.8 * size * math.cos(towards), y - 0.8 * size * math.sin(towards))
    return line(*points[:-1], short, ink=ink, **look) + "\n" + head((x, y), towards, size, ink)


def brace(left: Point, right: Point, depth: float = 10, **look: Any) -> str:
    """A brace below what lies between two points of one height; it opens upward."""
    (x0, y), (x1, _) = left, right
    r, middle = depth / 2, (x0 + x1) / 2
    steps = (
        f"M{units(x0, y)} q{units(0, r, r, r)} H{units(middle - r)} q{units(r, 0, r, r)} "
        f"q{units(0, -r, r, -r)} H{units(x1 - r)} q{units(r, 0, r, -r)}"
    )
    return path(steps, **{"width": HAIR, **look})


def cells(x: float, y: float, count: int, side: float, **look: Any) -> str:
    """A vector as a column of square cells, from its upper left corner."""
    style = {"width": HAIR, **look}
    inner = {key: value for key, value in style.items() if key not in ("fill", "tint")}
    walls = " ".join(f"M{units(x, y + place * side)} h{units(side)}" for place in range(1, count))
    return box(x, y, side, side * count, **style) + "\n" + path(walls, **inner, fade=0.45)


# --- text -----------------------------------------------------------------------------------------


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "middle",
    size: float = TEXT,
    bold: bool = False,
) -> str:
    """Text on a line of writing at `y`; what stands between two `$` is a formula.

    In formulas `_` and `^` lower and raise the next sign, or all in the braces behind them; other
    braces hold a word that is not slanted: ``"key $k$"``, ``"$C_0^{-1}$"``, ``"${sin}^2θ$"``.
    anchor: which end of the text is at `x`: start, middle or end.
    """
    spans: list[tuple[str, float, str]] = []  # attributes, height, text
    for place, part in enumerate(text.split("$")):
        if part:
            spans += _formula(part, size) if place % 2 else [("", 0.0, part)]
    inside, at = "", 0.0
    for look, level, words in spans:
        shift = f' dy="{units(level - at)}"' if level != at else ""
        inside += f"<tspan{look}{shift}>{escape(words)}</tspan>"
        at = level
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{units(x)}" y="{units(y)}" text-anchor="{anchor}" font-size="{size:g}"'
        f'{weight} fill="{INK}">{inside}</text>'
    )


def _formula(text: str, size: float) -> list[tuple[str, float, str]]:
    """The spans of a formula: letters slanted, all else upright, indices shifted and small."""
    large = round(size * MATH / TEXT, 1)
    small = max(SMALLEST, round(0.7 * large, 1))
    spans, last = [], ("", "")
    for braced, inside, single, sign, word, plain in _SIGNS.findall(text):
        mark, body = braced or single, inside or sign or word or plain
        level = {"": 0.0, "_": 0.22, "^": -0.4}[mark] * large
        # Below one another, if both indices belong to one sign.
        back = -0.5 * small * len(last[1]) if mark and last[0] and mark != last[0] else 0
        for letters, other in re.findall(rf"({_LETTER}+)|((?:(?!{_LETTER}).)+)", body):
            slanted = letters and not word and not (mark and len(letters) > 1)  # "in" is a word
            family, style = (_ITALIC, "italic") if slanted else (_SERIF, "normal")
            look = f' font-family="{family}" font-style="{style}"'
            look += f' font-size="{small if mark else large:g}"'
            look += f' dx="{units(back)}"' if back else ""
            spans.append((look, level, letters + other))
            back = 0
        last = (mark, body)
    return spans

"""Drawings that order things: four methods in a table, and a residual in shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from unified_edit.errors import UnifiedEditError
from unified_edit.teaching.drawings.pencil import (
    BLUE,
    HAIR,
    INK,
    LINE,
    ORANGE,
    Drawing,
    arrow,
    box,
    dot,
    drawn,
    label,
    line,
)

# --- preserve and memorize ------------------------------------------------------------------------

#: Rows: how preservation is asked for; columns: how memorization is. In the closed forms the row
#: chooses the matrix in the middle, C0⁻¹ or Π, and the column whether λI or μI stands beside it.
CELLS = {
    ("soft", "soft"): ("MEMIT", "R(K^⊤C_0^{−1}K+λI)^{−1}K^⊤C_0^{−1}"),
    ("soft", "hard"): ("EMMET, ROME", "R(K^⊤C_0^{−1}K)^{−1}K^⊤C_0^{−1}"),
    ("hard", "soft"): ("AlphaEdit", "R(K^⊤ΠK+μI)^{−1}K^⊤Π"),
    ("hard", "hard"): ("", "R(K^⊤ΠK)^{−1}K^⊤Π"),
}


def two_by_two() -> Drawing:
    """Preservation and memorization, each asked for softly or as an equation: four closed forms."""
    lefts, tops, wide, high = {"soft": 84, "hard": 306}, {"soft": 72, "hard": 182}, 212, 98
    parts = [
        label(300, 20, "memorize", bold=True),
        label(6, 54, "preserve", anchor="start", bold=True),
    ]
    for kind, sign in (("soft", "≈"), ("hard", "=")):
        parts += [
            label(lefts[kind] + wide / 2, 54, f"{kind}: $ΔK {sign} R$"),
            label(6, tops[kind] + 44, f"{kind}:", anchor="start"),
            label(6, tops[kind] + 67, f"$ΔK_0 {sign} 0$", anchor="start", size=14),
        ]
    said = []
    for (preserve, memorize), (name, formula) in CELLS.items():
        x, y = lefts[memorize], tops[preserve]
        parts += [
            box(x, y, wide, high, round_by=8, width=HAIR, fade=0.5, fill=INK if name else "none",
                tint=0.04),
            label(x + wide / 2, y + 36, name or "both as equations", bold=bool(name)),
            label(x + wide / 2, y + 72, f"${formula}$", size=13),
        ]  # fmt: skip
        spoken = formula.translate({ord(sign): None for sign in "_{}"})
        said.append(f"Preserve {preserve}, memorize {memorize}: {name or 'no name'}, {spoken}.")
    parts.append(label(300, 304, "$Π$ projects onto what no ordinary key uses", size=14))
    return drawn(
        "two_by_two",
        520,
        314,
        parts,
        description=f"""A table of four closed forms for Δ. To preserve softly is to keep ΔK₀ near
        0, hard is ΔK₀ = 0; to memorize softly is to bring ΔK near R, hard is ΔK = R.
        {" ".join(said)} ROME is EMMET for one fact. Soft memorizing adds λI, or μI, to the matrix
        that is inverted; hard preserving has Π, the projection onto what no ordinary key uses, in
        the place of C0^−1.""",
    )


# --- a residual in shares -------------------------------------------------------------------------

#: The bar that stands for the whole residual: its left end, length and height.
LEFT, WHOLE, THICK = 112, 360, 18


def spread(shares: Sequence[Fraction | float] = (Fraction(1, 3), Fraction(1, 2), 1)) -> Drawing:
    """A residual that several layers write, each a share of what is still missing.

    shares: of what is missing, one for each layer, from 0 to 1. Raises UnifiedEditError for none,
    for more than five, or for other numbers.
    """
    if not 1 <= len(shares) <= 5 or not all(0 <= share <= 1 for share in shares):
        raise UnifiedEditError("shares are one to five numbers from 0 to 1")
    pitch, x = 82, 60
    ground = 62 + pitch * len(shares)
    parts = [
        label(LEFT, ground - 10, "missing at first: the residual $R$", anchor="start", size=14),
        *_bar(ground, 0, 0),
        dot((x, ground + THICK), 3.5),
    ]
    written, low, said = 0.0, float(ground + THICK), []
    for number, share in enumerate(shares):
        y = ground - pitch * (number + 1)
        now = float(share) * (1 - written)
        what = "all that is missing" if share == 1 else f"{_fraction(share)} of what is missing"
        parts += [
            line((x, low), (x, y + 15), width=LINE),
            dot((x, y + 9), 6, fill="none", width=HAIR),
            line((x - 3, y + 9), (x + 3, y + 9), width=HAIR),
            line((x, y + 6), (x, y + 12), width=HAIR),
            arrow((LEFT - 8, y + 9), (x + 8, y + 9), ink=ORANGE, size=7),
            label(x - 14, y + 14, f"$ℓ_{number}$", anchor="end"),
            label(LEFT, y - 10, f"adds {what}", anchor="start", size=14),
            *_bar(y, written, now),
        ]
        said.append(f"layer ℓ{number} adds {what}, {now:.2f} of the whole")
        written, low = written + now, y + 3.0
    parts += [
        arrow((x, low), (x, 14)),
        *_key(ground + 50),
    ]
    return drawn(
        "spread",
        500,
        ground + 72,
        parts,
        description=f"""The residual stream of a token goes up through layers, each of which adds to
        it. At first the whole residual R is missing. Before each layer what is missing is measured
        anew: {"; ".join(said)}. At the end {1 - written:.2f} of it is missing.""",
    )


def _fraction(share: Fraction | float) -> str:
    """A share as it is read."""
    return str(share) if isinstance(share, Fraction) else f"{share:.2f}"


def _bar(y: float, written: float, now: float) -> Iterator[str]:
    """The residual as a bar: what was written before, what is written now, what is missing."""
    first, second = WHOLE * written, WHOLE * now
    third = WHOLE - first - second
    if first > 0:
        yield box(LEFT, y, first, THICK, width=HAIR, ink=BLUE, fill=BLUE, tint=0.35)
    if second > 0:
        yield box(LEFT + first, y, second, THICK, width=HAIR, ink=ORANGE, fill=ORANGE)
    if third > 0.1:
        yield box(LEFT + first + second, y, third, THICK, width=HAIR, dash="4 4")


def _key(y: float) -> Iterator[str]:
    """What the parts of a bar mean."""
    looks: tuple[tuple[float, str, dict[str, Any]], ...] = (
        (LEFT, "added now", {"ink": ORANGE, "fill": ORANGE}),
        (LEFT + 122, "added before", {"ink": BLUE, "fill": BLUE, "tint": 0.35}),
        (LEFT + 262, "missing", {"dash": "4 4"}),
    )
    for at, text, look in looks:
        yield box(at, y - 11, 18, 12, width=HAIR, **look)
        yield label(at + 25, y, text, anchor="start", size=14)

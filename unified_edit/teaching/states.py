"""What sliders over pictures and over drawings share: named states, and the control above them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unified_edit.errors import UnifiedEditError


@dataclass(frozen=True)
class Slider:
    """A movable figure; notebooks and pages show its HTML.

    label: what the slider changes. names: of the states, in order. html: the whole of it.
    """

    label: str
    names: tuple[str, ...]
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Slider({self.label!r}, {len(self.names)} states)"


def named(states: Iterable[Any]) -> list[tuple[str, Any]]:
    """Each state with the name that is shown for it: that of a pair (name, state), or its ``str``.

    Raises UnifiedEditError for fewer than two.
    """
    pairs = [
        state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], str)
        else (str(state), state)
        for state in states
    ]
    if len(pairs) < 2:
        raise UnifiedEditError(f"a slider needs at least two states, not {len(pairs)}")
    return pairs


def shown_first(count: int, start: int | None) -> int:
    """`start`, or the middle one; UnifiedEditError if it is none of so many states."""
    first = count // 2 if start is None else start
    if not 0 <= first < count:
        raise UnifiedEditError(f"start is {start}; the states are numbered 0 to {count - 1}")
    return first


def under_control(
    label: str, names: Sequence[str], first: int, move: str, parts: Iterable[str]
) -> Slider:
    """A slider above `parts`, which are HTML; `move` is the script that shows another state."""
    shown = escape(names[first])
    html = (
        '<div class="ue-slider">\n'
        f'<label>{escape(label)} <input type="range" min="0" max="{len(names) - 1}" step="1" '
        f'value="{first}" aria-valuetext="{shown}" oninput="{escape(move)}"></label> '
        f"<output>{shown}</output>\n" + "\n".join(parts) + "\n</div>"
    )
    return Slider(label, tuple(names), html)

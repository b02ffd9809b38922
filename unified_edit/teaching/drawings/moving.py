"""A drawing that a reader moves: all of its states in the page, and a slider that shows one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING, TypeVar

from unified_edit.errors import UnifiedEditError
from unified_edit.teaching.drawings.pencil import Drawing

if TYPE_CHECKING:
    from unified_edit.teaching.sliders import Slider

State = TypeVar("State")

# Shows the state with the slider's number and hides the others; `this` is the slider.
_MOVE = (
    "const box = this.closest('.ue-slider'), states = box.querySelectorAll('.ue-state'); "
    "states.forEach((state, i) => { state.hidden = i != this.value; }); "
    "const name = states[this.value].dataset.state; "
    "box.querySelector('output').textContent = name; "
    "this.setAttribute('aria-valuetext', name);"
)


def drawing_slider(
    draw: Callable[[State], Drawing],
    states: Iterable[State | tuple[str, State]],
    *,
    label: str,
    start: int | None = None,
) -> Slider:
    """Draw every state once and put a slider over the drawings.

    draw: makes the drawing of a state, whose description stands beneath it.
    states: in order; a pair (name, state) is shown by its name, anything else by its ``str``.
    label: what the slider changes, such as "angle".
    start: index of the state that is shown first; the middle one by default.

    Raises UnifiedEditError for fewer than two states, and for an index that is none.
    """
    from unified_edit.teaching.sliders import Slider  # brings what a figure needs; this does not

    names, drawings = [], []
    for given in states:
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
            name, state = given
        else:
            name, state = str(given), given
        names.append(name)
        drawings.append(draw(state))
    if len(names) < 2:
        raise UnifiedEditError(f"a slider needs at least two states, not {len(names)}")
    first = len(names) // 2 if start is None else start
    if not 0 <= first < len(names):
        raise UnifiedEditError(f"start is {start}; the states are numbered 0 to {len(names) - 1}")
    shown = escape(names[first])
    boxes = (
        f'<div class="ue-state" data-state="{escape(name)}"{"" if place == first else " hidden"}>\n'
        f'{drawing._repr_html_()}\n<p class="ue-says" aria-hidden="true">'
        f"{escape(drawing.description)}</p>\n</div>"
        for place, (name, drawing) in enumerate(zip(names, drawings, strict=True))
    )
    html = (
        '<div class="ue-slider">\n'
        f'<label>{escape(label)} <input type="range" min="0" max="{len(names) - 1}" step="1" '
        f'value="{first}" aria-valuetext="{shown}" oninput="{escape(_MOVE)}"></label> '
        f"<output>{shown}</output>\n" + "\n".join(boxes) + "\n</div>"
    )
    return Slider(label, tuple(names), html)

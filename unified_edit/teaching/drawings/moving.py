"""A drawing that a reader moves: all of its states in the page, and a slider that shows one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import TypeVar

from unified_edit.teaching.drawings.pencil import Drawing
from unified_edit.teaching.states import Slider, named, shown_first, under_control

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
    pairs = named(states)
    first = shown_first(len(pairs), start)
    boxes = []
    for place, (name, state) in enumerate(pairs):
        drawing = draw(state)
        hidden = "" if place == first else " hidden"
        boxes.append(
            f'<div class="ue-state" data-state="{escape(name)}"{hidden}>\n'
            f'{drawing._repr_html_()}\n<p class="ue-says" aria-hidden="true">'
            f"{escape(drawing.description)}</p>\n</div>"
        )
    return under_control(label, [name for name, _ in pairs], first, _MOVE, boxes)

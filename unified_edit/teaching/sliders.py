"""A figure that a reader moves: the pictures of all states, and a slider that shows one of them.

Everything is in the HTML itself, without a kernel, a script file or a network, so that it works
in a page opened from disk as it does in JupyterLab. On paper nothing moves: the book's style sheet
leaves sliders out there, and a figure of a few states beside it stands for them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING, TypeVar

from unified_edit.errors import UnifiedEditError
from unified_edit.measuring.figures import plotting
from unified_edit.teaching.states import Slider, named, shown_first, under_control

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = TypeVar("State")

#: Resolution of a picture, and how many colours it keeps: a page holds a dozen of them.
DOTS_PER_INCH, COLOURS = 120, 96

# Shows the picture with the slider's number and hides the others; `this` is the slider.
_MOVE = (
    "const box = this.closest('.ue-slider'); "
    "box.querySelectorAll('img').forEach((picture, i) => { picture.hidden = i != this.value; }); "
    "const shown = box.querySelectorAll('img')[this.value], name = shown.dataset.state; "
    "box.querySelector('output').textContent = name; "
    "box.querySelector('.ue-says').textContent = shown.alt; "
    "this.setAttribute('aria-valuetext', name);"
)


def slider(
    draw: Callable[[State], Figure],
    states: Iterable[State | tuple[str, State]],
    *,
    label: str,
    describe: Callable[[State], str],
    start: int | None = None,
) -> Slider:
    """Draw every state once and put a slider over the pictures.

    draw: makes the Matplotlib figure of a state; it is closed afterwards.
    states: in order; a pair (name, state) is shown by its name, anything else by its ``str``.
    label: what the slider changes, such as "λ".
    describe: what is to be seen in a state's picture. It stands beneath the picture, and is its
        alternative text for readers who cannot see it.
    start: index of the state that is shown first; the middle one by default.

    Raises UnifiedEditError for fewer than two states, an index that is none, or an empty
    alternative text.
    """
    pairs = named(states)
    first = shown_first(len(pairs), start)
    parts, texts = [], []
    for index, (name, state) in enumerate(pairs):
        text = describe(state).strip()
        if not text:
            raise UnifiedEditError(f"the picture of {label} = {name} has no alternative text")
        parts.append(
            f'<img src="data:image/png;base64,{_png(draw(state))}" alt="{escape(text)}" '
            f'data-state="{escape(name)}"{"" if index == first else " hidden"}>'
        )
        texts.append(text)
    parts.append(f'<p class="ue-says" aria-hidden="true">{escape(texts[first])}</p>')
    return under_control(label, [name for name, _ in pairs], first, _MOVE, parts)


def _png(figure: Figure) -> str:
    """The figure as PNG in base64, with few colours; it is closed."""
    plt, _ = plotting()
    from PIL import Image  # Matplotlib needs it, too

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()

"""A figure that a reader moves: the pictures of all states, and a slider that shows one of them.

Everything is in the HTML itself, without a kernel, a script file or a network, so that it works
in a page opened from disk as it does in JupyterLab. On paper nothing moves: the book's style sheet
leaves sliders out there, and a figure of a few states beside it stands for them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from unified_edit.errors import UnifiedEditError
from unified_edit.measuring.figures import plotting

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
    pairs = [_named(state) for state in states]
    if len(pairs) < 2:
        raise UnifiedEditError(f"a slider needs at least two states, not {len(pairs)}")
    first = len(pairs) // 2 if start is None else start
    if not 0 <= first < len(pairs):
        raise UnifiedEditError(f"start is {start}; the states are numbered 0 to {len(pairs) - 1}")
    pictures, texts = [], []
    for index, (name, state) in enumerate(pairs):
        text = describe(state).strip()
        if not text:
            raise UnifiedEditError(f"the picture of {label} = {name} has no alternative text")
        pictures.append(
            f'<img src="data:image/png;base64,{_png(draw(state))}" alt="{escape(text)}" '
            f'data-state="{escape(name)}"{"" if index == first else " hidden"}>'
        )
        texts.append(text)
    shown = escape(pairs[first][0])
    html = (
        '<div class="ue-slider">\n'
        f'<label>{escape(label)} <input type="range" min="0" max="{len(pairs) - 1}" step="1" '
        f'value="{first}" aria-valuetext="{shown}" oninput="{escape(_MOVE)}"></label> '
        f"<output>{shown}</output>\n"
        + "\n".join(pictures)
        + f'\n<p class="ue-says" aria-hidden="true">{escape(texts[first])}</p>\n</div>'
    )
    return Slider(label, tuple(name for name, _ in pairs), html)


def _named(state: Any) -> tuple[str, Any]:
    """The name that is shown for a state, and the state."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], str):
        return state
    return str(state), state


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

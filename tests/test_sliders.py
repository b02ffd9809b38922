"""Sliders: the pictures in the page, what is said of them, and that they move."""

from __future__ import annotations

import base64
import io
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from unified_edit.errors import UnifiedEditError
from unified_edit.teaching.sliders import Slider, slider


@pytest.fixture(autouse=True)
def agg() -> None:
    mpl.use("agg")


def draw(height: float) -> Figure:
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.bar([0], [height])
    ax.set_ylim(0, 3)
    return figure


def describe(height: float) -> str:
    return f'a bar "of height" {height}'


def made(**options: int) -> Slider:
    return slider(
        draw, [("low", 1.0), ("high", 2.0), 3.0], label="λ & co", describe=describe, **options
    )


def test_every_state_has_its_own_picture_and_text() -> None:
    html = made().html
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', html)
    assert [text for _, text in pictures] == [
        f"a bar &quot;of height&quot; {height}" for height in (1.0, 2.0, 3.0)
    ]
    assert len({data for data, _ in pictures}) == 3
    for data, _ in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "PNG"
            assert picture.size == (240, 120)
    assert plt.get_fignums() == []


def test_one_picture_is_shown_at_first() -> None:
    for start, shown in ((None, 1), (0, 0), (2, 2)):
        html = made().html if start is None else made(start=start).html
        hidden = [" hidden>" in tag for tag in re.findall(r"<img [^>]*>", html)]
        assert hidden == [index != shown for index in range(3)]
        assert f'value="{shown}"' in html
        assert f"<output>{('low', 'high', '3.0')[shown]}</output>" in html


def test_it_needs_nothing_from_elsewhere() -> None:
    html = made().html
    assert "<script" not in html
    assert "http" not in html
    assert "λ &amp; co" in html
    assert made()._repr_html_() == html
    assert repr(made()) == "Slider('λ & co', 3 states)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": [1.0]}, "at least two states, not 1"),
        ({"start": 3}, "start is 3; the states are numbered 0 to 1"),
        ({"describe": lambda height: " "}, "the picture of λ = 1.0 has no alternative text"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: dict[str, object], message: str) -> None:
    given = {"states": [1.0, 2.0], "label": "λ", "describe": describe, **arguments}
    with pytest.raises(UnifiedEditError, match=message):
        slider(draw, **given)  # type: ignore[arg-type]

"""The book's line drawings: that they are sound SVG, can be read, and show what is the case."""

from __future__ import annotations

import html
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from book_source import BOOK

from unified_edit.editing import shares
from unified_edit.errors import UnifiedEditError
from unified_edit.teaching.drawings import (
    DRAWINGS,
    Drawing,
    drawing_slider,
    geometry,
    pencil,
    schemes,
    spread,
    story,
    transformer,
    whitened_keys,
)

SVG = "{http://www.w3.org/2000/svg}"
ANGLES = (20, 30, 45, 60, 90, 110, 130)
ALL = [
    *(draw() for draw in DRAWINGS.values()),
    *(whitened_keys(angle) for angle in ANGLES),
    spread(shares(5)),
    spread([1]),
]
NAMES = [f"{place}-{drawing.name}" for place, drawing in enumerate(ALL)]
each = pytest.mark.parametrize("drawing", ALL, ids=NAMES)


def tree(drawing: Drawing) -> ElementTree.Element:
    return ElementTree.fromstring(drawing.svg)


def sheet(drawing: Drawing) -> tuple[float, float]:
    left, top, width, height = map(float, tree(drawing).attrib["viewBox"].split())
    assert (left, top) == (0, 0)
    return width, height


# --- sound SVG ------------------------------------------------------------------------------------


@each
def test_a_drawing_is_one_sheet_of_svg(drawing: Drawing) -> None:
    root = tree(drawing)
    assert root.tag == f"{SVG}svg"
    assert root.attrib["role"] == "img"
    assert drawing.svg.count("viewBox") == 1
    assert sheet(drawing)[0] <= pencil.WIDEST
    assert drawing._repr_html_() == f'<div class="ue-drawing">\n{drawing.svg}\n</div>'
    assert repr(drawing) == f"Drawing('{drawing.name}')"


@each
def test_it_is_described_in_words(drawing: Drawing) -> None:
    assert len(drawing.description) > 100
    assert drawing.description[-1] == "."
    assert not re.search(r"[<>&$_\n]|  ", drawing.description.replace("W_in", "W"))
    assert tree(drawing).attrib["aria-label"] == drawing.description


def test_drawings_do_not_get_into_each_others_way() -> None:
    """Nothing in them has an id, so any of them may stand twice on a page."""
    ids = [
        node.attrib["id"] for drawing in ALL for node in tree(drawing).iter() if "id" in node.attrib
    ]
    assert ids == []
    assert not any(re.search(r"url\(|href|<style|<script", drawing.svg) for drawing in ALL)


def test_names_are_the_drawings_own() -> None:
    assert [draw().name.partition("-")[0] for draw in DRAWINGS.values()] == list(DRAWINGS)


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_is_drawn_the_same_every_time(name: str) -> None:
    assert DRAWINGS[name]() == DRAWINGS[name]()
    numbers = re.findall(r"\d+\.\d+", " ".join(re.findall(r' d="([^"]+)"', DRAWINGS[name]().svg)))
    assert [number for number in numbers if len(number.partition(".")[2]) > 1] == []


# --- can be read ----------------------------------------------------------------------------------

EM = 0.6  # width of a letter, in heights of the font: that of a wide font


def texts(drawing: Drawing) -> Iterator[tuple[str, tuple[float, float], float, float]]:
    """What is written, from where to where, on which line, and the smallest size in it."""
    for text in tree(drawing).iter(f"{SVG}text"):
        own = float(text.attrib["font-size"])
        sizes = [float(span.attrib.get("font-size", own)) for span in text]
        moved = sum(float(span.attrib.get("dx", 0)) for span in text)
        parts = [span.text or "" for span in text]
        width = moved + sum(EM * size * len(part) for size, part in zip(sizes, parts, strict=True))
        x = float(text.attrib["x"])
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]]
        yield "".join(parts), (left, left + width), float(text.attrib["y"]), min(own, *sizes)


@each
def test_texts_are_on_the_sheet_and_large_enough(drawing: Drawing) -> None:
    width, height = sheet(drawing)
    found = list(texts(drawing))
    assert found
    for what, (left, right), y, size in found:
        assert 0 <= left <= right <= width, what
        assert 0.8 * size <= y <= height - 0.3 * size, what
        assert size >= pencil.SMALLEST, what


@each
def test_texts_leave_each_other_room(drawing: Drawing) -> None:
    found = list(texts(drawing))
    for place, (one, (left, right), y, size) in enumerate(found):
        for other, (start, stop), line, _ in found[:place]:
            beside = right <= start or stop <= left
            assert beside or abs(line - y) >= size, (one, other)


@each
def test_lines_are_on_the_sheet(drawing: Drawing) -> None:
    width, height = sheet(drawing)
    for path in tree(drawing).iter(f"{SVG}path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


@each
def test_colours_are_those_of_the_palette(drawing: Drawing) -> None:
    used = {
        value
        for node in tree(drawing).iter()
        for name, value in node.attrib.items()
        if name in ("fill", "stroke", "color", "style") and "max-width" not in value
    }
    assert used <= {*pencil.PALETTE, "none"}
    assert {text.attrib["fill"] for text in tree(drawing).iter(f"{SVG}text")} == {pencil.INK}


def contrast(one: str, other: str) -> float:
    """That of two colours, after WCAG."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_lines_stand_out_in_light_and_dark() -> None:
    css = (BOOK / "_static" / "drawings.css").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"var\((--ue-\w+), (#\w+)\)", " ".join(pencil.PALETTE)))
    assert len(defaults) == len(pencil.PALETTE) - 1
    for selector, ground in (("html", "#ffffff"), (r'html\[data-theme="dark"\]', "#121212")):
        (block,) = re.findall(rf"^{selector} \{{([^}}]+)\}}", css, re.MULTILINE)
        given = dict(re.findall(r"(--ue-\w+): (#\w+);", block))
        assert given.keys() == defaults.keys()
        for colours in (given, defaults):  # outside the book there is no style sheet
            assert min(contrast(colour, ground) for colour in colours.values()) >= 3


# --- what they show -------------------------------------------------------------------------------


def rows_of(name: str) -> Iterator[list[str]]:
    """Every row of the tables that a chapter prints."""
    notebook = json.loads((BOOK / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            source = "".join(output.get("data", {}).get("text/html", []))
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", source, re.S):
                texts = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
                yield [html.unescape(text) for text in texts]


def test_the_story_tells_what_the_first_chapter_prints() -> None:
    told = {name: given.default for name, given in inspect.signature(story).parameters.items()}
    rows = list(rows_of("first_edit"))
    tower, other = (
        f"{subject} is located in the city of"
        for subject in ("The Eiffel Tower", told["neighbour"])
    )
    for word, probability in (told["before"], told["after"]):
        assert ["0", "1", word, f"{probability:.2f}"] in rows, "no answer to the edited prompt"
    (before, old), (after, new) = told["stays"]
    assert [other, before, f"{old:.2f}", after, f"{new:.2f}"] in rows
    for word, probability in (told["before"], told["after"], *told["stays"]):
        assert f"{word} with" in story().description
        assert f"{probability:.2f}" in story().description
    assert tower in story().description and other in story().description


@pytest.mark.equation("emmet-crowding")
@pytest.mark.parametrize("angle", ANGLES)
def test_dual_vectors_tell_the_keys_apart(angle: float) -> None:
    keys = geometry.at_angle(90 + angle / 2), geometry.at_angle(90 - angle / 2)
    A, N = np.array(keys).T, np.array(geometry.duals(*keys)).T
    assert np.allclose(A.T @ N, np.eye(2))
    assert math.isclose(A[:, 0] @ A[:, 1], math.cos(math.radians(angle)), abs_tol=1e-12)
    crowding = 1 / math.sin(math.radians(angle)) ** 2
    assert np.allclose((N**2).sum(axis=0), crowding)
    assert np.allclose(np.diag(np.linalg.inv(A.T @ A)), crowding)
    said = whitened_keys(angle).description
    assert f"{math.sqrt(crowding):.2f}" in said and f"{crowding:.2f}" in said


@pytest.mark.parametrize("angle", [0, 19, 131, 180])
def test_an_angle_that_has_no_room_is_refused(angle: float) -> None:
    with pytest.raises(UnifiedEditError, match=f"an angle of {angle}° has no room"):
        whitened_keys(angle)


def test_the_update_that_is_drawn_is_the_rank_one_update() -> None:
    drawn_moment = geometry.second_moment(geometry.ordinary_keys())
    others: np.ndarray = np.array(geometry.ordinary_keys())
    C0 = others.T @ others / len(others)
    assert np.allclose(drawn_moment, C0)
    k, r = np.array(geometry.KEY), np.array(geometry.RESIDUAL)
    delta: np.ndarray = np.array(
        geometry.rank_one_update(drawn_moment, geometry.KEY, geometry.RESIDUAL)
    )
    row = np.linalg.solve(C0, k)
    assert np.allclose(delta, np.outer(r, row) / (k @ row))
    assert np.allclose(delta @ k, r)
    moved = np.linalg.norm(others @ delta.T, axis=1).max() / np.linalg.norm(r)
    assert moved < 0.2  # "nearly unmoved"
    assert f"at most {moved:.0%}" in DRAWINGS["key_to_value"]().description


def value_of(formula: str, **given: np.ndarray) -> np.ndarray:
    """A closed form as it is drawn, computed."""
    code, last = "", "("
    words = {"C_0^{−1}": "inv(C0)", "K^⊤": "K.T", "(": "inv(", ")^{−1}": ")"}
    words |= {"λI": "lam*I", "μI": "lam*I"}
    tokens = re.findall(r"C_0\^\{−1\}|K\^⊤|[λμ]I|\)\^\{−1\}|[RKΠ(+]", formula)
    assert "".join(tokens) == formula
    for token in tokens:
        operands = last not in ("(", "+") and token not in (")^{−1}", "+")
        code += (" @ " if operands else "") + words.get(token, token)
        last = token
    return np.array(eval(code, {"inv": np.linalg.inv, **given}))


def test_the_four_closed_forms_solve_their_problems() -> None:
    generator = np.random.default_rng(0)
    K, R = generator.normal(size=(6, 2)), generator.normal(size=(3, 2))
    K0 = generator.normal(size=(6, 3)) @ generator.normal(size=(3, 40))  # leaves three directions
    full = generator.normal(size=(6, 40))
    C0, lam = full @ full.T / 40, 0.7
    U, s, _ = np.linalg.svd(K0)
    unused = U[:, s.round(9).nonzero()[0].size :]
    given = {"C0": C0, "K": K, "R": R, "Π": unused @ unused.T, "lam": np.array(lam), "I": np.eye(2)}
    deltas = {kind: value_of(formula, **given) for kind, (_, formula) in schemes.CELLS.items()}
    memit = R @ K.T @ np.linalg.inv(lam * C0 + K @ K.T)
    assert np.allclose(deltas["soft", "soft"], memit)
    for preserve in ("soft", "hard"):
        assert np.allclose(deltas[preserve, "hard"] @ K, R)
        assert not np.allclose(deltas[preserve, "soft"] @ K, R)
    for memorize in ("soft", "hard"):
        assert np.allclose(deltas["hard", memorize] @ K0, 0)
    # Least: another update that writes the same changes more.
    left = np.linalg.svd(np.hstack([K, K0]))[0][:, 5:]
    for kind, moment in ((("soft", "hard"), C0), (("hard", "hard"), np.eye(6))):
        apart = np.linalg.svd(K)[0][:, 2:] if kind[0] == "soft" else left
        other = generator.normal(size=(3, apart.shape[1])) @ apart.T
        assert abs(np.trace(deltas[kind] @ moment @ other.T)) < 1e-9
    # The gradient of |Delta K - R|² + lam |Delta|² is zero among updates that spare K0.
    alpha = deltas["hard", "soft"]
    assert np.allclose(((alpha @ K - R) @ K.T + lam * alpha) @ unused, 0)


def test_the_shares_are_those_of_memit() -> None:
    default = inspect.signature(spread).parameters["shares"].default
    assert [float(share) for share in default] == pytest.approx(shares(3))
    assert "1/3 of what is missing, 0.33 of the whole" in spread().description
    assert spread().description.endswith("At the end 0.00 of it is missing.")


@pytest.mark.parametrize("wrong", [[], [0.2] * 6, [Fraction(3, 2)], [-0.1, 1]])
def test_shares_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(UnifiedEditError, match="one to five numbers from 0 to 1"):
        spread(wrong)


# --- text -----------------------------------------------------------------------------------------


def test_formulas_are_set_as_in_the_text() -> None:
    written = pencil.label(0, 0, "a < b: $W_0k$, $C_0^{−1}$ and $W_{in}$, ${sin}θ$")
    spans = ElementTree.fromstring(written)
    looks = {
        (span.text or "").strip(): span.attrib.get("font-style") for span in spans if span.text
    }
    assert looks["a < b:"] is None
    assert (looks["W"], looks["k"], looks["θ"]) == ("italic",) * 3
    assert (looks["0"], looks["in"], looks["sin"], looks["−1"]) == ("normal",) * 4
    assert sum(float(span.attrib.get("dy", 0)) for span in spans) == pytest.approx(0, abs=0.11)
    (above,) = (span for span in spans if span.text == "−1")
    assert float(above.attrib["dx"]) < 0  # above the 0, not behind it


# --- moving ---------------------------------------------------------------------------------------


def moving(**options: int) -> str:
    states: list[float | tuple[str, float]] = [("narrow", 20.0), ("wide", 60.0), 90.0]
    slider = drawing_slider(whitened_keys, states, label="angle & co", **options)
    assert repr(slider) == "Slider('angle & co', 3 states)"
    return slider.html


def test_a_slider_shows_one_drawing_and_says_what_it_shows() -> None:
    for options, shown in (({}, 1), ({"start": 0}, 0)):
        page = moving(**options)
        boxes = re.findall(r'<div class="ue-state" data-state="([^"]+)"( hidden)?>', page)
        assert [name for name, _ in boxes] == ["narrow", "wide", "90.0"]
        assert [bool(hidden) for _, hidden in boxes] == [place != shown for place in range(3)]
        assert f'value="{shown}"' in page
        assert f"<output>{boxes[shown][0]}</output>" in page
    assert "angle &amp; co" in page
    assert page.count('<div class="ue-drawing">') == page.count('class="ue-says"') == 3
    assert not re.search(r"<script|src=|href=", page)


@pytest.mark.parametrize(
    ("states", "start", "message"),
    [([90], None, "at least two states, not 1"), ([60, 90], 2, "start is 2; the states are")],
)
def test_states_that_cannot_be_shown_are_refused(
    states: list[float], start: int | None, message: str
) -> None:
    with pytest.raises(UnifiedEditError, match=message):
        drawing_slider(whitened_keys, states, label="angle", start=start)


# --- in pages -------------------------------------------------------------------------------------


def rendered(folder: Path, text: str) -> tuple[int, str]:
    """Exit code of a strict build, and the page, or what Sphinx has to say."""
    (folder / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(BOOK / '_ext')!r})\n"
        "extensions = ['myst_parser', 'drawing']\nhtml_theme = 'basic'\nnumfig = True\n",
        encoding="utf-8",
    )
    (folder / "index.md").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "-q",
        str(folder),
        str(folder / "out"),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    page = folder / "out" / "index.html"
    return run.returncode, run.stderr if run.returncode else page.read_text(encoding="utf-8")


def test_a_page_shows_a_drawing_as_a_figure(tmp_path: Path) -> None:
    code, page = rendered(
        tmp_path,
        "# Page\n\n{numref}`fig-net`, [](fig-net).\n\n"
        "```{drawing} transformer\n:name: fig-net\nIts *streams*.\n\nMore of it.\n```\n",
    )
    assert code == 0, page
    (figure,) = re.findall(r'<figure [^>]*id="fig-net">.*?</figure>', page, re.S)
    assert transformer()._repr_html_() in figure
    assert 'Fig. 1 </span><span class="caption-text">Its <em>streams</em>.</span>' in figure
    assert "More of it." in figure.partition("legend")[2]
    assert page.count('href="#fig-net"') >= 2
    assert '<span class="std std-numref">Fig. 1</span>' in page


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            "```{drawing} nothing\nA caption.\n```",
            "there is no drawing 'nothing'; there are story,",
        ),
        ("```{drawing} story\n```", "the drawing 'story' has no caption"),
    ],
)
def test_a_page_that_shows_none_is_not_built(tmp_path: Path, block: str, message: str) -> None:
    code, said = rendered(tmp_path, f"# Page\n\n{block}\n")
    assert code != 0
    assert message in said

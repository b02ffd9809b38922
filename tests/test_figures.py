"""Figures show the numbers they are given, in the axes they are given, and change no setting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from unified_edit.errors import FactError, UnifiedEditError
from unified_edit.facts.facts import Fact
from unified_edit.measuring.figures import (
    effect_maps,
    loss_curves,
    probability_bars,
    score_bars,
    style,
)
from unified_edit.measuring.report import Report
from unified_edit.measuring.scores import Score

COMPARED = pd.DataFrame(
    {
        "prompt": ["The Eiffel Tower is in the city of"] * 2,
        "target": ["Rome", "Paris"],
        "tokens": [1, 1],
        "before": [0.02, 0.9],
        "after": [0.95, 0.01],
    }
)


@pytest.fixture(autouse=True)
def settings_untouched() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


def report(after: dict[str, Score] | None, before: dict[str, Score]) -> Report:
    made = Report(pd.DataFrame())
    made.__dict__.update(before=before, after=after)
    return made


def scores(**values: tuple[float, float, float]) -> dict[str, Score]:
    return {name: Score(*value, n=10) for name, value in values.items()}


REPORTS = {
    "ROME": report(
        scores(ES=(0.9, 0.8, 1.0), PS=(0.7, 0.5, 0.8)), scores(ES=(0.1, 0, 0.2), PS=(0.2, 0.1, 0.3))
    ),
    "EMMET": report(scores(ES=(1.0, 1.0, 1.0), NS=(0.6, 0.4, 0.7)), scores(ES=(0.1, 0, 0.2))),
}


def test_probability_bars_have_the_lengths_of_the_table() -> None:
    ax = probability_bars(COMPARED)
    ax.figure.canvas.draw()
    before, after = ax.containers
    assert [bar.get_width() for bar in before] == [0.02, 0.9]
    assert [bar.get_width() for bar in after] == [0.95, 0.01]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Rome", "Paris"]
    assert "Eiffel Tower" in ax.get_title()
    # told apart without colour
    assert before[0].get_hatch() != after[0].get_hatch()
    # the first row is on top
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 1))[1]
    # the bars of one row do not cover each other, and stand in the order of the legend
    assert before[0].get_y() + before[0].get_height() <= after[0].get_y() + 1e-12


def test_probability_bars_of_several_prompts_name_them() -> None:
    other = COMPARED.assign(prompt="The Louvre is in")
    ax = probability_bars(pd.concat([COMPARED, other]))
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert labels[3] == "The Louvre is in → Paris"
    assert ax.get_title() == ""
    with pytest.raises(FactError, match="no rows"):
        probability_bars(COMPARED.iloc[:0])


def test_score_bars_have_heights_and_whiskers_of_the_reports() -> None:
    ax = score_bars(REPORTS)
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ES", "PS", "NS"]
    bars = {c.get_label(): c for c in ax.containers if c.get_label() in {"before", *REPORTS}}
    assert list(bars) == ["before", "ROME", "EMMET"]
    assert [bar.get_height() for bar in bars["ROME"]] == [0.9, 0.7]
    assert [bar.get_height() for bar in bars["before"]] == [0.1, 0.2]
    # each bar at its score: the second of EMMET is NS, the third place
    centre = bars["EMMET"][1].get_x() + bars["EMMET"][1].get_width() / 2
    assert 1.6 < centre < 2.4
    whiskers = bars["ROME"].errorbar.lines[2][0].get_segments()
    assert [(s[0][1], s[1][1]) for s in whiskers] == [
        (pytest.approx(0.8), pytest.approx(1.0)),
        (pytest.approx(0.5), pytest.approx(0.8)),
    ]
    assert len({c[0].get_hatch() for c in bars.values()}) == 3
    assert len({to_rgb(c[0].get_facecolor()) for c in bars.values()}) == 3
    lefts = sorted(b.get_x() for c in bars.values() for b in c if b.get_x() < 0.5)
    assert all(b - a >= 0.8 / 3 - 1e-12 for a, b in pairwise(lefts))


def test_score_bars_choices() -> None:
    ax = score_bars(REPORTS, before=False, scores=("PS", "unknown"))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["PS"]
    base = score_bars({"base": report(None, scores(ES=(0.1, 0, 0.2)))})
    assert [t.get_text() for t in base.get_legend().get_texts()] == ["base"]
    negative = score_bars({"a": report(None, scores(EM=(-0.3, -0.4, -0.2)))}, scores=("EM",))
    assert negative.get_ylim()[0] < -0.3
    for nothing in ({}, {"a": report(None, {})}):
        with pytest.raises(FactError, match="nothing to draw"):
            score_bars(nothing)


def an_edit(facts: int) -> SimpleNamespace:
    return SimpleNamespace(
        facts=[Fact("{} is in", f"Place {i}", "Rome") for i in range(facts)],
        outcomes=[SimpleNamespace(losses=(3.0, 1.0 / (i + 1), 0.01)) for i in range(facts)],
        method=SimpleNamespace(stop_loss=0.05),
    )


def test_loss_curves() -> None:
    ax = loss_curves(an_edit(3))
    ax.figure.canvas.draw()
    *curves, stop = ax.lines
    assert [list(line.get_ydata()) for line in curves] == [
        [3.0, 1.0, 0.01],
        [3.0, 0.5, 0.01],
        [3.0, 1 / 3, 0.01],
    ]
    assert list(curves[0].get_xdata()) == [0, 1, 2]
    assert len({line.get_linestyle() for line in curves}) == 3
    assert set(stop.get_ydata()) == {0.05}
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["Place 0 → Rome", "Place 1 → Rome", "Place 2 → Rome", "stop at 0.05"]
    many = loss_curves(an_edit(30))
    assert len(many.lines) == 31
    assert [text.get_text() for text in many.get_legend().get_texts()] == ["stop at 0.05"]


def effects(values: list[list[float]]) -> pd.DataFrame:
    columns = pd.RangeIndex(len(values[0]), name="layer")
    return pd.DataFrame(values, index=[f"token {i}" for i in range(len(values))], columns=columns)


def test_effect_maps_show_their_numbers_on_one_scale() -> None:
    left, right = effects([[0.0, 0.5], [-0.1, 0.2], [0.004, -0.004]]), effects([[0.8, 0]] * 3)
    axes = effect_maps({"MLP": left, "attention": right})
    axes[0].figure.canvas.draw()
    assert [ax.get_title() for ax in axes] == ["MLP", "attention"]
    meshes = [ax.collections[0] for ax in axes]
    assert meshes[0].get_array().tolist() == left.to_numpy().tolist()
    assert [mesh.get_clim() for mesh in meshes] == [(0, 0.8)] * 2
    # each number in its cell
    texts = {text.get_position(): text.get_text() for text in axes[0].texts}
    assert texts[1.5, 0.5] == ".50"
    assert texts[0.5, 1.5] == "-.10"
    assert texts[1.5, 2.5] == texts[0.5, 2.5] == "0"
    assert len(texts) == 6
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(left.index)
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["0", "1"]
    assert axes[0].get_xlabel() == "layer"
    # the first row is on top, and larger is darker, in grey too
    assert axes[0].transData.transform((0, 0))[1] > axes[0].transData.transform((0, 1))[1]
    greys = [sum(meshes[0].cmap(value)[:3]) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert greys == sorted(greys, reverse=True)
    assert len(axes[0].figure.axes) == 2


def test_effect_maps_with_many_layers_have_a_colour_bar_instead() -> None:
    wide = effects([[i / 48 for i in range(48)]] * 2)
    ax = effect_maps({"MLP": wide})
    assert not ax.texts
    assert len(ax.figure.axes) == 2
    assert [label.get_text() for label in ax.get_xticklabels()][:3] == ["0", "4", "8"]
    for nothing in ({}, {"MLP": wide.iloc[:0]}):
        with pytest.raises(FactError, match="nothing to draw"):
            effect_maps(nothing)
    with pytest.raises(FactError, match="2 tables to draw, and 1 axes"):
        effect_maps({"a": wide, "b": wide}, axes=ax)


def test_figures_draw_into_the_axes_given_and_no_other() -> None:
    figure, (left, middle, right, last) = plt.subplots(1, 4)
    number = len(plt.get_fignums())
    assert probability_bars(COMPARED, left) is left
    assert score_bars(REPORTS, middle) is middle
    assert loss_curves(an_edit(2), ax=right) is right
    assert effect_maps({"MLP": effects([[0.1]])}, axes=last) is last
    assert len(plt.get_fignums()) == number
    figure.canvas.draw()


def test_style_is_left_again_also_on_an_exception() -> None:
    inside = {}

    def draw() -> None:
        with style() as palette:
            inside.update(mpl.rcParams)
            assert len(set(palette)) == len(palette) >= 6
            raise ZeroDivisionError

    before = dict(mpl.rcParams)
    with pytest.raises(ZeroDivisionError):
        draw()
    assert inside["axes.spines.top"] is False
    assert dict(mpl.rcParams) == before


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seaborn", None)
    with pytest.raises(UnifiedEditError, match=r"unified_edit\[plot\]"):
        loss_curves(an_edit(1))

"""Figures in one style; every function draws into a Matplotlib `Axes` and returns it.

Colours are those of seaborn's colour-blind palette, and never the only difference: bars carry
hatches, lines differ in dashes, so that figures read in grey too. Needs the extra ``plot``
(``pip install 'unified_edit[plot]'``). Global settings of Matplotlib are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, cast

from unified_edit.errors import FactError, UnifiedEditError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from unified_edit.editing.edits import Edit
    from unified_edit.measuring.report import Report

HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
#: More facts than this are not told apart by name in `loss_curves`.
NAMED_CURVES = 6
#: Wider heat maps have a colour bar instead of numbers in their cells.
NUMBERED_COLUMNS = 12
#: Characters of a label before it is broken.
LABEL_WIDTH = 30
#: Inches: wider figures shrink on a phone until nobody can read them.
WIDTH = 5.4


def plotting() -> tuple[Any, Any]:
    """Matplotlib's pyplot and seaborn; UnifiedEditError says what to install."""
    try:
        import matplotlib.pyplot as plt
        import seaborn as sns
    except ImportError as problem:
        raise UnifiedEditError(
            f"figures need Matplotlib and seaborn ({problem}): pip install 'unified_edit[plot]'"
        ) from problem
    return plt, sns


@contextmanager
def style() -> Iterator[list[tuple[float, float, float]]]:
    """Inside, Matplotlib draws in this library's style; yields the palette (RGB in 0..1)."""
    plt, sns = plotting()
    palette = list(sns.color_palette("colorblind"))
    settings = {
        **sns.axes_style("whitegrid"),
        **sns.plotting_context("notebook", font_scale=1.0),
        "axes.prop_cycle": plt.cycler(color=palette),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.6,
        "svg.hashsalt": "unified_edit",  # the same file each time
    }
    with plt.rc_context(settings):
        yield palette


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """`ax`, or that of a new figure of so many inches."""
    if ax is not None:
        return ax
    plt, _ = plotting()
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def probability_bars(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Probabilities before and after an edit: two bars for each row of `compare`'s table.

    table: columns prompt, target, before, after. With one prompt it is the title and the
    targets are the labels; with several, labels hold both. The probability of a target of several
    tokens is their geometric mean. Raises FactError for an empty table.
    """
    if len(table) == 0:
        raise FactError("there is nothing to draw: the table has no rows.")
    prompts = list(table["prompt"])
    single = len(set(prompts)) == 1
    labels = [
        target if single else fill(f"{prompt} → {target}", LABEL_WIDTH)
        for prompt, target in zip(prompts, table["target"], strict=True)
    ]
    with style() as palette:
        ax = _axes(ax, WIDTH, 1.2 + 0.6 * len(labels))
        height = 0.38
        for place, name in enumerate(("before", "after")):
            bars = ax.barh(
                [row + (place - 0.5) * height for row in range(len(labels))],
                table[name].to_numpy(dtype=float),
                height=height,
                color=palette[place],
                edgecolor="black",
                linewidth=0.6,
                hatch=HATCHES[place],
                label=f"{name} the edit",
            )
            ax.bar_label(bars, fmt="{:.2f}", padding=3, fontsize="small")
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.12)  # room for the number behind a bar of length one
        ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        ax.set_xlabel("probability per token")
        if single:
            ax.set_title(fill(f"{prompts[0]} …", 2 * LABEL_WIDTH), pad=28)
        _legend(ax, "right")  # the labels leave the drawing half of the width
    return ax


def score_bars(
    reports: Mapping[str, Report],
    ax: Axes | None = None,
    *,
    scores: Sequence[str] = ("ES", "PS", "NS"),
    before: bool = True,
) -> Axes:
    """Scores of several reports side by side, with their 95 % intervals as whiskers.

    reports: by the name that the legend shows, such as the method's. scores: which; one that
    no report has is left out, as probes' names are allowed. before: draw the base model of the
    first report too, if that has an "after". Raises FactError if nothing is left to draw.
    """
    series = {name: report.summary for name, report in reports.items()}
    first = next(iter(reports.values()), None)
    if before and first is not None and first.after is not None:
        series = {"before": first.before, **series}
    shown = [score for score in scores if any(score in values for values in series.values())]
    if not shown:
        raise FactError(
            f"there is nothing to draw: no report has any of the scores {tuple(scores)}."
        )
    series = {
        name: {score: values[score] for score in shown if score in values}
        for name, values in series.items()
    }
    with style() as palette:
        ax = _axes(ax, min(WIDTH, 1.6 + 1.6 * len(shown)), 3.6)
        width = 0.8 / len(series)
        for place, (name, values) in enumerate(series.items()):
            offset = (place - (len(series) - 1) / 2) * width
            ax.bar(
                [shown.index(score) + offset for score in values],
                [score.value for score in values.values()],
                width=width,
                yerr=[
                    [max(0.0, score.value - score.low) for score in values.values()],
                    [max(0.0, score.high - score.value) for score in values.values()],
                ],
                capsize=3,
                color=palette[place % len(palette)],
                edgecolor="black",
                linewidth=0.6,
                hatch=HATCHES[place % len(HATCHES)],
                error_kw={"elinewidth": 1.2},
                label=name,
            )
        ax.set_xticks(range(len(shown)), shown)
        ax.grid(visible=False, axis="x")
        if all(score.low >= 0 for values in series.values() for score in values.values()):
            ax.set_ylim(0, 1.05)
        ax.set_ylabel("score (95 % interval)")
        _legend(ax)
    return ax


def loss_curves(edit: Edit, ax: Axes | None = None) -> Axes:
    """The loss of each fact while its value was optimised, and where optimising stops.

    Up to six facts are named in the legend; more are drawn alike.
    """
    plt, _ = plotting()
    with style() as palette:
        ax = _axes(ax, WIDTH, 3.6)
        named = len(edit.facts) <= NAMED_CURVES
        for place, (fact, outcome) in enumerate(zip(edit.facts, edit.outcomes, strict=True)):
            label = f"{fact.subject} → {fact.target_new}"
            ax.plot(
                range(len(outcome.losses)),
                outcome.losses,
                color=palette[place] if named else palette[0],
                linestyle=DASHES[place] if named else "-",
                linewidth=1.8 if named else 0.8,
                alpha=1.0 if named else 0.5,
                marker="o",
                markersize=3,
                label=fill(label, LABEL_WIDTH) if named else None,
            )
        stop = cast(float, edit.method.stop_loss)  # the method of an edit is resolved
        dots = (0, (1, 3))
        ax.axhline(stop, color="black", linewidth=1, linestyle=dots, label=f"stop at {stop:g}")
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        _legend(ax)
    return ax


def effect_maps(frames: Mapping[str, pd.DataFrame], axes: Any = None) -> Any:
    """Heat maps of tables on one colour scale that begins at 0: a column a layer.

    They stand side by side where the page is wide enough, and below each other otherwise.
    frames: by title, such as what `Trace.effects` gives. axes: as many `Axes` as tables, or None
    for a new figure. Small tables have their numbers in the cells, larger ones a colour bar.
    Returns the `Axes`, or an array of them if there are several tables. Raises FactError if there
    is nothing to draw or the number of `Axes` is another.
    """
    import numpy as np

    if not frames or any(frame.size == 0 for frame in frames.values()):
        raise FactError("there is nothing to draw: no table, or one without rows or columns.")
    plt, sns = plotting()
    rows, columns = next(iter(frames.values())).shape
    numbered = columns <= NUMBERED_COLUMNS
    with style():
        if axes is None:
            width, height = max(1.6, min(4.0, 0.42 * columns)), 1.1 + 0.36 * rows
            beside = 1.6 + len(frames) * width <= WIDTH
            _, axes = plt.subplots(
                *((1, len(frames)) if beside else (len(frames), 1)),
                figsize=(1.6 + len(frames) * width, height)
                if beside
                else (1.6 + width, len(frames) * height),
                sharex=not beside,
                sharey=beside,
                layout="constrained",
            )
        each = list(np.ravel(axes))
        if len(each) != len(frames):
            raise FactError(f"there are {len(frames)} tables to draw, and {len(each)} axes.")
        high = max(float(np.nanmax(frame.to_numpy())) for frame in frames.values())
        high = high if high > 0 else 1.0
        shades = sns.color_palette("mako_r", as_cmap=True)
        for ax, (title, frame) in zip(each, frames.items(), strict=True):
            values = frame.to_numpy(dtype=float)
            mesh = ax.pcolormesh(
                values, cmap=shades, vmin=0, vmax=high, edgecolors="white", linewidth=0.5
            )
            if numbered:
                for (row, column), value in np.ndenumerate(values):
                    ax.text(
                        column + 0.5,
                        row + 0.5,
                        f"{value:.2f}".replace("0.", ".") if abs(value) >= 0.005 else "0",
                        ha="center",
                        va="center",
                        fontsize="small",
                        color="white" if value > 0.5 * high else "black",
                    )
            step = -(-values.shape[1] // 12)
            shown = range(0, values.shape[1], step)
            ax.set_xticks([i + 0.5 for i in shown], [str(frame.columns[i]) for i in shown])
            ax.set_yticks([i + 0.5 for i in range(len(frame))], [str(row) for row in frame.index])
            ax.set_ylim(len(frame), 0)  # the first row on top
            ax.grid(visible=False)
            ax.tick_params(length=0)
            ax.set_title(title)
            if ax.get_subplotspec() is None or ax.get_subplotspec().is_last_row():
                ax.set_xlabel(str(frame.columns.name or ""))
        if not numbered:
            each[0].figure.colorbar(mesh, ax=each, label="effect", extend="min")
    return each[0] if len(each) == 1 else np.array(each)


def _legend(ax: Axes, side: Literal["left", "right"] = "left") -> None:
    """A legend above the drawing, where it hides nothing and takes none of its width."""
    names = ax.get_legend_handles_labels()[1]
    columns = min(len(names), max(1, 2 * LABEL_WIDTH // (6 + max(map(len, names), default=1))))
    ax.legend(
        loc="lower right" if side == "right" else "lower left",
        bbox_to_anchor=(float(side == "right"), 1.0),
        ncols=columns,
        frameon=False,
        fontsize="small",
        borderpad=0.1,
        columnspacing=1.2,
    )

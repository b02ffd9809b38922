"""Figures of a sweep, from its table alone: batch sizes, ridges, and the frontier of both aims.

Every function draws a `Sweep.table` (all of it, or rows that you chose) into a Matplotlib `Axes`,
in the style of `unified_edit.measuring.figures`. A line is a method; where a method has several
layers, batch sizes or ridges that the axis does not show, each has a line of its own, and says so.
Seeds are no lines: a point is their mean, and its whisker reaches from the lowest end of their
intervals to the highest. Points of different lines at one place stand a little beside each other.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unified_edit.arguments import as_path
from unified_edit.errors import FactError, ReportFileError
from unified_edit.measuring.figures import DASHES, WIDTH, _axes, _legend, plotting, style
from unified_edit.measuring.grid_files import DONE
from unified_edit.model.tensor_files import written_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from unified_edit.measuring.grid_table import Sweep

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: The scores of the batch-size plots.
SCORES = ("ES", "PS", "NS", "S")
#: By how much points at one place stand beside each other, on an axis of logarithms.
ASIDE = 1.03
FORMATS = ("svg", "png", "pdf")

#: Column -> how a line's name tells it.
_TOLD = {
    "layers": "layers {}", "lam": "λ = {:g}", "batch_size": "batches of {}", "history": "{}",
}  # fmt: skip


def batch_size_lines(table: pd.DataFrame, score: str = "ES", ax: Axes | None = None) -> Axes:
    """A score against the batch size, a line a method, with 95 % intervals.

    Raises FactError if no row has that score.
    """
    with style() as palette:
        ax = _axes(ax, WIDTH, 3.6)
        _whiskers(ax, list(_lines(table, "batch_size", score)), "batch_size", score, palette)
        sizes = sorted(set(_usable(table, "batch_size", score)["batch_size"]))
        _log_axis(ax, sizes, [f"{size:g}" for size in sizes])
        ax.set_xlabel("records edited together")
        _score_axis(ax, score)
        _legend(ax)
    return ax


def ridge_lines(table: pd.DataFrame, score: str = "ES", ax: Axes | None = None) -> Axes:
    """A score against lam, a line a method, with 95 % intervals; the equality (lam = 0) stands at
    the left edge.

    Raises FactError if no row has that score.
    """
    with style() as palette:
        ax = _axes(ax, WIDTH, 3.6)
        given = sorted(set(_usable(table, "lam", score)["lam"]))
        edge = _edge(given)
        lines = [
            (label, rows.assign(lam=rows["lam"].replace(0.0, edge)))
            for label, rows in _lines(table, "lam", score)
        ]
        _whiskers(ax, lines, "lam", score, palette)
        _log_axis(ax, [one or edge for one in given], [f"{one:g}" for one in given])
        ax.set_xlabel("λ (0: equality)")
        _score_axis(ax, score)
        _legend(ax)
    return ax


def frontier(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What is missed of the new facts against what preserving costs: a point a lam, joined in its
    order. The equality misses nothing, and costs the most.

    Raises FactError if no row has both.
    """
    with style() as palette:
        ax = _axes(ax, WIDTH, 3.6)
        for place, (label, rows) in enumerate(_lines(table, "lam", "miss", "cost")):
            mean = rows.groupby("lam", as_index=False)[["miss", "cost"]].mean()
            ax.plot(
                mean["cost"],
                mean["miss"],
                **_drawn(place, palette),
                label=label,
            )
            for lam, cost, miss in zip(mean["lam"], mean["cost"], mean["miss"], strict=True):
                ax.annotate(
                    f"{lam:g}",
                    (cost, miss),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize="x-small",
                )
        ax.set_xscale("log")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.set_xlabel("cost of preserving, tr(Δ C0 Δᵀ); beside a point: λ")
        ax.set_ylabel("missed, ‖ΔK − R‖ / ‖R‖")
        _legend(ax)
    return ax


def draw_sweep(
    found: Sweep,
    to: str | os.PathLike[str],
    *,
    kind: str = "svg",
    scores: Sequence[str] = SCORES,
) -> list[Path]:
    """Draw what a sweep has to show into a folder; return the files.

    batch_sizes_ES.svg, ... where there are several batch sizes; ridges_ES.svg, ... and frontier.svg
    where there are several lam. kind: "svg", "png" or "pdf".

    Raises FactError where nothing varies, ReportFileError for another kind or a folder that cannot
    be written.
    """
    plt, _ = plotting()
    folder = as_path(to, "to", ReportFileError)
    if kind not in FORMATS:
        raise ReportFileError(f"figures are not written as {kind!r}; choose one of {FORMATS}")
    done = found.table[found.table["state"] == DONE]
    wanted: dict[str, Any] = {}
    of = [score for score in scores if score in done and done[score].notna().any()]
    if done["batch_size"].nunique() > 1:
        wanted |= {f"batch_sizes_{score}": (batch_size_lines, score) for score in of}
    if done["lam"].nunique() > 1:
        wanted |= {f"ridges_{score}": (ridge_lines, score) for score in of}
        if (done["miss"].notna() & (done["cost"] > 0)).any():
            wanted["frontier"] = (frontier,)
    if not wanted:
        raise FactError(
            f"there is nothing to draw: the {len(done)} finished cells of {found.folder} have one "
            "batch size and one lam"
        )
    made = []
    for name, (draw, *more) in wanted.items():
        ax = draw(done, *more)
        path = folder / f"{name}.{kind}"
        try:
            with style(), written_whole(path) as temporary:
                # the same file each time: without the date
                ax.figure.savefig(
                    temporary,
                    format=kind,
                    bbox_inches="tight",
                    metadata={"Date": None} if kind == "svg" else None,
                )
        except OSError as problem:
            raise ReportFileError(f"{path} cannot be written: {problem}") from problem
        finally:
            plt.close(ax.figure)
        made.append(path)
    return made


def _usable(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that have numbers in all of these columns; FactError if none has."""
    absent = [name for name in columns if name not in table]
    rows = table if absent else table.dropna(subset=list(columns))
    if absent or rows.empty:
        raise FactError(
            f"there is nothing to draw: no row of the table has {' and '.join(absent or columns)}"
        )
    return cast("pd.DataFrame", rows)


def _lines(table: pd.DataFrame, x: str, *columns: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and rows of each line."""
    rows = _usable(table, x, *columns)
    # what differs between methods alone need not be told: it is the method's own
    told_of = [name for name in _TOLD if name != x and name in rows]
    varies = [name for name in told_of if (rows.groupby("method")[name].nunique() > 1).any()]
    for key, some in rows.groupby(["method", *varies], sort=False):
        told = [_TOLD[name].format(one) for name, one in zip(varies, key[1:], strict=True)]
        yield ", ".join([str(key[0]), *told]), some


def _whiskers(
    ax: Axes, lines: Sequence[tuple[str, pd.DataFrame]], x: str, score: str, palette: Any
) -> None:
    for place, (label, rows) in enumerate(lines):
        each = rows.groupby(x).agg(
            value=(score, "mean"), low=(f"{score}_low", "min"), high=(f"{score}_high", "max")
        )
        ax.errorbar(
            each.index.to_numpy(dtype=float) * ASIDE ** (place - (len(lines) - 1) / 2),
            each["value"],
            yerr=[
                (each["value"] - each["low"]).clip(lower=0.0),
                (each["high"] - each["value"]).clip(lower=0.0),
            ],
            capsize=3,
            elinewidth=1.0,
            **_drawn(place, palette),
            label=label,
        )


def _drawn(place: int, palette: Any) -> dict[str, Any]:
    return {
        "color": palette[place % len(palette)],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _edge(given: Sequence[float]) -> float:
    """Where lam = 0 stands: a decade below the smallest of the others."""
    positive = [one for one in given if one > 0]
    return min(positive) / 10 if positive else 1.0


def _log_axis(ax: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    ax.set_xscale("log")
    if len(places) <= 8 and all(math.log10(b / a) > 0.2 for a, b in itertools.pairwise(places)):
        ax.set_xticks(list(places), list(names))
        ax.minorticks_off()


def _score_axis(ax: Axes, score: str) -> None:
    ax.set_ylabel(f"{score} (95 % interval)")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.0) if low < 0 else 0.0, max(high, 1.05) if high > 1.05 else 1.05)

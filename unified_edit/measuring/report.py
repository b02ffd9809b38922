"""The report of an evaluation: a table of answers, and its scores before and after."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from unified_edit.measuring.scores import AFTER, BEFORE, Score, _short, summarise

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("record", "case_id", "relation", "when", "kind", "prompt", "logp_new", "logp_true",
           "success", "magnitude", "generated")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    table: one row a (record, when, kind, prompt), a pandas table with the columns
        record: place of the record in the list given; case_id, relation: its own.
        when: "before" (the base model, without any edit) or "after".
        kind: "rewrite", "paraphrase", "neighbour", or the name of a group of probes.
        logp_new, logp_true: mean token log-probability of o* and oc; of `expected` and `foil`
            for probes. NaN where there is no oc or foil.
        success: whether the right one is more probable; missing where there is no oc. Probes
            without a foil succeed if greedy decoding gives `expected`.
        magnitude: P of the right one minus P of the other (NaN without the other).
        generated: whether greedy decoding gives the right one: oc for neighbours, o* or
            `expected` otherwise.
    bootstrap, seed: resamples behind the intervals, and their seed.
    """

    table: pd.DataFrame
    bootstrap: int = 2000
    seed: int = 0

    @cached_property
    def before(self) -> dict[str, Score]:
        """Scores of the base model, by name."""
        return self._scores(BEFORE) or {}

    @cached_property
    def after(self) -> dict[str, Score] | None:
        """Scores of the edited model, by name; None if no edit was active."""
        return self._scores(AFTER)

    @property
    def summary(self) -> dict[str, Score]:
        """Scores of the latest state: `after` if there is one, else `before`."""
        return self.before if self.after is None else self.after

    @property
    def records(self) -> int:
        """How many records were evaluated."""
        return int(self.table["record"].nunique())

    def _scores(self, when: str) -> dict[str, Score] | None:
        part = self.table[self.table["when"] == when]
        return summarise(part, bootstrap=self.bootstrap, seed=self.seed) if len(part) else None

    def frame(self) -> pd.DataFrame:
        """The scores as a table: one row a score, columns before, after, low, high, n.

        low, high and n belong to the latest state; without an "after", that column is absent.
        """
        import pandas as pd

        names = list(self.summary)
        columns: dict[str, list[Any]] = {BEFORE: [self.before[name].value for name in names]}
        if self.after is not None:
            columns[AFTER] = [self.after[name].value for name in names]
        for field in ("low", "high", "n"):
            columns[field] = [getattr(self.summary[name], field) for name in names]
        return pd.DataFrame(columns, index=pd.Index(names, name="score"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary of the scores, without the table."""
        states = {BEFORE: self.before, AFTER: self.after}
        return {
            "records": self.records,
            "bootstrap": self.bootstrap,
            "seed": self.seed,
            **{when: None if scores is None else _plain(scores) for when, scores in states.items()},
        }

    @property
    def _shown(self) -> pd.DataFrame:
        """The scores as text, three significant digits at most."""
        frame = self.frame()
        cells = frame.drop(columns="n").map(_short)
        cells["95 % interval"] = cells.pop("low") + " to " + cells.pop("high")
        return cells.assign(n=frame["n"].astype(str)).reset_index()

    def __repr__(self) -> str:
        return f"Report on {self._count()}\n{dedent(as_text(self._shown, ['score']))}"

    def _repr_html_(self) -> str:
        shown = self._shown.map(html.escape)
        titles = "".join(f"<th>{name}</th>" for name in shown)
        body = "".join(
            f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
            for name, *cells in shown.itertuples(index=False)
        )
        return (
            f"<table><caption>{self._count()}; 95 % bootstrap intervals by record</caption>"
            f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _count(self) -> str:
        return f"{self.records} record" + ("s" if self.records != 1 else "")


def as_text(cells: pd.DataFrame, left: Iterable[str]) -> str:
    """A table of texts in lines indented by two; columns in `left` go to the left, others right."""
    names = {}
    for name in left:
        width = max(map(len, [name, *cells[name]]))
        cells = cells.assign(**{name: cells[name].str.ljust(width)})
        names[name] = name.ljust(width)
    rows = cells.rename(columns=names).set_axis([""] * len(cells))
    # two blanks between columns: pandas puts one before texts, but none before names
    return rows.to_string(justify="right", col_space=[len(name) + 1 for name in rows])


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | int]]:
    return {name: dict(vars(score)) for name, score in scores.items()}

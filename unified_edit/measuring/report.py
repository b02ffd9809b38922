"""The report of an evaluation: a table of answers, and its scores before and after."""

from __future__ import annotations

import html
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from unified_edit.arguments import as_path
from unified_edit.errors import ReportFileError
from unified_edit.measuring.answer_lines import Line, read_lines
from unified_edit.measuring.scores import AFTER, BEFORE, Score, _short, summarise

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

COLUMNS = ("record", "case_id", "relation", "when", "kind", "prompt", "logp_new", "logp_true",
           "success", "magnitude", "generated")  # fmt: skip
#: One more column, where texts were generated.
TEXT = "text"


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found.

    table: one row a (record, when, kind, prompt), a pandas table with the columns
        record: place of the record in the list given; case_id, relation: its own.
        when: "before" (the base model, without any edit) or "after".
        kind: "rewrite", "paraphrase", "neighbour", the name of a group of probes, or "generation"
            (on request): then magnitude is the entropy of the text, which stands in a last column,
            text, and there is nothing else to be judged.
        logp_new, logp_true: mean token log-probability of o* and oc; of `expected` and `foil`
            for probes. NaN where there is no oc or foil.
        success: whether the right one is more probable; missing where there is no oc. Probes
            without a foil succeed if greedy decoding gives `expected`.
        magnitude: P of the right one minus P of the other (NaN without the other).
        generated: whether greedy decoding gives the right one: oc for neighbours, o* or
            `expected` otherwise.
    bootstrap, seed: resamples behind the intervals, and their seed.
    known_only: whether only records count whose true object the base model prefers.
    left_out: why records do not count -> how many.
    """

    table: pd.DataFrame
    bootstrap: int = 2000
    seed: int = 0
    known_only: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """The report of a file that `evaluate` or `evaluate_edits` wrote (`to=`).

        Of a file that is not finished, the records that were asked in every state; the log says
        so. Needs about a kilobyte of memory a prompt and state.

        Raises ReportFileError for a file that cannot be read, is something else, or is damaged.
        """
        file = as_path(path, "path", ReportFileError)
        report, finished = report_of(read_lines(file))
        if not finished:
            log.warning("%s is not finished: so far it holds %s", file, report._count())
        return report

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
        for column in ("low", "high", "n"):
            columns[column] = [getattr(self.summary[name], column) for name in names]
        return pd.DataFrame(columns, index=pd.Index(names, name="score"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary of the scores, without the table."""
        states = {BEFORE: self.before, AFTER: self.after}
        return {
            "records": self.records,
            "bootstrap": self.bootstrap,
            "seed": self.seed,
            "known_only": self.known_only,
            "left_out": dict(self.left_out),
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
        known = "known " if self.known_only else ""
        number = f"{self.records} {known}record" + ("s" if self.records != 1 else "")
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return number + (f" (left out: {reasons})" if reasons else "")


def report_of(lines: Iterator[Line]) -> tuple[Report, bool]:
    """The report of lines of answers, the header first, and whether all was asked."""
    header = next(lines)
    made_from, finished = header["made_from"], False
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {w: {} for w in made_from["states"]}
    left_out: Counter[str] = Counter()
    for line in lines:
        if "finished" in line:
            finished = True
        elif line.get("left_out"):
            left_out[line["left_out"]] += 1
        else:
            about = {name: line[name] for name in COLUMNS[:4]}
            rows[line["when"]][line["record"]] = [{**about, **one} for one in line["answers"]]
    last = rows[made_from["states"][-1]]
    table = [row for of in rows.values() for number in of if number in last for row in of[number]]
    made = Report(
        to_table(table),
        header["bootstrap"],
        made_from["seed"],
        made_from["known_only"],
        dict(sorted(left_out.items())),
    )
    return made, finished


def to_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as `Report.table`."""
    import pandas as pd

    more = [TEXT] if any(TEXT in row for row in rows) else []
    table = pd.DataFrame(rows, columns=[*COLUMNS, *more])
    return table.astype({"success": "boolean", "generated": bool})


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

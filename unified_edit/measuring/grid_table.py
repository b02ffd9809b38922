"""What the cells of a sweep have found, as one table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_edit.arguments import as_path
from unified_edit.editing.methods import Method
from unified_edit.errors import ReportFileError
from unified_edit.measuring.answer_lines import plain
from unified_edit.measuring.batches import BatchReport
from unified_edit.measuring.grid_files import (
    ANSWERS,
    CELL,
    DONE,
    FAILED,
    RUN_FOLDER,
    check_same,
    number,
    read_cells,
    score,
)
from unified_edit.measuring.report import Report
from unified_edit.model.tensor_files import write_whole

if TYPE_CHECKING:
    import pandas as pd

#: The scores of `Sweep.table`, each with its interval.
SHOWN = ("ES", "PS", "NS", "S", "GS")
#: Those that it has where a cell has them.
WHERE_THERE = ("GE", "ES_first")
#: What stands before them, and behind.
ABOUT = ("cell", "method", "layers", "lam", "batch_size", "seed", "history", "state", "records")
BEHIND = ("edits", "miss", "cost", "problem")


@dataclass(frozen=True, eq=False)
class Sweep:
    """What the cells of a folder have found.

    folder: where they are. table: a row a cell, with the columns
        cell: its name; method: the method's; layers: the edited blocks ("13 14 15"); lam: the
            method's ridge (0: the equality), also where `ridge_from` spares so small a batch from
            it; batch_size; seed; history: what becomes of the batches (`Grid`).
        state: "done", "failed", "begun", or "new"; records: how many were measured.
        ES, PS, NS, S, GS, after the edits, each with ES_low, ES_high, ...: its 95 % interval;
            GE, fluency, where texts were written; ES_first, of the first batch after the last one,
            where batches followed each other.
        edits: how many were made; miss: ||Delta K - R|| / ||R|| at the last edited layer, and cost:
            tr(Delta C0 Delta^T) of all of them, both the mean over edits.
        problem: why a cell failed.
    """

    folder: Path
    table: pd.DataFrame

    @classmethod
    def read(cls, folder: str | os.PathLike[str], names: Iterable[str] | None = None) -> Sweep:
        """The cells of a folder that `sweep` wrote to, or those called `names`.

        Cells of several folders may be put into one by hand, as long as they were made from the
        same model, records and settings. Raises ReportFileError where they were not, for a folder
        without cells, and for a damaged cell.
        """
        import pandas as pd

        place = as_path(folder, "the sweep's folder", ReportFileError)
        cells = read_cells(place)
        if names is not None:
            cells = {name: cells.get(name, {}) for name in names}
        if not cells:
            raise ReportFileError(
                f"{place} holds no cell of a sweep; give the folder that was its --to"
            )
        begun = {name: cell["common"] for name, cell in cells.items() if cell}
        for name, common in begun.items():  # somebody may have put folders together
            check_same(place / name / CELL, next(iter(begun.values())), common)
        rows = [_row(name, cell) for name, cell in cells.items()]
        shown = [*SHOWN, *(one for one in WHERE_THERE if any(one in row for row in rows))]
        columns = [*ABOUT, *(one + end for one in shown for end in ("", "_low", "_high")), *BEHIND]
        table = pd.DataFrame(rows, columns=columns)
        order = ["method", "layers", "lam", "batch_size", "history", "seed", "cell"]
        return cls(place, table.sort_values(order, kind="stable", ignore_index=True))

    @property
    def problems(self) -> dict[str, str]:
        """Failed cells, and why they failed."""
        failed = self.table[self.table["state"] == FAILED]
        return dict(zip(failed["cell"], failed["problem"], strict=True))

    @property
    def missing(self) -> list[str]:
        """Cells that are neither done nor failed: another process has them, or had."""
        return list(self.table.loc[~self.table["state"].isin((DONE, FAILED)), "cell"])

    def report(self, cell: str) -> Report:
        """All answers of a cell; ReportFileError if it has none.

        Where batches followed each other, those about the base and about the model with all; what
        lies between them is read by `BatchReport.read` from the cell's folder "run".
        """
        if (run := self.folder / cell / RUN_FOLDER).exists():
            return BatchReport.read(run).report
        return Report.read(self.folder / cell / ANSWERS)

    def write(self) -> None:
        """table.csv and table.json, beside the cells."""
        texts = {
            "table.csv": self.table.to_csv(index=False, lineterminator="\n"),
            "table.json": json.dumps(plain(self.table.to_dict("records")), indent=1) + "\n",
        }
        try:
            for name, text in texts.items():
                write_whole(self.folder / name, text)
        except OSError as problem:
            raise ReportFileError(
                f"{self.folder} cannot be written: {problem}. Make room there, and call again"
            ) from problem


def _row(name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    own, found = cell.get("own", {}), cell.get("found") or {}
    method = Method.from_dict(own["method"]) if own else None
    row = {"cell": name, "state": cell.get("state", "new"), "problem": cell.get("problem", "")}
    if method is not None:
        row |= {
            "method": method.name,
            "layers": " ".join(map(str, method.layers or ())),
            "lam": method.ridge,
            "batch_size": own["batch_size"],
            "seed": own["seed"],
            "history": own.get("history", "base"),
        }
    scores = {**(found.get("after") or {}), **found.get("more", {})}
    after = {one: score(scores[one]) for one in (*SHOWN, *WHERE_THERE) if one in scores}
    for one, value in after.items():
        row |= {one: value.value, f"{one}_low": value.low, f"{one}_high": value.high}
    row |= {name: found[name] for name in ("records", "edits") if name in found}
    return row | {name: number(found.get(name)) for name in ("miss", "cost")}

"""Running a grid: every cell is evaluated once, whatever interrupts the work, by one process or by
several that share a folder.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, is_flag
from unified_edit.editing.methods import Method
from unified_edit.errors import MethodError, ReportFileError, brief
from unified_edit.facts import Conflict, Record, SharedSubject, check_ways
from unified_edit.measuring.answer_lines import digest_of, plain
from unified_edit.measuring.evaluation import evaluate_edits
from unified_edit.measuring.grid import Cell, Grid, cells_of
from unified_edit.measuring.grid_files import (
    ANSWERS,
    BEGUN,
    CELL,
    DONE,
    EDITS,
    FAILED,
    CellFiles,
    EditLines,
    check_same,
    found_in,
    number,
    read_cells,
    score,
)
from unified_edit.measuring.questions import check_records
from unified_edit.measuring.report import Report
from unified_edit.measuring.scores import check_bootstrap
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.ledger import ledger_of
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.model.tensor_files import written_whole
from unified_edit.statistics import KeyStatistics

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: The scores of `Sweep.table`, each with its interval.
SHOWN = ("ES", "PS", "NS", "S", "GS")
#: What stands before them, and behind.
ABOUT = ("cell", "method", "layers", "lam", "batch_size", "seed", "state", "records")
BEHIND = ("edits", "miss", "cost", "problem")


@dataclass(frozen=True, eq=False)
class Sweep:
    """What the cells of a folder have found.

    folder: where they are. table: a row a cell, with the columns
        cell: its name; method: the method's; layers: the edited blocks ("13 14 15"); lam: the
            method's ridge (0: the equality), also where `ridge_from` spares so small a batch from
            it; batch_size; seed.
        state: "done", "failed", "begun", or "new"; records: how many were measured.
        ES, PS, NS, S, GS, after the edits, each with ES_low, ES_high, ...: its 95 % interval.
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
        columns = [*ABOUT, *(one + end for one in SHOWN for end in ("", "_low", "_high")), *BEHIND]
        table = pd.DataFrame(rows, columns=columns)
        order = ["method", "layers", "lam", "batch_size", "seed", "cell"]
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
        """All answers of a cell; ReportFileError if it has none."""
        return Report.read(self.folder / cell / ANSWERS)

    def write(self) -> None:
        """table.csv and table.json, beside the cells."""
        texts = {
            "table.csv": self.table.to_csv(index=False, lineterminator="\n"),
            "table.json": json.dumps(plain(self.table.to_dict("records")), indent=1) + "\n",
        }
        try:
            for name, text in texts.items():
                with written_whole(self.folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8", newline="")
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
        }
    after = {one: score(found["after"][one]) for one in SHOWN if one in (found.get("after") or {})}
    for one, value in after.items():
        row |= {one: value.value, f"{one}_low": value.low, f"{one}_high": value.high}
    row |= {name: found[name] for name in ("records", "edits") if name in found}
    return row | {name: number(found.get(name)) for name in ("miss", "cost")}


@dataclass(frozen=True)
class Work:
    """A grid that fits a model, and where its cells are kept.

    cells: with the files of each. given: what every evaluation is told.
    """

    folder: Path
    cells: Mapping[str, tuple[Cell, CellFiles]]
    records: tuple[Record, ...]
    given: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        records: Sequence[Record] | Record,
        cells: Sequence[Cell],
        to: str | os.PathLike[str],
        *,
        statistics: KeyStatistics | None = None,
        bootstrap: int = 2000,
        known_only: bool = False,
        on_shared_subject: SharedSubject = "raise",
        on_conflict: Conflict = "raise",
    ) -> Work:
        """Check all that can be checked before any work is done.

        Raises MethodError for a method that lacks a setting for the model or a batch size above the
        number of records, ReportFileError for a folder in which any cell was made from something
        else, and what `evaluate` raises for the records.
        """
        given = {
            "bootstrap": check_bootstrap(bootstrap),
            "known_only": bool(known_only),
            "on_shared_subject": on_shared_subject,
            "on_conflict": on_conflict,
        }
        if not is_flag(known_only):
            raise MethodError(f"known_only is {brief(known_only)}; it must be True or False")
        check_ways(on_shared_subject, on_conflict)
        folder = as_path(to, "to", ReportFileError)
        some = check_records(as_list(records))
        ledger, parts = ledger_of(model), anatomy(model)
        common = {
            "library": version("unified_edit"),
            "model": parts.name,
            "fingerprint": ledger.fingerprint(wholly=True),
            "tokenizer": Encoder(tokenizer, parts).signature,
            "records": digest_of(some),
            "statistics": repr(getattr(statistics, "source", statistics)),
            **given,
        }
        for name, known in read_cells(folder).items():
            check_same(folder / name / CELL, common, known["common"])
        made = {}
        for cell in cells:
            if cell.batch_size > len(some):
                raise MethodError(
                    f"{cell.name} asks for batches of {cell.batch_size}, and there are "
                    f"{len(some)} records: give more of them, or smaller batches"
                )
            own = {
                "method": cell.method.resolve(parts).to_dict(),
                "batch_size": cell.batch_size,
                "seed": cell.seed,
            }
            files = CellFiles(folder / cell.name, common, own)
            files.read()
            made[cell.name] = (cell, files)
        return cls(folder, made, some, {**given, "statistics": statistics})

    @property
    def open(self) -> list[str]:
        """Cells that are not done."""
        return [name for name, (_, files) in self.cells.items() if files.read()["state"] != DONE]

    def layers(self, name: str) -> tuple[int, ...]:
        """The blocks that a cell edits."""
        return tuple(self.cells[name][1].own["method"]["layers"])

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        run: str,
        begin: float = 0.0,
        alive: Callable[[], bool] | None = None,
    ) -> None:
        """Evaluate what is not done and nobody else works on.

        run: names this call and those that share its work: a cell that failed in it is not tried
            again by them. begin: share of the cells that is left to the others at first. alive: is
            asked between cells whether to go on.
        """
        names = list(self.cells)
        first = int(begin * len(names))
        with progress("cells of the grid", len(names), "cell") as bar:
            for name in [*names[first:], *names[:first]]:
                if alive is not None and not alive():
                    return
                cell, files = self.cells[name]
                with files.taken() as ours:
                    known = files.read() if ours else {}
                    failed = known.get("state") == FAILED and known.get("run") == run
                    if ours and known["state"] != DONE and not failed:
                        self._evaluate(model, tokenizer, cell, files, run)
                bar.update()

    def _evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        cell: Cell,
        files: CellFiles,
        run: str,
    ) -> None:
        """One cell; a failure is noted, and is not in the way of the others."""
        log.info("%s begins", files.name)
        files.write(BEGUN, run=run)
        began = time.monotonic()
        try:
            lines = EditLines(files.folder / EDITS)
            report = evaluate_edits(
                model,
                tokenizer,
                self.records,
                cell.method,
                batch_size=cell.batch_size,
                seed=cell.seed,
                to=files.answers,
                each=lines.add,
                **self.given,
            )
        except Exception as problem:  # whatever it is, the other cells may have none
            told = f"{type(problem).__name__}: {problem}"
            log.warning("%s failed: %s", files.name, told)
            files.write(FAILED, run=run, problem=told)
        else:
            seconds = round(time.monotonic() - began, 1)
            files.write(DONE, run=run, found=found_in(report, lines), seconds=seconds)

    def found(self) -> Sweep:
        """What the cells hold; the tables of the whole folder are written too."""
        Sweep.read(self.folder).write()
        return Sweep.read(self.folder, self.cells)


def sweep(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record] | Record,
    grid: Iterable[Grid] | Grid,
    *,
    to: str | os.PathLike[str],
    statistics: KeyStatistics | None = None,
    bootstrap: int = 2000,
    known_only: bool = False,
    on_shared_subject: SharedSubject = "raise",
    on_conflict: Conflict = "raise",
) -> Sweep:
    """Evaluate every cell of a grid by `evaluate_edits`, and keep each in a folder.

    >>> grid = ue.Grid([ue.EMMET, ue.MEMIT], batch_sizes=[1, 10, 100])      # doctest: +SKIP
    >>> ue.sweep(model, tokenizer, records, grid, to="sweep").table         # doctest: +SKIP

    to: the folder. Called again, with the same or another grid, it goes on: cells that are done are
        not done again, and one that was interrupted goes on after its last answer. Several
        processes may share the folder; a cell that one has is not taken by another. Each cell says
        what it was made from (model, records, method, version of the library, ...), and is refused
        where that is something else.
    Everything else: as in `evaluate_edits`, for all cells.

    A cell that fails is noted in `Sweep.problems`, and tried again by the next call. Raises what
    `Work.of` raises, before any work.
    """
    work = Work.of(
        model, tokenizer, records, cells_of(grid), to, statistics=statistics, bootstrap=bootstrap,
        known_only=known_only, on_shared_subject=on_shared_subject, on_conflict=on_conflict,
    )  # fmt: skip
    if work.open:
        work.run(model, tokenizer, run=uuid.uuid4().hex)
    return work.found()

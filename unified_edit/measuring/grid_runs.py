"""Running a grid: every cell is evaluated once, whatever interrupts the work, by one process or by
several that share a folder.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, is_flag
from unified_edit.editing.methods import Method
from unified_edit.errors import MethodError, ReportFileError, brief
from unified_edit.facts import Conflict, Record, SharedSubject, check_ways
from unified_edit.measuring.answer_lines import digest_of
from unified_edit.measuring.batches import evaluate_batches
from unified_edit.measuring.evaluation import evaluate_edits
from unified_edit.measuring.generation import Generation
from unified_edit.measuring.grid import Cell, Grid, cells_of
from unified_edit.measuring.grid_files import (
    BEGUN,
    CELL,
    DONE,
    EDITS,
    FAILED,
    RUN_FOLDER,
    CellFiles,
    EditLines,
    check_same,
    found_in,
    read_cells,
)
from unified_edit.measuring.grid_table import Sweep
from unified_edit.measuring.questions import check_records
from unified_edit.measuring.scores import check_bootstrap
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.ledger import ledger_of
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics

log = logging.getLogger(__name__)


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
        generate: bool | Generation = False,
    ) -> Work:
        """Check all that can be checked before any work is done.

        Raises MethodError for a method that lacks a setting for the model, a soft history of an
        equality, batches that follow each other beside known_only, or a batch size above the
        number of records, ReportFileError for a folder in which any cell was made from something
        else, and what `evaluate` raises for the records.
        """
        given: dict[str, Any] = {
            "bootstrap": check_bootstrap(bootstrap),
            "known_only": bool(known_only),
            "on_shared_subject": on_shared_subject,
            "on_conflict": on_conflict,
        }
        if not is_flag(known_only):
            raise MethodError(f"known_only is {brief(known_only)}; it must be True or False")
        check_ways(on_shared_subject, on_conflict)
        folder = as_path(to, "to", ReportFileError)
        texts = Generation.wanted(generate, 0)
        some = check_records(as_list(records))
        ledger, parts = ledger_of(model), anatomy(model)
        common: dict[str, Any] = {
            "library": version("unified_edit"),
            "model": parts.name,
            "fingerprint": ledger.fingerprint(wholly=True),
            "tokenizer": Encoder(tokenizer, parts).signature,
            "records": digest_of(some),
            "statistics": repr(getattr(statistics, "source", statistics)),
            **given,
        }
        if texts is not None:
            common["generate"] = True if generate is True else asdict(texts)
        for name, known in read_cells(folder).items():
            check_same(folder / name / CELL, common, known["common"])
        made = {}
        for cell in cells:
            if cell.batch_size > len(some):
                raise MethodError(
                    f"{cell.name} asks for batches of {cell.batch_size}, and there are "
                    f"{len(some)} records: give more of them, or smaller batches"
                )
            method = cell.method.resolve(parts)
            own = {"method": method.to_dict(), "batch_size": cell.batch_size, "seed": cell.seed}
            if cell.history != "base":
                own["history"] = cell.history
                _check_course(cell, method, known_only)
            files = CellFiles(folder / cell.name, common, own)
            files.read()
            made[cell.name] = (cell, files)
        given |= {"statistics": statistics, "generate": generate}
        return cls(folder, made, some, given)

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
            found = self._found_of(model, tokenizer, cell, files, lines)
        except Exception as problem:  # whatever it is, the other cells may have none
            told = f"{type(problem).__name__}: {problem}"
            log.warning("%s failed: %s", files.name, told)
            files.write(FAILED, run=run, problem=told)
        else:
            seconds = round(time.monotonic() - began, 1)
            files.write(DONE, run=run, found=found, seconds=seconds)

    def _found_of(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        cell: Cell,
        files: CellFiles,
        lines: EditLines,
    ) -> dict[str, Any]:
        """What is kept of a cell when it is done."""
        if cell.history == "base":
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
            return found_in(report, lines)
        found = evaluate_batches(
            model,
            tokenizer,
            self.records,
            cell.method,
            batch_size=cell.batch_size,
            seed=cell.seed,
            history=None if cell.history == "blind" else cell.history,
            every=len(self.records),  # after the last batch alone
            to=files.folder / RUN_FOLDER,
            **{name: value for name, value in self.given.items() if name != "known_only"},
        )
        for edit in found.edits:
            lines.add(edit)
        first = found.scores(int(found.answers["batches"].max()), "first").get("ES")
        more = {} if first is None else {"more": {"ES_first": vars(first)}}
        return {**found_in(found.report, lines), **more}

    def found(self) -> Sweep:
        """What the cells hold; the tables of the whole folder are written too."""
        Sweep.read(self.folder).write()
        return Sweep.read(self.folder, self.cells)


def _check_course(cell: Cell, method: Method, known_only: bool) -> None:
    """Raise MethodError for batches that cannot follow each other like that."""
    if cell.history == "soft" and method.ridge_for(cell.batch_size) == 0:
        raise MethodError(
            f"{cell.name}: a soft history weighs earlier facts with 1 / lam, and {method.name} is "
            "an equality in this cell. Give it a ridge, or a grid of its own without 'soft'"
        )
    if known_only:
        raise MethodError(
            f"{cell.name}: known_only chooses records by what the base says, which is not done "
            "where batches follow each other; choose them before (evaluate(..., known_only=True))"
        )


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
    generate: bool | Generation = False,
) -> Sweep:
    """Evaluate every cell of a grid by `evaluate_edits`, and keep each in a folder.

    Cells whose batches follow each other (`Grid.histories`) are evaluated by `evaluate_batches`.

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
        generate=generate,
    )  # fmt: skip
    if work.open:
        work.run(model, tokenizer, run=uuid.uuid4().hex)
    return work.found()

"""The cells of a sweep on disk: a folder for each, which says what it was made from.

    FOLDER/EMMET_b10_s0/cell.json      what it was made from, and what was found; written whole
    FOLDER/EMMET_b10_s0/answers.jsonl  every answer, as `evaluate_edits` writes them
    FOLDER/EMMET_b10_s0/edits.jsonl    a line an edit: how well it was solved
    FOLDER/MEMIT_b10_soft_s0/run/      in place of answers.jsonl where batches follow each other
    FOLDER/table.csv, table.json       the scores of all cells

A cell is held by a lock (`unified_edit.model.locks`) while somebody works on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_edit.editing.edits import Edit
from unified_edit.errors import ReportFileError
from unified_edit.measuring.answer_lines import differences, plain
from unified_edit.measuring.report import Report
from unified_edit.measuring.scores import Score
from unified_edit.model.locks import taken
from unified_edit.model.tensor_files import read_json, write_whole

FORMAT = "unified_edit.cell/1"
CELL, ANSWERS, EDITS, LOCK = "cell.json", "answers.jsonl", "edits.jsonl", "lock"
#: Where the batches of a cell follow each other, what `evaluate_batches` keeps.
RUN_FOLDER = "run"

#: Where a cell stands.
NEW, BEGUN, FAILED, DONE = "new", "begun", "failed", "done"


@dataclass(frozen=True)
class CellFiles:
    """The files of one cell.

    common: what all cells of a folder are made from, such as the model; own: what this one is.
    """

    folder: Path
    common: Mapping[str, Any]
    own: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What the cell is called."""
        return self.folder.name

    @property
    def answers(self) -> Path:
        """The file of answers."""
        return self.folder / ANSWERS

    def read(self) -> dict[str, Any]:
        """What is known of the cell: at least its `state`.

        Raises ReportFileError for a file that is damaged or was made from something else.
        """
        found = read_cell(self.folder)
        if found is None:
            return {"state": NEW}
        check_same(self.folder / CELL, self.common, found["common"])
        check_same(self.folder / CELL, self.own, found["own"])
        return found

    def write(self, state: str, **more: Any) -> None:
        """Say where the cell stands; the file is whole at any moment."""
        about = {"format": FORMAT, "state": state, "common": self.common, "own": self.own}
        path = self.folder / CELL
        try:
            text = json.dumps(plain({**about, **more}), indent=1, allow_nan=False)
            write_whole(path, text + "\n")
        except OSError as problem:
            raise ReportFileError(
                f"{path} cannot be written: {problem}. Give another place, or make room there"
            ) from problem

    def taken(self) -> AbstractContextManager[bool]:
        """Inside, whether the cell is ours; False if another process, or thread, has it."""
        try:
            return taken(self.folder / LOCK)
        except OSError as problem:
            raise ReportFileError(
                f"{self.folder} cannot be written: {problem}. Give another place"
            ) from problem


def read_cell(folder: Path) -> dict[str, Any] | None:
    """The cell of a folder; None if there is none. Raises ReportFileError if it is damaged."""
    path = folder / CELL
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise ReportFileError(
            f"{path} cannot be read ({problem}); delete {folder}, and the cell is made again"
        ) from problem
    there = found.keys() if isinstance(found, dict) else ()
    if not {"state", "common", "own"} <= set(there) or found.get("format") != FORMAT:
        raise ReportFileError(
            f"{path} is no cell of a sweep, or one of another version of this library: it does not "
            f"say {FORMAT!r}. Give another folder"
        )
    return dict(found)


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """All cells below a folder, by name."""
    each = ((path.parent.name, read_cell(path.parent)) for path in sorted(folder.glob(f"*/{CELL}")))
    return {name: cell for name, cell in each if cell is not None}


def check_same(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ReportFileError unless a file was made from the same things."""
    told = differences(plain(ours), theirs)
    if told:
        raise ReportFileError(
            f"{path} was made from something else ({told}). Give another folder, or delete "
            f"{path.parent}"
        )


class EditLines:
    """How well each edit of a cell was solved; a line each, kept as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_id: dict[str, dict[str, Any]] = {}
        if path.exists():
            *whole, rest = path.read_bytes().split(b"\n")
            for line in whole:
                one = json.loads(line)
                self.by_id[one["id"]] = one
            if rest:  # what a line that was being written left behind
                with path.open("r+b") as handle:
                    handle.truncate(path.stat().st_size - len(rest))

    def add(self, edit: Edit) -> None:
        """Note an edit; one that an interrupted run made already is known by its id."""
        if edit.id in self.by_id:
            return
        found = list(edit.diagnosis.values())
        one = {
            "id": edit.id,
            "facts": len(edit.facts),
            "miss": found[-1].memorization_error,
            "cost": math.fsum(each.preservation_error for each in found),
            "condition": max(each.condition for each in found),
        }
        self.by_id[edit.id] = one
        with self.path.open("ab") as handle:
            handle.write(json.dumps(plain(one), allow_nan=False).encode() + b"\n")

    def means(self) -> dict[str, float]:
        """miss and cost of an edit, the mean over all."""
        each = list(self.by_id.values())
        return {
            name: math.fsum(number(one[name]) for one in each) / len(each) if each else math.nan
            for name in ("miss", "cost")
        }


def found_in(report: Report, lines: EditLines) -> dict[str, Any]:
    """What is kept of a finished cell."""
    return {**report.to_dict(), "edits": len(lines.by_id), **lines.means()}


def number(value: Any) -> float:
    """A number of such a file: null is NaN."""
    return math.nan if value is None else float(value)


def score(value: Mapping[str, Any]) -> Score:
    """A score of such a file."""
    low, high = number(value["low"]), number(value["high"])
    return Score(number(value["value"]), low, high, int(value["n"]))

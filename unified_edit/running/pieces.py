"""The pieces of a run: values by fact, statistics by share of the text.

    FOLDER/pieces.json                 which pieces there are, for whoever only looks
    FOLDER/pieces/values/*.safetensors     a file for each fact (or for the facts of one value)
    FOLDER/pieces/statistics/*.safetensors a file for each share of the text

A piece of values is a few facts whose values are optimised together. Which ones depends on the
facts and on the size of a piece, never on the number of processes, so that all bits are the same
for any number. Files are named by a digest of all that they depend on, and written whole or not at
all: a piece is done when its files are there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from unified_edit.editing import Editor, Plan, Values
from unified_edit.editing.values_cache import keep_values, kept_values, made_from, values_path
from unified_edit.errors import MethodError, RunFolderError
from unified_edit.facts import Fact, members_of
from unified_edit.model.tensor_files import read_json, write_whole
from unified_edit.running.settings import Settings

log = logging.getLogger(__name__)

PIECES, LIST = "pieces", "pieces.json"
VALUES, STATISTICS = "values", "statistics"


@dataclass(frozen=True)
class Piece:
    """A part of the work that one process does alone.

    name: "values 3". files: below FOLDER/pieces; the piece is done when all are there. units: how
    many facts, or shares of the text, it is.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    units: int

    def done(self, there: frozenset[str]) -> bool:
        """Whether it is, given the files that are there."""
        return there.issuperset(self.files)


def files_there(folder: Path) -> frozenset[str]:
    """The finished files below FOLDER/pieces."""
    found = (folder / PIECES).glob("*/*.safetensors")  # names of unfinished ones begin with a dot
    return frozenset(f"{one.parent.name}/{one.name}" for one in found if one.name[0] != ".")


class Stage(Protocol):
    """The pieces of one kind, and how they are made."""

    pieces: tuple[Piece, ...]

    def make(self, place: int) -> None:
        """Compute the piece at a place, and write what is not there of it."""


class ValueStage:
    """v* of all facts of a plan, in pieces of so many facts (`Settings.piece`)."""

    def __init__(self, folder: Path, editor: Editor, settings: Settings) -> None:
        self.editor, self.settings = editor, settings
        self.plan = _plan(editor, settings)
        self.folder = folder / PIECES / VALUES
        self._wanted = made_from(self.plan)
        self._shape = (self.plan.weights[-1].d_out, 1)
        facts = self.plan.facts
        columns = [tuple(facts[i] for i in members) for members in members_of(self.plan.columns)]
        self._groups = _in_groups(columns, settings.piece)
        self.pieces = tuple(
            Piece(
                f"{VALUES} {number}",
                VALUES,
                tuple(f"{VALUES}/{self._path(column).name}" for column in group),
                sum(map(len, group)),
            )
            for number, group in enumerate(self._groups, start=1)
        )

    def _path(self, column: tuple[Fact, ...]) -> Path:
        return values_path(self.folder, self._wanted, column)

    def make(self, place: int) -> None:
        """All values of the piece, also those that are there: alone some would differ in bits."""
        group = self._groups[place]
        made = self.editor.optimise_values(
            [fact for column in group for fact in column],
            self.settings.method,
            on_shared_subject=self.settings.on_shared_subject,
        )
        for column in group:
            if not self._path(column).exists():
                keep_values(self.folder, self._wanted, made.of(column))

    def values(self) -> Values | None:
        """All of them, in the order of the plan; None where some are missing.

        Files that are damaged are taken away, with a warning, and are missing from then on.
        """
        found = []
        for column in (column for group in self._groups for column in group):
            one = kept_values(self.folder, self._wanted, column, self._shape)
            if one is None:
                self._path(column).unlink(missing_ok=True)
            found.append(one)
        there = [one for one in found if one is not None]
        if len(there) < len(found):
            log.warning("%d of %d values are computed again", len(found) - len(there), len(found))
            return None
        joined = Values.joined(there)
        return joined if joined.facts == self.plan.facts else joined.of(self.plan.facts)


def _plan(editor: Editor, settings: Settings) -> Plan:
    """What is to be edited; MethodError where its values depend on each other."""
    plan = editor.plan(
        settings.facts,
        settings.method,
        on_shared_subject=settings.on_shared_subject,
        on_conflict=settings.on_conflict,
    )
    if len(plan.turns) > 1:
        why = (
            f"{plan.method.name} writes facts one after another"
            if plan.method.sequential
            else "on_shared_subject='split' writes the batch in turns"
        )
        raise MethodError(
            f"{why}, each value is found on the model edited so far, so they cannot be computed "
            "apart; take EMMET or MEMIT (facts about one subject: on_shared_subject='merge')"
        )
    return plan


def _in_groups(columns: Sequence[tuple[Fact, ...]], size: int) -> list[list[tuple[Fact, ...]]]:
    """Columns in their order, so many that each group has `size` facts or just more."""
    groups: list[list[tuple[Fact, ...]]] = []
    room = 0
    for column in columns:
        if room <= 0:
            groups.append([])
            room = size
        groups[-1].append(column)
        room -= len(column)
    return groups


def write_list(folder: Path, pieces: Iterable[Piece]) -> None:
    """Say which pieces there are. RunFolderError if it cannot be written."""
    path = folder / LIST
    text = json.dumps([asdict(piece) for piece in pieces]) + "\n"
    try:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
    except OSError as problem:
        raise RunFolderError(
            f"{path} cannot be written: {problem}. Make room there, and start the run again"
        ) from problem


def read_list(folder: Path) -> list[Piece]:
    """The pieces that a folder says it has; none where no process came so far."""
    try:
        found: list[dict[str, Any]] = read_json(folder / LIST)
        return [Piece(**{**one, "files": tuple(one["files"])}) for one in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise RunFolderError(
            f"{folder / LIST} cannot be read ({problem}); delete it, the run writes it anew"
        ) from problem

"""Where a run stands, from its folder alone: no model is opened, and nothing is written."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_edit.editing import Edit
from unified_edit.errors import RunFolderError
from unified_edit.model.tensor_files import read_json
from unified_edit.running.pieces import STATISTICS, VALUES, Piece, files_there, read_list
from unified_edit.running.settings import Config, RunFolder
from unified_edit.running.workers import FAILED, WORKING, Seen, seen_in

if TYPE_CHECKING:
    import pandas as pd

EDIT, SUMMARY = "edit.safetensors", "summary.json"
#: What the units of a piece are: one, and several.
UNITS = {STATISTICS: ("share of the text", "shares of the text"), VALUES: ("fact", "facts")}


@dataclass(frozen=True, eq=False)
class RunState:
    """What a run's folder holds.

    pieces: all of them; there: the files of those that are done. workers: every process that ever
    worked in it. summary: what came out; None before the end.
    """

    folder: Path
    config: Config
    pieces: tuple[Piece, ...]
    there: frozenset[str]
    workers: tuple[Seen, ...]
    summary: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunState:
        """Look at a folder. Raises RunFolderError for one that is no run's."""
        place = RunFolder(folder)
        config = place.config()
        if config is None:
            raise RunFolderError(
                f"{place.path} holds no run: there is no config.json; give the folder of `run`"
            )
        pieces = tuple(read_list(place.path))
        summary = read_summary(place.path, config.digest)
        return cls(
            place.path, config, pieces, files_there(place.path), tuple(seen_in(place.path)), summary
        )

    @property
    def finished(self) -> bool:
        """Whether the edit is written."""
        return self.summary is not None

    @property
    def missing(self) -> tuple[Piece, ...]:
        """Pieces that are not done."""
        return () if self.finished else tuple(p for p in self.pieces if not p.done(self.there))

    @property
    def alive(self) -> tuple[Seen, ...]:
        """Processes at work."""
        return tuple(one for one in self.workers if one.alive)

    @property
    def edit(self) -> Edit:
        """What was written. Raises EditFileError before the end."""
        return Edit.load(self.folder / EDIT)

    @property
    def table(self) -> pd.DataFrame:
        """One row a kind of piece.

        Columns: what; pieces, and how many are done; units (facts, shares of the text), and how
        many of those; seconds of work so far, of all processes together; and of a piece.
        """
        import pandas as pd

        rows = []
        missing = {piece.name for piece in self.missing}
        for kind in dict.fromkeys(piece.kind for piece in self.pieces):
            of_kind = [piece for piece in self.pieces if piece.kind == kind]
            done = [piece for piece in of_kind if piece.name not in missing]
            seconds, each = self._seconds(kind)
            rows.append(
                {
                    "what": kind,
                    "pieces": len(of_kind),
                    "done": len(done),
                    "units": sum(piece.units for piece in of_kind),
                    "units done": sum(piece.units for piece in done),
                    "seconds": round(seconds, 1),
                    "a piece": each,
                }
            )
        return pd.DataFrame(rows)

    def _seconds(self, kind: str) -> tuple[float, float]:
        """Of all pieces of a kind that anybody says to have finished, and of one; NaN if none."""
        signs = [one.sign for one in self.workers if one.sign.config == self.config.digest]
        seconds = math.fsum(sign.seconds.get(kind, 0.0) for sign in signs)
        pieces = sum(sign.pieces.get(kind, 0) for sign in signs)
        return seconds, seconds / pieces if pieces else math.nan

    @property
    def left(self) -> float:
        """About how many seconds the processes at work still need for the pieces that are missing.

        For one process, if none is at work; NaN while no piece of a kind is done.
        """
        missing = Counter(piece.kind for piece in self.missing)
        work = math.fsum(count * self._seconds(kind)[1] for kind, count in missing.items())
        return work / max(1, len(self.alive))

    @property
    def told(self) -> str:
        """How much is done, in words."""
        if not self.pieces:
            return "nothing is done"
        missing = {piece.name for piece in self.missing}
        parts = []
        for kind in dict.fromkeys(piece.kind for piece in self.pieces):
            units = [(p.units, p.name not in missing) for p in self.pieces if p.kind == kind]
            done = sum(count for count, is_done in units if is_done)
            parts.append(f"{done} of {_counted(sum(count for count, _ in units), kind)}")
        return "done: " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary."""
        return {
            "folder": str(self.folder),
            "finished": self.finished,
            "pieces": self.table.to_dict("records"),
            "missing": [piece.name for piece in self.missing],
            "seconds_left": self.left,
            "workers": [
                {**vars(one.sign), "alive": one.alive, "age": round(one.age, 1)}
                for one in self.workers
            ],
            "summary": None if self.summary is None else dict(self.summary),
        }

    def lines(self) -> list[str]:
        """What a process is doing or did, a line each."""
        return [_line(one) for one in self.workers]


def _counted(count: int, kind: str) -> str:
    return f"{count:,} {UNITS[kind][count != 1]}"


def _line(seen: Seen) -> str:
    sign = seen.sign
    if seen.alive:
        doing = f"at work on {sign.piece}" if sign.piece else "at work"
    elif sign.state == WORKING:
        doing = f"gone without a word, at {sign.piece}" if sign.piece else "gone without a word"
    elif sign.state == FAILED:
        doing = f"failed: {sign.problem}"
    else:
        doing = "ended"
    done = ", ".join(_counted(count, kind) for kind, count in sign.units.items()) or "nothing"
    return f"{sign.name} ({sign.rank + 1} of {sign.processes}, {sign.device}): {doing}; did {done}"


def read_summary(folder: Path, config: str) -> dict[str, Any] | None:
    """What came out of the run with this configuration; None before its end."""
    try:
        found = read_json(folder / SUMMARY)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise RunFolderError(
            f"{folder / SUMMARY} cannot be read ({problem}); delete it, and start the run again: "
            "it is written anew"
        ) from problem
    return found if isinstance(found, dict) and found.get("config") == config else None


def duration(seconds: float) -> str:
    """Seconds as people say them: "8 s", "14 min", "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if minutes < 100 else f"{hours} h {rest} min"


def time_left(state: RunState) -> str:
    """What is to be added to a line about the work; nothing while that is not known."""
    if not state.missing or math.isnan(state.left):
        return ""
    processes = max(1, len(state.alive))
    return f"; about {duration(state.left)} left for {processes} process" + "es" * (processes > 1)

"""Answers as they come, one line for each record and state: in memory, or in a file that grows.

Such a file holds a JSON object a line. The first says what the answers were made from; each further
one holds what was answered about one record in one state, or why the record was left out; the last
says that all was asked. Lines are written whole and flushed, so that whatever interrupts the work
leaves a file that can be gone on with: at most the end of a line is lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from unified_edit.arguments import as_path
from unified_edit.errors import ReportFileError, brief
from unified_edit.facts import Fact, Record

FORMAT = "unified_edit.report/1"
_BEGINNING = b'{"format": "unified_edit.report/'
#: Columns of a table that hold numbers which need not be finite.
_NUMBERS = ("logp_new", "logp_true", "magnitude")

Line = dict[str, Any]


def digest_of(records: Sequence[Record | Fact]) -> str:
    """A short hash of all that records, or facts, hold, the same for equal ones."""
    text = json.dumps([asdict(record) for record in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class AnswerLines:
    """What was answered so far. Use it as a context: at its end the file is closed.

    made_from: everything that the answers depend on, as plain JSON, with the `states` of which
        there are answers about each record; a file that was made from something else is refused.
    to: a file, which is made, or gone on with; without it the lines stay in memory.

    Raises ReportFileError for a file that cannot be written, holds something else, or was made from
    something else.
    """

    def __init__(
        self,
        made_from: Mapping[str, Any],
        *,
        bootstrap: int,
        to: str | os.PathLike[str] | None = None,
    ) -> None:
        header = {"format": FORMAT, "made_from": dict(made_from), "bootstrap": bootstrap}
        self.header: Line = json.loads(json.dumps(header))
        self.path = None if to is None else as_path(to, "to", ReportFileError)
        self.finished = False
        self._digests: dict[int, str] = {}
        self._left_out: dict[int, str] = {}
        self._there: set[tuple[int, str]] = set()
        self._lines: list[Line] = []  # stays empty where there is a file
        self._file: BinaryIO | None = None
        if self.path is not None:
            with _system(self.path):
                self._open(self.path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists() and _begun(path)
        if begun:
            lines = read_lines(path)
            self._check(next(lines))
            for line in lines:
                self._note(line)
            with path.open("r+b") as handle:  # what a line that was being written left behind
                handle.truncate(_whole(path))
        self._file = path.open("ab" if begun else "wb")
        if not begun:
            self._write(self.header)

    def _check(self, header: Line) -> None:
        """Raise ReportFileError unless the file's answers are those that are asked for."""
        told = differences(self.header["made_from"], header["made_from"])
        if told:
            raise ReportFileError(
                f"{self.path} holds answers that were made from something else ({told}). Give "
                "another file, or delete this one"
            )

    def _note(self, line: Line) -> None:
        if "finished" in line:
            self.finished = True
            return
        place = (line["record"], line["when"])
        if place in self._there or self.finished:
            raise ReportFileError(
                f"{self.path} holds record {place[0]} ({place[1]}) twice, or lines behind its end: "
                "two runs wrote into it at once. Delete it"
            )
        self._there.add(place)
        self._digests[line["record"]] = line["digest"]
        if line.get("left_out"):
            self._left_out[line["record"]] = line["left_out"]

    def has(self, record: int, when: str) -> bool:
        """Whether the record was asked in this state (or left out)."""
        return (record, when) in self._there

    def why_not(self, record: int) -> str | None:
        """Why a record is left out; None if it is not."""
        return self._left_out.get(record)

    def expect(self, record: int, digest: str) -> None:
        """Raise ReportFileError if what is known under this number is another record."""
        if self._digests.get(record, digest) != digest:
            raise ReportFileError(
                f"{self.path} was made from other records: number {record} was another one. Give "
                "the same records in the same order, or another file"
            )

    def add(self, record: int, when: str, line: Mapping[str, Any]) -> None:
        """Keep what was answered about a record, as one line; the line needs its `digest`."""
        if self.finished:
            raise ReportFileError(
                f"{self.path} is finished, but there is a record {record} too. Give the same "
                "records, or another file"
            )
        whole = {"record": record, "when": when, **line}
        self._note(whole)
        self._write(whole)

    def finish(self, count: int) -> None:
        """Say that all `count` records were asked."""
        if self._digests and max(self._digests) >= count:
            raise ReportFileError(
                f"{self.path} holds {max(self._digests) + 1} records, but only {count} were given. "
                "Give the same records, or another file"
            )
        if not self.finished:
            self.finished = True
            self._write({"finished": True, "records": count})

    def _write(self, line: Line) -> None:
        if self._file is None or self.path is None:
            self._lines.append(line)
            return
        with _system(self.path):
            self._file.write(json.dumps(plain(line), allow_nan=False).encode() + b"\n")
            self._file.flush()

    def lines(self) -> Iterator[Line]:
        """All lines so far, the header first."""
        if self.path is not None:
            yield from read_lines(self.path)
        else:
            yield self.header
            yield from self._lines

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file, the header first; a line without an end is left out.

    Raises ReportFileError for a file that cannot be read, is none of these, or is damaged.
    """
    with _system(path), path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
                good = isinstance(line, dict) and _good(line, header=number == 1)
            except ValueError:
                good = False
            if number == 1 and (not good or line.get("format") != FORMAT):
                raise ReportFileError(
                    f"{path} is no file of answers, or one of another version of this library: its "
                    f"first line does not say {FORMAT!r}. Give another file"
                )
            if not good:
                raise ReportFileError(
                    f"{path}, line {number}: damaged. Delete the file, or this line and all behind "
                    "it, and do the same again"
                )
            yield {**line, "answers": [_read(one) for one in line.get("answers", ())]}


def _good(line: Line, *, header: bool) -> bool:
    """Whether a line holds what is read of it."""
    if header:
        made_from = line.get("made_from")
        needed = {"states", "seed", "known_only"}
        return isinstance(made_from, dict) and needed <= made_from.keys() and "bootstrap" in line
    return "finished" in line or (
        {"record", "when", "digest", "case_id", "relation"} <= line.keys()
        and isinstance(line["record"], int)
        and isinstance(line.get("answers", []), list)
    )


def _begun(path: Path) -> bool:
    """Whether there is a header to go on from; False where not even that was written wholly."""
    with path.open("rb") as handle:
        first = handle.readline()
    if first.endswith(b"\n"):
        return True
    if not (first.startswith(_BEGINNING) or _BEGINNING.startswith(first)):
        raise ReportFileError(f"{path} is there and is no file of answers; give another name")
    return False


def _whole(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        for end in range(size, 0, -4096):
            start = max(0, end - 4096)
            handle.seek(start)
            found = handle.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
    return 0


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What two things were made from that is not the same, name by name; empty if all is."""
    names = dict.fromkeys([*ours, *theirs])
    return "; ".join(
        f"{name}: {brief(theirs.get(name))} there, {brief(ours.get(name))} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    )


def plain(value: Any) -> Any:
    """JSON without NaN and infinities: null, and their names."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    # pandas.NA, without importing pandas for it
    return None if type(value).__name__ == "NAType" else value


def _read(answer: Line) -> Line:
    numbers = {name: answer[name] for name in _NUMBERS if name in answer}
    return {
        **answer,
        **{name: math.nan if one is None else float(one) for name, one in numbers.items()},
    }


@contextmanager
def _system(path: Path) -> Iterator[None]:
    """Turn what the system says against a file into a ReportFileError."""
    try:
        yield
    except OSError as problem:
        raise ReportFileError(
            f"{path} cannot be read or written ({problem.strerror}); give another place, or make "
            "room there"
        ) from problem

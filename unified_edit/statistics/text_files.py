"""Texts from files: what stands between them, and what is wrong with a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from unified_edit.errors import StatisticsFileError


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; StatisticsFileError if it cannot be read."""
    number = 0
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise StatisticsFileError(
            f"{path}, line {number}: not UTF-8 (byte {problem.start + 1} of the line). "
            "Save the file as UTF-8"
        ) from problem
    except OSError as problem:
        raise StatisticsFileError(
            f"{path}: cannot be read ({problem.strerror}); give text files"
        ) from problem


def check_texts(paths: Sequence[Path]) -> None:
    """Raise StatisticsFileError for a file that cannot be opened, before any work."""
    for path in paths:
        next(_lines(path), None)


def _paragraphs(path: Path) -> Iterator[Iterable[str]]:
    """The lines between blank ones."""
    for filled, lines in groupby(_lines(path), key=lambda line: bool(line.strip())):
        if filled:
            yield lines


def read_texts(paths: Sequence[Path], split: str | None = None) -> Iterator[str]:
    """The texts of files, in order, one file after another.

    split: "paragraphs": blank lines stand between texts; "lines": each line is a text; None: by
    lines for a file in which no blank line stands between others, else by paragraphs. Empty texts
    are left out. Raises StatisticsFileError with file and line for what is not UTF-8.
    """
    for path in paths:
        single = split is None and len(list(islice(_paragraphs(path), 2))) < 2
        for lines in _paragraphs(path):
            if single or split == "lines":
                yield from lines
            else:
                yield "\n".join(lines)

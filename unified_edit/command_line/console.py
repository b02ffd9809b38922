"""What the command line reads and writes itself: texts, small files, JSON, tables of text."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unified_edit.errors import StatisticsFileError, UnifiedEditError

#: Rows of a table for people; --json has all.
ROWS = 20
#: Characters of a cell.
CELL = 56


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; StatisticsError if it cannot be read."""
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as problem:
                    raise StatisticsFileError(
                        f"{path}, line {number}: not UTF-8 (byte {problem.start + 1} of the line). "
                        "Save the file as UTF-8"
                    ) from problem
                yield line.rstrip("\r\n")
    except OSError as problem:
        raise StatisticsFileError(
            f"{path}: cannot be read ({problem.strerror}); give text files"
        ) from problem


def check_texts(paths: Sequence[Path]) -> None:
    """Raise StatisticsFileError for a file that cannot be opened, before any work."""
    for path in paths:
        next(_lines(path), None)


def _has_paragraphs(path: Path) -> bool:
    """Whether a blank line stands between two others."""
    begun = blank = False
    for line in _lines(path):
        if not line.strip():
            blank = begun
        elif blank:
            return True
        else:
            begun = True
    return False


def read_texts(paths: Sequence[Path], split: str | None = None) -> Iterator[str]:
    """The texts of files, in order, one file after another.

    split: "paragraphs": blank lines stand between texts; "lines": each line is a text; None: by
    lines for a file in which no blank line stands between others, else by paragraphs. Empty texts
    are left out. Raises StatisticsFileError with file and line for what is not UTF-8.
    """
    for path in paths:
        by_lines = split == "lines" or (split is None and not _has_paragraphs(path))
        text: list[str] = []
        for line in _lines(path):
            if line.strip():
                text.append(line)
            if text and (by_lines or not line.strip()):
                yield "\n".join(text)
                text = []
        if text:
            yield "\n".join(text)


def check_free(path: Path, force: bool) -> None:
    """Raise before any work unless a file can be written to `path`."""
    if path.exists() and not path.is_file():
        raise UnifiedEditError(f"{path} is there and is not a file; give another name")
    if path.exists() and not force:
        raise UnifiedEditError(f"{path} is there already; give another name, or --force")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UnifiedEditError(f"{path} cannot be written: {parent} is not a writable folder")


def check_peft(folder: Path) -> None:
    """Raise before any work unless an adapter can be written to `folder`."""
    from importlib.util import find_spec

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnifiedEditError(f"{folder} is not an empty folder; give a new one for the adapter")
    if find_spec("peft") is None:
        raise UnifiedEditError("--peft needs PEFT: pip install 'unified_edit[peft]'")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into a UnifiedEditError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise UnifiedEditError(f"{path} cannot be written: {problem}. Choose another") from problem


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises UnifiedEditError where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", newline="")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def to_json(document: Mapping[str, Any]) -> str:
    """Indented JSON in ASCII, in which a number that is not finite is null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = " ".join(str(value).splitlines())
    return text if len(text) <= CELL else text[: CELL - 3] + "..."


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first `ROWS` rows as text: columns of numbers to the right, all others to the left."""
    shown = rows[:ROWS]
    lines = [[*rows[0]], *([_cell(value) for value in row.values()] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [all(type(row[name]) in (int, float) for row in shown) for name in rows[0]]
    text = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    more = [f"... and {len(rows) - ROWS} more (--json shows all)"] if len(rows) > ROWS else []
    return "\n".join(["  " + line for line in [*text, *more]])

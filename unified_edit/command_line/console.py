"""What the command line writes itself: small files, JSON, tables of text."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from unified_edit.errors import UnifiedEditError
from unified_edit.measuring.report import as_text
from unified_edit.model.tensor_files import written_whole

#: Rows of a table for people; --json has all.
ROWS = 20
#: Characters of a cell.
CELL = 56


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into a UnifiedEditError."""
    try:
        yield
    except OSError as problem:
        raise UnifiedEditError(
            f"{path} cannot be written: {problem}. Give another place, or make room there"
        ) from problem


def check_place(path: Path, force: bool = False, *, folder: bool = False) -> None:
    """Raise before any work unless a file can be written to `path`, or an adapter to a folder."""
    with _writing(path):
        there = path.exists()
        if folder and there and (not path.is_dir() or any(path.iterdir())):
            raise UnifiedEditError(f"{path} is not an empty folder; give a new one for the adapter")
        if not folder and there and not path.is_file():
            raise UnifiedEditError(f"{path} is there and is not a file; give another name")
        if not folder and there and not force:
            raise UnifiedEditError(f"{path} is there already; give another name, or --force")
        parent = next(above for above in path.absolute().parents if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UnifiedEditError(
            f"{path} cannot be written: {parent} is not a writable folder; give another place"
        )
    if folder and find_spec("peft") is None:
        raise UnifiedEditError("--peft needs PEFT: pip install 'unified_edit[peft]'")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises UnifiedEditError where that fails."""
    with _writing(path), written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


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
    text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= CELL else text[: CELL - 3] + "..."


def format_table(table: pd.DataFrame) -> str:
    """The first `ROWS` rows as text: columns of numbers to the right, all others to the left."""
    texts = table.select_dtypes(exclude="number").columns
    more = len(table) - ROWS
    note = f"\n  ... and {more} more (--json shows all)" if more > 0 else ""
    return as_text(table.head(ROWS).astype(object).map(_cell), texts) + note

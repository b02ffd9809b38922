"""The rows of a sweep on disk as they come, with what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unified_edit.editing.editor import Editor
from unified_edit.editing.methods import Method
from unified_edit.errors import MethodError
from unified_edit.facts import Record
from unified_edit.model.tensor_files import write_whole
from unified_edit.statistics import KeyStatistics

FORMAT = "unified_edit.sweep/1"


def description(
    editor: Editor,
    method: Method,
    records: Sequence[Record],
    seed: int,
    statistics: KeyStatistics,
) -> dict[str, Any]:
    """Everything that a row depends on, besides its layers and its clamp."""
    asked = json.dumps([asdict(record) for record in records], sort_keys=True, default=dict)
    plain = {k: v for k, v in method.to_dict().items() if k not in ("layers", "clamp")}
    return {
        "format": FORMAT,
        "model": editor.parts.name,
        "fingerprint": editor.ledger.fingerprint(),
        "origin": editor.parts.origin,
        "method": plain,
        "facts": [str(record.fact) for record in records],
        "records": hashlib.sha256(asked.encode()).hexdigest(),
        "seed": seed,
        "statistics": asdict(statistics.source),
        "library": version("unified_edit"),
    }


class SweepFile:
    """Rows of a sweep; kept at `path`, if there is one.

    Raises MethodError if the file cannot be read or was made from something else.
    """

    def __init__(self, path: Path | None, made_from: Mapping[str, Any]) -> None:
        self.path = path
        self.made_from = json.loads(json.dumps(made_from))
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            first, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            found = dict(first)
            self.rows = [{**row, "layers": list(row["layers"])} for row in rows]
        except (OSError, ValueError, TypeError, LookupError) as problem:
            raise MethodError(
                f"{path} is no file of a sweep ({problem}); give another place, or delete it"
            ) from problem
        wrong = [key for key, value in self.made_from.items() if found.get(key) != value]
        if wrong:
            key = wrong[0]
            raise MethodError(
                f"{path} holds a sweep that was made from something else: {', '.join(wrong)} "
                f"differ ({key} is {str(found.get(key))[:80]} there and "
                f"{str(self.made_from[key])[:80]} now); give another place, or delete it"
            )

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; the file is whole at any moment. MethodError if it cannot be written."""
        self.rows.append(row)
        if self.path is None:
            return
        lines = [json.dumps(one) for one in (self.made_from, *self.rows)]
        try:
            write_whole(self.path, "\n".join(lines) + "\n")
        except OSError as problem:
            raise MethodError(
                f"{self.path} cannot be written: {problem}. Give another place, or make room there"
            ) from problem

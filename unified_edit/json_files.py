"""JSON files whose errors say where they are: file, line, field, and what was expected there."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unified_edit.errors import FactFileError
from unified_edit.facts import brief

_GAP = re.compile(r"[\s,]*")
# Names that other toolkits give to the same fields.
_ALIASES = {
    "target": "target_new", "new_target": "target_new", "object": "target_new", "alt": "target_new",
    "ground_truth": "target_true", "answer": "target_true", "old_target": "target_true",
    "template": "prompt", "question": "prompt", "src": "prompt", "neighbors": "neighbours",
    "neighborhood_prompts": "neighbours", "paraphrase_prompts": "paraphrases",
}  # fmt: skip
_JSON_NAMES = {str: "a string", dict: "an object", list: "a list", int: "a whole number",
               float: "a number", bool: "true/false", type(None): "null"}  # fmt: skip


class _DuplicateField(ValueError):
    """A JSON object gives the same field twice, of which `json` would keep the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, n in counts.items() if n > 1]:
        raise _DuplicateField(f"field {twice[0]!r} is given twice")
    return dict(pairs)


class Fields:
    """One object of a file, with its place there, from which fields are taken by name and type."""

    def __init__(self, values: object, where: str, number: int) -> None:
        self.where, self.number = where, number
        if not isinstance(values, dict):
            raise FactFileError(
                f"{where}: expected an object {{...}} with named fields, got {_kind(values)}, "
                f'{brief(values)}. Write {{"prompt": ..., "subject": ..., ...}}.'
            )
        self.values: dict[str, Any] = values

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def optional(self, name: str, *kinds: type) -> Any:
        """The field's value, or None where it is absent or null."""
        value = self.values.get(name)
        # bool is a subclass of int, but `true` is no whole number
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            return value
        expected = " or ".join(_JSON_NAMES[kind] for kind in kinds)
        raise FactFileError(
            f"{self.where}: field {name!r} must be {expected}, got {_kind(value)}, {brief(value)}."
        )

    def take(self, name: str, *kinds: type) -> Any:
        """The field's value; a `FactFileError` where it is missing, null or of another type."""
        value = self.optional(name, *kinds)
        if value is None:
            expected = " or ".join(_JSON_NAMES[kind] for kind in kinds)
            found = ", ".join(map(repr, self.values)) or "none"
            raise FactFileError(
                f"{self.where}: field {name!r} is missing, expected {expected}; "
                f"fields found: {found}."
            )
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where the field is absent."""
        items = self.optional(name, list) or ()
        for i, item in enumerate(items):
            if not isinstance(item, str):
                raise FactFileError(
                    f"{self.where}: field {name!r} must be a list of strings, item {i} is "
                    f"{_kind(item)}, {brief(item)}."
                )
        return tuple(items)

    def inside(self, name: str) -> Fields:
        """The object that the field holds."""
        return Fields(self.take(name, dict), f"{self.where}, in {name!r}", self.number)

    def groups(self, name: str) -> Iterator[tuple[str, list[Fields]]]:
        """The objects of a field `{group: [object, ...], ...}`; none where it is absent."""
        inside = self.inside(name) if name in self else self
        for group in inside.values if inside is not self else ():
            items = enumerate(inside.optional(group, list) or ())
            place = f"{inside.where}, {group!r}"
            yield group, [Fields(item, f"{place}[{i}]", self.number) for i, item in items]

    def only(self, allowed: tuple[str, ...]) -> None:
        """A `FactFileError` for a field that is none of `allowed`."""
        for name in self.values:
            if name in allowed:
                continue
            alias = _ALIASES.get(name)
            near = difflib.get_close_matches(name, allowed, n=1)
            guess = alias if alias in allowed else near[0] if near else None
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise FactFileError(
                f"{self.where}: unknown field {name!r}.{hint} Expected fields: "
                f"{', '.join(map(repr, allowed))}."
            )


def _kind(value: object) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FactFileError(
            f"{path}: no such file (looked in {path.absolute().parent}). Check the path."
        ) from error
    except OSError as error:
        raise FactFileError(f"{path}: cannot be read, {error.strerror}. Give a file.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FactFileError(
            f"{path}, line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8."
        ) from error


def _list_items(path: Path, text: str) -> Iterator[Fields]:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise FactFileError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON, {error.msg}. "
            "The file must be one list [{...}, {...}]."
        ) from error
    # The list is known to be well formed; it is decoded again item by item for the line numbers.
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position, line, counted, number = text.index("[") + 1, 1, 0, 0
    while text[position := _GAP.match(text, position).end()] != "]":  # type: ignore[union-attr]
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        where = f"{path}, item {number} (line {line})"
        try:
            value, position = decoder.raw_decode(text, position)
        except _DuplicateField as error:
            raise FactFileError(f"{where}: {error}. Keep one of them.") from error
        yield Fields(value, where, number)


def _line_items(path: Path, text: str) -> Iterator[Fields]:
    # Not splitlines(): JSON strings may hold the other characters that it takes for line ends.
    number = 0
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number += 1
        where = f"{path}, line {line_number}"
        try:
            value = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise FactFileError(
                f"{where}, column {error.colno}: not valid JSON, {error.msg}. Each line must hold "
                "one whole object {...}; otherwise the file must be a list [{...}, {...}]."
            ) from error
        except _DuplicateField as error:
            raise FactFileError(f"{where}: {error}. Keep one of them.") from error
        yield Fields(value, where, number)


def read_objects(path: Path) -> list[Fields]:
    """The objects of a file, which is a JSON list or holds one JSON object a line, in UTF-8.

    Raises `FactFileError`, naming the file and the line, where it is neither.
    """
    text = _read_text(path)
    items = list((_list_items if text.lstrip().startswith("[") else _line_items)(path, text))
    if not items:
        raise FactFileError(f"{path}: the file holds nothing. Write at least one object {{...}}.")
    return items

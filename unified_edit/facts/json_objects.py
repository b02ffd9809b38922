"""JSON files whose errors say where they are: file, line, field, and what was expected there."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unified_edit.errors import FactFileError, brief

_JSON_NAMES = {str: "a string", dict: "an object", list: "a list", int: "a whole number",
               float: "a number", bool: "true/false", type(None): "null"}  # fmt: skip
# Far above any number of a fact, and near the least limit that Python may be set to.
_DIGITS = 600


def _of_type(value: object, kinds: tuple[type, ...], what: str) -> Any:
    """`value`, if it is of one of `kinds`; else a `FactFileError` about `what`."""
    # bool is a subclass of int, but `true` is no whole number
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    got = _JSON_NAMES.get(type(value), type(value).__name__)
    if not isinstance(value, (list, dict)):  # these may be nested too deeply to be shown
        got += f", {brief(value)}"
    raise FactFileError(f"{what} must be {_names(kinds)}, got {got}.")


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(_JSON_NAMES[kind] for kind in kinds)


class Fields:
    """One object of a file, with its place there, from which fields are taken by name and type.

    `notes` says what a reader left out; `used` are the names of the fields that were asked for.
    """

    def __init__(self, values: object, where: str, number: int) -> None:
        self.where, self.number = where, number
        self.values: dict[str, Any] = _of_type(values, (dict,), f"{where}: each item")
        self.used: set[str] = set()
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def optional(self, name: str, *kinds: type) -> Any:
        """The field's value, or None where it is absent or null."""
        self.used.add(name)
        value = self.values.get(name)
        return None if value is None else _of_type(value, kinds, f"{self.where}: field {name!r}")

    def take(self, name: str, *kinds: type) -> Any:
        """The field's value; a `FactFileError` where it is missing, null or of another type."""
        value = self.optional(name, *kinds)
        if value is None:
            found = ", ".join(map(repr, self.values)) or "none"
            raise FactFileError(
                f"{self.where}: field {name!r} is missing, expected {_names(kinds)}; "
                f"fields found: {found}."
            )
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where the field is absent."""
        return tuple(
            _of_type(item, (str,), f"{self.where}: item {i} of field {name!r}")
            for i, item in enumerate(self.optional(name, list) or ())
        )

    def answers(self, name: str) -> tuple[str, ...]:
        """The strings that are not blank, in order, of a string or of lists of whatever depth."""
        found: list[str] = []
        waiting = [self.optional(name, str, list)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting += reversed(value)
            elif value is not None:
                text = _of_type(value, (str,), f"{self.where}: an entry of field {name!r}")
                found += [text] if text.strip() else []
        return tuple(found)

    def inside(self, name: str) -> Fields:
        """The object that the field holds."""
        return Fields(self.take(name, dict), f"{self.where}, in {name!r}", self.number)

    def groups(self, name: str) -> Iterator[tuple[str, list[Fields]]]:
        """The objects of a field `{group: [object, ...], ...}`; none where it is absent or null.

        A bare object counts as a list of one, and a bare list as a group called like the field.
        """
        given = self.optional(name, dict, list) or {}
        groups = given if isinstance(given, dict) else {name: given}
        inside = Fields(groups, f"{self.where}, in {name!r}", self.number)
        for group in groups:
            items = inside.optional(group, list, dict) or []
            place = f"{inside.where}, {group!r}"
            listed = enumerate(items if isinstance(items, list) else [items])
            yield group, [Fields(item, f"{place}[{i}]", self.number) for i, item in listed]

    def only(self, allowed: tuple[str, ...]) -> None:
        """A `FactFileError` for a field that is none of `allowed`."""
        for name in self.values:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise FactFileError(
                    f"{self.where}: unknown field {name!r}.{hint} Expected fields: "
                    f"{', '.join(map(repr, allowed))}."
                )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"field {twice!r} is given twice. Keep one of them.")
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON. Write null, or leave the field out.")


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits)} digits. Shorten it or write it as a string.")
    return int(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_number, parse_int=_whole
)  # fmt: skip


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FactFileError(
            f"{path}: no such file (looked in {path.absolute().parent}). Check the path."
        ) from error
    except OSError as error:
        raise FactFileError(f"{path}: cannot be read, {error.strerror}. Give a file.") from error
    try:
        text, fault = data.decode(), data.find(b"\0")  # valid in UTF-8, but a sign of UTF-16
    except UnicodeDecodeError as error:
        text, fault = "", error.start
    if fault >= 0:
        line = data.count(b"\n", 0, fault) + 1
        raise FactFileError(
            f"{path}, line {line}: not UTF-8 text (byte {fault}). Save the file as UTF-8."
        )
    return text.removeprefix("\ufeff")


def _decoded(decode: Callable[..., Any], where: str, *text_and_position: Any) -> Any:
    try:
        return decode(*text_and_position)
    except json.JSONDecodeError as error:
        fault = f"not valid JSON, {error.msg} (line {error.lineno}, column {error.colno})."
        fault += " A file holds one list [{...}, {...}], or one object {...} a line."
    except ValueError as error:
        fault = str(error)
    except RecursionError:
        fault = "lists or objects are nested too deeply. A fact needs no more than five levels."
    raise FactFileError(f"{where}: {fault}")


def read_objects(path: Path) -> list[Fields]:
    """The objects of a file, which is a JSON list or holds one JSON object a line, in UTF-8.

    Raises `FactFileError`, naming the file and the line, where it is neither.
    """
    text = _read_text(path)
    listed = text.lstrip().startswith("[")
    gap = re.compile(r"[\s,]*" if listed else r"\s*")
    position, line, counted = text.index("[") + 1 if listed else 0, 1, 0
    items: list[Fields] = []
    while True:
        position = gap.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text) or (listed and text[position] == "]"):
            break
        line += text.count("\n", counted, position)
        counted, number = position, len(items) + 1
        where = f"{path}, item {number} (line {line})" if listed else f"{path}, line {line}"
        value, position = _decoded(_DECODER.raw_decode, where, text, position)
        items.append(Fields(value, where, number))
    if listed:  # so far nothing was seen of the commas, nor of what follows the list
        _decoded(_DECODER.decode, str(path), text)
    if not items:
        raise FactFileError(f"{path}: the file holds nothing. Write at least one object {{...}}.")
    return items

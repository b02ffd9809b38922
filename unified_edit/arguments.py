"""What callers write for numbers and paths, made plain: numpy's and torch's numbers count too."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unified_edit.errors import UnifiedEditError, brief


def is_flag(value: object) -> bool:
    """Whether `value` is a truth value, Python's or another library's: never a number here."""
    return "bool" in type(value).__name__ or "bool" in str(getattr(value, "dtype", ""))


def whole_number(
    value: object,
    name: str,
    error: type[UnifiedEditError],
    *,
    least: int | None = None,
    below: int | None = None,
    advice: str = "",
) -> int:
    """`value` as an int: of Python, numpy or a tensor of one entry, but no truth value.

    Raises `error` for anything else, and outside of ``least <= value < below``.
    """
    number = None
    if not is_flag(value):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if (
        number is None
        or (least is not None and number < least)
        or (below is not None and number >= below)
    ):
        bounds = {"of at least": least, "below": below}
        raise _refusal(error, name, value, "a whole number", bounds, advice)
    return number


def real_number(
    value: object,
    name: str,
    error: type[UnifiedEditError],
    *,
    least: float | None = None,
    above: float | None = None,
    advice: str = "",
) -> float:
    """`value` as a finite float: of Python, numpy or a tensor of one entry, but no truth value.

    Raises `error` for anything else, and unless ``least <= value`` and ``above < value``.
    """
    number = math.nan
    if not is_flag(value):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            # Not float(value) itself: it warns of tensors with a gradient, and reads texts.
            plain = value.item() if hasattr(value, "item") else value
            if hasattr(plain, "__float__") or hasattr(plain, "__index__"):
                number = float(plain)
    too_low = (least is not None and number < least) or (above is not None and number <= above)
    if not math.isfinite(number) or too_low:
        bounds = {">=": least, ">": above}
        raise _refusal(error, name, value, "a finite number", bounds, advice)
    return number


def _refusal(
    error: type[UnifiedEditError],
    name: str,
    value: object,
    kind: str,
    bounds: Mapping[str, float | None],
    advice: str,
) -> UnifiedEditError:
    given = [f"{word} {bound:.12g}" for word, bound in bounds.items() if bound is not None]
    wanted = f"{kind} {' and '.join(given)}".rstrip()
    return error(f"{name} is {brief(value)}; it must be {wanted}{advice and f'. {advice}'}")


def as_path(
    value: object,
    name: str,
    error: type[UnifiedEditError],
    *,
    advice: str = "give the path of a file or folder",
) -> Path:
    """A path as users write it: text or `os.PathLike`, with ``~`` for their home folder.

    Raises `error` for anything else, for an empty text, for a text that no file can be called, and
    where there is no such home.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not text:
        raise error(f"{name} is {brief(value)}; {advice}")
    if isinstance(text, bytes) or "\0" in text:
        raise error(f"{name} is {brief(value)}; a path is text without NUL characters")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except (RuntimeError, UnicodeEncodeError) as problem:
        raise error(f"{name} is {brief(value)}: {problem}; write the path out") from problem


def as_list(value: Any) -> list[Any]:
    """`value` as a list: the entries of a list of any kind, or a single thing alone.

    A text is a single thing, and so is an array of no dimension.
    """
    single = isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0
    return list(value) if isinstance(value, Iterable) and not single else [value]

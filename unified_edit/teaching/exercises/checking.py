"""What the checks of a reader's function share: running it, and saying what is wrong.

A check runs the function with `call`, reads what came back with `tensor` or `number`, compares
with `agree`, and ends in ``return right("...")``. All of these raise `ExerciseError`, whose message
is written for the reader and names the likely mistake.
"""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_edit.errors import UnifiedEditError

#: Relative error at which two float64 results count as equal: far above rounding in the small,
#: well-conditioned examples of the checks, far below what a wrong formula does.
TOLERANCE = 1e-6


class ExerciseError(UnifiedEditError):
    """A reader's function is not right yet; the message says in which respect."""

    def _render_traceback_(self) -> list[str]:
        """In a notebook the message alone: the frames of the check would teach nothing."""
        return [f"ExerciseError: {self}"]


def right(sentence: str) -> str:
    """What a check returns when all is well; `sentence` says what was checked."""
    return f"Right. {sentence}"


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 entries, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected` (or the norm itself where that is 0)."""
    expected = expected.detach().double()
    scale = float(expected.norm()) or 1.0
    return float((got.detach().double() - expected).norm()) / scale


def call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What the reader's function returns for copies of the arguments.

    Raises ExerciseError if it is no function, does not take them, raises, returns nothing, or
    changes one of them.
    """
    name = name_of(function)
    if not callable(function):
        raise ExerciseError(
            f"the check wants your function itself, and was given {kind_of(function)}: write the "
            "name of the function without parentheses"
        )
    given, named = _copied(arguments), _copied(keywords)
    try:
        inspect.signature(function).bind(*given, **named)
    except TypeError as problem:
        count = len(arguments) + len(keywords)
        raise ExerciseError(
            f"{name} must take {count} argument{'s' * (count != 1)}, and does not: {problem}. "
            "Keep the first line of the exercise as it stands"
        ) from None
    except ValueError:
        pass  # built in: its signature cannot be known
    try:
        result = function(*given, **named)
    except ExerciseError:
        raise
    except Exception as problem:
        raise ExerciseError(
            f"{name} raised {type(problem).__name__}: {problem}{_place(problem, function)}"
        ) from problem
    for label, before, after in _pairs(function, arguments, given, keywords, named):
        if not _same(before, after):
            raise ExerciseError(
                f"{name} changed its argument {label}, which whoever calls it still needs: work "
                "on a copy (`.clone()`), and avoid `+=` and functions that end in `_`"
            )
    if result is None or result is Ellipsis:
        raise ExerciseError(f"{name} returned nothing: put your code in, and end it with `return`")
    return result


def tensor(value: Any, shape: Sequence[int], what: str) -> Tensor:
    """`value` as a float64 tensor of this shape; `what` names it to the reader ("W", "the key").

    Raises ExerciseError if it is something else, has another shape, or is not finite.
    """
    shape = tuple(shape)
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        raise ExerciseError(
            f"{what} must be one tensor, and you returned {kind_of(value)} of {len(value)}"
        )
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):
            raise ExerciseError(
                f"{what} must be a tensor of shape {_text(shape)}, and you returned "
                f"{kind_of(value)}"
            ) from None
    if value.is_complex():
        raise ExerciseError(f"{what} must be real, and you returned complex numbers")
    got = tuple(value.shape)
    if got != shape:
        hint = ""
        if got == shape[::-1]:
            hint = ": this is the shape of its transpose. Columns are facts, everywhere"
        elif [n for n in got if n != 1] == [n for n in shape if n != 1]:
            hint = ": an axis of length one is too many or missing (`keepdim`, `[:, None]`?)"
        elif sorted(got) == sorted(shape):
            hint = ": the axes are in another order"
        elif shape == ():
            hint = ": one number is asked for (a sum or mean is missing?)"
        raise ExerciseError(f"{what} must have shape {_text(shape)}, yours has {_text(got)}{hint}")
    value = value.detach().double().cpu()
    if not bool(torch.isfinite(value).all()):
        raise ExerciseError(
            f"{what} holds entries that are not finite: a division by zero, the logarithm of zero, "
            "or an overflow of `exp`?"
        )
    return value


def number(value: Any, what: str) -> float:
    """`value` as a finite float: a Python number, or a tensor without axes."""
    return float(tensor(value, (), what))


def agree(
    got: Tensor | float,
    expected: Tensor | float,
    what: str,
    mistakes: Mapping[str, Tensor | float] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Hold the reader's result against the right one.

    `mistakes` maps a message to the result that one gets by making that mistake; the first that
    fits is told. Without one, a transpose, a sign and a constant factor are recognised.
    Raises ExerciseError where the relative error is above `tolerance`.
    """
    a, b = _as_tensor(got), _as_tensor(expected)
    if relative_error(a, b) <= tolerance:
        return
    for message, wrong in (mistakes or {}).items():
        candidate = _as_tensor(wrong)
        # A mistake that makes no difference here explains nothing.
        if relative_error(candidate, b) <= tolerance or candidate.shape != a.shape:
            continue
        if relative_error(a, candidate) <= max(tolerance, TOLERANCE):
            raise ExerciseError(f"{what} is not right: {message}")
    raise ExerciseError(f"{what} is not right: {_difference(a, b)}")


def name_of(function: Any) -> str:
    """How messages call the reader's function."""
    return f"`{getattr(function, '__name__', 'your function')}`"


def kind_of(value: Any) -> str:
    """A type, for a sentence: "a list", "an int", "nothing"."""
    if value is None or value is Ellipsis:
        return "nothing"
    word = type(value).__name__
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double().cpu()
    return torch.tensor(float(value), dtype=torch.float64)


def _difference(got: Tensor, expected: Tensor) -> str:
    """What can be said about a wrong result without knowing the exercise."""
    if not float(got.norm()):
        return "it is zero"
    if relative_error(got, -expected) <= TOLERANCE:
        return "its sign is the wrong way round"
    square = got.ndim == 2 and got.shape[0] == got.shape[1]
    if square and relative_error(got, expected.T) <= TOLERANCE:
        return "it is the transpose of the right one"
    if got.ndim and float(expected.norm()):
        factor = float((got * expected).sum() / (expected * expected).sum())
        if factor and relative_error(got, factor * expected) <= TOLERANCE:
            return f"it is {factor:.4g} times what it should be (a missing mean or factor?)"
    if not got.ndim:
        return f"you have {float(got):.4g}, it should be {float(expected):.4g}"
    error = relative_error(got, expected)
    return f"its entries differ from the right ones, by {error:.2g} relative to their norm"


def _copied(value: Any) -> Any:
    """Copies of tensors and containers; a model or a tokenizer is passed on as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(entry) for entry in value)
    if isinstance(value, (set, bytearray)):
        return copy.copy(value)
    return value


def _same(before: Any, after: Any) -> bool:
    """Whether two values are equal, tensors bit by bit (NaN equals NaN)."""
    if isinstance(before, Tensor):
        same = before.shape == after.shape and before.dtype == after.dtype
        return same and bool(
            torch.equal(before.nan_to_num(), after.nan_to_num())
            and torch.equal(before.isnan(), after.isnan())
        )
    if isinstance(before, np.ndarray):
        return before.shape == after.shape and bool(np.array_equal(before, after, equal_nan=True))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[k], after[k]) for k in before)
    if type(before) in (list, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, (set, bytearray)):
        return bool(before == after)
    if isinstance(before, float) and math.isnan(before):
        return math.isnan(after)
    return True


def _pairs(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    given: tuple[Any, ...],
    keywords: dict[str, Any],
    named: dict[str, Any],
) -> list[tuple[str, Any, Any]]:
    """Each argument with its name, as it was and as the function left it."""
    try:
        names = [f"`{name}`" for name in inspect.signature(function).parameters]
    except ValueError:
        names = []
    names += [f"number {number}" for number in range(len(names) + 1, len(arguments) + 1)]
    pairs = list(zip(names, arguments, given, strict=False))
    return pairs + [(f"`{key}`", keywords[key], named[key]) for key in keywords]


def _place(problem: BaseException, function: Callable[..., Any]) -> str:
    """The line of the reader's own code in which it was raised."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not isinstance(code, CodeType):
        return ""
    trace: TracebackType | None = problem.__traceback__
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if frame.filename == code.co_filename and (frame.line or "").strip()
    ]
    return f" (in the line `{frames[-1].line}`)" if frames else ""


def _text(shape: Sequence[int]) -> str:
    """A shape for a sentence."""
    return "() (one number)" if not shape else str(tuple(shape))

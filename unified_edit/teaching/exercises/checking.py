"""What the checks of a reader's function share: reading what came back, and saying what is wrong.

A check runs the function (`calling`), reads what came back with `tensor`, `number` or `pair`,
compares with `agree`, and ends in ``return right("...")``. All of these raise `ExerciseError`,
whose message is written for the reader. It names a mistake only if that mistake gives the reader's
very result; of any other it says what is wrong with it, and not how that may have come about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_edit.errors import UnifiedEditError

#: Relative error at which two float64 results count as equal: far above rounding in the small,
#: well-conditioned examples of the checks, far below what a wrong formula does.
TOLERANCE = 1e-6
FEW_DIGITS = "There are no more digits in it than float32 holds: compute in float64"
_ROUNDED = (
    "no more digits than float32 holds: compute in float64, the type of the arguments "
    "(`torch.zeros` and `torch.eye` need `dtype=torch.float64`)"
)
Mistakes = Mapping[str, Tensor | float | tuple[Tensor, ...]]
#: Factors that are told of a single number; any other is a multiple of the right one, too.
_FACTORS = [sign * f for n in (2, 3, 4, 8, 10) for f in (n, 1 / n) for sign in (1, -1)]


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


def tensor(value: Any, shape: Sequence[int], what: str) -> Tensor:
    """`value` as a float64 tensor of this shape; `what` names it to the reader ("W", "the key").

    Raises ExerciseError if it is something else, has another shape, or is not finite.
    """
    shape = tuple(shape)
    value = _numbers(value, shape, what)
    got = tuple(value.shape)
    if got != shape:
        hint = ""
        if len(shape) == 2 and got == shape[::-1]:
            hint = ": this is the shape of its transpose"
        elif [n for n in got if n != 1] == [n for n in shape if n != 1]:
            hint = ": an axis of length one is too many or missing (`keepdim`, `[:, None]`?)"
        elif sorted(got) == sorted(shape):
            hint = ": the axes are in another order"
        elif shape == ():
            hint = ": one number is asked for (a sum or mean is missing?)"
        raise ExerciseError(f"{what} must have shape {_text(shape)}, yours has {_text(got)}{hint}")
    if not bool(torch.isfinite(value).all()):
        raise ExerciseError(
            f"{what} must be finite, and in yours there is NaN or infinity: a division by zero, "
            "the logarithm of zero, or an overflow of `exp`?"
        )
    return value


def number(value: Any, what: str) -> float:
    """`value` as a finite float: a Python number, or a tensor without axes."""
    return float(tensor(value, (), what))


def pair(value: Any, what: str) -> tuple[Any, Any]:
    """The two things that a function should return; `what` says which: "lambda and Delta"."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == 2:
        return value[0], value[1]
    many = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    raise ExerciseError(
        f"two things are asked for, {what}, and you returned {kind_of(value)}{many}"
    )


def agree(
    got: Tensor | float,
    expected: Tensor | float,
    what: str,
    mistakes: Mistakes | None = None,
    tolerance: float = TOLERANCE,
    otherwise: str = "",
) -> None:
    """Hold the reader's result against the right one.

    `mistakes` maps a message to the result, or the tuple of results, that one gets by making that
    mistake; the first that fits to rounding is told. Without one, a transpose, a sign and a
    constant factor are recognised. What fits nothing is told by how much it is off, and then
    `otherwise`, which has to be true of this result. Raises ExerciseError where the relative
    error is above `tolerance`.
    """
    a, b = _as_tensor(got), _as_tensor(expected)
    if a.shape != b.shape:
        shapes = f"shape {_text(b.shape)}, yours has {_text(a.shape)}"
        raise ExerciseError(f"{what} must have {shapes}")
    if relative_error(a, b) <= tolerance:
        return
    be = "are" if _plural(what) else "is"
    cause = recognised(a, b, what, mistakes, tolerance)
    if cause is None:
        more = (otherwise, FEW_DIGITS if bool(b.any()) and single(a) and not _is_simple(a) else "")
        cause = ". ".join([_difference(a, b, what), *filter(None, more)])
    raise ExerciseError(f"{what} {be} not right: {cause}")


def recognised(
    got: Tensor,
    expected: Tensor,
    what: str,
    mistakes: Mistakes | None = None,
    tolerance: float = TOLERANCE,
) -> str | None:
    """What is wrong with `got`, if it is one of the `mistakes` or a common slip; else None."""
    close = max(tolerance, TOLERANCE)
    for message, wrong in (mistakes or {}).items():
        for candidate in map(_as_tensor, wrong if isinstance(wrong, tuple) else (wrong,)):
            # A mistake that makes no difference here explains nothing.
            if candidate.shape != got.shape or relative_error(candidate, expected) <= tolerance:
                continue
            scale = float(candidate.norm() or expected.norm())
            if float((got - candidate).norm()) <= close * scale:
                return message
    it, its, be = ("they", "their", "are") if _plural(what) else ("it", "its", "is")
    size, square = float(expected.norm()), got.ndim == 2 and got.shape[0] == got.shape[-1]
    if not size:
        return None
    if not float(got.norm()):
        return f"{it} {be} zero"
    if relative_error(got, -expected) <= close:
        return f"{its} sign is the wrong way round"
    if square and relative_error(got, expected.T) <= close:
        return f"{it} {be} the transpose of the right one"
    error = relative_error(got, expected)
    if _is_rounded(got, expected):
        return f"{it} {be} off by {error:.0e} only, with {_ROUNDED}"
    factor = float((got * expected).sum()) / size**2
    if abs(factor - 1) < 1e-3 and relative_error(got, factor * expected) <= 1e-3 * abs(factor - 1):
        more = (
            f"too {'large' if factor > 1 else 'small'} by {abs(factor - 1):.1e} of the right value"
        )
        return f"{it} {be} {more}: was something small added, left out or rounded?"
    plain = error > close and (
        got.ndim or any(math.isclose(factor, n, rel_tol=close) for n in _FACTORS)
    )
    if plain and factor and relative_error(got, factor * expected) <= close:
        return f"{it} {be} {factor:.4g} times what {it} should be"
    return None


def single(value: Tensor) -> bool:
    """Whether no entry has a digit that float32 would not hold."""
    return torch.equal(value.float().double(), value)


def refuse_rounded(got: Tensor, expected: Tensor, what: str) -> None:
    """Say so where a result is right but for rounding to float32 or to less.

    For a result that is compared in other coordinates, where that could not be seen any more.
    """
    error = relative_error(got, expected)
    if error > TOLERANCE and _is_rounded(got, expected):
        be = "are" if _plural(what) else "is"
        raise ExerciseError(f"{what} {be} off by {error:.0e} only, with {_ROUNDED}")


def _is_simple(value: Tensor) -> bool:
    """Whether these are numbers of a few binary digits, which say nothing about their type."""
    return torch.equal(value.bfloat16().double(), value)


def _is_rounded(got: Tensor, expected: Tensor) -> bool:
    return relative_error(got, expected) < 1e-2 and single(got) and not single(expected)


def apart(a: float, b: float) -> tuple[str, str]:
    """Two different numbers with as many digits as it takes to see that."""
    for digits in range(4, 17):
        if f"{a:.{digits}g}" != f"{b:.{digits}g}":
            break
    return f"{a:.{digits}g}", f"{b:.{digits}g}"


def name_of(function: Any) -> str:
    """How messages call the reader's function."""
    name = getattr(function, "__name__", "<lambda>")
    return "your function" if name == "<lambda>" else f"`{name}`"


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


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """`value` in float64, whatever its shape; `shape` is what was asked for."""
    asked = f"one tensor of shape {_text(shape)}" if shape else "one number"
    many = isinstance(value, (tuple, list))
    if many and any(isinstance(part, Tensor) for part in value):
        alike = all(isinstance(p, Tensor) and p.shape == value[0].shape for p in value)
        hint = ": `torch.stack` makes one of them" if shape and alike else ""
        raise ExerciseError(
            f"{what} must be {asked}, and you returned {kind_of(value)} of {len(value)}{hint}"
        )
    try:
        if isinstance(value, Tensor):
            value = value.detach()
            value = value.to_dense() if value.layout != torch.strided else value
        else:
            array = np.asarray(value)
            if array.dtype.kind not in "biufc":
                raise TypeError
            value = torch.from_numpy(array)
        numbers = value.cpu().double() if not value.is_complex() else value
    except (TypeError, ValueError, RuntimeError):  # torch's NotImplementedError is of the last
        inside = " of something else than numbers" if many else ""
        raise ExerciseError(
            f"{what} must be {asked}, and you returned {kind_of(value)}{inside}"
        ) from None
    if value.is_complex():
        raise ExerciseError(f"{what} must be real, and you returned complex numbers")
    if value.dtype == torch.bool:
        raise ExerciseError(f"{what} must be {asked}, and you returned True or False")
    return numbers


def _difference(got: Tensor, expected: Tensor, what: str) -> str:
    """By how much a result is off about which nothing else is known."""
    it, its = ("they", "their") if _plural(what) else ("it", "its")
    if not got.ndim:
        have, should = apart(float(got), float(expected))
        return f"you have {have}, {it} should be {should}"
    if not float(expected.norm()):
        return f"{it} should be zero, and {its} largest entry is {float(got.abs().max()):.2g}"
    off = (got - expected).abs() > TOLERANCE * float(expected.abs().max())
    wrong = off.nonzero().tolist()
    if wrong and 2 * len(wrong) < off.numel():
        place = tuple(wrong[0])
        have, should = apart(float(got[place]), float(expected[place]))
        where = f"[{', '.join(map(str, place))}]"
        if len(wrong) == 1:
            return f"one entry is off: at {where} you have {have}, and {should} should be there"
        return (
            f"{len(wrong)} of {off.numel()} entries are off: at {where}, for one, you have {have}, "
            f"and {should} should be there"
        )
    error = relative_error(got, expected)
    return f"{its} entries differ from the right ones, by {error:.2g} relative to their norm"


def _plural(what: str) -> bool:
    """Whether a thing is many: "the parts of 4 layers", but not "the loss"."""
    return re.match(r"the \w*[^s\W]s\b", what) is not None


def _text(shape: Sequence[int]) -> str:
    """A shape for a sentence."""
    return "() (one number)" if not shape else str(tuple(shape))

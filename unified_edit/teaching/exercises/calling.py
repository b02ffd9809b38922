"""Running a reader's function: on copies, with its faults told, and watched where needed.

`call` runs it. A `Watch` runs it too, and notes what it asks of torch, for exercises that ask for
a result without an inverse, or without ever making a matrix.
"""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unified_edit.teaching.exercises.checking import ExerciseError, kind_of, name_of

FLOAT64 = "`torch.zeros` and `torch.eye` make float32: give them `dtype=torch.float64`"
#: Condition from which a matrix has no inverse that float64 could tell from noise.
SINGULAR = 1e14
#: Functions of torch that make an inverse, under the names that readers write.
_INVERSES = {
    "linalg_inv": "torch.linalg.inv",
    "linalg_inv_ex": "torch.linalg.inv_ex",
    "inverse": "inverse",
    "linalg_pinv": "torch.linalg.pinv",
    "pinverse": "pinverse",
    "linalg_tensorinv": "torch.linalg.tensorinv",
    "cholesky_inverse": "torch.cholesky_inverse",
}
#: Functions that solve a system: where its matrix stands, and where its right-hand side.
_SOLVERS = {
    "linalg_solve": (0, 1),
    "linalg_solve_ex": (0, 1),
    "linalg_solve_triangular": (0, 1),
    "cholesky_solve": (1, 0),
}


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
        said = f": {problem}" if str(problem) else ""
        mixed = "same dtype" in said or "Float but found Double" in said
        hint = f". {FLOAT64}" if mixed else ""
        place = _place(problem, function)
        raise ExerciseError(
            f"{name} raised {type(problem).__name__}{said}{place}{hint}"
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


class Watch(TorchFunctionMode):
    """Calls a reader's function and notes what it asks of torch.

    Numpy is not seen, but for the name `inv` in the function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        #: Inverses that were made, as a reader writes them.
        self.inverses: list[str] = []
        #: Function, size and condition of every square matrix inverted, factored or solved with.
        self.systems: list[tuple[str, int, float]] = []
        #: All matrices that were made on the way.
        self.made: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        """What `call` returns, with the notes of this call added to those of earlier ones."""
        with self:
            return call(self.function, *arguments)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note a call of torch, then let it be."""
        keywords = dict(kwargs or {})
        self._note(getattr(func, "__name__", ""), args, keywords)
        result = func(*args, **keywords)
        if isinstance(result, Tensor) and result.ndim >= 2 and _is_plain(result):
            self.made.append(result.detach())
        return result

    def _note(self, name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        given = [*args, *keywords.values()]
        tensors = [value for value in given if isinstance(value, Tensor) and _is_plain(value)]
        if not tensors:
            return
        matrix, negative = tensors[0], any(type(n) is int and n < 0 for n in given)
        if name in _SOLVERS and len(tensors) > 1:
            first, second = _SOLVERS[name]
            matrix, right = tensors[first], tensors[second]
            if _is_identity(right):
                self.inverses.append(f"{name.replace('linalg_', '')} with the identity")
        elif name in _INVERSES and ("pin" not in name or _is_square(matrix)):
            self.inverses.append(_INVERSES[name])
        elif "matrix_power" in name and negative:
            self.inverses.append("matrix_power with a negative power")
        elif not name.startswith("linalg_cholesky"):
            return
        if _is_square(matrix) and bool(matrix.isfinite().all()):
            condition = float(torch.linalg.cond(matrix.detach().double()))
            self.systems.append((name, len(matrix), condition))

    def hardest(self, size: int) -> float:
        """The largest condition of a matrix of this size that was solved with; 0 without one."""
        return max((system[2] for system in self.systems if system[1] == size), default=0.0)

    def singular(self) -> int:
        """Size of a matrix without an inverse that was inverted or solved with; 0 without one.

        A pseudoinverse of such a matrix is no mistake.
        """
        sizes = [
            n for name, n, condition in self.systems if condition > SINGULAR and "pin" not in name
        ]
        return sizes[0] if sizes else 0

    def refuse_inverses(self, advice: str) -> None:
        """Raise ExerciseError if an inverse was made; `advice` says what to do instead."""
        code = getattr(self.function, "__code__", None)
        if "inv" in getattr(code, "co_names", ()):
            self.inverses.append("inv")
        if self.inverses:
            raise ExerciseError(
                f"the numbers are right. But {name_of(self.function)} makes an inverse "
                f"(`{self.inverses[0]}`), and the exercise asks for them without one: {advice}"
            )

    def has_made(self, matrix: Tensor) -> bool:
        """Whether these very numbers stood in a matrix on the way, or in one of a stack."""
        return any(
            part.shape[-2:] == shaped.shape
            and bool(((part.double() - shaped).norm(dim=(-2, -1)) <= 1e-9 * shaped.norm()).any())
            for shaped in (matrix, matrix.T)
            for part in self.made
        )


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
    kind: Any = next((k for k in (Tensor, np.ndarray, dict) if isinstance(before, k)), type(before))
    if not isinstance(after, kind):
        return False
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
    plain = isinstance(before, (bool, int, float, str))
    return bool(before == after) if plain else before is after


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


def _is_plain(value: Tensor) -> bool:
    """Whether its entries are real numbers that can be looked at."""
    dense = value.layout == torch.strided and value.device.type != "meta"
    return dense and not value.is_complex() and value.dtype != torch.bool


def _is_square(matrix: Tensor) -> bool:
    return matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]


def _is_identity(matrix: Tensor) -> bool:
    """Whether it is the identity, of more than one row."""
    same = _is_square(matrix) and len(matrix) > 1
    return same and torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))

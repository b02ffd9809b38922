"""Checks for the exercises of the chapter "One fact, three algorithms"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, number, right
from unified_edit.teaching.exercises.updates import moment

Solution = Callable[..., Any]


def apart(C0: Tensor, y: Tensor, k: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """What y k' C0^-1 - z m' C0^-1 costs, :eq:`one-fact-distance`: one number."""
    return y @ y * _inner(C0, k, k) + z @ z * _inner(C0, m, m) - 2 * y @ z * _inner(C0, k, m)


def _inner(C0: Tensor, k: Tensor, m: Tensor) -> Tensor:
    """k' C0^-1 m."""
    product: Tensor = k @ torch.linalg.solve(C0, m)
    return product


def check_apart(apart_: Solution) -> str:
    """Check ``apart(C0, y, k, z, m)``: tr(D C0 D') of D = y k' C0^-1 - z m' C0^-1, a number.

    C0 is (d_k x d_k), the columns y and z are (d_out,), the keys k and m are (d_k,). Raises
    ExerciseError.
    """
    for d, d_out, length in ((4, 3, 1.0), (3, 2, -1.8), (5, 4, 0.6)):
        C0, y, k = moment(100 + d, d), draw(110 + d, d_out), draw(120 + d, d)
        z = length * (y + 0.8 * draw(130 + d, d_out))
        m = k + 0.7 * draw(140 + d, d)
        of_first, of_second = y @ y * _inner(C0, k, k), z @ z * _inner(C0, m, m)
        columns, rows = y @ z, _inner(C0, k, m)
        expected = apart(C0, y, k, z, m)
        ordinary = torch.outer(y, torch.linalg.solve(C0, k)) - torch.outer(
            z, torch.linalg.solve(C0, m)
        )
        what = "the cost of the difference"
        agree(
            number(call(apart_, C0, y, k, z, m), what),
            expected,
            what,
            {
                "this is its root; the cost is a square": expected.sqrt(),
                "the mixed term is missing: what the two updates have in common is not paid": (
                    of_first + of_second
                ),
                "the mixed term has the wrong sign: this is the cost of the sum": (
                    of_first + of_second + 2 * columns * rows
                ),
                "the mixed term occurs twice, once for each order of the two": (
                    of_first + of_second - columns * rows
                ),
                "this is the difference of the two costs; the updates are subtracted first": (
                    of_first - of_second
                ),
                "this is the squared norm of the difference; the cost has C0 in it": (
                    ordinary.square().sum()
                ),
                "you took the ordinary product of the keys; it is k' C0^-1 m": (
                    y @ y * (k @ k) + z @ z * (m @ m) - 2 * columns * (k @ m)
                ),
                "you have k' C0 m where k' C0^-1 m belongs": (
                    y @ y * (k @ C0 @ k) + z @ z * (m @ C0 @ m) - 2 * columns * (k @ C0 @ m)
                ),
                "the mixed term has the lengths of the columns; it has their product y'z": (
                    of_first + of_second - 2 * y.norm() * z.norm() * rows
                ),
                "it is relative to the first update's cost; the cost itself is asked for": (
                    expected / of_first
                ),
            },
        )
    return right("Three numbers decide: two costs, and what columns and rows have in common.")

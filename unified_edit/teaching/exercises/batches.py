"""Checks for the exercises of the chapter "Batch after batch"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import TOLERANCE, agree, draw, right, tensor
from unified_edit.teaching.exercises.updates import moment, other_lam

Solution = Callable[..., Any]


def held_and_weighed(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """Least squares for the new facts, while the keys of :eq:`held-update` are held.

    With lam = 0 it is :eq:`held-update` itself: (d_out x d_k).
    """
    L = torch.linalg.cholesky(C0)
    return _damped(_outside(_whitened(L, past), _whitened(L, K)), R, lam) @ torch.linalg.inv(L)


def _whitened(L: Tensor, K: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, K, upper=False)


def _outside(past: Tensor, K: Tensor) -> Tensor:
    """What of K is orthogonal to the columns of `past`."""
    Q = torch.linalg.qr(past).Q
    for _ in range(2):
        K = K - Q @ (Q.T @ K)
    return K


def _damped(A: Tensor, R: Tensor, lam: float) -> Tensor:
    """R (A'A + lam I)^-1 A'."""
    gram = A.T @ A + lam * torch.eye(A.shape[1], dtype=A.dtype)
    solved: Tensor = torch.linalg.solve(gram, A.T)
    return R @ solved


def check_held_and_weighed(held_and_weighed_: Solution) -> str:
    """Check ``held_and_weighed(C0, past, K, R, lam) -> Delta``.

    The minimiser of lam tr(Delta C0 Delta') + norm(Delta K - R)^2 among those with Delta past = 0.
    C0 is (d_k x d_k), past is (d_k x n), K is (d_k x E), R is (d_out x E). Tried with more facts
    than there is room for, too. Raises ExerciseError.
    """
    for seed, n, E, lam in ((3, 2, 3, 0.7), (4, 4, 2, 5.0), (5, 3, 6, 0.2)):
        d, d_out = 6, 3
        C0, past = moment(seed, d), draw(seed + 10, d, n)
        K, R = draw(seed + 20, d, E), draw(seed + 30, d_out, E)
        what = f"Delta of {E} facts while {n} others are held"
        found = tensor(call(held_and_weighed_, C0, past, K, R, lam), (d_out, d), what)
        expected = held_and_weighed(C0, past, K, R, lam)
        L = torch.linalg.cholesky(C0)
        back, identity = torch.linalg.inv(L), torch.eye(d, dtype=torch.float64)
        A, A_past = _whitened(L, K), _whitened(L, past)
        alone = _damped(A, R, lam)
        inside = _outside(A_past, A)
        both = torch.cat([A_past, A], dim=1)
        asked = torch.cat([torch.zeros(d_out, n, dtype=torch.float64), R], dim=1)
        leak = float((found @ past).norm() / (found.norm() * past.norm()).clamp_min(1e-300))
        agree(
            found,
            expected,
            what,
            {
                "the past is left out: this is least squares for the new facts alone": (
                    alone @ back
                ),
                "the past is weighed like the new facts (a soft history); it is to be held": (
                    _damped(both, asked, lam) @ back
                ),
                "this is the update that knows nothing of the past, made to leave it alone "
                "afterwards; solve with what is left of the new keys instead": (
                    _outside(A_past, alone.T).T @ back
                ),
                "the new facts are held, and lam does not enter; they are to be weighed": (
                    _damped(inside, R, 0.0) @ back if n + E <= d else expected
                ),
                "the keys were made orthogonal to the past before they were whitened; there they "
                "are not orthogonal any more, and the past moves": (
                    _damped(_whitened(L, _outside(past, K)), R, lam) @ back
                ),
                "C0 does not enter; whiten the keys first": (
                    _damped(_outside(past, K), R, lam) @ identity
                ),
                "this is the whitened update B = Delta L; Delta is B L^-1": (
                    _damped(inside, R, lam)
                ),
                "the whitened update was multiplied by L; Delta is B L^-1": (
                    _damped(inside, R, lam) @ L
                ),
                **dict.fromkeys(other_lam(found @ L, identity, inside, R, lam), found),
            },
            otherwise=(
                f"Delta past must be zero, and is {leak:.2g} of the product of their norms"
                if leak > TOLERANCE
                else "Delta past = 0 holds"
            ),
        )
    return right("The earlier facts stay where they are, and lam weighs the new ones alone.")

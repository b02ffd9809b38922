"""Checks for the exercises of the chapter "What an edit breaks"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, right, tensor
from unified_edit.teaching.exercises.updates import moment

Solution = Callable[..., Any]


def overlap(C0: Tensor, K: Tensor, X: Tensor) -> Tensor:
    """For each column of X the share of its whitened length in the span of the whitened K: (n,)."""
    L = torch.linalg.cholesky(C0)
    return _inside(_whitened(L, K), _whitened(L, X))


def _whitened(L: Tensor, K: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, K, upper=False)


def _inside(A: Tensor, X: Tensor) -> Tensor:
    """Cosine of each column of X with the span of A."""
    Q = torch.linalg.qr(A).Q
    return (Q.T @ X).norm(dim=0) / X.norm(dim=0)


def check_overlap(overlap_: Solution) -> str:
    """Check ``overlap(C0, K, X) -> cosines``.

    C0 is (d_k x d_k), K is (d_k x E), X is (d_k x n); the result has one number for each column of
    X. Raises ExerciseError.
    """
    for seed, d, E, n in ((3, 7, 1, 4), (4, 8, 3, 5), (5, 6, 4, 3)):
        C0, K, X = moment(seed, d), draw(seed + 10, d, E), draw(seed + 20, d, n)
        X[:, -1] = K[:, 0] + 0.3 * X[:, -1]  # one that is near an edited key
        what = f"the overlap of {n} keys"
        found = tensor(call(overlap_, C0, K, X), (n,), what)
        L = torch.linalg.cholesky(C0)
        A, a = _whitened(L, K), _whitened(L, X)
        expected = _inside(A, a)
        each = (A / A.norm(dim=0)).T @ (a / a.norm(dim=0))
        inverse = torch.linalg.inv(C0)
        agree(
            found,
            expected,
            what,
            {
                "the keys are not whitened; angles are measured after L^-1": _inside(K, X),
                "this is the square; the overlap is a ratio of lengths": expected**2,
                "this is the room, what lies outside of the edited keys": (
                    (1 - expected**2).clamp_min(0).sqrt()
                ),
                "this is the cosine with the nearest edited key alone; take the span of all": (
                    each.abs().max(dim=0).values if E > 1 else expected
                ),
                "the edited keys are taken to be orthogonal to each other; they are not": (
                    each.norm(dim=0) if E > 1 else expected
                ),
                "it is not divided by the length of the whitened key": expected * a.norm(dim=0),
                "the keys are multiplied by C0^-1, which whitens twice; use L^-1": (
                    _inside(inverse @ K, inverse @ X)
                ),
                "the keys are multiplied by L; they are whitened by L^-1": (_inside(L @ K, L @ X)),
            },
        )
    return right("The overlap is a cosine in the metric of C0, with the span of all edited keys.")

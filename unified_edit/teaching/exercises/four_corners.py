"""Checks for the exercises of the chapter "The 2×2 table"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import Mistakes, agree, draw, right, tensor

Solution = Callable[..., Any]


def projected(C0: Tensor, K: Tensor, R: Tensor, mu: float, theta: float) -> Tensor:
    """R (mu I + K'PK)^-1 K'P with P on the directions of C0 below theta: (d_out x d_k)."""
    values, vectors = torch.linalg.eigh(C0)
    N = vectors[:, values < theta]
    return _damped(N.T @ K, R, mu) @ N.T


def _damped(A: Tensor, R: Tensor, mu: float) -> Tensor:
    """R (A'A + mu I)^-1 A'."""
    gram = A.T @ A + mu * torch.eye(A.shape[1], dtype=A.dtype)
    solved: Tensor = torch.linalg.solve(gram, A.T)
    return R @ solved


def check_projected(projected_: Solution) -> str:
    """Check ``projected(C0, K, R, mu, theta) -> Delta``.

    The least squares of mu norm(Delta)^2 + norm(Delta K - R)^2 among the Delta that act on the
    eigenvectors of C0 (d_k x d_k) below theta alone; with mu = 0 the smallest with Delta K = R.
    K is (d_k x E), R is (d_out x E). Raises ExerciseError.
    """
    d, d_out = 8, 3
    for seed, E, mu, theta in ((3, 2, 0.7, 0.9), (4, 2, 0.0, 0.6), (5, 3, 2.0, 0.35)):
        vectors = torch.linalg.qr(draw(seed, d, d)).Q
        values = torch.tensor([0.02, 0.1, 0.3, 0.4, 0.7, 1.2, 2.5, 6.0], dtype=torch.float64)
        C0 = (vectors * values) @ vectors.T
        C0 = (C0 + C0.T) / 2
        K, R = draw(seed + 10, d, E), draw(seed + 20, d_out, E)
        what = f"Delta for mu = {mu:g}"
        found = tensor(call(projected_, C0, K, R, mu, theta), (d_out, d), what)
        below = values < theta
        N, out = vectors[:, below], vectors[:, ~below]
        large = vectors[:, values < theta * values[-1]]
        expected = _damped(N.T @ K, R, mu) @ N.T
        L = torch.linalg.cholesky(C0)
        A = torch.linalg.solve_triangular(L, K, upper=False)
        soft = _damped(A, R, mu) @ torch.linalg.inv(L)
        white = values[below].rsqrt()[:, None]
        mistakes: Mistakes = {
            "it acts on the directions from theta on; the projector keeps those below": (
                _damped(out.T @ K, R, mu) @ out.T if out.shape[1] >= E or mu else expected
            ),
            "nothing is projected: this is the update for the identity in the place of P": (
                _damped(K, R, mu)
            ),
            "this is the upper row of the table, with the inverse of C0; P is a projector": soft,
            "the update of the upper row was projected afterwards; project the keys and solve": (
                soft @ N @ N.T
            ),
            "the update without a projector was projected afterwards; solve with the projected "
            "keys instead": _damped(K, R, mu) @ N @ N.T,
            "inside of the null space the prices are still those of C0; there they are all 1": (
                _damped(white * (N.T @ K), R, mu) @ (N * white[:, 0]).T
            ),
            "mu does not enter": _damped(N.T @ K, R, 0.0) @ N.T,
            "theta is taken relative to the largest eigenvalue; it is absolute here": (
                _damped(large.T @ K, R, mu) @ large.T
            ),
        }
        agree(found, expected, what, mistakes, otherwise=_said(found, N, K, R, mu))
    return right("The update acts below the threshold alone, and there all directions cost 1.")


def _said(found: Tensor, N: Tensor, K: Tensor, R: Tensor, mu: float) -> str:
    """What is true of a result that fits no known mistake."""
    leak = float((found - found @ N @ N.T).norm() / found.norm().clamp_min(1e-300))
    if leak > 1e-6:
        return f"Delta must be zero above theta, and has {leak:.2g} of its size there"
    if mu == 0.0 and (missed := float((found @ K - R).norm() / R.norm())) > 1e-6:
        return f"With mu = 0 Delta K must be R, and is off by {missed:.2g}"
    return ""

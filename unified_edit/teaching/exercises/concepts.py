"""Checks for the exercises of the chapter "The same objective in a picture model"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import Mistakes, agree, draw, right, tensor

Solution = Callable[..., Any]


def concept_weight(
    W0: Tensor, K: Tensor, V: Tensor, K_p: Tensor, lam: float, a: float, b: float
) -> Tensor:
    """The W of :eq:`concepts-published`: (d_out x d)."""
    left = lam * W0 + a * V @ K.T + b * W0 @ K_p @ K_p.T
    return left @ torch.linalg.inv(_moment(K_p, lam, b) + a * K @ K.T)


def spill(k: Tensor, X: Tensor, K_p: Tensor, lam: float, b: float) -> Tensor:
    """The c(x) of :eq:`concepts-spill` for every column of X."""
    z = torch.linalg.solve(_moment(K_p, lam, b), k)
    return (z @ X) / (1 + z @ k)


def _moment(K_p: Tensor, lam: float, b: float) -> Tensor:
    return lam * torch.eye(len(K_p), dtype=K_p.dtype) + b * K_p @ K_p.T


def check_concept_weight(concept_weight_: Solution) -> str:
    """Check ``concept_weight(W0, K, V, K_p, lam, a, b) -> W``.

    W0 is (d_out x d), K is (d x E), V is (d_out x E), K_p is (d x n), once with n = 0. The
    minimiser of lam norm(W - W0)^2 + a norm(W K - V)^2 + b norm((W - W0) K_p)^2. Raises
    ExerciseError.
    """
    d, d_out = 6, 3
    for seed, E, n, lam, a, b in ((3, 2, 3, 0.7, 2.0, 0.4), (4, 3, 2, 0.2, 0.5, 3.0),
                                  (5, 2, 0, 0.5, 3.0, 1.5)):  # fmt: skip
        W0, K, V = draw(seed, d_out, d), draw(seed + 10, d, E), draw(seed + 20, d_out, E)
        K_p = draw(seed + 30, d, n) if n else torch.zeros(d, 0, dtype=torch.float64)
        what = f"W for {E} edited and {n} preserved concepts"
        found = tensor(call(concept_weight_, W0, K, V, K_p, lam, a, b), (d_out, d), what)
        expected = concept_weight(W0, K, V, K_p, lam, a, b)
        none = torch.zeros(d_out, E, dtype=torch.float64)
        bracket = _moment(K_p, lam, b) + a * K @ K.T
        mistakes: Mistakes = {
            "this is Delta; W is W0 + Delta": expected - W0,
            "a and b are exchanged": concept_weight(W0, K, V, K_p, lam, b, a),
            "a counts in one of the two brackets alone": (
                (lam * W0 + V @ K.T + b * W0 @ K_p @ K_p.T) @ torch.linalg.inv(bracket)
            ),
            "the weights a and b do not enter": concept_weight(W0, K, V, K_p, lam, 1.0, 1.0),
            "the preserved concepts do not enter": concept_weight(W0, K, V, K_p[:, :0], lam, a, b),
            "the preserved concepts are asked to give zero; they are to give W0 K_p": (
                (lam * W0 + a * V @ K.T) @ torch.linalg.inv(bracket)
            ),
            "the residual is V; it is V - W0 K": (W0 + a * V @ K.T @ torch.linalg.inv(bracket)),
            "the edited concepts give zero; they are to give V": (
                concept_weight(W0, K, none, K_p, lam, a, b)
            ),
            "the ridge is a; it is 1/a": concept_weight(W0, K, V, K_p, lam, 1 / a, b),
        }
        agree(found, expected, what, mistakes)
    return right("It is the minimum of the three terms, and the published formula.")


def check_spill(spill_: Solution) -> str:
    """Check ``spill(k, X, K_p, lam, b) -> c``.

    k is (d,), X is (d x n), K_p is (d x m), once with m = 0; the result has n numbers, those of
    :eq:`concepts-spill` with a = 1. Raises ExerciseError.
    """
    d = 6
    for seed, n, m, lam, b in ((3, 4, 2, 0.7, 0.6), (4, 3, 3, 0.3, 5.0), (5, 3, 0, 2.0, 0.5)):
        k, X = draw(seed, d, 1)[:, 0], draw(seed + 10, d, n)
        K_p = draw(seed + 20, d, m) if m else torch.zeros(d, 0, dtype=torch.float64)
        what = f"c of {n} texts while {m} concepts are preserved"
        found = tensor(call(spill_, k, X, K_p, lam, b), (n,), what)
        M = _moment(K_p, lam, b)
        z = torch.linalg.solve(M, k)
        mistakes: Mistakes = {
            "this is k'C_p^-1 x; it is divided by 1 + k'C_p^-1 k": z @ X,
            "the 1 is left out: with it c(k) is a little less than one": (z @ X) / (z @ k),
            "C_p is not inverted": (M @ k @ X) / (1 + k @ M @ k),
            "the preserved concepts do not enter": spill(k, X, K_p[:, :0], lam, b),
            "lam does not enter": spill(k, X, K_p, 1.0, b),
            "b does not enter": spill(k, X, K_p, lam, 1.0),
            "this is the cosine in the metric C_p^-1; c is not divided by the length of x": (
                (z @ X) / ((z @ k) * (X * torch.linalg.solve(M, X)).sum(dim=0)).sqrt()
            ),
        }
        agree(found, spill(k, X, K_p, lam, b), what, mistakes)
    return right("Everything goes the same way, and c says how far.")

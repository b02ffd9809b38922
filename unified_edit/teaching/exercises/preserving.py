"""Checks for the exercises of the chapter "What to preserve"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.checking import ExerciseError, agree, call, draw, right, tensor


def mean_second_moment(K0: Tensor) -> Tensor:
    """C0 = K0 K0' / N (d_k x d_k), :eq:`preserve-c0`, of keys K0 (d_k x N)."""
    return K0 @ K0.T / K0.shape[1]


def key_rarities(C0: Tensor, K: Tensor) -> Tensor:
    """k' C0^-1 k for each column of K (d_k x E), :eq:`preserve-price`: (E,)."""
    factor = torch.linalg.cholesky(C0)
    return torch.linalg.solve_triangular(factor, K, upper=False).square().sum(dim=0)


def shrunk_moment(C0: Tensor, eps: float) -> Tensor:
    """C0 + eps * tr(C0) / d_k * I, :eq:`preserve-shrinkage`: (d_k x d_k)."""
    return C0 + eps * C0.trace() / len(C0) * _identity(len(C0))


def _identity(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def check_second_moment(second_moment: Callable[[Tensor], Any]) -> str:
    """Check ``second_moment(K0) -> C0``: (d_k x d_k), the mean of k k' over the columns of K0.

    Raises ExerciseError.
    """
    for K0 in (draw(0, 3, 7) + 1, draw(1, 5, 2)):
        d, N = K0.shape
        centred = K0 - K0.mean(dim=1, keepdim=True)
        C0 = tensor(call(second_moment, K0), (d, d), f"C0 of {N} keys with {d} entries")
        agree(
            C0,
            mean_second_moment(K0),
            "C0",
            {
                "this is the sum over keys; divide by N, the number of columns": K0 @ K0.T,
                "you divided by d_k, the number of rows; N is the number of columns": K0 @ K0.T / d,
                "you divided by N - 1; that belongs to a covariance, of which a mean was "
                "subtracted": K0 @ K0.T / (N - 1),
                "you subtracted the mean key; a shift that all values share must be counted too": (
                    centred @ centred.T / N
                ),
                "this is a covariance, as `torch.cov` makes it: the mean key was subtracted and "
                "N - 1 used": centred @ centred.T / (N - 1),
            },
        )
    return right("It is the mean of k k' over the columns, and no mean key was subtracted.")


def check_rarities(rarities: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``rarities(C0, K)``: k' C0^-1 k for each of the E columns of K, as (E,).

    C0 is (d_k x d_k), K is (d_k x E). Raises ExerciseError.
    """
    C0 = mean_second_moment(draw(2, 4, 9))
    factor = torch.linalg.cholesky(C0)
    K = draw(3, 4, 3)
    solved = torch.linalg.solve(C0, K)
    expected = key_rarities(C0, K)
    given = call(rarities, C0, K)
    if isinstance(given, Tensor) and tuple(given.shape) == (3, 3):
        raise ExerciseError(
            "for 3 keys you returned 3 x 3 numbers, probably K' C0^-1 K: the rarities are its "
            "diagonal, and the rest need not be computed (`(K * solved).sum(dim=0)`)"
        )
    agree(
        tensor(given, (3,), "the rarities of 3 keys"),
        expected,
        "the rarities",
        {
            "this is k' C0 k, the mean square of the preserved keys' components along k; the "
            "inverse belongs in between": (K * (C0 @ K)).sum(dim=0),
            "this is the price, one over the rarity": 1 / expected,
            "this is the norm of L^-1 k; square it": expected.sqrt(),
            "this is the squared norm of C0^-1 k; it is k' times that vector": (
                solved.square().sum(dim=0)
            ),
            "you solved with the transpose of L: C0 = L L', so k' C0^-1 k = |L^-1 k|^2": (
                torch.linalg.solve_triangular(factor.T, K, upper=True).square().sum(dim=0)
            ),
            "you summed over the entries of C0^-1 k; multiply them by those of k first": (
                solved.sum(dim=0)
            ),
        },
    )
    graded = torch.diag(torch.tensor([1.0, 1e-6, 1e-13]).double())
    again = tensor(call(rarities, graded, _identity(3)), (3,), "the rarities for a diagonal C0")
    if bool((again < 0.5).any()):
        raise ExerciseError(
            "for C0 = diag(1, 1e-6, 1e-13) a small eigenvalue was cut off, as a pseudoinverse "
            "does: that takes what is rare for what is common. Solve with C0 as it is"
        )
    agree(
        again.log(),
        -graded.diagonal().log(),
        "the logarithm of the rarities of unit vectors, for C0 = diag(1, 1e-6, 1e-13),",
    )
    return right("k' C0^-1 k for every column, also where C0 has a very small eigenvalue.")


def check_shrink(shrink: Callable[[Tensor, float], Any]) -> str:
    """Check ``shrink(C0, eps) -> C_eps``: C0 + eps * tr(C0) / d_k * I. Raises ExerciseError."""
    for d, eps in ((4, 0.1), (3, 2.0)):
        C0 = 5 * mean_second_moment(draw(d, d, 9))
        identity, mean = _identity(d), C0.trace() / d
        agree(
            tensor(call(shrink, C0, eps), (d, d), "C_eps"),
            shrunk_moment(C0, eps),
            "C_eps",
            {
                "eps times the identity was added; scale it by the mean eigenvalue, the trace "
                "over d_k": C0 + eps * identity,
                "you added eps times the whole trace; the mean eigenvalue is the trace over d_k": (
                    C0 + eps * C0.trace() * identity
                ),
                "a number was added to every entry; it belongs on the diagonal only": (
                    C0 + eps * mean
                ),
                "C0 was scaled down by 1 - eps as well; here it stays as it is": (
                    (1 - eps) * C0 + eps * mean * identity
                ),
                "the mean of all entries was used; it is the mean of the diagonal": (
                    C0 + eps * C0.mean() * identity
                ),
                "only the diagonal of C0 is left; its other entries must stay": torch.diag(
                    C0.diagonal() + eps * mean
                ),
            },
        )
    return right("Every eigenvalue grows by eps times their mean, and C0 itself is unchanged.")

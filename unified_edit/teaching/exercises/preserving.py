"""Checks for the exercises of the chapter "What to preserve"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    TOLERANCE,
    ExerciseError,
    Mistakes,
    agree,
    draw,
    refuse_rounded,
    relative_error,
    right,
    tensor,
)


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
    for K0 in (draw(0, 3, 7) + 1, draw(1, 5, 3)):
        d, N = K0.shape
        centred = K0 - K0.mean(dim=1, keepdim=True)
        what = f"C0 of {N} keys with {d} entries"
        C0 = tensor(call(second_moment, K0), (d, d), what)
        uneven = float((C0 - C0.T).norm()) > TOLERANCE * float(C0.norm())
        agree(
            C0,
            mean_second_moment(K0),
            what,
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
            otherwise="A sum of k k' is symmetric, and yours is not" if uneven else "",
        )
    return right("It is the mean of k k' over the columns, and no mean key was subtracted.")


def check_rarities(rarities: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``rarities(C0, K)``: k' C0^-1 k for each of the E columns of K, as (E,).

    C0 is (d_k x d_k), K is (d_k x E). Raises ExerciseError.
    """
    watch = Watch(rarities)
    for d, E in ((4, 3), (3, 5)):
        C0, K = mean_second_moment(draw(2, d, 9)), draw(3, d, E)
        factor, solved = torch.linalg.cholesky(C0), torch.linalg.solve(C0, K)
        expected = key_rarities(C0, K)
        given = watch(C0, K)
        gram = K.T @ solved
        whole = isinstance(given, Tensor) and given.shape == gram.shape
        if whole and relative_error(given, gram) <= TOLERANCE:
            raise ExerciseError(
                f"for {E} keys you returned {E} x {E} numbers, K' C0^-1 K: the rarities are its "
                "diagonal, and the rest need not be computed (`(K * solved).sum(dim=0)`)"
            )
        what = f"the rarities of {E} keys"
        agree(
            tensor(given, (E,), what),
            expected,
            what,
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
                "this is k' k; C0 does not enter": K.square().sum(dim=0),
            },
        )
    _check_graded(watch)
    watch.refuse_inverses(
        "solve with C0 and the keys (`torch.linalg.solve(C0, K)`), which is cheaper and keeps more "
        "digits"
    )
    return right("k' C0^-1 k for every column, also where C0 has a very small eigenvalue.")


def _check_graded(rarities: Callable[..., Any]) -> None:
    """For C0 = diag(1, 1e-6, 1e-13), with keys along its axes."""
    values = torch.tensor([1.0, 1e-6, 1e-13]).double()
    lengths = torch.tensor([1.0, 2.0, 3.0]).double()
    what = "the rarities for C0 = diag(1, 1e-6, 1e-13), each over its right value,"
    of_keys = "the rarities of 3 keys along the axes of C0"
    given = tensor(rarities(torch.diag(values), torch.diag(lengths)), (3,), of_keys)
    expected = lengths.square() / values
    refuse_rounded(given, expected, of_keys)
    ratios = given / expected
    added = 1 / float(ratios[2]) - 1 if 0 < float(ratios[2]) < 1 else 0.0  # in units of 1e-13
    mistakes: Mistakes = {
        "a small eigenvalue of C0 was cut off, as a pseudoinverse does: that takes what is rare "
        "for what is common. Solve with C0 as it is": (
            torch.tensor([1.0, 1.0, 0.0]),
            torch.tensor([1.0, 0.0, 0.0]),
        ),
        f"{1e-13 * added:.1e} was added to the diagonal of C0, which makes rare keys common. Solve "
        "with C0 as it is": values / (values + 1e-13 * added),
    }
    agree(ratios, torch.ones(3).double(), what, mistakes)


def check_shrink(shrink: Callable[[Tensor, float], Any]) -> str:
    """Check ``shrink(C0, eps) -> C_eps``: C0 + eps * tr(C0) / d_k * I. Raises ExerciseError."""
    for d, eps in ((4, 0.1), (3, 2.0)):
        C0 = 5 * mean_second_moment(draw(d, d, 9))
        identity, mean = _identity(d), C0.trace() / d
        what = f"C_eps for eps = {eps:g}"
        agree(
            tensor(call(shrink, C0, eps), (d, d), what),
            shrunk_moment(C0, eps),
            what,
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

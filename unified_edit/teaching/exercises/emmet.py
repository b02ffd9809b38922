"""Checks for the exercises of the chapter "Batched equality: EMMET"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    ExerciseError,
    Mistakes,
    agree,
    draw,
    kind_of,
    name_of,
    recognised,
    right,
    single,
    tensor,
)
from unified_edit.teaching.exercises.updates import equality_said, lam_of, moment, ridge_of

#: Condition of the whitened keys in the second half of `check_batch_equality`, and the largest
#: relative error of Delta K = R there: QR misses it by 1e-10, a factor of the Gram matrix by 1e-3.
HARD = 1e7
HELD = 1e-8


def batch_update(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """Delta (d_out x d_k) of :eq:`emmet-update`, computed by :eq:`emmet-qr`.

    C0 (d_k x d_k), K (d_k x E), R (d_out x E).
    """
    L = torch.linalg.cholesky(C0)
    Q, S = torch.linalg.qr(solve_triangular(L, K, upper=False))
    left: Tensor = solve_triangular(S, R, upper=True, left=False)
    rows: Tensor = solve_triangular(L, Q.mT, upper=False, left=False)
    return left @ rows


def is_feasible(K: Tensor, R: Tensor) -> bool:
    """Whether some Delta has Delta K = R: each row of R is a combination of rows of K."""
    rank = torch.linalg.matrix_rank
    return int(rank(torch.cat([K, R]))) == int(rank(K))


def check_batch_equality(update: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``batch_update(C0, K, R) -> Delta``: the cheapest Delta with Delta K = R.

    C0 (d_k x d_k), K (d_k x E), R (d_out x E), Delta (d_out x d_k). Also for keys that are nearly
    dependent, which takes QR. Raises ExerciseError.
    """
    watch = Watch(update)
    for seed, d, E, d_out in ((0, 6, 3, 2), (10, 5, 1, 3)):
        C0 = moment(seed, d)
        K, R = draw(seed + 1, d, E), draw(seed + 2, d_out, E)
        what = f"Delta of {E} fact{'s' * (E > 1)}"
        got, expected = tensor(watch(C0, K, R), (d_out, d), what), _literal(C0, K, R)
        said = equality_said(got, expected, C0, K, "Delta K = R")
        # with one fact, many of them are the same
        mistakes = _mistakes(C0, K, R, got) if E > 1 else {}
        agree(got, expected, what, mistakes, otherwise=said)
    _check_hard(update)
    watch.refuse_inverses(
        "solve with the triangular factors S and L (`torch.linalg.solve_triangular`)"
    )
    return right(
        f"Delta K = R at the least cost, also for keys of condition {HARD:.0e}: the condition was "
        "not squared."
    )


def _check_hard(update: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    """Keys that are nearly dependent: Delta K = R to eight digits."""
    C0, K, R = _hard_keys()
    watch, what = Watch(update), "Delta of 4 nearly dependent facts"
    got, exact = tensor(watch(C0, K, R), (2, 8), what), batch_update(C0, K, R)
    missed = float((got @ K - R).norm() / R.norm())
    if missed <= HELD:
        agree(got, exact, what)
        return
    if known := recognised(got, exact, what, _hard_mistakes(C0, K, R, got)):
        raise ExerciseError(f"{what} is not right: {known}")
    far = (
        f"for keys of condition {HARD:.0e} Delta K misses R by {missed:.0e}, where {HELD:.0e} is "
        "asked for"
    )
    if single(got):
        raise ExerciseError(f"{far}: yours has no more digits than float32 holds. Use float64")
    if watch.hardest(4) > HARD**1.5:
        raise ExerciseError(
            f"the formula is right, but {far}: the Gram matrix K' C0^-1 K has the square of that "
            "condition, so do not form it. Factor A = L^-1 K by QR"
        )
    raise ExerciseError(
        f"{far}. Keys that are less alike went well. Is there a matrix like K' C0^-1 K in it, "
        "whose condition is the square of theirs? Factor A = L^-1 K by QR"
    )


def check_feasible(feasible: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``feasible(K, R) -> bool``: whether any Delta has Delta K = R.

    K (d_k x E), R (d_out x E). Raises ExerciseError.
    """
    for K, R, expected, case, advice in _cases():
        answer = _truth(feasible, call(feasible, K, R))
        if answer != expected:
            said, truth = ("no", "yes") if expected else ("yes", "no")
            raise ExerciseError(
                f"for {case}, {name_of(feasible)} says {said}, and the answer is {truth}: {advice}"
            )
    return right("It asks whether R respects every dependence among the columns of K.")


def _literal(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """The formula as it stands; exact enough for well-conditioned examples."""
    row = torch.linalg.solve(C0, K).T
    return R @ torch.linalg.inv(row @ K) @ row


def _mistakes(C0: Tensor, K: Tensor, R: Tensor, got: Tensor) -> Mistakes:
    row = torch.linalg.solve(C0, K).T
    G, inverse = row @ K, torch.linalg.inv
    L = torch.linalg.cholesky(C0)
    turned = torch.linalg.qr(solve_triangular(L.T, K, upper=True))
    Q, S = torch.linalg.qr(solve_triangular(L, K, upper=False))
    return {
        "this is R K' C0^-1; the inverse of K' C0^-1 K belongs in between": R @ row,
        "every fact was written as if it were alone, divided by its own rarity; that is the "
        "diagonal of K' C0^-1 K, and the rest of it matters": R / G.diagonal() @ row,
        "this Delta has Delta K = R, but C0 does not occur in it: it is the one of least norm, "
        "not of least cost": R @ torch.linalg.pinv(K),
        "the rows on the right are K' C0; C0 must be inverted there as well": (
            R @ inverse(G) @ K.T @ C0
        ),
        "the rows on the right are K'; C0^-1 is missing there": R @ inverse(G) @ K.T,
        "C0 stands in both places where its inverse belongs": (
            R @ inverse(K.T @ C0 @ K) @ K.T @ C0
        ),
        "C0 stands in K' C0^-1 K where its inverse belongs": R @ inverse(K.T @ C0 @ K) @ row,
        "S^-1 is there, but not L^-1: whitened rows must be taken back to keys": (
            R @ inverse(S) @ Q.T
        ),
        "the rows on the right are Q' L; it is Q' L^-1": R @ inverse(S) @ Q.T @ L,
        "the keys were whitened with the transpose of L: A = L^-1 K": (
            R @ inverse(turned[1]) @ turned[0].T @ inverse(L)
        ),
        "S was transposed: A = Q S, so that Delta = (R S^-1)(Q' L^-1)": (
            R @ inverse(S).T @ Q.T @ inverse(L)
        ),
        "R was multiplied by S; divide by it": R @ S @ Q.T @ inverse(L),
        **_ridged(lam_of(got, C0, K, R), got),
    }


def _ridged(ridge: float | None, got: Tensor) -> Mistakes:
    """A number on the diagonal of K' C0^-1 K, read off the result itself."""
    if ridge is None:
        return {}
    return {
        f"{ridge:.2g} was added to the diagonal of K' C0^-1 K: that solves another problem, and "
        "Delta K is not R any more": got
    }


def _hard_mistakes(C0: Tensor, K: Tensor, R: Tensor, got: Tensor) -> Mistakes:
    """Those that only show where keys are nearly dependent."""
    L = torch.linalg.cholesky(C0)
    U, s, Vt = torch.linalg.svd(solve_triangular(L, K, upper=False), full_matrices=False)
    cut = [(R @ Vt[:n].T) / s[:n] @ U[:, :n].T for n in (1, 2, 3)]
    return {
        "a small singular value was cut off, as if the keys were dependent. They are not, and "
        "Delta K can be R": tuple(solve_triangular(L, B, upper=False, left=False) for B in cut),
        **_ridged(ridge_of(got, C0, K, R), got),
    }


def _hard_keys() -> tuple[Tensor, Tensor, Tensor]:
    """C0, K and R with L^-1 K of condition HARD, for d_k = 8, E = 4, d_out = 2."""
    C0 = moment(20, 8)
    U, V = torch.linalg.qr(draw(21, 8, 4))[0], torch.linalg.qr(draw(22, 4, 4))[0]
    spectrum = torch.logspace(0, -float(np.log10(HARD)), 4, dtype=torch.float64)
    return C0, torch.linalg.cholesky(C0) @ (U * spectrum) @ V.T, draw(23, 2, 4)


def _cases() -> list[tuple[Tensor, Tensor, bool, str, str]]:
    """K, R, the answer, the case in words, and what to think of."""

    def matrix(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    independent = matrix([1, 0], [2, 1], [0, 3])
    twice = matrix([1, 1], [2, 2], [0, 0])
    third = matrix([1, 0, 1], [2, 1, 3], [0, 3, 3])  # the third column is the sum of the others
    wide = matrix([1, 0, 1, 2], [0, 1, 1, -1])
    request = matrix([3, -1, 2], [1, 4, 5])  # its third column is the sum of the others
    return [
        (independent, matrix([3, -1], [1, 4]), True, "two independent keys of three entries",
         "independent keys can be given any values"),
        (twice, matrix([3, 5], [1, 1]), False, "one key that is to get two different values",
         "its columns are equal, so those of Delta K are too"),
        (third, matrix([3, -1, 0], [1, 4, 5]), False,
         "three keys of three entries, the third the sum of the others, and values that are not",
         "E <= d_k is not enough; the keys must be independent, or R must respect how they depend"),
        (wide, matrix([3, -1, 2, 0], [1, 4, 5, 0]), False, "four keys of two entries",
         "at most two of them are independent, and R asks for more"),
        (twice, matrix([3, 3], [1, 1]), True, "the same key twice with the same value",
         "rank K < E is fatal for some R, not for every R: look at R too"),
        (third, request, True, "a third key that is the sum of two, and so is its value",
         "rank K < E is fatal for some R, not for every R: look at R too"),
        (wide, matrix([2, 1], [0, 5], [1, -3]) @ wide, True,
         "four keys of two entries, with R = Delta K made from a Delta",
         "rank K < E is fatal for some R, not for every R: look at R too"),
        (independent * 1e-6, matrix([3, -1], [1, 4]), True,
         "two independent keys with entries of the order 1e-6",
         "what counts as zero must be relative to the largest singular value or the size of K"),
        (third * 1e6, matrix([3, -1, 0], [1, 4, 5]), False,
         "keys with entries of the order 1e6, the third the sum of the others",
         "what counts as zero must be relative to the largest singular value or the size of K"),
    ]  # fmt: skip


def _truth(function: Callable[..., Any], answer: Any) -> bool:
    if isinstance(answer, Tensor) and answer.numel() == 1 and answer.dtype == torch.bool:
        return bool(answer)
    if isinstance(answer, (bool, np.bool_)):
        return bool(answer)
    raise ExerciseError(
        f"{name_of(function)} must return True or False, and you returned {kind_of(answer)}"
    )

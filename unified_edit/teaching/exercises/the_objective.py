"""Checks for the exercises of the chapter "The preservation–memorization objective"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import (
    TOLERANCE,
    ExerciseError,
    agree,
    draw,
    name_of,
    number,
    pair,
    relative_error,
    right,
    tensor,
)
from unified_edit.teaching.exercises.updates import equality_said, moment


def both_errors(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """tr(Delta C0 Delta') and ||Delta K - R||_F^2, :eq:`objective-memorize`: two numbers."""
    return ((Delta @ C0) * Delta).sum(), (Delta @ K - R).square().sum()


def key_moves(M: Tensor, K: Tensor, C0: Tensor, X: Tensor) -> Tensor:
    """M K' C0^-1 X, :eq:`objective-every-key`: what Delta adds to the values of X's columns."""
    return M @ (K.T @ torch.linalg.solve(C0, X))


def cheapest_of_its_kind(Delta: Tensor, K: Tensor, C0: Tensor) -> Tensor:
    """The part of Delta that has the form M K' C0^-1, :eq:`objective-row-space`: (d_out x d_k)."""
    L = torch.linalg.cholesky(C0)
    Q, _ = torch.linalg.qr(solve_triangular(L, K, upper=False))
    return solve_triangular(L, Delta @ L @ Q @ Q.T, upper=False, left=False)


def check_objective_errors(errors: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``errors(Delta, C0, K, R) -> (preservation, memorization)``, a pair of numbers.

    Delta is (d_out x d_k), C0 (d_k x d_k), K (d_k x E), R (d_out x E). Raises ExerciseError.
    """
    for seed, (d_out, d_k, E) in enumerate([(3, 4, 5), (5, 3, 1)]):
        Delta, C0 = draw(seed, d_out, d_k), moment(seed + 10, d_k)
        K, R = draw(seed + 20, d_k, E), draw(seed + 30, d_out, E)
        preserve, memorize = both_errors(Delta, C0, K, R)
        missed = Delta @ K - R
        names = [f"the {kind} error for E = {E}" for kind in ("preservation", "memorization")]
        given = pair(call(errors, Delta, C0, K, R), "`return preservation, memorization`")
        found = [number(value, what) for value, what in zip(given, names, strict=True)]
        swapped = torch.stack([memorize, preserve])
        if relative_error(torch.tensor(found, dtype=torch.float64), swapped) <= TOLERANCE:
            raise ExerciseError("both are right, and in the wrong order: preservation comes first")
        agree(
            found[0],
            preserve,
            names[0],
            {
                "C0 stands between Delta and its transpose once; you have |Delta C0|^2": (
                    (Delta @ C0).square().sum()
                ),
                "this is the squared norm of Delta: C0 is missing": Delta.square().sum(),
                "you summed all entries of Delta C0 Delta'; only the diagonal counts": (
                    (Delta @ C0 @ Delta.T).sum()
                ),
                "it is not to be divided by the number of outputs: it is a trace": preserve / d_out,
                "this is a root; the error is the trace itself": preserve.sqrt(),
                "lambda and the memorization error do not belong in it": preserve + memorize,
            },
        )
        agree(
            found[1],
            memorize,
            names[1],
            {
                "this is a norm; the objective has its square": missed.norm(),
                "this is the relative error that the library reports; the objective has "
                "|Delta K - R|^2": missed.norm() / R.norm(),
                "this is the squared relative error; do not divide by |R|^2": (
                    memorize / R.square().sum()
                ),
                "it is a sum over facts, not their mean": memorize / E,
                "it is a sum over all entries, not their mean": memorize / missed.numel(),
                "this is |Delta K|^2, what was written; R, what should be, is missing": (
                    (Delta @ K).square().sum()
                ),
                "the sign of R is the wrong way round": (Delta @ K + R).square().sum(),
                "this is the squared norm of the sum over facts; square first, then add": (
                    missed.sum(dim=1).square().sum()
                ),
            },
        )
    return right("Preservation tr(Delta C0 Delta'), memorization |Delta K - R|^2, both squared.")


def check_move(move: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``move(M, K, C0, X)``: (d_out x n), what Delta = M K' C0^-1 adds to X's values.

    M is (d_out x E), K (d_k x E), C0 (d_k x d_k), X (d_k x n). Raises ExerciseError.
    """
    watch = Watch(move)
    for seed, (d_out, d_k, E, n) in enumerate([(2, 4, 3, 5), (3, 5, 2, 1)]):
        M, K, X = draw(seed, d_out, E), draw(seed + 10, d_k, E), draw(seed + 20, d_k, n)
        C0 = moment(seed, d_k)
        L = torch.linalg.cholesky(C0)
        what, row, Delta = f"the moves of {n} key{'s' * (n > 1)}", *_parts_of_move(M, K, C0, X)
        given = watch(M, K, C0, X)
        for hint, part in (
            (f"this is Delta, {d_out} x {d_k}: what is asked for is what it does to X", Delta),
            (f"this is K' C0^-1 X, {E} x {n}: multiply it by M from the left", row),
        ):
            same = isinstance(given, Tensor) and given.shape == part.shape
            if same and relative_error(given, part) <= TOLERANCE:
                raise ExerciseError(f"{what} must be {d_out} x {n} numbers, and {hint}")
        agree(
            tensor(given, (d_out, n), what),
            key_moves(M, K, C0, X),
            what,
            {
                "you multiplied by C0; its inverse belongs between K' and X (`solve`)": (
                    M @ K.T @ C0 @ X
                ),
                "this is M K' X, resemblance in the ordinary inner product: C0^-1 is missing": (
                    M @ K.T @ X
                ),
                "only one of the two was whitened: K' L^-1 X is no inner product": (
                    M @ K.T @ torch.linalg.solve(L, X)
                ),
                "you solved with C0 twice; once is enough": (
                    key_moves(M, K, C0, torch.linalg.solve(C0, X))
                ),
                "you solved with the transpose of L: C0 = L L', so C0^-1 = L^-T L^-1": (
                    M @ torch.linalg.solve(L.T, K).T @ torch.linalg.solve(L.T, X)
                ),
            },
        )
        if watch.has_made(Delta):
            raise ExerciseError(
                f"the numbers are right. But {name_of(move)} makes Delta on the way, and the "
                "exercise asks for the moves without it: multiply from the right, X first, and "
                "with M last"
            )
    watch.refuse_inverses("solve with C0 and X (`torch.linalg.solve(C0, X)`)")
    return right("Each key moves by M times its resemblances K' C0^-1 x to the new keys.")


def _parts_of_move(M: Tensor, K: Tensor, C0: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """K' C0^-1 X and Delta, of which either may be taken for the move."""
    return K.T @ torch.linalg.solve(C0, X), M @ torch.linalg.solve(C0, K).T


def check_strip(strip: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``strip(Delta, K, C0)``: the cheapest update that does to K what Delta does.

    Delta is (d_out x d_k), K (d_k x E) with independent columns, C0 (d_k x d_k).
    Raises ExerciseError.
    """
    for seed, (d_out, d_k, E) in enumerate([(2, 5, 2), (4, 3, 1)]):
        Delta, K, C0 = draw(seed, d_out, d_k), draw(seed + 10, d_k, E), moment(seed, d_k)
        L = torch.linalg.cholesky(C0)
        A = solve_triangular(L, K, upper=False)
        best = cheapest_of_its_kind(Delta, K, C0)
        Q, _ = torch.linalg.qr(K)
        whitened, _ = torch.linalg.qr(A)
        wrong_side, _ = torch.linalg.qr(C0 @ K)
        what = f"the stripped update for {E} key{'s' * (E > 1)}"
        got = tensor(call(strip, Delta, K, C0), (d_out, d_k), what)
        agree(
            got,
            best,
            what,
            {
                "it is Delta itself: nothing was taken away": Delta,
                "this is the part that does nothing for K, the one to be taken away": Delta - best,
                "it keeps Delta K and is cheapest for C0 = I: project in whitened coordinates, "
                "B = Delta L": Delta @ Q @ Q.T,
                "this is B = Delta L after the projection: multiply by L^-1 from the right": (
                    best @ L
                ),
                "the projection belongs to B = Delta L; you applied it to Delta": (
                    Delta @ whitened @ whitened.T
                ),
                "you projected on the rows of K' C0; the theorem has K' C0^-1": (
                    Delta @ wrong_side @ wrong_side.T
                ),
                "Delta was projected on the span of the rows K' C0^-1 in the ordinary inner "
                "product: that changes Delta K. Use the one in which the cost is a squared norm": (
                    _ordinary_projection(Delta, torch.linalg.solve(C0, K))
                ),
            },
            otherwise=equality_said(got, best, C0, K),
        )
    return right("Delta K is what it was, and nothing is left that costs without writing.")


def _ordinary_projection(Delta: Tensor, rows: Tensor) -> Tensor:
    Q, _ = torch.linalg.qr(rows)
    return Delta @ Q @ Q.T

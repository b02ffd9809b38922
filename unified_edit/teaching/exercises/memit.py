"""Checks for the exercises of the chapter "Least squares: MEMIT"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import Watch, call
from unified_edit.teaching.exercises.checking import agree, draw, right, tensor
from unified_edit.teaching.exercises.updates import cost, lam_said, moment, more_than, other_lam

Solution = Callable[..., Any]


def least_squares_update(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """R K' (lam C0 + K K')^-1 (d_out x d_k), :eq:`memit-update`."""
    return _times_inverse(R @ K.T, lam * C0 + K @ K.T)


def written_shares(C0: Tensor, K: Tensor, lam: float) -> Tensor:
    """rho / (lam + rho) for each column of K (d_k x E), :eq:`memit-one-fact`: (E,)."""
    rho = _rarities(C0, K)
    return rho / (lam + rho)


def next_update(C0: Tensor, earlier: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """The update of one more batch, :eq:`memit-sequential`: (d_out x d_k)."""
    return least_squares_update(C0 + earlier @ earlier.T / lam, K, R, lam)


def _times_inverse(left: Tensor, symmetric: Tensor) -> Tensor:
    """left @ symmetric^-1, by solution."""
    solved: Tensor = torch.linalg.solve(symmetric, left.T)
    return solved.T


def _rarities(C0: Tensor, K: Tensor) -> Tensor:
    return (K * torch.linalg.solve(C0, K)).sum(dim=0)


def check_least_squares(update: Solution) -> str:
    """Check ``update(C0, K, R, lam) -> Delta``: the minimiser of the least-squares objective.

    C0 is (d_k x d_k), K is (d_k x E), R is (d_out x E), Delta is (d_out x d_k). Tried with few
    facts, with more facts than d_k, and with a key that occurs twice. Raises ExerciseError.
    """
    twice = draw(7, 4, 2)[:, [0, 1, 0]]
    watch = Watch(update)
    for K, d_out, lam, what in (
        (draw(1, 5, 3), 2, 0.7, "Delta of 3 facts with 5 entries a key"),
        (draw(2, 3, 5), 2, 20.0, "Delta of 5 facts with 3 entries a key"),
        (twice, 5, 0.01, "Delta of 3 facts of which two have the same key"),
    ):
        d, E = K.shape
        C0, R = moment(d, d), draw(d_out, d_out, E)
        identity, outer, target = torch.eye(d, dtype=torch.float64), K @ K.T, R @ K.T
        delta = tensor(watch(C0, K, R, lam), (d_out, d), what)
        expected = least_squares_update(C0, K, R, lam)
        gram = K.T @ torch.linalg.solve(C0, K)
        held = R @ torch.linalg.pinv(gram) @ torch.linalg.solve(C0, K).T
        agree(
            delta,
            expected,
            what,
            {
                "lam stands at the identity; it belongs to C0": (
                    _times_inverse(target, lam * identity + outer)
                ),
                "lam is missing": _times_inverse(target, C0 + outer),
                "lam stands at K K'; it is the weight of C0": (
                    _times_inverse(target, C0 + lam * outer)
                ),
                "lam was squared": _times_inverse(target, lam**2 * C0 + outer),
                "K K' is missing in the bracket: without it nothing says that the new facts "
                "count too": _times_inverse(target, lam * C0),
                "K K' was divided by E; the new facts enter as a sum": (
                    _times_inverse(target, lam * C0 + outer / E)
                ),
                "the new facts enter as a mean over E, or lam was multiplied by E; they enter as a "
                "sum": _times_inverse(target / E, lam * C0 + outer / E),
                "this is the limit lam -> 0, which holds the facts as exactly as can be": held,
                **other_lam(delta, C0, K, R, lam),
            },
            otherwise=_objective_said(delta, expected, C0, K, R, lam),
        )
    watch.refuse_inverses("solve with lam C0 + K K' and K R' (`torch.linalg.solve`)")
    return right(
        "It satisfies the normal equations, also for more facts than a key has entries and for "
        "a key that occurs twice."
    )


def _objective_said(
    Delta: Tensor, best: Tensor, C0: Tensor, K: Tensor, R: Tensor, lam: float
) -> str:
    """How far the objective is above its minimum."""
    values = [lam * cost(X, C0) + float((X @ K - R).square().sum()) for X in (Delta, best)]
    return f"Its objective is {more_than(values[0] / values[1], 'the smallest')}"


def check_written_share(share: Solution) -> str:
    """Check ``share(C0, K, lam)``: rho / (lam + rho) for each of the E columns of K, as (E,).

    C0 is (d_k x d_k), K is (d_k x E): each fact written alone. Raises ExerciseError.
    """
    for lam, E in ((3.0, 3), (0.2, 6)):
        C0, K = moment(5, 4), draw(6, 4, E)
        rho, raw = _rarities(C0, K), (K * (C0 @ K)).sum(dim=0)
        expected = written_shares(C0, K, lam)
        gram = K.T @ torch.linalg.solve(C0, K)
        together = torch.linalg.solve(gram + lam * torch.eye(E, dtype=torch.float64), gram)
        squares = K.square().sum(dim=0)
        what = f"the shares of {E} facts"
        given = tensor(call(share, C0, K, lam), (E,), what)
        mu = float((rho * (1 / given - 1)).mean()) if bool((given != 0).all()) else lam
        agree(
            given,
            expected,
            what,
            {
                "this is what is missing; the share that is written is one minus that": (
                    1 - expected
                ),
                "this is the rarity over lam; divide it by lam + rarity": rho / lam,
                "this is 1 / (lam + rho), the factor of r k' C0^-1; times the rarity it is the "
                "share": 1 / (lam + rho),
                "lam and the rarity multiply each other here; they are to be added": (
                    lam * rho / (1 + lam * rho)
                ),
                "this is written with k' C0 k; the rarity has the inverse of C0": raw / (lam + raw),
                "this is written with k'k; C0 does not enter": squares / (lam + squares),
                "these are the facts written together, a diagonal that depends on the other keys; "
                "each is to be written alone": together.diagonal(),
                "this is the squared share, which is how the cost of the update shrinks": (
                    expected.square()
                ),
                lam_said(mu, lam, "these are the shares"): rho / (mu + rho),
            },
            otherwise=(
                "A share lies between 0 and 1, and one of yours does not"
                if bool(((given < 0) | (given > 1)).any())
                else ""
            ),
        )
    return right("Each fact alone is written to the share rho / (lam + rho).")


def check_next_batch(next_batch: Solution) -> str:
    """Check ``next_batch(C0, earlier, K, R, lam) -> Delta``: least squares after other batches.

    earlier is (d_k x n), the keys already written; R is (d_out x E), what is missing on the model
    as edited so far. Raises ExerciseError.
    """
    for lam, n in ((0.5, 3), (4.0, 5)):
        C0, earlier, K, R = moment(8, 4), draw(9, 4, n), draw(10, 4, 3), draw(11, 2, 3)
        seen, new, target = earlier @ earlier.T, K @ K.T, R @ K.T
        both = torch.cat([earlier, K], dim=1)
        padded = torch.cat([torch.zeros(2, n, dtype=torch.float64), R], dim=1)
        what = f"Delta of the next batch, after {n} facts,"
        delta = tensor(call(next_batch, C0, earlier, K, R, lam), (2, 4), what)
        expected = next_update(C0, earlier, K, R, lam)
        assert torch.allclose(expected, least_squares_update(C0, both, padded, lam))
        agree(
            delta,
            expected,
            what,
            {
                "the earlier keys are left out, so what was written there is free to change": (
                    least_squares_update(C0, K, R, lam)
                ),
                "the earlier keys were multiplied by lam; a fact has weight one, earlier or not "
                "(divide by lam when you add them to C0)": (
                    _times_inverse(target, lam * (C0 + seen) + new)
                ),
                "the earlier keys were divided by lam outside of C0; there they have weight one": (
                    _times_inverse(target, lam * C0 + seen / lam + new)
                ),
                "the earlier keys enter as a mean; they enter as a sum": (
                    _times_inverse(target, lam * C0 + seen / n + new)
                ),
                "the new keys are missing in the bracket": _times_inverse(target, lam * C0 + seen),
                **other_lam(delta, C0, both, padded, lam),
            },
            otherwise=_objective_said(delta, expected, C0, both, padded, lam),
        )
    return right("Earlier facts count with weight one each, and their wanted change is zero.")

"""Checks of the chapter "Least squares: MEMIT", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.errors import InfeasibleError
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.memit import (
    check_least_squares,
    check_next_batch,
    check_written_share,
    least_squares_update,
    next_update,
    written_shares,
)

Check = Callable[[Any], str]


def moment(d: int) -> Tensor:
    K0 = draw(1, d, 3 * d)
    return K0 @ K0.T / K0.shape[1]


def solve(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return ue.objective.solve(C0, K, R, ridge=lam).delta


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("memit-gradient", "memit-normal", "memit-update")
@pytest.mark.parametrize("facts", [2, 5, 9])
def test_the_library_solves_the_normal_equations(facts: int) -> None:
    C0, K, R, lam = moment(5), draw(2, 5, facts), draw(3, 4, facts), 0.7
    delta = solve(C0, K, R, lam)
    # residuals of a system of condition below 100, in float64
    assert torch.allclose(delta @ (lam * C0 + K @ K.T), R @ K.T, rtol=1e-10, atol=1e-12)
    assert torch.allclose(delta, least_squares_update(C0, K, R, lam), rtol=1e-9, atol=1e-12)
    free = delta.clone().requires_grad_()
    (lam * torch.trace(free @ C0 @ free.T) + (free @ K - R).square().sum()).backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) < 1e-10


@pytest.mark.equation("memit-complete")
@pytest.mark.parametrize("facts", [2, 9])
def test_every_other_update_costs_more_by_a_square(facts: int) -> None:
    C0, K, R, lam = moment(5), draw(2, 5, facts), draw(3, 4, facts), 0.7

    def cost(delta: Tensor) -> float:
        return float(lam * torch.trace(delta @ C0 @ delta.T) + (delta @ K - R).square().sum())

    best, Z = solve(C0, K, R, lam), draw(4, 4, 5)
    square = float(torch.trace(Z @ (lam * C0 + K @ K.T) @ Z.T))
    assert cost(best + Z) == pytest.approx(cost(best) + square, rel=1e-12)


@pytest.mark.equation("memit-stacked", "memit-mean-sum")
def test_it_is_one_regression_over_old_and_new_facts() -> None:
    K0, K, R, lam = draw(1, 4, 11), draw(2, 4, 3), draw(3, 2, 3), 5.0
    X = torch.cat([(lam / 11) ** 0.5 * K0, K], dim=1)
    Y = torch.cat([torch.zeros(2, 11).double(), R], dim=1)
    ordinary = torch.linalg.lstsq(X.T, Y.T).solution.T
    assert torch.allclose(solve(K0 @ K0.T / 11, K, R, lam), ordinary, rtol=1e-9, atol=1e-12)
    # the weight of the sum over tokens is that of the mean over N
    assert torch.allclose(solve(K0 @ K0.T, K, R, lam / 11), ordinary, rtol=1e-9, atol=1e-12)


@pytest.mark.equation("memit-one-fact", "memit-votes")
def test_what_is_written_is_a_mean_of_old_and_new() -> None:
    C0, k, R, lam = moment(4), draw(2, 4, 1), draw(3, 3, 2), 5.0
    rho = float(k.T @ torch.linalg.solve(C0, k))
    alone = ue.objective.solve(C0, k, R[:, :1], ridge=lam)
    share = rho / (lam + rho)
    assert torch.allclose(alone.delta @ k, share * R[:, :1])
    assert float(written_shares(C0, k, lam)) == pytest.approx(share)
    error = share**2 * float(R[:, 0].square().sum()) / rho
    assert alone.diagnosis.preservation_error == pytest.approx(error)
    assert alone.diagnosis.memorization_error == pytest.approx(1 - share)
    both = solve(C0, k.expand(4, 2), R, lam)
    assert torch.allclose(both @ k, R.sum(dim=1, keepdim=True) / (lam / rho + 2))


@pytest.mark.equation("memit-sequential")
@pytest.mark.parametrize("sizes", [(2, 2), (4, 3), (1, 9)])
def test_batch_after_batch_is_all_at_once(sizes: tuple[int, int]) -> None:
    C0, K, R, lam = moment(5), draw(2, 5, sum(sizes)), draw(3, 4, sum(sizes)), 0.7
    (K1, K2), (R1, R2) = K.split(sizes, dim=1), R.split(sizes, dim=1)
    first = solve(C0, K1, R1, lam)
    then = next_update(C0, K1, K2, R2 - first @ K2, lam)
    assert torch.allclose(first + then, solve(C0, K, R, lam), rtol=1e-9, atol=1e-12)
    forgetful = solve(C0, K2, R2 - first @ K2, lam)
    assert not torch.allclose(first + forgetful, solve(C0, K, R, lam), rtol=0.01)


def test_contradictions_are_refused_by_the_equality_only() -> None:
    C0, k, R = moment(4), draw(2, 4, 1), draw(3, 3, 2)
    with pytest.raises(InfeasibleError):
        ue.objective.solve(C0, k.expand(4, 2), R)
    assert ue.objective.solve(C0, k.expand(4, 2), R, ridge=1e-3).delta.isfinite().all()


# --- checks ---------------------------------------------------------------------------------------


def by_cholesky(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return torch.cholesky_solve(K @ R.T, torch.linalg.cholesky(lam * C0 + K @ K.T)).T


def by_gram(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    solved = torch.linalg.solve(C0, K)
    return torch.linalg.solve(lam * torch.eye(K.shape[1]).double() + K.T @ solved, R.T).T @ solved.T


def by_regression(C0: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    X = torch.cat([lam**0.5 * torch.linalg.cholesky(C0), K], dim=1)
    Y = torch.cat([torch.zeros(len(R), len(C0)).double(), R], dim=1)
    return torch.linalg.lstsq(X.T, Y.T).solution.T


def bracket(C0: Tensor, K: Tensor, R: Tensor, lam: float, inside: Tensor) -> Tensor:
    return torch.linalg.solve(inside, K @ R.T).T


def diagonal_of_batch(C0: Tensor, K: Tensor, lam: float) -> Tensor:
    G = K.T @ torch.linalg.solve(C0, K)
    return (G @ torch.linalg.inv(G + lam * torch.eye(len(G)).double())).diagonal()


def rarity(C0: Tensor, K: Tensor) -> Tensor:
    return (K * torch.linalg.solve(C0, K)).sum(0)


def with_zeros(C0: Tensor, earlier: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    both = torch.cat([earlier, K], dim=1)
    wanted = torch.cat([torch.zeros(len(R), earlier.shape[1]).double(), R], dim=1)
    return by_regression(C0, both, wanted, lam)


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_least_squares, least_squares_update),
        (check_least_squares, by_cholesky),
        (check_least_squares, by_gram),
        (check_least_squares, by_regression),
        (check_least_squares, solve),
        (check_least_squares, lambda C0, K, R, lam: by_gram(C0, K, R, lam).numpy()),
        (check_written_share, written_shares),
        (check_written_share, lambda C0, K, lam: 1 / (1 + lam / rarity(C0, K))),
        (check_written_share, lambda C0, K, lam: [float(x) for x in written_shares(C0, K, lam)]),
        (
            check_written_share,
            lambda C0, K, lam: torch.stack(
                [diagonal_of_batch(C0, k[:, None], lam)[0] for k in K.T]
            ),
        ),
        (check_next_batch, next_update),
        (check_next_batch, with_zeros),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: bracket(C0, K, R, lam, lam * C0 + P @ P.T + K @ K.T),
        ),
    ],
    ids=range(13),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_least_squares, None, "was given nothing"),
        (check_least_squares, lambda C0, K, R, lam: None, "returned nothing"),
        (check_least_squares, lambda C0, K, R, lam: by_gram(C0, K, R, lam).T, "its transpose"),
        (
            check_least_squares,
            lambda C0, K, R, lam: bracket(C0, K, R, lam, lam * torch.eye(len(K)) + K @ K.T),
            "belongs to C0",
        ),
        (check_least_squares, lambda C0, K, R, lam: by_gram(C0, K, R, 1.0), "lam is missing"),
        (
            check_least_squares,
            lambda C0, K, R, lam: bracket(C0, K, R, lam, C0 + lam * K @ K.T),
            "lam stands at K K'",
        ),
        (check_least_squares, lambda C0, K, R, lam: by_gram(C0, K, R, lam**2), "squared"),
        (
            check_least_squares,
            lambda C0, K, R, lam: bracket(C0, K, R, lam, lam * C0),
            "K K' is missing",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: bracket(C0, K, R, lam, lam * C0 + K @ K.T / K.shape[1]),
            "was divided by E",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: by_gram(C0, K, R, lam * K.shape[1]),
            "enter as a mean over E",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: ue.objective.solve(C0, K, R, infeasible="least_violation").delta,
            "limit lam -> 0",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: bracket(C0, K, R, lam, lam * C0 - K @ K.T),
            "its entries differ",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: ue.objective.solve(C0, K, R).delta,
            "limit lam -> 0",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: by_gram(C0, K, R, 2 * lam),
            "this is the update for lam = 1.4, 2 times the lam = 0.7 that you were given",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: by_gram(C0, K, R, lam * 1.0001),
            "for a lam that is off by 1.0e-04 of itself",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: by_gram(C0, K, R, lam) + 1.0,
            r"its entries differ.* Its objective is [\d.]+ times the smallest",
        ),
        (
            check_least_squares,
            lambda C0, K, R, lam: R @ K.T @ torch.linalg.inv(lam * C0 + K @ K.T),
            "the numbers are right. But your function makes an inverse",
        ),
        (
            check_written_share,
            lambda C0, K, lam: written_shares(C0, K, 2 * lam),
            "these are the shares for lam = 6, 2 times",
        ),
        (check_written_share, None, "was given nothing"),
        (check_written_share, lambda C0, K, lam: ..., "returned nothing"),
        (check_written_share, lambda C0, K, lam: 1 - written_shares(C0, K, lam), "is missing;"),
        (check_written_share, lambda C0, K, lam: rarity(C0, K) / lam, "rarity over lam"),
        (check_written_share, lambda C0, K, lam: 1 / (lam + rarity(C0, K)), "times the rarity"),
        (
            check_written_share,
            lambda C0, K, lam: 1 / (1 + 1 / (lam * rarity(C0, K))),
            "are to be added",
        ),
        (
            check_written_share,
            lambda C0, K, lam: written_shares(torch.linalg.inv(C0), K, lam),
            "has the inverse of C0",
        ),
        (
            check_written_share,
            lambda C0, K, lam: written_shares(torch.eye(len(C0)).double(), K, lam),
            "C0 does not enter",
        ),
        (check_written_share, diagonal_of_batch, "written alone"),
        (check_written_share, lambda C0, K, lam: written_shares(C0, K, lam) ** 2, "squared share"),
        (check_written_share, lambda C0, K, lam: written_shares(C0, K, lam)[:, None], "length one"),
        (check_next_batch, None, "was given nothing"),
        (check_next_batch, lambda C0, P, K, R, lam: None, "returned nothing"),
        (check_next_batch, lambda C0, P, K, R, lam: by_gram(C0, K, R, lam), "are left out"),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: bracket(C0, K, R, lam, 2 * lam * C0 + P @ P.T + K @ K.T),
            "this is the update for lam = 1, 2 times",
        ),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: by_gram(C0 + P @ P.T, K, R, lam),
            "multiplied by lam",
        ),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: bracket(C0, K, R, lam, lam * C0 + P @ P.T / lam + K @ K.T),
            "outside of C0",
        ),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: by_gram(C0 + P @ P.T / P.shape[1] / lam, K, R, lam),
            "enter as a mean",
        ),
        (
            check_next_batch,
            lambda C0, P, K, R, lam: bracket(C0, K, R, lam, lam * C0 + P @ P.T),
            "new keys are missing",
        ),
    ],
    ids=range(37),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)

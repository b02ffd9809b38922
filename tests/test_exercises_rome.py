"""Checks of the chapter "Equality: ROME", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unified_edit.objective import Metric, solve
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.rome import (
    check_errors_in_turn,
    check_mixed_cost,
    check_rank_one,
    errors_after,
    rank_one_update,
    two_key_cost,
)

Check = Callable[[Any], str]


def moment(d: int) -> Tensor:
    K0 = draw(7, d, 4 * d)
    return K0 @ K0.T / (4 * d)


def cost(delta: Tensor, C0: Tensor) -> float:
    return float(torch.trace(delta @ C0 @ delta.T))


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("rome-gradient", "rome-stationary", "rome-multiplier", "rome-update")
def test_the_update_is_stationary_and_what_the_library_solves() -> None:
    C0, k, r = moment(6), draw(1, 6), draw(2, 3)
    delta = rank_one_update(C0, k, r)
    multipliers = r / (k @ torch.linalg.inv(C0) @ k)
    X = delta.clone().requires_grad_()
    half = torch.trace(X @ C0 @ X.T) / 2
    (gradient,) = torch.autograd.grad(half, X)
    assert torch.allclose(gradient, torch.outer(multipliers, k))
    assert torch.allclose(delta @ k, r)
    by_library = solve(C0, k[:, None], r[:, None])
    assert torch.allclose(by_library.delta, delta, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("rome-excess")
def test_another_update_costs_more_by_its_difference() -> None:
    C0, k, r = moment(5), draw(3, 5), draw(4, 2)
    best = solve(C0, k[:, None], r[:, None])
    for seed in range(10, 30):
        noise = draw(seed, 2, 5)
        Z = noise - torch.outer(noise @ k, k) / (k @ k)
        excess = cost(best.delta + Z, C0) - best.diagnosis.preservation_error
        assert excess == pytest.approx(cost(Z, C0), rel=1e-9)
        assert excess > 0


@pytest.mark.equation("rome-disturbance")
def test_a_later_fact_leaves_its_share_at_an_earlier_key() -> None:
    C0, K, R = moment(6), draw(5, 6, 4), draw(6, 3, 4)
    metric = Metric(C0)
    written = torch.zeros(3, 6, dtype=torch.float64)
    for i in range(4):
        written += solve(metric, K[:, [i]], R[:, [i]]).delta
    assert torch.allclose(written @ K - R, errors_after(C0, K, R))
    inverse = torch.linalg.inv(C0)
    k1, k2 = K[:, 0], K[:, 1]
    share = (k2 @ inverse @ k1) / (k2 @ inverse @ k2)
    assert torch.allclose(errors_after(C0, K[:, :2], R[:, :2])[:, 0], share * R[:, 1])


@pytest.mark.equation("rome-mixed", "rome-mixed-norm")
def test_a_second_key_inflates_the_cost() -> None:
    C0, k, k_star, r = moment(5), draw(8, 5), draw(9, 5), draw(10, 3)
    inverse = torch.linalg.inv(C0)
    delta = torch.outer(r, inverse @ k_star) / (k_star @ inverse @ k)
    assert torch.allclose(delta @ k, r)
    whitened, whitened_star = Metric(C0).whiten(torch.stack([k, k_star], dim=1)).T
    c = torch.cosine_similarity(whitened, whitened_star, dim=0)
    least = solve(C0, k[:, None], r[:, None]).diagnosis.preservation_error
    assert cost(delta, C0) == pytest.approx(least / float(c) ** 2, rel=1e-9)
    assert float(two_key_cost(C0, k, k_star, r)) == pytest.approx(cost(delta, C0), rel=1e-9)


# --- checks ---------------------------------------------------------------------------------------


def by_system(C0: Tensor, k: Tensor, r: Tensor) -> Tensor:
    d = len(k)
    system = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    system[:d, :d], system[:d, d], system[d, :d] = C0, -k, k
    right = torch.cat([torch.zeros(d, len(r), dtype=torch.float64), r[None]])
    return torch.linalg.solve(system, right)[:d].T


def by_cholesky(C0: Tensor, k: Tensor, r: Tensor) -> Tensor:
    row = torch.cholesky_solve(k[:, None], torch.linalg.cholesky(C0)).T
    return r[:, None] * row / (row @ k)


def one_after_another(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    each = [rank_one_update(C0, K[:, i], R[:, i]) for i in range(K.shape[1])]
    return torch.stack(each).sum(dim=0) @ K - R


def read_again(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    total = torch.zeros(len(R), len(K), dtype=torch.float64)
    for i in range(K.shape[1]):
        total += rank_one_update(C0, K[:, i], R[:, i] - total @ K[:, i])
    return total @ K - R


def gram(C0: Tensor, K: Tensor) -> Tensor:
    return K.T @ torch.linalg.solve(C0, K)


def by_cosine(C0: Tensor, k: Tensor, k_star: Tensor, r: Tensor) -> float:
    L = torch.linalg.cholesky(C0)
    a, b = (torch.linalg.solve_triangular(L, x[:, None], upper=False)[:, 0] for x in (k, k_star))
    c = torch.cosine_similarity(a, b, dim=0)
    return float(r @ r / (a @ a) / c**2)


def by_matrix(C0: Tensor, k: Tensor, k_star: Tensor, r: Tensor) -> Tensor:
    solved = torch.linalg.solve(C0, k_star)
    delta = torch.outer(r, solved) / (solved @ k)
    return torch.trace(delta @ C0 @ delta.T)


def rho(C0: Tensor, k: Tensor) -> Tensor:
    return k @ torch.linalg.solve(C0, k)


def cosine(C0: Tensor, k: Tensor, k_star: Tensor) -> Tensor:
    between = k @ torch.linalg.solve(C0, k_star)
    return between / (rho(C0, k) * rho(C0, k_star)).sqrt()


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_rank_one, rank_one_update),
        (check_rank_one, by_system),
        (check_rank_one, by_cholesky),
        (check_rank_one, lambda C0, k, r: solve(C0, k[:, None], r[:, None]).delta),
        (check_errors_in_turn, errors_after),
        (check_errors_in_turn, one_after_another),
        (check_mixed_cost, two_key_cost),
        (check_mixed_cost, by_cosine),
    ],
    ids=range(8),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda C0, k, r: ..., "returned nothing"),
        (lambda C0, k, r: torch.outer(r, k) / (k @ k), "ignores C0"),
        (lambda C0, k, r: torch.outer(r, torch.linalg.solve(C0, k)), "the divisor is missing"),
        (
            lambda C0, k, r: torch.outer(r, torch.linalg.solve(C0, k)) / (k @ k),
            "you divided by k' k;",
        ),
        (
            lambda C0, k, r: (
                torch.outer(r, torch.linalg.solve(C0, k)) / torch.linalg.solve(C0, k).square().sum()
            ),
            "squared norm of C0",
        ),
        (lambda C0, k, r: torch.outer(r, C0 @ k) / (k @ C0 @ k), "you used C0 where"),
        (
            lambda C0, k, r: rank_one_update(
                torch.eye(len(k)).double(), torch.linalg.solve(torch.linalg.cholesky(C0), k), r
            ),
            "the whitened key",
        ),
        (lambda C0, k, r: rank_one_update(C0, k, r).T, r"must have shape \(3, 4\)"),
        (
            lambda C0, k, r: (
                rank_one_update(C0, k, r) if len(k) != len(r) else rank_one_update(C0, k, r).T
            ),
            "r is the column",
        ),
        (
            lambda C0, k, r: (
                torch.outer(r, torch.linalg.pinv(C0, rtol=1e-9) @ k)
                / (k @ torch.linalg.pinv(C0, rtol=1e-9) @ k)
            ),
            "cut off",
        ),
        (lambda C0, k, r: -rank_one_update(C0, k, r), "its sign is the wrong way round"),
        (lambda C0, k, r: 2 * rank_one_update(C0, k, r), "it is 2 times what it should be"),
        (lambda C0, k, r: 0 * rank_one_update(C0, k, r), "it is zero"),
        (
            lambda C0, k, r: rank_one_update(C0, k, r) + torch.outer(r, torch.ones(len(k))),
            "Delta k = r does not hold: it is off by",
        ),
        (
            lambda C0, k, r: rank_one_update(C0 + torch.eye(len(k)), k, r),
            r"Delta k = r holds, and the update costs .* the least",
        ),
        (
            lambda C0, k, r: torch.outer(r, C0.inverse() @ k) / (k @ C0.inverse() @ k),
            "the numbers are right. But your function makes an inverse .*solve with C0 and k",
        ),
    ],
    ids=range(17),
)
def test_wrong_updates_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_rank_one(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda C0, K, R: None, "returned nothing"),
        (lambda C0, K, R: errors_after(C0, K, R) + R, "take R away"),
        (lambda C0, K, R: -errors_after(C0, K, R), "the sign is the wrong way round"),
        (lambda C0, K, R: solve(C0, K, R).delta @ K - R, "a solution for all facts together"),
        (lambda C0, K, R: R @ (gram(C0, K) / gram(C0, K).diagonal()) - R, "that is disturbed"),
        (lambda C0, K, R: R @ gram(C0, K) - R, "the rarities are missing"),
        (read_again, "you read the residuals again"),
        (lambda C0, K, R: errors_after(torch.eye(len(K)).double(), K, R), "you used K' K"),
        (
            lambda C0, K, R: rank_one_update(C0, K[:, -1], R[:, -1]) @ K - R,
            "what the last fact alone",
        ),
        (lambda C0, K, R: errors_after(C0, K, R).norm(dim=0), r"must have shape \(2, 3\)"),
    ],
    ids=range(11),
)
def test_wrong_errors_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_errors_in_turn(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda C0, k, s, r: None, "returned nothing"),
        (lambda C0, k, s, r: r @ r / rho(C0, k), "this is the least cost"),
        (lambda C0, k, s, r: r @ r / rho(C0, s), "with k_star alone"),
        (lambda C0, k, s, r: r @ r / rho(C0, k) / cosine(C0, k, s).abs(), "must be squared"),
        (
            lambda C0, k, s, r: (
                two_key_cost(C0, k, s, r)
                if cosine(C0, k, s) > 0
                else r @ r / rho(C0, k) / cosine(C0, k, s)
            ),
            "takes away its sign",
        ),
        (lambda C0, k, s, r: r @ r / rho(C0, k) * cosine(C0, k, s) ** 2, "where it divides"),
        (
            lambda C0, k, s, r: r @ r / rho(C0, k) / torch.cosine_similarity(k, s, dim=0) ** 2,
            "the ordinary cosine",
        ),
        (lambda C0, k, s, r: r @ r / rho(C0, s) / cosine(C0, k, s) ** 2, "not of k_star"),
        (lambda C0, k, s, r: two_key_cost(C0, k, s, r) / 2, "half the cost"),
        (lambda C0, k, s, r: two_key_cost(C0, k, s, r) / r.norm(), "square it"),
        (
            lambda C0, k, s, r: (
                r
                @ r
                * torch.linalg.solve(C0, s).square().sum()
                / (k @ torch.linalg.solve(C0, s)) ** 2
            ),
            "the squared norm of Delta",
        ),
        (lambda C0, k, s, r: torch.outer(r, s), "one number is asked for"),
        (by_matrix, "the number is right. But on the way `by_matrix` makes a matrix of 3 x 4"),
    ],
    ids=range(14),
)
def test_wrong_costs_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_mixed_cost(wrong)

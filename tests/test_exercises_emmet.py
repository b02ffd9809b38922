"""Checks of the chapter "Batched equality: EMMET", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.linalg import solve_triangular

import unified_edit as ue
from unified_edit.errors import InfeasibleError
from unified_edit.objective import Metric
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.emmet import (
    batch_update,
    check_batch_equality,
    check_feasible,
    is_feasible,
)

Check = Callable[[Any], str]


class Problem:
    """C0 (d x d), K (d x E) with cond(L^-1 K) = condition, R (d_out x E)."""

    def __init__(self, seed: int, d: int, E: int, d_out: int, condition: float = 10.0) -> None:
        self.rng = np.random.default_rng(seed)
        K0 = self.normal(d, 3 * d)
        self.C0 = K0 @ K0.T / (3 * d)
        self.L = torch.linalg.cholesky(self.C0)
        spectrum = torch.logspace(0, -np.log10(condition), E, dtype=torch.float64)
        U, V = torch.linalg.qr(self.normal(d, E))[0], torch.linalg.qr(self.normal(E, E))[0]
        self.A = (U * spectrum) @ V.T
        self.K, self.R = self.L @ self.A, self.normal(d_out, E)

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape))

    @property
    def rows(self) -> Tensor:
        return torch.linalg.solve(self.C0, self.K).T


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("emmet-update", "emmet-stationary", "emmet-gram")
@pytest.mark.parametrize("E", [1, 2, 5, 8])
def test_the_update_is_the_formula(E: int) -> None:
    p = Problem(E, 8, E, 3)
    G = p.rows @ p.K
    delta = ue.objective.solve(p.C0, p.K, p.R).delta
    # conditions are 10 (A), 100 (G) and at most some hundreds (C0)
    assert torch.allclose(delta, p.R @ torch.linalg.inv(G) @ p.rows, rtol=1e-8, atol=1e-10)
    assert torch.allclose(delta @ p.C0, p.R @ torch.linalg.inv(G) @ p.K.T, rtol=1e-8, atol=1e-10)
    assert torch.allclose(delta, batch_update(p.C0, p.K, p.R), rtol=1e-8, atol=1e-10)


@pytest.mark.equation("emmet-excess")
def test_every_other_update_costs_more_by_the_cost_of_the_difference() -> None:
    p = Problem(0, 7, 3, 2)
    metric, identity = Metric(p.C0), torch.eye(7, dtype=torch.float64)
    update = ue.objective.solve(metric, p.K, p.R)
    for _ in range(20):
        noise = p.normal(2, 7)
        Z = noise - noise @ p.K @ torch.linalg.pinv(p.K)
        total = metric.cost(update.delta + Z, identity)
        expected = update.diagnosis.preservation_error + metric.cost(Z, identity)
        assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("emmet-price", "emmet-crowding")
def test_the_price_of_a_batch() -> None:
    p = Problem(1, 9, 4, 3)
    G = p.rows @ p.K
    found = ue.objective.solve(p.C0, p.K, p.R).diagnosis.preservation_error
    assert found == pytest.approx(float(torch.trace(p.R @ torch.linalg.solve(G, p.R.T))))
    for i in range(4):  # one fact moves, the others stay
        R = torch.zeros_like(p.R)
        R[:, i] = p.R[:, i]
        others = p.A[:, [j for j in range(4) if j != i]]
        own = p.A[:, i] - others @ torch.linalg.lstsq(others, p.A[:, i]).solution
        found = ue.objective.solve(p.C0, p.K, R).diagnosis.preservation_error
        expected = R.square().sum() / own.square().sum()
        assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.equation("emmet-pair")
@pytest.mark.parametrize("c", [-0.5, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("h", [-1.0, 0.0, 1.0])
def test_the_price_of_a_pair(c: float, h: float) -> None:
    K = torch.tensor([[1.0, c], [0.0, (1 - c * c) ** 0.5]]).double() * torch.tensor([2.0, 5.0])
    second = [h, (1 - h * h) ** 0.5]
    R = torch.tensor([[1.0, second[0]], [0.0, second[1]]]).double() * torch.tensor([2.0, 5.0])
    found = ue.objective.solve(Metric.identity(2), K, R).diagnosis.preservation_error
    assert found == pytest.approx(2 * (1 - c * h) / (1 - c * c))


@pytest.mark.equation("emmet-feasible")
@pytest.mark.parametrize(("E", "rank"), [(2, 2), (3, 2), (4, 4), (5, 4), (6, 3)])
def test_exactly_the_batches_of_full_rank_are_solved(E: int, rank: int) -> None:
    p = Problem(2, 4, 1, 2)
    K, R = p.normal(4, rank) @ p.normal(rank, E), p.normal(2, E)
    assert is_feasible(K, R) == (rank == E)
    if rank == E:
        assert torch.allclose(ue.objective.solve(p.C0, K, R).delta @ K, R)
    else:
        with pytest.raises(InfeasibleError, match=f"rank {rank}"):
            ue.objective.solve(p.C0, K, R)
    possible = p.normal(2, 4) @ K
    assert is_feasible(K, possible)
    limit = ue.objective.solve(p.C0, K, possible, infeasible="least_violation").delta
    assert torch.allclose(limit @ K, possible)


@pytest.mark.equation("emmet-qr", "emmet-condition", "emmet-digits")
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e7])
def test_the_condition_is_not_squared(condition: float) -> None:
    p = Problem(3, 30, 10, 5, condition)
    u = torch.finfo(torch.float64).eps
    update = ue.objective.solve(p.C0, p.K, p.R)
    G = p.A.T @ p.A
    left = torch.cholesky_solve(p.R.T, torch.linalg.cholesky(G)).T
    by_cholesky = left @ solve_triangular(p.L, p.A.T, upper=False, left=False)

    def missed(delta: Tensor) -> float:
        return float((delta @ p.K - p.R).norm() / p.R.norm())

    assert missed(update.delta) < 10 * u * condition
    assert missed(batch_update(p.C0, p.K, p.R)) < 10 * u * condition
    assert 1e-3 * u * condition**2 < missed(by_cholesky) < 10 * u * condition**2
    assert update.diagnosis.condition == pytest.approx(condition, rel=1e-4)
    S = torch.linalg.qr(p.A, mode="r")[1]
    cost = solve_triangular(S, p.R, upper=True, left=False).square().sum()
    assert update.diagnosis.preservation_error == pytest.approx(float(cost), rel=1e-6)


# --- checks ---------------------------------------------------------------------------------------


def rows(C0: Tensor, K: Tensor) -> Tensor:
    return torch.linalg.solve(C0, K).T


def gram(C0: Tensor, K: Tensor) -> Tensor:
    return rows(C0, K) @ K


def factors(C0: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L^-1, Q and S."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(C0))
    return inverse, *torch.linalg.qr(inverse @ K)


def by_pseudoinverse(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    L = torch.linalg.cholesky(C0)
    whitened = R @ torch.linalg.pinv(solve_triangular(L, K, upper=False))
    return solve_triangular(L, whitened, upper=False, left=False)


def by_least_squares(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    L = torch.linalg.cholesky(C0)
    A = solve_triangular(L, K, upper=False)
    whitened = torch.linalg.lstsq(A.T, R.T, driver="gelsd").solution.T
    return solve_triangular(L, whitened, upper=False, left=False)


def by_library(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    return ue.objective.solve(C0, K, R).delta


def by_numpy(C0: Tensor, K: Tensor, R: Tensor) -> Any:
    L = torch.linalg.cholesky(C0)
    Q, S = torch.linalg.qr(solve_triangular(L, K, upper=False))
    left = np.linalg.solve(S.numpy().T, R.numpy().T).T
    return np.linalg.solve(L.numpy().T, Q.numpy() @ left.T).T


def by_cholesky(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(gram(C0, K))
    return torch.cholesky_solve(R.T, factor).T @ rows(C0, K)


def literal(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    return R @ torch.linalg.inv(gram(C0, K)) @ rows(C0, K)


def damped(alpha: float) -> Callable[..., Tensor]:
    def update(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
        G = gram(C0, K) + alpha * torch.eye(K.shape[1])
        return R @ torch.linalg.inv(G) @ rows(C0, K)

    return update


def in_numpy(C0: Tensor, K: Tensor, R: Tensor) -> Any:
    """By the Gram matrix, where nobody sees it."""
    row = np.linalg.solve(C0.numpy(), K.numpy()).T
    return np.linalg.solve(row @ K.numpy(), R.numpy().T).T @ row


def in_float32(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    return batch_update(C0.float(), K.float(), R.float())


def with_cut(cut: float) -> Callable[..., Tensor]:
    def update(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
        L = torch.linalg.cholesky(C0)
        whitened = R @ torch.linalg.pinv(solve_triangular(L, K, upper=False), rtol=cut)
        return solve_triangular(L, whitened, upper=False, left=False)

    return update


def with_factors(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def update(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
        return formula(R, torch.linalg.cholesky(C0), *factors(C0, K))

    return update


def transposed(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    L = torch.linalg.cholesky(C0)
    Q, S = torch.linalg.qr(torch.linalg.solve(L.T, K))
    return R @ torch.linalg.inv(S) @ Q.T @ torch.linalg.inv(L)


def by_columns(K: Tensor, R: Tensor) -> Tensor:
    change = R @ torch.linalg.pinv(K) @ K - R
    return change.norm() < 1e-9 * R.norm()


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_batch_equality, batch_update),
        (check_batch_equality, by_pseudoinverse),
        (check_batch_equality, by_least_squares),
        (check_batch_equality, by_library),
        (check_batch_equality, by_numpy),
        (check_feasible, is_feasible),
        (check_feasible, by_columns),
        (check_feasible, lambda K, R: np.bool_(bool(by_columns(K, R)))),
    ],
    ids=range(8),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda C0, K, R: ..., "returned nothing"),
        (lambda C0, K: K, "must take 3 arguments"),
        (lambda C0, K, R: batch_update(C0, K, R).T, "its transpose"),
        (lambda C0, K, R: (R, K), "one tensor of shape"),
        (lambda C0, K, R: R @ rows(C0, K), "belongs in between"),
        (lambda C0, K, R: R / gram(C0, K).diagonal() @ rows(C0, K), "as if it were alone"),
        (lambda C0, K, R: R @ torch.linalg.pinv(K), "C0 does not occur in it"),
        (lambda C0, K, R: R @ torch.linalg.inv(gram(C0, K)) @ K.T @ C0, "right are K' C0;"),
        (lambda C0, K, R: R @ torch.linalg.inv(gram(C0, K)) @ K.T, "right are K';"),
        (lambda C0, K, R: literal(torch.linalg.inv(C0), K, R), "stands in both places"),
        (
            lambda C0, K, R: R @ torch.linalg.inv(K.T @ C0 @ K) @ rows(C0, K),
            "C0 stands in K' C0\\^-1 K",
        ),
        (with_factors(lambda R, L, Li, Q, S: R @ S.inverse() @ Q.T), "but not L\\^-1"),
        (with_factors(lambda R, L, Li, Q, S: R @ S.inverse() @ Q.T @ L), "right are Q' L;"),
        (with_factors(lambda R, L, Li, Q, S: R @ S.inverse().T @ Q.T @ Li), "S was transposed"),
        (with_factors(lambda R, L, Li, Q, S: R @ S @ Q.T @ Li), "multiplied by S"),
        (transposed, "transpose of L"),
        (damped(0.1), "0.1 was added to the diagonal"),
        (damped(1e-4), "0.0001 was added to the diagonal"),
        (damped(1e-12), "1e-12 was added to the diagonal"),
        (damped(0.37), "0.37 was added to the diagonal"),
        (with_cut(1e-3), "a small singular value was cut off"),
        (with_cut(1e-6), "a small singular value was cut off"),
        (in_numpy, "misses R by .*Is there a matrix like K' C0\\^-1 K"),
        (in_float32, "no more digits than float32 holds"),
        (with_factors(lambda R, L, Li, Q, S: R @ S.inverse() @ Q.T @ Li), "makes an inverse"),
        (by_cholesky, "the formula is right, but for keys of condition 1e\\+07.*by QR"),
        (literal, "the formula is right, but for keys of condition 1e\\+07.*by QR"),
    ],
    ids=range(28),
)
def test_wrong_updates_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_batch_equality(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda K, R: None, "returned nothing"),
        (lambda K, R: torch.linalg.matrix_rank(K), "True or False, and you returned a Tensor"),
        (lambda K, R: "yes", "True or False, and you returned a str"),
        (lambda K, R: 1, "True or False, and you returned an int"),
        (lambda K, R: True, "one key that is to get two different values.*says yes"),
        (lambda K, R: False, "two independent keys.*says no"),
        (lambda K, R: K.shape[1] <= K.shape[0], "one key that is to get two"),
        (
            lambda K, R: K.shape[1] <= K.shape[0] and not torch.equal(K[:, 0], K[:, 1]),
            "E <= d_k is not enough",
        ),
        (lambda K, R: rank(K) == min(K.shape), "four keys of two entries.*at most two"),
        (lambda K, R: rank(K) == K.shape[1], "not for every R: look at R too"),
        (lambda K, R: rank(torch.cat([K, R])) == rank(K) or rank(K) == 1, "two different values"),
        (
            lambda K, R: rank(torch.cat([K, R])) == int(torch.linalg.matrix_rank(K, atol=1e-3)),
            "must be relative",
        ),
    ],
    ids=range(13),
)
def test_wrong_answers_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_feasible(wrong)


def test_one_fact_is_checked_too() -> None:
    def only_batches(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
        return batch_update(C0, K, R) if K.shape[1] > 1 else R @ K.T

    with pytest.raises(ExerciseError, match="Delta of 1 fact is not right"):
        check_batch_equality(only_batches)

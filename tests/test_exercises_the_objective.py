"""Checks of the chapter on the preservation–memorization objective, and its equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.linalg import solve_triangular

import unified_edit as ue
from unified_edit.objective import Metric
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.the_objective import (
    both_errors,
    cheapest_of_its_kind,
    check_move,
    check_objective_errors,
    check_strip,
    key_moves,
)

Check = Callable[[Any], str]

FORMS = (0.0, 0.3)  # ridges: the equality, and least squares


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def moment(d: int) -> Tensor:
    K0 = draw(d, 3 * d, seed=d)
    return K0 @ K0.T / (3 * d)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """C0 (5 x 5), K (5 x 2), R (3 x 2)."""
    return moment(5), draw(5, 2, seed=6), draw(3, 2, seed=7)


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("objective-residual", "objective-memorize")
def test_a_layer_with_the_residual_added_gives_what_is_wanted() -> None:
    C0, K, _ = problem()
    layer = torch.nn.Linear(5, 3).double()
    with torch.no_grad():
        wanted = draw(3, 2, seed=8)
        R = wanted - layer.bias[:, None] - layer.weight @ K
        update = ue.objective.solve(C0, K, R)
        half = ue.objective.solve(C0, K, R, ridge=1.0)
        before = layer.weight.clone()
        layer.weight.copy_(before + update.delta)
        assert torch.allclose(layer(K.T).T, wanted)
        layer.weight.copy_(before + half.delta)
        missed = (layer(K.T).T - wanted).square().sum()
    assert torch.isclose(both_errors(half.delta, C0, K, R)[1], missed)
    relative = half.diagnosis.memorization_error
    assert relative == pytest.approx(float(missed.sqrt() / R.norm()), rel=1e-10)


@pytest.mark.equation("objective-equality", "objective-least-squares")
@pytest.mark.parametrize("ridge", FORMS)
def test_solve_finds_where_the_objective_has_its_minimum(ridge: float) -> None:
    """At a minimum of a convex function along every direction that is allowed it goes up."""
    C0, K, R = problem()
    solved = ue.objective.solve(C0, K, R, ridge=ridge)

    def objective(Delta: Tensor) -> float:
        preserve, memorize = both_errors(Delta, C0, K, R)
        return float(preserve if ridge == 0 else ridge * preserve + memorize)

    lowest = objective(solved.delta)
    assert solved.diagnosis.preservation_error == pytest.approx(
        float(both_errors(solved.delta, C0, K, R)[0]), rel=1e-12
    )
    for seed in range(20):
        step = draw(3, 5, seed=seed)
        if ridge == 0:
            step -= step @ K @ torch.linalg.pinv(K)  # the equality holds along it
            assert torch.allclose((solved.delta + step) @ K, R)
        assert objective(solved.delta + step) > lowest
        # the slope, by central differences that are exact for a square
        slope = objective(solved.delta + step) - objective(solved.delta - step)
        assert abs(slope) < 1e-10 * lowest + 1e-10


@pytest.mark.equation("objective-whitened")
@pytest.mark.parametrize("ridge", FORMS)
def test_in_whitened_coordinates_it_is_ordinary_least_norm(ridge: float) -> None:
    C0, K, R = problem()
    metric = Metric(C0)
    A, Delta = metric.whiten(K), ue.objective.solve(metric, K, R, ridge=ridge).delta
    B = Delta @ metric.factor
    assert torch.allclose(metric.factor @ A, K)
    assert torch.allclose(metric.unwhiten(B), Delta)
    assert torch.isclose(B.square().sum(), torch.trace(Delta @ C0 @ Delta.T))
    assert torch.allclose(B @ A, Delta @ K)
    # ordinary: least norm by the pseudoinverse, the ridge as five more equations
    eye = torch.eye(5, dtype=torch.float64)
    wide = torch.cat([ridge**0.5 * eye, A], dim=1) if ridge else A
    target = torch.cat([torch.zeros(3, 5), R], dim=1) if ridge else R
    assert torch.allclose(B, target @ torch.linalg.pinv(wide))


@pytest.mark.equation("objective-row-space", "objective-split")
@pytest.mark.parametrize("ridge", FORMS)
def test_answers_are_combinations_of_the_new_keys_rows(ridge: float) -> None:
    C0, K, R = problem()
    Delta = ue.objective.solve(C0, K, R, ridge=ridge).delta
    rows = K.T @ torch.linalg.inv(C0)
    assert int(torch.linalg.matrix_rank(torch.cat([rows, Delta]))) == 2
    assert torch.allclose(cheapest_of_its_kind(Delta, K, C0), Delta)

    other = draw(3, 5, seed=9)
    inside = cheapest_of_its_kind(other, K, C0)
    outside = other - inside
    assert int(torch.linalg.matrix_rank(torch.cat([rows, inside]))) == 2
    assert float((outside @ K).norm()) < 1e-12
    costs = [float(both_errors(part, C0, K, R)[0]) for part in (other, inside, outside)]
    assert costs[0] == pytest.approx(costs[1] + costs[2], rel=1e-12)
    assert torch.allclose(inside, ue.objective.solve(C0, K, other @ K).delta)


@pytest.mark.equation("objective-every-key", "objective-bound")
def test_a_key_moves_by_its_resemblance_and_no_further_than_the_bound() -> None:
    C0, K, _ = problem()
    M, X, inverse = draw(3, 2, seed=10), draw(5, 30, seed=11), torch.linalg.inv(C0)
    Delta = M @ K.T @ inverse
    assert torch.allclose(key_moves(M, K, C0, X), Delta @ X)
    for update in (Delta, draw(3, 5, seed=12)):
        cost, _ = both_errors(update, C0, K, draw(3, 2))
        assert bool(((update @ X).square().sum(0) <= cost * (X * (inverse @ X)).sum(0)).all())
    # and it is reached: by the update that moves one key and costs least
    x, r = X[:, :1], draw(3, 1)
    tight = r @ x.T @ inverse / (x.T @ inverse @ x)
    limit = both_errors(tight, C0, x, r)[0] * (x.T @ inverse @ x)
    assert float(limit) == pytest.approx(float(r.square().sum()), rel=1e-10)


# --- checks ---------------------------------------------------------------------------------------


def as_traces(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> Any:
    missed = Delta @ K - R
    return torch.stack([torch.trace(Delta @ C0 @ Delta.T), torch.trace(missed.T @ missed)])


def row_by_row(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> Any:
    factor = torch.linalg.cholesky(C0)
    return [
        sum(float((row @ factor).square().sum()) for row in Delta),
        sum(float((Delta @ k - r).norm() ** 2) for k, r in zip(K.T, R.T, strict=True)),
    ]


def whitened_moves(M: Tensor, K: Tensor, C0: Tensor, X: Tensor) -> Tensor:
    L = torch.linalg.cholesky(C0)
    A, Z = (solve_triangular(L, matrix, upper=False) for matrix in (K, X))
    return M @ (A.T @ Z)


def with_solve(Delta: Tensor, K: Tensor, C0: Tensor) -> Tensor:
    return ue.objective.solve(C0, K, Delta @ K).delta


def with_gram(Delta: Tensor, K: Tensor, C0: Tensor) -> Tensor:
    rows = torch.linalg.solve(C0, K).T
    return Delta @ K @ torch.linalg.solve(rows @ K, rows)


def with_pinv(Delta: Tensor, K: Tensor, C0: Tensor) -> Any:
    L = torch.linalg.cholesky(C0)
    A = torch.linalg.inv(L) @ K
    return (Delta @ L @ A @ torch.linalg.pinv(A) @ torch.linalg.inv(L)).numpy()


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_objective_errors, both_errors),
        (check_objective_errors, as_traces),
        (check_objective_errors, row_by_row),
        (check_move, key_moves),
        (check_move, whitened_moves),
        (check_move, lambda M, K, C0, X: M @ (torch.linalg.solve(C0, K).T @ X)),
        (check_move, lambda M, K, C0, X: (M @ K.T @ torch.linalg.solve(C0, X)).numpy()),
        (check_strip, cheapest_of_its_kind),
        (check_strip, with_solve),
        (check_strip, with_gram),
        (check_strip, with_pinv),
    ],
    ids=range(11),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


def with_errors(change: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """A solution whose two errors are those of `change(preserve, memorize, Delta, C0, K, R)`."""

    def solution(Delta: Tensor, C0: Tensor, K: Tensor, R: Tensor) -> Any:
        return change(*both_errors(Delta, C0, K, R), Delta, C0, K, R)

    return solution


def squared(matrix: Tensor) -> Tensor:
    return matrix.square().sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, m, *_: p, "two things are asked for"),
        (lambda p, m, *_: (p, m, p), "two things are asked for"),
        (lambda p, m, *_: (m, p), "in the wrong order"),
        (
            lambda p, m, D, C0, K, R: (D @ C0 @ D.T, m),
            "the preservation error for E = 5 must have shape",
        ),
        (lambda p, m, D, C0, K, R: (squared(D @ C0), m), "once; you have"),
        (lambda p, m, D, C0, K, R: (squared(D), m), "C0 is missing"),
        (lambda p, m, D, C0, K, R: ((D @ C0 @ D.T).sum(), m), "only the diagonal counts"),
        (lambda p, m, D, *_: (p / len(D), m), "divided by the number of outputs"),
        (lambda p, m, *_: (p.sqrt(), m), "this is a root"),
        (lambda p, m, *_: (p + m, m), "do not belong in it"),
        (lambda p, m, *_: (p, m.sqrt()), "the objective has its square"),
        (lambda p, m, D, C0, K, R: (p, m.sqrt() / R.norm()), "relative error that the library"),
        (lambda p, m, D, C0, K, R: (p, m / squared(R)), "squared relative error"),
        (lambda p, m, D, C0, K, R: (p, m / K.shape[1]), "a sum over facts"),
        (lambda p, m, D, C0, K, R: (p, m / R.numel()), "a sum over all entries"),
        (lambda p, m, D, C0, K, R: (p, squared(D @ K)), "is missing"),
        (lambda p, m, D, C0, K, R: (p, squared(D @ K + R)), "the sign of R"),
        (lambda p, m, D, C0, K, R: (p, squared((D @ K - R).sum(1))), "square first, then add"),
    ],
    ids=range(18),
)
def test_wrong_errors_are_told_why(change: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_objective_errors(with_errors(change))


def solve_with(matrix: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """M K' S^-1 X with S made from C0."""
    return lambda M, K, C0, X: M @ K.T @ torch.linalg.solve(matrix(C0), X)


def transposed_factor(M: Tensor, K: Tensor, C0: Tensor, X: Tensor) -> Tensor:
    U = torch.linalg.cholesky(C0).T
    return M @ torch.linalg.solve(U, K).T @ torch.linalg.solve(U, X)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda M, K, C0, X: ..., "returned nothing"),
        (lambda M, K, C0, X: M @ torch.linalg.solve(C0, K).T, "this is Delta, 2 x 4"),
        (lambda M, K, C0, X: K.T @ torch.linalg.solve(C0, X), "multiply it by M from the left"),
        (lambda M, K, C0, X: key_moves(M, K, C0, X).T, "must have shape"),
        (lambda M, K, C0, X: M @ K.T, r"must have shape \(2, 5\), yours has \(2, 4\)$"),
        (
            lambda M, K, C0, X: M @ torch.linalg.solve(C0, K).T @ X,
            "the numbers are right. But your function makes Delta on the way",
        ),
        (
            lambda M, K, C0, X: M @ (K.T @ (torch.linalg.inv(C0) @ X)),
            "the numbers are right. But your function makes an inverse",
        ),
        (lambda M, K, C0, X: M @ K.T @ C0 @ X, "its inverse belongs"),
        (lambda M, K, C0, X: M @ K.T @ X, "is missing"),
        (solve_with(torch.linalg.cholesky), "only one of the two was whitened"),
        (solve_with(lambda C0: C0 @ C0), "once is enough"),
        (transposed_factor, "the transpose of L"),
    ],
    ids=range(13),
)
def test_wrong_moves_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_move(wrong)


def on_span(matrix: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Delta projected, in the ordinary inner product, on the span of a matrix of K and C0."""

    def solution(Delta: Tensor, K: Tensor, C0: Tensor) -> Tensor:
        Q, _ = torch.linalg.qr(matrix(K, C0))
        return Delta @ Q @ Q.T

    return solution


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda Delta, K, C0: None, "returned nothing"),
        (lambda Delta, K, C0: Delta @ K, "must have shape"),
        (lambda Delta, K, C0: Delta, "nothing was taken away"),
        (lambda Delta, K, C0: Delta - with_solve(Delta, K, C0), "the one to be taken away"),
        (on_span(lambda K, C0: K), "cheapest for C0 = I"),
        (
            lambda Delta, K, C0: with_solve(Delta, K, C0) @ torch.linalg.cholesky(C0),
            "multiply by L.-1 from the right",
        ),
        (on_span(lambda K, C0: Metric(C0).whiten(K)), "you applied it to Delta"),
        (on_span(lambda K, C0: C0 @ K), "the theorem has K' C0.-1"),
        (on_span(lambda K, C0: torch.linalg.solve(C0, K)), "that changes Delta K"),
        (lambda Delta, K, C0: 2 * with_solve(Delta, K, C0), "2 times what it should be"),
    ],
    ids=range(11),
)
def test_wrongly_stripped_updates_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_strip(wrong)

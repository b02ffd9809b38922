"""What the checks of updates say of a wrong one, and what they notice while it is computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.calling import Watch
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.updates import (
    cost,
    equality_said,
    lam_of,
    lam_said,
    moment,
    more_than,
    other_lam,
    ridge_of,
)


def damped(C0: Tensor, K: Tensor, R: Tensor, mu: float) -> Tensor:
    return torch.linalg.solve(mu * C0 + K @ K.T, K @ R.T).T


# --- lambda read off a result ---------------------------------------------------------------------


@pytest.mark.parametrize(("d", "E"), [(6, 3), (4, 4), (3, 7)])
@pytest.mark.parametrize("mu", [1e-3, 0.7, 1.4, 300.0])
def test_lambda_is_read_off_the_update(d: int, E: int, mu: float) -> None:
    C0, K, R = moment(0, d), draw(1, d, E), draw(2, 2, E)
    assert lam_of(damped(C0, K, R, mu), C0, K, R) == pytest.approx(mu, rel=1e-6)
    (message,) = other_lam(damped(C0, K, R, mu), C0, K, R, mu / 2)
    assert f"for lam = {mu:.3g}, 2 times the lam = {mu / 2:g}" in message


def test_what_is_no_update_of_that_form_has_no_lambda() -> None:
    C0, K, R = moment(0, 5), draw(1, 5, 3), draw(2, 2, 3)
    right = damped(C0, K, R, 0.7)
    for wrong in (
        -right,
        2 * right,
        0 * right,
        right * 1.0001,
        right + 1,
        draw(3, 2, 5),
        right @ C0,
    ):
        assert lam_of(wrong, C0, K, R) is None
        assert other_lam(wrong, C0, K, R, 0.7) == {}


@pytest.mark.parametrize("mu", [1e-12, 1e-10, 1e-6])
def test_a_small_ridge_is_read_off_where_keys_are_nearly_dependent(mu: float) -> None:
    C0, R = moment(0, 6), draw(2, 2, 3)
    U, V = torch.linalg.qr(draw(3, 6, 3)).Q, torch.linalg.qr(draw(4, 3, 3)).Q
    L, spectrum = torch.linalg.cholesky(C0), torch.tensor([1.0, 1e-3, 1e-6]).double()
    K = L @ (U * spectrum) @ V.T

    def filtered(factors: Tensor) -> Tensor:
        return ((R @ V) * factors) @ U.T @ torch.linalg.inv(L)

    right = filtered(1 / spectrum)
    found = filtered(spectrum / (spectrum.square() + mu))
    assert ridge_of(found, C0, K, R) == pytest.approx(mu, rel=1e-3)
    cut = filtered(torch.tensor([1.0, 1e3, 0.0]).double())
    for wrong in (right, -right, 2 * right, right / 2, 0 * right, cut, found + 1e3, draw(5, 2, 6)):
        assert ridge_of(wrong, C0, K, R) is None
    gram = K.T @ torch.linalg.solve(C0, K)
    lost = torch.linalg.solve(gram, R.T).T @ torch.linalg.solve(C0, K).T
    assert ridge_of(lost, C0, K, R) is None, "this is rounding"


# --- sentences ------------------------------------------------------------------------------------


def test_what_is_said_of_an_equality_is_so() -> None:
    C0, K, R = moment(0, 5), draw(1, 5, 2), draw(2, 3, 2)
    row = torch.linalg.solve(C0, K).T
    best = R @ torch.linalg.inv(row @ K) @ row
    assert equality_said(1.25 * best, best, C0, K, "Delta K = R") == (
        "Delta K = R does not hold: it is off by 0.25 relative"
    )
    free = draw(3, 3, 5)
    other = best + free - free @ K @ torch.linalg.pinv(K)
    said = equality_said(other, best, C0, K, "Delta K = R")
    ratio = float(re.search(r"costs ([\d.]+) times the least$", said)[1])  # type: ignore[index]
    assert ratio == pytest.approx(cost(other, C0) / cost(best, C0), rel=1e-2)
    assert "holds, and the update costs" in said
    assert equality_said(0 * best, best, C0, K).startswith("It must do to K what Delta does")


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(3.14159, "3.14 times"), (1.5, "50 % more than"), (1.002, "0.2 % more than"), (1, "0 % more")],
)
def test_a_ratio_near_one_is_told_in_percent(ratio: float, said: str) -> None:
    assert more_than(ratio, "the least").startswith(said)


def test_a_lambda_that_is_nearly_right_is_told_by_its_error() -> None:
    assert (
        lam_said(0.70007, 0.7, "the update")
        == "the update for a lam that is off by 1.0e-04 of itself"
    )
    assert lam_said(1e-3, 0.0, "the update").endswith("and not for the lam = 0 that you were given")


# --- watching -------------------------------------------------------------------------------------


A = moment(6, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda A: torch.linalg.solve(A, A + 1),
        lambda A: torch.linalg.solve(A, torch.ones(3, 1).double()),
        lambda A: torch.linalg.solve(A[:1, :1], torch.eye(1).double()),
        lambda A: torch.linalg.pinv(A[:, :2]),
        lambda A: torch.linalg.matrix_power(A, 2),
        lambda A: torch.linalg.cholesky(A),
        lambda A: torch.cholesky_solve(A, torch.linalg.cholesky(A)),
        lambda A: 1 / A,
    ],
    ids=range(8),
)
def test_what_makes_no_inverse_is_let_pass(function: Callable[..., Any]) -> None:
    watch = Watch(function)
    watch(A)
    watch.refuse_inverses("do something else")
    assert watch.inverses == []
    assert not watch.singular()


def test_conditions_are_noted_and_singular_matrices_too() -> None:
    flat = torch.diag(torch.tensor([1.0, 1e-5, 0.0]).double())
    watch = Watch(lambda A: torch.linalg.solve(A[:2, :2], A[:2]))
    watch(flat)
    assert watch.hardest(2) == pytest.approx(1e5)
    assert watch.hardest(3) == 0
    assert watch.singular() == 0
    watch = Watch(lambda A: torch.linalg.pinv(A))
    watch(flat)
    assert watch.singular() == 0, "of a pseudoinverse it is no mistake"
    watch = Watch(torch.linalg.inv)
    with pytest.raises(ExerciseError, match="singular"):
        watch(flat)
    assert watch.singular() == 3


def test_matrices_that_were_made_are_known_again() -> None:
    watch = Watch(lambda A: (torch.stack([A, 2 * A]).sum(), (3 * A).T.sum())[0])
    watch(A)
    for made in (2 * A, 3 * A, (3 * A).T):
        assert watch.has_made(made)
    assert not watch.has_made(4 * A)
    assert not watch.has_made(A[:, :2])


@pytest.mark.parametrize(
    "function",
    [
        lambda A: A.to_sparse() @ A,
        lambda A: torch.ones(2, 2, device="meta"),
        lambda A: torch.complex(A, A),
        lambda A: (A > 0) & (A < 1),
        lambda A: torch.stack([A, A]).inverse(),
        lambda A: torch.ones(2, 2, dtype=torch.int64),
    ],
    ids=range(6),
)
def test_watching_changes_nothing(function: Callable[..., Any]) -> None:
    watch = Watch(function)
    assert watch(A).shape == function(A).shape
    assert not watch.has_made(torch.full((2, 2), 0.5).double())


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda A: torch.linalg.solve(A), "TypeError"),
        (lambda A: torch.linalg.inv(A[:2]), "RuntimeError"),
        (lambda A: torch.linalg.inv(1), "TypeError"),
        (lambda A: torch.linalg.inv(A * float("nan")) + A[:1, :2], "RuntimeError"),
        (lambda A: np.linalg.inv(A[:2]), "LinAlgError"),
    ],
    ids=range(5),
)
def test_an_error_stays_the_readers_own(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(ExerciseError, match=f"your function raised .*{problem}"):
        Watch(function)(A)

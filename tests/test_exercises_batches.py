"""The chapter "Batch after batch": its equations, and the check of its exercise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unified_edit.objective import Held, solve
from unified_edit.teaching.exercises import ExerciseError, check_held_and_weighed
from unified_edit.teaching.exercises.batches import held_and_weighed
from unified_edit.teaching.exercises.checking import draw, relative_error
from unified_edit.teaching.exercises.memit import least_squares_update
from unified_edit.teaching.exercises.updates import moment

D, OUT, SIZES = 9, 4, (2, 3, 1)


def emmet(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """R (K' C0^-1 K)^-1 K' C0^-1, to the letter."""
    inverse = torch.linalg.inv(C0)
    return R @ torch.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Keys and values of three batches."""
    return [(draw(20 + t, D, E), draw(30 + t, OUT, E)) for t, E in enumerate(SIZES)]


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("held-update", "batches-residual")
@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_held_update_is_the_cheapest_of_all_conditions(n: int) -> None:
    C0, past, K, R = moment(1, D), draw(2, D, n), draw(3, D, 3), draw(4, OUT, 3)
    asked = torch.cat([torch.zeros(OUT, n).double(), R], dim=1)
    expected = emmet(C0, torch.cat([past, K], dim=1), asked)
    assert relative_error(solve(Held(C0, past), K, R).delta, expected) < 1e-10
    if n:
        assert relative_error(held_and_weighed(C0, past, K, R, 0.0), expected) < 1e-10


@pytest.mark.equation("held-sum", "batches-disturbance")
def test_held_batches_add_up_to_one_and_blind_ones_do_not() -> None:
    C0, W0, metric = moment(1, D), draw(2, OUT, D), None
    held = blind = W0
    for K, V in pairs():
        held = held + solve(metric or Held(C0, K[:, :0]), K, V - held @ K).delta
        blind = blind + emmet(C0, K, V - blind @ K)
        metric = metric.holding(K) if metric else Held(C0, K)
    K, V = (torch.cat(each, dim=1) for each in zip(*pairs(), strict=True))
    assert relative_error(held - W0, emmet(C0, K, V - W0 @ K)) < 1e-10
    assert relative_error(held @ K, V) < 1e-10
    assert relative_error(blind @ K, V) > 0.1


@pytest.mark.equation("soft-sum")
def test_weighed_batches_add_up_to_one() -> None:
    C0, W0, lam = moment(1, D), draw(2, OUT, D), 0.4
    W, bracket = W0, lam * C0
    for K, V in pairs():
        bracket = bracket + K @ K.T
        W = W + (V - W @ K) @ K.T @ torch.linalg.inv(bracket)
    K, V = (torch.cat(each, dim=1) for each in zip(*pairs(), strict=True))
    assert relative_error(W - W0, least_squares_update(C0, K, V - W0 @ K, lam)) < 1e-10


# --- the check ------------------------------------------------------------------------------------


def by_library(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    return solve(Held(C0, past), K, R, ridge=lam).delta


def in_other_coordinates(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """MEMIT's formula in a basis of what is orthogonal to the past: Delta = X N'."""
    N = torch.linalg.svd(past.T, full_matrices=True).Vh[past.shape[1] :].T
    return least_squares_update(N.T @ C0 @ N, N.T @ K, R, lam) @ N.T


@pytest.mark.parametrize("solution", [held_and_weighed, by_library, in_other_coordinates])
def test_right_solutions_pass(solution: Callable[..., Any]) -> None:
    assert check_held_and_weighed(solution).startswith("Right. ")


def with_past_weighed(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    asked = torch.cat([torch.zeros(len(R), past.shape[1]).double(), R], dim=1)
    return least_squares_update(C0, torch.cat([past, K], dim=1), asked, lam)


def made_to_hold(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """The blind update less the cheapest one that does the same to the past."""
    blind = least_squares_update(C0, K, R, lam)
    return blind - emmet(C0, past, blind @ past)


def unwhitened(C0: Tensor, past: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    Q = torch.linalg.qr(past).Q
    return least_squares_update(C0, K - Q @ Q.T @ K, R, lam)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda C0, past, K, R, lam: None, "returned nothing"),
        (lambda C0, past, K, R, lam: by_library(C0, past, K, R, lam).T, "its transpose"),
        (
            lambda C0, past, K, R, lam: least_squares_update(C0, K, R, lam),
            "the past is left out",
        ),
        (with_past_weighed, "a soft history"),
        (made_to_hold, "made to leave it alone afterwards"),
        (
            lambda C0, past, K, R, lam: by_library(C0, past, K, R, 0.0),
            "lam does not enter",
        ),
        (unwhitened, "before they were whitened"),
        (
            lambda C0, past, K, R, lam: by_library(torch.eye(6).double(), past, K, R, lam),
            "C0 does not enter",
        ),
        (
            lambda C0, past, K, R, lam: by_library(C0, past, K, R, lam) @ torch.linalg.cholesky(C0),
            "this is the whitened update",
        ),
        (
            lambda C0, past, K, R, lam: by_library(C0, past, K, R, lam) @ C0,
            "multiplied by L;|Delta past must be zero",
        ),
        (
            lambda C0, past, K, R, lam: by_library(C0, past, K, R, 2 * lam),
            "for lam = 1.4, 2 times the lam = 0.7",
        ),
        (
            lambda C0, past, K, R, lam: by_library(C0, past, K, R, lam) + 1.0,
            "Delta past must be zero",
        ),
    ],
    ids=range(13),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_held_and_weighed(wrong)

"""The chapter "Where this goes": the checks of its exercises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unified_edit.objective import Metric, NullSpace, solve
from unified_edit.teaching.exercises import (
    ExerciseError,
    check_gradient_update,
    check_low_curvature,
)
from unified_edit.teaching.exercises.checking import draw, relative_error
from unified_edit.teaching.exercises.where_this_goes import gradient_update, low_curvature


@pytest.mark.equation("goes-ultraedit")
@pytest.mark.parametrize("E", [1, 4])
def test_gradients_are_written_by_the_solver(E: int) -> None:
    K, gradients = draw(1, 7, E), draw(2, 3, E)
    R = -0.3 * K.square().sum(dim=0) * gradients
    expected = solve(Metric.identity(7), K, R, ridge=1.0).delta
    assert relative_error(gradient_update(K, gradients, 0.3), expected) < 1e-12


@pytest.mark.equation("goes-low-curvature")
def test_with_equal_values_the_projector_is_alphaedits() -> None:
    X, G = draw(3, 6, 20), draw(4, 3, 6)
    C0 = X @ X.T / 20
    N = NullSpace(C0, 0.8).basis
    assert 0 < N.shape[1] < 6
    found = low_curvature(G, C0, torch.eye(3, dtype=torch.float64), 0.8)
    assert relative_error(found, G @ N @ N.T) < 1e-12


def test_right_answers_are_right() -> None:
    assert check_gradient_update(gradient_update).startswith("Right.")
    assert check_low_curvature(low_curvature).startswith("Right.")


WRONG: list[tuple[Any, Callable[..., Any], str]] = [
    (check_gradient_update, lambda K, g, eta: -eta * g @ K.T, "there is no inverse"),
    (check_gradient_update, lambda K, g, eta: gradient_update(K, g, 1.0), "eta does not enter"),
    (
        check_gradient_update,
        lambda K, g, eta: gradient_update(K, g / K.square().sum(dim=0), eta),
        "squared lengths",
    ),
    (
        check_low_curvature,
        lambda G, C0, Q, theta: G - low_curvature(G, C0, Q, theta),
        "from theta on",
    ),
    (
        check_low_curvature,
        lambda G, C0, Q, theta: low_curvature(G, C0, torch.eye(len(Q)).double(), theta),
        "Omega does not enter",
    ),
]


@pytest.mark.parametrize(("check", "answer", "said"), WRONG)
def test_what_is_wrong_is_said(check: Any, answer: Callable[..., Any], said: str) -> None:
    with pytest.raises(ExerciseError, match=said):
        check(answer)

"""The chapter "Hook layers": the check of its exercise, and its two bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unified_edit.editing.hook_gates import quantile_threshold, z_score
from unified_edit.teaching.exercises import ExerciseError, check_gated
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.hook_layers import gated


def one_by_one(W0: Tensor, W_h: Tensor, K0: Tensor, q: float, K: Tensor) -> Tensor:
    """To the letter: the library's quantile, and a loop over keys."""
    tau = quantile_threshold(torch.stack([((W_h - W0) @ k).norm() for k in K0.T]), q)
    columns = [W_h @ k if float(((W_h - W0) @ k).norm()) >= tau else W0 @ k for k in K.T]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("solution", [gated, one_by_one])
def test_right_solutions_pass(solution: Callable[..., Any]) -> None:
    assert check_gated(solution).startswith("Right. ")


def scored(score: Callable[..., Tensor], tau: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A gate with another score, or another threshold."""

    def gate(W0: Tensor, W_h: Tensor, K0: Tensor, q: float, K: Tensor) -> Tensor:
        opened = score(W0, W_h, K) >= tau(score(W0, W_h, K0), score(W0, W_h, K), q)
        return torch.where(opened, W_h @ K, W0 @ K)

    return gate


def moved(W0: Tensor, W_h: Tensor, K: Tensor) -> Tensor:
    return ((W_h - W0) @ K).norm(dim=0)


def upper(known: Tensor, asked: Tensor, q: float) -> Tensor:
    return torch.quantile(known, 1 - q)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda W0, W_h, K0, q, K: None, "returned nothing"),
        (lambda W0, W_h, K0, q, K: W_h @ K, "open at every key"),
        (lambda W0, W_h, K0, q, K: W0 @ K, "shut at every key"),
        (lambda W0, W_h, K0, q, K: gated(W0, W_h, K0, q, K) - W0 @ K, "these are the differences"),
        (lambda W0, W_h, K0, q, K: gated(W_h, W0, K0, q, K), "open below the threshold"),
        (lambda W0, W_h, K0, q, K: gated(W0, W_h, K0, 1 - q, K), "the q quantile"),
        (scored(moved, lambda known, asked, q: torch.quantile(asked, 1 - q)), "asked, K"),
        (scored(lambda W0, W_h, K: (W_h @ K).norm(dim=0), upper), "the length of W_h k"),
        (scored(lambda W0, W_h, K: K.norm(dim=0), upper), "the length of the key"),
        (
            scored(lambda W0, W_h, K: z_score(((W_h - W0) @ K).T), upper),
            "as the published gate does",
        ),
    ],
    ids=range(11),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_gated(wrong)


@pytest.mark.equation("hooks-z", "hooks-z-bound")
@pytest.mark.parametrize("n", [2, 3, 6, 7, 20])
def test_how_far_one_of_n_can_stand_out(n: int) -> None:
    Z = z_score(draw(n, 400, n, 2))
    x = draw(n, 400, n, 2).norm(dim=-1)
    literal = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    torch.testing.assert_close(Z, literal)
    spike = torch.zeros(n, 1, dtype=torch.float64)
    spike[n // 2] = 3.0
    bound = (n - 1) / n**0.5
    assert float(Z.max()) <= bound * (1 + 1e-9)
    assert float(z_score(spike).max()) == pytest.approx(bound, rel=1e-12)


@pytest.mark.equation("hooks-causal", "hooks-markov")
@pytest.mark.parametrize("q", [0.5, 0.1, 0.01])
def test_the_cost_bounds_the_threshold(q: float) -> None:
    D, K = draw(1, 4, 6), draw(2, 6, 2000)
    C0 = K @ K.T / K.shape[1]
    scores = (D @ K).norm(dim=0)
    tau = quantile_threshold(scores, q)
    assert float((scores > tau).double().mean()) <= q
    assert tau**2 <= float((D @ C0 * D).sum()) / q
    # and it is nearly met, where a share q of the keys is moved, and all others not at all
    few = torch.zeros(2000, dtype=torch.float64)
    few[: round(2000 * q) + 1] = 1.0
    assert quantile_threshold(few, q) ** 2 >= 0.9 * float(few.square().mean()) / q

"""The chapter "Mass editing": the price of one more fact, and the check of its exercise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_edit.objective import solve
from unified_edit.teaching.exercises import ExerciseError, check_one_more
from unified_edit.teaching.exercises.checking import draw
from unified_edit.teaching.exercises.mass_editing import one_more
from unified_edit.teaching.exercises.updates import moment


def price(C0: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """tr(R G^-1 R')."""
    return torch.trace(R @ torch.linalg.inv(K.T @ torch.linalg.inv(C0) @ K) @ R.T)


def by_difference(C0: Tensor, K: Tensor, R: Tensor, k: Tensor, r: Tensor) -> Tensor:
    """The batch with the fact, less the batch without."""
    more = torch.cat([K, k[:, None]], dim=1), torch.cat([R, r[:, None]], dim=1)
    return price(C0, *more) - price(C0, K, R)


@pytest.mark.equation("mass-one-more")
def test_the_price_of_one_more_fact() -> None:
    for seed, E in enumerate((1, 3, 6)):
        C0, K, R = moment(seed, 7), draw(10 + seed, 7, E), draw(20 + seed, 4, E)
        k, r = draw(30 + seed, 7), draw(40 + seed, 4)
        found = one_more(C0, K, R, k, r)
        assert torch.isclose(found, by_difference(C0, K, R, k, r), rtol=1e-9)
        delta = solve(C0, K, R).delta
        assert float(one_more(C0, K, R, k, delta @ k)) < 1e-9 * float(found)


def test_the_difference_of_two_batches_passes() -> None:
    assert check_one_more(by_difference).startswith("Right.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda C0, K, R, k, r: r @ r / (k @ torch.linalg.solve(C0, k)), "alone"),
        (lambda C0, K, R, k, r: by_difference(C0, K, 0 * R, k, r), "surprise is missing"),
        (lambda C0, K, R, k, r: by_difference(C0, K, R, k, -r), "sign of Delta k"),
        (
            lambda C0, K, R, k, r: price(
                C0, torch.cat([K, k[:, None]], dim=1), torch.cat([R, r[:, None]], dim=1)
            ),
            "all facts cost together",
        ),
        (
            lambda C0, K, R, k, r: by_difference(torch.eye(len(C0)).double(), K, R, k, r),
            "C0 does not enter",
        ),
    ],
)
def test_what_is_wrong_is_said(wrong, message) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_one_more(wrong)

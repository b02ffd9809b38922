"""Checks of the chapter "A hundred real edits"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.teaching.exercises import ExerciseError, check_paired_interval


def S(scores: Any) -> Any:
    return 3 / (1 / scores).sum(-1)


def means(scores: Tensor, drawn: Tensor) -> Tensor:
    return scores[drawn].mean(dim=1)


def gained(new: Tensor, old: Tensor, drawn: Tensor) -> Tensor:
    return S(means(new, drawn)) - S(means(old, drawn))


def ends(numbers: Tensor, low: float = 0.025, high: float = 0.975) -> Any:
    return numbers.quantile(low), numbers.quantile(high)


def by_quantile(new: Tensor, old: Tensor, drawn: Tensor) -> Any:
    return ends(gained(new, old, drawn))


def in_numpy(new: Tensor, old: Tensor, drawn: Tensor) -> Any:
    both = [S(each.numpy()[drawn.numpy()].mean(axis=1)) for each in (new, old)]
    return np.quantile(both[0] - both[1], [0.025, 0.975])


def one_by_one(new: Tensor, old: Tensor, drawn: Tensor) -> Any:
    numbers = [float(S(new[row].mean(0)) - S(old[row].mean(0))) for row in drawn]
    return [float(np.quantile(numbers, q)) for q in (0.025, 0.975)]


@pytest.mark.parametrize("solution", [by_quantile, in_numpy, one_by_one])
def test_right_solutions_pass(solution: Callable[..., Any]) -> None:
    assert check_paired_interval(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda new, old, drawn: ..., "returned nothing"),
        (lambda new, old, drawn: gained(new, old, drawn), "two things are asked for"),
        (lambda new, old, drawn: by_quantile(old, new, drawn), "old minus new"),
        (lambda new, old, drawn: by_quantile(new, old, drawn)[::-1], "changed places"),
        (lambda new, old, drawn: ends(gained(new, old, drawn), 0.05, 0.95), "of 90 %"),
        (lambda new, old, drawn: ends(gained(new, old, drawn), 0.0, 1.0), "the largest diff"),
        (
            lambda new, old, drawn: (
                torch.stack(ends(S(means(new, drawn)))) - torch.stack(ends(S(means(old, drawn))))
            ),
            "subtracted the two intervals",
        ),
        (
            lambda new, old, drawn: ends(means(S(new), drawn) - means(S(old), drawn)),
            "S of each record, averaged",
        ),
        (
            lambda new, old, drawn: ends((means(new, drawn) - means(old, drawn)).mean(1)),
            "the arithmetic mean",
        ),
        (lambda new, old, drawn: ends(S(means(new, drawn))), "of `new` alone"),
    ],
    ids=range(11),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_paired_interval(wrong)

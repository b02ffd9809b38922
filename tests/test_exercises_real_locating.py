"""Checks of the chapter "Where a real model keeps a fact"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.teaching.exercises import ExerciseError, check_resampled_interval


def by_quantile(effects: Tensor, drawn: Tensor) -> Any:
    means = effects[drawn].mean(dim=1)
    return means.quantile(0.025, dim=0), means.quantile(0.975, dim=0)


def in_numpy(effects: Tensor, drawn: Tensor) -> Any:
    means = effects.numpy()[drawn.numpy()].mean(axis=1)
    return np.quantile(means, [0.025, 0.975], axis=0)


def one_by_one(effects: Tensor, drawn: Tensor) -> Any:
    means = torch.stack([sum(effects[fact] for fact in row) / len(row) for row in drawn])
    return [np.quantile(means.numpy(), q, axis=0) for q in (0.025, 0.975)]


@pytest.mark.parametrize("solution", [by_quantile, in_numpy, one_by_one])
def test_right_solutions_pass(solution: Callable[..., Any]) -> None:
    assert check_resampled_interval(solution).startswith("Right. ")


def quantiles(values: Tensor, low: float = 0.025, high: float = 0.975) -> Any:
    return values.quantile(low, dim=0), values.quantile(high, dim=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda effects, drawn: ..., "returned nothing"),
        (lambda effects, drawn: effects[drawn].mean(dim=1), "two things are asked for"),
        (lambda effects, drawn: quantiles(effects[drawn].mean(1).T), "low must have shape"),
        (lambda effects, drawn: quantiles(effects[drawn].mean(1), 0.05, 0.95), "of 90 %"),
        (lambda effects, drawn: quantiles(effects), "quantiles of the effects themselves"),
        (lambda effects, drawn: quantiles(effects[drawn].flatten(0, 1)), "of all effects drawn"),
        (lambda effects, drawn: quantiles(effects[drawn].quantile(0.5, dim=1)), "took medians"),
        (lambda effects, drawn: by_quantile(effects, drawn)[::-1], "changed places"),
        (lambda effects, drawn: quantiles(effects[drawn].mean(1), 0.0, 1.0), "the largest mean"),
    ],
    ids=range(10),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_resampled_interval(wrong)

"""Checks for the exercises of the chapter "A hundred real edits"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, pair, right, tensor

BOUNDS = (0.025, 0.975)


def harmonic(scores: Tensor) -> Tensor:
    """S of ES, PS and NS, :eq:`judging-harmonic`, over the last axis."""
    return 3 / (1 / scores).sum(dim=-1)


def middle(gained: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """(2): the quantiles of a number of each resample at both bounds."""
    return gained.quantile(torch.tensor(bounds, dtype=gained.dtype))


def records_of(generator: np.random.Generator, count: int, ease: float) -> Tensor:
    """(count x 3): ES, PS and NS of records with 1, 2 and 10 questions, none of which failed all.

    So that S of a single record, which a mistake computes, is a number.
    """
    columns = [
        np.maximum(generator.binomial(asked, ease, size=count), 1) / asked for asked in (1, 2, 10)
    ]
    return torch.from_numpy(np.stack(columns, axis=1))


def check_paired_interval(paired_interval: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``paired_interval(new, old, drawn)``: of the difference in S, by the same records.

    Raises ExerciseError.
    """
    for seed, count in ((51, 9), (52, 14)):
        generator = np.random.default_rng(seed)
        new, old = records_of(generator, count, 0.8), records_of(generator, count, 0.5)
        drawn = torch.from_numpy(generator.integers(count, size=(200, count)))
        low, high = pair(call(paired_interval, new, old, drawn), "low and high")
        found = torch.stack([tensor(low, (), "low"), tensor(high, (), "high")])
        one, two = (harmonic(each[drawn].mean(dim=1)) for each in (new, old))
        by_record = [harmonic(each)[drawn].mean(dim=1) for each in (new, old)]
        plain = [each[drawn].mean(dim=1).mean(dim=1) for each in (new, old)]
        mistakes = {
            "this is old minus new": middle(two - one),
            "low and high have changed places": middle(one - two).flip(0),
            "this is the interval of 90 %; for one of 95 %, 2.5 % lie on either side": (
                middle(one - two, (0.05, 0.95))
            ),
            "these are the smallest and the largest difference; quantiles are asked for": (
                middle(one - two, (0.0, 1.0))
            ),
            "you subtracted the two intervals; take the difference in each resample first, and "
            "then its quantiles": middle(one) - middle(two),
            "this is S of each record, averaged; average ES, PS and NS over the records first, "
            "and make S of the three means": middle(by_record[0] - by_record[1]),
            "this is made with the arithmetic mean of ES, PS and NS; S is their harmonic mean": (
                middle(plain[0] - plain[1])
            ),
            "this is the interval of the S of `new` alone": middle(one),
        }
        agree(found, middle(one - two), "the interval", mistakes)
    return right("Both edits were judged on the same lists of records.")

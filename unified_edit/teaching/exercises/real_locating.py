"""Checks for the exercises of the chapter "Where a real model keeps a fact"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, pair, right, tensor

BOUNDS = (0.025, 0.975)


def middle(values: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """(2 x layers): the quantiles of `values` (rows x layers) at both bounds."""
    return values.quantile(torch.tensor(bounds, dtype=values.dtype), dim=0)


def check_resampled_interval(resampled_interval: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``resampled_interval(effects, drawn)``: low and high for each layer.

    Raises ExerciseError.
    """
    for seed, facts, layers in ((41, 7, 3), (42, 5, 5)):
        effects = draw(seed, facts, layers)
        numbers = np.random.default_rng(seed).integers(facts, size=(200, facts))
        drawn = torch.from_numpy(numbers)
        low, high = pair(call(resampled_interval, effects, drawn), "low and high")
        found = torch.stack([tensor(low, (layers,), "low"), tensor(high, (layers,), "high")])
        resamples = effects[drawn]
        means = resamples.mean(dim=1)
        mistakes = {
            "this is the interval of 90 %; for one of 95 %, 2.5 % lie on either side": (
                middle(means, (0.05, 0.95))
            ),
            "these are quantiles of the effects themselves; the interval is one of their *mean*: "
            "average each resample first": middle(effects),
            "these are quantiles of all effects drawn; average each resample over its facts "
            "first": middle(resamples.flatten(0, 1)),
            "you took medians; a resample is summed up by its mean": (
                middle(resamples.quantile(0.5, dim=1))
            ),
            "low and high have changed places": middle(means).flip(0),
            "these are the smallest and the largest mean; quantiles are asked for": torch.stack(
                [means.amin(dim=0), means.amax(dim=0)]
            ),
        }
        agree(found, middle(means), "the interval", mistakes)
    return right("Facts are drawn, averaged, and the middle 95 % of the means kept.")

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


def interval_of(effects: Tensor, drawn: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """(2 x layers): quantiles of the resampled means, :eq:`real-locating-resample`.

    effects: (facts x layers). drawn: (resamples x facts), numbers of facts, with replacement.
    """
    means = effects[drawn].mean(dim=1)
    return means.quantile(torch.tensor(bounds, dtype=means.dtype), dim=0)


def check_resampled_interval(resampled_interval: Callable[[Tensor, Tensor], Any]) -> str:
    """Check ``resampled_interval(effects, drawn)``: low and high for each layer.

    Raises ExerciseError.
    """
    for seed, facts, layers in ((41, 7, 3), (42, 5, 5)):
        effects = draw(seed, facts, layers)
        numbers = np.random.default_rng(seed).integers(facts, size=(200, facts))
        drawn = torch.from_numpy(numbers)
        given = call(resampled_interval, effects, drawn)
        if not isinstance(given, (Tensor, np.ndarray)) or len(given.shape) < 2:
            given = pair(given, "low and high")
        names = ("low", "high")
        both = [tensor(one, (layers,), name) for one, name in zip(given, names, strict=True)]
        resamples = effects[drawn]
        means, narrow = resamples.mean(dim=1), (0.05, 0.95)
        other = {
            "this is the interval of 90 %; for one of 95 %, 2.5 % lie on either side": (
                interval_of(effects, drawn, narrow)
            ),
            "these are quantiles of the effects themselves; the interval is one of their *mean*: "
            "average each resample first": effects.quantile(
                torch.tensor(BOUNDS, dtype=effects.dtype), dim=0
            ),
            "these are quantiles of all effects drawn; average each resample over its facts "
            "first": resamples.flatten(0, 1).quantile(
                torch.tensor(BOUNDS, dtype=effects.dtype), dim=0
            ),
            "you took medians; a resample is summed up by its mean": (
                resamples.quantile(0.5, dim=1).quantile(
                    torch.tensor(BOUNDS, dtype=effects.dtype), dim=0
                )
            ),
            "low and high have changed places": interval_of(effects, drawn).flip(0),
            "these are the smallest and the largest mean, whatever the resamples; quantiles are "
            "asked for": torch.stack([means.amin(dim=0), means.amax(dim=0)]),
        }
        agree(
            torch.stack(both),
            interval_of(effects, drawn),
            "the interval",
            other,
        )
    return right("Facts are drawn, averaged, and the middle 95 % of the means kept.")

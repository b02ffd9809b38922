"""Checks for the exercises of the chapter "A fact inside a transformer"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, draw, number, right


def mean_log_probability(logits: Tensor, ids: list[int], n: int) -> float:
    """Mean log-probability of the last n of `ids`, the logarithm of :eq:`fact-target`.

    logits: (T x vocabulary), what a model gives for the T tokens `ids`.
    """
    logp = logits.log_softmax(dim=-1)
    return float(sum(logp[i - 1, ids[i]] for i in range(len(ids) - n, len(ids))) / n)


def check_mean_logp(mean_logp: Callable[[Tensor, list[int], int], Any]) -> str:
    """Check ``mean_logp(logits, ids, n)``: the mean log-probability of the last n tokens of `ids`.

    logits is (T x vocabulary), ids a list of T numbers. Raises ExerciseError.
    """
    ids = [3, 0, 4, 1, 5, 2]
    T, logits = len(ids), 2 * draw(0, len(ids), 6)
    logp = logits.log_softmax(dim=-1)
    p = logp.exp()
    for n in (3, 1):
        places = range(T - n, T)
        same = sum(logp[i, ids[i]] for i in places) / n
        last = sum(logp[-1, ids[i]] for i in places) / n
        total = sum(logp[i - 1, ids[i]] for i in places)
        arithmetic = math.log(sum(float(p[i - 1, ids[i]]) for i in places) / n)
        everything = sum(logp[i - 1, ids[i]] for i in range(1, T)) / (T - 1)
        plain = sum(logits[i - 1, ids[i]] for i in places) / n
        expected = mean_log_probability(logits, ids, n)
        token = "1 token" if n == 1 else f"{n} tokens"
        what = f"the mean log-probability of an object of {token}"
        agree(
            number(call(mean_logp, logits, ids, n), what),
            expected,
            what,
            {
                "row i of the logits was made from the tokens up to i, so it predicts token i + 1; "
                "you read token i off row i": same,
                "each token has its own row of logits, the one before it; you read all of them off "
                "the last row": last if n > 1 else expected,
                "this is the sum; divide by n, so that long objects can be compared with short "
                "ones": total,
                "this is the logarithm of the mean probability; the mean of the logarithms is "
                "asked for": arithmetic,
                "the tokens of the prompt are in it; only the last n count": everything,
                "logits are no log-probabilities yet: use `log_softmax`": plain,
                "this is the probability; its logarithm is asked for": math.exp(expected),
            },
        )
    return right("Each token of the object is read off the row before it, and the mean is taken.")


def direct_contribution(u: Tensor, h: Tensor, gain: Tensor, towards: Tensor) -> float:
    """Of a part u of the last stream h to a difference of two logits, :eq:`fact-direct`.

    gain: of the last norm. towards: the difference of the two tokens' vectors. Epsilon is 0.
    """
    return float(towards @ (gain * (u - u.mean()) / h.std(correction=0)))


def check_contribution(contribution: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> str:
    """Check ``contribution(u, h, gain, towards)``: the direct contribution of a part u.

    All are vectors of d numbers, h the last stream. Raises ExerciseError.
    """
    for d in (5, 8):
        u, rest, gain, towards = (draw(seed, d) + 0.7 for seed in range(4))
        h = u + rest
        std = h.std(correction=0)
        centred = u - u.mean()
        agree(
            number(call(contribution, u, h, gain, towards), "the contribution"),
            direct_contribution(u, h, gain, towards),
            f"the contribution of a part with {d} entries",
            {
                "the mean of the part must be taken out of it": float(towards @ (gain * u / std)),
                "you took out the mean of the stream `h`; the part's own is asked for": float(
                    towards @ (gain * (u - h.mean()) / std)
                ),
                "the gain is missing": float(towards @ centred / std),
                "the division by the standard deviation is missing": float(
                    towards @ (gain * centred)
                ),
                "this divides by the standard deviation of the part; the stream is normalised as a "
                "whole, so it is that of `h`": direct_contribution(u, u, gain, towards),
                "this divides by the variance; its square root is asked for": float(
                    towards @ (gain * centred) / std**2
                ),
                "the sum of squares must be divided by d, and yours is divided by d - 1: "
                "`std(correction=0)`": float(towards @ (gain * centred) / h.std()),
                "this is the contribution of the whole stream; that of the part `u` is asked "
                "for": direct_contribution(h, h, gain, towards),
                "the mean is taken out after the gain; it comes before": float(
                    towards @ (gain * u - (gain * u).mean()) / std
                ),
            },
        )
    return right("The part's own mean is taken out, and the whole stream's deviation divides it.")

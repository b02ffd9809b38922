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

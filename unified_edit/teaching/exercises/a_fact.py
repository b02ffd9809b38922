"""Checks for the exercises of the chapter "A fact inside a transformer"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from unified_edit.teaching.exercises.checking import (
    ExerciseError,
    agree,
    call,
    draw,
    name_of,
    number,
    right,
)

Pairs = list[list[tuple[float, float]]]


def mean_log_probability(logits: Tensor, ids: list[int], n: int) -> float:
    """Mean log-probability of the last n of `ids`, the logarithm of :eq:`fact-target`.

    logits: (T x vocabulary), what a model gives for the T tokens `ids`.
    """
    logp = logits.log_softmax(dim=-1)
    return float(sum(logp[i - 1, ids[i]] for i in range(len(ids) - n, len(ids))) / n)


def share_won(records: Pairs) -> float:
    """PS, :eq:`fact-success`: mean over records of the share of pairs (new, true), new > true."""
    return float(np.mean([np.mean([new > true for new, true in pairs]) for pairs in records]))


def harmonic_mean(*scores: float) -> float:
    """The harmonic mean of scores >= 0, :eq:`fact-harmonic`; 0 if one of them is 0."""
    return 0.0 if min(scores) == 0 else len(scores) / sum(1 / score for score in scores)


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
        agree(
            number(call(mean_logp, logits, ids, n), "the mean log-probability"),
            expected,
            f"the mean log-probability of an object of {token}",
            {
                "row i of the logits was made from the tokens up to i, so it predicts token i + 1; "
                "you read token i off row i": same,
                "each token has its own row of logits, the one before it; you read all of them off "
                "the last row": last,
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


def check_paraphrase_score(paraphrase_score: Callable[[Pairs], Any]) -> str:
    """Check ``paraphrase_score(records)``: PS from (log P of new, log P of true) by record.

    Raises ExerciseError.
    """
    records: Pairs = [
        [(-0.1, -3.0), (-2.0, -0.5), (-0.7, -0.7), (-0.2, -2.5)],
        [(-0.3, -1.5)],
        [(-1.0, -0.2), (-0.4, -4.0)],
    ]
    flat = [pair for pairs in records for pair in pairs]
    ties = [[(new + 1e-9, true) for new, true in pairs] for pairs in records]
    turned = [[(true, new) for new, true in pairs] for pairs in records]
    agree(
        number(call(paraphrase_score, records), "PS"),
        share_won(records),
        "PS",
        {
            "a tie was counted as a success; the new object must be more probable": (
                share_won(ties)
            ),
            "you averaged over all prompts; average over the prompts of each record first, so "
            "that a record with many counts no more than one with few": share_won([flat]),
            "you averaged over all prompts, and counted a tie as a success": share_won(
                [[pair for pairs in ties for pair in pairs]]
            ),
            "this is the share of prompts on which the *true* object wins": share_won(turned),
            "you counted successes; shares of each record's prompts are asked for": float(
                np.mean([sum(new > true for new, true in pairs) for pairs in records])
            ),
            "this is the mean margin; a score only asks which is larger": float(
                np.mean([np.mean([new - true for new, true in pairs]) for pairs in records])
            ),
        },
    )
    return right("A tie is a failure, and every record counts the same.")


def check_harmonic(harmonic: Callable[[float, float, float], Any]) -> str:
    """Check ``harmonic(ES, PS, NS)``: their harmonic mean, 0 if one is 0. Raises ExerciseError."""
    for three in ((1.0, 0.5, 0.25), (0.9, 0.8, 0.7)):
        agree(
            number(call(harmonic, *three), "S"),
            harmonic_mean(*three),
            f"S of {three}",
            {
                "this is the arithmetic mean; with it a failed score is made up for by the other "
                "two": float(np.mean(three)),
                "this is the geometric mean": float(np.prod(three)) ** (1 / 3),
                "the 3 above the fraction is missing": harmonic_mean(*three) / 3,
                "this is the mean of the reciprocals; its reciprocal is asked for": (
                    1 / harmonic_mean(*three)
                ),
                "this is the smallest of the three": min(three),
            },
        )
    for three in ((0.0, 1.0, 1.0), (0.5, 0.0, 0.0)):
        try:
            given = call(harmonic, *three)
        except ExerciseError as problem:
            if "ZeroDivisionError" not in str(problem):
                raise
            raise ExerciseError(
                f"{name_of(harmonic)} divides by zero for the scores {three}: S is 0 if one of "
                "them is 0, which is what the formula tends to"
            ) from None
        agree(1 + number(given, f"S of {three}"), 1.0, f"one plus S of {three}, which is 0,")
    return right("The harmonic mean of the three, and zero if one of them is.")

"""Checks for the exercises of the chapter "How an edit is judged"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import ExerciseError, agree, name_of, number, right

Pairs = list[list[tuple[float, float]]]


def share_won(records: Pairs) -> float:
    """PS, :eq:`judging-success`: mean over records of the share of pairs (new, true), new > true.

    A pair holds two log-probabilities; for equal ones the edit has not succeeded.
    """
    return float(np.mean([np.mean([new > true for new, true in pairs]) for pairs in records]))


def harmonic_mean(*scores: float) -> float:
    """The harmonic mean of scores >= 0, :eq:`judging-harmonic`; 0 if one of them is 0."""
    return 0.0 if min(scores) == 0 else len(scores) / sum(1 / score for score in scores)


#: Two sets of records, in which every mistake of the list below gives another number.
RECORDS: tuple[Pairs, ...] = (
    [
        [(-0.1, -3.0), (-2.0, -0.5), (-0.7, -0.7), (-2.5, -0.2), (-1.1, -0.9)],
        [(-0.3, -1.5)],
        [(-1.0, -0.2), (-0.4, -4.0), (-1.9, -1.2)],
    ],
    [
        [(-0.2, -0.6), (-1.3, -2.0)],
        [(-1.0, -0.3), (-0.4, -0.8), (-2.2, -1.7), (-1.4, -1.4)],
        [(-0.6, -1.9), (-1.5, -0.1), (-0.8, -1.0), (-2.4, -2.1), (-1.7, -0.9)],
    ],
)


def check_paraphrase_score(paraphrase_score: Callable[[Pairs], Any]) -> str:
    """Check ``paraphrase_score(records)``: PS from (log P of new, log P of true) by record.

    Raises ExerciseError.
    """
    for records in RECORDS:
        what = f"PS of {len(records)} records"
        flat = [pair for pairs in records for pair in pairs]
        ties = [[(new + 1e-9, true) for new, true in pairs] for pairs in records]
        turned = [[(true, new) for new, true in pairs] for pairs in records]
        agree(
            number(call(paraphrase_score, records), what),
            share_won(records),
            what,
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
        what = f"S of {three}"
        agree(
            number(call(harmonic, *three), what),
            harmonic_mean(*three),
            what,
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
        agree(number(given, f"S of {three}"), 0.0, f"S of {three}")
    return right("The harmonic mean of the three, and zero if one of them is.")

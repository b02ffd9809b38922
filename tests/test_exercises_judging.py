"""Checks of the chapter "How an edit is judged", and its equations in the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from unified_edit.measuring import summarise
from unified_edit.teaching.exercises import ExerciseError
from unified_edit.teaching.exercises.judging import (
    check_harmonic,
    check_paraphrase_score,
    harmonic_mean,
    share_won,
)

Check = Callable[[Any], str]


# --- equations ------------------------------------------------------------------------------------


@pytest.mark.equation("judging-success", "judging-magnitude", "judging-harmonic")
def test_scores_are_means_over_records_of_means_over_prompts() -> None:
    generator = np.random.default_rng(3)
    rows, pairs = [], {"rewrite": [], "paraphrase": [], "neighbour": []}
    for record in range(5):
        for kind, count in (("rewrite", 1), ("paraphrase", 3 - record % 2), ("neighbour", 4)):
            pairs[kind].append([])
            for _ in range(count):
                new, true = generator.integers(0, 6, size=2) / 10  # ties among them
                right, wrong = (true, new) if kind == "neighbour" else (new, true)
                pairs[kind][-1].append((right, wrong))
                rows.append((record, "after", kind, right > wrong, right - wrong, False))
    columns = ["record", "when", "kind", "success", "magnitude", "generated"]
    found = summarise(pd.DataFrame(rows, columns=columns))
    expected = {kind[0].upper() + "S": share_won(each) for kind, each in pairs.items()}
    expected["ES"] = expected.pop("RS")
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-12)
    assert found["S"].value == pytest.approx(harmonic_mean(*expected.values()), abs=1e-12)
    for name, kind in (("EM", "rewrite"), ("PM", "paraphrase"), ("NM", "neighbour")):
        margins = [np.mean([right - wrong for right, wrong in each]) for each in pairs[kind]]
        assert found[name].value == pytest.approx(np.mean(margins), abs=1e-12)


# --- checks ---------------------------------------------------------------------------------------


def shares(records: Any) -> float:
    return float(np.mean([np.mean([a > b for a, b in pairs]) for pairs in records]))


def flat(records: Any) -> float:
    return float(np.mean([a > b for pairs in records for a, b in pairs]))


@pytest.mark.parametrize(
    ("check", "solution"),
    [
        (check_paraphrase_score, shares),
        (
            check_paraphrase_score,
            lambda records: sum(sum(a > b for a, b in r) / len(r) for r in records) / len(records),
        ),
        (check_harmonic, harmonic_mean),
        (check_harmonic, lambda a, b, c: 3 * a * b * c / (a * b + b * c + c * a or 1)),
    ],
    ids=range(4),
)
def test_right_solutions_pass(check: Check, solution: Callable[..., Any]) -> None:
    assert check(solution).startswith("Right. ")


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_paraphrase_score, None, "was given nothing"),
        (check_paraphrase_score, lambda records: ..., "returned nothing"),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a >= b for a, b in r]) for r in records]),
            "a tie was counted",
        ),
        (check_paraphrase_score, flat, "you averaged over all prompts; average"),
        (
            check_paraphrase_score,
            lambda records: np.mean([a >= b for r in records for a, b in r]),
            "and counted a tie",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a < b for a, b in r]) for r in records]),
            "the \\*true\\* object wins",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([sum(a > b for a, b in r) for r in records]),
            "you counted successes",
        ),
        (
            check_paraphrase_score,
            lambda records: np.mean([np.mean([a - b for a, b in r]) for r in records]),
            "this is the mean margin",
        ),
        (check_harmonic, None, "was given nothing"),
        (check_harmonic, lambda a, b, c: None, "returned nothing"),
        (check_harmonic, lambda a, b, c: (a + b + c) / 3, "the arithmetic mean"),
        (check_harmonic, lambda a, b, c: (a * b * c) ** (1 / 3), "the geometric mean"),
        (check_harmonic, lambda a, b, c: 1 / (1 / a + 1 / b + 1 / c), "the 3 above"),
        (check_harmonic, lambda a, b, c: (1 / a + 1 / b + 1 / c) / 3, "its reciprocal"),
        (check_harmonic, min, "this is the smallest"),
        (check_harmonic, lambda a, b, c: 3 / (1 / a + 1 / b + 1 / c), "divides by zero"),
        (
            check_harmonic,
            lambda a, b, c: 3 / sum(1 / s for s in (a, b, c) if s),
            "you have 1.5, it should be 0",
        ),
    ],
    ids=range(17),
)
def test_wrong_solutions_are_told_why(check: Check, wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check(wrong)

"""The chapter "GPT-2 XL and GPT-J": its equations, and the check of its exercise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unified_edit.measuring import harmonic_mean, summarise, to_table
from unified_edit.teaching.exercises import ExerciseError, check_merged_scores
from unified_edit.teaching.exercises.big_models import merged_scores

# --- equations ------------------------------------------------------------------------------------


def rows_of(records: range, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Answers about some records, some prompts of each kind."""
    return [
        {
            "record": number, "case_id": number, "relation": None, "when": "after", "kind": kind,
            "prompt": "", "logp_new": 0.0, "logp_true": 0.0, "generated": False,
            "success": bool(generator.random() < 0.6), "magnitude": 0.0,
        }
        for number in records
        for kind, count in (("rewrite", 1), ("paraphrase", 2), ("neighbour", 5))
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.equation("big-merged")
def test_scores_of_pieces_are_those_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    pieces = [rows_of(range(7), generator), rows_of(range(7, 30), generator)]
    names = ("ES", "PS", "NS", "S")
    whole = summarise(to_table(pieces[0] + pieces[1]), bootstrap=100)
    each = [summarise(to_table(piece), bootstrap=100) for piece in pieces]
    scores = torch.tensor([[one[name].value for one in each] for name in names[:3]]).double()
    found = merged_scores(torch.tensor([7, 23]), scores)
    assert found.tolist() == pytest.approx([whole[name].value for name in names])


def test_pieces_understate_the_harmonic_mean() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        scores, counts = generator.random((3, 4)), generator.integers(1, 9, size=4)
        together = harmonic_mean(scores @ counts / counts.sum())
        assert together >= harmonic_mean(scores) @ counts / counts.sum() - 1e-12
    once = generator.random((3, 1))
    same = harmonic_mean(once @ np.array([1.0, 0.5])[None] @ np.array([0.25, 0.75]))
    assert same == pytest.approx(harmonic_mean(once)[0] * (0.25 + 0.5 * 0.75))  # in proportion


# --- the check ------------------------------------------------------------------------------------


def by_hand(counts: Tensor, scores: Tensor) -> list[float]:
    total = sum(int(n) for n in counts)
    three = [sum(float(x) * int(n) for x, n in zip(row, counts, strict=True)) / total
             for row in scores]  # fmt: skip
    return [*three, 0.0 if min(three) == 0 else 3 / sum(1 / x for x in three)]


@pytest.mark.parametrize("solution", [merged_scores, by_hand])
def test_right_solutions_pass(solution: Any) -> None:
    assert check_merged_scores(solution).startswith("Right. ")


def harmonic(scores: Tensor) -> Tensor:
    return len(scores) / (1 / scores).sum(dim=0)


def weighed(counts: Tensor, scores: Tensor) -> Tensor:
    return scores @ counts.double() / counts.sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "was given nothing"),
        (lambda counts, scores: None, "returned nothing"),
        (lambda counts, scores: merged_scores(counts, scores)[:3], "must have shape"),
        (
            lambda counts, scores: torch.cat(
                [weighed(counts, scores), weighed(counts, harmonic(scores)[None])]
            ),
            "S of the pieces was averaged; it has to be made anew",
        ),
        (
            lambda counts, scores: torch.cat(
                [scores.mean(dim=1), harmonic(scores.mean(dim=1))[None]]
            ),
            "every piece counts alike; a piece with more",
        ),
        (
            lambda counts, scores: torch.cat([scores.mean(dim=1), harmonic(scores).mean()[None]]),
            "counts alike, and S of the pieces was averaged",
        ),
        (
            lambda counts, scores: torch.cat(
                [weighed(counts, scores), weighed(counts, scores).mean()[None]]
            ),
            "yours is the ordinary one",
        ),
        (
            lambda counts, scores: merged_scores(counts, scores) * counts.sum(),
            "not divided by the number of all records",
        ),
        (lambda counts, scores: merged_scores(counts, scores) + 0.01, "not right"),
    ],
    ids=range(9),
)
def test_wrong_solutions_are_told_why(wrong: Any, message: str) -> None:
    with pytest.raises(ExerciseError, match=message):
        check_merged_scores(wrong)

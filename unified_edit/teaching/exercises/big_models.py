"""Checks for the exercises of the chapter "GPT-2 XL and GPT-J"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unified_edit.teaching.exercises.calling import call
from unified_edit.teaching.exercises.checking import agree, right, tensor

#: Records of each piece, and ES, PS and NS of each (3 x pieces), in which every mistake of the list
#: below gives other numbers. A piece of the second has no success at all, the third has none in NS.
PIECES = (
    ((100, 300, 50), ((0.99, 0.80, 0.60), (0.90, 0.50, 0.70), (0.40, 0.75, 0.20))),
    ((8, 24), ((1.0, 0.75), (0.0, 0.5), (0.6, 0.9))),
    ((5, 10), ((1.0, 0.6), (0.9, 0.5), (0.0, 0.0))),
)


def merged_scores(counts: Tensor, scores: Tensor) -> Tensor:
    """ES, PS, NS and S of all records, from those of pieces of them, :eq:`big-merged`: (4,).

    counts: (pieces,); scores: ES, PS and NS in rows (3 x pieces).
    """
    means = scores @ counts.double() / counts.sum()
    return torch.cat([means, _harmonic(means)[None]])


def _harmonic(scores: Tensor) -> Tensor:
    """The harmonic mean over the first axis; 0 where one is 0."""
    return len(scores) / (1 / scores).sum(dim=0)


def check_merged_scores(merged_scores_: Callable[..., Any]) -> str:
    """Check ``merged_scores(counts, scores) -> (ES, PS, NS, S)`` of all records together.

    counts: how many records each piece has, (pieces,). scores: ES, PS and NS in rows, a column a
    piece (3 x pieces). S is 0 where one of the three is 0. Raises ExerciseError.
    """
    for numbers, rows in PIECES:
        counts = torch.tensor(numbers)
        scores = torch.tensor(rows, dtype=torch.float64)
        what = f"ES, PS, NS and S of {len(numbers)} pieces"
        found = tensor(call(merged_scores_, counts, scores), (4,), what)
        means, alike = scores @ counts.double() / counts.sum(), scores.mean(dim=1)
        of_pieces = _harmonic(scores)
        of_all = (of_pieces @ counts.double() / counts.sum())[None]
        mistakes = {
            "S of the pieces was averaged; it has to be made anew from ES, PS and NS of all": (
                torch.cat([means, of_all])
            ),
            "every piece counts alike, and S of the pieces was averaged; weigh the pieces by their "
            "records, and make S anew": torch.cat([alike, of_pieces.mean()[None]]),
            "every piece counts alike; a piece with more records counts more": (
                torch.cat([alike, _harmonic(alike)[None]])
            ),
            "S is the harmonic mean of ES, PS and NS; yours is the ordinary one": (
                torch.cat([means, means.mean()[None]])
            ),
            "the sums were not divided by the number of all records": (
                torch.cat([scores @ counts.double(), _harmonic(scores @ counts.double())[None]])
            ),
        }
        if not alike.all():  # then S is 0 however it is made
            mistakes = {told: wrong for told, wrong in mistakes.items() if "S of the" not in told}
        agree(found, merged_scores(counts, scores), what, mistakes)
    return right("Every record counts the same, and S is made last.")

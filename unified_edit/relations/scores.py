"""Scores of a relation: shares of held-out subjects, at settings chosen without them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unified_edit.measuring.scores import Score

if TYPE_CHECKING:
    import pandas as pd

#: Fewer subjects give a share, but no interval.
LEAST_FOR_INTERVAL = 20
_NORMAL = 1.959963984540054  # 97.5 % of the normal distribution lie below


@dataclass(frozen=True)
class Fold:
    """What one fold gave: one entry a subject in each of the lists.

    faithful: {"layer beta": hits}; causal: {"layer rank": hits}, over the subjects that have a
    `target` (-1: no subject of the fold has another answer). bias, translation: {"layer": hits} of
    two controls, b alone and s + mean(o - s) over the examples. answers: what the model says.
    """

    examples: list[list[str]]
    subjects: list[str]
    answers: list[str]
    targets: list[int]
    faithful: dict[str, list[int]]
    causal: dict[str, list[int]]
    bias: dict[str, list[int]]
    translation: dict[str, list[int]]


@dataclass(frozen=True)
class Choice:
    """The settings that score best: layer and beta by faithfulness, edit_layer and rank by
    causality.
    """

    layer: int
    beta: float
    edit_layer: int
    rank: int


@dataclass(frozen=True)
class RelationScores:
    """Scores of one relation. asked, known: pairs that were asked and those the model knows."""

    name: str
    asked: int
    known: int
    folds: tuple[Fold, ...]

    @property
    def faithfulness(self) -> Score:
        """At settings chosen on the other folds (on the same one, where there is only one)."""
        return self._fitted("faithful")

    @property
    def causality(self) -> Score:
        """At settings chosen on the other folds (on the same one, where there is only one)."""
        return self._fitted("causal")

    @property
    def choice(self) -> Choice:
        """The best settings over all folds; of equal ones the lowest layer and beta or rank."""
        (layer, beta), (edit, rank) = (
            _best(self.folds, kind).split() for kind in ("faithful", "causal")
        )
        return Choice(int(layer), float(beta), int(edit), int(rank))

    @property
    def majority(self) -> float:
        """Share of the commonest answer: what saying always the same would score."""
        answers = Counter(answer for fold in self.folds for answer in fold.answers)
        return max(answers.values()) / answers.total()

    def control(self, name: str) -> float:
        """Faithfulness of "bias" or "translation" at its best layer."""
        return _mean(self.folds, name, _best(self.folds, name))

    def table(self, kind: str = "faithful") -> pd.DataFrame:
        """Shares over all folds: rows are layers; columns betas, or ranks for kind "causal"."""
        import pandas as pd

        keys = [key.split() for key in getattr(self.folds[0], kind)]
        number = float if kind == "faithful" else int
        lines = [(int(a), number(b), _mean(self.folds, kind, f"{a} {b}")) for a, b in keys]
        name = "beta" if kind == "faithful" else "rank"
        frame = pd.DataFrame(lines, columns=["layer", name, "share"])
        return frame.pivot(index="layer", columns=name, values="share")

    def _fitted(self, kind: str) -> Score:
        hits: list[int] = []
        for fold in self.folds:
            others = tuple(other for other in self.folds if other is not fold) or (fold,)
            hits += getattr(fold, kind)[_best(others, kind)]
        return share(hits)


def share(hits: Sequence[int]) -> Score:
    """The share of ones among `hits`, with Wilson's 95 % interval where there are 20 or more.

    Unlike a bootstrap's it has a width where all agree. Without an interval low and high are NaN.
    """
    n = len(hits)
    if not n:
        return Score(math.nan, math.nan, math.nan, 0)
    value = sum(hits) / n
    if n < LEAST_FOR_INTERVAL:
        return Score(value, math.nan, math.nan, n)
    square = _NORMAL**2
    middle = (value + square / (2 * n)) / (1 + square / n)
    half = _NORMAL / (1 + square / n) * math.sqrt(value * (1 - value) / n + square / (4 * n * n))
    return Score(value, max(0.0, middle - half), min(1.0, middle + half), n)


def _mean(folds: Sequence[Fold], kind: str, key: str) -> float:
    hits = [hit for fold in folds for hit in getattr(fold, kind)[key]]
    return sum(hits) / len(hits) if hits else 0.0


def _best(folds: Sequence[Fold], kind: str) -> str:
    keys = list(getattr(folds[0], kind))  # in ascending order of layer and beta or rank
    return max(keys, key=lambda key: _mean(folds, kind, key))  # the first of equal ones

"""Sums of k k' over two halves of a text: how they grow, are kept, and what is made of them.

The halves say whether there was enough text: they must agree on keys that are in neither.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError, StatisticsFileError
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.tensor_files import read_safetensors, write_safetensors

log = logging.getLogger(__name__)

PARTIAL = "unified_edit.key_statistics/2/partial"


class Sums:
    """Running float64 sums of k k' of two halves of the text, for all layers of a pass.

    aside: so many keys, the first ones, are in neither half, but in `fresh`.
    """

    def __init__(self, weights: Sequence[NamedWeight], aside: int) -> None:
        self.aside = aside
        self.halves = {
            one.layer: [torch.zeros(one.d_in, one.d_in, dtype=torch.float64) for _ in range(2)]
            for one in weights
        }
        self.fresh = {one.layer: torch.zeros(0, one.d_in) for one in weights}
        self.counts = [0, 0]
        self.groups = 0
        self.texts = 0
        self.digest = hashlib.sha256()

    def add(self, keys: dict[int, Tensor], half: int) -> None:
        """Add keys ({layer: tokens x d_k}) to one half; the first ones of all stay fresh."""
        missing = self.aside - len(next(iter(self.fresh.values())))
        taken = min(missing, len(next(iter(keys.values()))))
        for layer, rows in keys.items():
            rows = rows.float()
            if taken:
                self.fresh[layer] = torch.cat([self.fresh[layer], rows[:taken].cpu()])
            rest = rows[taken:]
            self.halves[layer][half].add_((rest.T @ rest).cpu())
        self.counts[half] += len(next(iter(keys.values()))) - taken

    @property
    def seen(self) -> int:
        """Tokens taken so far, those set aside included."""
        return sum(self.counts) + len(next(iter(self.fresh.values())))

    def save(self, path: Path, description: dict[str, Any]) -> None:
        """Write the sums and what they are of; where that fails, only a warning is given."""
        tensors = {
            f"{half}.{layer}": sums
            for layer, pair in self.halves.items()
            for half, sums in enumerate(pair)
        }
        tensors |= {f"fresh.{layer}": keys for layer, keys in self.fresh.items()}
        state = {
            "counts": self.counts,
            "groups": self.groups,
            "texts": self.texts,
            "corpus": self.digest.hexdigest(),
        }
        try:
            description = {**description, "state": state}
            write_safetensors(path, tensors, PARTIAL, description, StatisticsFileError)
        except StatisticsFileError as problem:  # the run goes on; only an interruption would cost
            log.warning("no checkpoint of the key statistics: %s", problem)

    def restore(self, path: Path, description: dict[str, Any]) -> dict[str, Any]:
        """Take over what `save` wrote; return its state. Raises StatisticsError on a mismatch."""
        tensors, meta = read_safetensors(path, PARTIAL, StatisticsFileError)
        state = meta.pop("state", None)
        if meta != json.loads(json.dumps(description)) or state is None:
            raise StatisticsError(
                f"the checkpoint {path} belongs to another run ({meta} instead of "
                f"{description}); delete it or give another path"
            )
        for layer, pair in self.halves.items():
            for half in range(2):
                pair[half] = tensors[f"{half}.{layer}"]
            self.fresh[layer] = tensors[f"fresh.{layer}"]
        self.counts, self.groups = list(state["counts"]), int(state["groups"])
        return state


def mean(halves: list[Tensor], count: int) -> Tensor:
    """C0 of two halves' sums, in the memory of the first."""
    first, second = halves
    return first.add_(second).div_(count)


def shrink_in_place(moment: Tensor, shrinkage: float) -> None:
    """Add shrinkage * tr(C0)/d_k to the diagonal of C0."""
    moment.diagonal().add_(shrinkage * moment.diagonal().mean())


def agreement(halves: list[Tensor], counts: list[int], fresh: Tensor) -> float:
    """Median of |k'C1^-1 k / k'C2^-1 k - 1| over fresh keys; NaN if a half cannot be factored."""
    if min(counts) < fresh.shape[1] or not len(fresh):  # a half is singular
        return float("nan")
    # a coordinate that is zero in every key of a half says nothing; half precision has some
    alive = (halves[0].diagonal() * halves[1].diagonal()).nonzero()[:, 0]
    keys, costs = fresh[:, alive].double().T, []
    for half, count in zip(halves, counts, strict=True):
        if len(alive) < len(half):
            half = half[alive][:, alive]
        factor, bad = torch.linalg.cholesky_ex(half / count)
        if bad:
            return float("nan")
        costs.append(torch.linalg.solve_triangular(factor, keys, upper=False).square().sum(0))
    return float((costs[0] / costs[1] - 1).abs().median())

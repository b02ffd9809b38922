"""Whether `Delta K = R` can be held for every R: one answer for whoever asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from unified_edit.errors import InfeasibleError, NullSpaceError, ObjectiveError
from unified_edit.objective.inputs import check_facts, fact_label
from unified_edit.objective.metric import MetricProtocol, as_metric
from unified_edit.objective.spectrum import Spectrum, spectrum_of

CONDITION_LIMIT = 1e8
"""Largest condition number of the whitened keys A up to which `Delta K = R` is held.

float64 carries 16 digits and the solution loses as many as the condition has; half of them are kept
for the facts. A direction of the keys whose singular value is below 1 / CONDITION_LIMIT of the
largest counts as absent: `rank` is the number of the others, and the limit lam -> 0 leaves it out.
"""

# The condition is measured from rounded numbers: one that is 1e8 by construction may come out as
# 1.00001e8 when C0 is ill-conditioned too.
_CUTOFF = 1 / (1.01 * CONDITION_LIMIT)


@dataclass(frozen=True, eq=False)
class Feasibility:
    """Whether Delta K = R can be held for every R, :eq:`emmet-feasible`; true or false as it is.

    - holds: the whitened keys A have rank E, the number of facts.
    - rank: number of singular values of A above 1 / CONDITION_LIMIT of the largest.
    - condition: of A, largest over E-th singular value; inf if E > dim. For more than 256 facts
      to five digits.
    - facts: E. dim: n, the rows of A: d_in, or fewer where the metric has directions out of reach.
    """

    holds: bool
    rank: int
    condition: float
    facts: int
    dim: int
    _A: Tensor = field(repr=False)
    _names: Sequence[str] | None = field(repr=False)
    _d_in: int = field(repr=False)

    def __bool__(self) -> bool:
        return self.holds

    @cached_property
    def closest(self) -> tuple[int, int, float] | None:
        """The facts i < j whose whitened keys are most nearly parallel, and their |cosine|.

        Whitened, because it is there that an equality tells facts apart. None for a single fact.
        Found when asked for: it takes E^2 inner products.
        """
        return _closest_columns(self._A) if self.facts > 1 else None

    def require(self) -> None:
        """Nothing if it holds; else InfeasibleError, with the facts to blame and what to do."""
        if self.holds:
            return
        many = ""
        if self.dim < self.facts:
            left = "" if self.dim == self._d_in else " that the metric leaves"
            many = f"there are more than the {self.dim} dimensions of a key{left}, and "
        lengths = self._A.norm(dim=0)
        smallest = int(lengths.argmin())
        if self.closest is None or lengths[smallest] <= _CUTOFF * lengths.max():
            blame = f"The key of {fact_label(smallest, self._names)} is next to nothing there"
            drop = "drop that fact"
        else:
            i, j, cosine = self.closest
            first, second = fact_label(i, self._names), fact_label(j, self._names)
            blame = (
                f"The most collinear keys are those of {first} and {second}, |cosine| {cosine:.12g}"
            )
            drop = "drop one of the two"
        raise InfeasibleError(
            f"Delta K = R cannot be held for these {self.facts} facts: {many}their whitened keys "
            f"have rank {self.rank} and condition {self.condition:.2g} (limit "
            f"{CONDITION_LIMIT:.0e}). {blame}. Set a ridge (least squares), {drop}, or pass "
            'infeasible="least_violation" (the limit ridge -> 0)'
        )


@torch.no_grad()
def feasible(
    metric: MetricProtocol | Tensor, K: Tensor, *, names: Sequence[str] | None = None
) -> Feasibility:
    """Whether Delta K = R can be held for every R, as `solve` would find.

    metric: a metric (`MetricProtocol`), or C0 (d_in, d_in). K: (d_in, E) keys, one column a fact.
    names: what to call the facts in errors (E strings; their indices otherwise). Raises what
    `solve` raises for such a metric and such keys, but not InfeasibleError: that is left to
    `Feasibility.require`.
    """
    metric = as_metric(metric)
    K, _ = check_facts(K, K, names, metric.dim, metric.device)
    return examine(whitened(metric, K, names), metric.dim, names)[0]


def whitened(metric: MetricProtocol, K: Tensor, names: Sequence[str] | None) -> Tensor:
    """The metric's A of keys K; an error that concerns some of the facts tells their names."""
    try:
        A = metric.whiten(K)
    except NullSpaceError as error:
        if names is None:
            raise
        listed = ", ".join(fact_label(i, names) for i in error.facts[:5])
        more = f" and {len(error.facts) - 5} more" if len(error.facts) > 5 else ""
        raise NullSpaceError(
            f"{error}. The facts in question: {listed}{more}", error.facts
        ) from None
    require_no_overflow(A)
    return A


def examine(
    A: Tensor, d_in: int, names: Sequence[str] | None, *, basis: bool = False
) -> tuple[Feasibility, Spectrum]:
    """What whitened keys A (n x E) can hold, and their spectrum; see `spectrum_of` for `basis`."""
    n, E = A.shape
    seen = spectrum_of(A, _CUTOFF, basis=basis)
    found = Feasibility(
        holds=seen.rank == E,
        rank=seen.rank,
        condition=seen.condition if n >= E else math.inf,
        facts=E,
        dim=n,
        _A=A,
        _names=names,
        _d_in=d_in,
    )
    return found, seen


def require_no_overflow(*matrices: Tensor) -> None:
    """Raises ObjectiveError unless all entries are finite."""
    norms = [torch.linalg.vector_norm(one, ord=math.inf) for one in matrices if one.numel()]
    if norms and not bool(torch.isfinite(torch.stack(norms)).all()):
        raise ObjectiveError(
            "the update overflows float64: K, R and C0 are of scales too different to solve for"
        )


def _closest_columns(A: Tensor) -> tuple[int, int, float]:
    """Columns i < j of A (two at least) with the largest |cosine|, found block by block."""
    unit = torch.nan_to_num(A / A.norm(dim=0))  # a zero column is parallel to none
    best = (0, 1, 0.0)
    for start in range(0, A.shape[1], 1024):
        # Row i of the block is column start + i of A; only columns after it count.
        cosines = (unit[:, start : start + 1024].mT @ unit).abs().triu(diagonal=start + 1)
        cosine, at = cosines.flatten().max(dim=0)
        if float(cosine) > best[2]:
            row, j = divmod(int(at), A.shape[1])
            best = (start + row, j, float(cosine))
    return best[0], best[1], min(1.0, best[2])

"""Whether there was enough text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.objective.factoring import cholesky
from unified_edit.statistics.sums import Triangle

log = logging.getLogger(__name__)

#: Halves of a text that disagree by no more on fresh keys say that there was enough.
CONVERGED = 0.1


def warn(agreement: Mapping[int, float], tokens: int, widths: Mapping[int, int]) -> None:
    """Say of which layers it is not settled; each has `widths` entries in a key."""
    for layer, found in agreement.items():
        if found != found:
            log.warning(
                "C0 of layer %d: %d tokens are too few to tell whether it has converged (each "
                "half of the text needs d_k = %d at least); more text makes edits more specific",
                layer,
                tokens,
                widths[layer],
            )
        elif not found <= CONVERGED:
            log.warning(
                "C0 of layer %d has not converged: halves of the text disagree by %.3g on fresh "
                "keys (%g is converged); more text makes edits more specific",
                layer,
                found,
                CONVERGED,
            )


def check_enough(tokens: int, width: int) -> None:
    """Raise StatisticsError if C0 of keys with so many entries has too few tokens."""
    if tokens < 2 * width:
        raise StatisticsError(
            f"the corpus gave {tokens} tokens for C0, fewer than 2*d_k = {2 * width}: C0 would "
            f"hardly be invertible. Give about 10*d_k = {10 * width} tokens, or pass "
            "shrinkage=1e-3 and say so in your results"
        )


def agreement(
    halves: Sequence[Triangle], counts: Sequence[int], fresh: Tensor
) -> tuple[float, float]:
    """Median of |k'C1^-1 k / k'C2^-1 k - 1| over fresh keys (n x d); NaN if a half has no factor.

    The second number is the smallest pivot of both factors, as a share of the diagonal entry that
    it is left of: not small, both halves and their sum are far from singular.
    """
    if min(counts) < fresh.shape[1] or not len(fresh):  # a half is singular
        return float("nan"), 0.0
    # a coordinate that is zero in every key of a half says nothing; half precision has some
    alive = (halves[0].diagonal() * halves[1].diagonal()).nonzero()[:, 0]
    keys = fresh.to(alive.device)[:, alive].double().T
    costs, pivots = [], []
    for half, count in zip(halves, counts, strict=True):
        matrix = half.upper().div_(count)
        if len(alive) < half.d:
            matrix = matrix[alive][:, alive]
        diagonal = matrix.diagonal().clone()
        # of a matrix by rows the factor reads the upper triangle alone, which is all there is
        factor, failed_at = cholesky(matrix)
        if failed_at:
            return float("nan"), 0.0
        costs.append(torch.linalg.solve_triangular(factor, keys, upper=False).square().sum(0))
        pivots.append(float((factor.diagonal().square() / diagonal).min()))
    return float((costs[0] / costs[1] - 1).abs().median()), min(pivots)

"""The pseudo-inverse of a relation's matrix, of a chosen rank."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_edit.arguments import whole_number
from unified_edit.errors import RelationError


class Inverses:
    """Pseudo-inverses of one matrix (d x d): one decomposition for all ranks."""

    def __init__(self, weight: Tensor) -> None:
        self.left, self.sizes, self.right = torch.linalg.svd(weight)
        limit = len(weight) * torch.finfo(weight.dtype).eps
        self.rank = int((self.sizes > limit * self.sizes[0]).sum())

    def of_rank(self, rank: int | None) -> Tensor:
        """V_rho S_rho^-1 U_rho' (d x d), with the `rank` largest singular values; None for all.

        Raises RelationError for a rank above the numerical one: W is singular there.
        """
        d = len(self.sizes)
        chosen = d if rank is None else whole_number(rank, "rank", RelationError, least=1)
        if chosen > self.rank:
            raise RelationError(
                f"W is singular: {self.rank} of its {d} singular values are above rounding, but "
                f"rank {chosen} is asked for; give a smaller rank (rank=)"
            )
        right = self.right[:chosen].T / self.sizes[:chosen]
        return right @ self.left[:, :chosen].T


def low_rank_inverse(weight: Tensor, rank: int | None) -> Tensor:
    """W's pseudo-inverse of a rank; raises what `Inverses.of_rank` raises."""
    return Inverses(weight).of_rank(rank)

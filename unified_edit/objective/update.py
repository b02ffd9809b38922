"""What a solution is: an update of a weight as two factors, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unified_edit.objective.exact_product import is_identity, matmul

Form = Literal["equality", "ridge", "least_violation", "fine-tuning"]


@dataclass(frozen=True)
class Diagnosis:
    """What a solution is worth.

    - condition: of the whitened keys A (n x E), largest over E-th singular value; inf if E > n.
    - rank: number of singular values of A above 1 / CONDITION_LIMIT of the largest.
    - memorization_error: ||Delta K - R|| / ||R||, the root of :eq:`objective-memorize` relative to
      what was asked; ||Delta K|| where R = 0.
    - preservation_error: tr(Delta C0 Delta^T), the mean squared change of a preserved key's value;
      for an equality it is :eq:`emmet-price`.
    - form: the problem solved: "equality", "ridge", or "least_violation", the limit lam -> 0 where
      the equality cannot be held; "fine-tuning" where none was, and the numbers are NaN (rank 0).
    """

    condition: float
    rank: int
    memorization_error: float
    preservation_error: float
    form: Form


@dataclass(frozen=True, eq=False)
class Update:
    """Delta (d_out x d_in) as two float64 factors: Delta = left @ right.

    left: (d_out, r); right: (r, d_in). Where a dense matrix takes fewer numbers than the factors,
    one of them is Delta itself and the other an identity (`is_dense`); to store one, `delta` is
    enough then. So it is for large batches already where it takes up to twice as many: what is
    kept is what is applied, and need not be multiplied again to the last bit, which takes six
    products. Either way `objective.matmul(left, right)` is `delta`, bit for bit.
    """

    left: Tensor
    right: Tensor
    diagnosis: Diagnosis

    def to(self, device: torch.device | str) -> Update:
        """The same factors on another device."""
        if self.left.device == self.right.device == torch.device(device):
            return self
        return Update(self.left.to(device), self.right.to(device), self.diagnosis)

    @property
    def rank(self) -> int:
        """r, the number of columns of `left`."""
        return self.left.shape[1]

    @cached_property
    def is_dense(self) -> bool:
        """Whether one factor is the identity and the other is Delta."""
        return is_identity(self.left) or is_identity(self.right)

    @cached_property
    def delta(self) -> Tensor:
        """Delta, dense (d_out x d_in), float64; the same bits on every machine."""
        if is_identity(self.left):
            return self.right
        return self.left if is_identity(self.right) else matmul(self.left, self.right)

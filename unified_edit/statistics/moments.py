"""C0 of a layer as statistics hold it: a matrix in memory, or what makes one when it is asked for.

GPT-J's C0 takes 2 GiB a layer, so that those of several layers are rather read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

Moment = Tensor | Callable[[], Tensor]


def matrix_of(moment: Moment) -> Tensor:
    """C0 (d_k x d_k)."""
    return moment if isinstance(moment, Tensor) else moment()


def is_made(moment: Moment) -> bool:
    """Whether every call makes a matrix of its own, which may be written over."""
    return isinstance(moment, partial)


def shrink_in_place(C0: Tensor, shrinkage: float) -> None:
    """Add shrinkage * tr(C0)/d_k to the diagonal of C0, :eq:`preserve-shrinkage`."""
    C0.diagonal().add_(shrinkage * C0.diagonal().mean())


def shrunk(moment: Moment, shrinkage: float) -> Tensor:
    """A new matrix, C0 + shrinkage * tr(C0)/d_k * I."""
    C0 = matrix_of(moment)
    C0 = C0 if is_made(moment) else C0.clone()
    shrink_in_place(C0, shrinkage)
    return C0

"""Checks of the matrices that the objective is given."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from unified_edit.errors import ObjectiveError

log = logging.getLogger(__name__)


def check_facts(
    K: Tensor, R: Tensor, names: Sequence[str] | None, dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """K (dim x E) and R (d_out x E) in float64 on `device`.

    Raises ObjectiveError if they cannot be solved for.
    """
    K, R = (as_float64(name, M, device=device) for name, M in (("K", K), ("R", R)))
    d_in, E = K.shape
    if d_in != dim:
        raise ObjectiveError(
            f"K (d_in x E) has {d_in} rows, but C0 is {dim} x {dim}: columns are facts"
        )
    if R.shape[1] != E:
        raise ObjectiveError(
            f"K (d_in x E) has {E} columns and R (d_out x E) has {R.shape[1]}: columns are facts, "
            "each fact has one in both"
        )
    if E == 0 or R.shape[0] == 0:
        raise ObjectiveError(f"nothing to solve: K is {d_in} x {E} and R is {R.shape[0]} x {E}")
    if names is not None and len(names) != E:
        raise ObjectiveError(f"{len(names)} names were given for {E} facts")
    largest = [torch.linalg.vector_norm(matrix, ord=math.inf, dim=0) for matrix in (K, R)]
    for name, sizes in zip("KR", largest, strict=True):
        bad = (~torch.isfinite(sizes)).nonzero()
        if len(bad):
            raise ObjectiveError(
                f"{name} has entries that are not finite in {len(bad)} of {E} columns, first in "
                f"that of {fact_label(int(bad[0]), names)}: check the model for NaN weights"
            )
    zero = (largest[0] == 0).nonzero()
    if len(zero):
        raise ObjectiveError(
            f"the key of {fact_label(int(zero[0]), names)} is zero: no update changes its value"
        )
    return K, R


def as_float64(
    name: str,
    matrix: Tensor,
    *,
    allowed: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    """A matrix in float64 on `device` (its own if None, but the CPU for MPS), without gradient."""
    if not isinstance(matrix, Tensor):
        raise ObjectiveError(f"{name} must be a torch.Tensor, not {type(matrix).__name__}")
    if matrix.ndim != 2:
        raise ObjectiveError(
            f"{name} must be a matrix, not of shape {tuple(matrix.shape)}; columns are facts, "
            "so one fact is a matrix of one column"
        )
    if not matrix.is_floating_point() or (allowed and matrix.dtype not in allowed):
        wanted = " or ".join(str(dtype) for dtype in allowed) or "a floating-point type"
        raise ObjectiveError(f"{name} must be of {wanted}, not {matrix.dtype}")
    device = float64_device(matrix.device if device is None else device)
    # One step after the other: the device it comes from may have no float64.
    return matrix.detach().to(device).to(torch.float64)


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself; the CPU where it has no float64 (MPS), which is said once, or no memory.

    (The latter is "meta", where weights stand that are loaded when they are used.)
    """
    device = torch.device(device)
    if device.type not in ("mps", "meta"):
        return device
    if device.type == "mps":
        say_no_float64(device.type)
    return torch.device("cpu")


@cache
def say_no_float64(kind: str) -> None:
    """Say once of a kind of device that float64 is computed elsewhere."""
    log.warning(
        "%s has no float64: solutions, statistics and sums of edits are computed on the CPU",
        kind.upper(),
    )


def fact_label(index: int, names: Sequence[str] | None) -> str:
    """How a message calls the fact of a column."""
    return f"fact {index}" if names is None else f"fact {index} ({names[index]})"

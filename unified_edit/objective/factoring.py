"""The Cholesky factor of a second moment: the checks before it, itself, and one check behind it.

A second moment of GPT-J's keys takes 2 GiB. Nothing here makes another matrix of that size: what is
looked at is looked at by rows or squares, and the factor is made in the memory of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular

_BLOCK = 1024  # rows at a time

_TILE = 512  # entries are compared with those across the diagonal in squares that a cache holds


def extent(C0: Tensor) -> tuple[float, float]:
    """The largest |entry| of C0, and of C0 - C0^T; the first is not finite if an entry is not."""
    d, ends, skew = len(C0), [], []
    tile = C0.new_empty(min(d, _TILE) ** 2)
    for top in range(0, d, _TILE):
        rows = slice(top, min(d, top + _TILE))
        ends += [*C0[rows].aminmax()]  # NaN where there is one, without a mask of the size of C0
        for left in range(0, top + 1, _TILE):
            mine = C0[rows, left : min(d, left + _TILE)]
            other = tile[: mine.numel()].view(mine.shape)
            other.copy_(C0[left : min(d, left + _TILE), rows].mT)
            skew += [*other.sub_(mine).aminmax()]
    return float(torch.stack(ends).abs().max()), float(torch.stack(skew).abs().max())


def symmetrise(C0: Tensor) -> None:
    """Write (C0 + C0^T) / 2 in the place of C0."""
    for rows in blocks(len(C0)):
        for columns in blocks(rows.start + 1):
            mean = (C0[rows, columns] + C0[columns, rows].mT).div_(2)
            C0[rows, columns], C0[columns, rows] = mean, mean.mT


def cholesky(C0: Tensor) -> tuple[Tensor, int]:
    """L in the memory of the symmetric C0, and 0, or where the factorisation failed."""
    # LAPACK goes by columns, and a symmetric matrix is its transpose: nothing is copied.
    place = C0 if C0.stride(0) == 1 else C0.mT
    failed_at = torch.empty((), dtype=torch.int32, device=C0.device)
    factor: Tensor = torch.linalg.cholesky_ex(place, out=(place, failed_at))[0]
    return factor, int(failed_at)


def unit_diagonal(C0: Tensor) -> tuple[Tensor, float]:
    """The roots of C0's diagonal (d x 1), and the Frobenius norm of C0 divided by them."""
    variances = C0.diagonal().clone()
    squares = [C0[rows].square() @ (1 / variances) for rows in blocks(len(C0))]
    return variances.sqrt()[:, None], float((torch.cat(squares) / variances).sum().sqrt())


def is_singular(factor: Tensor, scale: Tensor, size: float) -> bool:
    """Whether C0 with unit diagonal is singular to within the rounding of its Cholesky factor.

    A singular C0 may have a factor, by the luck of rounding. Its product is then singular up to
    the error of the factorisation, d eps ||C0||, which inverse iteration finds at once: what it
    returns is never below the smallest eigenvalue. scale, size: of `_unit_diagonal`.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(factor), 1, generator=generator, dtype=torch.float64)
    vector = vector.to(factor.device)
    for _ in range(3):
        vector = solve_triangular(factor, scale * (vector / vector.norm()), upper=False)
        vector = scale * solve_triangular(factor.mT, vector, upper=True)
    smallest = 1 / float(vector.norm())
    return not smallest > len(factor) * torch.finfo(torch.float64).eps * size


def blocks(d: int) -> list[slice]:
    """Rows 0 to d, some at a time."""
    return [slice(start, start + _BLOCK) for start in range(0, d, _BLOCK)]


def alive_rows(C0: Tensor) -> Tensor | None:
    """Indices of the rows of C0 that are not zero; None where that is all or none.

    A row that is zero on the diagonal alone belongs to no second moment: it counts as alive, and
    the factorisation fails.
    """
    dead = C0.diagonal() == 0
    for rows in blocks(len(C0)):
        if bool(dead[rows].any()):
            dead[rows] &= ~(C0[rows] != 0).any(dim=1)
    return None if bool(dead.all()) or not bool(dead.any()) else (~dead).nonzero().flatten()


def principal(matrix: Tensor, index: Tensor) -> Tensor:
    """matrix[index][:, index], without a temporary of that size."""
    part = matrix.new_empty(len(index), len(index))
    for rows in blocks(len(index)):
        part[rows] = matrix[index[rows]][:, index]
    return part

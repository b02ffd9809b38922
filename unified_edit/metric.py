"""The metric in which an update is measured, and the checks of what is handed to the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.errors import NotPositiveDefiniteError, ObjectiveError

_SYMMETRY = 1e-6  # relative; C0 summed in float32 is symmetric to about this


class Metric:
    """What an update costs: C0, the second moment of the keys to preserve, as its Cholesky factor.

    C0: (d_in, d_in), symmetric positive definite, float32 or float64, on any device. `factor` is
    the lower triangular L (float64) with C0 = L L^T, on C0's device (on the CPU for MPS, which has
    no float64). Made once a layer and used for every batch.

    Raises ObjectiveError if C0 is not a square, finite matrix of such a type, symmetric to 1e-6 of
    its largest entry (it is symmetrised then); NotPositiveDefiniteError if it has no Cholesky
    factor, or is singular to within rounding.
    """

    factor: Tensor

    def __init__(self, C0: Tensor) -> None:
        C0 = as_float64("C0", C0, allowed=(torch.float32, torch.float64))
        d = C0.shape[0]
        if C0.shape != (d, d) or d == 0:
            raise ObjectiveError(
                f"C0 must be a square matrix (d_in x d_in), not of shape {tuple(C0.shape)}"
            )
        if not bool(torch.isfinite(C0).all()):
            bad = int((~torch.isfinite(C0)).sum())
            raise ObjectiveError(
                f"C0 has {bad} entries that are not finite: check the model for NaN weights or "
                "overflow, and collect the statistics again"
            )
        largest = max(float(C0[rows].abs().max()) for rows in _blocks(d))
        skew = max(float((C0[rows] - C0[:, rows].mT).abs().max()) for rows in _blocks(d))
        if skew > _SYMMETRY * largest:
            raise ObjectiveError(
                f"C0 is not symmetric: C0 and its transpose differ by up to {skew:.1e}, its "
                f"largest entry is {largest:.1e}; C0 is the mean of k k^T"
            )
        if skew:
            C0 = (C0 + C0.mT).div_(2)
        factor, failed_at = torch.linalg.cholesky_ex(C0)
        if int(failed_at) or _is_singular(C0, factor):
            raise NotPositiveDefiniteError(
                f"C0 ({d} x {d}) is not positive definite: it was made from too few tokens, or "
                "some direction holds no key at all. Collect the statistics over more tokens "
                f"(at least {2 * d}, better {10 * d}) or give a shrinkage"
            )
        self.factor = factor

    @classmethod
    def identity(cls, d: int, device: torch.device | str | None = None) -> Metric:
        """The metric of C0 = I (d x d): every direction of the keys costs the same."""
        return cls(torch.eye(d, dtype=torch.float64, device=device))

    @property
    def dim(self) -> int:
        """d_in, the number of entries of a key."""
        return self.factor.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the factor lives and solutions are computed."""
        return self.factor.device

    def whiten(self, K: Tensor) -> Tensor:
        """L^-1 K (d_in x E): keys in coordinates in which preserved keys have second moment I.

        The A of :eq:`objective-whitened`.
        """
        A: Tensor = solve_triangular(self.factor, self._own("K", K, axis=0), upper=False)
        return A

    def unwhiten_rows(self, rows: Tensor) -> Tensor:
        """rows L^-1 (r x d_in): rows that act on whitened keys, made to act on keys."""
        rows = self._own("rows", rows, axis=1)
        product: Tensor = solve_triangular(self.factor, rows, upper=False, left=False)
        return product

    def cost(self, left: Tensor, right: Tensor) -> float:
        """tr(Delta C0 Delta^T) of Delta = left @ right: mean squared change of a preserved value.

        :eq:`preserve-error`, divided by N. left: (d_out, r); right: (r, d_in).
        """
        rows = self._own("right", right, axis=1) @ self.factor
        return float((left.to(self.device).to(rows.dtype) @ rows).square().sum())

    def _own(self, name: str, matrix: Tensor, axis: int) -> Tensor:
        if matrix.ndim != 2 or matrix.shape[axis] != self.dim:
            raise ObjectiveError(
                f"{name} of shape {tuple(matrix.shape)} does not fit C0, which is "
                f"{self.dim} x {self.dim}"
            )
        return matrix.to(self.device).to(self.factor.dtype)

    def __repr__(self) -> str:
        return f"Metric(dim={self.dim}, device={str(self.device)!r})"


def _is_singular(C0: Tensor, factor: Tensor) -> bool:
    """Whether C0 with unit diagonal is singular to within the rounding of its Cholesky factor.

    A singular C0 may have a factor, by the luck of rounding. Its product is then singular up to
    the error of the factorisation, d eps ||C0||, which inverse iteration finds at once: what it
    returns is never below the smallest eigenvalue.
    """
    scale = C0.diagonal().sqrt()[:, None]
    squares = [(C0[rows] / scale[rows] / scale.mT).square().sum() for rows in _blocks(len(C0))]
    size = float(torch.stack(squares).sum().sqrt())
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(C0), 1, generator=generator, dtype=torch.float64).to(C0.device)
    for _ in range(3):
        vector = scale * torch.cholesky_solve(scale * (vector / vector.norm()), factor)
    smallest = 1 / float(vector.norm())
    return not smallest > len(C0) * torch.finfo(torch.float64).eps * size


def _blocks(d: int) -> list[slice]:
    """Rows some at a time: C0 of GPT-J takes 2 GiB, and so would every temporary of its size."""
    return [slice(start, start + 1024) for start in range(0, d, 1024)]


def closest_pair(metric: Metric | Tensor, K: Tensor) -> tuple[int, int, float]:
    """The two facts i < j whose whitened keys are most nearly parallel, and their |cosine|.

    K: (d_in, E) with E >= 2. Whitened, because it is there that an equality tells facts apart.
    Raises ObjectiveError for fewer than two keys, and for what `solve` refuses.
    """
    metric = metric if isinstance(metric, Metric) else Metric(metric)
    K, _ = check_facts(metric, K, K, None)
    if K.shape[1] < 2:
        raise ObjectiveError("a closest pair needs at least two keys")
    return closest_columns(metric.whiten(K))


def closest_columns(A: Tensor) -> tuple[int, int, float]:
    """Columns i < j of A (two at least) with the largest |cosine|, found block by block."""
    unit = A / A.norm(dim=0)
    best = (0, 1, 0.0)
    for start in range(0, A.shape[1], 1024):
        # Row i of the block is column start + i of A; only columns after it count.
        cosines = (unit[:, start : start + 1024].mT @ unit).abs().triu(diagonal=start + 1)
        cosine, at = cosines.flatten().max(dim=0)
        if float(cosine) > best[2]:
            row, j = divmod(int(at), A.shape[1])
            best = (start + row, j, float(cosine))
    return best[0], best[1], min(1.0, best[2])


def check_facts(
    metric: Metric, K: Tensor, R: Tensor, names: Sequence[str] | None
) -> tuple[Tensor, Tensor]:
    """K and R in float64 on the metric's device; ObjectiveError if they cannot be solved for."""
    K, R = (as_float64(name, M, device=metric.device) for name, M in (("K", K), ("R", R)))
    d_in, E = K.shape
    if d_in != metric.dim:
        raise ObjectiveError(
            f"K (d_in x E) has {d_in} rows, but C0 is {metric.dim} x {metric.dim}: columns are "
            "facts"
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
    for name, matrix in (("K", K), ("R", R)):
        bad = (~torch.isfinite(matrix)).any(dim=0).nonzero()
        if len(bad):
            raise ObjectiveError(
                f"{name} has entries that are not finite in {len(bad)} of {E} columns, first in "
                f"that of {fact_label(int(bad[0]), names)}: check the model for NaN weights"
            )
    zero = (K == 0).all(dim=0).nonzero()
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
    if device is None:
        device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    # One step after the other: the device it comes from may have no float64.
    return matrix.detach().to(device).to(torch.float64)


def fact_label(index: int, names: Sequence[str] | None) -> str:
    """How a message calls the fact of a column."""
    return f"fact {index}" if names is None else f"fact {index} ({names[index]})"

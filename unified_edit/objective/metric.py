"""The metric in which an update is measured: the protocol, and C0's own metric."""

from __future__ import annotations

import logging
import math
from copy import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from unified_edit.arguments import real_number
from unified_edit.errors import NotPositiveDefiniteError, NullSpaceError, ObjectiveError
from unified_edit.objective.factoring import (
    alive_rows,
    blocks,
    cholesky,
    extent,
    is_singular,
    principal,
    symmetrise,
    unit_diagonal,
)
from unified_edit.objective.inputs import as_float64, float64_device

log = logging.getLogger(__name__)

_SYMMETRY = 1e-6  # relative; C0 summed in float32 is symmetric to about this

_PANEL = 256  # columns of the factor, and keys, that one reflection of `plus` takes in


@runtime_checkable
class MetricProtocol(Protocol):
    """What `solve` needs to know of the keys to preserve; any object with these six will do.

    A metric is a linear map T (n x d_in) from keys to whitened keys, in which an update costs the
    squared size of what it does: Delta = X T costs ||X||_F^2. Only such updates exist for it. With
    T = L^-1 from C0 = L L^T that is tr(Delta C0 Delta^T) (`Metric`). With fewer rows than d_in
    (coordinates of a null space, say) some directions of the keys are out of reach, and n is the
    number of facts that can be held. A key that is wholly out of reach must come out as zero, not
    as the rounding of zero: the solver has no other way to tell. All matrices are float64.
    """

    @property
    def dim(self) -> int:
        """d_in, the number of entries of a key."""

    @property
    def device(self) -> torch.device:
        """Where solutions are computed; it must have float64."""

    def whiten(self, K: Tensor) -> Tensor:
        """T K (n x E) of keys K (d_in x E), one column a fact."""

    def unwhiten(self, rows: Tensor) -> Tensor:
        """rows T (r x d_in) of rows (r x n) that act on whitened keys."""

    def cost(self, left: Tensor, right: Tensor) -> float:
        """What Delta = left @ right costs, left: (d_out, r), right: (r, d_in)."""

    def plus(self, K: Tensor, weight: float) -> MetricProtocol:
        """The metric in which Delta costs weight ||Delta K||_F^2 more: K is to be preserved too."""


class Metric:
    """What an update costs: C0, the second moment of the keys to preserve, as its Cholesky factor.

    C0: (d_in, d_in), symmetric positive definite, float32 or float64, on any device. `factor` is
    the lower triangular L (float64) with C0 = L L^T, on C0's device (on the CPU for MPS, which has
    no float64). Made once a layer and used for every batch.

    Coordinates that are zero in every preserved key, as happens to neurons in half precision, leave
    C0 zero rows and columns. They drop out: `alive` (None where there are none) holds the indices
    of the n others, `factor` (n x n) is made over these alone, and an update is zero in the dead
    coordinates. That is exactly the update for any positive C0[i, i] there, as long as the keys of
    the facts are zero there too.

    Raises ObjectiveError if C0 is not a square, finite matrix of such a type, symmetric to 1e-6 of
    its largest entry (it is symmetrised then); NotPositiveDefiniteError if it has no Cholesky
    factor over its alive coordinates, or is singular there to within rounding.
    """

    factor: Tensor
    alive: Tensor | None
    isometric = True

    def __init__(self, C0: Tensor, *, overwrite: bool = False) -> None:
        """Factor C0; with `overwrite` in its own memory, if it is float64, and C0 is lost."""
        given = C0
        C0 = as_float64("C0", C0, allowed=(torch.float32, torch.float64))
        d = C0.shape[0]
        if C0.shape != (d, d) or d == 0:
            raise ObjectiveError(
                f"C0 must be a square matrix (d_in x d_in), not of shape {tuple(C0.shape)}"
            )
        own = overwrite or C0.data_ptr() != given.data_ptr()
        largest, skew = extent(C0)
        if not math.isfinite(largest):
            bad = sum(int((~torch.isfinite(C0[rows])).sum()) for rows in blocks(d))
            raise ObjectiveError(
                f"C0 has {bad} entries that are not finite: check the model for NaN weights or "
                "overflow, and collect the statistics again"
            )
        if skew > _SYMMETRY * largest:
            raise ObjectiveError(
                f"C0 is not symmetric: C0 and its transpose differ by up to {skew:.1e}, its "
                f"largest entry is {largest:.1e}; C0 is the mean of k k^T"
            )
        self._dim = d
        self.alive = alive_rows(C0)
        if self.alive is not None:
            C0, own = principal(C0, self.alive), True
        if not own:
            C0 = C0.clone(memory_format=torch.contiguous_format)
        if skew:
            symmetrise(C0)
        scale, size = unit_diagonal(C0)
        factor, failed_at = cholesky(C0)
        if failed_at or is_singular(factor, scale, size):
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

    @classmethod
    def on(cls, device: torch.device | str, C0: Tensor, *, overwrite: bool = False) -> Metric:
        """The metric of C0, factored on `device`; on C0's own where that has too little memory."""
        where = float64_device(device)
        if where == C0.device:
            return cls(C0, overwrite=overwrite)
        try:
            return cls(C0.detach().to(where, torch.float64), overwrite=True)
        except torch.OutOfMemoryError:
            log.warning("%s has no room for C0 (%d x %d): on %s then", where, *C0.shape, C0.device)
            return cls(C0, overwrite=overwrite)

    def to(self, device: torch.device | str) -> Metric:
        """The same metric on another device, where it then solves; itself if it is there."""
        where = float64_device(device)
        if where == self.device:
            return self
        alive = None if self.alive is None else self.alive.to(where)
        moved = copy(self)
        moved.factor, moved.alive = self.factor.to(where), alive
        return moved

    @classmethod
    def from_factor(cls, factor: Tensor, alive: Tensor | None = None, dim: int = 0) -> Metric:
        """The metric that has this `factor` (and `alive`, of `dim` coordinates), to the last bit.

        Raises ObjectiveError unless it is a finite lower triangle with a positive diagonal.
        """
        factor = as_float64("the factor", factor, allowed=(torch.float64,))
        rows = len(factor) if alive is None else len(alive)
        if factor.shape != (rows, rows) or not bool(
            torch.isfinite(factor).all() and (factor.diagonal() > 0).all()
        ):
            raise ObjectiveError(
                f"the factor of a metric of {rows} coordinates is a finite lower triangle with a "
                f"positive diagonal, {rows} x {rows}; this one is {tuple(factor.shape)}"
            )
        made = cls.__new__(cls)
        made.factor, made.alive = factor, alive
        made._dim = len(factor) if alive is None else dim
        return made

    @property
    def dim(self) -> int:
        """d_in, the number of entries of a key."""
        return self._dim

    @property
    def device(self) -> torch.device:
        """Where the factor lives and solutions are computed."""
        return self.factor.device

    def whiten(self, K: Tensor) -> Tensor:
        """L^-1 K (n x E): keys in coordinates in which preserved keys have second moment I.

        The A of :eq:`objective-whitened`. K: (d_in, E); n is d_in less the dead coordinates.
        Raises NullSpaceError if a key has an entry in one of these.
        """
        K = self._own("K", K, axis=0, size=self.dim)
        if self.alive is not None:
            K, whole = K[self.alive], K
            if K.count_nonzero() != whole.count_nonzero():
                raise self._reaches_dead(whole)
        A: Tensor = solve_triangular(self.factor, K, upper=False)
        return A

    def unwhiten(self, rows: Tensor) -> Tensor:
        """rows L^-1 (r x d_in): rows that act on whitened keys, made to act on keys.

        rows: (r, n). Dead coordinates get zeros.
        """
        rows = self._own("rows", rows, axis=1, size=len(self.factor))
        product: Tensor = solve_triangular(self.factor, rows, upper=False, left=False)
        if self.alive is None:
            return product
        return product.new_zeros(len(rows), self.dim).index_copy_(1, self.alive, product)

    def cost(self, left: Tensor, right: Tensor) -> float:
        """tr(Delta C0 Delta^T) of Delta = left @ right: mean squared change of a preserved value.

        :eq:`preserve-error`, divided by N. left: (d_out, r); right: (r, d_in).
        """
        right = self._own("right", right, axis=1, size=self.dim)
        rows = (right if self.alive is None else right[:, self.alive]) @ self.factor
        return float((left.to(self.device).to(rows.dtype) @ rows).square().sum())

    def plus(self, K: Tensor, weight: float) -> Metric:
        """The metric of C0 + weight K K^T: the keys K (d_in, E) are to be preserved as well.

        With facts K1 stored before and weight 1/lam it is MEMIT's history: a ridge lam on new
        facts K solves with lam C0 + K1 K1^T + K K^T. The sum is never formed: [L, sqrt(weight) K]
        is turned into a triangle by reflections, so that an ill-conditioned C0 keeps the digits
        that its factor has. Costs about E d_in^2 and one factor of memory.

        Coordinates that were dead come alive where K is not zero. Raises NotPositiveDefiniteError
        if E keys are too few to span those; ObjectiveError for a weight that is negative or not
        finite, and for keys that do not fit or are not finite.
        """
        weight = real_number(weight, "the weight of keys", ObjectiveError, least=0.0)
        K = math.sqrt(weight) * self._own("K", K, axis=0, size=self.dim)
        if not bool(torch.isfinite(K).all()):
            raise ObjectiveError("K has entries that are not finite, or overflows with its weight")
        sum_, factor = copy(self), self.factor
        if self.alive is not None:
            reached = (K != 0).any(dim=1).index_fill_(0, self.alive, True)
            now = reached.nonzero().flatten()
            at = torch.searchsorted(now, self.alive)
            factor = factor.new_zeros(len(now), len(now))
            factor[at[:, None], at] = self.factor
            K, sum_.alive = K[now], None if len(now) == self.dim else now
        sum_.factor = factor = _with_keys(factor, K)
        if len(factor) > len(self.factor) and is_singular(
            factor, *unit_diagonal(factor @ factor.mT)
        ):
            raise NotPositiveDefiniteError(
                f"C0 + weight K K^T is not positive definite: the {K.shape[1]} keys of K reach "
                f"{len(factor) - len(self.factor)} coordinates in which C0 is zero, and do not "
                "span them. Give C0 a shrinkage (C0 + eps * tr(C0)/d * I)"
            )
        return sum_

    def _own(self, name: str, matrix: Tensor, axis: int, size: int) -> Tensor:
        if matrix.ndim != 2 or matrix.shape[axis] != size:
            dead = "" if size == self.dim else f" with {size} coordinates that are not dead"
            raise ObjectiveError(
                f"{name} of shape {tuple(matrix.shape)} does not fit C0, which is "
                f"{self.dim} x {self.dim}{dead}"
            )
        return matrix.to(self.device).to(self.factor.dtype)

    def _reaches_dead(self, K: Tensor) -> NullSpaceError:
        reaching = (K != 0).index_fill_(0, self.alive, False)  # type: ignore[arg-type]
        facts = tuple(reaching.any(dim=0).nonzero().flatten().tolist())
        coordinates = int(reaching.any(dim=1).sum())
        return NullSpaceError(
            f"keys reach where no preserved key does: {len(facts)} of {K.shape[1]} facts, first "
            f"fact {facts[0]}, have entries in {coordinates} of the "
            f"{self.dim - len(self.factor)} coordinates in which C0 ({self.dim} x {self.dim}) is "
            "zero, where a change would cost nothing. Collect the statistics over more tokens or "
            "give a shrinkage (C0 + eps * tr(C0)/d * I)",
            facts,
        )

    def __repr__(self) -> str:
        return f"Metric(dim={self.dim}, device={str(self.device)!r})"


def as_metric(metric: MetricProtocol | Tensor) -> MetricProtocol:
    """A metric as it is; the `Metric` of a matrix C0."""
    if isinstance(metric, MetricProtocol):
        return metric
    if not isinstance(metric, Tensor):
        raise ObjectiveError(
            "give a torch.Tensor C0, or a metric with dim, device, whiten, unwhiten, cost and "
            f"plus, not {type(metric).__name__}"
        )
    return Metric(metric)


def _with_keys(factor: Tensor, K: Tensor) -> Tensor:
    """The Cholesky factor of L L^T + K K^T, by Householder reflections of [L, K].

    A reflection Q leaves [L, K] [L, K]^T as it is. One Q a panel of columns of L puts the panel's
    triangle in place and takes its rows out of K.
    """
    factor = factor.clone()
    for keys in K.split(_PANEL, dim=1):
        keys = keys.clone()
        for start in range(0, len(factor), _PANEL):
            at = slice(start, start + _PANEL)
            both = torch.cat([factor[start:, at], keys[start:]], dim=1)
            width = both.shape[1] - keys.shape[1]
            both = both @ torch.linalg.qr(both[:width].mT, mode="complete").Q
            factor[start:, at], keys[start:] = both[:, :width], both[:, width:]
    factor *= torch.where(factor.diagonal() < 0, -1.0, 1.0)
    return factor.tril_()  # what should be zero above the diagonal is so up to rounding

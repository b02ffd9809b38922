"""Preservation as a constraint: updates that act where preserved keys hardly go (AlphaEdit)."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from unified_edit.arguments import is_flag, real_number
from unified_edit.errors import ObjectiveError, brief
from unified_edit.objective.inputs import as_float64
from unified_edit.objective.metric import Metric

#: AlphaEdit's `nullspace_threshold`, the same for all its models (jianghoucheng/AlphaEdit f5248d3,
#: 2024-10-17, hparams/AlphaEdit). It is absolute: what it keeps depends on how long keys are.
ALPHAEDIT_THRESHOLD = 2e-2


class NullSpace:
    """Updates that act on the nearly empty directions of C0 alone, and there all cost the same.

    `basis` is N (d_in x n), orthonormal: the eigenvectors of C0 whose eigenvalue, the mean square
    of a preserved key along it, is below `threshold`, or below `threshold` times the largest with
    `relative`. Dead coordinates are among them. With P = N N^T the update is Delta = Delta P, and
    in the coordinates N^T K of the keys it costs ||Delta||_F^2. So `solve` gives

        ridge = mu > 0    Delta = R K^T P (K K^T P + mu I)^-1      AlphaEdit (arXiv 2410.02355, eq.
                                                                   14, and its code: mu is L2)
        ridge = 0         Delta = R (K^T P K)^-1 K^T P             both sides constraints

    and after `plus(Kp, 1 / mu)`, for the keys Kp of earlier edits, AlphaEdit's sequential form
    R K^T P (Kp Kp^T P + K K^T P + mu I)^-1. (Its code adds to Kp the keys read off the model
    *behind* a batch; updates add up to one solution with those that the batch was written with.)

    `kept` is n / d_in, how much of the keys the projector leaves: it may be nearly all (99.7 to
    99.9 % on Llama-3-8B, and then P is hardly there) or half, by the model and the threshold.

    What `cost` counts is not what the update is found by. The space is never quite empty, so it
    says what leaks, tr(Delta C0 Delta^T), as for every other metric; keys added by `plus` count
    on top, with their weight.

    C0: a `Metric`, which is referred to and not copied, or a matrix that makes one. basis: that of
    an earlier `NullSpace` of the same C0 and threshold; finding it takes some 10 d_in^3 operations.
    Raises what `Metric` raises; ObjectiveError for a threshold that is not positive, and where no
    eigenvalue is below it.
    """

    basis: Tensor

    def __init__(
        self,
        C0: Metric | Tensor,
        threshold: float = ALPHAEDIT_THRESHOLD,
        *,
        relative: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        self.soft = C0 if isinstance(C0, Metric) else Metric(C0)
        self.threshold = real_number(threshold, "the threshold", ObjectiveError, above=0.0)
        if not is_flag(relative):
            raise ObjectiveError(f"relative is {brief(relative)}; it must be True or False")
        self.basis = self._found(bool(relative)) if basis is None else basis
        self._past: Metric | None = None  # in coordinates of the basis; None is the identity

    def _found(self, relative: bool) -> Tensor:
        """N, from the eigenvectors of C0."""
        values, vectors = torch.linalg.eigh(self._moment())
        limit = self.threshold * (float(values[-1]) if relative else 1.0)
        count = int((values < limit).sum())
        if count == 0:
            raise ObjectiveError(
                f"the null space is empty: no eigenvalue of C0 is below {limit:.3g}, the smallest "
                f"is {float(values[0]):.3g} and the largest {float(values[-1]):.3g}. Give a larger "
                "threshold, or one relative to the largest (relative=True)"
            )
        return vectors[:, :count].contiguous()

    def _moment(self) -> Tensor:
        """C0 (d_in x d_in), from its factor."""
        metric = self.soft
        moment = metric.factor @ metric.factor.mT
        if metric.alive is None:
            return moment
        whole = moment.new_zeros(metric.dim, metric.dim)
        whole[metric.alive[:, None], metric.alive] = moment
        return whole

    @property
    def dim(self) -> int:
        """d_in, the number of entries of a key."""
        return self.soft.dim

    @property
    def device(self) -> torch.device:
        """Where the basis lives and solutions are computed."""
        return self.basis.device

    @property
    def kept(self) -> float:
        """n / d_in: the share of the directions of a key in which an update may act."""
        return self.basis.shape[1] / self.dim

    def whiten(self, K: Tensor) -> Tensor:
        """N^T K (n x E), whitened further by what `plus` added. K: (d_in, E).

        A key that lies outside of the space comes out as zero.
        """
        K = as_float64("K", K, device=self.device)
        inside = self.basis.mT @ K
        rounding = 8 * self.dim * torch.finfo(K.dtype).eps * K.norm(dim=0)
        inside = torch.where(inside.norm(dim=0) <= rounding, 0.0, inside)
        return inside if self._past is None else self._past.whiten(inside)

    def unwhiten(self, rows: Tensor) -> Tensor:
        """rows (r x n) that act on whitened keys, made to act on keys: (r x d_in)."""
        rows = as_float64("rows", rows, device=self.device)
        return (rows if self._past is None else self._past.unwhiten(rows)) @ self.basis.mT

    def cost(self, left: Tensor, right: Tensor) -> float:
        """tr(Delta C0 Delta^T) of Delta = left @ right, and what the keys of `plus` add to it."""
        leaked = self.soft.cost(left, right)
        if self._past is None:
            return leaked
        left, right = (as_float64("a factor", one, device=self.device) for one in (left, right))
        inside = right @ self.basis
        return leaked + self._past.cost(left, inside) - float((left @ inside).square().sum())

    def plus(self, K: Tensor, weight: float) -> NullSpace:
        """The same with weight ||Delta K||_F^2 on top: I + weight N^T K K^T N in coordinates of N.

        K: (d_in, E) keys of earlier edits. Raises what `Metric.plus` raises.
        """
        K = as_float64("K", K, device=self.device)
        past = self._past or Metric.identity(self.basis.shape[1], self.device)
        sum_ = copy(self)
        sum_._past = past.plus(self.basis.mT @ K, weight)
        return sum_

    def __repr__(self) -> str:
        return (
            f"NullSpace(dim={self.dim}, kept={100 * self.kept:.1f} %, threshold={self.threshold:g})"
        )

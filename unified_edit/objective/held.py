"""A metric in which some keys are held: whatever is solved in it leaves their values as they are.

Facts (K_s, V_s) are written batch after batch at one weight, and batch t asks for
R_t = V_t - W_{t-1} K_t. To hold the equalities of the earlier batches exactly, Delta_t has to
vanish on their keys K_past:

    minimise tr(Delta C0 Delta^T)    subject to    Delta K = R  and  Delta K_past = 0

In whitened coordinates, X = Delta L and a = L^-1 k, the second condition says that the rows of X
are orthogonal to the columns of A_past. With Q, an orthonormal basis of these, X = X (I - Q Q^T),
so that only a - Q Q^T a of a key is seen, :eq:`held-update`. It is the same problem in fewer
dimensions, and `objective.solve` solves it as any other:

    a = L^-1 K,    a <- a - Q Q^T a  (twice),    a = Q_t S,    Delta = R S^-1 Q_t^T L^-1

[Q, Q_t] is then an orthonormal basis for all keys so far, and the updates add up to one: the rows
of Delta_1 + ... + Delta_t lie in the span of [Q, Q_t]^T L^-1, and the sum holds every equality,
which is what EMMET's solution of all pairs at once is, with R = V - W0 K, :eq:`held-sum`. The
least-squares form needs no such metric: there the past is `Metric.plus(K_past, 1 / lam)`, that is
lam C0 + sum K_s K_s^T (arXiv 2605.26670), :eq:`soft-sum`. The equality form is in no source that
we know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unified_edit.objective.feasibility import CONDITION_LIMIT
from unified_edit.objective.inputs import as_float64
from unified_edit.objective.metric import MetricProtocol, as_metric


class Held:
    """The metric of another one, with the values of some keys held.

    metric: a metric, or C0 (d_in x d_in). K: (d_in x m) the keys whose values no update may change;
    their columns may depend on each other. `basis` is Q (n x rank): an orthonormal basis of their
    whitened form, float64; directions below 1 / CONDITION_LIMIT of a whitened key's length are
    rounding, and are left out.

    A new key that has less than 1 / CONDITION_LIMIT of its whitened length outside of Q has no room
    left: it comes out as zero, so that `solve` refuses it by name.

    Costs m n numbers for Q and as many for K, which `plus` needs, and 2 m n operations for each key
    that is whitened. Raises ObjectiveError for keys that do not fit.
    """

    def __init__(self, metric: MetricProtocol | Tensor, K: Tensor) -> None:
        self.inner: MetricProtocol = as_metric(metric)
        K = as_float64("K", K, device=self.inner.device)
        self.keys = K[:, :0]
        self.basis = self.inner.whiten(K.new_zeros(self.dim, 1))[:, :0]
        self._take(K)

    @property
    def dim(self) -> int:
        """d_in, the number of entries of a key."""
        return self.inner.dim

    @property
    def device(self) -> torch.device:
        """Where solutions are computed."""
        return self.inner.device

    @property
    def isometric(self) -> bool:
        """As the metric within: rows that belong to whitened keys are outside of Q already."""
        return bool(getattr(self.inner, "isometric", False))

    @property
    def room(self) -> int:
        """How many more facts can be held: the dimensions of a whitened key less those in use."""
        return self.basis.shape[0] - self.basis.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the basis and the keys."""
        return 8 * (self.basis.numel() + self.keys.numel())

    def holding(self, K: Tensor) -> Held:
        """The metric in which the keys K (d_in x E) are held as well; this one stays as it is.

        Only the new directions are worked out, about 4 n m E operations.
        """
        more = Held.__new__(Held)
        more.inner, more.keys, more.basis = self.inner, self.keys, self.basis
        more._take(as_float64("K", K, device=self.device))
        return more

    def left(self, K: Tensor) -> Tensor:
        """For each key (d_in x E) the share of its whitened length that is not held yet, 0 to 1.

        1: it has nothing in common with the keys held; 0: its value is fixed already. For one key
        it is the S of :eq:`held-update`, relative to the key: what is stored there grows by its
        inverse.
        """
        whole = self.inner.whiten(as_float64("K", K, device=self.device))
        return self._outside(whole).norm(dim=0) / whole.norm(dim=0)

    def whiten(self, K: Tensor) -> Tensor:
        """(I - Q Q^T) of the whitened keys (n x E)."""
        return self._outside(self.inner.whiten(K))

    def unwhiten(self, rows: Tensor) -> Tensor:
        """rows (I - Q Q^T) T (r x d_in) of rows (r x n)."""
        return self.inner.unwhiten(_without(self.basis, rows.to(self.basis.dtype).mT).mT)

    def cost(self, left: Tensor, right: Tensor) -> float:
        """What Delta = left @ right costs in the metric held."""
        return self.inner.cost(left, right)

    def plus(self, K: Tensor, weight: float) -> Held:
        """The metric in which Delta costs weight ||Delta K||_F^2 more, with the same keys held."""
        return Held(self.inner.plus(K, weight), self.keys)

    def _take(self, K: Tensor) -> None:
        if K.shape[1] == 0:
            return
        whole = self.inner.whiten(K)
        # each key counts by its direction: one that is short is no less to be held
        unit = whole / whole.norm(dim=0).clamp_min(torch.finfo(whole.dtype).tiny)
        Q, S = torch.linalg.qr(_without(self.basis, unit))
        U, s, _ = torch.linalg.svd(S)
        if bool((s <= 1 / CONDITION_LIMIT).any()):
            Q = Q @ U[:, s > 1 / CONDITION_LIMIT]
        # what QR lets in of Q again where little of a key was left
        Q = torch.linalg.qr(_without(self.basis, Q)).Q
        self.basis = torch.cat([self.basis, Q], dim=1)
        self.keys = torch.cat([self.keys, K], dim=1)

    def _outside(self, A: Tensor) -> Tensor:
        rest = _without(self.basis, A)
        full = rest.norm(dim=0) <= A.norm(dim=0) / CONDITION_LIMIT
        return rest.masked_fill_(full, 0.0) if bool(full.any()) else rest

    def __repr__(self) -> str:
        return f"Held({self.inner!r}, {self.basis.shape[1]} of {self.basis.shape[0]})"


def _without(Q: Tensor, A: Tensor) -> Tensor:
    """A less what lies in the span of the orthonormal Q; twice, as once leaves rounding of |A|."""
    for _ in range(2 if Q.shape[1] else 0):
        A = A - Q @ (Q.mT @ A)
    return A

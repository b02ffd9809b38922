"""An update whose rows answer to one key and that is held at another: the original ROME."""

from __future__ import annotations

import torch
from torch import Tensor

from unified_edit.errors import InfeasibleError
from unified_edit.objective.inputs import check_facts
from unified_edit.objective.metric import MetricProtocol, as_metric


@torch.no_grad()
def divided(
    metric: MetricProtocol | Tensor, K: Tensor, D: Tensor, R: Tensor, *, ridge: float = 0.0
) -> Tensor:
    """The R' (d_out x E) that `solve` is to be given with K, so that Delta is divided by D.

    Delta = R (K^T C0^-1 D + lam I)^-1 K^T C0^-1 has the rows of K (d_in x E) and holds the equality
    Delta D = R (lam = 0) at D (d_in x E). Where D is K this is the objective's own solution, and
    R' = R. Else it is not the cheapest update that holds D, and at K it does R' = Delta K, which
    grows without bound as K^T C0^-1 D goes to zero.

    The released code of ROME does this for one fact, K the mean over contexts and D the bare prompt
    (kmeng01/rome 0874014, rome/compute_v.py: `cur_input`; arXiv 2403.07175, eq. 6).

    Raises what `solve` raises for such matrices; InfeasibleError if K^T C0^-1 D has no inverse.
    """
    metric = as_metric(metric)
    K, R = check_facts(K, R, None, metric.dim, metric.device)
    D, _ = check_facts(D, R, None, metric.dim, metric.device)
    A, B = metric.whiten(K), metric.whiten(D)
    damping = ridge * torch.eye(K.shape[1], dtype=A.dtype, device=A.device)
    found, failed = torch.linalg.solve_ex(A.mT @ B + damping, A.mT @ A + damping)
    if int(failed) or not bool(torch.isfinite(found).all()):
        raise InfeasibleError(
            f"K^T C0^-1 D of {K.shape[1]} facts has no inverse: the update's rows do not reach the "
            "keys that it is to be held at. Use one key for both"
        )
    made: Tensor = R @ found
    return made

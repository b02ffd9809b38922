"""lam from a budget, batch after batch: the sequential form of LyapLock (arXiv 2505.15702).

Each batch is solved for together with all pairs before it, on the base model, with the lam that
`objective.Budget` has arrived at; what is written is the difference to the updates so far. A pair
of an earlier batch is a key and what the weight *gave* for it once it had been written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unified_edit.editing.histories import Past
from unified_edit.editing.methods import Method
from unified_edit.editing.named import Preserved
from unified_edit.editing.provenance import Spent
from unified_edit.errors import MethodError, brief
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.ledger import Ledger
from unified_edit.objective import Budget, MetricProtocol, Update, matmul, solve


def check_budget(budget: object, history: object) -> None:
    """Raise MethodError unless it is None, or a `Budget` beside a soft history."""
    if budget is not None and not isinstance(budget, Budget):
        raise MethodError(f"budget is {brief(budget)}; give a unified_edit.Budget, or nothing")
    if budget is not None and history != "soft":
        raise MethodError(
            "a budget lets lam rise from batch to batch, and needs history='soft', in which "
            f"earlier batches count; history is {brief(history)}"
        )


def with_lam(method: Method, budget: Budget | None, preserve: Preserved | None) -> Method:
    """The method with the budget's first lam in the place of its own.

    Raises MethodError for what the form with a budget is not defined for.
    """
    if budget is None:
        return method
    if method.divisor_mean is not None:
        raise MethodError(
            f"{method.name} divides its update by another key (divisor_mean), which is defined for "
            "the facts of one batch; with a budget all batches are solved for together. Leave one "
            "of the two out"
        )
    if preserve is not None:
        raise MethodError(
            "preserve= names what one edit may not change, and with a budget each batch changes "
            "what earlier ones wrote as well, so that it has no meaning for it. Leave one of the "
            "two out, or name it with history='soft' alone"
        )
    return method.replace(ridge=budget.weight, ridge_from=1)


@torch.no_grad()
def within_budget(
    past: Past,
    metric: MetricProtocol,
    weight: NamedWeight,
    K: Tensor,
    asked: Tensor,
    ledger: Ledger,
    turns: Sequence[Update],
) -> tuple[Update, Tensor, Spent]:
    """The update of a new batch, the V that its keys have with it, and what has been spent.

    past: what counts, with a budget. metric: of preservation alone. K: (d_in x E). asked:
    (d_out x E), what the values are to change by. turns: what the edit in the making has written.

    With D the sum of the updates so far it is D' - D, where D' solves for all pairs at once:
    (W0 + D') K_s is to be near V_s, and (W0 + D') K near (W0 + D) K + asked, at the price of
    lam tr(D' C0 D'^T). Edits without a history are part of W0: D' has nothing of them, and what
    they gave for their keys is a pair.
    """
    budget = past.budgets.get(weight.name, past.budgets[""])
    device = metric.device
    known = {batch.id for batch in past.batches if weight.name in batch.targets}
    edits = [one for one in ledger.active if weight.name in one.updates]
    written = [*(one.updates[weight.name] for one in edits if one.id in known), *turns]
    base = weight.to_stored(ledger.base_weight(weight)).to(device).double()
    for one in edits:
        if one.id not in known:
            base = base + one.updates[weight.name].delta.to(device)
    K, asked = K.to(device), asked.to(device)

    def done(keys: Tensor) -> Tensor:
        """D keys."""
        found = keys.new_zeros(len(base), keys.shape[1])
        for one in written:
            found = found + one.left.to(device) @ (one.right.to(device) @ keys)
        return found

    pairs = [(K, done(K) + asked)]
    by_id = {batch.id: batch for batch in past.batches}
    for id_, columns in past.kept(weight.name):
        keys = by_id[id_].keys[weight.name][:, list(columns)].to(device)
        values = by_id[id_].targets.get(weight.name)
        given = done(keys) if values is None else values[:, list(columns)].to(device) - base @ keys
        pairs.append((keys, given))
    keys, values = (torch.cat(each, dim=1) for each in zip(*pairs, strict=True))
    total = solve(metric, keys, values, ridge=budget.ridge)
    left, right = _factors([total, *(_minus(one) for one in written)], device)
    change = left @ (right @ K)
    diagnosis = total.diagnosis
    spent = Spent(budget, diagnosis.preservation_error)
    update = Update(
        left,
        right,
        type(diagnosis)(
            condition=diagnosis.condition,
            rank=diagnosis.rank,
            memorization_error=float((change - asked).norm() / asked.norm()),
            preservation_error=metric.cost(left, right),
            form=diagnosis.form,
        ),
    )
    return update, (base @ K + done(K) + change).cpu(), spent


def _minus(update: Update) -> Update:
    return Update(-update.left, update.right, update.diagnosis)


def _factors(updates: Sequence[Update], device: torch.device) -> tuple[Tensor, Tensor]:
    """left and right of a sum of updates, with as few columns as it has dimensions.

    Each batch's update reaches the keys of all: without this the factors would double every time.
    """
    left = torch.cat([one.left.to(device) for one in updates], dim=1)
    right = torch.cat([one.right.to(device) for one in updates], dim=0)
    size = right.norm(dim=1)  # rows count by their direction: some sums have long ones
    left, right = left * size, right / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    Q, S = torch.linalg.qr(right.mT)
    U, s, Vh = torch.linalg.svd(S, full_matrices=False)
    rank = int((s > s[0] * max(right.shape) * torch.finfo(s.dtype).eps).sum())
    left, right = left @ (Vh[:rank].mT * s[:rank]), (Q @ U[:, :rank]).mT
    if rank * (len(left) + right.shape[1]) > len(left) * right.shape[1]:
        dense = matmul(left, right)
        identity = torch.eye(min(dense.shape), dtype=dense.dtype, device=device)
        return (identity, dense) if dense.shape[0] <= dense.shape[1] else (dense, identity)
    return left.contiguous(), right.contiguous()

"""lam from a budget of preservation, batch after batch (LyapLock)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unified_edit.arguments import real_number
from unified_edit.errors import ObjectiveError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """LyapLock (arXiv 2505.15702): lam rises while preserved values have moved more than allowed.

    weight: w, the lam of the first batch, relative to the mean C0; 1000 in the released settings.
    alpha: how many times the cost of the first batch all batches together may cost; 60 there.
    queue: lam / w. It is never below 1, and grows after each batch by cost / (alpha * first) - 1.
    first: what the first batch cost, tr(Delta C0 Delta^T); None before it.

    The released code (wpwpwpyo/LyapLock c5e6186, 2025-05-20, lyaplock_main.py and evaluate.py)
    keeps Z and a number a, both from alpha * D at the start; only `queue` = a * Z enters. At each
    batch it solves for all pairs so far together, on the base model: with preserved values
    V0 = W0 K0 its update, added to those before, is ``solve(C0, [K_1 ... K_t], [R_1 ... R_t],
    ridge=budget.ridge)``, where R_s is what the sum of updates did at K_s when it was written. That
    is not what was asked for there: MEMIT with a history goes on asking for that, LyapLock for what
    was reached.

    Raises ObjectiveError for numbers that are not positive, or negative costs.
    """

    weight: float = 1000.0
    alpha: float = 60.0
    queue: float = 1.0
    first: float | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "alpha", "queue"):
            value = real_number(getattr(self, name), f"Budget: {name}", ObjectiveError, above=0.0)
            object.__setattr__(self, name, value)

    @property
    def ridge(self) -> float:
        """lam for the next batch, relative to the mean C0."""
        return self.weight * self.queue

    def after(self, cost: float) -> Budget:
        """The budget when all batches so far together cost that much, tr(Delta C0 Delta^T)."""
        spent = real_number(cost, "Budget: the cost", ObjectiveError, least=0.0)
        first = spent if self.first is None else self.first
        if first == 0.0:
            raise ObjectiveError(
                "Budget: the first batch cost nothing, so that nothing may be spent; start with a "
                "batch that changes the model"
            )
        return replace(
            self, first=first, queue=max(1.0, self.queue + spent / (self.alpha * first) - 1.0)
        )

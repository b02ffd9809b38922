"""Adam on the values of a batch together, with nothing read back from the device within a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from unified_edit.editing.early_stop import is_there, losses_there
from unified_edit.editing.methods import Method
from unified_edit.editing.prepared import Prepared
from unified_edit.errors import EditError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.packed import logits_behind, run_blocks, taken
from unified_edit.model.progress import Bar

#: A GPU is asked for its losses after so many steps: waiting for them at each would leave it idle.
#: A value that is finished is not moved meanwhile; it only costs what it would have cost.
LOOK_EVERY = 4
#: Adam's coefficients, torch's own.
BETAS, EPSILON = (0.9, 0.999), 1e-8


def _losses(
    parts: Anatomy, batch: Prepared, delta: Tensor, method: Method
) -> tuple[Tensor, Tensor, Tensor]:
    """Total loss at each row of `delta` (values x d_out), and the distributions of the KL term.

    The third says of each value whether the target is there as far as `prob_cutoff` asks.
    """
    at, layer = batch.layout, batch.layer
    added = parts.entering(
        layer,
        method.site(parts, layer),
        batch.at_site,
        delta[at.owner].to(batch.hidden.dtype),
    )
    begins = batch.hidden.index_select(0, at.first) + added
    hidden = batch.hidden.index_copy(0, at.first, begins)[None]
    above = range(layer + 1, parts.n_layers)
    hidden = run_blocks(parts, above, at.calls, at.packing, hidden, at.read)
    logits = logits_behind(parts, taken(hidden[0], at.read), batch.as_tuple)
    # the head may stand on another device
    logits = logits.to(delta.device, torch.promote_types(logits.dtype, torch.float32))
    at_targets, at_subject = logits.split([len(at.target_id), len(delta)])
    chosen = -functional.cross_entropy(at_targets, at.target_id, reduction="none")
    negative = -(chosen[at.slots] * at.weights).sum(dim=1)
    current = at_subject.log_softmax(-1)
    initial = batch.kl_initial if batch.kl_initial.numel() else current.detach()
    divergence = (current.exp() * (current - initial)).sum(-1)
    decay = torch.linalg.vector_norm(delta, dim=1) / batch.target_init.square().sum(1)
    total = negative + method.kl_weight * divergence + (method.weight_decay or 0.0) * decay
    cutoff = method.prob_cutoff or 0.0
    return total, current, is_there(batch, at_targets.detach(), chosen.detach(), cutoff)


def steps_between_looks(device: torch.device) -> int:
    """After how many steps losses are read back."""
    return 1 if device.type == "cpu" else LOOK_EVERY


class _Adam:
    """Adam (Kingma and Ba 2015) on rows that all have made the same number of steps."""

    def __init__(self, like: Tensor, rate: float) -> None:
        self.rate, self.steps = rate, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def moved(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """`delta` after one more step."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        root = (self.square.sqrt() / math.sqrt(1 - BETAS[1] ** self.steps)).add_(EPSILON)
        return delta.addcdiv(self.mean, root, value=-self.rate / (1 - BETAS[0] ** self.steps))

    def only(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.mean, self.square = self.mean.index_select(0, rows), self.square.index_select(0, rows)


class _Descent:
    """The values of a batch on their way: those that are `left`, and what became of the others."""

    def __init__(self, batch: Prepared, method: Method, facts: Sequence[Fact], bar: Bar) -> None:
        assert method.steps is not None, "resolve the method first"
        assert method.learning_rate is not None, "resolve the method first"
        self.batch, self.method, self.facts, self.bar = batch, method, facts, bar
        init = batch.target_init
        self.left = list(range(len(facts)))
        self.found = torch.zeros_like(init)
        self.delta = torch.zeros_like(init)
        self.adam = _Adam(self.delta, method.learning_rate)
        #: of each value whether it still moves, and how often its target was there
        self.running = torch.ones(len(facts), dtype=torch.bool, device=init.device)
        self.often = torch.zeros(len(facts), dtype=torch.long, device=init.device)
        #: of each loss that was not looked at yet, whether its value was running, and the loss
        self.unread: list[Tensor] = []
        self.history: list[list[float]] = [[] for _ in facts]

    def note(self, total: Tensor, there: Tensor) -> None:
        """Take down the losses of a step; a value whose loss is small enough runs no more."""
        assert self.method.stop_loss is not None, "resolve the method first"
        self.unread.append(torch.stack([self.running.to(total.dtype), total.detach()]))
        self.often += there
        needed = losses_there(self.method.prob_cutoff or 0.0)
        self.running = self.running & (total.detach() >= self.method.stop_loss)
        if math.isfinite(needed):
            self.running = self.running & (self.often < needed)

    def look(self, step: int) -> list[int]:
        """Read what was taken down: the places of the values that are still running.

        Raises EditError for a loss that is not finite.
        """
        *read, running = torch.stack(
            [*self.unread, torch.stack([self.running, self.running]).to(self.unread[0])]
        ).tolist()
        for number, (were_running, losses) in enumerate(read, step + 1 - len(read)):
            for place, index in enumerate(self.left):
                if not were_running[place]:
                    continue
                self.history[index].append(losses[place])
                if not math.isfinite(losses[place]):
                    fact = self.facts[index]
                    raise EditError(
                        f"the loss of {fact.text!r} -> {fact.target_new!r} is {losses[place]} at "
                        f"step {number}; check the model's weights for NaN, or lower learning_rate"
                    )
        self.unread = []
        return [place for place, runs in enumerate(running[0]) if runs]

    def update(self, gradient: Tensor) -> None:
        """One step of Adam and the clamp, for those that are running."""
        assert self.method.clamp is not None, "resolve the method first"
        moved = self.adam.moved(self.delta, gradient)
        size, limit = moved.norm(dim=1), self.method.clamp * self.batch.target_init.norm(dim=1)
        moved = moved * torch.where(size > limit, limit / size, 1.0)[:, None]
        self.delta = torch.where(self.running[:, None], moved, self.delta)

    def only(self, parts: Anatomy, kept: list[int]) -> None:
        """Go on with the values at some places; put the others away."""
        self.put_away()
        rows = torch.tensor(kept).to(self.delta.device, non_blocking=True)
        self.bar.update(len(self.left) - len(kept))
        self.left = [self.left[place] for place in kept]
        self.batch = self.batch.only(parts, kept)
        self.delta = self.delta.index_select(0, rows)
        self.running, self.often = (one.index_select(0, rows) for one in (self.running, self.often))
        self.adam.only(rows)

    def put_away(self) -> None:
        """Write the values where the batch's result will be."""
        places = torch.tensor(self.left).to(self.delta.device, non_blocking=True)
        self.found.index_copy_(0, places, self.delta)


def descend(
    parts: Anatomy, batch: Prepared, method: Method, facts: Sequence[Fact], bar: Bar
) -> tuple[Tensor, list[tuple[float, ...]]]:
    """Delta of each value of a batch (values x d_out), and its losses; finished ones are dropped.

    facts: one of each value, for what is said of it.

    Raises EditError if a loss is not finite.
    """
    run = _Descent(batch, method, facts, bar)
    every = steps_between_looks(run.delta.device)
    assert method.steps is not None, "resolve the method first"
    for step in range(method.steps):
        last = step == method.steps - 1
        with torch.set_grad_enabled(not last):
            delta = run.delta.detach().requires_grad_(not last)
            total, current, there = _losses(parts, run.batch, delta, method)
        if step == 0:
            run.batch = replace(run.batch, kl_initial=current.detach())
        run.note(total, there)
        kept = run.look(step) if last or (step + 1) % every == 0 else run.left
        if last or not kept:
            break
        (gradient,) = torch.autograd.grad(total.sum(), delta)
        with torch.no_grad():
            run.update(gradient)
            if len(kept) < len(run.left):
                run.only(parts, kept)
    run.put_away()
    bar.update(len(run.left))
    return run.found, [tuple(losses) for losses in run.history]

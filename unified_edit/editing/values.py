"""v*: the value that makes the model say the new object, optimised for all facts together.

For each fact, delta is added at the subject's last token to the output of one block (MEMIT,
EMMET) or of its MLP (ROME; every method where a norm follows the MLP, as in Gemma 2: what reaches
the block's output is norm(m + delta) - norm(m) then), and chosen by Adam to minimise

    mean over contexts of the mean over target tokens of -log p(token)
    + kl_weight * KL(current || initial), both read at the subject of "{subject} is a"
    + weight_decay * norm(delta) / norm(target_init)^2

(ROME, eq. 4; MEMIT, eq. 16; coefficients and order of steps as in their released code.) Facts of
one subject may be given one value (MEMIT-Merge, arXiv 2502.07322): its contexts are those of all of
them, each with the fact's own target, and target_init is the mean of theirs.

The loop stops for a fact when its total loss is below `stop_loss`, and always before the last
update; after each update delta is projected to norm(delta) <= clamp * norm(target_init). Two things
that ROME and MEMIT do not have are asked for by a method: an earlier stop (`early_stop`), and norms
that do not grow with edits (`anchors`).

What the published code recomputes at every step is constant and computed once (`prepared`). Logits
are made at target positions only. This changes the cost and not the result; `tests/test_values.py`
holds it against a literal transcription.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.editing.anchors import anchored
from unified_edit.editing.early_stop import is_there, losses_there
from unified_edit.editing.keys import SITES, column_means, values_at
from unified_edit.editing.methods import Method
from unified_edit.editing.prepared import Prepared, fresh, prepare
from unified_edit.errors import EditError, FactError
from unified_edit.facts import Fact, members_of
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length
from unified_edit.model.hooks import PLAIN_OUTPUT, quiet, stubbed
from unified_edit.model.likelihoods import log_probabilities
from unified_edit.model.progress import Bar, progress
from unified_edit.model.prompts import FactRows


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch of facts; columns are facts, or subjects where merged.

    delta, target_init: (d_out x columns, float64); the value to be written is their sum.
    losses: for each column its total loss at each step, the first at delta = 0.
    conditions: the model's state, prefixes and settings they were found under, as text.
    columns: for each fact the column of its value; without it, each has its own.
    """

    facts: tuple[Fact, ...]
    layer: int
    site: str
    delta: Tensor
    target_init: Tensor
    losses: tuple[tuple[float, ...], ...]
    conditions: str = ""
    columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.facts))))

    @property
    def z(self) -> Tensor:
        """v* at the site: (d_out x columns)."""
        return self.target_init + self.delta

    def of(self, facts: Sequence[Fact]) -> Values:
        """The values of some of the facts, in the order given; KeyError if one is missing.

        Raises FactError where only some of the facts that share a value are chosen: it was not
        found for these alone.
        """
        place = {fact: index for index, fact in enumerate(self.facts)}
        members = members_of(self.columns)
        wanted, kept, columns = set(facts), [], []
        for fact in facts:
            column = self.columns[place[fact]]
            merged = members[column] if len(members[column]) > 1 else []
            left_out = [self.facts[i] for i in merged if self.facts[i] not in wanted]
            if left_out:
                raise FactError(
                    f"{fact} shares its value with {left_out[0]}, which is left out; optimise the "
                    "values of the facts that are edited together"
                )
            if not merged or column not in kept:
                kept.append(column)
            columns.append(kept.index(column) if merged else len(kept) - 1)
        return replace(
            self,
            facts=tuple(facts),
            delta=self.delta[:, kept],
            target_init=self.target_init[:, kept],
            losses=tuple(self.losses[column] for column in kept),
            columns=tuple(columns),
        )

    @classmethod
    def joined(cls, each: Sequence[Values]) -> Values:
        """Values of several lists of facts as one, found under the same conditions."""
        before = itertools.accumulate((len(one.losses) for one in each), initial=0)
        return replace(
            each[0],
            facts=tuple(fact for one in each for fact in one.facts),
            delta=torch.cat([one.delta for one in each], dim=1),
            target_init=torch.cat([one.target_init for one in each], dim=1),
            losses=tuple(loss for one in each for loss in one.losses),
            columns=tuple(
                first + column
                for first, one in zip(before, each, strict=False)
                for column in one.columns
            ),
        )


def compute_values(
    parts: Anatomy,
    rows: FactRows,
    method: Method,
    conditions: str = "",
    columns: Sequence[int] = (),
) -> Values:
    """Optimise the values of the facts of `rows` for a resolved `method`.

    The loss is :eq:`value-loss`, the clamp :eq:`value-clamp`. Values do not influence each other: a
    batch gives what each gives alone. Deterministic.

    columns: for each fact the number of its value, from 0, where some share one: the KL term is
        then read behind the subject as the first of them writes it. Without it, each has its own.

    Raises EditError if a loss is not finite.
    """
    layer, facts = method.value_layer, rows.facts
    columns = tuple(columns) or tuple(range(len(facts)))
    members = members_of(columns)
    texts = [[*(row for i in one for row in rows.behind[i]), rows.kl[one[0]]] for one in members]
    lengths = [max(len(row.ids) for row in of_value) * len(of_value) for of_value in texts]
    width, contexts = parts.weight(layer).d_out, len(rows.prefixes)
    losses: list[tuple[float, ...]] = [()] * len(members)
    bar = progress("optimising values", len(members), "fact")
    # gradients are needed, whatever mode the caller is in
    with torch.inference_mode(False), quiet(parts.model), bar:
        delta = torch.zeros(width, len(members), dtype=torch.float64)
        init = torch.zeros_like(delta)
        for chosen in batches_by_length(lengths):
            batch = prepare(parts, [texts[index] for index in chosen], contexts, layer, method.site)
            firsts = [facts[members[index][0]] for index in chosen]
            found, history = _optimise(parts, batch, method, firsts, bar)
            for place, index in enumerate(chosen):
                delta[:, index] = found[place].double().cpu()
                init[:, index] = batch.target_init[place].double().cpu()
                losses[index] = tuple(history[place])
        if method.norm_anchor:
            outputs = column_means(values_at(parts, rows, layer, SITES["mlp"]), columns)
            gain = parts.gain(layer, method.site(parts, layer))
            delta = gain * anchored(outputs, delta / gain, method.norm_anchor)
    return Values(facts, layer, method.site.name, delta, init, tuple(losses), conditions, columns)


def _losses(
    parts: Anatomy, batch: Prepared, delta: Tensor, method: Method
) -> tuple[Tensor, Tensor, Tensor]:
    """Total loss at each row of `delta` (values x d_out), and the distributions of the KL term.

    The third says of each value whether the target is there as far as `prob_cutoff` asks.
    """
    added = parts.entering(
        batch.layer,
        method.site(parts, batch.layer),
        batch.at_site,
        delta[batch.owner].to(batch.hidden.dtype),
    )
    hidden = torch.cat([batch.hidden[:, :1] + added[:, None], batch.hidden[:, 1:]], dim=1)
    with stubbed(list(parts.blocks[: batch.layer + 1]), hidden, batch.as_tuple):
        final = parts.model.base_model(
            input_ids=batch.suffix,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=fresh(batch.cache),
            use_cache=True,
            **PLAIN_OUTPUT,
        ).last_hidden_state
    at_targets = log_probabilities(
        parts, final[batch.target_row, batch.target_place], checked=False
    )
    chosen = at_targets.gather(1, batch.target_id[:, None]).squeeze(1)
    owner = batch.owner[batch.target_row]
    negative = torch.zeros(len(delta), device=delta.device, dtype=chosen.dtype)
    negative = negative.index_add(0, owner, -chosen * batch.target_weight)
    current = log_probabilities(parts, final[batch.kl_rows, 0], checked=False)
    initial = batch.kl_initial if batch.kl_initial.numel() else current.detach()
    divergence = (current.exp() * (current - initial)).sum(-1)
    decay = torch.linalg.vector_norm(delta, dim=1) / batch.target_init.square().sum(1)
    total = negative + method.kl_weight * divergence + (method.weight_decay or 0.0) * decay
    return total, current, is_there(batch, at_targets.detach(), method.prob_cutoff or 0.0)


def _optimise(
    parts: Anatomy, batch: Prepared, method: Method, facts: list[Fact], bar: Bar
) -> tuple[list[Tensor], list[list[float]]]:
    """Adam on all facts of a batch together; finished facts are dropped from it."""
    assert method.steps is not None, "resolve the method first"
    assert method.clamp is not None, "resolve the method first"
    # one parameter a fact: Adam passes over those without a gradient, so a fact that is
    # finished stays exactly where it was
    deltas = [torch.zeros_like(init, requires_grad=True) for init in batch.target_init]
    optimizer = torch.optim.Adam(deltas, lr=method.learning_rate)  # type: ignore[arg-type]
    history: list[list[float]] = [[] for _ in facts]
    active = list(range(len(facts)))
    often, needed = [0] * len(facts), losses_there(method.prob_cutoff or 0.0)
    for step in range(method.steps):
        with torch.enable_grad():
            total, current, there = _losses(
                parts, batch, torch.stack([deltas[index] for index in active]), method
            )
        if step == 0:
            batch = replace(batch, kl_initial=current.detach())
        values = total.detach().tolist()
        for index, value in zip(active, values, strict=True):
            history[index].append(value)
            if value != value or value in (float("inf"), float("-inf")):
                raise EditError(
                    f"the loss of {facts[index].text!r} -> {facts[index].target_new!r} is {value} "
                    f"at step {step}; check the model's weights for NaN, or lower learning_rate"
                )
        for index, one in zip(active, there.tolist(), strict=True):
            often[index] += one
        keep = [
            place
            for place, value in enumerate(values)
            if value >= method.stop_loss and often[active[place]] < needed
        ]
        bar.update(len(active) - len(keep))
        if step == method.steps - 1 or not keep:
            bar.update(len(keep))
            break
        optimizer.zero_grad(set_to_none=True)
        total[keep].sum().backward()
        finished = set(active) - {active[place] for place in keep}
        for index in finished:
            deltas[index].grad = None
        optimizer.step()
        if finished:
            active = [active[place] for place in keep]
            batch = batch.only(torch.tensor(keep, device=batch.owner.device))
        with torch.no_grad():
            size = torch.stack([deltas[index] for index in active]).norm(dim=1)
            limit = method.clamp * batch.target_init.norm(dim=1)
            for index, factor in zip(
                active, torch.where(size > limit, limit / size, 1.0), strict=True
            ):
                deltas[index].mul_(factor)
    return [delta.detach() for delta in deltas], history

"""v*: the value that makes the model say the new object, optimised for all facts together.

For each fact, delta is added at the subject's last token to the output of one block (MEMIT,
EMMET) or of its MLP (ROME; every method where a norm follows the MLP, as in Gemma 2: what reaches
the block's output is norm(m + delta) - norm(m) then), and chosen by Adam to minimise

    mean over contexts of the mean over target tokens of -log p(token)
    + kl_weight * KL(current || initial), both read at the subject of "{subject} is a"
    + weight_decay * norm(delta) / norm(target_init)^2

(ROME, eq. 4; MEMIT, eq. 16; coefficients and order of steps as in their released code.) The
loop stops for a fact when its total loss is below `stop_loss`, and always before the last
update; after each update delta is projected to norm(delta) <= clamp * norm(target_init).

What the published code recomputes at every step is constant and computed once here: the keys
and values of the attention over everything before the subject's last token, and the output of
all blocks up to the edited one. Logits are made at target positions only. This changes the cost
and not the result; `tests/test_values.py` holds it against a literal transcription.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unified_edit.editing.choices import Choice
from unified_edit.editing.methods import Method
from unified_edit.errors import EditError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import (
    PLAIN_OUTPUT,
    captured,
    noticing_tuples,
    per_token,
    quiet,
    stubbed,
)
from unified_edit.model.likelihoods import log_probabilities
from unified_edit.model.progress import Bar, progress
from unified_edit.model.prompts import FactRows, Row


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch of facts; columns are facts.

    delta, target_init: (d_out x E, float64); the value to be written is their sum.
    losses: for each fact its total loss at each step, the first at delta = 0.
    conditions: the model's state, prefixes and settings they were found under, as text.
    """

    facts: tuple[Fact, ...]
    layer: int
    site: str
    delta: Tensor
    target_init: Tensor
    losses: tuple[tuple[float, ...], ...]
    conditions: str = ""

    @property
    def z(self) -> Tensor:
        """v* at the site: (d_out x E)."""
        return self.target_init + self.delta

    def of(self, facts: Sequence[Fact]) -> Values:
        """The values of some of the facts, in the order given; KeyError if one is missing."""
        place = {fact: index for index, fact in enumerate(self.facts)}
        chosen = [place[fact] for fact in facts]
        return replace(
            self,
            facts=tuple(facts),
            delta=self.delta[:, chosen],
            target_init=self.target_init[:, chosen],
            losses=tuple(self.losses[index] for index in chosen),
        )

    @classmethod
    def joined(cls, each: Sequence[Values]) -> Values:
        """Values of several lists of facts as one, found under the same conditions."""
        return replace(
            each[0],
            facts=tuple(fact for one in each for fact in one.facts),
            delta=torch.cat([one.delta for one in each], dim=1),
            target_init=torch.cat([one.target_init for one in each], dim=1),
            losses=tuple(loss for one in each for loss in one.losses),
        )


def compute_values(parts: Anatomy, rows: FactRows, method: Method, conditions: str = "") -> Values:
    """Optimise the values of the facts of `rows` for a resolved `method`.

    The loss is :eq:`value-loss`, the clamp :eq:`value-clamp`. Facts do not influence each other: a
    batch gives what each fact gives alone. Deterministic.

    Raises EditError if a loss is not finite.
    """
    assert method.layers is not None, "resolve the method first"
    layer, facts = method.layers[-1], rows.facts
    texts = [[*behind, kl] for behind, kl in zip(rows.behind, rows.kl, strict=True)]
    lengths = [max(len(row.ids) for row in of_fact) * len(of_fact) for of_fact in texts]
    width = parts.weight(layer).d_out
    losses: list[tuple[float, ...]] = [()] * len(facts)
    bar = progress("optimising values", len(facts), "fact")
    # gradients are needed, whatever mode the caller is in
    with torch.inference_mode(False), quiet(parts.model), bar:
        delta = torch.zeros(width, len(facts), dtype=torch.float64)
        init = torch.zeros_like(delta)
        for chosen in batches_by_length(lengths):
            batch = _prepare(parts, [texts[index] for index in chosen], layer, method.site)
            found, history = _optimise(parts, batch, method, [facts[i] for i in chosen], bar)
            for place, index in enumerate(chosen):
                delta[:, index] = found[place].double().cpu()
                init[:, index] = batch.target_init[place].double().cpu()
                losses[index] = tuple(history[place])
    return Values(facts, layer, method.site.name, delta, init, tuple(losses), conditions)


@dataclass(frozen=True)
class _Batch:
    """Everything about some facts that does not depend on delta.

    A row is one prompt, cut in two: the prefix ends just before the subject's last token, the
    suffix begins with it, so that delta always enters at the first place of the suffix.
    """

    layer: int
    owner: Tensor  # rows: index of the fact the row belongs to
    cache: list[tuple[Tensor, Tensor]]  # attention keys and values of the prefixes, by layer
    suffix: Tensor  # rows x suffix: ids
    mask: Tensor  # rows x (prefix + suffix)
    positions: Tensor  # rows x suffix
    hidden: Tensor  # rows x suffix x d_out: output of block `layer` where delta is zero
    as_tuple: bool  # whether the blocks of this family return tuples
    at_site: Tensor  # rows x d_out: what stands at the site in each row where delta is zero
    target_init: Tensor  # facts x d_out
    kl_rows: Tensor  # facts: the row of the KL prompt
    kl_initial: Tensor  # facts x vocabulary, log-probabilities; empty until first computed
    target_row: Tensor  # target tokens: row ...
    target_place: Tensor  # ... place in the suffix whose logits predict it ...
    target_id: Tensor  # ... its id ...
    target_weight: Tensor  # ... and 1 / (tokens of the target * contexts)

    def only(self, kept: Tensor) -> _Batch:
        """The batch of the facts with index in `kept`."""
        new_fact = torch.full((len(self.target_init),), -1, device=kept.device)
        new_fact[kept] = torch.arange(len(kept), device=kept.device)
        rows = (new_fact[self.owner] >= 0).nonzero().squeeze(1)
        new_row = torch.full((len(self.owner),), -1, device=kept.device)
        new_row[rows] = torch.arange(len(rows), device=kept.device)
        tokens = (new_row[self.target_row] >= 0).nonzero().squeeze(1)
        return _Batch(
            layer=self.layer,
            owner=new_fact[self.owner[rows]],
            cache=[(keys[rows], values[rows]) for keys, values in self.cache],
            suffix=self.suffix[rows],
            mask=self.mask[rows],
            positions=self.positions[rows],
            hidden=self.hidden[rows],
            as_tuple=self.as_tuple,
            at_site=self.at_site[rows],
            target_init=self.target_init[kept],
            kl_rows=new_row[self.kl_rows[kept]],
            kl_initial=self.kl_initial[kept],
            target_row=new_row[self.target_row[tokens]],
            target_place=self.target_place[tokens],
            target_id=self.target_id[tokens],
            target_weight=self.target_weight[tokens],
        )


def _prepare(parts: Anatomy, rows: list[list[Row]], layer: int, site: Choice) -> _Batch:
    """Run everything that is constant during the optimisation once."""
    device = parts.model.device
    flat = [row for of_fact in rows for row in of_fact]
    owner = [index for index, of_fact in enumerate(rows) for _ in of_fact]
    # of the KL prompt nothing after the subject is needed: a causal model cannot see it there
    suffixes = [
        row.ids[row.subject :] if row.target else row.ids[row.subject :][:1] for row in flat
    ]
    lengths = torch.tensor([len(suffix) for suffix in suffixes])
    width = int(lengths.max())
    ids = torch.tensor([list(suffix) + [0] * (width - len(suffix)) for suffix in suffixes])
    starts = torch.tensor([row.subject for row in flat])
    # padding repeats the last position, so that none beyond the model's limit is asked for
    positions = starts[:, None] + torch.minimum(torch.arange(width), lengths[:, None] - 1)
    prefix = left_padded([row.ids[: row.subject] for row in flat], device)
    mask = torch.cat(
        [prefix["attention_mask"].cpu(), (torch.arange(width) < lengths[:, None]).long()], dim=1
    )
    target_row, target_place, target_id, target_weight = [], [], [], []
    for index, row in enumerate(flat):
        contexts = len(rows[owner[index]]) - 1
        for place, token in enumerate(row.target):
            target_row.append(index)
            target_place.append(int(lengths[index]) - len(row.target) + place)
            target_id.append(token)
            target_weight.append(1.0 / (len(row.target) * contexts))
    firsts = [index for index in range(len(flat)) if index == 0 or owner[index - 1] != owner[index]]
    lasts = [index - 1 for index in firsts[1:]] + [len(flat) - 1]

    with torch.no_grad():
        cache = _prefix_cache(parts, prefix)
        ids, mask, positions = (value.to(device) for value in (ids, mask, positions))
        sites = {
            "site": (site(parts, layer), "output"),
            "hidden": (parts.blocks[layer], "output"),
        }
        with noticing_tuples(parts.blocks[layer]) as returned, captured(sites) as seen:
            parts.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=_fresh(cache),
                use_cache=True,
                **PLAIN_OUTPUT,
            )
    precise = torch.promote_types(seen["hidden"].dtype, torch.float32)
    at_site = per_token(parts.model, seen["site"], ids.shape, sites["site"][0], "output")[:, 0]
    return _Batch(
        layer=layer,
        owner=torch.tensor(owner, device=device),
        cache=cache,
        suffix=ids,
        mask=mask,
        positions=positions,
        hidden=seen["hidden"],
        as_tuple=returned[0],
        at_site=at_site,
        target_init=at_site[firsts].to(precise),
        kl_rows=torch.tensor(lasts, device=device),
        kl_initial=torch.empty(len(rows), 0, device=device, dtype=precise),
        target_row=torch.tensor(target_row, device=device),
        target_place=torch.tensor(target_place, device=device),
        target_id=torch.tensor(target_id, device=device),
        target_weight=torch.tensor(target_weight, device=device, dtype=precise),
    )


def _prefix_cache(parts: Anatomy, prefix: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Attention keys and values of left-padded prefixes, zero where there is padding."""
    if prefix["input_ids"].shape[1] == 0:
        return []
    made = DynamicCache()  # all tokens at every layer, also where attention has a window
    parts.model.base_model(**prefix, past_key_values=made, use_cache=True, **PLAIN_OUTPUT)
    padding = prefix["attention_mask"][:, None, :, None] == 0
    # a row that is all padding may hold NaN, and 0 * NaN would reach the rest through the mask
    layers: list[Any] = list(made.layers)
    return [
        (layer.keys.masked_fill(padding, 0.0), layer.values.masked_fill(padding, 0.0))
        for layer in layers
    ]


def _fresh(cache: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A new cache object: a forward appends to the one it is given."""
    made = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        made.update(keys, values, layer)
    return made


def _losses(parts: Anatomy, batch: _Batch, delta: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """Total loss of each fact at its row of `delta` (facts x d_out), and the KL distributions."""
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
            past_key_values=_fresh(batch.cache),
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
    return total, current


def _optimise(
    parts: Anatomy, batch: _Batch, method: Method, facts: list[Fact], bar: Bar
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
    for step in range(method.steps):
        with torch.enable_grad():
            total, current = _losses(
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
        keep = [place for place, value in enumerate(values) if value >= method.stop_loss]
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

"""What stays the same while values are optimised, computed once.

The published code recomputes at every step what does not depend on delta: the attention's keys and
values over everything before the subject's last token, and the output of all blocks up to the
edited one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unified_edit.editing.choices import Choice
from unified_edit.editing.keys import column_means
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import (
    PLAIN_OUTPUT,
    captured,
    noticing_tuples,
    of_one_length,
    per_token,
)
from unified_edit.model.prompts import Row


@dataclass(frozen=True)
class Prepared:
    """Everything about some values that does not depend on delta.

    A row is one prompt, cut in two: the prefix ends just before the subject's last token, the
    suffix begins with it, so that delta always enters at the first place of the suffix.
    """

    layer: int
    owner: Tensor  # rows: index of the value the row belongs to
    cache: list[tuple[Tensor, Tensor]]  # attention keys and values of the prefixes, by layer
    suffix: Tensor  # rows x suffix: ids
    mask: Tensor  # rows x (prefix + suffix)
    positions: Tensor  # rows x suffix
    hidden: Tensor  # rows x suffix x d_out: output of block `layer` where delta is zero
    as_tuple: bool  # whether the blocks of this family return tuples
    at_site: Tensor  # rows x d_out: what stands at the site in each row where delta is zero
    target_init: Tensor  # values x d_out
    kl_rows: Tensor  # values: the row of the KL prompt
    kl_initial: Tensor  # values x vocabulary, log-probabilities; empty until first computed
    target_row: Tensor  # target tokens: row ...
    target_place: Tensor  # ... place in the suffix whose logits predict it ...
    target_id: Tensor  # ... its id ...
    target_weight: Tensor  # ... and 1 / (tokens of the target * prompts of the value)
    target_watched: Tensor  # target tokens: whether the prompt has a prefix, or none has

    def only(self, kept: Tensor) -> Prepared:
        """The batch of the values with index in `kept`."""
        new_value = torch.full((len(self.target_init),), -1, device=kept.device)
        new_value[kept] = torch.arange(len(kept), device=kept.device)
        rows = (new_value[self.owner] >= 0).nonzero().squeeze(1)
        new_row = torch.full((len(self.owner),), -1, device=kept.device)
        new_row[rows] = torch.arange(len(rows), device=kept.device)
        tokens = (new_row[self.target_row] >= 0).nonzero().squeeze(1)
        return Prepared(
            layer=self.layer,
            owner=new_value[self.owner[rows]],
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
            target_watched=self.target_watched[tokens],
        )


def prepare(
    parts: Anatomy, rows: list[list[Row]], contexts: int, layer: int, site: Choice
) -> Prepared:
    """Run everything that is constant during the optimisation once.

    rows: for each value the prompts of its facts, `contexts` for each fact and the bare one first,
    and behind them the prompt of the KL term.
    """
    device = parts.model.device
    flat = [row for of_value in rows for row in of_value]
    owner = [index for index, of_value in enumerate(rows) for _ in of_value]
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
        prompts = len(rows[owner[index]]) - 1
        for place, token in enumerate(row.target):
            target_row.append(index)
            target_place.append(int(lengths[index]) - len(row.target) + place)
            target_id.append(token)
            target_weight.append(1.0 / (len(row.target) * prompts))
    lasts = [end - 1 for end in itertools.accumulate(map(len, rows))]
    bare = [
        index
        for last, of_value in zip(lasts, rows, strict=True)
        for index in range(last + 1 - len(of_value), last, contexts)
    ]

    sites = {"site": (site(parts, layer), "output"), "hidden": (parts.blocks[layer], "output")}
    ids, mask, positions = (value.to(device) for value in (ids, mask, positions))
    with torch.no_grad(), noticing_tuples(parts.blocks[layer]) as returned:
        if parts.causal:
            cache = _prefix_cache(parts, prefix)
            with captured(sites) as seen:
                parts.model.base_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=fresh(cache),
                    use_cache=True,
                    **PLAIN_OUTPUT,
                )
            hidden = seen["hidden"]
            at_site = per_token(parts.model, seen["site"], ids.shape, sites["site"][0], "output")
            at_site = at_site[:, 0]
        else:
            cache, hidden, at_site = _run_whole(parts, flat, sites, width)
    precise = torch.promote_types(hidden.dtype, torch.float32)
    columns = [owner[index] for index in bare]
    unprefixed = set(bare) if contexts > 1 else set()
    return Prepared(
        layer=layer,
        owner=torch.tensor(owner, device=device),
        cache=cache,
        suffix=ids,
        mask=mask,
        positions=positions,
        hidden=hidden,
        as_tuple=returned[0],
        at_site=at_site,
        target_init=column_means(at_site[bare].to(precise).T, columns).T,
        kl_rows=torch.tensor(lasts, device=device),
        kl_initial=torch.empty(len(rows), 0, device=device, dtype=precise),
        target_row=torch.tensor(target_row, device=device),
        target_place=torch.tensor(target_place, device=device),
        target_id=torch.tensor(target_id, device=device),
        target_weight=torch.tensor(target_weight, device=device, dtype=precise),
        target_watched=torch.tensor([row not in unprefixed for row in target_row], device=device),
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


def _run_whole(
    parts: Anatomy, rows: list[Row], sites: dict[str, tuple[nn.Module, str]], width: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """What `prepare` needs of rows that cannot be cut in two: cache, hidden states, site.

    Each row is run whole and without padding, and laid out as if it had been cut: prefixes end and
    suffixes (of at most `width` tokens) begin together, with zeros around them.
    """
    before = max(row.subject for row in rows)
    cache: list[tuple[Tensor, Tensor]] = []
    hidden, at_site = torch.empty(0), torch.empty(0)
    for chosen in of_one_length([row.ids for row in rows]):
        inputs = left_padded([rows[index].ids for index in chosen], parts.model.device)
        made = DynamicCache()
        with captured(sites, stop=False) as seen:
            parts.model.base_model(**inputs, past_key_values=made, use_cache=True, **PLAIN_OUTPUT)
        shape = inputs["input_ids"].shape
        at = per_token(parts.model, seen["site"], shape, sites["site"][0], "output")
        layers: list[Any] = list(made.layers)
        if not hidden.numel():
            hidden = seen["hidden"].new_zeros(len(rows), width, seen["hidden"].shape[-1])
            at_site = at.new_zeros(len(rows), at.shape[-1])
            for one in layers if before else []:
                sizes = (len(rows), one.keys.shape[1], before, one.keys.shape[-1])
                others = (*sizes[:3], one.values.shape[-1])
                cache.append((one.keys.new_zeros(sizes), one.values.new_zeros(others)))
        for place, index in enumerate(chosen):
            start = rows[index].subject
            suffix = seen["hidden"][place, start : start + width]
            hidden[index, : len(suffix)], at_site[index] = suffix, at[place, start]
            for (keys, values), one in zip(cache, layers, strict=True) if start else ():
                keys[index, :, before - start :] = one.keys[place, :, :start]
                values[index, :, before - start :] = one.values[place, :, :start]
    return cache, hidden, at_site


def fresh(cache: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A new cache object: a forward appends to the one it is given."""
    made = DynamicCache()
    for layer, (keys, values) in enumerate(cache):
        made.update(keys, values, layer)
    return made

"""What stays the same while values are optimised, computed once.

The published code recomputes at every step what does not depend on delta: the attention's keys and
values over everything before the subject's last token, and the output of all blocks up to the
edited one. It also runs padding, and tokens behind the last one that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.editing.choices import Choice
from unified_edit.editing.kept_prefixes import kept_prefixes, kept_whole
from unified_edit.editing.keys import column_means
from unified_edit.editing.placing import Placing
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.hooks import captured, per_token
from unified_edit.model.packed import (
    BlockCalls,
    Packing,
    PrefixCache,
    block_calls,
    gives_tuples,
    run_blocks,
)
from unified_edit.model.prompts import Row


@dataclass(frozen=True)
class Layout:
    """Where in the list of a batch's tokens what stands, on the model's device, and how it is run.

    cache: what attention keeps of the prefixes.
    calls: how the model calls its blocks on these rows, behind that.
    first: (rows) the subject's last token, with which each suffix begins: delta enters here.
    owner: (rows) the value of each.
    read: (targets + values) where the model's prediction is needed: of each token of a target, then
        at the subject of each KL prompt.
    target_id, target_row, target_watched: (targets) as in `Placing`.
    slots, weights: (values x most targets) the targets of each value, and what each counts; where
        there are fewer, its first one again with a weight of zero.
    """

    cache: PrefixCache
    packing: Packing
    calls: BlockCalls
    first: Tensor
    owner: Tensor
    read: Tensor
    target_id: Tensor
    target_row: Tensor
    target_watched: Tensor
    slots: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Prepared:
    """Everything about some values that does not depend on delta.

    A row is one prompt, cut in two: the prefix ends just before the subject's last token, the
    suffix begins with it. The tokens of all suffixes are one list, without padding.
    """

    layer: int
    placing: Placing
    layout: Layout
    hidden: Tensor  # tokens x d_out: output of block `layer` where delta is zero
    as_tuple: bool  # whether the blocks of this family return tuples
    at_site: Tensor  # rows x d_out: what stands at the site in each row where delta is zero
    target_init: Tensor  # values x d_out
    kl_initial: Tensor  # values x vocabulary, log-probabilities; empty until first computed

    def only(self, parts: Anatomy, kept: Sequence[int]) -> Prepared:
        """The batch of the values with index in `kept` (ascending)."""
        placing, rows, tokens = self.placing.only(kept)
        values = torch.tensor(kept)

        def of(whole: Tensor, index: Tensor) -> Tensor:
            return whole.index_select(0, index.to(whole.device, non_blocking=True))

        return replace(
            self,
            placing=placing,
            layout=_layout(parts, placing, self.layout.cache.only(rows), self.as_tuple, self.layer),
            hidden=of(self.hidden, tokens),
            at_site=of(self.at_site, rows),
            target_init=of(self.target_init, values),
            kl_initial=of(self.kl_initial, values),
        )


def prepare(
    parts: Anatomy, rows: list[list[Row]], contexts: int, layer: int, site: Choice
) -> Prepared:
    """Run everything that is constant during the optimisation once.

    rows: for each value the prompts of its facts, `contexts` for each fact and the bare one first,
    and behind them the prompt of the KL term.
    """
    placing = Placing.of(rows, contexts)
    flat = [row for of_value in rows for row in of_value]
    sites = {"site": (site(parts, layer), "output"), "hidden": (parts.blocks[layer], "output")}
    with torch.no_grad():
        as_tuple = gives_tuples(parts)
        if parts.causal:
            cache = kept_prefixes(parts, rows, contexts, as_tuple)
            layout = _layout(parts, placing, cache, as_tuple, layer)
            packing, below = layout.packing, range(layer + 1)
            entering = packing.packed(layout.calls.first)
            with captured(sites) as seen:
                run_blocks(parts, below, layout.calls, packing, entering)
            hidden = seen["hidden"][0]
            shape = (1, len(hidden))
            at_site = per_token(parts.model, seen["site"], shape, sites["site"][0], "output")
            at_site = at_site[0].index_select(0, layout.first.to(at_site.device))
        else:
            cache, whole, at_site = kept_whole(parts, flat, sites, placing.width)
            layout = _layout(parts, placing, cache, as_tuple, layer)
            hidden = layout.packing.packed(whole)[0]
    layout.cache.forget(range(layer + 1))  # those blocks are not run again
    precise = torch.promote_types(hidden.dtype, torch.float32)
    bare = placing.bare.to(at_site.device)
    columns = placing.owner[placing.bare].tolist()
    return Prepared(
        layer=layer,
        placing=placing,
        layout=layout,
        hidden=hidden,
        as_tuple=as_tuple,
        at_site=at_site,
        target_init=column_means(at_site[bare].to(precise).T, columns).T,
        kl_initial=torch.empty(len(rows), 0, device=hidden.device, dtype=precise),
    )


def _layout(
    parts: Anatomy, placing: Placing, cache: PrefixCache, as_tuple: bool, layer: int
) -> Layout:
    """Everything about where tokens stand, sent to the device of the edited block."""
    device = parts.weight(layer).parameter.device

    def sent(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    slots, weights = placing.slots
    return Layout(
        cache=cache,
        packing=Packing(len(placing.owner), placing.width, sent(placing.places)),
        calls=block_calls(parts, placing.suffix, placing.mask, placing.positions, cache, as_tuple),
        first=sent(placing.first),
        owner=sent(placing.owner),
        read=sent(placing.read),
        target_id=sent(placing.target_id),
        target_row=sent(placing.target_row),
        target_watched=sent(placing.target_watched),
        slots=sent(slots),
        weights=sent(weights.to(torch.promote_types(parts.embeddings.dtype, torch.float32))),
    )

"""The attention's keys and values over everything that stands before the subjects of some rows.

The prompts of a batch begin alike: each stands behind the same few sampled prefixes. What all rows
of one of these begin with is run once, then what is left of each behind it, without any padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, of_one_length, per_token
from unified_edit.model.packed import Packing, PrefixCache, block_calls, run_blocks
from unified_edit.model.prompts import Row

Ids = tuple[int, ...]


def kept_prefixes(
    parts: Anatomy, rows: Sequence[Sequence[Row]], contexts: int, as_tuple: bool
) -> PrefixCache:
    """Keys and values of what stands before the subject in each row of some values, in order.

    Prefixes end together; where there is none in front of that, zero. rows: for each value those of
    its facts, `contexts` for each, and that of the KL term behind them.
    """
    of_context: dict[int, list[Ids]] = {}
    flat: list[Ids] = []
    for of_value in rows:
        for place, row in enumerate(of_value):
            context = -1 if place == len(of_value) - 1 else place % contexts
            flat.append(row.ids[: row.subject])
            of_context.setdefault(context, []).append(flat[-1])
    shared: dict[Ids, Ids] = {}  # each prefix that occurs, and what it shares with others
    for prefixes in of_context.values():
        # a prefix that stands behind two contexts, or in none, belongs to the first
        new = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in shared]
        shared |= dict.fromkeys(new, _common(new))
    different, begins = list(shared), list(dict.fromkeys(shared.values()))
    nothing = PrefixCache([])
    first = _run(parts, begins, [0] * len(begins), nothing, as_tuple)
    before = first.only(torch.tensor([begins.index(shared[prefix]) for prefix in different]))
    lengths = [len(shared[prefix]) for prefix in different]
    rests = [prefix[length:] for prefix, length in zip(different, lengths, strict=True)]
    second = _run(parts, rests, lengths, before, as_tuple)
    number = {prefix: index for index, prefix in enumerate(different)}
    return second.only(torch.tensor([number[prefix] for prefix in flat]))


def _common(prefixes: Sequence[Ids]) -> Ids:
    """What all of several prefixes begin with; nothing of one alone, which shares it with none."""
    if len(prefixes) < 2:
        return ()
    first, last = min(prefixes), max(prefixes)  # whatever these two share, those between do too
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((place for place, (one, other) in pairs if one != other), len(first))]


def _run(
    parts: Anatomy, rests: Sequence[Ids], starts: Sequence[int], cache: PrefixCache, as_tuple: bool
) -> PrefixCache:
    """What is kept of rows in all, when `rests` are run behind the tokens in `cache`.

    starts: how many of these each row has; they stand at the end.
    """
    lengths, begins = torch.tensor([len(rest) for rest in rests]), torch.tensor(starts)
    width, before = int(lengths.max()), cache.get_seq_length()
    if width == 0:
        return cache
    columns = torch.arange(width)
    there = columns < lengths[:, None]
    mask = torch.cat([torch.arange(before) >= before - begins[:, None], there], dim=1)
    ids = torch.tensor([[*rest, *[0] * (width - len(rest))] for rest in rests])
    positions = begins[:, None] + torch.minimum(columns, (lengths[:, None] - 1).clamp(min=0))
    noting = cache.noted()
    calls = block_calls(parts, ids, mask.long(), positions, noting, as_tuple)
    places = there.flatten().nonzero().squeeze(1).to(parts.model.device, non_blocking=True)
    packing = Packing(len(rests), width, places)
    read = places[:0]  # of the last block nothing is needed but what its attention keeps
    entering = packing.packed(calls.first)
    run_blocks(parts, range(parts.n_layers), calls, packing, entering, read)
    # what stands in the row, the new behind the old, moved to the end of the longest
    longest = int((begins + lengths).max())
    shift = torch.arange(longest) - longest + (before + lengths)[:, None]
    padding = shift < (before - begins)[:, None]
    return noting.joined(shift.clamp(min=0), padding)


def kept_whole(
    parts: Anatomy, rows: Sequence[Row], sites: dict[str, tuple[nn.Module, str]], width: int
) -> tuple[PrefixCache, Tensor, Tensor]:
    """The same of rows that cannot be cut in two, with hidden states and the site of suffixes.

    Each row is run whole and without padding, and laid out as if it had been cut: prefixes end and
    suffixes (of at most `width` tokens) begin together, with zeros around them.
    """
    before = max(row.subject for row in rows)
    cache: list[tuple[Tensor, Tensor]] = []
    hidden, at_site = torch.empty(0), torch.empty(0)
    for chosen in of_one_length([row.ids for row in rows]):
        inputs = left_padded([rows[index].ids for index in chosen], parts.model.device)
        made = DynamicCache()  # all tokens at every layer, also where attention has a window
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
    return PrefixCache(cache), hidden, at_site

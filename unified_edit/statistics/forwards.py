"""Groups of texts through the model: batches of one length, and which of their keys go where.

What becomes of a token does not depend on how large batches are: texts of a group are taken from
the longest to the shortest, and go to the two halves of the sums in turn, so that these are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.batching import batches_by_length, forward_tokens, left_padded
from unified_edit.model.devices import free_bytes, halving
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token
from unified_edit.statistics.sums import Sums

Weigh = Callable[[Anatomy, NamedWeight, Tensor], Tensor]


def batch_size(parts: Anatomy, weights: Sequence[NamedWeight]) -> int:
    """Tokens of one forward where that is fewest seconds, and its tensors have room on a GPU."""
    device = parts.model.device
    tokens = forward_tokens(device)
    if device.type == "cuda":
        # at most: what the MLP makes of a block, three or four tensors, and the keys of all layers
        width = max(one.d_in for one in weights) * 4 + sum(one.d_in for one in weights)
        free = free_bytes(device)
        while tokens > 512 and 4 * tokens * width * parts.model.dtype.itemsize > free:
            tokens //= 2
    return tokens


def places(
    lengths: Sequence[int], first: int, skip_start: bool, aside: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of counted tokens in a left-padded batch, row by row: aside, and for each half.

    lengths: of its rows, of which the first has number `first`. aside: so many are set aside.
    """
    width = max(lengths)
    begin = width - torch.tensor(lengths)[:, None] + int(skip_start)
    counted = (torch.arange(width) >= begin).flatten().nonzero()[:, 0]
    half = (counted // width + first) % 2
    fresh, counted, half = counted[:aside], counted[aside:], half[aside:]
    return fresh, counted[half == 0], counted[half == 1]


def add_group(
    parts: Anatomy,
    weights: Sequence[NamedWeight],
    rows: Sequence[list[int]],
    sums: Sums,
    *,
    number: int,
    batch_tokens: int,
    skip_start: bool,
    weigh: Weigh,
) -> None:
    """Add the keys of the group with this number to the sums; those set aside are of the first."""
    most = sums.aside if number == 0 else 0
    batches = batches_by_length([len(row) for row in rows], batch_tokens)
    ordered: list[list[int]] = []
    spans: list[range] = []
    for batch in batches:
        spans.append(range(len(ordered), len(ordered) + len(batch)))
        ordered += [rows[index] for index in batch]

    def run(part: Sequence[int]) -> dict[int, list[Tensor]]:
        some = [ordered[place] for place in part]
        aside = max(most - sums.fresh, 0)
        chosen = places([len(row) for row in some], number + part[0], skip_start, aside)
        return _keys(parts, weights, some, chosen, weigh)

    with torch.no_grad():
        for _, keys in halving(run, spans):
            sums.add(keys)
    sums.settle()


def _keys(
    parts: Anatomy,
    weights: Sequence[NamedWeight],
    rows: list[list[int]],
    chosen: Sequence[Tensor],
    weigh: Weigh,
) -> dict[int, list[Tensor]]:
    """Keys at the chosen places, for each layer; the forward ends at the deepest of them."""
    model = parts.model
    inputs = left_padded(rows, model.device)
    shape = inputs["input_ids"].shape
    with captured({one.layer: (one.module, "input") for one in weights}) as seen:
        model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
    keys = {}
    for one in weights:
        found = per_token(model, seen.pop(one.layer, None), shape, one.module, "input")
        taken = [found.flatten(0, 1)[some.to(found.device)] for some in chosen]
        keys[one.layer] = [weigh(parts, one, some) if len(some) else some for some in taken]
    return keys

"""Final hidden states of many rows of tokens, what begins alike run once.

In a causal model what stands at a token depends on nothing behind it. So a row with which another
one begins is read off that one (`hosts`), and of rows that share a beginning of some length that
beginning is run by itself, once, and the rest of each row behind its attention keys and values
(`shared`). Rows are batched by length, as many as the machine has room for, fewer where memory
turns out to be short. None of this changes a result by more than rounding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import left_padded, right_padded
from unified_edit.model.devices import halving, tokens_that_fit
from unified_edit.model.hooks import PLAIN_OUTPUT, one_kernel

Ids = tuple[int, ...]

#: What a forward costs by itself, in tokens: every weight is read, every kernel is started.
CPU_FORWARD, GPU_FORWARD = 20, 1024
#: A beginning is run by itself where that saves so many tokens.
LEAST_SAVED = 8
#: And all of them together only if that saves such a share of all tokens: what was computed at a
#: beginning is copied for each row behind it.
SHARE_SAVED = 0.2
#: How often rows may branch off one another before the rest of them is run as it is.
_DEEPEST = 100


class Segment(NamedTuple):
    """One row of a `Piece`: the tokens begin..end that all these rows have, from a column on."""

    rows: tuple[Ids, ...]
    begin: int
    end: int
    column: int


class Piece(NamedTuple):
    """Final hidden states (segments x width x d_out), and what stands where in them."""

    hidden: Tensor
    segments: tuple[Segment, ...]


class Shared(NamedTuple):
    """Rows that all begin with `stem`, and of which none is all of it; without one, one row."""

    stem: Ids
    rows: tuple[Ids, ...]


def hosts(rows: Iterable[Ids]) -> dict[Ids, Ids]:
    """For each row the one it is read off: a longest one that begins with it, or itself."""
    found: dict[Ids, Ids] = {}
    above: Ids = ()
    # in this order the rows that begin with a row stand right behind it
    for row in sorted(set(rows), reverse=True):
        found[row] = found.get(above, row) if above[: len(row)] == row else row
        above = row
    return found


def shared(rows: Iterable[Ids], worth: int = LEAST_SAVED) -> list[Shared]:
    """Different rows, none of which begins with another one, by the beginnings that they share.

    Of all ways to give each row one beginning, or none, that which leaves the fewest tokens to be
    run; all rows are by themselves where less than `worth` tokens are saved.
    """
    ordered = sorted(rows)
    saved, found = _divided(ordered) if ordered else (0, [])
    return found if saved >= worth else [Shared((), (row,)) for row in ordered]


def _divided(rows: Sequence[Ids], depth: int = 0) -> tuple[int, list[Shared]]:
    """Tokens saved, and how; the rows are sorted, so that what first and last share, all share."""
    alone = [Shared((), (row,)) for row in rows]
    if len(rows) == 1 or depth == _DEEPEST:
        return 0, alone
    pairs = zip(rows[0], rows[-1], strict=False)
    common = next(place for place, (one, other) in enumerate(pairs) if one != other)
    below = 0
    found: list[Shared] = []
    for _, some in groupby(rows, key=itemgetter(common)):
        saved, groups = _divided(list(some), depth + 1)
        below, found = below + saved, found + groups
    own = (len(rows) - 1) * common
    if own >= max(below, LEAST_SAVED):
        return own, [Shared(rows[0][:common], tuple(rows))]
    return below, found


def even_batches(lengths: Sequence[int], tokens: int, forward: int) -> Iterator[list[int]]:
    """Yield lists of indices of similar length, each of at most `tokens` padded tokens.

    The cheapest way to cut them, where a batch costs its padded tokens and `forward` besides: the
    shortest path through the rows, the longest first, by ends of batches at which they are full or
    lengths change.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = len(order)
    changes = [n for n in range(1, count) if lengths[order[n]] != lengths[order[n - 1]]]
    cheapest, ahead = {0: (0, 0)}, [0]  # end of a batch: cost up to there, and where it begins
    while (begin := heappop(ahead) if ahead else count) < count:
        longest = max(1, lengths[order[begin]])
        full = min(count, begin + max(1, tokens // longest))
        within = changes[bisect_right(changes, begin) : bisect_left(changes, full)]
        for end in (*within, full):
            cost = cheapest[begin][0] + longest * (end - begin) + forward
            if end not in cheapest:
                heappush(ahead, end)
            if end not in cheapest or cost < cheapest[end][0]:
                cheapest[end] = cost, begin
    cuts = [count]
    while cuts[-1] > 0:
        cuts.append(cheapest[cuts[-1]][1])
    yield from (order[begin:end] for begin, end in pairwise(cuts[::-1]))


@torch.no_grad()
def final_states(parts: Anatomy, rows: Sequence[Ids], tokens: int | None = None) -> Iterator[Piece]:
    """Final hidden states at all tokens of different rows, none of which begins with another one.

    tokens: of one forward, with padding; by default what the machine has room for.

    Raises ModelError where there is no memory for a single row.
    """
    if not rows:
        return
    at_once = tokens or tokens_that_fit(parts.model, longest=max(map(len, rows)))
    forward = CPU_FORWARD if parts.model.device.type == "cpu" else GPU_FORWARD
    total = sum(map(len, rows))
    worth = max(4 * forward, int(SHARE_SAVED * total))
    groups = shared(rows, total if hooked(parts.blocks) else worth)  # a hook may want whole texts
    whole = [one.rows[0] for one in groups if not one.stem]

    def run(part: Sequence[int]) -> Tensor:
        inputs = left_padded([whole[index] for index in part], parts.model.device)
        return _body(parts, inputs)

    for part, hidden in halving(run, even_batches([*map(len, whole)], at_once, forward)):
        yield Piece(hidden, _left(hidden, [Shared(whole[i], (whole[i],)) for i in part]))
        del hidden
    yield from _behind_stems(parts, [one for one in groups if one.stem], at_once, forward)


def hooked(modules: nn.Module) -> bool:
    """Whether hooks are registered anywhere in these modules.

    Those that transformers leaves behind once outputs of layers were asked for only look on.
    """
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for one in modules.modules()
        for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
    )


def _left(hidden: Tensor, groups: Sequence[Shared]) -> tuple[Segment, ...]:
    """What stands where in left-padded stems."""
    width = hidden.shape[1]
    return tuple(Segment(one.rows, 0, len(one.stem), width - len(one.stem)) for one in groups)


def _behind_stems(
    parts: Anatomy, groups: Sequence[Shared], at_once: int, forward: int
) -> Iterator[Piece]:
    """Run stems, and behind their keys and values the rest of each row."""
    if not groups:
        return
    device = parts.model.device
    # attention of all layers is kept for these, so that fewer may fit
    kept = tokens_that_fit(parts.model, cached=True, most=2**30)

    def run_stems(part: Sequence[int]) -> tuple[Tensor, Tensor, DynamicCache]:
        inputs = left_padded([groups[index].stem for index in part], device)
        made = DynamicCache()  # all tokens at every layer, also where attention has a window
        hidden = _body(parts, inputs, made)
        return hidden, inputs["attention_mask"], made

    lengths = [len(one.stem) for one in groups]
    for part, (hidden, mask, cache) in halving(
        run_stems, even_batches(lengths, min(at_once, kept), forward)
    ):
        here = [groups[index] for index in part]
        yield Piece(hidden, _left(hidden, here))
        del hidden
        rows = [(place, len(one.stem), row) for place, one in enumerate(here) for row in one.rows]

        def run_rests(
            chosen: Sequence[int],
            rows: Sequence[tuple[int, int, Ids]] = rows,
            mask: Tensor = mask,
            cache: DynamicCache = cache,
        ) -> Tensor:
            some = [rows[index] for index in chosen]
            at = torch.tensor([place for place, *_ in some], device=device)
            inputs = right_padded([(row, start) for _, start, row in some], device)
            before = mask[at]
            inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], dim=1)
            return _body(parts, inputs, _of_rows(cache, at, before))

        # as long as what is computed, or as what is kept for it where that is scarcer
        share = at_once / kept
        costs = [max(len(row) - n, int(share * len(row))) for _, n, row in rows]
        for chosen, behind in halving(run_rests, even_batches(costs, at_once, forward)):
            some = [rows[index] for index in chosen]
            yield Piece(behind, tuple(Segment((row,), n, len(row), 0) for _, n, row in some))
            del behind


def _body(parts: Anatomy, inputs: dict[str, Tensor], cache: DynamicCache | None = None) -> Tensor:
    """Final hidden states (rows x longest x d_out) of a padded batch."""
    with one_kernel(parts.blocks):
        return parts.model.base_model(
            **inputs, past_key_values=cache, use_cache=cache is not None, **PLAIN_OUTPUT
        ).last_hidden_state


def _of_rows(cache: DynamicCache, rows: Tensor, mask: Tensor) -> DynamicCache:
    """A cache of its own for each of the rows, zero where there is padding.

    What stands at padding may be NaN, and 0 * NaN would reach the rest through the mask.
    """
    made, padding = DynamicCache(), mask[:, None, :, None] == 0
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        at, empty = rows.to(layer.keys.device), padding.to(layer.keys.device)
        keys, values = layer.keys.index_select(0, at), layer.values.index_select(0, at)
        made.update(keys.masked_fill_(empty, 0.0), values.masked_fill_(empty, 0.0), number)
    return made

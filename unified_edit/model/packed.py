"""Blocks run on one list of tokens: rows of different lengths without the padding between them.

Whatever a block does, it does to each token by itself, but for attention. So blocks are given the
tokens of all rows as one row, (1 x tokens x width), and lay them out as padded rows only inside of
attention, between its projections. Nothing here knows a family: how the model's own body calls its
blocks (masks, positions, rotary tables) is written down once and said again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from unified_edit.model.anatomy import Anatomy
from unified_edit.model.hooks import (
    PLAIN_OUTPUT,
    captured,
    hidden_of,
    noticing_tuples,
    one_kernel,
    own_forward,
    stubbed,
)


class _Taken(torch.autograd.Function):
    """rows[places], for places that differ: each gradient goes where its row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _laid_out(gradient, places, ctx.count), None


class _Spread(torch.autograd.Function):
    """`count` rows, zero but at the places: what `_Taken` takes, put back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return _laid_out(rows, places, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def _laid_out(rows: Tensor, places: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)


def taken(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places] (places x ...), differentiable; no two of the places may be the same."""
    found: Tensor = _Taken.apply(rows, places.to(rows.device))
    return found


def spread(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """`count` rows that are zero except for `rows` at the `places`, which must all differ."""
    found: Tensor = _Spread.apply(rows, places.to(rows.device), count)
    return found


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a list stand in `rows` padded rows of `width` places.

    places: (tokens,) row * width + column of each token.
    """

    rows: int
    width: int
    places: Tensor

    def padded(self, packed: Tensor) -> Tensor:
        """(1 x tokens x n) laid out as (rows x width x n), zero where there is no token."""
        whole = spread(packed.flatten(0, -2), self.places, self.rows * self.width)
        return whole.unflatten(0, (self.rows, self.width))

    def packed(self, padded: Tensor) -> Tensor:
        """(rows x width x n) as a list of tokens (1 x tokens x n)."""
        return taken(padded.flatten(0, -2), self.places)[None]


class PrefixCache(DynamicCache):
    """Attention keys and values in front of what is run: a forward reads them and leaves none.

    layers: of each block keys and values (rows x heads x prefix x width); none where there is no
    prefix at all.
    new: with `noting`, keys and values of what was run behind them, by block.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], noting: bool = False) -> None:
        super().__init__()
        self.noting, self.new = noting, dict[int, tuple[Tensor, Tensor]]()
        for number, (keys, values) in enumerate(layers):
            # an empty update makes the layer; what stands in it then is not copied
            super().update(keys[:0], values[:0], number)
            made: Any = self.layers[number]
            made.keys, made.values = keys, values

    def only(self, rows: Tensor) -> PrefixCache:
        """The cache of some rows, in their order."""
        each: list[Any] = list(self.layers)
        return PrefixCache([(_at(one.keys, rows), _at(one.values, rows)) for one in each])

    def noted(self) -> PrefixCache:
        """The same cache, which writes down what is run behind it."""
        each: list[Any] = list(self.layers)
        return PrefixCache([(one.keys, one.values) for one in each], noting=True)

    def joined(self, places: Tensor, padding: Tensor) -> PrefixCache:
        """A cache of what was here and what was noted behind it.

        places: (rows x length) which of both together stands at each place of the new one.
        padding: (rows x length) where nothing stands, and zero is kept: what is there may be NaN,
            and 0 * NaN would reach the rest through the mask.
        """
        each: list[Any] = list(self.layers)
        made = []
        for number in range(len(self.new)):
            both = []
            for name, new in zip(("keys", "values"), self.new[number], strict=True):
                whole = torch.cat([getattr(each[number], name), new], dim=2) if each else new
                at = places.to(new.device, non_blocking=True)[:, None, :, None]
                found = whole.gather(2, at.expand(-1, whole.shape[1], -1, whole.shape[3]))
                nothing = padding.to(new.device, non_blocking=True)[:, None, :, None]
                both.append(found.masked_fill(nothing, 0.0))
            made.append((both[0], both[1]))
        return PrefixCache(made)

    def forget(self, layers: range) -> None:
        """Let go of what some blocks kept, but for its length, from which masks are made."""
        each: list[Any] = list(self.layers)
        for one in each[layers.start : layers.stop]:
            rows, _, length, _ = one.keys.shape
            # a cache counts as empty without a number in it
            one.keys = one.values = one.keys.new_zeros(rows, 1, length, 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefixes with the new ones behind them."""
        if self.noting:
            self.new[layer_idx] = key_states, value_states
        if layer_idx >= len(self.layers):
            return key_states, value_states
        before: Any = self.layers[layer_idx]
        return (
            torch.cat([before.keys, key_states], dim=-2),
            torch.cat([before.values, value_states], dim=-2),
        )


def _at(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.index_select(0, rows.to(whole.device, non_blocking=True))


@torch.no_grad()
def gives_tuples(parts: Anatomy) -> bool:
    """Whether the blocks of this family return tuples; one token is run through the first."""
    first = parts.blocks[0]
    token = torch.zeros(1, 1, dtype=torch.long, device=parts.model.device)
    with noticing_tuples(first) as returned, captured({"": (first, "output")}):
        given = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        parts.model.base_model(**given, use_cache=False, **PLAIN_OUTPUT)
    return returned[0]


@dataclass(frozen=True)
class BlockCalls:
    """How a model's body calls its blocks.

    first: the hidden states that enter the first of them (rows x width x d).
    behind: for each block its arguments behind the hidden states.
    """

    first: Tensor
    behind: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


@torch.no_grad()
def block_calls(
    parts: Anatomy, ids: Tensor, mask: Tensor, positions: Tensor, cache: PrefixCache, as_tuple: bool
) -> BlockCalls:
    """How the body calls its blocks for rows of tokens behind a cache; no block is run.

    ids, positions: (rows x width), and mask: (rows x (prefix + width)), on any device.
    as_tuple: whether the blocks of this family return tuples.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {
        name: value.to(parts.model.device, non_blocking=True) for name, value in inputs.items()
    }
    entering: list[Tensor] = []
    behind: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        entering.append(hidden)
        behind.append((args, kwargs))
        return (hidden,) if as_tuple else hidden

    with ExitStack() as stack:
        for block in parts.blocks:
            stack.enter_context(own_forward(block, note))
        parts.model.base_model(**inputs, past_key_values=cache, use_cache=True, **PLAIN_OUTPUT)
    return BlockCalls(entering[0], behind)


def _split(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, which come first or by name, and all other arguments."""
    others = dict(kwargs)
    if args:
        return args[0], args[1:], others
    return others.pop("hidden_states"), (), others


def run_blocks(
    parts: Anatomy, layers: range, calls: BlockCalls, packing: Packing, hidden: Tensor,
    read: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the last of the `layers` gives for a list of tokens: (1 x tokens x d_out).

    hidden: what enters the first of them. With `read` (places in the list), only what stands there
    in the output is of use: the last MLP is not run at other tokens.
    """
    with ExitStack() as stack:
        for layer in layers:
            _unpad(stack, parts, layer, packing)
        if read is not None and layers:
            mlp = parts.mlp(layers[-1])
            stack.enter_context(own_forward(mlp, partial(_where_read, mlp.forward, read)))
        for layer in layers:
            args, kwargs = calls.behind[layer]
            hidden = hidden_of(parts.blocks[layer](hidden, *args, **kwargs))
    return hidden


def _where_read(usual: Callable[..., Tensor], read: Tensor, hidden: Tensor) -> Tensor:
    """An MLP at some tokens of a list, zero at all others."""
    tokens = hidden.flatten(0, -2)
    found = spread(usual(taken(tokens, read)), read, len(tokens))
    return found.unflatten(0, hidden.shape[:-1])


def _unpad(stack: ExitStack, parts: Anatomy, layer: int, packing: Packing) -> None:
    """Until `stack` is closed, block `layer` takes lists of tokens."""
    attention = parts.attention(layer)
    inside = _Inside(attention.forward, packing)
    stack.enter_context(own_forward(attention, inside.attention))
    for module in attention.modules():
        if isinstance(module, nn.Linear | Conv1D):
            usual = partial(inside.projection, module.forward)
            stack.enter_context(own_forward(module, usual))
    stack.enter_context(one_kernel(parts.blocks[layer]))


class _Inside:
    """One attention module that is given a list of tokens."""

    def __init__(self, usual: Callable[..., Any], packing: Packing) -> None:
        self.usual, self.packing = usual, packing
        self.stand_in: Tensor | None = None
        self.hidden: Tensor | None = None

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        # Projections take the list; nothing else may look at what enters, and would find NaN.
        shape = (self.packing.rows, self.packing.width, hidden.shape[-1])
        self.stand_in, self.hidden = hidden.new_full((), torch.nan).expand(shape), hidden
        output = self.usual(self.stand_in, *args, **kwargs)
        self.stand_in = self.hidden = None
        packed = self.packing.packed(hidden_of(output))
        return (packed, *output[1:]) if isinstance(output, tuple) else packed

    def projection(self, usual: Callable[..., Tensor], entering: Tensor) -> Tensor:
        is_input = entering is self.stand_in
        packed = self.hidden if is_input else self.packing.packed(entering)
        return self.packing.padded(usual(packed))


def logits_behind(parts: Anatomy, hidden: Tensor, as_tuple: bool) -> Tensor:
    """Logits (tokens x vocabulary) from what the last block gives at some tokens (tokens x d_out).

    The model's own forward runs around blocks that only hand that out: its last norm, its head and
    whatever it does to logits.
    """
    width = parts.embeddings.shape[1]
    nothing = hidden.new_zeros(()).expand(len(hidden), 1, width)
    # with a cache, though an empty one, no mask looks into positions, which waits for the device
    given = {"inputs_embeds": nothing, "past_key_values": PrefixCache([]), "use_cache": True}
    config = parts.model.config
    asked, config.return_dict = config.return_dict, True  # the body inside is not told otherwise
    try:
        with stubbed(list(parts.blocks), hidden[:, None], as_tuple):
            logits: Tensor = parts.model(**given, **PLAIN_OUTPUT).logits
    finally:
        config.return_dict = asked
    return logits[:, 0]

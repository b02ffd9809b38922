"""Running a model on prompts that begin alike: what their subjects and answers are inside of it.

The few-shot examples are the same for all subjects, so they are run once and their attention keys
and values are kept; of each prompt only what is its own is run. s is the output of a block at the
subject's last token, o the output of the last block at the prompt's last token, in front of the
final norm: both as in the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unified_edit.errors import RelationError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, noticing_tuples, quiet, stubbed
from unified_edit.model.packed import PrefixCache, gives_tuples, logits_behind
from unified_edit.model.prompts import Row
from unified_edit.relations.prompts import Asked

#: Positions of the vocabulary's logits made at a time, and rows run together.
AT_ONCE = 256

Cache = list[tuple[Tensor, Tensor]]


def run_prefix(parts: Anatomy, ids: Sequence[int]) -> Cache:
    """Attention keys and values of some tokens, by block; [] for none."""
    if not ids:
        return []
    tokens = torch.tensor([ids], device=parts.model.device)
    made = DynamicCache()  # all tokens at every layer, also where attention has a window
    parts.model.base_model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.arange(len(ids), device=tokens.device)[None],
        past_key_values=made,
        use_cache=True,
        **PLAIN_OUTPUT,
    )
    layers: list[Any] = list(made.layers)
    return [(layer.keys, layer.values) for layer in layers]


@dataclass(frozen=True)
class Batch:
    """Prompts that begin with the same tokens, whose keys and values are in `cache`.

    ids, mask, positions: what is run of each (rows x longest; padded at the right).
    subject, last: places of the subject's last token and of the prompt's (rows).
    """

    cache: Cache
    ids: Tensor
    mask: Tensor
    positions: Tensor
    subject: Tensor
    last: Tensor

    def run(self, parts: Anatomy) -> None:
        """One forward of the model's body over all rows."""
        rows = len(self.ids)
        cache = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.cache]
        parts.model.base_model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=PrefixCache(cache),
            use_cache=True,
            **PLAIN_OUTPUT,
        )

    @property
    def each(self) -> Tensor:
        """0, 1, ... for the rows."""
        return torch.arange(len(self.ids), device=self.ids.device)


def batch_of(parts: Anatomy, rows: Sequence[Row], shared: int, cache: Cache) -> Batch:
    """The rows from token `shared` on; `cache` is that of the tokens before."""
    device = parts.model.device
    lengths = torch.tensor([len(row.ids) - shared for row in rows])
    width = int(lengths.max())
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids) - shared] = torch.tensor(row.ids[shared:])
    steps = torch.arange(width)
    own = (steps < lengths[:, None]).long()
    mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.long), own], dim=1)
    # padding repeats the last position, so that none beyond the model's limit is asked for
    positions = shared + torch.minimum(steps, lengths[:, None] - 1)
    subject = torch.tensor([row.subject - shared for row in rows])
    ids, mask, positions, subject, last = (
        value.to(device) for value in (ids, mask, positions, subject, lengths - 1)
    )
    return Batch(cache, ids, mask, positions, subject, last)


def batches(parts: Anatomy, rows: Sequence[Asked]) -> Iterator[tuple[list[int], Batch]]:
    """Indices of rows, and the batch that they are; what several begin with is run once."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault(row.ids[: row.own], []).append(index)
    for head, indices in alike.items():
        cache = run_prefix(parts, head)
        lengths = [len(rows[index].ids) - len(head) for index in indices]
        for places in batches_by_length(lengths, max(AT_ONCE * 8, max(lengths))):
            chosen = [indices[place] for place in places]
            yield chosen, batch_of(parts, [rows[index] for index in chosen], len(head), cache)


@dataclass(frozen=True)
class States:
    """What stands in the model at some subjects.

    s: {layer: (subjects x d)}. o: (subjects x d). answers: the model's most probable next token
    for each, by its own head. All in the model's type and on its device.
    """

    s: dict[int, Tensor]
    o: Tensor
    answers: Tensor


@torch.no_grad()
def read_states(parts: Anatomy, rows: Sequence[Asked], layers: Sequence[int]) -> States:
    """s at some layers, o and the answer of each row; RelationError where they are not finite."""
    s: dict[int, Tensor] = {}
    o = torch.empty(0)
    deepest = parts.n_layers - 1
    sites = {layer: (parts.blocks[layer], "output") for layer in {*layers, deepest}}
    with quiet(parts.model):
        for chosen, batch in batches(parts, rows):
            with captured(sites) as seen:
                batch.run(parts)
            if not o.numel():
                empty = seen[deepest].new_zeros(len(rows), seen[deepest].shape[-1])
                o, s = empty, {layer: empty.clone() for layer in layers}
            o[chosen] = seen[deepest][batch.each, batch.last]
            for layer in layers:
                s[layer][chosen] = seen[layer][batch.each, batch.subject]
        answers = decode(parts, o)
    if not bool(torch.isfinite(o).all()):
        raise RelationError(
            "the model's states are not finite: its weights are damaged or overflow "
            f"{o.dtype}; load it again, or in a wider type"
        )
    return States(s, o, answers)


def _logits(parts: Anatomy, o: Tensor) -> Iterator[Tensor]:
    """Logits of the next token from outputs of the last block (rows x d), some rows at a time."""
    with torch.no_grad(), quiet(parts.model):
        as_tuple = gives_tuples(parts)
        for some in o.split(AT_ONCE):
            if len(some):
                yield logits_behind(parts, some.to(parts.model.dtype), as_tuple)


def log_probabilities_of(parts: Anatomy, o: Tensor) -> Tensor:
    """Log-probabilities (rows x vocabulary) of the next token from outputs of the last block.

    They pass the model's own final norm and head. o: (rows x d).
    """
    logits = torch.cat(list(_logits(parts, o)))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def decode(parts: Anatomy, o: Tensor) -> Tensor:
    """The most probable next token (rows) that the model's head reads off outputs of the last
    block (rows x d).
    """
    found = [logits.argmax(-1) for logits in _logits(parts, o)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


@torch.no_grad()
def outputs_with(
    parts: Anatomy, rows: Sequence[Asked], layer: int, moves: Sequence[Tensor]
) -> list[Tensor]:
    """o of each row (rows x d) with s moved at `layer`, for each of several moves (rows x d)."""
    found: list[Tensor] = []
    deepest = parts.blocks[parts.n_layers - 1]
    with quiet(parts.model):
        for chosen, batch in batches(parts, rows):
            below = {"hidden": (parts.blocks[layer], "output")}
            with noticing_tuples(parts.blocks[layer]) as returned, captured(below) as seen:
                batch.run(parts)
            for number, move in enumerate(moves):
                hidden = seen["hidden"].clone()
                hidden[batch.each, batch.subject] += move[chosen].to(hidden)
                with (
                    stubbed(list(parts.blocks[: layer + 1]), hidden, returned[0]),
                    captured({"o": (deepest, "output")}) as above,
                ):
                    batch.run(parts)
                if len(found) == number:
                    found.append(above["o"].new_zeros(len(rows), above["o"].shape[-1]))
                found[number][chosen] = above["o"][batch.each, batch.last]
    return found

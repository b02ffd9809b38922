"""Running a model on prompts that begin alike: what their subjects and answers are inside of it.

The few-shot examples are the same for all subjects, so they are run once and their attention keys
and values are kept; of each prompt only what is its own is run. Where somebody's hooks stand in the
blocks, prompts are run whole: a hook may want that. s is the output of a block at the subject's
last token, o the output of the last block at the prompt's last token, in front of the final norm:
both as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unified_edit.errors import RelationError
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import batches_by_length, right_padded
from unified_edit.model.beginnings import hooked
from unified_edit.model.devices import halving, tokens_that_fit
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, noticing_tuples, quiet, stubbed
from unified_edit.model.packed import PrefixCache, gives_tuples, logits_behind
from unified_edit.model.prompts import Row
from unified_edit.relations.prompts import Asked

#: Positions of the vocabulary's logits made at a time.
AT_ONCE = 256
#: Tokens (with padding) of one forward, where there is room for them.
TOKENS = 2048

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

    inputs: of the forward, padded at the right; its ids (rows x longest) are what is run of each.
    subject, last: places there of the subject's last token and of the prompt's (rows).
    """

    cache: Cache
    inputs: dict[str, Tensor]
    subject: Tensor
    last: Tensor

    def run(self, parts: Anatomy) -> None:
        """One forward of the model's body over all rows."""
        rows = len(self.last)
        cache = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.cache]
        parts.model.base_model(
            **self.inputs, past_key_values=PrefixCache(cache), use_cache=True, **PLAIN_OUTPUT
        )

    @property
    def each(self) -> Tensor:
        """0, 1, ... for the rows."""
        return torch.arange(len(self.last), device=self.last.device)


def batch_of(parts: Anatomy, rows: Sequence[Row], shared: int, cache: Cache) -> Batch:
    """The rows from token `shared` on; `cache` is that of the tokens before."""
    device = parts.model.device
    inputs = right_padded([(row.ids, shared) for row in rows], device)
    before = inputs["attention_mask"].new_ones(len(rows), shared)
    inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], dim=1)
    subject = torch.tensor([row.subject - shared for row in rows], device=device)
    last = torch.tensor([len(row.ids) - shared - 1 for row in rows], device=device)
    return Batch(cache, inputs, subject, last)


def run_all(
    parts: Anatomy, rows: Sequence[Asked], run: Callable[[Sequence[int], Batch], list[Tensor]]
) -> list[Tensor]:
    """What `run` gives for indices of rows and the batch that they are, put together for all rows.

    Each of its tensors is (rows of the batch x ...). What several rows begin with is run once. How
    many rows are run together follows from the memory that is free; where it runs out all the same,
    they are run in halves.

    Raises ModelError where there is no memory for a single row.
    """
    if not rows:
        return []
    whole = hooked(parts.blocks)
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault(() if whole else row.ids[: row.own], []).append(index)
    longest = max(len(row.ids) for row in rows)
    tokens = tokens_that_fit(parts.model, longest=longest, most=TOKENS)
    found: list[Tensor] = []
    for head, indices in alike.items():
        ((_, cache),) = halving(lambda one: run_prefix(parts, one[0]), [[head]])

        def run_some(
            chosen: Sequence[int], shared: int = len(head), cache: Cache = cache
        ) -> list[Tensor]:
            return run(chosen, batch_of(parts, [rows[index] for index in chosen], shared, cache))

        lengths = [len(rows[index].ids) - len(head) for index in indices]
        batches = ([indices[at] for at in some] for some in batches_by_length(lengths, tokens))
        for chosen, made in halving(run_some, batches):
            found = found or [one.new_zeros(len(rows), *one.shape[1:]) for one in made]
            for of_all, of_batch in zip(found, made, strict=True):
                of_all[chosen] = of_batch
    return found


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
    deepest = parts.n_layers - 1
    sites = {layer: (parts.blocks[layer], "output") for layer in {*layers, deepest}}

    def run(_chosen: Sequence[int], batch: Batch) -> list[Tensor]:
        with captured(sites) as seen:
            batch.run(parts)
        o = seen[deepest][batch.each, batch.last]
        return [o, *(seen[layer][batch.each, batch.subject] for layer in layers)]

    with quiet(parts.model):
        o, *each = run_all(parts, rows, run) or [torch.empty(0)]
        answers = decode(parts, o)
    if not bool(torch.isfinite(o).all()):
        raise RelationError(
            "the model's states are not finite: its weights are damaged or overflow "
            f"{o.dtype}; load it again, or in a wider type"
        )
    return States(dict(zip(layers, each, strict=bool(rows))), o, answers)


def _logits(parts: Anatomy, o: Tensor) -> Iterator[Tensor]:
    """Logits of the next token from outputs of the last block (rows x d), some rows at a time."""
    with torch.no_grad(), quiet(parts.model):
        as_tuple = gives_tuples(parts)

        def run(some: Sequence[int]) -> Tensor:
            hidden = o[some[0] : some[-1] + 1].to(parts.model.dtype)
            return logits_behind(parts, hidden, as_tuple)

        places = range(len(o))
        spans = [places[start : start + AT_ONCE] for start in places[::AT_ONCE]]
        for _, logits in halving(run, spans):
            yield logits


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
    block, deepest = parts.blocks[layer], parts.blocks[parts.n_layers - 1]

    def run(chosen: Sequence[int], batch: Batch) -> list[Tensor]:
        with noticing_tuples(block) as returned, captured({"s": (block, "output")}) as below:
            batch.run(parts)
        found = []
        for move in moves:
            hidden = below["s"].clone()
            hidden[batch.each, batch.subject] += move[chosen].to(hidden)
            with (
                stubbed(list(parts.blocks[: layer + 1]), hidden, returned[0]),
                captured({"o": (deepest, "output")}) as above,
            ):
                batch.run(parts)
            found.append(above["o"][batch.each, batch.last])
        return found

    with quiet(parts.model):
        return run_all(parts, rows, run)

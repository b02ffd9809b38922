"""The restored runs of causal tracing: all restorations of one fact, block by block.

A restoration at token t and layer l changes nothing below l and, in a causal model, nothing left
of t. So a run begins behind the first block that it restores, with the states from t on, and its
attention reads what lies left of t from the keys and values of the corrupted run.

For one token the runs climb the blocks together: at each block those join that begin there. So a
forward runs one block on many rows, and which layer a run began at makes no difference to it. This
changes the cost and not the result; `tests/test_tracing.py` holds it against one restoration at a
time over whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from unified_edit.measuring.traced_runs import Prompt, Runs, module_of, probabilities
from unified_edit.model.batching import BATCH_TOKENS
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, per_token, replaced_output, stubbed
from unified_edit.model.likelihoods import POSITIONS

#: Tokens of one block at a time on a processor: the states of more do not stay in its caches.
CPU_TOKENS = 1024
#: Tokens of runs that climb together; bounds memory.
TOGETHER = 32768


class Restoration(NamedTuple):
    """Put back what `kind` gave in the layers first..last, at some token; `layer` is the middle."""

    kind: str
    layer: int
    first: int
    last: int


def plan(n_layers: int, layers: Sequence[int], windows: Mapping[str, int]) -> list[Restoration]:
    """The restorations at one token, those that begin at lower layers first.

    windows: kind -> how many layers are restored together, for each kind.
    """
    return sorted(
        (
            Restoration(
                kind,
                layer,
                max(0, layer - width // 2),
                min(n_layers - 1, layer + width // 2),
            )
            for kind, width in windows.items()
            for layer in layers
        ),
        key=lambda one: one.first,
    )


def work(n_layers: int, prompt: Prompt, restorations: Sequence[Restoration]) -> int:
    """What all restorations of a prompt cost, as tokens times blocks."""
    blocks = sum(n_layers - one.first for one in restorations)
    return sum(blocks * (len(prompt.ids) - token) for token in _tokens(prompt))


def _tokens(prompt: Prompt) -> range:
    """Those that a restoration may change something at: nothing is corrupted before the subject."""
    return range(prompt.subject[0], len(prompt.ids))


def restored(
    runs: Runs, prompt: Prompt, restorations: Sequence[Restoration], done: Callable[[int], None]
) -> dict[str, Tensor]:
    """Kind -> probability of the object (samples x prompt tokens x layers); NaN in other layers.

    done: told of each part of `work` that is behind us.
    """
    layers = sorted({one.layer for one in restorations})
    shape = (len(runs.corrupted), len(prompt.ids), runs.parts.n_layers)
    empty = torch.full(shape, torch.nan, dtype=torch.float64)
    empty[:, :, layers] = runs.corrupted[:, None, None]
    found = {one.kind: empty.clone() for one in restorations}
    for token in _tokens(prompt):
        most = TOGETHER // (len(runs.corrupted) * (len(runs.asked.ids) - token))
        for part in _parts(len(restorations), most):
            climb = _Climb(runs, token, restorations[part])
            for one, values in zip(restorations[part], climb.probabilities(), strict=True):
                found[one.kind][:, token, one.layer] = values
            blocks = sum(runs.parts.n_layers - one.first for one in restorations[part])
            done(blocks * (len(prompt.ids) - token))
    return found


def _parts(count: int, most: int) -> Iterator[slice]:
    most = max(1, most)
    return (slice(begin, min(count, begin + most)) for begin in range(0, count, most))


class _Climb:
    """Runs that are restored at one token, on their way up the blocks."""

    def __init__(self, runs: Runs, token: int, restorations: Sequence[Restoration]) -> None:
        self.runs, self.parts = runs, runs.parts
        self.token, self.restorations = token, restorations
        #: restorations x samples x tokens from `token` on x width
        self.hidden = torch.stack([self._beginning(one) for one in restorations])

    def _beginning(self, one: Restoration) -> Tensor:
        """What the first block that is restored gives."""
        states = self.runs.states[one.first][:, self.token :].clone()
        states[:, 0] = self.runs.restored_at[one.kind, one.first][:, self.token]
        return states

    def probabilities(self) -> Tensor:
        """Of the object, at the top: (restorations x samples)."""
        samples, tokens = self.hidden.shape[1:3]
        at_once = CPU_TOKENS if self.hidden.device.type == "cpu" else BATCH_TOKENS
        for layer in range(self.restorations[0].first + 1, self.parts.n_layers):
            climbing = sum(one.first < layer for one in self.restorations)
            for part in _parts(climbing, at_once // (samples * tokens)):
                self._run(layer, part)
        asked = self.runs.asked
        top = self.hidden[:, :, -len(asked.target) :].flatten(0, 1)
        found = [
            probabilities(self.parts, asked, self._forward(top[part], self.parts.n_layers))
            for part in _parts(len(top), POSITIONS // len(asked.target))
        ]
        return torch.cat(found).view(-1, samples)

    def _run(self, layer: int, part: slice) -> None:
        """Take some runs through one block."""
        hidden = self.hidden[part]
        block = self.parts.blocks[layer]
        with ExitStack() as stack:
            for kind in {one.kind for one in self.restorations[part]}:
                rows = [
                    index
                    for index, one in enumerate(self.restorations[part])
                    if one.kind == kind and one.first < layer <= one.last
                ]
                if rows:
                    module = module_of(self.parts, kind, layer)
                    change = self._restoring(kind, layer, rows, hidden.shape[:3])
                    stack.enter_context(replaced_output(module, change))
            with captured({"block": (block, "output")}) as seen:
                self._forward(hidden.flatten(0, 1), layer)
        hidden.copy_(seen["block"].view_as(hidden))

    def _restoring(
        self, kind: str, layer: int, rows: Sequence[int], shape: Sequence[int]
    ) -> Callable[[Tensor], Tensor]:
        """Puts back at the first token, in some of the restorations, what the clean run has."""
        restorations, samples, tokens = shape
        module = module_of(self.parts, kind, layer)
        clean = self.runs.given[kind, layer][self.token]

        def put_back(output: Tensor) -> Tensor:
            output = output.clone()
            by_row = per_token(
                self.parts.model, output, (restorations * samples, tokens), module, "output"
            )
            by_row.unflatten(0, (restorations, samples))[rows, :, 0] = clean
            return output

        return put_back

    def _forward(self, hidden: Tensor, layer: int) -> Tensor:
        """The model from block `layer` on, which gets `hidden` (rows x last tokens x width)."""
        ids = torch.tensor(self.runs.asked.ids, device=hidden.device)
        rows, tokens = hidden.shape[:2]
        left = len(ids) - tokens
        blocks = list(self.parts.blocks[:layer])
        cache = self._left(rows, left, layer) if layer < self.parts.n_layers else None
        with stubbed(blocks, hidden, self.runs.as_tuple):
            return self.parts.model.base_model(
                input_ids=ids[left:].expand(rows, -1),
                attention_mask=torch.ones(
                    rows, tokens if cache is None else len(ids), dtype=torch.long, device=ids.device
                ),
                position_ids=torch.arange(left, len(ids), device=ids.device).expand(rows, -1),
                past_key_values=cache,
                use_cache=cache is not None,
                **PLAIN_OUTPUT,
            ).last_hidden_state

    def _left(self, rows: int, left: int, layer: int) -> DynamicCache:
        """Keys and values of the corrupted runs left of the token, for one block alone."""
        made = DynamicCache()
        samples = len(self.runs.corrupted)
        if left:
            keys, values = (
                kept[:, :, :left].repeat(rows // samples, 1, 1, 1)
                for kept in self.runs.cache[layer]
            )
            made.update(keys, values, 0)
            # the model asks its first layer how long the cache is, and its block `layer` reads it
            made.layers = made.layers * self.parts.n_layers
        return made

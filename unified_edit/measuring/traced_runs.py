"""The runs behind causal tracing: clean, corrupted, and restored ones, for one fact.

A restoration at layer l changes nothing below l. So the corrupted run is made once, its states are
kept, and restorations that begin at the same layer run together as the rows of one batch, from
that layer up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import BATCH_TOKENS, left_padded
from unified_edit.model.hooks import (
    PLAIN_OUTPUT,
    captured,
    noticing_tuples,
    per_token,
    replaced_output,
    stubbed,
)
from unified_edit.model.likelihoods import log_probabilities
from unified_edit.model.prompts import Encoder, Row

#: What can be restored: the residual stream after a block, or what its MLP or attention adds.
KINDS = ("state", "mlp", "attention")


class Prompt(NamedTuple):
    """A tokenised prompt: ids, their text, and the first and last subject token."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    subject: tuple[int, int]


def read_prompt(encoder: Encoder, fact: Fact) -> Prompt:
    """Tokenise the prompt of `fact`; raises TokenizationError if the model cannot read it."""
    encoder.prompts([fact.text])
    found, subject = encoder.subject_tokens(fact)
    tokens = tuple(
        fact.text[first:last].strip() or str(encoder.tokenizer.convert_ids_to_tokens(token))
        for token, (first, last) in zip(found.ids, found.spans, strict=True)
    )
    return Prompt(found.ids, tokens, (subject[0], subject[-1]))


class _Restoration(NamedTuple):
    """Put back what `kind` gave at `token` in the layers first..last; `layer` is the middle."""

    kind: str
    token: int
    layer: int
    first: int
    last: int


class Runs:
    """The clean and the corrupted runs of one fact, and restored runs on top of them."""

    def __init__(self, parts: Anatomy, prompt: Prompt, asked: Row, noise: Tensor) -> None:
        self.parts, self.prompt, self.asked = parts, prompt, asked
        self.noise = noise.to(parts.embeddings.dtype).to(parts.model.device)
        sites: dict[tuple[str, int], tuple[nn.Module, str]] = {}
        for layer in range(parts.n_layers):
            for kind in KINDS:
                sites[kind, layer] = (self._module(kind, layer), "output")
        both = torch.cat([torch.zeros_like(self.noise[:1]), self.noise])
        with (
            noticing_tuples(parts.blocks[0]) as returned,
            captured(sites, stop=False) as seen,
            self._corrupted(both),
        ):
            found = self._probabilities(len(both))
        self.as_tuple = returned[0]
        self.clean, self.corrupted = float(found[0]), found[1:]
        shape = (len(both), len(asked.ids))
        self.outputs = {
            site: per_token(parts.model, value, shape, sites[site][0], "output")[0].clone()
            for site, value in seen.items()
        }
        #: samples x tokens x width after each block of the corrupted runs
        self.states = [seen["state", layer][1:].clone() for layer in range(parts.n_layers)]

    def _module(self, kind: str, layer: int) -> nn.Module:
        if kind == "state":
            return self.parts.blocks[layer]
        return self.parts.mlp(layer) if kind == "mlp" else self.parts.attention(layer)

    def _corrupted(self, noise: Tensor) -> AbstractContextManager[None]:
        """A context in which `noise` (rows x subject tokens x width) is added to the embeddings."""
        first, last = self.prompt.subject

        def add(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, first : last + 1] += noise
            return output

        return replaced_output(self.parts.model.get_input_embeddings(), add)

    def _probabilities(self, rows: int) -> Tensor:
        """One forward of so many equal rows: probability of the object in each (rows,)."""
        model, target = self.parts.model, self.asked.target
        one = left_padded([self.asked.ids], model.device)
        inputs = {name: value.expand(rows, -1) for name, value in one.items()}
        hidden = model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT).last_hidden_state
        precise = log_probabilities(self.parts, hidden[:, -len(target) :])
        wanted = torch.tensor(target, device=precise.device).expand(rows, -1)[:, :, None]
        return precise.gather(2, wanted)[:, :, 0].cpu().double().mean(dim=1).exp()

    def restored(self, kinds: Sequence[str], window: int) -> dict[str, Tensor]:
        """Kind -> probability of the object (samples x prompt tokens x layers)."""
        tokens, layers = len(self.prompt.ids), self.parts.n_layers
        # before the subject nothing was corrupted: putting it back changes nothing
        untouched = self.corrupted[:, None, None].expand(-1, tokens, layers)
        found = {kind: untouched.clone() for kind in kinds}
        for start, together in self._plan(kinds, window).items():
            at_once = max(1, BATCH_TOKENS // (len(self.corrupted) * len(self.asked.ids)))
            for begin in range(0, len(together), at_once):
                part = together[begin : begin + at_once]
                for one, values in zip(part, self._run(start, part), strict=True):
                    found[one.kind][:, one.token, one.layer] = values
        return found

    def _plan(self, kinds: Sequence[str], window: int) -> dict[int, list[_Restoration]]:
        """All restorations, by the first block that must be run for them."""
        top, half = self.parts.n_layers - 1, window // 2
        plan: dict[int, list[_Restoration]] = {}
        for kind in kinds:
            for layer in range(top + 1):
                around = 0 if kind == "state" else half
                first, last = max(0, layer - around), min(top, layer + around)
                # a restored state is where the next block begins
                start = layer + 1 if kind == "state" else first
                plan.setdefault(start, []).extend(
                    _Restoration(kind, token, layer, first, last)
                    for token in range(self.prompt.subject[0], len(self.prompt.ids))
                )
        return plan

    def _run(self, start: int, restorations: Sequence[_Restoration]) -> Tensor:
        """Probabilities (restorations x samples) of restored runs that begin with block `start`."""
        samples = len(self.corrupted)
        shape = (len(restorations), samples)
        rows = torch.arange(shape[0] * samples).view(shape).tolist()
        changes: dict[tuple[str, int], list[tuple[list[int], int]]] = {}
        for own, one in zip(rows, restorations, strict=True):
            for layer in range(one.first, one.last + 1):
                changes.setdefault((one.kind, layer), []).append((own, one.token))
        with ExitStack() as stack:
            if start == 0:
                stack.enter_context(self._corrupted(self.noise.repeat(shape[0], 1, 1)))
            else:
                hidden = self.states[start - 1].repeat(shape[0], 1, 1)
                self._put_back(hidden, "state", start - 1, changes.pop(("state", start - 1), []))
                blocks = list(self.parts.blocks[:start])
                stack.enter_context(stubbed(blocks, hidden, self.as_tuple))
            for (kind, layer), places in changes.items():
                stack.enter_context(self._replaced(kind, layer, places))
            return self._probabilities(shape[0] * samples).view(shape)

    def _put_back(
        self, hidden: Tensor, kind: str, layer: int, places: Sequence[tuple[list[int], int]]
    ) -> None:
        """Overwrite rows of `hidden`, each at its token, with the clean run's output."""
        rows = [row for own, _ in places for row in own]
        tokens = [token for own, token in places for _ in own]
        hidden[rows, tokens] = self.outputs[kind, layer][tokens]

    def _replaced(
        self, kind: str, layer: int, places: Sequence[tuple[list[int], int]]
    ) -> AbstractContextManager[None]:
        """A context in which the output of one module is put back at some rows and tokens."""

        def replace(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            # what some MLPs give is one list of vectors for all rows
            by_row = hidden.view(-1, len(self.asked.ids), hidden.shape[-1])
            self._put_back(by_row, kind, layer, places)
            return hidden

        return replaced_output(self._module(kind, layer), replace)

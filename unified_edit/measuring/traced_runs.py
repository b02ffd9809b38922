"""The clean and the corrupted runs of one fact: all that a restored run is made from.

Both are rows of one forward, and so is a third kind of row, out of which every restoration begins:
a block gets the corrupted run's states, and in it the MLP (or attention) gives what it gave in the
clean run, at all tokens together. Behind its attention a block treats each token by itself, so what
it then gives at a token is what it gives if that token alone is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, noticing_tuples, per_token, replaced_output
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


class Runs:
    """The clean and the corrupted runs of one fact, with what restored runs need of them.

    clean: probability of the object in the clean run; corrupted: (samples,) in the corrupted ones.
    given: (kind, layer) -> (tokens x width), what it gives in the clean run.
    states: for each layer (samples x tokens x width), what the block gives in the corrupted runs.
    restored_at: (kind, layer) -> (samples x tokens x width), what the block gives at each token in
        a corrupted run in which that kind is restored at the token, in this layer alone.
    cache: for each layer the corrupted runs' keys and values (samples x heads x tokens x width of
        a head) of its attention.
    as_tuple: whether the blocks of this family return tuples.
    """

    def __init__(
        self, parts: Anatomy, prompt: Prompt, asked: Row, noise: Tensor, kinds: Sequence[str]
    ) -> None:
        self.parts, self.asked = parts, asked
        self._subject = prompt.subject
        noise = noise.to(parts.embeddings.dtype).to(parts.model.device)
        self._samples = samples = len(noise)
        inside = [kind for kind in kinds if kind != "state"]
        self._rows = {
            kind: slice(1 + samples * place, 1 + samples * (place + 1))
            for place, kind in enumerate(["corrupted", *inside])
        }
        self.given: dict[tuple[str, int], Tensor] = {}
        self.states: list[Tensor] = []
        self.restored_at: dict[tuple[str, int], Tensor] = {}
        added = torch.cat([torch.zeros_like(noise[:1]), *[noise] * len(self._rows)])
        made = DynamicCache()  # all tokens at every layer, also where attention has a window
        with ExitStack() as stack:
            returned = stack.enter_context(noticing_tuples(parts.blocks[0]))
            embeddings = parts.model.get_input_embeddings()
            stack.enter_context(replaced_output(embeddings, self._corrupting(added)))
            for layer in range(parts.n_layers):
                for kind in inside:
                    module = module_of(parts, kind, layer)
                    change = self._restoring(kind, layer, module, len(added))
                    stack.enter_context(replaced_output(module, change))
                change = self._keeping(layer, len(added))
                stack.enter_context(replaced_output(parts.blocks[layer], change))
            one = left_padded([asked.ids], parts.model.device)
            final = parts.model.base_model(
                **{name: value.expand(len(added), -1) for name, value in one.items()},
                past_key_values=made,
                use_cache=True,
                **PLAIN_OUTPUT,
            ).last_hidden_state
        self.as_tuple = returned[0]
        found = probabilities(parts, asked, final[: 1 + samples, -len(asked.target) :])
        self.clean, self.corrupted = float(found[0]), found[1:]
        own = self._rows["corrupted"]
        layers: list[Any] = list(made.layers)
        self.cache = [(one.keys[own].clone(), one.values[own].clone()) for one in layers]

    def _corrupting(self, noise: Tensor) -> Callable[[Tensor], Tensor]:
        """Adds `noise` (rows x subject tokens x width) to the embeddings."""
        first, last = self._subject

        def add(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, first : last + 1] += noise
            return output

        return add

    def _restoring(
        self, kind: str, layer: int, module: nn.Module, rows: int
    ) -> Callable[[Tensor], Tensor]:
        """Keeps what a module gives in the clean run, and puts it back in the rows for that."""

        def put_back(output: Tensor) -> Tensor:
            output = output.clone()
            by_row = self._by_row(output, module, rows)
            self.given[kind, layer] = by_row[0].clone()
            by_row[self._rows[kind]] = by_row[0]
            return output

        return put_back

    def _keeping(self, layer: int, rows: int) -> Callable[[Tensor], Tensor]:
        """Keeps what a block gives; what enters the next one is corrupted in all rows but one."""
        block = self.parts.blocks[layer]

        def keep(output: Tensor) -> Tensor:
            output = output.clone()
            by_row = self._by_row(output, block, rows)
            self.given["state", layer] = by_row[0].clone()
            everywhere = self.given["state", layer].expand(self._samples, -1, -1)
            self.restored_at["state", layer] = everywhere
            own = by_row[self._rows["corrupted"]].clone()
            self.states.append(own)
            for kind, place in self._rows.items():
                if kind != "corrupted":
                    self.restored_at[kind, layer] = by_row[place].clone()
                    by_row[place] = own
            return output

        return keep

    def _by_row(self, output: Tensor, module: nn.Module, rows: int) -> Tensor:
        shape = (rows, len(self.asked.ids))
        return per_token(self.parts.model, output, shape, module, "output")


def module_of(parts: Anatomy, kind: str, layer: int) -> nn.Module:
    """The module whose output is restored."""
    if kind == "state":
        return parts.blocks[layer]
    return parts.mlp(layer) if kind == "mlp" else parts.attention(layer)


def probabilities(parts: Anatomy, asked: Row, final: Tensor) -> Tensor:
    """Probability of the object (rows,) from final states (rows x target tokens x width).

    Raises ModelError if the model's logits are NaN.
    """
    wanted = torch.tensor(asked.target, device=final.device).expand(len(final), -1)[:, :, None]
    logs = log_probabilities(parts, final).gather(2, wanted)[:, :, 0]
    return logs.cpu().double().mean(dim=1).exp()

"""Hook layers as they stand in a model: taken in and out, described; written by `hook_layers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import real_number, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.hook_gates import GateName, Hooks, gate_of
from unified_edit.editing.hook_measures import Preserved
from unified_edit.editing.methods import Method
from unified_edit.errors import EditError, MethodError, ModelChangedError
from unified_edit.facts import Fact
from unified_edit.model.fingerprints import tensor_hash
from unified_edit.model.hooks import lock_of
from unified_edit.objective import Update
from unified_edit.statistics.collect import Source

#: Keys to preserve that lie above the threshold in the sample; fewer make it a matter of chance.
ABOVE = 20


@dataclass(frozen=True)
class HookSettings:
    """How hook layers open: see `HookLayers`. Raises MethodError for what is out of range."""

    gate: GateName = "causal"
    q: float = 1e-3
    alpha: float = 2.2
    sample: int | None = None

    def __post_init__(self) -> None:
        q = real_number(self.q, "q", MethodError, above=0)
        if q >= 1:
            raise MethodError(f"q is {q:g}; it is a share of tokens, below 1, such as 1e-3")
        object.__setattr__(self, "q", q)
        object.__setattr__(self, "alpha", real_number(self.alpha, "alpha", MethodError))
        gate_of(self.gate, self.alpha)
        if self.sample is not None:
            advice = "The 1 - q quantile of fewer than 1 / q keys lies beyond all of them"
            least = round(1 / q)
            number = whole_number(self.sample, "sample", MethodError, least=least, advice=advice)
            object.__setattr__(self, "sample", number)

    @property
    def keys(self) -> int:
        """So many keys to preserve are kept at each layer."""
        return round(ABOVE / self.q) if self.sample is None else self.sample


class HooksBeside:
    """An entry of the ledger that acts by hooks: W_h beside W0 at some layers of a model.

    fingerprint: of the base model. facts: all that were written, each once. batches: how many.
    """

    def __init__(self, editor: Editor, settings: HookSettings) -> None:
        self._editor, self.settings = editor, settings
        self._hooks = Hooks(gate_of(settings.gate, settings.alpha))
        self.fingerprint = editor.ledger.fingerprint()
        self.facts: tuple[Fact, ...] = ()
        self.batches = 0
        self._source: Source | None = None  # of C0
        self._preserved: Preserved | None = None
        self._id = ""

    # -- what it is ---------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The model; EditError if nobody has kept it."""
        return self._editor.model

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a hook layer, ascending."""
        assert self.method.layers is not None
        return self.method.layers

    @property
    def method(self) -> Method:
        """The method, resolved for the model."""
        return self._editor.method

    @property
    def thresholds(self) -> dict[int, float]:
        """{layer: at which its gate opens}."""
        return {
            layer: self._hooks.layers[layer].threshold
            if self._hooks.layers
            else self._hooks.gate.start
            for layer in self.layers
        }

    def delta(self, layer: int) -> Tensor:
        """W_h - W0 of a layer: (d_out x d_in, float64)."""
        number = whole_number(layer, "a layer", EditError)
        if number not in self.layers:
            raise EditError(f"there is no hook layer at {number}, only at {self.layers}")
        if number in self._hooks.layers:
            return self._hooks.layers[number].delta.clone()
        weight = self._editor.parts.weight(number)
        return torch.zeros(weight.d_out, weight.d_in, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the same after every batch but the first, beside the list of facts."""
        kept = 0 if self._preserved is None else self._preserved.sample.nbytes
        return kept + sum(one.nbytes for one in self._hooks.layers.values())

    @property
    def id(self) -> str:
        """16 hexadecimal digits, from everything that the hooks do."""
        if not self._id:
            told = {
                str(layer): [tensor_hash(one.delta), one.threshold]
                for layer, one in self._hooks.layers.items()
            }
            digest = hashlib.sha256(json.dumps([asdict(self.settings), self.layers, told]).encode())
            self._id = digest.hexdigest()[:16]
        return self._id

    @property
    def updates(self) -> Mapping[str, Update]:
        """What is added to weights: nothing."""
        return MappingProxyType({})

    # -- in a model ---------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in force."""
        return any(entry is self for entry in self._editor.ledger.active)

    def attach(self) -> Self:
        """Put the hooks in force; return the hook layers. Nothing happens where they are.

        Raises EditError where the model has other hook layers, ModelChangedError where its weights
        are not those that the hook layers were made beside.
        """
        ledger = self._editor.ledger
        with lock_of(self.model):
            if ledger.fingerprint() != self.fingerprint:
                raise ModelChangedError(
                    "the model's weights are not those that these hook layers were made beside: "
                    "something changed them. Load the model again, and the hook layers from their "
                    "file"
                )
            if not self.is_attached:
                if any(isinstance(entry, HooksBeside) for entry in ledger.active):
                    raise EditError(
                        "the model has other hook layers in force; remove them first (.remove())"
                    )
                ledger.activate((*ledger.active, self))
        return self

    def remove(self) -> None:
        """Take the hooks out: the model is what it was, bit for bit. `attach` puts them back."""
        ledger = self._editor.ledger
        with lock_of(self.model):
            if self.is_attached:
                ledger.activate([entry for entry in ledger.active if entry is not self])

    @contextmanager
    def out(self) -> Iterator[Self]:
        """Inside, the hooks are not in force; after, the model is in the state that was found."""
        with self._editor.ledger.state_kept():
            self.remove()
            yield self

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_problem: object) -> None:
        self.remove()

    def enter(self) -> None:
        """For the ledger: register the hooks."""
        self._hooks.register(self._editor.parts, self.layers)

    def leave(self) -> None:
        """For the ledger: take them out."""
        self._hooks.remove()

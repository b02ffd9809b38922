"""An edited model is its base plus a list of active edits.

The ledger of a model holds the base weights of the touched layers and the active edits in order.
A touched weight is always ``round(W_base + sum of the active Delta)``, summed in float64 in that
order and rounded once. So taking out any edit, in any order, is bit-exact: it equals never having
applied it. (Subtracting Delta from the rounded weight is not.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.contexts import sample_prefixes
from unified_edit.errors import EditError, MethodError, ModelChangedError
from unified_edit.fingerprints import model_fingerprint, quick_fingerprint, tensor_hash
from unified_edit.methods import Contexts
from unified_edit.models import Anatomy, Tokenizer, anatomy
from unified_edit.objective import Update


class Entry(Protocol):
    """What the ledger needs to know of an edit: an identity and its updates, in order."""

    @property
    def id(self) -> str:
        """What tells this edit from others."""

    @property
    def updates(self) -> Mapping[int, Sequence[Update]]:
        """{layer: updates whose Deltas are added there}."""


class Ledger:
    """The base weights and the active edits of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._base: dict[int, Tensor] = {}
        self._left: dict[int, str] = {}  # hash of each touched weight as the ledger left it
        self._active: list[Entry] = []
        self._prefixes: dict[tuple[Contexts, int], tuple[str, ...]] = {}
        self._fingerprint: tuple[str, str] | None = None  # (quick, full)

    @property
    def parts(self) -> Anatomy:
        """The parts of the model; EditError if it no longer exists."""
        model = self._model()
        if model is None:
            raise EditError("the model of this edit no longer exists; use edit.apply(model)")
        return anatomy(model)

    @property
    def active(self) -> tuple[Entry, ...]:
        """The edits in force, in the order in which they were applied."""
        return tuple(self._active)

    def base_weight(self, layer: int) -> Tensor:
        """W0 of `layer` as stored in the model, without any active edit."""
        return self._base.get(layer, self.parts.weight(layer).detach())

    def fingerprint(self) -> str:
        """Fingerprint of the *base* model, whatever edits are active."""
        parts = self.parts
        base = {parts.weight_name(layer): weight for layer, weight in self._base.items()}
        quick = quick_fingerprint(parts.model, base)
        if self._fingerprint is None or self._fingerprint[0] != quick:
            self._fingerprint = (quick, model_fingerprint(parts.model, base))
        return self._fingerprint[1]

    def state(self) -> str:
        """What the model computes now: the base's fingerprint and the active edits in order."""
        return "+".join([self.fingerprint(), *(edit.id for edit in self._active)])

    def verify(self) -> None:
        """Raise ModelChangedError if a touched weight is not as the ledger left it."""
        parts = self.parts
        for layer, expected in self._left.items():
            weight = parts.weight(layer)
            base = self._base[layer]
            if (weight.dtype, weight.shape) != (base.dtype, base.shape):
                change = f"is now {tuple(weight.shape)} {weight.dtype}"
            elif tensor_hash(weight) != expected:
                change = "has other entries"
            else:
                continue
            raise ModelChangedError(
                f"{parts.weight_name(layer)} {change} than when its last edit was applied or "
                "undone: something else changed it, and going on would overwrite that. Load the "
                "model again and apply the edits you want (Edit.load(...).apply(model))"
            )

    def with_edits(self, layer: int, edits: Sequence[Entry]) -> Tensor:
        """round(W_base + sum of Delta) of the given edits, in the orientation it is stored in."""
        parts, base = self.parts, self.base_weight(layer)
        total = base.detach().cpu().double()
        for edit in edits:
            for update in edit.updates.get(layer, ()):
                total = total + parts.to_stored(update.delta, layer)
        result = total.to(base.dtype).to(base.device)
        if not torch.isfinite(result).all():
            raise EditError(
                f"the edited weight of layer {layer} overflows {base.dtype}: Delta is too large. "
                "Use a ridge, a smaller clamp, or load the model in float32"
            )
        return result

    def activate(self, edits: Sequence[Entry]) -> None:
        """Make exactly `edits` the active ones; on any failure nothing has changed."""
        self.verify()
        parts = self.parts
        touched = {layer for edit in edits for layer in edit.updates}
        layers = sorted(touched | set(self._base))
        new = {layer: self.with_edits(layer, edits) for layer in layers}
        old = {layer: parts.weight(layer).detach().clone() for layer in layers}
        # a layer that no edit touches any more is its base again; the copy is not needed
        base = {layer: self._base.get(layer, old[layer]) for layer in layers if layer in touched}
        left = {layer: tensor_hash(new[layer]) for layer in base}
        try:
            with torch.no_grad():
                for layer, weight in new.items():
                    parts.weight(layer).copy_(weight)
        except BaseException:
            with torch.no_grad():
                for layer, weight in old.items():
                    parts.weight(layer).copy_(weight)
            raise
        # everything that can fail is done: weights and books change together
        self._active, self._base, self._left = list(edits), base, left

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Whatever is activated inside, the edits active before are active again after."""
        before = self.active
        try:
            yield
        finally:
            if self.active != before:
                self.activate(before)

    @contextmanager
    def rollback(self) -> Iterator[None]:
        """If the block fails, the edits active before are active again."""
        before = self.active
        try:
            yield
        except BaseException:
            if self.active != before:
                self.activate(before)
            raise

    @contextmanager
    def base_state(self) -> Iterator[None]:
        """Inside, the model is its base: all edits are taken out, and put back after."""
        with self.state_kept():
            if self._active:
                self.activate(())
            yield

    def prefixes(self, tokenizer: Tokenizer, spec: Contexts, seed: int) -> tuple[str, ...]:
        """Sampled prefixes of the base model, made once per specification and seed."""
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise MethodError(f"seed is {seed!r}; it must be a whole number of at most 64 bits")
        if (spec, seed) not in self._prefixes:
            with self.base_state():
                model = self.parts.model
                self._prefixes[spec, seed] = sample_prefixes(model, tokenizer, spec, seed)
        return self._prefixes[spec, seed]


_LEDGERS: weakref.WeakKeyDictionary[PreTrainedModel, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(model: PreTrainedModel) -> Ledger:
    """The ledger of `model`; it lives as long as the model and does not keep it alive."""
    anatomy(model)
    if model not in _LEDGERS:
        _LEDGERS[model] = Ledger(model)
    return _LEDGERS[model]

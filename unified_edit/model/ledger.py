"""An edited model is its base plus a list of active edits.

The ledger of a model holds the base of the touched weights and the active edits in order. A touched
weight is always ``round(W_base + sum of the active Delta)``, summed in float64 in that order and
rounded once. So taking out any edit, in any order, is bit-exact: it equals never having applied it.
(Subtracting Delta from the rounded weight is not.)

The ledger knows the base's fingerprint too: it alone writes weights, so it alone can tell its own
writing from somebody else's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unified_edit.errors import EditError, ModelChangedError
from unified_edit.model.anatomy import Anatomy, NamedWeight, anatomy
from unified_edit.model.fingerprints import glance, glance_at, model_fingerprint, tensor_hash
from unified_edit.model.hooks import lock_of
from unified_edit.objective import Update, matmul


class Entry(Protocol):
    """What the ledger needs to know of an edit: an identity and its updates."""

    @property
    def id(self) -> str:
        """What tells this edit from others."""

    @property
    def updates(self) -> Mapping[str, Update]:
        """{name of a weight: the update that is added there}."""


@runtime_checkable
class Beside(Entry, Protocol):
    """An entry that acts beside the weights, by hooks: it is told when it is in force."""

    def enter(self) -> None:
        """Put the hooks in."""

    def leave(self) -> None:
        """Take them out."""


class WeightLedger:
    """The base weights and the active edits of one module, whose weights `named` finds."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._base: dict[str, Tensor] = {}
        self._left: dict[str, str] = {}  # hash of each touched weight as the ledger left it
        self._active: list[Entry] = []
        self._fingerprint = ""
        self._glance: dict[str, tuple[object, ...]] = {}
        self._probed: set[tuple[str, int]] = set()

    @property
    def model(self) -> nn.Module:
        """The model; EditError if it no longer exists."""
        model = self._model()
        if model is None:
            raise EditError(
                "the model of this edit no longer exists: only a reference of yours keeps it in "
                "memory; load it again and use edit.apply(model)"
            )
        return model

    def named(self, name: str) -> NamedWeight:
        """The weight of that name; raises ModelError if there is none that can be edited."""
        raise NotImplementedError

    @property
    def active(self) -> tuple[Entry, ...]:
        """The edits in force, in the order in which they were applied."""
        return tuple(self._active)

    def base_weight(self, weight: NamedWeight) -> Tensor:
        """W0 as stored in the model, without any active edit."""
        return self._base.get(weight.name, weight.parameter.detach())

    def fingerprint(self, *, wholly: bool = False) -> str:
        """Fingerprint of the *base* model, whatever edits are active.

        Made once and kept as long as a glance shows no change, or anew with `wholly`.

        Raises ModelError if an entry of the model is NaN or infinite.
        """
        with lock_of(self.model):
            now = glance(self.model, self._base)
            if wholly or not self._fingerprint or now != self._glance:
                found = model_fingerprint(self.model, self._base)
                if found != self._fingerprint:
                    self._probed.clear()
                self._fingerprint, self._glance = found, now
            return self._fingerprint

    def state(self) -> str:
        """What the model computes now: the base's fingerprint and the active edits in order."""
        return "+".join([self.fingerprint(), *(edit.id for edit in self._active)])

    def verify(self) -> None:
        """Raise ModelChangedError if a touched weight is not as the ledger left it."""
        for name, expected in self._left.items():
            weight, base = self.named(name).parameter, self._base[name]
            if (weight.dtype, weight.shape) != (base.dtype, base.shape):
                change = f"is now {tuple(weight.shape)} {weight.dtype}"
            elif tensor_hash(weight) != expected:
                change = "has other entries"
            else:
                continue
            raise ModelChangedError(
                f"{name} {change} than when its last edit was applied or "
                "undone: something else changed it, and going on would overwrite that. Load the "
                "model again and apply the edits you want (Edit.load(...).apply(model))"
            )

    def with_edits(self, weight: NamedWeight, edits: Sequence[Entry]) -> Tensor:
        """round(W_base + sum of Delta) of the given edits, in the orientation it is stored in."""
        total = self.base_weight(weight).cpu().double()
        for edit in edits:
            if weight.name in edit.updates:
                total = total + weight.to_stored(edit.updates[weight.name].delta)
        return self._rounded(weight, total)

    def _rounded(self, weight: NamedWeight, total: Tensor) -> Tensor:
        base = self.base_weight(weight)
        result = total.to(base.dtype).to(base.device)
        if not torch.isfinite(result).all():
            raise EditError(
                f"the edited weight {weight.name} overflows {base.dtype}: Delta is too large. "
                "Use a ridge, a smaller clamp, or load the model in float32"
            )
        return result

    def activate(self, edits: Sequence[Entry]) -> None:
        """Make exactly `edits` the active ones; on any failure nothing has changed."""
        with lock_of(self.model):
            self.verify()
            self.fingerprint()  # a change by others is noticed before this one hides it
            touched = {name for edit in edits for name in edit.updates}
            weights = [self.named(name) for name in sorted(touched | set(self._base))]
            new = {weight: self.with_edits(weight, edits) for weight in weights}
            # a weight that no edit touches any more is its base again; the copy is not needed
            base = {
                weight.name: self._base.get(weight.name, weight.parameter.detach().clone())
                for weight in weights
                if weight.name in touched
            }
            left = {weight.name: tensor_hash(new[weight]) for weight in weights}
            _write(new)
            # everything that can fail is done: weights, hooks and books change together
            _tell(self._active, edits)
            self._active, self._base = list(edits), base
            self._left = {name: left[name] for name in base}
            self._note(weights)

    def _note(self, weights: Sequence[NamedWeight]) -> None:
        """The ledger itself has written these weights: a glance is to find nothing strange."""
        for weight in weights:
            self._glance[weight.name] = glance_at(self._base.get(weight.name, weight.parameter))

    @contextmanager
    def trying(self) -> Iterator[Callable[[NamedWeight, Update], None]]:
        """Yield a function that adds an update for the moment; afterwards all are out again.

        Updates at one weight are added to a running float64 sum, in order, which is rounded once
        into the weight each time: bit for bit the sum of all of them in that order, but no dense
        Delta is kept for any.
        """
        self.verify()
        self.fingerprint()
        totals: dict[str, Tensor] = {}
        before: dict[NamedWeight, Tensor] = {}
        known = set(self._base)

        def add(weight: NamedWeight, update: Update) -> None:
            if weight.name not in totals:
                # meanwhile its base is a copy, whatever stands in the weight
                self._base.setdefault(weight.name, weight.parameter.detach().clone())
                self._note([weight])
                total = self.base_weight(weight).cpu().double()
                for edit in self._active:
                    if weight.name in edit.updates:
                        total = total + weight.to_stored(edit.updates[weight.name].delta)
                totals[weight.name] = total
                before[weight] = weight.parameter.detach().clone()
            delta = matmul(update.left, update.right).cpu()
            totals[weight.name] = totals[weight.name] + weight.to_stored(delta)
            _write({weight: self._rounded(weight, totals[weight.name])})

        try:
            yield add
        finally:
            _write(before)
            self._base = {name: base for name, base in self._base.items() if name in known}
            self._note(list(before))

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Whatever is activated inside, the edits active before are active again after.

        Other threads that want to use the model wait until the block is left.
        """
        with lock_of(self.model):
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


class Ledger(WeightLedger):
    """The base weights and the active edits of one language model."""

    @property
    def model(self) -> PreTrainedModel:
        """The model; EditError if it no longer exists."""
        return cast(PreTrainedModel, super().model)

    @property
    def parts(self) -> Anatomy:
        """The parts of the model; EditError if it no longer exists."""
        return Anatomy.of(self.model)

    def named(self, name: str) -> NamedWeight:
        """The weight of that name; raises ModelError if there is none that can be edited."""
        return self.parts.named(name)

    def probe(self, weight: NamedWeight, site: nn.Module) -> None:
        """`Anatomy.probe`, once for the base as it is; raises what that raises."""
        parts, key = self.parts, (weight.name, id(site))
        self.fingerprint()
        if key not in self._probed:
            parts.probe(weight, site)
            self._note([weight])  # it wrote to the weight and put it back
            self._probed.add(key)


def _tell(before: Sequence[Entry], now: Sequence[Entry]) -> None:
    """Entries beside the weights leave if they are no longer among those in force, or enter."""
    for entry in before:
        if isinstance(entry, Beside) and not any(entry is one for one in now):
            entry.leave()
    for entry in now:
        if isinstance(entry, Beside) and not any(entry is one for one in before):
            entry.enter()


@torch.no_grad()
def _write(new: Mapping[NamedWeight, Tensor]) -> None:
    """Write all of the weights, or none."""
    old = {weight: weight.parameter.detach().clone() for weight in new}
    try:
        for weight, value in new.items():
            weight.parameter.copy_(value)
    except BaseException:
        for weight, value in old.items():
            weight.parameter.copy_(value)
        raise


_LEDGERS: weakref.WeakKeyDictionary[PreTrainedModel, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(model: PreTrainedModel) -> Ledger:
    """The ledger of `model`; it lives as long as the model and does not keep it alive.

    Raises ModelError for a model that cannot be edited.
    """
    anatomy(model)
    return _LEDGERS.setdefault(model, Ledger(model))

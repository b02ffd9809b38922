"""An edit: what was written, how, and the matrices that do it; applied, undone, saved, exported."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.errors import EditError, EditFileError, UnifiedEditError
from unified_edit.facts import Fact
from unified_edit.files import read_safetensors, write_safetensors
from unified_edit.fingerprints import tensor_hash
from unified_edit.ledger import Entry, Ledger, ledger_of
from unified_edit.methods import Method
from unified_edit.objective import Diagnosis, Update

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FORMAT = "unified_edit.edit/1"
#: An edit of which less than this arrives in the rounded weights is refused.
LOST = 0.01


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from.

    fingerprint: of the base model. state: what was active when it was computed (`Ledger.state`).
    before, after: hash of each touched weight in the base, and with this edit alone.
    """

    fingerprint: str
    state: str
    model: str
    revision: str | None
    library: str
    seed: int
    prefixes: tuple[str, ...]
    before: Mapping[int, str]
    after: Mapping[int, str]
    statistics: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one fact: its losses while the value was optimised and the size of delta.

    `relative_norm` is norm(delta) / norm(target_init); `clamped` whether it stands at the clamp.
    """

    losses: tuple[float, ...]
    relative_norm: float
    clamped: bool


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a model, made by `unified_edit.edit` or read by `Edit.load`.

    updates: {layer: one `Update` a layer in a tuple}; Delta of a layer is its `.delta`.
    outcomes: one `Outcome` a fact. warnings: what a user should know about this edit.
    """

    facts: tuple[Fact, ...]
    method: Method
    updates: Mapping[int, tuple[Update, ...]]
    outcomes: tuple[Outcome, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    _model: list[weakref.ref[PreTrainedModel]] = field(default_factory=list, repr=False)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits, from everything that the edit does and comes from."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, ascending."""
        return tuple(sorted(self.updates))

    def delta(self, layer: int) -> Tensor:
        """Delta of one layer: (d_out x d_in, float64)."""
        if layer not in self.updates:
            raise EditError(f"this edit does not touch layer {layer}, only {self.layers}")
        return self.updates[layer][0].delta

    @property
    def diagnosis(self) -> dict[int, Diagnosis]:
        """How well each layer's problem was solved."""
        return {layer: self.updates[layer][0].diagnosis for layer in self.layers}

    @property
    def table(self) -> pd.DataFrame:
        """One row a fact: steps, first and last loss, norm(delta)/norm(target_init), clamped."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": fact.text,
                "target": fact.target_new,
                "steps": len(outcome.losses),
                "first loss": outcome.losses[0],
                "last loss": outcome.losses[-1],
                "|delta|/|v0|": outcome.relative_norm,
                "clamped": outcome.clamped,
            }
            for fact, outcome in zip(self.facts, self.outcomes, strict=True)
        )

    # -- in a model ---------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger of the model this edit is bound to; EditError if there is none."""
        model = self._model[0]() if self._model else None
        if model is None:
            raise EditError(
                "this edit is not bound to a model in memory; say which: edit.apply(model)"
            )
        return ledger_of(model)

    @property
    def is_applied(self) -> bool:
        """Whether it is in force in the model it is bound to (False if that is gone)."""
        model = self._model[0]() if self._model else None
        return model is not None and any(e.id == self.id for e in ledger_of(model).active)

    def apply(self, model: PreTrainedModel | None = None) -> Edit:
        """Put the edit into `model`, or into the one it is bound to; return the edit.

        Raises EditError if it is already applied or changes nothing, EditFileError if the
        model is not the one it was made for, ModelChangedError if a touched weight was changed
        by something else. The model is then as it was.
        """
        if model is None:
            ledger = self.ledger
        else:
            ledger = ledger_of(model)
            self._check_model(ledger)
        if any(edit.id == self.id for edit in ledger.active):
            raise EditError("this edit is already applied to this model; undo it first")
        for layer in self.layers:
            self._check_alone(ledger, layer)
        earlier = ledger.active
        with ledger.rollback():
            ledger.activate((*earlier, self))
            self._check_arrived(ledger, earlier)
        if model is not None:
            self._model[:] = [weakref.ref(model)]
        return self

    def undo(self) -> Edit:
        """Take the edit out again, bit for bit, whatever was applied after it; return the edit.

        Raises EditError if it is not applied, ModelChangedError if a touched weight was changed
        by something else (nothing is overwritten then).
        """
        ledger = self.ledger
        remaining = [edit for edit in ledger.active if edit.id != self.id]
        if len(remaining) == len(ledger.active):
            raise EditError("this edit is not applied, so it cannot be undone; apply it first")
        ledger.activate(remaining)
        return self

    @contextmanager
    def applied(self) -> Iterator[Edit]:
        """Inside, the edit is in force; after, the model is in the state that was found."""
        with self.ledger.state_kept():
            if not self.is_applied:
                self.apply()
            yield self

    @contextmanager
    def undone(self) -> Iterator[Edit]:
        """Inside, the edit is not in force; after, the model is in the state that was found."""
        with self.ledger.state_kept():
            if self.is_applied:
                self.undo()
            yield self

    def _check_model(self, ledger: Ledger) -> None:
        found = ledger.fingerprint()
        if found != self.provenance.fingerprint:
            raise EditFileError(
                f"this edit was made for {self.provenance.model!r} (base fingerprint "
                f"{self.provenance.fingerprint[:12]}), not for this model "
                f"({ledger.parts.model.config._name_or_path!r}, {found[:12]}); weights, type or "
                "configuration differ. Load the model it was made for, in the same dtype"
            )

    def _check_arrived(self, ledger: Ledger, earlier: Sequence[Entry]) -> None:
        """Raise EditError if Delta is lost when the weights are rounded to the model's type.

        A Delta below half a unit in the last place of most weights changes only the smallest of
        them. What arrives is measured along Delta itself: <W - W_before, Delta> / norm(Delta)^2.
        """
        for layer in self.layers:
            weight = ledger.parts.weight(layer).detach()
            delta = ledger.parts.to_stored(self.delta(layer), layer)
            change = weight.cpu().double() - ledger.with_edits(layer, earlier).cpu().double()
            size = float(torch.linalg.vector_norm(delta)) ** 2
            arrived = float(torch.einsum("ij,ij->", change, delta)) / size if size else 0.0
            if arrived < LOST:
                raise EditError(
                    f"the edit leaves the weights of layer {layer} unchanged: Delta is lost in "
                    f"rounding to {weight.dtype} ({arrived:.1%} of it arrives); load the model in "
                    "a wider type, or use a smaller ridge or a larger clamp"
                )
            if arrived < 0.5:
                log.warning(
                    "only %.0f %% of Delta arrives at layer %d: the rest is lost in rounding to "
                    "%s; load the model in a wider type",
                    100 * arrived,
                    layer,
                    weight.dtype,
                )

    def _check_alone(self, ledger: Ledger, layer: int) -> None:
        """The base weight, and the weight this edit alone makes of it, must be as recorded."""
        weight = ledger.base_weight(layer)
        if tensor_hash(weight) != self.provenance.before[layer]:
            raise EditFileError(
                f"the weight of layer {layer} is not the one this edit was made for; load the "
                f"unedited {self.provenance.model!r}"
            )
        shape = tuple(ledger.parts.to_stored(self.delta(layer), layer).shape)
        if shape != tuple(weight.shape):
            raise EditFileError(
                f"Delta of layer {layer} has shape {shape}, but the weight is "
                f"{tuple(weight.shape)}. Make the edit again"
            )
        if tensor_hash(ledger.with_edits(layer, [self])) != self.provenance.after[layer]:
            raise EditFileError(
                f"applied to layer {layer}, this edit gives other weights than when it was made: "
                "its matrices are not those that were recorded. Make the edit again"
            )

    # -- on disk ------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        return {
            "facts": [asdict(fact) for fact in self.facts],
            "method": self.method.to_dict(),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "diagnosis": {str(layer): asdict(d) for layer, d in self.diagnosis.items()},
            "provenance": _plain(asdict(self.provenance)),
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write the edit as a safetensors file: factors, facts, method and provenance."""
        tensors = {}
        for layer in self.layers:
            update = self.updates[layer][0]
            if update.is_dense:
                tensors[f"delta.{layer}"] = update.delta
            else:
                tensors[f"left.{layer}"] = update.left
                tensors[f"right.{layer}"] = update.right
        write_safetensors(Path(path), tensors, FORMAT, self._description())

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit; apply it with ``.apply(model)``.

        Raises EditFileError if the file is missing, damaged, or not an edit.
        """
        tensors, meta = read_safetensors(Path(path), FORMAT, EditFileError)
        try:
            edit = cls(
                facts=tuple(Fact(**fact) for fact in meta["facts"]),
                method=Method.from_dict(meta["method"]),
                updates={
                    int(layer): (_update(tensors, layer, Diagnosis(**diagnosis)),)
                    for layer, diagnosis in meta["diagnosis"].items()
                },
                outcomes=tuple(
                    Outcome(tuple(o["losses"]), o["relative_norm"], o["clamped"])
                    for o in meta["outcomes"]
                ),
                provenance=_provenance(meta["provenance"]),
                warnings=tuple(meta["warnings"]),
            )
            edit._check_complete()
        except (AttributeError, LookupError, TypeError, ValueError, UnifiedEditError) as problem:
            raise EditFileError(
                f"{path}: the description of the edit is incomplete or malformed ({problem!r}); "
                "make the edit again"
            ) from problem
        return edit

    def _check_complete(self) -> None:
        """Raise ValueError unless the parts of an edit that was read belong together."""
        if not self.facts or len(self.facts) != len(self.outcomes):
            raise ValueError(f"{len(self.facts)} facts and {len(self.outcomes)} outcomes")
        before, after = (set(hashes) for hashes in (self.provenance.before, self.provenance.after))
        if not self.updates or not before == after == set(self.updates):
            raise ValueError(f"Delta of layers {self.layers}, hashes of {sorted(before | after)}")

    def to_peft(self, folder: str | Path) -> None:
        """Write the edit as a LoRA adapter that PEFT loads onto the unedited model.

        lora_B @ lora_A is Delta, from a singular value decomposition so that float32 factors
        carry it as well as float32 can. Needs the ``peft`` package.

        Raises EditError if the base model is not in memory (its layer names are needed) or PEFT
        is not installed.
        """
        try:
            from unified_edit.peft_export import write_adapter
        except ImportError as problem:
            raise EditError("to_peft needs PEFT: pip install 'unified_edit[peft]'") from problem
        parts = self.ledger.parts
        deltas = {parts.module_name(layer): self.delta(layer) for layer in self.layers}
        transposed = {parts.transposed(layer) for layer in self.layers}
        write_adapter(
            Path(folder), deltas, fan_in_fan_out=transposed.pop(), base=self.provenance.model
        )

    def __repr__(self) -> str:
        first = f"{self.facts[0].text!r} -> {self.facts[0].target_new!r}"
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        state = "applied" if self.is_applied else "not applied"
        return f"<Edit by {self.method.name} at layers {self.layers}: {first}{more}; {state}>"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
        for name, value in values.items()
    }


def _provenance(values: dict[str, Any]) -> Provenance:
    values = dict(values)
    for name in ("before", "after"):
        values[name] = {int(layer): digest for layer, digest in values[name].items()}
    return Provenance(**{**values, "prefixes": tuple(values["prefixes"])})


def _update(tensors: dict[str, Tensor], layer: str, diagnosis: Diagnosis) -> Update:
    if f"delta.{layer}" in tensors:
        delta = tensors[f"delta.{layer}"]
        if delta.shape[0] <= delta.shape[1]:
            left, right = torch.eye(delta.shape[0], dtype=delta.dtype), delta
        else:
            left, right = delta, torch.eye(delta.shape[1], dtype=delta.dtype)
    else:
        left, right = tensors[f"left.{layer}"], tensors[f"right.{layer}"]
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError(f"the factors of layer {layer} are no matrices")
    if left.shape[1] != right.shape[0] or not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError(f"the factors of layer {layer} do not fit or are not finite")
    return Update(left, right, diagnosis)


def combined_diagnosis(updates: list[Update]) -> Diagnosis:
    """One diagnosis for updates made one after another: the worst error, the summed cost."""
    each = [update.diagnosis for update in updates]
    return Diagnosis(
        condition=max(d.condition for d in each),
        rank=sum(d.rank for d in each),
        memorization_error=max(d.memorization_error for d in each),
        preservation_error=math.fsum(d.preservation_error for d in each),
        form=each[0].form,
    )


def merged(updates: list[Update]) -> Update:
    """The sum of updates made one after another at one layer, as one update."""
    if len(updates) == 1:
        return updates[0]
    left = torch.cat([update.left for update in updates], dim=1)
    right = torch.cat([update.right for update in updates], dim=0)
    return Update(left, right, combined_diagnosis(updates))


def bind(edit: Edit, model: PreTrainedModel) -> None:
    """Tell an edit which model it was made in."""
    edit._model[:] = [weakref.ref(model)]

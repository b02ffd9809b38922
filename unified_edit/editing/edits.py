"""An edit: what was written, how, and the matrices that do it; applied, undone, saved, exported."""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_path, whole_number
from unified_edit.editing.methods import Method
from unified_edit.editing.provenance import (
    Outcome,
    Provenance,
    Touched,
    check_alone,
    check_arrived,
)
from unified_edit.errors import EditError, EditFileError, UnifiedEditError
from unified_edit.facts import Fact
from unified_edit.model.hooks import lock_of
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective import Diagnosis, Update

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FORMAT = "unified_edit.edit/2"


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a model, made by `unified_edit.edit` or read by `Edit.load`.

    updates: {name of a weight: `Update`}. keys: {name of a weight: K (d_in x columns)}, the keys
    that the update was solved for. columns: for each fact its column there, one of its own unless
    facts of one subject were merged. outcomes: one `Outcome` a fact. warnings: what a user should
    know about this edit.
    """

    facts: tuple[Fact, ...]
    method: Method
    updates: Mapping[str, Update]
    keys: Mapping[str, Tensor]
    outcomes: tuple[Outcome, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    _model: weakref.ref[PreTrainedModel] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.facts))))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits, from everything that the edit does and comes from."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @property
    def names(self) -> dict[int, str]:
        """{layer: name of its edited weight}, layers ascending."""
        each = self.provenance.weights.items()
        return dict(sorted((touched.layer, name) for name, touched in each))

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, ascending."""
        return tuple(self.names)

    def delta(self, where: int | str) -> Tensor:
        """Delta of a layer, or of a weight by name: (d_out x d_in, float64)."""
        name: str | None
        if isinstance(where, str):
            name = where
        else:
            name = self.names.get(whole_number(where, "a layer", EditError))
        if name is None or name not in self.updates:
            raise EditError(
                f"this edit does not touch {where!r}, only layers {self.layers}: "
                f"{', '.join(self.updates)}"
            )
        return self.updates[name].delta

    @property
    def diagnosis(self) -> dict[int, Diagnosis]:
        """How well each layer's problem was solved."""
        return {layer: self.updates[name].diagnosis for layer, name in self.names.items()}

    @property
    def table(self) -> pd.DataFrame:
        """One row a fact: prompt, target, its probability before and after, whether it is now the
        likeliest, steps, first and last loss, norm(delta)/norm(target_init), clamped.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": fact.text,
                "target": fact.target_new,
                "before": outcome.before,
                "after": outcome.after,
                "likeliest": outcome.likeliest,
                "steps": len(outcome.losses),
                "first loss": outcome.losses[0],
                "last loss": outcome.losses[-1],
                "|delta|/|v0|": outcome.relative_norm,
                "clamped": outcome.clamped,
            }
            for fact, outcome in zip(self.facts, self.outcomes, strict=True)
        )

    def bound_to(self, model: PreTrainedModel) -> Edit:
        """The same edit, known to be of a model in memory."""
        return replace(self, _model=weakref.ref(model))

    # -- in a model ---------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger of the model this edit is bound to; EditError if there is none."""
        model = self._model() if self._model else None
        if model is None:
            raise EditError(
                "this edit is not bound to a model in memory; say which: edit.apply(model)"
            )
        return ledger_of(model)

    @property
    def is_applied(self) -> bool:
        """Whether it is in force in the model it is bound to (False if that is gone)."""
        model = self._model() if self._model else None
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
        with lock_of(ledger.model):
            if any(edit.id == self.id for edit in ledger.active):
                raise EditError("this edit is already applied to this model; undo it first")
            weights = [ledger.parts.named(name) for name in self.updates]
            for weight in weights:
                check_alone(ledger, weight, self, self.provenance)
            earlier = ledger.active
            with ledger.rollback():
                ledger.activate((*earlier, self))
                for weight in weights:
                    check_arrived(ledger, weight, self, earlier)
        if model is not None:
            object.__setattr__(self, "_model", weakref.ref(model))
        return self

    def undo(self) -> Edit:
        """Take the edit out again, bit for bit, whatever was applied after it; return the edit.

        Raises EditError if it is not applied, ModelChangedError if a touched weight was changed
        by something else (nothing is overwritten then).
        """
        ledger = self.ledger
        with lock_of(ledger.model):
            remaining = [edit for edit in ledger.active if edit.id != self.id]
            if len(remaining) == len(ledger.active):
                raise EditError("this edit is not applied, so it cannot be undone; apply it first")
            ledger.activate(remaining)
        return self

    @contextmanager
    def applied(self) -> Iterator[Edit]:
        """Inside, the edit is in force; after, the model is in the state that was found.

        Meanwhile the model belongs to this thread: others that ask or edit it wait. So do not wait
        inside for one of them.
        """
        with self.ledger.state_kept():
            if not self.is_applied:
                self.apply()
            yield self

    @contextmanager
    def undone(self) -> Iterator[Edit]:
        """Inside, the edit is not in force; after, the model is in the state that was found.

        As with `applied`, other threads wait meanwhile.
        """
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
                f"({ledger.parts.name!r}, {found[:12]}); weights, type or "
                "configuration differ. Load the model it was made for, in the same dtype"
            )

    # -- on disk ------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "facts": [asdict(fact) for fact in self.facts],
            "method": self.method.to_dict(),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "diagnosis": {name: asdict(one.diagnosis) for name, one in self.updates.items()},
            "provenance": asdict(self.provenance),
            "warnings": list(self.warnings),
        }
        # where nothing was merged or split, as before there was a choice: edits keep their ids
        if described["provenance"]["on_shared_subject"] == "raise":
            del described["provenance"]["on_shared_subject"]
        else:
            described["columns"] = list(self.columns)
        return described

    def save(self, path: str | Path) -> None:
        """Write the edit as a safetensors file: factors, keys, facts, method and provenance.

        Raises EditFileError if it cannot be written.
        """
        tensors = {f"keys.{name}": keys for name, keys in self.keys.items()}
        for name, update in self.updates.items():
            if update.is_dense:
                tensors[f"delta.{name}"] = update.delta
            else:
                tensors[f"left.{name}"], tensors[f"right.{name}"] = update.left, update.right
        place = as_path(path, "the path of the edit", EditFileError)
        write_safetensors(place, tensors, FORMAT, self._description(), EditFileError)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit; apply it with ``.apply(model)``.

        Raises EditFileError if the file is missing, damaged, or not an edit.
        """
        place = as_path(path, "the path of the edit", EditFileError)
        tensors, meta = read_safetensors(place, FORMAT, EditFileError)
        try:
            weights = {
                name: Touched(**touched) for name, touched in meta["provenance"]["weights"].items()
            }
            prefixes = tuple(meta["provenance"]["prefixes"])
            edit = cls(
                facts=tuple(Fact(**fact) for fact in meta["facts"]),
                method=Method.from_dict(meta["method"]),
                updates={
                    name: _update(tensors, name, Diagnosis(**diagnosis))
                    for name, diagnosis in meta["diagnosis"].items()
                },
                keys={name: tensors[f"keys.{name}"] for name in meta["diagnosis"]},
                outcomes=tuple(
                    Outcome(**{**one, "losses": tuple(one["losses"])}) for one in meta["outcomes"]
                ),
                provenance=Provenance(
                    **{**meta["provenance"], "weights": weights, "prefixes": prefixes}
                ),
                warnings=tuple(meta["warnings"]),
                columns=tuple(meta.get("columns", ())),
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
        wide = len(set(self.columns))
        if sorted(set(self.columns)) != list(range(wide)) or len(self.columns) != len(self.facts):
            raise ValueError(f"columns {self.columns} for {len(self.facts)} facts")
        if not self.updates or set(self.provenance.weights) != set(self.updates):
            raise ValueError(f"Delta of {set(self.updates)}, hashes of {self.provenance.weights}")
        for name, update in self.updates.items():
            shape = (update.right.shape[1], wide)
            if tuple(self.keys[name].shape) != shape:
                raise ValueError(f"keys of {name} are {tuple(self.keys[name].shape)}, not {shape}")

    def to_peft(self, folder: str | Path) -> None:
        """Write the edit as a LoRA adapter that PEFT loads onto the unedited model.

        lora_B @ lora_A is Delta, from a singular value decomposition so that float32 factors
        carry it as well as float32 can. Needs the ``peft`` package.

        Raises EditError if the base model is not in memory (its layer names are needed) or PEFT
        is not installed.
        """
        try:
            from unified_edit.editing.peft_export import write_adapter
        except ImportError as problem:
            raise EditError("to_peft needs PEFT: pip install 'unified_edit[peft]'") from problem
        parts = self.ledger.parts
        weights = [parts.named(name) for name in self.updates]
        write_adapter(
            as_path(folder, "the adapter's folder", EditError),
            {weight.module_name: self.delta(weight.name) for weight in weights},
            fan_in_fan_out={weight.transposed for weight in weights}.pop(),
            base=self.provenance.model,
        )

    def __repr__(self) -> str:
        first = f"{self.facts[0].text!r} -> {self.facts[0].target_new!r}"
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        state = "applied" if self.is_applied else "not applied"
        return f"<Edit by {self.method.name} at layers {self.layers}: {first}{more}; {state}>"


def _update(tensors: dict[str, Tensor], name: str, diagnosis: Diagnosis) -> Update:
    if f"delta.{name}" in tensors:
        delta = tensors[f"delta.{name}"]
        if delta.shape[0] <= delta.shape[1]:
            left, right = torch.eye(delta.shape[0], dtype=delta.dtype), delta
        else:
            left, right = delta, torch.eye(delta.shape[1], dtype=delta.dtype)
    else:
        left, right = tensors[f"left.{name}"], tensors[f"right.{name}"]
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError(f"the factors of {name} are no matrices")
    if left.shape[1] != right.shape[0] or not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError(f"the factors of {name} do not fit or are not finite")
    return Update(left, right, diagnosis)

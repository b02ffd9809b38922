"""An edit: what was written, how, and the matrices that do it; applied, undone, saved, exported."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.arguments import as_path, whole_number
from unified_edit.editing.edit_files import (
    FORMAT,
    Recorded,
    description_of,
    fields_of,
    read,
    tensors_of,
)
from unified_edit.editing.provenance import rounding_errors
from unified_edit.editing.reversible import Reversible
from unified_edit.errors import EditError, EditFileError
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective import Diagnosis

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Edit(Recorded, Reversible[Ledger]):
    """One edit of a model, made by `edit` or `fine_tune`, or read by `Edit.load`.

    updates: {name of a weight: `Update`}. keys: {name of a weight: K (d_in x columns)}, what the
    update was solved for. columns: for each fact its column there, one of its own unless facts of
    one subject were merged. outcomes: one a fact. warnings: what a user should know about it.
    targets: {name: V (d_out x columns)}, what the weight was to give for its keys; only where
    the edit was made with a history. kept: what became of each item that was to be preserved by
    name, for which preserved_keys has {name: K_p (d_in x keys)}.
    """

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
    def rounding(self) -> dict[int, float]:
        """{layer: how far its weight misses the value of the keys because it has the model's type}.

        norm((W - W0 - Delta) K) / norm(Delta K): Delta is computed in float64, and W0 + Delta
        rounded once. About 1e-6 in float32; in bfloat16, whose numbers have 8 bits, a few percent
        where Delta is small beside W0. EditError if the edit is not bound to a model in memory.
        """
        return rounding_errors(self.ledger, self, self.keys)

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

    @property
    def preserved(self) -> pd.DataFrame:
        """One row an item that was to be preserved by name: how far it moved.

        Columns: item (its prompt), keys (how many it has), said (the likeliest next token without
        the edit), before and after (its probability without and with), says (the likeliest with
        it), and for each layer "moved at ...": norm(Delta k) / norm(W0 k) over its keys.
        """
        import pandas as pd

        columns = ["item", "keys", "said", "before", "after", "says"]
        moved = [f"moved at {layer}" for layer in self.layers]
        rows = [
            [one.prompt, len(one.columns), one.said, one.before, one.after, one.says, *one.moved]
            for one in self.kept
        ]
        return pd.DataFrame(rows, columns=[*columns, *moved])

    def bound_to(self, model: PreTrainedModel) -> Edit:
        """The same edit, known to be of a model in memory."""
        return replace(self, _bound=weakref.ref(model))

    # -- in a model ---------------------------------------------------------------------------

    def apply(self, model: PreTrainedModel | None = None) -> Self:
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
        return self._put_in(ledger, self, self.provenance)

    def _check_model(self, ledger: Ledger) -> None:
        found = ledger.fingerprint()
        if found != self.provenance.fingerprint:
            raise EditFileError(
                f"this edit was made for {self.provenance.model!r} (base fingerprint "
                f"{self.provenance.fingerprint[:12]}), not for this model "
                f"({ledger.parts.name!r}, {found[:12]}); weights, type or "
                "configuration differ. Load the model it was made for, in the same dtype"
            )

    def _described(self) -> dict[str, Any]:
        return description_of(self)

    def _ledger_of(self, model: PreTrainedModel) -> Ledger:
        return ledger_of(model)

    # -- on disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the edit as a safetensors file: factors, keys, facts, method and provenance.

        Raises EditFileError if it cannot be written.
        """
        place = as_path(path, "the path of the edit", EditFileError)
        write_safetensors(place, tensors_of(self), FORMAT, description_of(self), EditFileError)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit; apply it with ``.apply(model)``.

        Raises EditFileError if the file is missing, damaged, or not an edit.
        """
        place = as_path(path, "the path of the edit", EditFileError)
        tensors, meta = read_safetensors(place, FORMAT, EditFileError)
        return read(path, lambda: cls(**fields_of(tensors, meta)))

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

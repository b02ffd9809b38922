"""An edit of concepts: what was to become of which, the one map that does it, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from unified_edit.arguments import as_path
from unified_edit.concepts.concept_files import (
    FORMAT,
    RecordedConcepts,
    description_of,
    fields_of,
    tensors_of,
)
from unified_edit.concepts.cross_attention import Opened, Pipeline, opened
from unified_edit.concepts.unet_ledger import (
    InForce,
    UNetLedger,
    encoder_fingerprints,
    ledger_in,
    ledger_of_unet,
)
from unified_edit.editing.reversible import Reversible
from unified_edit.errors import EditError, EditFileError, UnifiedEditError
from unified_edit.model.hooks import lock_of
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective import Diagnosis, matmul

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class ConceptEdit(RecordedConcepts, Reversible[UNetLedger]):
    """An edit of concepts in a text-to-image pipeline, by `edit_concepts`, `debias` or `load`.

    concepts, preserved: as they were named. towards: for each concept its guide, or what of each
    attribute was added to it. texts: the texts of the columns: each concept in each phrasing.
    keys, residual: C and R (d_text x columns), what was solved for. preserved_keys: P (d_text x
    preserved, or one column for each token of each). text_map: D (d_text x d_text, as factors):
    every matrix W0 that reads text became W0 (I + D), rounded once. rounds: what debiasing
    measured.
    """

    _applied_to: ClassVar[str] = "pipeline"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the matrices that it changes."""
        return tuple(self.provenance.weights)

    @property
    def diagnosis(self) -> Diagnosis:
        """How well the problem was solved, in the space of the text's encodings."""
        return self.text_map.diagnosis

    def delta(self, name: str) -> Tensor:
        """Delta of a matrix of the bound pipeline by its name: W0 D (d_out x d_text, float64)."""
        if name not in self.provenance.weights:
            raise EditError(
                f"this edit does not touch {name!r}; it touches {', '.join(self.names)}"
            )
        return InForce(self, self.ledger).updates[name].delta

    @property
    def table(self) -> pd.DataFrame:
        """One row a text that was edited: text, towards, asked, missed.

        asked is norm(R) / norm(c), how far its key was to move in the space of encodings; missed is
        norm(D c - R) / norm(R), what is left of that.
        """
        import pandas as pd

        missed = (self._moved(self.keys) - self.residual).norm(dim=0)
        asked = self.residual.norm(dim=0)
        return pd.DataFrame(
            {
                "text": self.texts,
                "towards": [one for one in self.towards for _ in self.method.phrasings],
                "asked": (asked / self.keys.norm(dim=0)).tolist(),
                # a debiased concept may have been right from the beginning: it asked for nothing
                "missed": torch.where(asked > 0, missed / asked, missed).tolist(),
            }
        )

    @property
    def kept(self) -> pd.DataFrame:
        """One row a preserved concept: how far its keys move, norm(D P) / norm(P)."""
        import pandas as pd

        columns = self.preserved_keys.shape[1] // max(1, len(self.preserved))
        P = self.preserved_keys.unflatten(1, (len(self.preserved), columns))
        moved = self._moved(self.preserved_keys).unflatten(1, (len(self.preserved), columns))
        far = moved.norm(dim=(0, 2)) / P.norm(dim=(0, 2))
        return pd.DataFrame({"concept": self.preserved, "moved": far.tolist()})

    def _moved(self, X: Tensor) -> Tensor:
        """D X: what the encodings X (d_text x columns) are moved by."""
        return matmul(self.text_map.left, self.text_map.right @ X)

    # -- in a pipeline ------------------------------------------------------------------------

    def apply(self, pipeline: Pipeline | None = None) -> Self:
        """Put the edit into `pipeline`, or into the UNet it is bound to; return the edit.

        Raises EditError if it is already applied or changes nothing, EditFileError if the pipeline
        is not the one it was made for (its UNet or a text encoder), ModelChangedError if a matrix
        was changed by something else. The pipeline is then as it was.
        """
        if pipeline is None:
            ledger = self.ledger
        else:
            parts = opened(pipeline)
            ledger = ledger_in(parts)
            self._check_pipeline(parts, ledger)
        return self._put_in(ledger, InForce(self, ledger), self.provenance)

    def put_in(self, ledger: UNetLedger, instead: ConceptEdit | None = None) -> None:
        """Put an edit that was just made into its UNet, in the place of another one if given."""
        with lock_of(ledger.model):
            out = None if instead is None else instead.id
            earlier = tuple(one for one in ledger.active if one.id != out)
            self._activate(ledger, earlier, InForce(self, ledger), self.provenance)

    def _check_pipeline(self, parts: Opened, ledger: UNetLedger) -> None:
        made_for = self.provenance
        found = (ledger.fingerprint(), *encoder_fingerprints(parts))
        wanted = (made_for.fingerprint, *made_for.encoders)
        if found == wanted:
            return
        which = "unet" if found[0] != wanted[0] else "text encoder"
        raise EditFileError(
            f"this edit was made for {made_for.model!r}, not for this pipeline ({parts.name!r}): "
            f"the {which} differs in weights, type or configuration. Load the pipeline it was made "
            "for, in the same dtype"
        )

    def _described(self) -> dict[str, Any]:
        return description_of(self)

    def _ledger_of(self, model: nn.Module) -> UNetLedger:
        return ledger_of_unet(model)

    # -- on disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the edit as a safetensors file: its map, keys, concepts, method and provenance.

        Raises EditFileError if it cannot be written.
        """
        place = as_path(path, "the path of the edit", EditFileError)
        write_safetensors(place, tensors_of(self), FORMAT, description_of(self), EditFileError)

    @classmethod
    def load(cls, path: str | Path) -> ConceptEdit:
        """Read an edit; apply it with ``.apply(pipeline)``.

        Raises EditFileError if the file is missing, damaged, or not an edit of concepts.
        """
        place = as_path(path, "the path of the edit", EditFileError)
        tensors, meta = read_safetensors(place, FORMAT, EditFileError)
        try:
            return cls(**fields_of(tensors, meta))
        except (AttributeError, LookupError, TypeError, ValueError, UnifiedEditError) as problem:
            raise EditFileError(
                f"{path}: the description of the edit is incomplete or malformed ({problem!r}); "
                "make the edit again"
            ) from problem

    def __repr__(self) -> str:
        more = f" and {len(self.concepts) - 1} more" if len(self.concepts) > 1 else ""
        state = "applied" if self.is_applied else "not applied"
        return f"<ConceptEdit ({self.method.name}): {self.concepts[0]!r}{more}; {state}>"


def active_edits(pipeline: Pipeline) -> tuple[ConceptEdit, ...]:
    """The concept edits in force in a pipeline, in the order in which they were applied.

    Raises ModelError if it is none whose concepts can be edited.
    """
    entries = ledger_in(opened(pipeline)).entries
    return tuple(entry.edit for entry in entries if isinstance(entry.edit, ConceptEdit))

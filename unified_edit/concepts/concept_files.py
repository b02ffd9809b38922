"""What an edit of concepts is made of, and how a safetensors file holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.concepts.concept_methods import ConceptMethod
from unified_edit.editing.provenance import Touched
from unified_edit.objective import Diagnosis, Update

FORMAT = "unified_edit.concept_edit/1"


@dataclass(frozen=True)
class ConceptProvenance:
    """Where an edit of concepts comes from.

    fingerprint: of the base UNet; encoders: of the text encoders. state: what was in force when it
    was computed (`Ledger.state`). model: what the pipeline was called. library: this one's version.
    weights: {name: `Touched`} of each matrix. seed: of the pictures of debiasing; None without.
    """

    fingerprint: str
    encoders: tuple[str, ...]
    state: str
    model: str
    library: str
    weights: Mapping[str, Touched]
    seed: int | None = None


@dataclass(frozen=True)
class Round:
    """What debiasing measured once.

    shares: for each concept the share of pictures that shows each attribute. weights: for each
    concept what of each attribute's key stood in its target while they were made.
    """

    shares: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class RecordedConcepts:
    """What an edit of concepts is made of, in memory and in a file.

    See `ConceptEdit`.
    """

    concepts: tuple[str, ...]
    towards: tuple[str, ...]
    texts: tuple[str, ...]
    preserved: tuple[str, ...]
    method: ConceptMethod
    text_map: Update
    keys: Tensor
    residual: Tensor
    preserved_keys: Tensor
    provenance: ConceptProvenance
    rounds: tuple[Round, ...] = ()


_LISTS = ("concepts", "towards", "texts", "preserved")


def description_of(edit: RecordedConcepts) -> dict[str, Any]:
    """Everything about an edit but its matrices, as JSON can hold it."""
    return {
        **{name: list(getattr(edit, name)) for name in _LISTS},
        "method": edit.method.to_dict(),
        "diagnosis": asdict(edit.text_map.diagnosis),
        "provenance": asdict(edit.provenance),
        "rounds": [asdict(one) for one in edit.rounds],
    }


def tensors_of(edit: RecordedConcepts) -> dict[str, Tensor]:
    """Its matrices, by the names that they have in a file."""
    tensors = {"keys": edit.keys, "residual": edit.residual}
    if edit.preserved:
        tensors["preserved_keys"] = edit.preserved_keys
    if edit.text_map.is_dense:
        return {**tensors, "map": edit.text_map.delta}
    return {**tensors, "map.left": edit.text_map.left, "map.right": edit.text_map.right}


def fields_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a `ConceptEdit` is made of; raises whatever something that is none leads to."""
    past = meta["provenance"]
    weights = {name: Touched(**touched) for name, touched in past["weights"].items()}
    read_again = {"weights": weights, "encoders": tuple(past["encoders"])}
    fields: dict[str, Any] = {name: tuple(meta[name]) for name in _LISTS}
    keys, residual = tensors["keys"], tensors["residual"]
    preserved = tensors["preserved_keys"] if fields["preserved"] else keys.new_zeros(len(keys), 0)
    text_map = _map(tensors, Diagnosis(**meta["diagnosis"]))
    columns, kept = len(fields["texts"]), len(fields["preserved"])
    if kept and preserved.shape[1] % kept == 0:
        kept = preserved.shape[1]  # a column for each, or for each token of each
    shapes = {
        "keys": (keys, columns),
        "residual": (residual, columns),
        "preserved keys": (preserved, kept),
        "map": (text_map.right.mT, text_map.rank),
    }
    for name, (matrix, wide) in shapes.items():
        if matrix.shape != (len(text_map.left), wide) or not bool(matrix.isfinite().all()):
            raise ValueError(f"{name} of shape {tuple(matrix.shape)}")
    method = ConceptMethod.from_dict(meta["method"])
    named = len(fields["concepts"])
    if not named or len(fields["towards"]) != named or columns != named * len(method.phrasings):
        raise ValueError(f"{named} concepts, {len(fields['towards'])} guides, {columns} texts")
    if not weights:
        raise ValueError("no matrix is edited")
    return {
        **fields,
        "method": method,
        "text_map": text_map,
        "keys": keys,
        "residual": residual,
        "preserved_keys": preserved,
        "provenance": ConceptProvenance(**{**past, **read_again}),
        "rounds": tuple(
            Round(tuple(map(tuple, one["shares"])), tuple(map(tuple, one["weights"])))
            for one in meta["rounds"]
        ),
    }


def _map(tensors: Mapping[str, Tensor], diagnosis: Diagnosis) -> Update:
    if "map" in tensors:
        delta = tensors["map"]
        return Update(torch.eye(len(delta), dtype=delta.dtype), delta, diagnosis)
    return Update(tensors["map.left"], tensors["map.right"], diagnosis)

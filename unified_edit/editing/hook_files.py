"""Hook layers on disk: everything that they do and go on from, but for the sample of keys.

That is drawn again from the same texts when a loaded file is edited on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_edit.arguments import as_path
from unified_edit.editing.editor import Editor
from unified_edit.editing.hook_gates import HookLayer
from unified_edit.editing.hooks_beside import HookSettings
from unified_edit.editing.methods import Method
from unified_edit.errors import EditFileError, UnifiedEditError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy
from unified_edit.model.ledger import Ledger
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.objective import Metric
from unified_edit.statistics.collect import Source

FORMAT = "unified_edit.hook_layers/1"


@dataclass(frozen=True)
class Stored:
    """What a file holds. texts: hash of the texts to preserve; None for the default corpus."""

    layers: Mapping[int, HookLayer]
    settings: HookSettings
    method: Method
    source: Source
    facts: tuple[Fact, ...]
    batches: int
    seed: int
    on_shared_subject: Any
    on_conflict: Any
    texts: str | None


def digest_of(texts: Sequence[str] | None) -> str | None:
    """A hash of texts; None for none."""
    if texts is None:
        return None
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def write(path: str | Path, stored: Stored, editor: Editor, fingerprint: str) -> None:
    """Write hook layers of the editor's model, whole or not at all; EditFileError if that fails."""
    parts, tensors, thresholds = editor.parts, {}, {}
    for layer, hook in stored.layers.items():
        name = parts.weight(layer).name
        tensors[f"delta.{name}"], tensors[f"factor.{name}"] = hook.delta, hook.metric.factor
        if hook.metric.alive is not None:
            tensors[f"alive.{name}"] = hook.metric.alive
        thresholds[name] = hook.threshold
    description = {
        "thresholds": thresholds,
        "settings": asdict(stored.settings),
        "method": stored.method.to_dict(),
        "source": asdict(stored.source),
        "facts": [asdict(fact) for fact in stored.facts],
        "batches": stored.batches,
        "seed": stored.seed,
        "on_shared_subject": stored.on_shared_subject,
        "on_conflict": stored.on_conflict,
        "texts": stored.texts,
        "fingerprint": fingerprint,
        "model": parts.name,
        "revision": getattr(parts.model.config, "_commit_hash", None),
        "origin": parts.origin,
        "library": version("unified_edit"),
    }
    place = as_path(path, "the path of the hook layers", EditFileError)
    write_safetensors(place, tensors, FORMAT, description, EditFileError)


def read(path: str | Path, ledger: Ledger) -> Stored:
    """Read hook layers for the ledger's model.

    Raises EditFileError for a file that is missing, damaged, something else, or of another model.
    """
    place = as_path(path, "the path of the hook layers", EditFileError)
    tensors, meta = read_safetensors(place, FORMAT, EditFileError)
    found, wanted = ledger.fingerprint(), meta.get("fingerprint")
    if found != wanted:
        raise EditFileError(
            f"{path}: these hook layers were made beside {meta.get('model')!r} (base fingerprint "
            f"{str(wanted)[:12]}), not beside this model ({ledger.parts.name!r}, {found[:12]}); "
            "weights, type or configuration differ. Load the model they were made for, in the "
            "same dtype"
        )
    try:
        layers = {
            ledger.parts.named(name).layer: _layer(ledger.parts, tensors, name, float(threshold))
            for name, threshold in meta["thresholds"].items()
        }
        stored = Stored(
            layers=dict(sorted(layers.items())),
            settings=HookSettings(**meta["settings"]),
            method=Method.from_dict(meta["method"]),
            source=Source(**meta["source"]),
            facts=tuple(Fact(**fact) for fact in meta["facts"]),
            batches=int(meta["batches"]),
            seed=int(meta["seed"]),
            on_shared_subject=meta["on_shared_subject"],
            on_conflict=meta["on_conflict"],
            texts=meta["texts"],
        )
        if stored.method.layers != tuple(stored.layers) or not stored.facts:
            raise ValueError(f"layers {tuple(stored.layers)} of a method for {stored.method}")
    except (AttributeError, LookupError, TypeError, ValueError, UnifiedEditError) as problem:
        raise EditFileError(
            f"{path}: the description of the hook layers is incomplete or malformed ({problem!r}); "
            "make them again"
        ) from problem
    return stored


def _layer(parts: Anatomy, tensors: Mapping[str, Tensor], name: str, threshold: float) -> HookLayer:
    weight, delta = parts.named(name), tensors[f"delta.{name}"]
    metric = Metric.from_factor(
        tensors[f"factor.{name}"], tensors.get(f"alive.{name}"), weight.d_in
    )
    if tuple(delta.shape) != (weight.d_out, weight.d_in) or metric.dim != weight.d_in:
        raise ValueError(f"W_h - W0 of {name} is {tuple(delta.shape)}")
    if delta.dtype != torch.float64 or not bool(torch.isfinite(delta).all()):
        raise ValueError(f"W_h - W0 of {name} is not finite float64")
    return HookLayer(delta, metric, threshold)

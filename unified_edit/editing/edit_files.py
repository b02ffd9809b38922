"""An edit as a safetensors file: its description in JSON, its matrices, and both read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unified_edit.editing.kept import Kept
from unified_edit.editing.methods import Method
from unified_edit.editing.provenance import Outcome, Provenance, Spent, Touched
from unified_edit.editing.tuning import FineTuning
from unified_edit.errors import EditFileError, UnifiedEditError
from unified_edit.facts import Fact
from unified_edit.objective import Budget, Diagnosis, Update

FORMAT = "unified_edit.edit/2"


@dataclass(frozen=True, eq=False)
class Recorded:
    """What an edit is made of, in memory and in a file.

    See `Edit`.
    """

    facts: tuple[Fact, ...]
    method: Method | FineTuning
    updates: Mapping[str, Update]
    keys: Mapping[str, Tensor]
    outcomes: tuple[Outcome, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    kept: tuple[Kept, ...] = ()
    preserved_keys: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.facts))))


Read = TypeVar("Read", bound=Recorded)


def description_of(edit: Recorded) -> dict[str, Any]:
    """Everything about an edit but its matrices, as JSON can hold it."""
    described: dict[str, Any] = {
        "facts": [asdict(fact) for fact in edit.facts],
        "method": edit.method.to_dict(),
        "outcomes": [asdict(outcome) for outcome in edit.outcomes],
        "diagnosis": {name: asdict(one.diagnosis) for name, one in edit.updates.items()},
        "provenance": asdict(edit.provenance),
        "warnings": list(edit.warnings),
    }
    # where nothing was merged or split, as before there was a choice: edits keep their ids
    if described["provenance"]["on_shared_subject"] == "raise":
        del described["provenance"]["on_shared_subject"]
    else:
        described["columns"] = list(edit.columns)
    if edit.provenance.history is None:
        del described["provenance"]["history"], described["provenance"]["replaces"]
    if not edit.provenance.spent:
        del described["provenance"]["spent"]
    if edit.provenance.preserve is None:
        del described["provenance"]["preserve"]
    else:
        described["kept"] = [asdict(one) for one in edit.kept]
    return described


def tensors_of(edit: Recorded) -> dict[str, Tensor]:
    """Its matrices, by the names that they have in a file."""
    tensors = {f"keys.{name}": keys for name, keys in edit.keys.items()}
    tensors |= {f"targets.{name}": values for name, values in edit.targets.items()}
    tensors |= {f"preserved.{name}": keys for name, keys in edit.preserved_keys.items()}
    for name, update in edit.updates.items():
        if update.is_dense:
            tensors[f"delta.{name}"] = update.delta
        else:
            tensors[f"left.{name}"], tensors[f"right.{name}"] = update.left, update.right
    return tensors


def read(path: str | Path, make: Callable[[], Read]) -> Read:
    """The edit that `make` gives; EditFileError if what the file holds is not one."""
    try:
        edit = make()
        _check_complete(edit)
    except (AttributeError, LookupError, TypeError, ValueError, UnifiedEditError) as problem:
        raise EditFileError(
            f"{path}: the description of the edit is incomplete or malformed ({problem!r}); "
            "make the edit again"
        ) from problem
    return edit


def fields_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What an `Edit` is made of; raises whatever something that is none leads to."""
    past = meta["provenance"]
    read_again = {
        "weights": {name: Touched(**touched) for name, touched in past["weights"].items()},
        "prefixes": tuple(past["prefixes"]),
        "replaces": tuple((str(id_), int(column)) for id_, column in past.get("replaces", ())),
        "spent": {
            name: Spent(Budget(**one["budget"]), float(one["cost"]))
            for name, one in past.get("spent", {}).items()
        },
    }
    kind = FineTuning if "norm" in meta["method"] else Method
    names = list(meta["diagnosis"])
    with_history = past.get("history") is not None
    with_names = past.get("preserve") is not None
    return {
        "facts": tuple(Fact(**fact) for fact in meta["facts"]),
        "method": kind.from_dict(meta["method"]),
        "updates": {
            name: _update(tensors, name, Diagnosis(**diagnosis))
            for name, diagnosis in meta["diagnosis"].items()
        },
        "keys": {name: tensors[f"keys.{name}"] for name in names},
        "targets": {name: tensors[f"targets.{name}"] for name in names if with_history},
        "outcomes": tuple(
            Outcome(**{**one, "losses": tuple(one["losses"])}) for one in meta["outcomes"]
        ),
        "provenance": Provenance(**{**past, **read_again}),
        "warnings": tuple(meta["warnings"]),
        "columns": tuple(meta.get("columns", ())),
        "kept": tuple(map(_kept, meta["kept"])) if with_names else (),
        "preserved_keys": {name: tensors[f"preserved.{name}"] for name in names if with_names},
    }


def _kept(told: Mapping[str, Any]) -> Kept:
    item = told["item"]
    read = item if isinstance(item, str) else Fact(**item)
    lists = {"columns": tuple(told["columns"]), "moved": tuple(told["moved"])}
    return Kept(**{**told, "item": read, **lists})


def _check_complete(edit: Recorded) -> None:
    """Raise ValueError unless the parts of an edit that was read belong together."""
    if not edit.facts or len(edit.facts) != len(edit.outcomes):
        raise ValueError(f"{len(edit.facts)} facts and {len(edit.outcomes)} outcomes")
    wide = len(set(edit.columns))
    if sorted(set(edit.columns)) != list(range(wide)) or len(edit.columns) != len(edit.facts):
        raise ValueError(f"columns {edit.columns} for {len(edit.facts)} facts")
    if not edit.updates or set(edit.provenance.weights) != set(edit.updates):
        raise ValueError(f"Delta of {set(edit.updates)}, hashes of {edit.provenance.weights}")
    for name, update in edit.updates.items():
        shape = (update.right.shape[1], wide)
        if tuple(edit.keys[name].shape) != shape:
            raise ValueError(f"keys of {name} are {tuple(edit.keys[name].shape)}, not {shape}")
        asked = edit.targets.get(name)
        if asked is not None and tuple(asked.shape) != (len(update.left), wide):
            raise ValueError(f"targets of {name} are {tuple(asked.shape)}")
    named = {column for one in edit.kept for column in one.columns}
    for name, keys in edit.preserved_keys.items():
        shape = (edit.updates[name].right.shape[1], len(named))
        if named != set(range(len(named))) or tuple(keys.shape) != shape:
            raise ValueError(f"preserved keys of {name} are {tuple(keys.shape)}, not {shape}")
    if any(len(one.moved) != len(edit.updates) for one in edit.kept):
        raise ValueError(f"{len(edit.updates)} weights, but {edit.kept}")


def _update(tensors: Mapping[str, Tensor], name: str, diagnosis: Diagnosis) -> Update:
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

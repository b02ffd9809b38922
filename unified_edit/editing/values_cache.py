"""Values that are optimised once and kept: one file for each fact.

A file is found by everything that its values depend on (the model and its active edits, the
method's settings, the prefixes, the fact), and holds all of it, to be compared when it is read;
values of another model or method can not be used by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unified_edit.editing.editor import Editor
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.values import Values
from unified_edit.errors import EditFileError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.statistics import cache_folder

log = logging.getLogger(__name__)

FORMAT = "unified_edit.values/2"


def values_for(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    method: Method = EMMET,
    *,
    seed: int = 0,
) -> Values:
    """What `optimise_values` gives, from the cache; what is not there is optimised and kept.

    The same fact, method, seed and state of the model find the same file, below `cache_folder`,
    whatever other facts it is asked for with. A file that is damaged or holds something else is
    not used, but replaced. Raises what `optimise_values` raises.
    """
    editor = Editor(model, tokenizer, seed=seed)
    with quiet(model):
        plan = editor.plan(facts, method, batch=False)
        folder = cache_folder() / editor.ledger.fingerprint()[:20] / "values"
        layer = plan.layers[-1]
        shape = (plan.weights[-1].d_out, 1)
        wanted = {
            "conditions": plan.conditions,
            "layer": layer,
            "site": plan.method.site.name,
            "library": version("unified_edit"),
        }
        found = {
            fact: _read(folder, {**wanted, "fact": asdict(fact)}, shape) for fact in plan.facts
        }
        missing = [fact for fact, values in found.items() if values is None]
        if missing:
            made = editor.optimise_values(missing, method)
            for fact in missing:
                found[fact] = made.of([fact])
                _write(folder, {**wanted, "fact": asdict(fact)}, made.of([fact]))
        return Values.joined([one for fact in plan.facts if (one := found[fact]) is not None])


def _path(folder: Path, wanted: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:20]}.safetensors"


def _write(folder: Path, wanted: dict[str, Any], made: Values) -> None:
    tensors = {"delta": made.delta, "target_init": made.target_init}
    description = {**wanted, "losses": made.losses[0]}
    try:
        write_safetensors(_path(folder, wanted), tensors, FORMAT, description, EditFileError)
    except EditFileError as problem:
        log.warning("values are used, but not kept for the next time: %s", problem)


def _read(folder: Path, wanted: dict[str, Any], shape: tuple[int, int]) -> Values | None:
    """The values of one fact from its file; None if there is none, or it is of no use."""
    path = _path(folder, wanted)
    if not path.exists():
        return None
    try:
        tensors, description = read_safetensors(path, FORMAT, EditFileError)
        losses = description.pop("losses", None)
        if description != wanted:
            raise EditFileError(f"{path}: these values were optimised for something else")
        delta, init = tensors.get("delta"), tensors.get("target_init")
        if delta is None or init is None or not delta.shape == init.shape == shape or not losses:
            raise EditFileError(f"{path}: the values are incomplete")
    except EditFileError as problem:
        log.warning("cached values are not used: %s", problem)
        return None
    fact, layer, site = Fact(**wanted["fact"]), wanted["layer"], wanted["site"]
    return Values((fact,), layer, site, delta, init, (tuple(losses),), wanted["conditions"])

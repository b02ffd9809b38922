"""Values that are optimised once and kept: one file for each fact, or for the facts of one value.

A file is found by everything that its values depend on (the model and its active edits, the
method's settings, the prefixes, the fact), and holds all of it, to be compared when it is read;
values of another model or method can not be used by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unified_edit.editing.editor import Editor
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.plans import Plan
from unified_edit.editing.values import Values
from unified_edit.errors import EditFileError
from unified_edit.facts import Fact, SharedSubject, members_of
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.tensor_files import read_safetensors, write_safetensors
from unified_edit.statistics import cache_folder

log = logging.getLogger(__name__)

FORMAT = "unified_edit.values/2"
#: Values that are optimised before they are kept: what a kill costs at most.
TOGETHER = 256


def values_for(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    method: Method = EMMET,
    *,
    seed: int = 0,
    on_shared_subject: SharedSubject = "raise",
) -> Values:
    """What `optimise_values` gives, from the cache; what is not there is optimised and kept.

    The same fact (or the same facts, where they share a value), method, seed and state of the model
    find the same file, below `cache_folder`, whatever other facts it is asked for with. A file that
    is damaged or holds something else is not used, but replaced. Raises what `optimise_values`
    raises.
    """
    editor = Editor(model, tokenizer, seed=seed)
    with quiet(model):
        plan = editor.plan(facts, method, batch=False, on_shared_subject=on_shared_subject)
        folder = cache_folder() / editor.ledger.fingerprint()[:20] / "values"
        wanted, shape = made_from(plan), (plan.weights[-1].d_out, 1)
        groups = [tuple(plan.facts[i] for i in members) for members in members_of(plan.columns)]
        found = {group: kept_values(folder, wanted, group, shape) for group in groups}
        missing = [group for group, values in found.items() if values is None]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            made = editor.optimise_values(
                [fact for group in some for fact in group],
                method,
                on_shared_subject=on_shared_subject,
            )
            for group in some:
                found[group] = kept = made.of(group)
                try:
                    keep_values(folder, wanted, kept)
                except EditFileError as problem:
                    log.warning("values are used, but not kept for the next time: %s", problem)
        joined = Values.joined([one for group in groups if (one := found[group]) is not None])
        return joined if len(groups) == len(plan.facts) else joined.of(plan.facts)


def made_from(plan: Plan) -> dict[str, Any]:
    """What values are found again by, besides their facts: all that they depend on."""
    return {
        "conditions": plan.conditions,
        "layer": plan.method.value_layer,
        "site": plan.method.site.name,
        "library": version("unified_edit"),
    }


def values_path(folder: Path, wanted: dict[str, Any], facts: Sequence[Fact]) -> Path:
    """Where the value of one fact, or of some together, is kept."""
    text = json.dumps({**wanted, **_described(facts)}, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"


def _described(facts: Sequence[Fact]) -> dict[str, Any]:
    each = [asdict(fact) for fact in facts]
    return {"fact": each[0]} if len(each) == 1 else {"facts": each}


def keep_values(folder: Path, wanted: dict[str, Any], made: Values) -> None:
    """Keep the value of one fact, or of some together; EditFileError if it cannot be written."""
    path = values_path(folder, wanted, made.facts)
    tensors = {"delta": made.delta, "target_init": made.target_init}
    description = {**wanted, **_described(made.facts), "losses": made.losses[0]}
    write_safetensors(path, tensors, FORMAT, description, EditFileError)


def kept_values(
    folder: Path, wanted: dict[str, Any], facts: tuple[Fact, ...], shape: tuple[int, int]
) -> Values | None:
    """The value of one fact, or of some together, from its file.

    None if there is none, and, with a warning, if there is one that is of no use.
    """
    path = values_path(folder, wanted, facts)
    if not path.exists():
        return None
    wanted = {**wanted, **_described(facts)}
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
    return Values(
        facts,
        wanted["layer"],
        wanted["site"],
        delta,
        init,
        (tuple(losses),),
        wanted["conditions"],
        (0,) * len(facts),
    )

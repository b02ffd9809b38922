"""Values that are optimised once and kept: one file for each list of facts.

A file is found by everything that its values depend on (the model and its active edits, the
method's settings, the sampled prefixes, the facts), and holds all of it, to be compared when it is
read; values of another model or method can not be used by mistake.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unified_edit.editor import optimise_values, set_up, value_conditions
from unified_edit.errors import EditFileError
from unified_edit.facts import Fact
from unified_edit.files import read_safetensors, write_safetensors
from unified_edit.methods import EMMET, Method
from unified_edit.models import Tokenizer
from unified_edit.statistics_cache import cache_folder
from unified_edit.values import Values

log = logging.getLogger(__name__)

FORMAT = "unified_edit.values/1"


def values_for(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Sequence[Fact] | Fact,
    method: Method = EMMET,
    *,
    seed: int = 0,
) -> Values:
    """What `optimise_values` gives, from the cache; it is optimised and kept if it is not there.

    The same facts in the same order, method, seed and state of the model find the same file, below
    `cache_folder`. A file that is damaged or holds something else is not used, but replaced.
    Raises what `optimise_values` raises, and OSError if the file cannot be written.
    """
    parts, ledger, items, resolved = set_up(model, tokenizer, facts, method, batch=False)
    assert resolved.layers is not None
    prefixes = ledger.prefixes(tokenizer, resolved.contexts, seed)
    wanted = {
        "conditions": value_conditions(resolved, ledger.state(), prefixes),
        "layer": resolved.layers[-1],
        "site": resolved.site,
        "facts": [asdict(fact) for fact in items],
        "library": version("unified_edit"),
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / ledger.fingerprint()[:20] / f"values-{key[:20]}.safetensors"
    if path.exists():
        try:
            return _read(path, wanted, (parts.d_out, len(items)))
        except EditFileError as problem:
            log.warning("cached values are not used: %s", problem)
    made = optimise_values(model, tokenizer, items, resolved, seed=seed)
    tensors = {"delta": made.delta, "target_init": made.target_init}
    write_safetensors(path, tensors, FORMAT, {**wanted, "losses": made.losses})
    return made


def _read(path: Path, wanted: dict[str, Any], shape: tuple[int, int]) -> Values:
    """The values of a file; EditFileError unless they are those that are wanted."""
    tensors, description = read_safetensors(path, FORMAT, EditFileError)
    losses = description.pop("losses", None)
    if description != wanted:
        raise EditFileError(f"{path}: these values were optimised for something else; delete it")
    delta, init = tensors.get("delta"), tensors.get("target_init")
    if delta is None or init is None or not delta.shape == init.shape == shape or losses is None:
        raise EditFileError(f"{path}: the values are incomplete; delete it")
    return Values(
        tuple(Fact(**fact) for fact in description["facts"]),
        description["layer"],
        description["site"],
        delta,
        init,
        tuple(map(tuple, losses)),
        description["conditions"],
    )

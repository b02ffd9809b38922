"""Key statistics that are made once and kept: on disk a file for each model and layer, in memory
their factors.

A file is found by the fingerprint of the base model and the layer, and checked against both when
it is read; statistics of another model can not be used by mistake. What is found in memory is
neither read nor factored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import platformdirs
from transformers import PreTrainedModel

from unified_edit.arguments import as_path
from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.ledger import ledger_of
from unified_edit.model.memory import memory_of
from unified_edit.statistics.corpora import default_corpus, enough_tokens
from unified_edit.statistics.key_statistics import KeyStatistics
from unified_edit.statistics.sums import PARTIAL, room

log = logging.getLogger(__name__)

#: Environment variable that overrides where statistics are kept.
VARIABLE = "UNIFIED_EDIT_CACHE"


def cache_folder() -> Path:
    """``$UNIFIED_EDIT_CACHE`` (``~`` is the home folder), or the user's cache folder."""
    chosen = os.environ.get(VARIABLE) or platformdirs.user_cache_dir("unified_edit")
    return as_path(chosen, VARIABLE, StatisticsError)


def statistics_for(
    model: PreTrainedModel, tokenizer: Tokenizer, layers: Sequence[int]
) -> KeyStatistics:
    """C0 of `layers` from memory or the cache; what is missing is collected from the default
    corpus and kept.

    Raises StatisticsError if the default corpus cannot be had.
    """
    fingerprint, memory = ledger_of(model).fingerprint(), memory_of(model)
    parts = anatomy(model)
    layers = parts.check_layers(layers)
    folder = cache_folder() / fingerprint[:20]
    found = {layer: memory.get(("C0", fingerprint, layer)) for layer in layers}

    def keep(layer: int, one: KeyStatistics) -> None:
        path = _path(folder, layer)
        if path.exists() and 8 * one.width(layer) ** 2 * len(layers) > memory.limit:
            # too much for all layers together: C0 is read and factored where it is asked for
            found[layer] = one.unread(path)
            return
        # what is kept is the factor; C0 is read again where it is asked for
        one.metric(layer, parts.weight(layer).parameter.device)
        found[layer] = one.factored(path) if path.exists() else one
        memory.put(("C0", fingerprint, layer), found[layer], found[layer].nbytes)

    absent = []
    for layer in [layer for layer in layers if found[layer] is None]:
        one = _read(folder, layer, fingerprint, model)
        if one is None:
            absent.append(layer)
        else:
            keep(layer, one)
    if absent:
        for layer, one in _collected(model, tokenizer, absent, folder).items():
            keep(layer, one)
    return KeyStatistics.joined([found[layer] for layer in layers])


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _read(
    folder: Path, layer: int, fingerprint: str, model: PreTrainedModel
) -> KeyStatistics | None:
    """Statistics of one layer from its file; None, with a warning, if it is of no use."""
    path = _path(folder, layer)
    if not path.exists():
        return None
    try:
        loaded = KeyStatistics.load(path)
        loaded.check_model(fingerprint, anatomy(model).name)
        if loaded.counted is None:
            raise StatisticsError(
                f"{path} is of an older version, whose C0 lacked the keys set aside for its check"
            )
        if loaded.source.part is not None:
            raise StatisticsError(f"{path} is of a part of the text only")
        if loaded.source.skip_start:
            raise StatisticsError(f"{path} was collected without the first token of each text")
        if loaded.source.weighting != "tokens":
            raise StatisticsError(f"{path} was collected with another weighting of the tokens")
        return loaded.only(layer)
    except StatisticsError as problem:
        log.warning("cached statistics are not used: %s", problem)
        return None


def _collected(
    model: PreTrainedModel, tokenizer: Tokenizer, layers: list[int], folder: Path
) -> dict[int, KeyStatistics]:
    """Statistics of some layers from the default corpus, each written to its file."""
    parts, ledger = anatomy(model), ledger_of(model)
    if ledger.fingerprint(wholly=True)[:20] != folder.name:
        raise StatisticsError(
            "the model's weights were changed in a way that a glance did not show; call again: "
            "the statistics of the model as it is now are used"
        )
    log.info("collecting key statistics of layers %s (once; kept in %s)", layers, folder)
    # the name says what a run was: one that was interrupted does not stand in another's way
    run = hashlib.sha256(
        json.dumps([layers, version("unified_edit"), PARTIAL]).encode()
    ).hexdigest()
    made = KeyStatistics.collect(
        model,
        tokenizer,
        default_corpus(model),
        layers,
        tokens=enough_tokens(parts, layers),
        checkpoint=folder / f"partial-{run[:12]}.safetensors",
        max_memory=room(),
        folder=folder,
    )
    each = {layer: made.only(layer) for layer in layers}
    try:
        for layer, one in each.items():
            one.save(_path(folder, layer))
    except StatisticsError as problem:  # hours of work are not lost to a full disk
        log.warning("the statistics are used, but not kept for the next time: %s", problem)
    return each

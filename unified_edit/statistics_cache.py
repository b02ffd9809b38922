"""Key statistics that are made once and kept: one file a model and layer.

A file is found by the fingerprint of the base model and the layer, and checked against both when
it is read; statistics of another model can not be used by mistake.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs
from transformers import PreTrainedModel

from unified_edit.errors import StatisticsError
from unified_edit.key_statistics import KeyStatistics
from unified_edit.ledger import ledger_of
from unified_edit.models import Tokenizer, anatomy

log = logging.getLogger(__name__)

#: Environment variable that overrides where statistics are kept.
VARIABLE = "UNIFIED_EDIT_CACHE"
#: Tokens of the default corpus for each entry of a key. Ten are enough for edits (arXiv
#: 2506.04226); with twenty, the two halves of the text agree as well as `convergence` asks.
TOKENS_PER_DIMENSION = 20


def cache_folder() -> Path:
    """``$UNIFIED_EDIT_CACHE``, or the user's cache folder for unified_edit."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("unified_edit"))


def statistics_for(
    model: PreTrainedModel, tokenizer: Tokenizer, layers: Sequence[int]
) -> KeyStatistics:
    """C0 of `layers` from the cache; what is missing is collected from the default corpus.

    Raises StatisticsError if the default corpus cannot be had.
    """
    parts = anatomy(model)
    fingerprint = ledger_of(model).fingerprint()
    folder = cache_folder() / fingerprint[:20]
    found: dict[int, KeyStatistics] = {}
    for layer in layers:
        path = folder / f"layer-{layer}.safetensors"
        if not path.exists():
            continue
        try:
            loaded = KeyStatistics.load(path)
            loaded.check_model(fingerprint, str(model.config._name_or_path))
            loaded.C0(layer)
            found[layer] = loaded
        except StatisticsError as problem:
            log.warning("cached statistics are not used: %s", problem)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        log.info("collecting key statistics of layers %s (once; kept in %s)", missing, folder)
        made = KeyStatistics.collect(
            model,
            tokenizer,
            default_corpus(model),
            missing,
            tokens=TOKENS_PER_DIMENSION * parts.d_in,
            checkpoint=folder / "partial.safetensors",
        )
        for layer in missing:
            one = made.only(layer)
            one.save(folder / f"layer-{layer}.safetensors")
            found[layer] = one
    return KeyStatistics.joined([found[layer] for layer in layers])


def default_corpus(model: PreTrainedModel) -> Iterator[str]:
    """Texts of the kind the model was made for: atlas's own, WikiText-103 for all others.

    Raises StatisticsError where WikiText cannot be loaded from the Hugging Face Hub.
    """
    if str(model.config._name_or_path) == "atlas":
        from unified_edit.atlas.corpus import texts
        from unified_edit.atlas.knowledge import load_knowledge

        yield from texts(load_knowledge(), 4000)
        return
    try:
        from datasets import load_dataset

        lines = load_dataset(
            "Salesforce/wikitext", "wikitext-103-raw-v1", split="train", streaming=True
        )
        for line in lines:
            if len(line["text"]) > 200:  # headings and empty lines are no prose
                yield line["text"].strip()
    except Exception as problem:  # datasets, network and Hub raise many kinds
        raise StatisticsError(
            "there are no key statistics for this model in the cache, and the default corpus "
            f"(WikiText-103 from the Hugging Face Hub) could not be loaded: {problem}. Install "
            "'unified_edit[hub]' and connect once, or collect them from your own texts: "
            "stats = KeyStatistics.collect(model, tokenizer, texts, layers=[...]) and "
            "edit(..., statistics=stats)"
        ) from problem

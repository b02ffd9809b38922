"""The text that key statistics are collected from where a user gives none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files

from transformers import PreTrainedModel

from unified_edit.atlas.corpus import texts
from unified_edit.atlas.knowledge import load_knowledge
from unified_edit.errors import StatisticsError


def wikitext_extract() -> list[str]:
    """188 paragraphs of WikiText-2's validation part, which come with the library (CC BY-SA 3.0).

    About 32,000 tokens: enough for keys of up to 1,500 entries, and for trying things without a
    network. `unified_edit/data/SOURCES.md` names the articles.
    """
    text = (files("unified_edit") / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    return text.splitlines()


#: Name of a model whose weights are always the same -> the texts that are its own.
_OWN: dict[str, Callable[[], Iterable[str]]] = {
    "atlas": lambda: texts(load_knowledge(), 4000),
    "smollm2": wikitext_extract,
}


def default_corpus(model: PreTrainedModel) -> Iterator[str]:
    """Texts of the kind the model was made for: atlas's own, WikiText-103 for all others.

    For "smollm2", whose weights are always the same, the text is always the same too, and there
    without a network: `wikitext_extract`.

    Raises StatisticsError where WikiText cannot be loaded from the Hugging Face Hub.
    """
    if (own := _OWN.get(str(model.config._name_or_path))) is not None:
        yield from own()
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

"""Key statistics that cannot be collected, used, or gone on with; and an unchanged model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fixtures_refusals import (
    EVERY,
    ONE,
    TOWER,
    Interrupted,
    collect,
    essential,
    refused,
    with_moments,
)
from fixtures_tiny import LAYERS, unusual
from torch import nn

from unified_edit.editing import Editor, edit
from unified_edit.errors import ModelError, StatisticsError, StatisticsFileError
from unified_edit.statistics import KeyStatistics
from unified_edit.statistics.collect import GROUP

# --- statistics: the corpus ---


def test_too_few_tokens(tiny, tiny_tokenizer, tiny_texts) -> None:
    words = ("tokens", "fewer than 2*d_k = 96", "10*d_k = 480", "shrinkage")
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, tiny_texts[:9])
    with refused(tiny, StatisticsError, "no tokens", "more text"):
        collect(tiny, tiny_tokenizer, ["", ""], shrinkage=1e-2)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], ["0 tokens", "10*d_k"]),
        (["", "", ""], ["0 tokens", "10*d_k"]),
        (iter(()), ["0 tokens", "10*d_k"]),
        ("The tower is in Rome. " * 200, ["one str", "list of texts", "stands alone"]),
        (["a text", 5], ["number 1", "int", "not a string"]),
        (["a text", None], ["number 1", "NoneType", "not a string"]),
        ([["a", "text"]], ["number 0", "list", "not a string"]),
        ([b"bytes"], ["number 0", "bytes", "not a string"]),
        (b"bytes", ["bytes", "list of texts"]),
        (None, ["NoneType", "list of texts"]),
        (7, ["int", "list of texts"]),
        (["fine", "not \ud800 fine"], ["number 1", "Unicode"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_a_corpus_that_cannot_be_used(tiny, tiny_tokenizer, texts, words) -> None:
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, texts)


def test_a_text_that_breaks_off_later(tiny, tiny_tokenizer, tiny_texts) -> None:
    def broken() -> Iterator[str]:
        yield from tiny_texts * 2
        raise OSError("the disk is gone")

    with refused(tiny, OSError, "the disk is gone"):
        collect(tiny, tiny_tokenizer, broken())


def test_a_corpus_that_leaves_directions_out(tiny, tiny_tokenizer) -> None:
    words = ("layer 0", "no Cholesky factor", "more text", "shrinkage=")
    with refused(tiny, StatisticsError, *words):
        collect(tiny, tiny_tokenizer, ["Rome"] * 600)


@pytest.mark.parametrize("shrinkage", [-1e-3, float("nan"), float("inf"), "1e-3", None])
def test_a_wrong_shrinkage(tiny, tiny_tokenizer, tiny_texts, tiny_statistics, shrinkage) -> None:
    with refused(tiny, StatisticsError, "shrinkage", repr(shrinkage), ">= 0"):
        collect(tiny, tiny_tokenizer, tiny_texts, shrinkage=shrinkage)
    with refused(tiny, StatisticsError, "shrinkage", repr(shrinkage), ">= 0"):
        tiny_statistics.shrunk(shrinkage)


@pytest.mark.parametrize("field", ["max_tokens", "tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -5, 2.5, "9"])
def test_a_wrong_number_of_tokens(tiny, tiny_tokenizer, tiny_texts, field, value) -> None:
    with refused(tiny, StatisticsError, field, repr(value), "whole number"):
        collect(tiny, tiny_tokenizer, tiny_texts, **{field: value})


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_a_wrong_skip_start(tiny, tiny_tokenizer, tiny_texts, value) -> None:
    with refused(tiny, StatisticsError, "skip_start", repr(value), "True or False"):
        collect(tiny, tiny_tokenizer, tiny_texts, skip_start=value)


def test_texts_that_are_nothing_but_their_first_token(tiny, tiny_tokenizer, tiny_texts) -> None:
    with refused(tiny, StatisticsError, "skip_start", "max_tokens=1", "larger max_tokens"):
        collect(tiny, tiny_tokenizer, tiny_texts, skip_start=True, max_tokens=1)
    with refused(tiny, StatisticsError, "the corpus gave no tokens", "more text"):
        collect(tiny, tiny_tokenizer, ["T"] * 9, skip_start=True, shrinkage=1e-2)


@pytest.mark.parametrize("layers", [5, None, "0"], ids=repr)
def test_layers_that_are_no_list(tiny, tiny_tokenizer, tiny_texts, layers) -> None:
    with refused(tiny, ModelError, "layer", repr(layers), f"0..{LAYERS - 1}"):
        KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, layers)


# --- statistics: use and files ---


def test_statistics_of_another_model(tiny, make_gpt2, tiny_tokenizer, statistics_of) -> None:
    other = statistics_of(make_gpt2(seed=1))
    words = ("made from", "not from this model", "Collect them for this model")
    with refused(tiny, StatisticsError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=other)


def test_statistics_of_the_same_model_in_another_type(
    make_gpt2, tiny_tokenizer, tiny_statistics
) -> None:
    model = unusual(make_gpt2(dtype=torch.float64))
    with refused(model, StatisticsError, "not from this model"):
        edit(model, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)


def test_statistics_without_a_layer(tiny, tiny_tokenizer, tiny_statistics) -> None:
    words = ("layer 2", "(1,)", "KeyStatistics.collect", "layers=")
    with refused(tiny, StatisticsError, *words):
        edit(
            tiny, tiny_tokenizer, [TOWER], ONE.replace(layers=(2,)),
            statistics=tiny_statistics.only(1),
        )  # fmt: skip
    with refused(tiny, StatisticsError, "layer 7"):
        tiny_statistics.C0(7)


@EVERY
def test_statistics_of_the_wrong_size(tiny, tiny_tokenizer, tiny_statistics, method) -> None:
    small = {layer: moment[:40, :40] for layer, moment in tiny_statistics.moments.items()}
    stats = with_moments(tiny_statistics, small)
    with refused(tiny, StatisticsError, "40", "48", "layer", "collect"):
        edit(tiny, tiny_tokenizer, [TOWER], method, statistics=stats)


def test_statistics_that_are_not_positive_definite(tiny, tiny_tokenizer, tiny_statistics) -> None:
    bad = {layer: -moment for layer, moment in tiny_statistics.moments.items()}
    stats = with_moments(tiny_statistics, bad)
    with refused(tiny, StatisticsError, "layer 1", "no Cholesky factor", "more text"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=stats)


@pytest.mark.parametrize("damage", ["nan", "asymmetric"])
def test_statistics_that_are_no_second_moment(
    tiny, tiny_tokenizer, tiny_statistics, damage
) -> None:
    moments = {layer: moment.clone() for layer, moment in tiny_statistics.moments.items()}
    moments[1][0, 1] = float("nan") if damage == "nan" else 1e6
    stats = with_moments(tiny_statistics, moments)
    with refused(tiny, StatisticsError, "layer 1", "C0", "Collect"):
        edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=stats)


def test_shrinking_twice(tiny_statistics) -> None:
    with pytest.raises(StatisticsError, match=r"already shrunk by 0\.01"):
        tiny_statistics.shrunk(1e-3)


def test_joining_statistics_of_two_models(make_gpt2, tiny_statistics, statistics_of) -> None:
    with pytest.raises(StatisticsError, match="different models"):
        KeyStatistics.joined([tiny_statistics, statistics_of(make_gpt2(seed=1))])


def test_no_statistics_and_no_corpus(tiny, tiny_tokenizer, tmp_path, monkeypatch) -> None:
    """Offline, with an empty cache: the message says how to go on."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = ("cache", "WikiText-103", "could not be loaded", "KeyStatistics.collect", "statistics=")
    with refused(tiny, StatisticsError, *words):
        edit(tiny, tiny_tokenizer, [TOWER], ONE)


def test_damaged_statistics_in_the_cache_are_made_again(
    tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "unified_edit.statistics.cache.default_corpus", lambda model: iter(tiny_texts * 3)
    )
    first = edit(tiny, tiny_tokenizer, [TOWER], ONE).undo()
    (path,) = tmp_path.rglob("layer-1.safetensors")
    moment = KeyStatistics.load(path).C0(1)
    path.write_bytes(path.read_bytes()[:-9])
    Editor(tiny, tiny_tokenizer).memory.clear()  # as in a new process: only the file is left
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        second = edit(tiny, tiny_tokenizer, [TOWER], ONE)
    essential(caplog.text, (str(path), "not used"))
    assert second.id == first.id
    assert torch.equal(KeyStatistics.load(path).C0(1), moment)
    assert list(tmp_path.rglob("*partial*")) == []


# --- checkpoints ---


def reading(texts: list[str], until: int) -> Iterator[str]:
    """The texts, of which number `until` cannot be had."""
    yield from texts[:until]
    raise Interrupted("stopped")


@pytest.fixture
def interrupted(tiny, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch):
    """(checkpoint, texts) of a collection that was stopped after two groups of texts."""
    monkeypatch.setattr("unified_edit.statistics.collect.CHECKPOINT_TOKENS", 1)
    texts = [f"{text} {number}" for number in range(4) for text in tiny_texts]
    path = tmp_path / "partial.safetensors"
    with refused(tiny, Interrupted, "stopped"):
        collect(tiny, tiny_tokenizer, reading(texts, 2 * GROUP + 1), checkpoint=path)
    assert path.exists()
    return path, texts


def test_a_checkpoint_is_gone_on_from(tiny, tiny_tokenizer, interrupted) -> None:
    path, texts = interrupted
    resumed = collect(tiny, tiny_tokenizer, texts, checkpoint=path)
    assert not path.exists()
    whole = collect(tiny, tiny_tokenizer, texts)
    assert resumed.source == whole.source
    assert torch.equal(resumed.C0(1), whole.C0(1))


def test_a_checkpoint_of_something_else(tiny, make_gpt2, tiny_tokenizer, interrupted) -> None:
    path, texts = interrupted
    kept = path.read_bytes()

    def resume(model: nn.Module, texts: list[str], layers: list[int], **more: Any) -> None:
        KeyStatistics.collect(model, tiny_tokenizer, texts, layers, checkpoint=path, **more)

    words = (str(path), "delete it")
    other = make_gpt2(seed=1)
    with refused(other, StatisticsError, "another run", *words):
        resume(other, texts, [0, 1])
    with refused(tiny, StatisticsError, "another run", *words):
        resume(tiny, texts, [1])
    with refused(tiny, StatisticsError, "another run", *words):
        resume(tiny, texts, [0, 1], max_tokens=5)
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, ["changed", *texts[1:]], [0, 1])
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, texts[:300], [0, 1])  # fewer than were summed
    with refused(tiny, StatisticsError, "other texts", *words):
        resume(tiny, ["changed", *texts[1:]], [0, 1], tokens=300)
    assert path.read_bytes() == kept


def test_a_damaged_checkpoint(tiny, tiny_tokenizer, interrupted, statistics_file) -> None:
    path, texts = interrupted
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], ["damaged, truncated"]),
        (b"", ["damaged, truncated"]),
        (whole[:-5] + b"12345", ["checksum"]),
        (statistics_file.read_bytes(), ["needed here"]),
    ):
        path.write_bytes(content)
        with refused(tiny, StatisticsFileError, str(path), *words):
            collect(tiny, tiny_tokenizer, texts, checkpoint=path)

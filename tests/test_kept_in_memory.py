"""What is made from a model and kept: used again, never for another state, and gone with it."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from fixtures_refusals import FACTS, IN_TURN, ONE, SPREAD, TOWER, counted
from fixtures_tiny import byte_level_tokenizer

import unified_edit as ue
from unified_edit.editing import sample_prefixes
from unified_edit.model import Anatomy, Encoder, anatomy, ledger_of, memory_of, tensor_files
from unified_edit.statistics import KeyStatistics, statistics_for


@pytest.fixture
def corpus(tiny_texts, tmp_path, monkeypatch):
    """An empty cache, and a default corpus for the tiny models; the folder of the cache."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "cache"))
    place = "unified_edit.statistics.cache.default_corpus"
    monkeypatch.setattr(place, lambda model: iter(tiny_texts))
    return tmp_path / "cache"


class Work:
    """How often something costly was done since the last look."""

    def __init__(self, monkeypatch):
        self.calls = {}
        for name, owner, attribute in (
            ("factors", torch.linalg, "cholesky_ex"),
            ("reads", tensor_files, "safe_open"),
            ("collections", KeyStatistics, "collect"),
            ("sampled tokens", torch, "multinomial"),
            ("probes", Anatomy, "probe"),
        ):
            called, self.calls[name] = counted(getattr(owner, attribute))
            monkeypatch.setattr(owner, attribute, called)

    def look(self):
        found = {name: len(calls) for name, calls in self.calls.items() if calls}
        for calls in self.calls.values():
            calls.clear()
        return found


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


def test_another_layer_costs_what_that_layer_costs(tiny, tiny_tokenizer, corpus, work):
    ue.edit(tiny, tiny_tokenizer, [TOWER], ONE).undo()
    work.look()
    ue.edit(tiny, tiny_tokenizer, [TOWER], SPREAD).undo()
    found = work.look()
    assert found["collections"] == 1 and found["probes"] == 2
    assert {path.name for path in corpus.rglob("*.safetensors")} == {
        f"layer-{layer}.safetensors" for layer in range(3)
    }


def test_statistics_of_changed_weights_are_not_used(tiny, tiny_tokenizer, corpus, work):
    ue.edit(tiny, tiny_tokenizer, [TOWER], ONE).undo()
    work.look()
    with torch.no_grad():
        tiny.transformer.h[0].ln_1.bias[5] += 1e-3
    ue.edit(tiny, tiny_tokenizer, [TOWER], ONE)
    found = work.look()
    assert found["collections"] == 1 and found["probes"] == 1 and found["sampled tokens"] > 0


def test_a_change_that_a_glance_cannot_see_is_seen_before_anything_is_stored(
    tiny, tiny_tokenizer, corpus
):
    """Around torch's count of changes, and beside the sample."""
    ledger = ledger_of(tiny)
    before = ledger.fingerprint()
    tiny.transformer.wte.weight.data[0, 1] += 1.0
    assert ledger.fingerprint() == before, "the change is seen: this test shows nothing"
    with pytest.raises(ue.UnifiedEditError, match="a glance did not show; call again"):
        ue.edit(tiny, tiny_tokenizer, [TOWER], ONE)
    assert list(corpus.rglob("*.safetensors")) == []
    assert ledger.fingerprint() != before
    ue.edit(tiny, tiny_tokenizer, [TOWER], ONE)
    (folder,) = {path.parent for path in corpus.rglob("*.safetensors")}
    assert ledger.fingerprint().startswith(folder.name)


@pytest.mark.parametrize("method", [ONE, IN_TURN], ids=lambda method: method.name)
def test_each_text_goes_through_the_tokenizer_once(
    tiny, tiny_tokenizer, tiny_statistics, monkeypatch, method
):
    ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics).undo()
    called, calls = counted(type(tiny_tokenizer).__call__)
    monkeypatch.setattr(type(tiny_tokenizer), "__call__", called)
    ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics)
    texts = Counter()
    for (_, given, *_), _ in calls:
        texts.update([given] if isinstance(given, str) else given)
    del texts["a"]  # what a tokenizer adds to a text is read off this letter
    assert {fact.text for fact in FACTS} <= set(texts)
    assert {text: count for text, count in texts.items() if count > 1} == {}


# --- prefixes ---


def test_prefixes_are_those_of_weights_and_tokenizer(tiny, make_gpt2, tiny_tokenizer, tiny_texts):
    editor = ue.Editor(tiny, tiny_tokenizer)
    contexts = ue.Contexts(starts=("The", "I", ""), lengths=(5, 9))
    first = editor.prefixes(contexts)
    assert len(first) == contexts.count + 1 and first[0] == ""
    # a fresh model samples the same, and so does a fresh process: nothing else goes in
    fresh = make_gpt2()
    assert sample_prefixes(fresh, Encoder(tiny_tokenizer, anatomy(fresh)), contexts, 0) == first
    assert ue.Editor(fresh, tiny_tokenizer).prefixes(contexts) == first
    assert editor.prefixes(contexts, seed=1) != first
    kept = tiny.transformer.wte.weight[5].clone()
    with torch.no_grad():
        tiny.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    changed = editor.prefixes(contexts)
    assert changed != first
    with torch.no_grad():
        fresh.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    assert ue.Editor(fresh, tiny_tokenizer).prefixes(contexts) == changed
    assert torch.equal(kept, tiny.transformer.wte.weight[5])
    other = byte_level_tokenizer(tiny_texts[:40], 400)
    wanted = sample_prefixes(tiny, Encoder(other, anatomy(tiny)), contexts, 0)
    assert ue.Editor(tiny, other).prefixes(contexts) == wanted


def test_prefixes_are_sampled_from_the_base(tiny, tiny_tokenizer, tiny_statistics, work):
    editor = ue.Editor(tiny, tiny_tokenizer)
    contexts = ue.Contexts(starts=("The", "You"), lengths=(7,))
    first = editor.prefixes(contexts)
    strong = SPREAD.replace(clamp=20.0, ridge=0.0, steps=8)
    edit = ue.edit(tiny, tiny_tokenizer, FACTS, strong, statistics=tiny_statistics)
    work.look()
    assert editor.prefixes(contexts) == first
    assert work.look() == {}
    memory_of(tiny).clear()
    assert editor.prefixes(contexts) == first
    assert work.look()["sampled tokens"] > 0
    assert edit.is_applied


def test_nothing_is_said_about_statistics_that_are_found(tiny, tiny_tokenizer, corpus, caplog):
    with caplog.at_level(logging.INFO, logger="unified_edit"):
        statistics_for(tiny, tiny_tokenizer, [1])
        assert "collecting key statistics of layers [1]" in caplog.text
        caplog.clear()
        statistics_for(tiny, tiny_tokenizer, [1])
    assert caplog.text == ""

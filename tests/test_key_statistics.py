"""C0: against a direct computation, resumed, saved, matched, and judged."""

from __future__ import annotations

import pytest
import reference
import torch

import unified_edit as ue
from unified_edit.errors import StatisticsError
from unified_edit.model.ledger import ledger_of
from unified_edit.statistics import key_statistics

TOLERANCE = 1e-5  # keys and their products are float32; sums are float64


def direct(model, tokenizer, texts, layer):
    """The mean of k k' over all tokens but those set aside for the convergence check."""
    return reference.second_moment(model, tokenizer, texts, layer)


@pytest.fixture(scope="module")
def some_texts(atlas_texts):
    return atlas_texts[:600]


def test_c0_is_the_mean_second_moment(atlas, some_texts, monkeypatch):
    model, tokenizer = atlas
    monkeypatch.setattr(key_statistics, "FRESH_KEYS", 0)
    made = ue.KeyStatistics.collect(model, tokenizer, some_texts[:20], (0, 2), shrinkage=1e-3)
    for layer in (0, 2):
        wanted = direct(model, tokenizer, some_texts[:20], layer).double()
        wanted.diagonal().add_(1e-3 * wanted.diagonal().mean())
        assert float((made.C0(layer) - wanted).norm() / wanted.norm()) <= TOLERANCE
    assert made.source.tokens == sum(len(tokenizer(t)["input_ids"]) for t in some_texts[:20])


def test_batching_and_padding_do_not_matter(atlas, some_texts):
    model, tokenizer = atlas
    few = some_texts[:200]
    wide = ue.KeyStatistics.collect(model, tokenizer, few, (1,), shrinkage=1e-3)
    narrow = ue.KeyStatistics.collect(model, tokenizer, few, (1,), shrinkage=1e-3, batch_tokens=1)
    assert wide.source.tokens == narrow.source.tokens
    # which 256 keys are set aside depends on the batches: bounded by their share of the tokens
    share = 2 * key_statistics.FRESH_KEYS / wide.source.tokens
    difference = float((wide.C0(1) - narrow.C0(1)).norm() / wide.C0(1).norm())
    assert difference <= 5 * share


def test_edits_are_taken_out_while_collecting(atlas, atlas_statistics, some_texts):
    model, tokenizer = atlas
    plain = ue.KeyStatistics.collect(model, tokenizer, some_texts[:100], (1,), shrinkage=1e-3)
    fact = ue.Fact("{} was born in", "Marie Curie", "Italy")
    edit = ue.edit(
        model, tokenizer, fact, ue.EMMET.replace(layers=(0,)), statistics=atlas_statistics
    )
    weight = model.transformer.h[0].mlp.c_proj.weight.detach().clone()
    again = ue.KeyStatistics.collect(model, tokenizer, some_texts[:100], (1,), shrinkage=1e-3)
    assert torch.equal(plain.C0(1), again.C0(1))
    assert plain.source == again.source
    assert torch.equal(model.transformer.h[0].mlp.c_proj.weight, weight)
    assert edit.is_applied


def test_an_interrupted_run_goes_on(atlas, some_texts, tmp_path, monkeypatch):
    model, tokenizer = atlas
    monkeypatch.setattr(key_statistics, "GROUP", 50)
    monkeypatch.setattr(key_statistics, "CHECKPOINT_TOKENS", 1)
    whole = ue.KeyStatistics.collect(model, tokenizer, some_texts, (1,))

    def broken():
        for number, text in enumerate(some_texts):
            if number == 275:
                raise KeyboardInterrupt
            yield text

    path = tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        ue.KeyStatistics.collect(model, tokenizer, broken(), (1,), checkpoint=path)
    assert path.exists()
    other = ["another text altogether"] * 600
    with pytest.raises(StatisticsError, match="other texts"):
        ue.KeyStatistics.collect(model, tokenizer, other, (1,), checkpoint=path)
    with pytest.raises(StatisticsError, match="another run"):
        ue.KeyStatistics.collect(model, tokenizer, some_texts, (2,), checkpoint=path)
    seen = []
    run = key_statistics._add_group
    monkeypatch.setattr(
        key_statistics, "_add_group", lambda *a, **k: seen.append(len(a[2])) or run(*a, **k)
    )
    resumed = ue.KeyStatistics.collect(model, tokenizer, some_texts, (1,), checkpoint=path)
    assert sum(seen) == len(some_texts) - 250
    assert torch.equal(resumed.C0(1), whole.C0(1))
    assert resumed.source == whole.source
    assert resumed.agreement == whole.agreement
    assert not path.exists()


def test_save_and_load(atlas_statistics, tmp_path):
    atlas_statistics.save(tmp_path / "c0.safetensors")
    loaded = ue.KeyStatistics.load(tmp_path / "c0.safetensors")
    assert loaded.source == atlas_statistics.source
    assert loaded.agreement == atlas_statistics.agreement
    for layer in atlas_statistics.layers:
        assert torch.equal(loaded.C0(layer), atlas_statistics.C0(layer))


def test_they_belong_to_one_model(atlas, atlas_statistics):
    other, tokenizer = ue.load_model("atlas")
    with torch.no_grad():
        other.transformer.h[5].ln_1.bias[0] += 1e-3
    fact = ue.Fact("{} was born in", "Marie Curie", "Italy")
    with pytest.raises(StatisticsError, match="made from 'atlas'"):
        ue.edit(other, tokenizer, fact, ue.EMMET, statistics=atlas_statistics)
    assert ledger_of(other).active == ()


def test_convergence_with_the_default_corpus(atlas_statistics):
    """More than ten tokens for each entry of a key: halves of the text agree to 10 %."""
    for layer in atlas_statistics.layers:
        assert 0 < atlas_statistics.convergence(layer) <= 0.15


def test_convergence_tells_little_text_from_much(atlas, atlas_texts):
    model, tokenizer = atlas
    d = model.config.n_inner
    agreement = [
        ue.KeyStatistics.collect(
            model, tokenizer, atlas_texts, (0,), tokens=factor * d, shrinkage=1e-6
        ).convergence(0)
        for factor in (3, 27)  # it falls like one over the square root
    ]
    assert agreement[0] > 2 * agreement[1]


def test_shrinkage_is_explicit_and_recorded(atlas, atlas_texts):
    model, tokenizer = atlas
    with pytest.raises(StatisticsError, match=r"fewer than 2\*d_k"):
        ue.KeyStatistics.collect(model, tokenizer, atlas_texts[:10], (0,))
    made = ue.KeyStatistics.collect(model, tokenizer, atlas_texts[:10], (0,), shrinkage=0.5)
    assert made.source.shrinkage == 0.5
    with pytest.raises(StatisticsError, match="already shrunk"):
        made.shrunk(0.1)

"""C0: against a direct computation, resumed, saved, matched, judged, and kept."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import reference
import torch
from fixtures_tiny import END
from tokenizers import processors
from torch import nn

import unified_edit as ue
from unified_edit.errors import StatisticsError, StatisticsFileError
from unified_edit.model import ledger_of
from unified_edit.statistics import cache, collect, corpora, statistics_for, sums

TOLERANCE = 1e-5  # keys and their products are float32; sums are float64


@pytest.fixture(params=["gpt2", "gptj"])
def tiny_model(request, make_gpt2, make_gptj):
    return {"gpt2": make_gpt2, "gptj": make_gptj}[request.param]()


def compare(model, tokenizer, texts, layers):
    """Hold C0 of some texts against the mean of k k' over all of their tokens."""
    made = ue.KeyStatistics.collect(model, tokenizer, texts, layers, shrinkage=1e-3)
    for layer in layers:
        wanted = reference.second_moment(model, tokenizer, texts, layer).double()
        wanted.diagonal().add_(1e-3 * wanted.diagonal().mean())
        assert float((made.C0(layer) - wanted).norm() / wanted.norm()) <= TOLERANCE
    assert made.source.tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)


def test_c0_is_the_mean_second_moment(tiny_model, tiny_tokenizer, tiny_texts, monkeypatch):
    monkeypatch.setattr(collect, "FRESH_KEYS", 0)
    texts = tiny_texts[::9]
    assert len({len(tiny_tokenizer(text)["input_ids"]) for text in texts}) > 1  # there is padding
    compare(tiny_model, tiny_tokenizer, texts, (0, 2))


def test_c0_of_atlas_is_the_mean_second_moment(atlas, atlas_texts, monkeypatch):
    monkeypatch.setattr(collect, "FRESH_KEYS", 0)
    compare(*atlas, atlas_texts[:2], (1,))


def test_batching_and_padding_do_not_matter(tiny_model, tiny_tokenizer, tiny_texts, monkeypatch):
    def made(**options):
        return ue.KeyStatistics.collect(
            tiny_model, tiny_tokenizer, tiny_texts, (1,), shrinkage=1e-3, **options
        )

    # which keys are set aside depends on the batches, so here none are
    monkeypatch.setattr(collect, "FRESH_KEYS", 0)
    wide, narrow = made(), made(batch_tokens=1)
    assert wide.source.tokens == narrow.source.tokens
    difference = float((wide.C0(1) - narrow.C0(1)).norm() / wide.C0(1).norm())
    assert difference <= TOLERANCE


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
def test_c0_without_the_first_token(
    tiny_model, tiny_tokenizer, tiny_texts, tmp_path, monkeypatch, bos
):
    """BOS where there is one, else the first word: of every text of every length, and no other."""
    monkeypatch.setattr(collect, "FRESH_KEYS", 0)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", special_tokens=[(END, 0)]
        )
    texts = [*tiny_texts[::9], "T", ""]  # a text of one token, and one of none
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert len(set(lengths)) > 3 and lengths[-1] == bos
    made = ue.KeyStatistics.collect(
        tiny_model, tokenizer, texts, (0, 2), skip_start=True, shrinkage=1e-3
    )
    for layer in (0, 2):
        wanted = reference.second_moment(tiny_model, tokenizer, texts, layer, skip=1).double()
        wanted.diagonal().add_(1e-3 * wanted.diagonal().mean())
        assert float((made.C0(layer) - wanted).norm() / wanted.norm()) <= TOLERANCE
    assert made.source.tokens == sum(lengths) - sum(map(bool, lengths))
    assert "skip_start=True" in repr(made)
    made.save(tmp_path / "c0.safetensors")
    assert ue.KeyStatistics.load(tmp_path / "c0.safetensors").source == made.source


def test_the_first_token_is_in_c0_unless_it_is_left_out(
    make_gpt2, tiny_tokenizer, tiny_texts, tmp_path, small_groups, monkeypatch
):
    """The sums say whether it is: one checkpoint does not serve for the other, nor one layer."""
    model, path = make_gpt2(), tmp_path / "partial.safetensors"

    def made(texts, **options):
        return ue.KeyStatistics.collect(model, tiny_tokenizer, texts, (1,), **options)

    for skip, other in ((True, False), (False, True)):
        with pytest.raises(KeyboardInterrupt):
            made(until(tiny_texts, 115), checkpoint=path, skip_start=skip)
        with pytest.raises(StatisticsError, match="another run"):
            made(tiny_texts, checkpoint=path, skip_start=other)
        resumed = made(tiny_texts, checkpoint=path, skip_start=skip)
        assert torch.equal(resumed.C0(1), made(tiny_texts, skip_start=skip).C0(1))
        assert resumed.source.skip_start is skip
    whole, less = made(tiny_texts), made(tiny_texts, skip_start=True)
    assert whole.source.skip_start is False
    assert whole.source.tokens - less.source.tokens == len(tiny_texts)
    with pytest.raises(StatisticsError, match="with the same skip_start"):
        ue.KeyStatistics.joined([whole, less])
    # it is what is counted that is drawn
    few = made(tiny_texts, tokens=300, skip_start=True)
    assert 300 <= few.source.tokens < 320


def test_sums_that_memory_has_no_room_for_lie_beside_the_cache(
    make_gpt2, tiny_tokenizer, folder, corpus, monkeypatch
):
    wanted = statistics_for(make_gpt2(), tiny_tokenizer, (0, 1))
    for path in folder.rglob("layer-*"):
        path.unlink()
    made, usual = [], sums.in_file
    monkeypatch.setattr(sums, "in_file", lambda *given: made.append(given) or usual(*given))
    monkeypatch.setattr(sums, "free_bytes", lambda _device: 0)
    found = statistics_for(make_gpt2(), tiny_tokenizer, (0, 1))
    assert {place for place, _ in made} == {path.parent for path in folder.rglob("layer-*")}
    for layer in (0, 1):
        assert torch.equal(found.C0(layer), wanted.C0(layer))
    assert not [path for path in folder.rglob("*") if ".sums" in path.name]


def test_statistics_without_the_first_token_are_not_taken_from_the_cache(
    make_gpt2, tiny_tokenizer, tiny_texts, folder, corpus, caplog
):
    wanted = statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    (path,) = folder.rglob("layer-1*")
    less = ue.KeyStatistics.collect(
        make_gpt2(), tiny_tokenizer, tiny_texts, (1,), skip_start=True
    )  # fmt: skip
    less.save(path)
    with caplog.at_level(logging.WARNING):
        again = statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    assert "cached statistics are not used" in caplog.text
    assert "without the first token" in caplog.text
    assert torch.equal(again.C0(1), wanted.C0(1))


def test_edits_are_taken_out_while_collecting(
    make_gpt2, tiny_tokenizer, tiny_texts, tiny_statistics
):
    model, texts = make_gpt2(), tiny_texts[:60]
    plain = ue.KeyStatistics.collect(model, tiny_tokenizer, texts, (1,), shrinkage=1e-3)
    edit = ue.edit(
        model, tiny_tokenizer, ue.Fact("The {} is in the city of", "old tower", "Rome"),
        ue.EMMET.replace(layers=(0,), steps=3), statistics=tiny_statistics,
    )  # fmt: skip
    weight = model.transformer.h[0].mlp.c_proj.weight.detach().clone()
    again = ue.KeyStatistics.collect(model, tiny_tokenizer, texts, (1,), shrinkage=1e-3)
    assert torch.equal(plain.C0(1), again.C0(1))
    assert plain.source == again.source
    assert torch.equal(model.transformer.h[0].mlp.c_proj.weight, weight)
    assert edit.is_applied


# --- interrupted runs -----------------------------------------------------------------------------


@pytest.fixture
def small_groups(monkeypatch):
    """Checkpoints after every twenty texts."""
    monkeypatch.setattr(collect, "GROUP", 20)
    monkeypatch.setattr(collect, "CHECKPOINT_TOKENS", 1)


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list of how many rows each forward inside was given."""
    rows: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, keywords: rows.append(len(keywords["input_ids"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def until(texts, number):
    """The texts up to one, where the run is interrupted."""
    yield from texts[:number]
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(make_gpt2, tiny_tokenizer, tiny_texts, tmp_path, small_groups):
    model, path = make_gpt2(), tmp_path / "partial.safetensors"
    whole = ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, (1,))
    with pytest.raises(KeyboardInterrupt):
        ue.KeyStatistics.collect(
            model, tiny_tokenizer, until(tiny_texts, 115), (1,), checkpoint=path
        )
    assert path.exists()
    other = ["another text altogether"] * 300
    with pytest.raises(StatisticsError, match="other texts"):
        ue.KeyStatistics.collect(model, tiny_tokenizer, other, (1,), checkpoint=path)
    with pytest.raises(StatisticsError, match="other texts"):
        ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts[:50], (1,), checkpoint=path)
    with pytest.raises(StatisticsError, match="another run"):
        ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, (2,), checkpoint=path)
    with counted_rows(model) as rows:
        resumed = ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, (1,), checkpoint=path)
    assert sum(rows) == len(tiny_texts) - 100
    assert torch.equal(resumed.C0(1), whole.C0(1))
    assert resumed.source == whole.source
    assert resumed.agreement == whole.agreement
    assert not path.exists()


def test_a_checkpoint_that_cannot_be_written_is_no_failure(
    make_gpt2, tiny_tokenizer, tiny_texts, tmp_path, small_groups, caplog
):
    (tmp_path / "file").write_text("not a folder")
    whole = ue.KeyStatistics.collect(make_gpt2(), tiny_tokenizer, tiny_texts, (1,))
    with caplog.at_level(logging.WARNING):
        made = ue.KeyStatistics.collect(
            make_gpt2(), tiny_tokenizer, tiny_texts, (1,),
            checkpoint=tmp_path / "file" / "partial.safetensors",
        )  # fmt: skip
    assert torch.equal(made.C0(1), whole.C0(1))
    assert "no checkpoint of the key statistics" in caplog.text
    assert (tmp_path / "file").read_text() == "not a folder"


# --- kept on disk and in memory -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def corpus(monkeypatch, tiny_texts):
    """Stands for the default corpus; `corpus(texts)` changes it."""

    def give(texts):
        monkeypatch.setattr(cache, "default_corpus", lambda _model: iter(texts))

    give(tiny_texts)
    return give


def never():
    """Texts that may not be asked for."""
    pytest.fail("statistics were collected again")
    yield


def test_interrupted_runs_with_other_layers_do_not_block_each_other(
    make_gpt2, tiny_tokenizer, tiny_texts, folder, corpus, small_groups
):
    model = make_gpt2()
    wanted = statistics_for(make_gpt2(), tiny_tokenizer, (0, 1))
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    for layers in ((0,), (1,), (0, 1)):
        corpus(until(tiny_texts, 55))
        with pytest.raises(KeyboardInterrupt):
            statistics_for(model, tiny_tokenizer, layers)
    assert len(list(folder.rglob("partial-*"))) == 3
    corpus(tiny_texts)
    for layer in (1, 0):
        with counted_rows(model) as rows:
            made = statistics_for(model, tiny_tokenizer, (layer,))
        assert 0 < sum(rows) <= made.source.texts - 40  # it went on where it had stopped
        # of the same texts, one layer or two at a time
        assert torch.equal(made.C0(layer), wanted.C0(layer))
    corpus(never())
    both = statistics_for(make_gpt2(), tiny_tokenizer, (0, 1))
    assert all(torch.equal(both.C0(layer), wanted.C0(layer)) for layer in (0, 1))


def test_what_is_in_memory_is_neither_collected_nor_read_again(
    make_gpt2, tiny_tokenizer, folder, corpus
):
    model = make_gpt2()
    first = statistics_for(model, tiny_tokenizer, (1, 2))
    corpus(never())
    for path in folder.rglob("layer-*"):
        path.write_bytes(b"no")
    again = statistics_for(model, tiny_tokenizer, (2,))
    assert again.metric(2) is first.metric(2)
    assert again.layers == (2,)


def unwritable(tmp_path, monkeypatch):
    """A folder that may not be written to."""
    tmp_path.chmod(0o500)
    return tmp_path


def a_file(tmp_path, monkeypatch):
    """A file in the place of the folder."""
    (tmp_path / "cache").write_text("not a folder")
    return tmp_path / "cache"


def below_a_file(tmp_path, monkeypatch):
    """A folder that cannot be made."""
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "cache"


def full(tmp_path, monkeypatch):
    """A folder on a full disk."""

    def no_room(*_arguments, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unified_edit.model.tensor_files.save_file", no_room)
    return tmp_path


#: Whoever may write anywhere, as in a container, has no folder that is not writable.
ROOT_USER = getattr(os, "geteuid", lambda: 1)() == 0


@pytest.mark.parametrize(
    "place", [a_file, below_a_file, full, *([] if ROOT_USER else [unwritable])]
)
def test_statistics_that_cannot_be_kept_are_used_all_the_same(
    place, make_gpt2, tiny_tokenizer, tmp_path, monkeypatch, corpus, small_groups, caplog
):
    model = make_gpt2()
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(place(tmp_path, monkeypatch)))
    with caplog.at_level(logging.WARNING):
        made = statistics_for(model, tiny_tokenizer, (1,))
    assert "not kept for the next time" in caplog.text
    assert "no checkpoint" in caplog.text
    wanted = ue.KeyStatistics.collect(
        make_gpt2(), tiny_tokenizer, list(cache.default_corpus(model)), (1,),
        tokens=corpora.TOKENS_PER_DIMENSION * 48,
    )  # fmt: skip
    assert torch.equal(made.C0(1), wanted.C0(1))
    corpus(never())
    assert torch.equal(statistics_for(model, tiny_tokenizer, (1,)).C0(1), wanted.C0(1))
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("place", [a_file, below_a_file, full])
def test_statistics_that_cannot_be_saved_say_why(place, tiny_statistics, tmp_path, monkeypatch):
    path = place(tmp_path, monkeypatch) / "c0.safetensors"
    with pytest.raises(StatisticsFileError, match="cannot be written"):
        tiny_statistics.save(path)


@pytest.mark.parametrize("spoil", [b"no", b""])
def test_a_damaged_file_is_collected_anew(make_gpt2, tiny_tokenizer, folder, corpus, caplog, spoil):
    wanted = statistics_for(make_gpt2(), tiny_tokenizer, (1,)).C0(1)
    (path,) = folder.rglob("layer-1*")
    path.write_bytes(spoil)
    with caplog.at_level(logging.WARNING):
        made = statistics_for(make_gpt2(), tiny_tokenizer, (1,))
    assert f"cached statistics are not used: {path}" in caplog.text
    assert torch.equal(made.C0(1), wanted)
    assert torch.equal(ue.KeyStatistics.load(path).C0(1), wanted)


def test_save_and_load(tiny_statistics, tmp_path):
    tiny_statistics.save(tmp_path / "c0.safetensors")
    loaded = ue.KeyStatistics.load(tmp_path / "c0.safetensors")
    assert loaded.source == tiny_statistics.source
    assert loaded.agreement == tiny_statistics.agreement
    for layer in tiny_statistics.layers:
        assert torch.equal(loaded.C0(layer), tiny_statistics.C0(layer))


# --- whose they are, and what they are worth ------------------------------------------------------


def test_they_belong_to_one_model(make_gpt2, tiny_tokenizer, tiny_statistics):
    other = make_gpt2()
    with torch.no_grad():
        other.transformer.h[3].ln_1.bias[0] += 1e-3
    fact = ue.Fact("{} was born in", "Rome", "Oslo")
    method = ue.EMMET.replace(layers=(1,))
    with pytest.raises(StatisticsError, match="made from"):
        ue.edit(other, tiny_tokenizer, fact, method, statistics=tiny_statistics)
    assert ledger_of(other).active == ()


def test_the_default_corpus_is_enough_and_a_fifth_of_it_is_not(atlas, atlas_texts):
    model, tokenizer = atlas
    much = statistics_for(model, tokenizer, (1,))
    width = model.config.n_inner
    assert much.source.tokens >= corpora.TOKENS_PER_DIMENSION * width
    assert 0 < much.convergence(1) <= 0.1
    little = ue.KeyStatistics.collect(
        model, tokenizer, atlas_texts, (1,), tokens=corpora.TOKENS_PER_DIMENSION // 5 * width
    )
    # it falls at least like one over the square root of the tokens
    assert little.convergence(1) > 5**0.5 * much.convergence(1)


def test_shrinkage_is_explicit_and_recorded(make_gpt2, tiny_tokenizer, tiny_texts):
    model, few = make_gpt2(), tiny_texts[:9]
    with pytest.raises(StatisticsError, match=r"fewer than 2\*d_k"):
        ue.KeyStatistics.collect(model, tiny_tokenizer, few, (0,))
    made = ue.KeyStatistics.collect(model, tiny_tokenizer, few, (0,), shrinkage=0.5)
    assert made.source.shrinkage == 0.5
    with pytest.raises(StatisticsError, match="already shrunk"):
        made.shrunk(0.1)


def test_what_the_first_tokens_are_in_c0_of_a_real_model():
    """The figures and the spectra that `benchmarks/sinks.py` committed are those of one run."""
    root = Path(__file__).resolve().parents[1]
    figures, spectra = (
        json.loads((root / folder / "sinks.json").read_text(encoding="utf-8"))
        for folder in ("benchmarks/results", "book/data")
    )
    assert figures["command"] == spectra["command"]
    assert figures["command"].startswith("python benchmarks/sinks.py --texts wiki.valid.raw")
    for layer, each in figures["layers"].items():
        for name, found in each.items():
            values = spectra["eigenvalues of C0, descending"][layer][name]
            assert len(values) == 1536 and values == sorted(values, reverse=True)
            share = found["share of the largest eigenvalue"]
            assert values[0] / sum(values) == pytest.approx(share, rel=6e-3)
            assert values[0] / values[-1] == pytest.approx(found["condition"], rel=6e-3)
    sink = figures["layers"]["11"]
    moved = "moved at the first token, over |r|"
    pairs = zip(*(each[moved] for each in sink.values()), strict=True)
    assert all(held < 0.1 * free for held, free in pairs)

"""The owner of an opened model: what is made once, how long it is kept, and what an edit tells."""

from __future__ import annotations

import builtins
import gc
import logging
import math
import weakref

import pytest
import torch
from fixtures_refusals import (
    EVERY,
    FACTS,
    IN_TURN,
    ONE,
    OSLO,
    SPREAD,
    TOWER,
    VIENNA,
    counted,
    refused,
    with_moments,
)
from fixtures_tiny import assert_unchanged, snapshot
from safetensors import safe_open

import unified_edit as ue
from unified_edit.editing import Contexts, Editor, Outcome, compute_keys
from unified_edit.errors import NullSpaceError
from unified_edit.model import Anatomy, Memory, anatomy, ledger_of, memory_of
from unified_edit.statistics import statistics_for


@pytest.fixture
def cached(monkeypatch, tmp_path, tiny_texts):
    """The folder of an empty cache, and a default corpus that takes a second."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "unified_edit.statistics.cache.default_corpus", lambda model: iter(tiny_texts * 3)
    )
    return tmp_path


@pytest.fixture
def work(monkeypatch):
    """{what costs: the calls of it, from now on}."""
    calls = {}
    for where, name in (
        (torch.linalg, "cholesky_ex"),
        (builtins, "open"),
        (Anatomy, "probe"),
        (ue.KeyStatistics, "collect"),
        (torch, "multinomial"),
    ):
        wrapped, calls[name] = counted(getattr(where, name))
        monkeypatch.setattr(where, name, wrapped)
    place = "unified_edit.model.tensor_files.safe_open"
    wrapped, calls["safe_open"] = counted(safe_open)
    monkeypatch.setattr(place, wrapped)
    return calls


# --- what is made once ---


def test_a_second_edit_reads_and_factors_nothing(tiny, tiny_tokenizer, cached, work) -> None:
    """Statistics, prefixes and the probe are the model's: any editor of it finds them."""
    first = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE)
    assert (cached / first.provenance.fingerprint[:20] / "layer-1.safetensors").exists()
    for name in ("cholesky_ex", "probe", "collect", "multinomial"):
        assert work[name], f"{name} is not used any more: the test says nothing"
    for calls in work.values():
        calls.clear()
    second = Editor(tiny, tiny_tokenizer).edit([VIENNA], ONE)
    first.undo()
    third = ue.edit(tiny, tiny_tokenizer, [OSLO], ONE)
    assert second.is_applied and third.is_applied
    assert {name: len(calls) for name, calls in work.items() if calls} == {}


def test_after_a_new_start_the_file_is_read_and_factored_once(
    tiny, make_gpt2, tiny_tokenizer, cached, work
) -> None:
    first = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE)
    for calls in work.values():
        calls.clear()
    again = make_gpt2()  # another object: nothing of it is in memory
    second = ue.edit(again, tiny_tokenizer, [TOWER], ONE)
    assert torch.equal(second.delta(1), first.delta(1))
    assert not work["collect"]
    assert len(work["safe_open"]) == 1
    assert len(work["cholesky_ex"]) == 1
    # the factor is what is kept; C0 itself is read where it is wanted
    assert statistics_for(again, tiny_tokenizer, [1]).C0(1).shape == (48, 48)
    assert len(work["safe_open"]) == 2


@EVERY
def test_statistics_that_are_given_are_factored_once(
    tiny, tiny_tokenizer, statistics_of, work, method
) -> None:
    statistics = statistics_of(tiny)
    ue.edit(tiny, tiny_tokenizer, [TOWER], method, statistics=statistics)
    for calls in work.values():
        calls.clear()
    ue.edit(tiny, tiny_tokenizer, [VIENNA], method, statistics=statistics)
    assert {name: len(calls) for name, calls in work.items() if calls} == {}


def test_the_probe_runs_once_for_the_weights_as_they_are(
    tiny, tiny_tokenizer, tiny_statistics, statistics_of, work
) -> None:
    def write(method, statistics=tiny_statistics):
        ue.edit(tiny, tiny_tokenizer, [TOWER], method, statistics=statistics).undo()
        return len(work["probe"])

    assert write(ONE) == 1
    assert write(ONE.replace(steps=2)) == 1
    assert write(ONE.replace(site="mlp")) == 2  # another site is another question
    assert write(ONE.replace(site="mlp")) == write(ONE) == 2
    assert write(SPREAD) == 4  # layers 0 and 2 are new
    with torch.no_grad():
        tiny.transformer.h[3].ln_1.bias[0] += 1e-3
    assert write(ONE, statistics_of(tiny)) == 5


def test_prefixes_are_sampled_once_for_each_specification(tiny, tiny_tokenizer, work) -> None:
    editor = Editor(tiny, tiny_tokenizer, seed=2)
    contexts = Contexts(starts=("The",), lengths=(4,))
    first = editor.prefixes(contexts)
    count = len(work["multinomial"])
    assert count == 3
    assert editor.prefixes(contexts, 2) == Editor(tiny, tiny_tokenizer).prefixes(contexts, 2)
    assert len(work["multinomial"]) == count
    assert editor.prefixes(contexts, 3) != first
    assert len(work["multinomial"]) == 2 * count
    with torch.no_grad():
        tiny.transformer.ln_f.bias[0] += 9
    assert editor.prefixes(contexts) != first


def test_c0_that_is_shrunk_for_an_edit_is_kept(
    tiny, tiny_tokenizer, tiny_texts, caplog, work
) -> None:
    """A neuron that no text uses, but a new fact does: said, done, and done once."""
    whole = ue.KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts * 3, [1])
    moment = whole.C0(1).clone()
    moment[5], moment[:, 5] = 0.0, 0.0
    statistics = with_moments(whole, {1: moment})
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        made = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=statistics)
    assert "C0 was shrunk by 0.001 for this edit" in made.warnings[0]
    assert repr(TOWER.text) in made.warnings[0]
    assert made.warnings[0] in caplog.text
    assert made.diagnosis[1].memorization_error <= 1e-8
    assert float(made.delta(1)[:, 5].norm()) > 0
    work["cholesky_ex"].clear()
    ue.edit(tiny, tiny_tokenizer, [VIENNA], ONE, statistics=statistics)
    assert not work["cholesky_ex"]
    # statistics that were shrunk on purpose are taken as they are
    kept = with_moments(statistics.shrunk(1e-4), {1: moment})
    with refused(tiny, NullSpaceError, repr(OSLO.text)):
        ue.edit(tiny, tiny_tokenizer, [OSLO], ONE, statistics=kept)


# --- how long it is kept ---


def test_an_editor_does_not_keep_its_model(make_gpt2, tiny_tokenizer, cached) -> None:
    """With edits, prefixes, statistics and values in memory: what is kept is no model."""
    model = make_gpt2()
    editor = Editor(model, tiny_tokenizer)
    edits = [editor.edit([fact], method) for fact, method in ((TOWER, ONE), (VIENNA, SPREAD))]
    edits[0].undo()
    values = editor.optimise_values([OSLO], ONE)
    ue.ask(model, tiny_tokenizer, TOWER.text)
    ue.locate(model, tiny_tokenizer, [TOWER], samples=1)
    assert editor.memory.size > 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert [edit.is_applied for edit in edits] == [False, False]
    assert values.delta.shape == (24, 1)
    with pytest.raises(ue.errors.EditError, match="no longer exists"):
        editor.edit([OSLO], ONE)


def test_all_editors_of_a_model_are_one(tiny, make_gpt2, tiny_tokenizer, tiny_statistics) -> None:
    one, other = (Editor(tiny, tiny_tokenizer, statistics=tiny_statistics) for _ in range(2))
    made = one.edit([TOWER], ONE)
    assert other.active == (made,)
    assert one.memory is other.memory is memory_of(tiny)
    assert one.ledger is other.ledger is ledger_of(tiny)
    assert Editor(make_gpt2(), tiny_tokenizer).active == ()
    other.reset()
    assert one.active == () and not made.is_applied


def test_what_an_editor_is_given_is_used(tiny, tiny_tokenizer, tiny_statistics) -> None:
    editor = Editor(tiny, tiny_tokenizer, method=ONE, statistics=tiny_statistics, seed=7)
    made = editor.edit(TOWER, apply=False)
    assert (made.method.name, made.provenance.seed) == ("EMMET", 7)
    wanted = ue.edit(
        tiny, tiny_tokenizer, TOWER, ONE, statistics=tiny_statistics, seed=7, apply=False
    )
    assert made.id == wanted.id
    assert torch.equal(
        editor.optimise_values(TOWER).delta,
        ue.optimise_values(tiny, tiny_tokenizer, TOWER, ONE, seed=7).delta,
    )


def test_memory_drops_what_was_used_least() -> None:
    memory = Memory(limit=10)
    for name in "abc":
        memory.put(name, name.upper(), 3)
    assert memory.get("a") == "A"  # now the last that was used
    memory.put("d", "D", 3)
    assert [memory.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    assert memory.size == 9
    memory.put("c", "other", 1)  # in the place of what was there
    assert (memory.get("c"), memory.size) == ("other", 7)
    memory.put("e", "E", 8)  # two must go
    assert [memory.get(name) for name in "acde"] == [None, "other", None, "E"]
    memory.put("e", "too large", 11)
    assert memory.get("e") is None, "neither what is too large, nor what it has replaced"
    assert memory.get("c") == "other"
    memory.clear()
    assert (memory.size, memory.get("c")) == (0, None)


def test_statistics_that_do_not_fit_into_memory_are_used(tiny, tiny_tokenizer, cached) -> None:
    editor = Editor(tiny, tiny_tokenizer)
    editor.memory.limit = 100
    first = editor.edit([TOWER], SPREAD).undo()
    assert editor.memory.size <= 100
    assert editor.edit([TOWER], SPREAD).id == first.id


# --- what an edit tells ---


def test_a_fact_that_did_not_take_is_told(tiny, tiny_tokenizer, tiny_statistics, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        made = ue.edit(tiny, tiny_tokenizer, FACTS, ONE, statistics=tiny_statistics)
    assert not made.table.likeliest.any()
    (warning,) = made.warnings
    assert warning in caplog.text
    assert warning.startswith("3 of 3 facts did not take: their target is not the likeliest")
    first = made.outcomes[0]
    said = f"{TOWER.text!r} -> 'Rome': {first.before:.2g} before, {first.after:.2g} after"
    assert said in warning
    assert "unified_edit.locate" in warning and "clamp" in warning
    many = [ue.Fact("{} is in", f"House {number}", "Rome") for number in range(5)]
    made = ue.edit(
        tiny, tiny_tokenizer, many, ONE.replace(infeasible="least_violation"),
        statistics=tiny_statistics,
    )  # fmt: skip
    assert "5 of 5 facts" in made.warnings[-1] and made.warnings[-1].count("->") == 3
    assert "; ...)" in made.warnings[-1]


@EVERY
def test_before_after_and_likeliest_are_those_of_the_model(
    tiny, tiny_tokenizer, tiny_statistics, method, tmp_path
) -> None:
    """With enough steps and no clamp the tiny model says some of what it is told."""
    steps = 40 if method.site.name == "block" else 4
    free = {"clamp": 1e3, "ridge": 0.0, "kl_weight": 0.0, "weight_decay": 0.0}
    strong = method.replace(steps=steps, **free)
    made = ue.edit(tiny, tiny_tokenizer, FACTS, strong, statistics=tiny_statistics)
    table = made.table
    assert list(table.columns[:5]) == ["prompt", "target", "before", "after", "likeliest"]
    for row, fact in zip(table.itertuples(), FACTS, strict=True):
        asked = ue.compare(tiny, tiny_tokenizer, fact.text, fact.target_new).iloc[0]
        assert row.before == pytest.approx(asked.before, rel=1e-4)
        assert row.after == pytest.approx(asked.after, rel=1e-4)
    if method.site.name == "block":
        assert table.likeliest.any()
    failed = [fact for fact, hit in zip(FACTS, table.likeliest, strict=True) if not hit]
    said = [text for text in made.warnings if "did not take" in text]
    assert len(said) == bool(failed)
    assert all(fact.text in said[0] for fact in failed)
    made.save(tmp_path / "edit.safetensors")
    assert ue.Edit.load(tmp_path / "edit.safetensors").table.equals(table)


def test_outcomes_that_were_not_measured_are_no_number() -> None:
    """Not zero: nobody is to read a probability there."""
    outcome = Outcome(losses=(1.0,), relative_norm=0.5, clamped=False)
    assert math.isnan(outcome.before) and math.isnan(outcome.after) and not outcome.likeliest


@EVERY
def test_an_edit_has_its_keys(tiny, tiny_tokenizer, tiny_statistics, method, tmp_path) -> None:
    """They are what Delta was solved for, layer by layer on the partly edited model."""
    made = ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics, apply=False)
    parts = anatomy(tiny)
    assert list(made.keys) == [parts.weight(layer).name for layer in method.layers]
    assert made.names == {layer: parts.weight(layer).name for layer in method.layers}
    for keys in made.keys.values():
        assert keys.shape == (48, 3) and keys.dtype == torch.float64
    first = made.names[method.layers[0]]
    wanted = compute_keys(
        parts, tiny_tokenizer, FACTS, made.provenance.prefixes, method.layers[:1],
        made.method.key_mean,
    )[method.layers[0]]  # fmt: skip
    columns = [0] if method is IN_TURN else [0, 1, 2]  # later ones are read on the edited model
    assert torch.allclose(made.keys[first][:, columns], wanted[:, columns], rtol=0, atol=1e-5)
    made.save(tmp_path / "edit.safetensors")
    loaded = ue.Edit.load(tmp_path / "edit.safetensors")
    assert list(loaded.keys) == list(made.keys)
    assert all(torch.equal(loaded.keys[name], made.keys[name]) for name in made.keys)


def test_delta_of_a_layer_or_a_name(tiny, tiny_tokenizer, tiny_statistics) -> None:
    made = ue.edit(tiny, tiny_tokenizer, FACTS, SPREAD, statistics=tiny_statistics, apply=False)
    for layer, name in made.names.items():
        assert torch.equal(made.delta(name), made.delta(layer))
        assert made.diagnosis[layer] is made.updates[name].diagnosis
    for where in (3, -1, "transformer.h.3.mlp.c_proj.weight", ""):
        with pytest.raises(ue.errors.EditError, match=r"does not touch .*only layers \(0, 1, 2\)"):
            made.delta(where)


@EVERY
def test_autocast_changes_nothing(
    tiny, tiny_tokenizer, tiny_statistics, tiny_texts, method
) -> None:
    """Who asks in half precision wants a faster answer, not another edit."""

    def all_of_it():
        made = ue.edit(tiny, tiny_tokenizer, FACTS, method, statistics=tiny_statistics, apply=False)
        asked = ue.ask(tiny, tiny_tokenizer, TOWER.text)
        return made, asked, ue.KeyStatistics.collect(
            tiny, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2
        )  # fmt: skip

    plain, asked, statistics = all_of_it()
    before = snapshot(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch.ones(2, 2) @ torch.ones(2, 2)
        made, again, collected = all_of_it()
        assert torch.is_autocast_enabled("cpu")
    assert cast.dtype == torch.bfloat16, "or the test says nothing"
    assert_unchanged(tiny, before)
    assert all(torch.equal(made.delta(layer), plain.delta(layer)) for layer in method.layers)
    assert again.equals(asked)
    assert torch.equal(collected.C0(1), statistics.C0(1))

"""Fine-tuning as an edit: against a transcription of the released loop, and like any other edit."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from fixtures_refusals import TOWER, VIENNA, refused
from fixtures_tiny import InFloat64, assert_unchanged, snapshot
from recipe import TINY_FACTS, relative
from test_families import TINY, tiny_model

import unified_edit as ue
from unified_edit.editing import Edit, FineTuning, fine_tune, tuning
from unified_edit.errors import ContradictionError, EditError, MethodError, ModelError
from unified_edit.measuring import evaluate_made

PAIRS = [(fact.text, fact.target_new) for fact in TINY_FACTS]
#: Of random weights of size .3, so that the loss moves in a few steps.
FAST: dict[str, Any] = {"learning_rate": 0.02, "steps": 6}


@pytest.mark.parametrize(
    "how",
    [
        {"norm": None},
        {"norm": 0.05},
        {"norm": None, "weight_decay": 0.3},
        {"norm": 0.08, "batch_size": 2},
    ],
    ids=lambda how: ",".join(f"{name}={value}" for name, value in how.items()),
)
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_the_update_is_that_of_the_released_loop(family, how, request, tiny_tokenizer):
    make = request.getfixturevalue(f"make_{family}")
    with InFloat64():
        model, copy = make(dtype=torch.float64), make(dtype=torch.float64)
        edit = fine_tune(model, tiny_tokenizer, TINY_FACTS, layer=1, apply=False, **FAST, **how)
        wanted, history = reference.fine_tuned(
            copy, tiny_tokenizer, PAIRS, 1,
            norm=how.get("norm"), lr=FAST["learning_rate"], steps=FAST["steps"],
            weight_decay=how.get("weight_decay", 0.0), batch=how.get("batch_size", 128),
        )  # fmt: skip
    # Adam divides by the root of the squared gradient: rounding of small entries grows by it
    assert relative(edit.delta(1), wanted) < 1e-7
    losses = torch.tensor([one.losses for one in edit.outcomes], dtype=torch.float64).mean(0)
    assert losses.tolist() == pytest.approx(history, rel=1e-9)
    assert history[-1] < history[0] - 0.1


@pytest.mark.parametrize("name", sorted(TINY))
def test_it_is_so_in_every_family(name, tiny_tokenizer):
    with InFloat64():
        model, copy = (tiny_model(name, len(tiny_tokenizer)) for _ in range(2))
        how = {"norm": 0.05, "steps": 3}
        edit = fine_tune(
            model, tiny_tokenizer, TINY_FACTS, layer=1, learning_rate=0.02, apply=False, **how
        )
        wanted, history = reference.fine_tuned(copy, tiny_tokenizer, PAIRS, 1, lr=0.02, **how)
    assert relative(edit.delta(1), wanted) < 1e-9
    assert history[-1] < history[0] - 0.5


def test_it_stops_once_the_loss_is_low(make_gpt2, tiny_tokenizer):
    models = [make_gpt2(dtype=torch.float64) for _ in range(2)]
    for model in models:  # as it is, its last norm allows no target a probability above .7
        model.transformer.ln_f.weight.data.mul_(4)
    with InFloat64():
        edit = fine_tune(
            models[0], tiny_tokenizer, TINY_FACTS[:2], layer=1,
            norm=None, learning_rate=0.05, steps=60, batch_size=1,
        )  # fmt: skip
        wanted, history = reference.fine_tuned(
            models[1], tiny_tokenizer, PAIRS[:2], 1, norm=None, lr=0.05, steps=60, batch=1
        )
    assert len(edit.outcomes[0].losses) == len(history) < 60
    assert history[-1] < 0.01 <= history[-2]
    assert relative(edit.delta(1), wanted) < 1e-7
    assert all(outcome.likeliest for outcome in edit.outcomes)


def test_memory_is_bounded_without_changing_the_result(make_gpt2, tiny_tokenizer, monkeypatch):
    model = make_gpt2(dtype=torch.float64)

    def delta() -> torch.Tensor:
        return fine_tune(
            model, tiny_tokenizer, TINY_FACTS, layer=1, norm=None, apply=False, **FAST
        ).delta(1)

    whole = delta()
    monkeypatch.setattr(tuning, "GRADIENT_TOKENS", 1)  # a forward for each fact
    assert relative(delta(), whole) < 1e-5  # attention's softmax is float32 in transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_entry_is_larger_than_the_norm(dtype, make_gpt2, tiny_tokenizer):
    edit = fine_tune(
        make_gpt2(dtype=dtype), tiny_tokenizer, TINY_FACTS, layer=2, norm=0.03, apply=False, **FAST
    )
    assert float(edit.delta(2).abs().max()) <= 0.03
    assert float((edit.delta(2).abs() >= 0.0299).double().mean()) > 0.1
    assert all(outcome.clamped for outcome in edit.outcomes)
    assert not any(outcome.relative_norm == outcome.relative_norm for outcome in edit.outcomes)


def test_it_is_an_edit_like_others(tiny, tiny_tokenizer, tmp_path):
    before = snapshot(tiny)
    edit = fine_tune(tiny, tiny_tokenizer, TINY_FACTS, layer=1, norm=0.05, **FAST)
    assert edit.is_applied
    assert (edit.method.name, edit.layers) == ("FT+L", (1,))
    assert edit.provenance.statistics == {}
    assert edit.diagnosis[1].form == "fine-tuning"
    changed = snapshot(tiny)["weights"]
    assert [n for n, w in before["weights"].items() if changed[n] != w] == list(edit.updates)
    assert "FT+L" in repr(edit)
    assert (edit.table["after"] > edit.table["before"]).all()
    edit.save(tmp_path / "tuned.safetensors")
    edit.undo()
    assert_unchanged(tiny, before)
    again = Edit.load(tmp_path / "tuned.safetensors").apply(tiny)
    assert (again.id, again.method) == (edit.id, edit.method)
    assert snapshot(tiny)["weights"] == changed
    assert torch.equal(again.delta(1), edit.delta(1))
    again.undo()
    assert_unchanged(tiny, before)


def test_it_is_computed_on_the_model_as_it_is(make_gpt2, tiny_tokenizer):
    model = make_gpt2()
    first = fine_tune(model, tiny_tokenizer, TOWER, layer=1, norm=0.1, **FAST)
    second = fine_tune(model, tiny_tokenizer, VIENNA, layer=1, norm=0.1, **FAST)
    before = model.transformer.h[1].mlp.c_proj.weight.clone()
    assert second.table["before"][0] != pytest.approx(
        fine_tune(make_gpt2(), tiny_tokenizer, VIENNA, layer=1, norm=0.1, **FAST).table["before"][0]
    )
    second.undo(), second.apply()
    assert torch.equal(model.transformer.h[1].mlp.c_proj.weight, before)
    first.undo(), second.undo()


def test_names_of_the_tables():
    names = [
        FineTuning(layers=(0,), norm=norm, weight_decay=decay).name
        for norm, decay in ((None, 0), (1e-3, 0), (None, 1e-3))
    ]
    assert names == ["FT", "FT+L", "FT-W"]


# --- bad input ---


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"norm": 0}, MethodError, ["norm", "0", "> 0"]),
        ({"norm": "1"}, MethodError, ["norm", "'1'"]),
        ({"steps": 0}, MethodError, ["steps", "at least 1"]),
        ({"learning_rate": 0}, MethodError, ["learning_rate", "> 0"]),
        ({"weight_decay": -1}, MethodError, ["weight_decay", ">= 0"]),
        ({"batch_size": 1.5}, MethodError, ["batch_size", "1.5"]),
        ({"layer": 9}, ModelError, ["9", "0..3"]),
        ({"layer": None}, ModelError, ["layer", "None"]),
        ({"learning_rate": 1e30, "norm": None}, EditError, ["loss", "step 1", "learning_rate"]),
    ],
)
def test_bad_settings(given, kind, words, tiny, tiny_tokenizer):
    with refused(tiny, kind, *words):
        fine_tune(tiny, tiny_tokenizer, TOWER, **{"layer": 1, "norm": 0.1, "steps": 3, **given})


def test_facts_that_contradict_each_other(tiny, tiny_tokenizer):
    other = ue.Fact(TOWER.prompt, TOWER.subject, "Oslo")
    with refused(tiny, ContradictionError, "contradict"):
        fine_tune(tiny, tiny_tokenizer, [TOWER, other], layer=1, norm=0.1)


def test_an_interruption_leaves_the_model_as_it_was(tiny, tiny_tokenizer, monkeypatch):
    calls = []

    def stop(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return functional(*args, **kwargs)

    functional = tuning.log_probabilities
    monkeypatch.setattr(tuning, "log_probabilities", stop)
    with refused(tiny, KeyboardInterrupt):
        fine_tune(tiny, tiny_tokenizer, TOWER, layer=1, norm=0.1)


# --- measured ---


def test_made_edits_are_measured_one_batch_at_a_time(make_gpt2, tiny_tokenizer):
    model = make_gpt2()
    records = [
        ue.Record(TOWER, paraphrases=("The old tower is in",), neighbours=("The museum is in",)),
        ue.Record(VIENNA),
    ]
    standing = fine_tune(model, tiny_tokenizer, TINY_FACTS[0], layer=2, norm=0.1, **FAST)
    seen = []

    def make(facts: list[ue.Fact]) -> Edit | None:
        seen.append([fact.subject for fact in facts])
        assert not ue.Editor(model, tiny_tokenizer).active
        apply = len(seen) == 1  # either way
        return fine_tune(model, tiny_tokenizer, facts, layer=1, norm=None, apply=apply, **FAST)

    report = evaluate_made(model, tiny_tokenizer, records, make)
    assert seen == [["The tower"], ["Vienna"]]
    assert ue.Editor(model, tiny_tokenizer).active == (standing,)
    standing.undo()
    for record, rows in zip(records, (report.table["record"] == i for i in (0, 1)), strict=True):
        with fine_tune(
            model, tiny_tokenizer, record.fact, layer=1, norm=None, apply=False, **FAST
        ).applied():
            alone = ue.evaluate(model, tiny_tokenizer, record).table
        found = report.table[rows]
        assert found["when"].tolist() == alone["when"].tolist()
        assert found["logp_new"].tolist() == pytest.approx(alone["logp_new"].tolist(), abs=1e-5)


def test_what_is_no_edit_is_not_measured(make_gpt2, tiny_tokenizer):
    model = make_gpt2()
    report = evaluate_made(model, tiny_tokenizer, [ue.Record(TOWER)], lambda facts: None)
    assert report.after["EM"].value == report.before["EM"].value
    with refused(model, EditError, "must give an Edit", "'Rome'"):
        evaluate_made(model, tiny_tokenizer, [ue.Record(TOWER)], lambda facts: "Rome")


def test_on_atlas(atlas):
    model, tokenizer = atlas
    facts = [record.fact for record in ue.load_records("atlas", limit=2)]
    edit = fine_tune(model, tokenizer, facts, layer=1, norm=0.02, learning_rate=2e-3)
    assert edit.table["likeliest"].all()
    edit.undo()

"""The ledger, files and adapters: an edited model is its base plus a list of active edits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import subprocess
import sys
import textwrap

import pytest
import torch

import unified_edit as ue
from unified_edit.errors import EditError, EditFileError, ModelChangedError
from unified_edit.model import anatomy, model_fingerprint, tensor_hash

TOWER = ue.Fact("{} is in the city of", "The tower", "Rome", "Paris")
VIENNA = ue.Fact("{} was born in", "Vienna", "Madrid", "Oslo")
OSLO = ue.Fact("I walked from {} to the", "Oslo", "harbour", "river")
QUICK = {"steps": 6, "contexts": ue.Contexts(starts=("The", "I"), lengths=(4,))}
ONE = ue.EMMET.replace(layers=(1,), **QUICK)
#: Where a subject ends its prompt, a value at the last layer makes the model say anything.
AT_THE_END = [
    ue.Fact("I have seen {}", "the tower", "Rome"),
    ue.Fact("We walked to {}", "Vienna", "Madrid"),
]
STRONG = ONE.replace(layers=(3,), steps=30, clamp=8.0)


def weights(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.fixture(scope="module")
def opened(make_gpt2, tiny_tokenizer):
    return make_gpt2(), tiny_tokenizer


@pytest.fixture
def small(opened):
    """(model, tokenizer) without edits, before and after the test."""
    ue.Editor(*opened).reset()
    yield opened
    ue.Editor(*opened).reset()


@pytest.fixture(scope="module")
def made(opened, tiny_statistics):
    """Three edits by different methods on overlapping layers."""
    ue.Editor(*opened).reset()
    plan = [
        (TOWER, ONE),
        (VIENNA, ue.MEMIT.replace(layers=(0, 1, 2), ridge=1.0, **QUICK)),
        (OSLO, ue.ROME.replace(layers=(1,), **QUICK)),
    ]
    return [
        ue.edit(*opened, [fact], method, statistics=tiny_statistics, apply=False)
        for fact, method in plan
    ]


@pytest.fixture
def three(small, made):
    """The three edits, none of them applied."""
    assert not any(edit.is_applied for edit in made)
    return list(made)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_undo_in_any_order_is_bit_exact(small, three, order):
    model, _ = small
    base = weights(model)
    for edit in three:
        edit.apply()
    # what must be left after undoing some: the others alone, applied in the original order
    left = list(three)
    for index in order:
        three[index].undo()
        left.remove(three[index])
        now = weights(model)
        ue.Editor(model, None).reset()
        assert same(model, base)
        for edit in left:
            edit.apply()
        assert same(model, now)
    assert same(model, base)


def test_undo_equals_never_having_applied_where_subtraction_does_not(small, three):
    model, _ = small
    weight = anatomy(model).weight(1)
    base = weight.parameter.detach().clone()
    three[0].apply()
    subtracted = (weight.parameter.double() - weight.to_stored(three[0].delta(1))).float()
    three[0].undo()
    assert torch.equal(weight.parameter, base)
    assert not torch.equal(subtracted, base)


def test_a_second_edit_is_of_the_same_base(small, tiny_statistics):
    first = ue.edit(*small, [TOWER], ONE, statistics=tiny_statistics)
    second = ue.edit(*small, [VIENNA], ONE, statistics=tiny_statistics)
    assert first.is_applied and second.is_applied
    assert second.provenance.state.endswith(first.id)
    assert second.provenance.fingerprint == first.provenance.fingerprint


def test_applied_puts_back_the_state_it_found(small, three):
    model, _ = small
    base = weights(model)
    with three[0].applied():
        assert three[0].is_applied
        with pytest.raises(RuntimeError, match="inside"), three[1].applied():
            raise RuntimeError("inside")
        assert three[0].is_applied and not three[1].is_applied
    assert same(model, base)
    three[0].apply()
    with three[0].applied():
        pass
    assert three[0].is_applied


def test_repeated_edits_are_refused(small, three):
    three[0].apply()
    with pytest.raises(EditError, match="already applied"):
        three[0].apply()
    three[0].undo()
    with pytest.raises(EditError, match="not applied"):
        three[0].undo()


def test_nothing_is_overwritten_that_somebody_else_changed(small, three):
    model, _ = small
    weight = anatomy(model).weight(1).parameter
    three[0].apply()
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] += 1.0
    changed = weight.detach().clone()
    with pytest.raises(ModelChangedError, match="something else changed it"):
        three[0].undo()
    with pytest.raises(ModelChangedError):
        three[1].apply()
    assert torch.equal(weight, changed)
    with torch.no_grad():
        weight.copy_(kept)
    three[0].undo()


def test_save_and_load_in_a_new_process(small, three, tmp_path):
    """The same bits, whatever the number of threads: the model comes from a folder there."""
    model, tokenizer = small
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for number, edit in enumerate(three):
        edit.save(tmp_path / f"{number}.safetensors")
        edit.apply()
    parts = anatomy(model)
    expected = {i: tensor_hash(parts.weight(i).parameter) for i in (0, 1, 2)}
    script = textwrap.dedent(
        """
        import json, sys, torch
        torch.set_num_threads(int(sys.argv[1]))
        import unified_edit as ue
        from unified_edit.model import anatomy, tensor_hash
        model, _ = ue.load_model("model")
        for path in sys.argv[2:]:
            assert ue.Edit.load(path).apply(model).is_applied
        parts = anatomy(model)
        print(json.dumps({i: tensor_hash(parts.weight(i).parameter) for i in (0, 1, 2)}))
        """
    )
    files = [str(tmp_path / f"{number}.safetensors") for number in range(3)]
    for threads in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script, threads, *files],
            capture_output=True, text=True, cwd=tmp_path, check=True,
        )  # fmt: skip
        found = json.loads(run.stdout)
        assert {int(layer): value for layer, value in found.items()} == expected


def test_a_loaded_edit_is_the_edit(small, three, tmp_path):
    model, _ = small
    for edit in three:
        path = tmp_path / f"{edit.id}.safetensors"
        edit.save(path)
        loaded = ue.Edit.load(path)
        assert loaded.id == edit.id
        assert (loaded.facts, loaded.method, loaded.provenance) == (
            edit.facts, edit.method, edit.provenance
        )  # fmt: skip
        assert loaded.layers == edit.layers
        assert all(torch.equal(loaded.delta(i), edit.delta(i)) for i in edit.layers)
        assert loaded.keys.keys() == edit.keys.keys()
        assert all(torch.equal(loaded.keys[name], edit.keys[name]) for name in edit.keys)
        assert loaded.diagnosis == edit.diagnosis
        assert loaded.outcomes == edit.outcomes and loaded.warnings == edit.warnings
        assert loaded.table.equals(edit.table)
        assert not loaded.is_applied
        loaded.apply(model)
        assert loaded.is_applied and edit.is_applied  # one ledger, one edit
        edit.undo()


def test_an_edit_of_another_model_is_refused(three, make_gpt2, tmp_path):
    other = make_gpt2()
    with torch.no_grad():
        other.transformer.h[3].ln_1.bias[0] += 1e-3
    before = weights(other)
    three[0].save(tmp_path / "edit.safetensors")
    with pytest.raises(EditFileError, match="not for this model"):
        ue.Edit.load(tmp_path / "edit.safetensors").apply(other)
    assert same(other, before)


def test_the_fingerprint_is_the_base_model_s(small, three):
    model, _ = small
    base = model_fingerprint(model)
    three[0].apply()
    assert model_fingerprint(model) != base
    assert three[0].ledger.fingerprint() == base


def test_peft_adapter_gives_the_same_logits(small, three, make_gpt2, tmp_path):
    from peft import PeftModel

    model, tokenizer = small
    prompts = [TOWER.text, VIENNA.text, "The old market was not far from the"]
    for number, edit in enumerate(three):
        edit.to_peft(tmp_path / str(number))
        with edit.applied(), torch.no_grad():
            wanted = [model(**tokenizer(p, return_tensors="pt")).logits for p in prompts]
        adapted = PeftModel.from_pretrained(make_gpt2(), tmp_path / str(number)).eval()
        with torch.no_grad():
            for prompt, logits in zip(prompts, wanted, strict=True):
                found = adapted(**tokenizer(prompt, return_tensors="pt")).logits
                assert float((found - logits).abs().max()) <= 1e-4


def test_a_model_that_is_gone_is_named(three, tmp_path):
    three[0].save(tmp_path / "e.safetensors")
    loaded = ue.Edit.load(tmp_path / "e.safetensors")
    with pytest.raises(EditError, match=r"edit\.apply\(model\)"):
        loaded.undo()


# --- what an edit says of itself ---


def test_an_edit_that_does_not_take_says_so(small, tiny_statistics, caplog):
    """One fact of two: its value is moved too little to make its target the likeliest."""
    values = ue.optimise_values(*small, AT_THE_END, STRONG)
    delta = values.delta.clone()
    delta[:, 1] *= 1e-3
    weak = dataclasses.replace(values, delta=delta)
    with caplog.at_level(logging.WARNING, logger="unified_edit"):
        edit = ue.edit(*small, AT_THE_END, STRONG, statistics=tiny_statistics, values=weak)
    (warning,) = edit.warnings
    assert warning in caplog.text
    row = edit.table.iloc[1]
    for word in (
        "1 of 2 facts did not take", repr(AT_THE_END[1].text), "'Madrid'",
        f"{row.before:.2g} before", f"{row.after:.2g} after", "unified_edit.locate", "clamp",
    ):  # fmt: skip
        assert word in warning, f"{word!r} is not in: {warning}"
    assert "'Rome'" not in warning
    assert edit.table.likeliest.tolist() == [True, False]
    assert edit.is_applied  # it is a warning: an edit that is wanted so is not refused


def test_an_equality_is_held_at_its_own_keys(small, tiny_statistics):
    method = ONE.replace(layers=(2,))
    values = ue.optimise_values(*small, [TOWER, VIENNA], method)
    edit = ue.edit(
        *small, [TOWER, VIENNA], method, statistics=tiny_statistics, values=values, apply=False
    )
    moved = edit.delta(2) @ edit.keys[edit.names[2]]
    assert torch.allclose(moved, values.delta, rtol=0, atol=1e-8 * float(values.delta.norm()))

"""The ledger, files and adapters: an edited model is its base plus a list of active edits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap

import pytest
import torch

import unified_edit as ue
from unified_edit.errors import EditError, EditFileError, ModelChangedError
from unified_edit.model.anatomy import anatomy
from unified_edit.model.fingerprints import model_fingerprint, tensor_hash

TOWER = ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
CURIE = ue.Fact("{} was born in", "Marie Curie", "Italy", "Poland")
JAPAN = ue.Fact("The currency of {} is the", "Japan", "euro", "yen")


def weights(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.fixture
def three(atlas, atlas_statistics):
    """Three edits by different methods on overlapping layers, none applied yet."""
    model, tokenizer = atlas
    plan = [
        (TOWER, ue.EMMET.replace(layers=(1,))),
        (CURIE, ue.MEMIT.replace(layers=(0, 1, 2))),
        (JAPAN, ue.ROME.replace(layers=(1,))),
    ]
    return [
        ue.edit(model, tokenizer, [fact], method, statistics=atlas_statistics, apply=False)
        for fact, method in plan
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_undo_in_any_order_is_bit_exact(atlas, three, order):
    model, _ = atlas
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


def test_undo_equals_never_having_applied_where_subtraction_does_not(atlas, three):
    model, _ = atlas
    parts = anatomy(model)
    base = parts.weight(1).detach().clone()
    three[0].apply()
    subtracted = (parts.weight(1).double() - parts.to_stored(three[0].delta(1), 1)).float()
    three[0].undo()
    assert torch.equal(parts.weight(1), base)
    assert not torch.equal(subtracted, base)


def test_a_second_edit_needs_no_new_statistics(atlas, atlas_statistics, monkeypatch):
    model, tokenizer = atlas
    method = ue.EMMET.replace(layers=(1,))
    first = ue.edit(model, tokenizer, [TOWER], method, statistics=atlas_statistics)

    def collect(*_args, **_kwargs):
        raise AssertionError("statistics were collected again")

    monkeypatch.setattr(ue.KeyStatistics, "collect", collect)
    second = ue.edit(model, tokenizer, [CURIE], method, statistics=atlas_statistics)
    assert first.is_applied and second.is_applied
    assert second.provenance.state.endswith(first.id)
    assert second.provenance.fingerprint == first.provenance.fingerprint


def test_statistics_are_found_in_the_cache(atlas, own_cache, monkeypatch):
    model, tokenizer = atlas
    one = ue.edit(model, tokenizer, [TOWER], ue.EMMET.replace(layers=(2,)))

    def collect(*_args, **_kwargs):
        raise AssertionError("statistics were collected again")

    monkeypatch.setattr(ue.KeyStatistics, "collect", collect)
    again = ue.edit(model, tokenizer, [CURIE], ue.EMMET.replace(layers=(2,)))
    assert one.is_applied and again.is_applied
    assert list(own_cache.rglob("layer-2.safetensors"))


def test_applied_puts_back_the_state_it_found(atlas, three):
    model, _ = atlas
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


def test_repeated_edits_are_refused(atlas, three):
    three[0].apply()
    with pytest.raises(EditError, match="already applied"):
        three[0].apply()
    three[0].undo()
    with pytest.raises(EditError, match="not applied"):
        three[0].undo()


def test_nothing_is_overwritten_that_somebody_else_changed(atlas, three):
    model, _ = atlas
    weight = anatomy(model).weight(1)
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


def test_save_and_load_in_a_new_process(atlas, three, tmp_path):
    model, _ = atlas
    for number, edit in enumerate(three):
        edit.save(tmp_path / f"{number}.safetensors")
        edit.apply()
    expected = {layer: tensor_hash(anatomy(model).weight(layer)) for layer in (0, 1, 2)}
    script = textwrap.dedent(
        """
        import json, sys, torch
        torch.set_num_threads(int(sys.argv[1]))
        import unified_edit as ue
        from unified_edit.model.fingerprints import tensor_hash
        from unified_edit.model.anatomy import anatomy
        model, _ = ue.load_model("atlas")
        for path in sys.argv[2:]:
            assert ue.Edit.load(path).apply(model).is_applied
        print(json.dumps({i: tensor_hash(anatomy(model).weight(i)) for i in (0, 1, 2)}))
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


def test_a_loaded_edit_is_the_edit(atlas, three, tmp_path):
    model, _ = atlas
    for edit in three:
        path = tmp_path / f"{edit.id}.safetensors"
        edit.save(path)
        loaded = ue.Edit.load(path)
        assert loaded.id == edit.id
        assert (loaded.facts, loaded.method, loaded.provenance) == (
            edit.facts, edit.method, edit.provenance
        )  # fmt: skip
        assert all(torch.equal(loaded.delta(i), edit.delta(i)) for i in edit.layers)
        assert loaded.diagnosis == edit.diagnosis
        assert not loaded.is_applied
        loaded.apply(model)
        assert loaded.is_applied and edit.is_applied  # one ledger, one edit
        edit.undo()


def test_an_edit_of_another_model_is_refused(atlas, three, tmp_path):
    model, _ = atlas
    other, _ = ue.load_model("atlas")
    with torch.no_grad():
        other.transformer.h[4].ln_1.bias[0] += 1e-3
    before = weights(other)
    three[0].save(tmp_path / "edit.safetensors")
    with pytest.raises(EditFileError, match="not for this model"):
        ue.Edit.load(tmp_path / "edit.safetensors").apply(other)
    assert same(other, before)


def test_the_fingerprint_is_the_base_model_s(atlas, three):
    model, _ = atlas
    base = model_fingerprint(model)
    three[0].apply()
    assert model_fingerprint(model) != base
    assert three[0].ledger.fingerprint() == base


def test_peft_adapter_gives_the_same_logits(atlas, three, tmp_path):
    from peft import PeftModel

    model, tokenizer = atlas
    prompts = [TOWER.text, CURIE.text, "The old house was far away and nobody sold the"]
    for number, edit in enumerate(three):
        edit.to_peft(tmp_path / str(number))
        with edit.applied(), torch.no_grad():
            wanted = [model(**tokenizer(p, return_tensors="pt")).logits for p in prompts]
        fresh, _ = ue.load_model("atlas")
        adapted = PeftModel.from_pretrained(fresh, tmp_path / str(number)).eval()
        with torch.no_grad():
            for prompt, logits in zip(prompts, wanted, strict=True):
                found = adapted(**tokenizer(prompt, return_tensors="pt")).logits
                assert float((found - logits).abs().max()) <= 1e-4


def test_a_model_that_is_gone_is_named(three, tmp_path):
    three[0].save(tmp_path / "e.safetensors")
    loaded = ue.Edit.load(tmp_path / "e.safetensors")
    with pytest.raises(EditError, match=r"edit\.apply\(model\)"):
        loaded.undo()

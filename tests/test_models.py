"""Families, orientation, hooks and loading, on tiny random GPT-2 and GPT-J."""

from __future__ import annotations

import pytest
import reference
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

import unified_edit as ue
from unified_edit.editing import compute_keys, optimise_values
from unified_edit.errors import ModelError
from unified_edit.model import NamedWeight, anatomy, read_last_token
from unified_edit.model.batching import left_padded

FACTS = [
    ue.Fact("The {} is in the city of", "old tower", "Rome", "Paris"),
    ue.Fact("I walked from the {} to the", "river", "market", "bridge"),
    ue.Fact("{} was born in", "Lisbon", "Oslo and Rome", "Dublin"),
]
METHOD = ue.EMMET.replace(layers=(1,), steps=6, clamp=2.0)


@pytest.fixture(params=["gpt2", "gptj"])
def family(request, make_gpt2, make_gptj):
    return {"gpt2": make_gpt2, "gptj": make_gptj}[request.param]


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_orientation(family):
    model = family()
    parts = anatomy(model)
    for layer in range(parts.n_layers):
        weight = parts.weight(layer)
        assert weight.module is parts.down(layer)
        assert weight.transposed == isinstance(weight.module, Conv1D)
        assert (weight.d_in, weight.d_out) == (model.config.n_inner, model.config.n_embd)
        delta = torch.zeros(weight.d_out, weight.d_in)
        assert weight.to_stored(delta).shape == weight.parameter.shape
        assert model.state_dict()[weight.name].data_ptr() == weight.parameter.data_ptr()
        assert model.get_submodule(weight.module_name) is weight.module
        assert parts.probe(weight, parts.blocks[layer]) <= 1e-4
        assert parts.probe(weight, parts.mlp(layer)) <= 1e-4


def test_a_weight_is_known_by_its_name(family):
    parts = anatomy(family())
    for layer in range(parts.n_layers):
        assert parts.named(parts.weight(layer).name).module is parts.down(layer)
    for name in ("lm_head.weight", parts.weight(0).module_name, ""):
        with pytest.raises(ModelError, match="can be edited") as caught:
            parts.named(name)
        assert repr(name) in str(caught.value)
        assert parts.weight(0).name in str(caught.value)


def test_the_probe_finds_a_wrong_orientation_that_shapes_do_not(make_gpt2, monkeypatch):
    parts = anatomy(make_gpt2(n_inner=24))  # square
    weight, block = parts.weight(1), parts.blocks[1]
    before = weight.parameter.detach().clone()
    parts.probe(weight, block)
    monkeypatch.setattr(NamedWeight, "to_stored", lambda self, delta: delta)
    with pytest.raises(ModelError, match=f"probe failed at {weight.name}") as caught:
        parts.probe(weight, block)
    assert "orientation" in str(caught.value)
    assert torch.equal(weight.parameter, before)


def test_values_and_delta_agree_with_the_reference(family, tiny_tokenizer, statistics_of):
    """float64; GPT-J computes its attention in float32 whatever the type, hence its tolerance."""
    model = family(dtype=torch.float64)
    tolerance = 1e-8 if anatomy(model).weight(0).transposed else 1e-5
    stats = statistics_of(model)
    edit = ue.edit(model, tiny_tokenizer, FACTS, METHOD, statistics=stats, apply=False)
    wanted = reference.edit_delta_single_layer(
        model, tiny_tokenizer, [(f.prompt, f.subject, f.target_new) for f in FACTS], 1,
        stats.C0(1), reference.emmet_delta, [p + "{}" for p in edit.provenance.prefixes],
        steps=6, clamp=2.0,
    )  # fmt: skip
    assert relative(edit.delta(1), wanted.delta) <= tolerance


def test_batch_is_single_under_padding(family, tiny_tokenizer):
    model = family()
    texts = ["The tower", "The old museum by the river is in the city of", "I walked from"]
    rows = [tiny_tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in rows}) == 3
    batch = left_padded(rows, model.device)
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        without = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
    assert torch.allclose(together, alone, atol=1e-4)
    if anatomy(model).weight(0).transposed:  # GPT-2: absolute positions, so this test can fail
        assert not torch.allclose(without, alone, atol=1e-2)


def test_keys_and_values_of_a_batch_are_those_of_each_fact(family, tiny_tokenizer):
    model = family()
    prefixes = ue.Editor(model, tiny_tokenizer).prefixes(METHOD.contexts, 0)
    parts = anatomy(model)
    together = compute_keys(parts, tiny_tokenizer, FACTS, prefixes, [1])[1]
    values = optimise_values(model, tiny_tokenizer, FACTS, METHOD)
    for column, fact in enumerate(FACTS):
        alone = compute_keys(parts, tiny_tokenizer, [fact], prefixes, [1])[1][:, 0]
        assert relative(together[:, column], alone) <= 1e-5
        one = optimise_values(model, tiny_tokenizer, [fact], METHOD)
        assert relative(values.delta[:, column], one.delta[:, 0]) <= 1e-3


def test_reading_stops_at_the_deepest_site_and_leaves_no_hook(family, tiny_tokenizer):
    model = family()
    parts = anatomy(model)
    ran = []
    handle = parts.blocks[2].register_forward_hook(lambda *_: ran.append(True))
    rows = [tiny_tokenizer("The tower is")["input_ids"]]
    read_last_token(model, rows, {"key": (parts.down(1), "input")})
    handle.remove()
    assert not ran
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_edit_arrives_and_is_undone(family, tiny_tokenizer, statistics_of, tmp_path):
    model = family()
    parts = anatomy(model)
    stats = statistics_of(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    edit = ue.edit(model, tiny_tokenizer, FACTS, METHOD, statistics=stats)
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {parts.weight(1).name}
    edit.to_peft(tmp_path / "adapter")
    ids = tiny_tokenizer(FACTS[0].text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        adapted = PeftModel.from_pretrained(family(), tmp_path / "adapter").eval()
        assert float((adapted(ids).logits - wanted).abs().max()) <= 1e-4
        merged = adapted.merge_and_unload()
        assert float((merged(ids).logits - wanted).abs().max()) <= 1e-4
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())

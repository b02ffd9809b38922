"""Families, orientation, hooks and loading, on tiny random GPT-2 and GPT-J."""

from __future__ import annotations

import pytest
import reference
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

import unified_edit as ue
from unified_edit.editing.editor import optimise_values
from unified_edit.editing.keys import compute_keys
from unified_edit.errors import ModelError
from unified_edit.model.anatomy import anatomy
from unified_edit.model.batching import left_padded
from unified_edit.model.hooks import read_last_token
from unified_edit.model.ledger import ledger_of

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
        weight, down = parts.weight(layer), parts.down(layer)
        assert parts.transposed(layer) == isinstance(down, Conv1D)
        assert tuple(parts.to_stored(torch.zeros(parts.d_out, parts.d_in), layer).shape) == tuple(
            weight.shape
        )
        assert model.state_dict()[parts.weight_name(layer)].data_ptr() == weight.data_ptr()
        assert parts.probe(layer) <= 1e-4


def test_the_probe_finds_a_wrong_orientation_that_shapes_do_not(make_gpt2, monkeypatch):
    model = make_gpt2(n_inner=24)  # square
    parts = anatomy(model)
    before = parts.weight(1).detach().clone()
    parts.probe(1)
    monkeypatch.setattr(type(parts), "to_stored", lambda self, delta, layer: delta)
    with pytest.raises(ModelError, match="probe failed at layer 1"):
        parts.probe(1)
    assert torch.equal(parts.weight(1), before)


def test_values_and_delta_agree_with_the_reference(family, tiny_tokenizer, statistics_of):
    """float64; GPT-J computes its attention in float32 whatever the type, hence its tolerance."""
    model = family(dtype=torch.float64)
    tolerance = 1e-8 if anatomy(model).transposed(0) else 1e-5
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
    if anatomy(model).transposed(0):  # GPT-2: absolute positions, so this test can fail
        assert not torch.allclose(without, alone, atol=1e-2)


def test_keys_and_values_of_a_batch_are_those_of_each_fact(family, tiny_tokenizer):
    model = family()
    prefixes = ledger_of(model).prefixes(tiny_tokenizer, METHOD.contexts, 0)
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
    assert changed == {parts.weight_name(1)}
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


@pytest.fixture
def folder(make_gpt2, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    return make_gpt2(), tmp_path


def test_local_folders_load_from_safetensors(folder):
    model, path = folder
    model.save_pretrained(path)
    loaded, tokenizer = ue.load_model(str(path))
    assert not loaded.training
    assert tokenizer.is_fast
    found = dict(loaded.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in model.named_parameters())
    half, _ = ue.load_model(str(path), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_pickled_weights_only_on_request_and_restricted(folder):
    model, path = folder
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="allow_bin=True") as caught:
        ue.load_model(str(path))
    assert "weights_only=True" in str(caught.value)
    assert "save_pretrained" in str(caught.value)
    loaded, _ = ue.load_model(str(path), allow_bin=True)
    found = dict(loaded.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in model.named_parameters())


class _Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_code_in_a_pickle_does_not_run(folder, capsys):
    model, path = folder
    model.config.save_pretrained(path)
    torch.save({**model.state_dict(), "evil": _Evil()}, path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be read"):
        ue.load_model(str(path), allow_bin=True)
    assert "must not run" not in capsys.readouterr().out


def test_remote_code_never_runs(folder):
    model, path = folder
    model.save_pretrained(path)
    config = (path / "config.json").read_text()
    marker = path / "it_ran"
    (path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    changed = config.replace(
        '"model_type": "gpt2"',
        '"model_type": "own", "auto_map": {"AutoConfig": "own.Own", '
        '"AutoModelForCausalLM": "own.Model"}',
    )
    assert changed != config
    (path / "config.json").write_text(changed)
    with pytest.raises(ModelError):
        ue.load_model(str(path))
    assert not marker.exists()


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="could not be loaded"):
        ue.load_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="not a torch type"):
        ue.load_model("atlas", dtype="float33")

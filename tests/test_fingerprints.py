"""What tells one model from another: what a model computes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from fixtures_refusals import FACTS, ONE, SPREAD, TOWER

import unified_edit as ue
from unified_edit.errors import ModelError
from unified_edit.model import ledger_of, model_fingerprint, tensor_hash

# --- configuration ---

#: What changes what a model says.
TELLING = {
    "activation_function": "relu", "layer_norm_epsilon": 0.5, "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "n_head": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", TELLING)
def test_what_changes_the_logits(make_gpt2, tiny_tokenizer, name) -> None:
    model, other = make_gpt2(), make_gpt2(**{name: TELLING[name]})
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), other.parameters(), strict=True)
    )
    ids = torch.tensor([tiny_tokenizer(TOWER.text)["input_ids"]])
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, other(ids).logits), "it changes nothing"
    assert model_fingerprint(model) != model_fingerprint(other)
    before, ledger = model_fingerprint(model), ledger_of(model)
    ledger.fingerprint()
    setattr(model.config, name, TELLING[name])
    assert ledger.fingerprint() == model_fingerprint(model) != before


def test_a_model_from_a_folder_is_the_model_that_was_saved(make_gpt2, tiny_tokenizer, tmp_path):
    model = make_gpt2()
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path)
    loaded, _ = ue.load_model(tmp_path)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    wider, _ = ue.load_model(tmp_path, dtype="float64")
    assert model_fingerprint(wider) != model_fingerprint(model)


# --- weights ---


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.2.ln_1.bias"])
def test_every_entry_counts(make_gpt2, name) -> None:
    model = make_gpt2()
    before, seen = model_fingerprint(model), set()
    entries = model.get_parameter(name).data.view(-1)
    for place in (0, 1, len(entries) // 2, len(entries) - 1):
        kept = entries[place].clone()
        entries[place] = torch.nextafter(kept, torch.tensor(9.0))
        seen.add(model_fingerprint(model))
        entries[place] = kept
        assert model_fingerprint(model) == before
    assert len(seen) == 4 and before not in seen


def test_a_hash_knows_shape_and_type() -> None:
    tensor = torch.arange(6.0)
    hashes = {
        tensor_hash(one)
        for one in (tensor, tensor.view(2, 3), tensor.view(3, 2), tensor.double(), -tensor,
                    torch.zeros(6), torch.zeros(6, dtype=torch.int32))
    }  # fmt: skip
    assert len(hashes) == 7
    wide = torch.arange(12.0).view(6, 2)
    assert tensor_hash(wide[:, 0]) == tensor_hash(wide[:, 0].clone())  # whatever lies between


def test_other_ways_to_change_a_weight(make_gpt2) -> None:
    """A new tensor in place of an old one, another type, and an optimiser's step."""
    model = make_gpt2()
    ledger, seen = ledger_of(model), [ledger_of(model).fingerprint()]
    norm = model.transformer.ln_f

    def note():
        seen.append(ledger.fingerprint())
        assert seen[-1] == model_fingerprint(model)

    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    note()
    norm.bias.data = norm.bias.data + 1
    note()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimiser.step()
    note()
    model.load_state_dict({n: value * 1.01 for n, value in model.state_dict().items()})
    note()
    model.double()
    note()
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_has_no_fingerprint(make_gpt2, value) -> None:
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.h[3].attn.c_proj.bias[:2] = value
    words = r"transformer\.h\.3\.attn\.c_proj\.bias has 2 NaN or infinite entries.*load it again"
    with pytest.raises(ModelError, match=words):
        model_fingerprint(model)
    with pytest.raises(ModelError, match=words):
        ledger_of(model).fingerprint()


# --- edits ---


def test_the_fingerprint_is_the_base_s_whatever_is_active(
    tiny, tiny_tokenizer, tiny_statistics
) -> None:
    base, ledger = model_fingerprint(tiny), ledger_of(tiny)
    edits = [
        ue.edit(tiny, tiny_tokenizer, [fact], method, statistics=tiny_statistics)
        for fact, method in zip(FACTS, (ONE, SPREAD, ONE), strict=True)
    ]
    assert model_fingerprint(tiny) != base
    assert ledger.fingerprint() == ledger.fingerprint(wholly=True) == base
    assert ledger.state() == "+".join([base, *(edit.id for edit in edits)])
    edits[1].undo()
    assert ledger.fingerprint() == base
    assert ledger.state() == f"{base}+{edits[0].id}+{edits[2].id}"
    ue.Editor(tiny, tiny_tokenizer).reset()
    assert model_fingerprint(tiny) == base == ledger.state()

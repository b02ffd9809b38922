"""What a ledger counts on: sums without a trace of their order of use, and a fingerprint that is
made once, but not once too few.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fixtures_refusals import ONE, TOWER, VIENNA, counted, refused
from fixtures_tiny import assert_unchanged, snapshot

import unified_edit as ue
from unified_edit.editing import Editor
from unified_edit.errors import EditError, MethodError, StatisticsError
from unified_edit.model import anatomy, ledger_of, model_fingerprint
from unified_edit.objective import Diagnosis, Update

NAMES = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(4)]


@dataclass(frozen=True)
class Entry:
    id: str
    updates: dict[str, Update]


def updates(count, seed=0):
    """Updates of very different sizes, so that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        Update(
            10.0 ** (-number) * random(24, 2), random(2, 48), Diagnosis(1.0, 2, 0.0, 0.0, "ridge")
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [0, 2])
def test_a_running_sum_is_the_sum_of_all(make_gpt2, dtype, active) -> None:
    """What is tried is bit for bit what the same updates give as edits, after those in force."""
    model = make_gpt2(dtype=dtype)
    ledger, weight = ledger_of(model), anatomy(model).weight(1)
    earlier = [
        Entry(f"earlier {i}", {weight.name: one}) for i, one in enumerate(updates(active, 1))
    ]
    ledger.activate(earlier)
    before = snapshot(model)
    entries = [Entry(f"{i}", {weight.name: one}) for i, one in enumerate(updates(6))]
    wanted = [
        ledger.with_edits(weight, [*earlier, *entries[:count]]).clone() for count in range(1, 7)
    ]
    with ledger.trying() as add:
        for entry, total in zip(entries, wanted, strict=True):
            add(weight, entry.updates[weight.name])
            assert torch.equal(weight.parameter, total)
    assert_unchanged(model, before)
    # rounding each time, as adding to the weight itself would, gives something else
    rounded = weight.parameter.detach().clone()
    for entry in entries:
        delta = weight.to_stored(entry.updates[weight.name].delta)
        rounded = (rounded.double() + delta).to(dtype)
    assert not torch.equal(rounded, wanted[-1])


def test_what_was_tried_is_out_again_after_a_failure(make_gpt2) -> None:
    model = make_gpt2()
    ledger, parts = ledger_of(model), anatomy(model)
    one, other = updates(2)
    ledger.activate([Entry("earlier", {NAMES[0]: one})])
    with refused(model, RuntimeError, "midway"), ledger.trying() as add:
        add(parts.weight(0), other)
        add(parts.weight(2), one)
        raise RuntimeError("midway")
    huge = Update(1e300 * one.left, one.right, one.diagnosis)
    with refused(model, EditError, NAMES[2], "overflows torch.float32"), ledger.trying() as add:
        add(parts.weight(2), one)
        add(parts.weight(2), huge)
    ledger.verify()
    assert ledger.fingerprint() == model_fingerprint(make_gpt2())


def test_the_fingerprint_is_made_once(make_gpt2, tiny_tokenizer, tiny_statistics, monkeypatch):
    """The ledger's own writing is no change of the base, however often it looks."""
    model = make_gpt2()
    made, calls = counted(model_fingerprint)
    monkeypatch.setattr("unified_edit.model.ledger.model_fingerprint", made)
    editor = Editor(model, tiny_tokenizer, statistics=tiny_statistics)
    edits = [editor.edit([fact], ONE) for fact in (TOWER, VIENNA)]
    for edit in edits:
        edit.undo()
        edit.apply()
    editor.reset()
    editor.ledger.state()
    assert len(calls) == 1
    editor.ledger.fingerprint(wholly=True)
    assert len(calls) == 2


def in_place(weight, row):
    with torch.no_grad():
        weight[row] += 0.5


def loaded_again(weight, row):
    with torch.no_grad():
        changed = weight.detach().clone()
        changed[row] += 0.5
        weight.copy_(changed)


def one_entry(weight, row):
    with torch.no_grad():
        weight[row, 7] = 0.125


def optimiser_step(weight, row):
    weight.grad = torch.zeros_like(weight)
    weight.grad[row] = 1.0
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


@pytest.mark.parametrize(
    "change", [in_place, loaded_again, one_entry, optimiser_step], ids=lambda one: one.__name__
)
def test_a_change_of_one_embedding_is_noticed(
    tiny, tiny_tokenizer, tiny_statistics, change
) -> None:
    """A token that was trained alone: a sample of entries would miss it, torch's count does not."""
    editor = Editor(tiny, tiny_tokenizer)
    editor.edit([TOWER], ONE, statistics=tiny_statistics).undo()
    values = editor.optimise_values([TOWER], ONE)
    before = editor.ledger.fingerprint()
    weight = tiny.get_input_embeddings().weight
    change(weight, tiny_tokenizer(" Athens")["input_ids"][0])
    assert editor.ledger.fingerprint() == model_fingerprint(tiny) != before
    with refused(tiny, StatisticsError, "not from this model"):
        editor.edit([TOWER], ONE, statistics=tiny_statistics)
    with refused(tiny, MethodError, "another model or state"):
        editor.edit([TOWER], ONE, values=values)


def test_a_change_is_noticed_while_an_edit_is_in_force(
    tiny, tiny_tokenizer, tiny_statistics
) -> None:
    editor = Editor(tiny, tiny_tokenizer, statistics=tiny_statistics)
    made = editor.edit([TOWER], ONE)
    in_place(tiny.get_input_embeddings().weight, 7)
    changed = editor.ledger.fingerprint()
    assert changed != made.provenance.fingerprint
    made.undo()  # its own weight is as it left it
    assert editor.ledger.fingerprint() == model_fingerprint(tiny) == changed


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_a_change_around_torch_s_count(tiny, tiny_tokenizer, tiny_texts, way) -> None:
    """A glance may miss it; what is written to disk is made from a whole look."""
    ledger = ledger_of(tiny)
    weight = tiny.get_input_embeddings().weight
    before = ledger.fingerprint()
    if way == "data":
        weight.data[7, 5] += 0.5
    else:
        weight.detach().numpy()[7, 5] += 0.5
    assert ledger.fingerprint() in (before, model_fingerprint(tiny))
    assert ledger.fingerprint(wholly=True) == model_fingerprint(tiny) != before
    assert ledger.fingerprint() == model_fingerprint(tiny)
    weight.data[7, 5] += 0.5
    made = ue.KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
    assert made.source.fingerprint == model_fingerprint(tiny)


INERT = {
    "pad_token_id": 3, "eos_token_id": 5, "id2label": {0: "no", 1: "yes"}, "resid_pdrop": 0.3,
    "attn_pdrop": 0.3, "embd_pdrop": 0.3, "use_cache": False, "summary_first_dropout": 0.5,
    "output_hidden_states": True, "problem_type": "regression",
    "_name_or_path": "another", "task_specific_params": {"text": {"max_length": 5}},
}  # fmt: skip
TELLING = {
    "activation_function": "relu", "layer_norm_epsilon": 1e-3, "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "n_head": 4,
}  # fmt: skip


@pytest.mark.parametrize("field", INERT)
def test_configuration_that_changes_no_answer(tiny, tiny_tokenizer, tiny_statistics, field) -> None:
    """A model whose padding token was set is still the model that statistics were made from."""
    before = model_fingerprint(tiny)
    setattr(tiny.config, field, INERT[field])
    assert model_fingerprint(tiny) == ledger_of(tiny).fingerprint() == before
    assert ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied


@pytest.mark.parametrize("field", TELLING)
def test_configuration_that_changes_answers(tiny, field) -> None:
    before = ledger_of(tiny).fingerprint()
    setattr(tiny.config, field, TELLING[field])
    assert ledger_of(tiny).fingerprint() == model_fingerprint(tiny) != before


def test_another_attention_is_the_same_model(make_gpt2) -> None:
    """How attention is computed changes nothing but rounding."""
    eager, fast = make_gpt2(attn_implementation="eager"), make_gpt2(attn_implementation="sdpa")
    assert eager.config._attn_implementation != fast.config._attn_implementation
    assert model_fingerprint(eager) == model_fingerprint(fast)

"""What surrounds an edit must not change it: modes, precisions, hooks and wrappers of others."""

from __future__ import annotations

import pytest
import torch
from fixtures_refusals import FACTS, ONE, TOWER, refused
from fixtures_tiny import assert_unchanged, snapshot

import unified_edit as ue
from unified_edit.errors import ModelError
from unified_edit.model import anatomy


@pytest.fixture
def precision():
    """Sets torch's precision of float32 products; it is put back after."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


# --- autocast ---


def test_autocast_around_questions_changes_nothing(tiny, tiny_tokenizer, tiny_texts) -> None:
    expected = ue.ask(tiny, tiny_tokenizer, TOWER.text)
    statistics = ue.KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
    traced = ue.locate(tiny, tiny_tokenizer, [TOWER], samples=2)
    before = snapshot(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ue.ask(tiny, tiny_tokenizer, TOWER.text).equals(expected)
        again = ue.KeyStatistics.collect(tiny, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
        assert torch.equal(again.C0(1), statistics.C0(1))
        found = ue.locate(tiny, tiny_tokenizer, [TOWER], samples=2).facts[0]
        assert found.clean == traced.facts[0].clean
    assert_unchanged(tiny, before)


# --- precision ---


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_short_products_do_not_fail_the_probe(
    tiny, tiny_tokenizer, tiny_statistics, precision, name
) -> None:
    precision(name)
    made = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    assert made.is_applied
    assert torch.get_float32_matmul_precision() == name


def test_short_products_allow_the_probe_what_they_round(make_gpt2, precision) -> None:
    """A rounding of one in two hundred is of the machine where that was allowed, else a fault."""
    model = make_gpt2()
    parts = anatomy(model)
    weight, site = parts.weight(1), parts.blocks[1]
    handle = parts.mlp(1).c_proj.register_forward_hook(
        lambda _module, _args, output: output.bfloat16().float()
    )
    with pytest.raises(ModelError, match="probe failed"):
        parts.probe(weight, site)
    precision("medium")
    assert 1e-4 < parts.probe(weight, site) < 3e-2
    handle.remove()


# --- hooks of others ---


def test_a_hook_that_changes_the_output_is_named(tiny, tiny_tokenizer, tiny_statistics) -> None:
    """As a library for steering or ablation leaves one behind."""
    handle = tiny.transformer.h[1].mlp.register_forward_hook(
        lambda _module, _args, output: output * 0.5
    )
    words = ("probe failed", "transformer.h.1.mlp.c_proj.weight", "Hooks of another program",
             "mlp (GPT2MLP)", "block 1", "remove it")  # fmt: skip
    with refused(tiny, ModelError, *words):
        ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    handle.remove()
    assert ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).is_applied


def test_hooks_that_change_nothing_do_no_harm(tiny, tiny_tokenizer, tiny_statistics) -> None:
    expected = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics).undo()
    seen = []
    handle = tiny.transformer.h[1].mlp.register_forward_hook(lambda *_: seen.append(1) or None)
    made = ue.edit(tiny, tiny_tokenizer, [TOWER], ONE, statistics=tiny_statistics)
    handle.remove()
    assert seen and made.id == expected.id


# --- activations of another shape ---


def flattened(mlp):
    """An MLP that works on (rows * tokens) x width, as OPT's does."""
    own = mlp.forward
    mlp.forward = lambda hidden: own(hidden.flatten(0, 1)).view_as(hidden)


def test_activations_without_an_axis_for_tokens(
    make_gpt2, tiny_tokenizer, tiny_texts, tiny_statistics
) -> None:
    model = make_gpt2()
    flattened(model.transformer.h[1].mlp)
    words = ("the input of Conv1D", "a vector for each of", "rows x tokens x width")
    with refused(model, ModelError, *words):
        ue.edit(model, tiny_tokenizer, FACTS, ONE, statistics=tiny_statistics)
    with refused(model, ModelError, "cannot be read there"):
        ue.KeyStatistics.collect(model, tiny_tokenizer, tiny_texts, [1], shrinkage=1e-2)
    other = ONE.replace(layers=(2,))  # where it is as ever, it can be edited
    assert ue.edit(model, tiny_tokenizer, FACTS, other, statistics=tiny_statistics).is_applied


# --- adapters of PEFT ---


def lora():
    import peft

    return peft, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)


def test_the_advice_for_a_wrapped_model_works(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    peft, config = lora()
    model = peft.get_peft_model(make_gpt2(), config)
    with refused(model, ModelError, "model = model.merge_and_unload()", "edit the plain model"):
        ue.Editor(model, tiny_tokenizer)
    plain = model.merge_and_unload()
    made = ue.edit(plain, tiny_tokenizer, [TOWER], ONE, statistics=statistics_of(plain))
    assert made.is_applied


def test_the_advice_for_the_model_inside_works(make_gpt2, tiny_tokenizer, statistics_of) -> None:
    """It has no such method: that is said, and what to call instead."""
    peft, config = lora()
    inside = make_gpt2()
    wrapper = peft.get_peft_model(inside, config)
    assert not hasattr(inside, "merge_and_unload")
    with refused(inside, ModelError, "unload() on the PeftModel it was made with") as caught:
        ue.Editor(inside, tiny_tokenizer)
    del caught
    plain = wrapper.unload()
    made = ue.edit(plain, tiny_tokenizer, [TOWER], ONE, statistics=statistics_of(plain))
    assert made.is_applied

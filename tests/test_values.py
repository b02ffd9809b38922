"""Values against the literal transcription in `reference.py`: tiny random models, and atlas.

The library batches facts, pads rows, keeps the attention over the prefix and cuts off what does
not change; the reference runs one fact and one context at a time over full sequences in float64.
"""

from __future__ import annotations

import pytest
import reference
import torch
from recipe import (
    FACTS,
    TINY_FACTS,
    contexts,
    loop,
    relative,
    tiny_method,
)
from transformers.models.gptj.modeling_gptj import GPTJAttention

import unified_edit as ue
from unified_edit.editing import optimise_values


@pytest.fixture(params=["gpt2", "gptj"])
def tiny_double(request, make_gpt2, make_gptj, monkeypatch):
    """(family, a tiny model of it in float64)."""
    monkeypatch.setattr(GPTJAttention, "_attn", reference.attention_in_float64)
    make = {"gpt2": make_gpt2, "gptj": make_gptj}[request.param]
    return request.param, make(2, torch.float64)


def compare(model, double, tokenizer, facts, method, tolerance):
    """Hold the values of facts against the literal ones; return the latter, one a fact."""
    method = method.resolve(model)
    values = optimise_values(model, tokenizer, facts, method)
    prefixes = ue.Editor(model, tokenizer).prefixes(method.contexts)
    found = []
    for column, fact in enumerate(facts):
        wanted = reference.value(
            double, tokenizer, fact.prompt, fact.subject, fact.target_new, contexts(prefixes),
            layer=method.layers[-1], **loop(method),
        )  # fmt: skip
        assert len(values.losses[column]) == len(wanted.losses)
        assert values.losses[column] == pytest.approx(wanted.losses, rel=tolerance)
        assert relative(values.target_init[:, column], wanted.target_init) <= tolerance
        assert relative(values.delta[:, column], wanted.delta) <= tolerance
        found.append(wanted)
    return found


@pytest.mark.equation("value-loss", "value-clamp")
@pytest.mark.parametrize("method", [ue.ROME, ue.EMMET], ids=lambda m: m.name)
def test_values(tiny_double, tiny_tokenizer, method):
    family, model = tiny_double
    method = tiny_method(method, family)
    wanted = compare(model, model, tiny_tokenizer, TINY_FACTS, method, 1e-8)
    # this says little unless facts stop at different steps, and some of them at the clamp
    assert len({one.steps for one in wanted}) > 1
    assert min(one.steps for one in wanted) > 2
    sizes = [float(one.delta.norm() / one.target_init.norm()) for one in wanted]
    held = [size >= method.clamp * (1 - 1e-9) for size in sizes]
    assert any(held) and not all(held)


@pytest.mark.equation("value-loss", "value-clamp")
def test_values_of_atlas(precise):
    model, double, tokenizer, tolerance = precise
    method = ue.EMMET.replace(
        layers=(1,), steps=8, stop_loss=3.0,
        contexts=ue.Contexts(starts=("The", "I"), lengths=(6,)),
    )  # fmt: skip
    wanted = compare(model, double, tokenizer, FACTS, method, tolerance)
    assert len({one.steps for one in wanted}) > 1


@pytest.mark.parametrize("method", [ue.ROME, ue.EMMET], ids=lambda m: m.name)
def test_values_do_not_depend_on_the_batch(tiny_double, tiny_tokenizer, method):
    family, model = tiny_double
    method = tiny_method(method, family)
    together = optimise_values(model, tiny_tokenizer, TINY_FACTS, method)
    for column, fact in enumerate(TINY_FACTS):
        alone = optimise_values(model, tiny_tokenizer, [fact], method)
        assert len(alone.losses[0]) == len(together.losses[column])
        assert relative(together.delta[:, column], alone.delta[:, 0]) <= 1e-8


def test_values_of_atlas_do_not_depend_on_the_batch(atlas):
    model, tokenizer = atlas
    method = ue.EMMET.replace(
        layers=(1,), steps=6, contexts=ue.Contexts(starts=("The",), lengths=(6,))
    )
    together = optimise_values(model, tokenizer, FACTS, method)
    for column, fact in enumerate(FACTS):
        alone = optimise_values(model, tokenizer, [fact], method)
        assert len(alone.losses[0]) == len(together.losses[column])
        assert relative(together.delta[:, column], alone.delta[:, 0]) <= 1e-4

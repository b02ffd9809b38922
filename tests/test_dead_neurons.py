"""Neurons that are exactly zero in every preserved key, as in half precision and behind a ReLU.

C0 has zero rows there. Statistics and edits leave such coordinates out; a fact whose key reaches
into them is written with a C0 that was shrunk, and the edit says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import unified_edit as ue
from unified_edit.editing.editor import SHRINKAGE
from unified_edit.errors import NullSpaceError
from unified_edit.model import captured
from unified_edit.statistics import KeyStatistics

FACTS = (
    ue.Fact("The {} is in the city of", "old tower", "Rome", "Paris"),
    ue.Fact("I walked from the {} to the", "old river", "market", "bridge"),
)
METHOD = ue.EMMET.replace(
    layers=(1,), steps=4, clamp=2.0, contexts=ue.Contexts(starts=("The",), lengths=(4,))
)
LAYERS = (0, 1)
#: Neurons that never fire, in every block.
DEAD = (3, 17, 40)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["half", "single"])
def model(request: pytest.FixtureRequest, make_gpt2: Callable[..., Any]) -> PreTrainedModel:
    """A tiny GPT-2 with ReLU; some of its neurons have no inputs and a negative bias."""
    made = make_gpt2(dtype=request.param, activation_function="relu")
    with torch.no_grad():
        for block in made.transformer.h:
            block.mlp.c_fc.weight[:, DEAD] = 0.0
            block.mlp.c_fc.bias[list(DEAD)] = -1.0
    return made


def collected(model: PreTrainedModel, tokenizer: Any, texts: list[str]) -> KeyStatistics:
    return KeyStatistics.collect(model, tokenizer, texts, LAYERS)


def dead_of(C0: Tensor) -> set[int]:
    return set((C0.diagonal() == 0).nonzero().flatten().tolist())


def test_dead_neurons_are_left_alone(
    model: PreTrainedModel, tiny_tokenizer: Any, tiny_texts: list[str], tmp_path: Any
) -> None:
    statistics = collected(model, tiny_tokenizer, tiny_texts)
    for layer in LAYERS:
        dead = dead_of(statistics.C0(layer))
        assert set(DEAD) <= dead
        assert len(dead) < 24, "most neurons must be alive, or this says little"
        assert statistics.convergence(layer) == statistics.convergence(layer)  # no NaN
    statistics.save(tmp_path / "c0.safetensors")
    for given in (statistics, KeyStatistics.load(tmp_path / "c0.safetensors")):
        method = METHOD.replace(layers=LAYERS)
        edit = ue.edit(model, tiny_tokenizer, FACTS, method, statistics=given, apply=False)
        assert edit.provenance.statistics["shrinkage"] == 0.0
        assert not any("shrunk" in warning for warning in edit.warnings)
        for layer in LAYERS:
            delta = edit.delta(layer)
            assert not delta[:, sorted(dead_of(given.C0(layer)))].any()
            assert edit.diagnosis[layer].memorization_error <= 1e-8
            assert float(delta.norm()) > 0
    weight = model.transformer.h[1].mlp.c_proj.weight
    before = weight.detach().clone()
    edit.apply()
    assert torch.equal(weight[list(DEAD)], before[list(DEAD)])  # stored (in x out)
    assert not torch.equal(weight, before)
    edit.undo()
    assert torch.equal(weight, before)


@torch.no_grad()
def inputs_of_mlp(model: PreTrainedModel, tokenizer: Any, text: str, layer: int) -> Tensor:
    """What the first matrix of an MLP sees at each token (tokens x width)."""
    with captured({"in": (model.transformer.h[layer].mlp.c_fc, "input")}) as seen:
        model(**tokenizer(text, return_tensors="pt"))
    return seen["in"][0]


def make_fire_for(
    model: PreTrainedModel, tokenizer: Any, texts: list[str], layer: int, neuron: int
) -> None:
    """Give a neuron inputs with which it fires at the subject of the first fact, and nowhere in
    the texts."""
    fact = FACTS[0]
    ids = tokenizer(fact.text[: fact.subject_span[1]])["input_ids"]
    wanted = inputs_of_mlp(model, tokenizer, fact.text, layer)[len(ids) - 1].double()
    others = torch.cat([inputs_of_mlp(model, tokenizer, text, layer) for text in texts]).double()
    # of all directions, one in which the subject stands out from the other tokens
    scatter = others.T @ others / len(others)
    direction = torch.linalg.solve(
        scatter + 1e-3 * torch.eye(len(scatter)).double(), wanted - others.mean(0)
    )
    most, here = float((others @ direction).max()), float(wanted @ direction)
    assert here > most
    scale = 2.0 / (here - most)
    with torch.no_grad():
        mlp = model.transformer.h[layer].mlp
        mlp.c_fc.weight[:, neuron] = (scale * direction).to(mlp.c_fc.weight)
        mlp.c_fc.bias[neuron] = -scale * (here + most) / 2


@pytest.mark.parametrize("method", [METHOD, METHOD.replace(layers=LAYERS)], ids=["one", "two"])
def test_a_key_that_reaches_into_the_null_space(
    method: ue.Method,
    make_gpt2: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_gpt2(activation_function="relu")
    texts = [text for text in tiny_texts if "tower" not in text]
    make_fire_for(model, tiny_tokenizer, texts, layer=1, neuron=5)
    statistics = collected(model, tiny_tokenizer, texts)
    assert 5 in dead_of(statistics.C0(1))
    editor = ue.Editor(model, tiny_tokenizer, statistics=statistics)
    with caplog.at_level(logging.WARNING):
        edit = editor.edit(FACTS, method)
    assert float(edit.keys[edit.names[1]][5, 0]) > 0
    assert float(edit.delta(1)[:, 5].norm()) > 0  # what C0 says nothing of is cheap to use
    assert edit.provenance.statistics["shrinkage"] == SHRINKAGE
    (warning,) = [text for text in edit.warnings if "shrunk" in text]
    assert repr(FACTS[0].text) in warning
    assert repr(FACTS[1].text) not in warning
    assert warning in caplog.text
    assert edit.diagnosis[1].memorization_error <= 1e-8
    assert edit.is_applied
    # it is the edit with the statistics that one would have shrunk oneself
    edit.undo()
    own = editor.edit(FACTS, method, statistics=statistics.shrunk(SHRINKAGE), apply=False)
    for layer in method.layers or ():
        assert torch.equal(own.delta(layer), edit.delta(layer))
    assert not any("shrunk" in text for text in own.warnings)
    assert statistics.source.shrinkage == 0.0  # what was given is as it was
    # a fact that does not reach there needs none of it
    plain = editor.edit(FACTS[1], method, apply=False)
    assert plain.provenance.statistics["shrinkage"] == 0.0


@pytest.mark.parametrize("weight", ["exact", 1.0])
def test_a_name_that_reaches_into_the_null_space(
    weight: Any, make_gpt2: Callable[..., Any], tiny_tokenizer: Any, tiny_texts: list[str]
) -> None:
    """What is preserved by name is a reason to shrink C0 as well."""
    model = make_gpt2(activation_function="relu")
    texts = [text for text in tiny_texts if "tower" not in text]
    make_fire_for(model, tiny_tokenizer, texts, layer=1, neuron=5)
    given = ue.Preserve([FACTS[0], "Rome is"], weight=weight)
    statistics = collected(model, tiny_tokenizer, texts)
    edit = ue.edit(model, tiny_tokenizer, FACTS[1], METHOD, statistics=statistics, preserve=given)
    assert edit.provenance.statistics["shrinkage"] == SHRINKAGE
    (warning,) = [text for text in edit.warnings if "shrunk" in text]
    assert f"to be preserved: {FACTS[0].text!r}" in warning and "Rome is" not in warning
    assert (edit.preserved["moved at 1"] < (1e-10 if weight == "exact" else 1.0)).all()


def test_the_objective_itself_refuses_such_a_key(
    make_gpt2: Callable[..., Any], tiny_tokenizer: Any, tiny_texts: list[str]
) -> None:
    model = make_gpt2(activation_function="relu")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, 5] = 0.0
        model.transformer.h[1].mlp.c_fc.bias[5] = -1.0
    metric = collected(model, tiny_tokenizer, tiny_texts).metric(1)
    K = torch.zeros(48, 1, dtype=torch.float64)
    K[5] = 1.0
    with pytest.raises(NullSpaceError):
        ue.objective.solve(metric, K, torch.ones(24, 1, dtype=torch.float64))

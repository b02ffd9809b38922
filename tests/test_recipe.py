"""Keys and whole edits against the literal transcription in `reference.py`.

The library batches, pads, caches and cuts; the reference runs one fact at a time over full
sequences in float64. They must agree to 1e-8 in float64 on a tiny GPT-2 and GPT-J, and on atlas to
1e-8 in float64 and to 1e-4 in float32.
"""

from __future__ import annotations

import math
from dataclasses import replace

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
from unified_edit.editing import compute_keys, optimise_values
from unified_edit.model import anatomy, ledger_of


@pytest.fixture(scope="module")
def doubles(make_gpt2, make_gptj, statistics_of):
    """{family: (a tiny model of it in float64, C0 of all its layers)}."""
    models = {"gpt2": make_gpt2(2, torch.float64), "gptj": make_gptj(2, torch.float64)}
    return {family: (model, statistics_of(model)) for family, model in models.items()}


@pytest.fixture(params=["gpt2", "gptj"])
def tiny_double(request, doubles, monkeypatch):
    """(family, a tiny model of it in float64, C0 of all its layers)."""
    monkeypatch.setattr(GPTJAttention, "_attn", reference.attention_in_float64)
    return request.param, *doubles[request.param]


# --- keys -----------------------------------------------------------------------------------------


def compare_keys(model, double, tokenizer, facts, method, layers, tolerance):
    prefixes = ue.Editor(model, tokenizer).prefixes(method.contexts)
    keys = compute_keys(anatomy(model), tokenizer, facts, prefixes, layers, method.key_mean)
    for layer in layers:
        for column, fact in enumerate(facts):
            wanted = reference.key(
                double, tokenizer, fact.prompt, fact.subject, contexts(prefixes), layer,
                mean=method.key_mean.name,
            )  # fmt: skip
            assert relative(keys[layer][:, column], wanted) <= tolerance


@pytest.mark.parametrize("method", [ue.ROME, ue.EMMET], ids=lambda m: m.name)
def test_keys(tiny_double, tiny_tokenizer, method):
    family, model, _ = tiny_double
    method = tiny_method(method, family)
    compare_keys(model, model, tiny_tokenizer, TINY_FACTS, method, [0, 3], 1e-8)


@pytest.mark.parametrize("method", [ue.ROME, ue.EMMET], ids=lambda m: m.name)
def test_keys_of_atlas(precise, method):
    """With all contexts that the released code samples."""
    model, double, tokenizer, tolerance = precise
    compare_keys(model, double, tokenizer, FACTS, method, [0, 3], tolerance)


# --- whole edits ----------------------------------------------------------------------------------

LAYERS = (0, 1, 2)
#: Method, what of it is changed, and what the reference divides the residual by.
CASES = {
    "EMMET": (ue.EMMET, {}, float),
    "EMMET spread": (ue.EMMET, {"layers": LAYERS}, float),
    "MEMIT": (ue.MEMIT, {"layers": LAYERS, "ridge": 0.5}, float),
    "MEMIT pmet": (ue.MEMIT, {"layers": LAYERS, "ridge": 0.5, "distribution": "pmet"}, math.sqrt),
    "MEMIT full": (ue.MEMIT, {"layers": LAYERS, "ridge": 0.5, "distribution": "full"},
                   lambda left: 1.0),
    "ROME": (ue.ROME, {}, float),
    "EMMET_RELEASED": (ue.EMMET_RELEASED, {"ridge": 0.1}, float),
}  # fmt: skip


def plain(facts):
    return [(fact.prompt, fact.subject, fact.target_new) for fact in facts]


def solver(method, facts):
    ridge = method.ridge_for(len(facts))
    if ridge:
        return lambda C0, K, R: reference.memit_delta(C0, K, R, ridge)
    return reference.emmet_delta


def compare_edits(model, double, tokenizer, facts, method, stats, tolerance, divisor=float):
    method = method.resolve(model)
    made = ue.edit(model, tokenizer, facts, method, statistics=stats, apply=False)
    wanted = reference.edit_deltas_multi_layer(
        double, tokenizer, plain(facts), method.layers,
        {layer: stats.C0(layer) for layer in method.layers}, solver(method, facts),
        contexts(made.provenance.prefixes), mean=method.key_mean.name, divisor=divisor,
        **loop(method),
    )  # fmt: skip
    assert made.layers == method.layers
    for layer in method.layers:
        assert relative(made.delta(layer), wanted[layer].delta) <= tolerance
        assert relative(made.keys[made.names[layer]], wanted[layer].K) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_whole_edits(tiny_double, tiny_tokenizer, name):
    family, model, stats = tiny_double
    method, changes, divisor = CASES[name]
    facts = TINY_FACTS[:1] if method.sequential else TINY_FACTS
    method = tiny_method(method, family, **changes)
    compare_edits(model, model, tiny_tokenizer, facts, method, stats, 1e-8, divisor)


def test_facts_one_by_one(tiny_double, tiny_tokenizer):
    """ROME with several facts: each is written into the model that carries those before it."""
    family, model, stats = tiny_double
    method = tiny_method(ue.ROME, family).resolve(model)
    made = ue.edit(model, tiny_tokenizer, TINY_FACTS, method, statistics=stats, apply=False)
    wanted = reference.edit_deltas_one_by_one(
        model, tiny_tokenizer, plain(TINY_FACTS), 1, stats.C0(1), reference.emmet_delta,
        contexts(made.provenance.prefixes), mean="plain", **loop(method),
    )  # fmt: skip
    assert relative(made.delta(1), sum(one.delta for one in wanted)) <= 1e-8
    together = torch.stack([one.K[:, 0] for one in wanted], dim=1)
    assert relative(made.keys[made.names[1]], together) <= 1e-8


@pytest.fixture(scope="module")
def little(_atlas, atlas_texts):
    """C0 of atlas from little text: what it is does not matter, both sides are given the same."""
    made = ue.KeyStatistics.collect(*_atlas, atlas_texts[:40], (0, 1), shrinkage=1e-2)

    def for_model(tested):
        """The same, as if it were collected on this model: on atlas in another type."""
        source = replace(made.source, fingerprint=ledger_of(tested).fingerprint())
        return replace(made, source=source)

    return for_model


def test_a_whole_edit_of_atlas(precise, little):
    model, double, tokenizer, tolerance = precise
    method = ue.MEMIT.replace(
        layers=(0, 1), steps=6, contexts=ue.Contexts(starts=("The", "I"), lengths=(6,))
    )
    compare_edits(model, double, tokenizer, FACTS, method, little(model), tolerance)


# --- what follows from the recipe -----------------------------------------------------------------


def test_rome_is_emmet_for_one_fact(tiny_double, tiny_tokenizer):
    """With the same key, site and contexts, one fact: nothing is left that tells them apart."""
    family, model, stats = tiny_double
    common = {"key_mean": "typed", "clamp": 0.75}
    emmet = tiny_method(ue.EMMET, family, **common)
    rome = tiny_method(ue.ROME, family, **common).replace(site="block", stop_loss=emmet.stop_loss)
    deltas = [
        ue.edit(model, tiny_tokenizer, TINY_FACTS[:1], method, statistics=stats, apply=False)
        for method in (rome, emmet)
    ]
    assert torch.equal(deltas[0].delta(1), deltas[1].delta(1))


def test_emmet_holds_the_equality_on_the_model(atlas, little):
    """After the edit, the stored weight adds delta to the value of each mean key."""
    model, tokenizer = atlas
    method = ue.EMMET.replace(layers=(1,), steps=4).resolve(model)
    prefixes = ue.Editor(model, tokenizer).prefixes(method.contexts)
    keys = compute_keys(anatomy(model), tokenizer, FACTS, prefixes, [1])[1]
    values = optimise_values(model, tokenizer, FACTS, method)
    before = model.transformer.h[1].mlp.c_proj.weight.detach().double().T
    with ue.edit(
        model, tokenizer, FACTS, method, statistics=little(model), values=values, apply=False
    ).applied():
        after = model.transformer.h[1].mlp.c_proj.weight.detach().double().T
    # weights are rounded to float32 once: half a unit in the last place of each entry
    rounding = 2.0**-24 * float(after.norm()) * float(keys.norm(dim=0).max())
    assert float(((after - before) @ keys - values.delta).norm(dim=0).max()) <= rounding

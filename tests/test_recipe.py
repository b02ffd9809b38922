"""Keys and whole edits on atlas against the literal transcription in `reference.py`.

The library batches, pads, caches and cuts; the reference runs one fact at a time over full
sequences in float64. They must agree to 1e-8 in float64, and to 1e-4 in float32.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import reference
import torch
from recipe import FACTS, contexts, relative

import unified_edit as ue
from unified_edit.editing.editor import optimise_values
from unified_edit.editing.keys import compute_keys
from unified_edit.model.anatomy import anatomy
from unified_edit.model.ledger import ledger_of


@pytest.mark.parametrize("method", [ue.ROME, ue.EMMET], ids=lambda m: m.name)
def test_keys(precise, method):
    model, double, tokenizer, tolerance = precise
    prefixes = ledger_of(model).prefixes(tokenizer, method.contexts, seed=0)
    keys = compute_keys(anatomy(model), tokenizer, FACTS, prefixes, [0, 3], method.key_mean)
    for layer in (0, 3):
        for column, fact in enumerate(FACTS):
            wanted = reference.key(
                double, tokenizer, fact.prompt, fact.subject, contexts(prefixes), layer,
                mean=method.key_mean,
            )  # fmt: skip
            assert relative(keys[layer][:, column], wanted) <= tolerance


@pytest.fixture(scope="module")
def moments(_atlas, atlas_texts):
    """Statistics of the float64 atlas, and of the float32 one with the same matrices."""
    model, tokenizer = _atlas
    made = ue.KeyStatistics.collect(
        copy.deepcopy(model).double(), tokenizer, atlas_texts[:500], LAYERS, shrinkage=1e-3
    )

    def for_model(tested):
        source = replace(made.source, fingerprint=ledger_of(tested).fingerprint())
        return replace(made, source=source)

    return made, for_model


LAYERS = (0, 1, 2)
CASES = {
    "EMMET": (ue.EMMET.replace(layers=(1,)), FACTS),
    "EMMET spread": (ue.EMMET.replace(layers=LAYERS), FACTS),
    "MEMIT": (ue.MEMIT.replace(layers=LAYERS), FACTS),
    "ROME": (ue.ROME.replace(layers=(1,)), FACTS[:1]),
    "EMMET_RELEASED": (ue.EMMET_RELEASED.replace(layers=(1,)), FACTS),
}


@pytest.mark.parametrize("name", CASES)
def test_whole_edits(precise, moments, name):
    model, double, tokenizer, tolerance = precise
    stats, for_model = moments
    method, facts = CASES[name]
    method = method.resolve(anatomy(model))
    made = ue.edit(model, tokenizer, facts, method, statistics=for_model(model), apply=False)
    ridge = method.ridge_for(len(facts))

    def solve(C0, K, R):
        return reference.memit_delta(C0, K, R, ridge) if ridge else reference.emmet_delta(C0, K, R)

    wanted = reference.edit_deltas_multi_layer(
        double, tokenizer, [(f.prompt, f.subject, f.target_new) for f in facts], method.layers,
        {layer: stats.C0(layer) for layer in method.layers}, solve,
        contexts(made.provenance.prefixes), mean=method.key_mean, site=method.site,
        steps=method.steps, lr=method.learning_rate, clamp=method.clamp,
        weight_decay=method.weight_decay, kl_weight=method.kl_weight, stop_loss=method.stop_loss,
    )  # fmt: skip
    for layer in method.layers:
        assert relative(made.delta(layer), wanted[layer].delta) <= tolerance


def test_rome_is_emmet_for_one_fact(atlas, atlas_statistics):
    """With the same key, site and contexts, one fact: nothing is left that tells them apart."""
    model, tokenizer = atlas
    common = {
        "layers": (1,), "contexts": ue.EMMET.contexts, "key_mean": "typed", "site": "block",
        "clamp": 0.75,
    }  # fmt: skip
    rome = ue.ROME.replace(**common)
    deltas = [
        ue.edit(model, tokenizer, FACTS[:1], method, statistics=atlas_statistics, apply=False)
        for method in (rome, ue.EMMET.replace(**common))
    ]
    assert torch.equal(deltas[0].delta(1), deltas[1].delta(1))


def test_emmet_holds_the_equality_on_the_model(atlas, atlas_statistics):
    """After the edit, the stored weight adds delta to the value of each mean key."""
    model, tokenizer = atlas
    method = ue.EMMET.replace(layers=(1,)).resolve(anatomy(model))
    prefixes = ledger_of(model).prefixes(tokenizer, method.contexts, seed=0)
    keys = compute_keys(anatomy(model), tokenizer, FACTS, prefixes, [1])[1]
    values = optimise_values(model, tokenizer, FACTS, method)
    before = model.transformer.h[1].mlp.c_proj.weight.detach().double().T
    with ue.edit(
        model, tokenizer, FACTS, method, statistics=atlas_statistics, values=values, apply=False
    ).applied():
        after = model.transformer.h[1].mlp.c_proj.weight.detach().double().T
    # weights are rounded to float32 once: half a unit in the last place of each entry
    rounding = 2.0**-24 * float(after.norm()) * float(keys.norm(dim=0).max())
    assert float(((after - before) @ keys - values.delta).norm(dim=0).max()) <= rounding

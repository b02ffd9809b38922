"""GPT-2 at its real 124 M shape with random weights and the real tokenizer.

No pretrained weights are needed to see that tokens, shapes and orientation are right at the real
sizes. Two facts, two contexts; held against the literal transcription.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.model import anatomy
from unified_edit.statistics import collect

DATA = Path(__file__).parents[2] / "shared" / "data" / "gpt2-tokenizer" / "tokenizer.json"
pytestmark = pytest.mark.data("gpt2-tokenizer/tokenizer.json")
FACTS = [
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    ue.Fact("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
]
TEXT = "The tower was built in two years and the city grew around it, street by street. "


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA), eos_token="<|endoftext|>")
    return model.double().eval(), tokenizer


def emmet_delta(C0, K, R):
    """`reference.emmet_delta` by a solution: the inverse of so large a matrix takes seconds."""
    rows = torch.linalg.solve(C0, K).T
    return R @ torch.linalg.solve(rows @ K, rows)


def test_two_facts_two_contexts(gpt2, monkeypatch):
    model, tokenizer = gpt2
    monkeypatch.setattr(collect, "FRESH_KEYS", 0)
    texts = [f"{number} {TEXT}" for number in range(4)]
    stats = ue.KeyStatistics.collect(model, tokenizer, texts, [5], shrinkage=1e-2)
    assert stats.C0(5).shape == (3072, 3072)
    method = ue.EMMET.replace(
        layers=(5,), steps=2, contexts=ue.Contexts(starts=("The",), lengths=(4,))
    )
    edit = ue.edit(model, tokenizer, FACTS, method, statistics=stats, apply=False)
    assert anatomy(model).weight(5).transposed
    assert len(edit.provenance.prefixes) == 2
    wanted = reference.edit_delta_single_layer(
        model, tokenizer, [(f.prompt, f.subject, f.target_new) for f in FACTS], 5, stats.C0(5),
        emmet_delta, [prefix + "{}" for prefix in edit.provenance.prefixes],
        steps=2, clamp=0.75,
    )  # fmt: skip
    error = float((edit.delta(5) - wanted.delta).norm() / wanted.delta.norm())
    assert error <= 1e-8
    before = model.transformer.h[5].mlp.c_proj.weight.detach().clone()
    with edit.applied():
        change = (model.transformer.h[5].mlp.c_proj.weight - before).T
        assert torch.allclose(change, edit.delta(5), atol=1e-15, rtol=1e-6)
    assert torch.equal(model.transformer.h[5].mlp.c_proj.weight, before)

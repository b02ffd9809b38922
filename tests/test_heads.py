"""Logits of final hidden states go through the model's own head, whatever that does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_tiny import assert_unchanged, own_seed, snapshot
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from unified_edit.model import anatomy
from unified_edit.model.hooks import logits_of

SIZE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Families that do more than a product in their head, and the field that says so.
HEADS: dict[str, tuple[PretrainedConfig, str]] = {
    "gemma2": (Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0),
               "final_logit_softcapping"),
    "granite": (GraniteConfig(**SIZE, logits_scaling=3.0), "logits_scaling"),
    "cohere": (CohereConfig(**SIZE, logit_scale=0.25), "logit_scale"),
}  # fmt: skip
IDS = torch.tensor([[3, 9, 27, 41, 7], [5, 25, 50, 10, 20]])


def check(model: PreTrainedModel) -> torch.Tensor:
    """Hold the logits of all final states, of one, and of some, against the model's own."""
    before = snapshot(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(logits_of(model, hidden), wanted)
        # fewer rows at a time may be summed in another order: sums of 16 products of order one
        rounding = {"rtol": 0, "atol": 16 * 2.0**-23 * float(wanted.abs().max())}
        assert torch.allclose(logits_of(model, hidden[1, 3]), wanted[1, 3], **rounding)
        some = logits_of(model, hidden[[0, 1, 1], [4, 2, 0]])
        assert torch.allclose(some, wanted[[0, 1, 1], [4, 2, 0]], **rounding)
    assert_unchanged(model, before)
    return wanted


@pytest.mark.parametrize("family", HEADS)
def test_a_head_with_a_cap_or_a_scale(family: str) -> None:
    config, field = HEADS[family]
    assert getattr(config, field) not in (None, 1.0)
    with own_seed(0):
        model = AutoModelForCausalLM.from_config(config).eval()
    wanted = check(model)
    # a product with the output embeddings alone would be something else
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        product = hidden @ model.get_output_embeddings().weight.T
    assert float((product - wanted).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_the_heads_of_families_that_are_edited(
    family: str, make_gpt2: Callable[..., Any], make_gptj: Callable[..., Any]
) -> None:
    model = {"gpt2": make_gpt2, "gptj": make_gptj}[family]()
    wanted = check(model)
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(anatomy(model).logits(hidden), wanted)


def test_a_gradient_passes_through_the_head() -> None:
    with own_seed(0):
        model = AutoModelForCausalLM.from_config(HEADS["gemma2"][0]).double().eval()
    hidden = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 16).requires_grad_()
    logits_of(model, hidden)[:, 7].sum().backward()
    weight = model.get_output_embeddings().weight[7].detach()
    cap = model.config.final_logit_softcapping
    slope = 1 - (hidden.detach() @ weight / cap).tanh() ** 2  # of cap * tanh(x / cap)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad, slope[:, None] * weight, rtol=1e-12)

"""k*: the key under which a subject is looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unified_edit.activations import quiet, read_last_token
from unified_edit.facts import Fact
from unified_edit.models import Anatomy, Tokenizer
from unified_edit.tokens import fact_rows


def context_weights(count: int, mean: Literal["typed", "plain"]) -> Tensor:
    """The weights (count, float64) with which the contexts of one fact are averaged.

    "typed" is the mean within each context *type*, then over types: one half for the bare
    prompt, which comes first, and one half shared by the prefixed ones (released code of MEMIT
    and EMMET). "plain" weighs all alike (ROME, eq. 3).
    """
    weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if mean == "typed" and count > 1:
        weights[0] = 0.5
        weights[1:] = 0.5 / (count - 1)
    return weights


def compute_keys(
    parts: Anatomy,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layers: Sequence[int],
    mean: Literal["typed", "plain"] = "typed",
) -> dict[int, Tensor]:
    """K for each layer: {layer: (d_in x E, float64)}, one column a fact.

    A key is the input of the layer's down-projection at the subject's last token, averaged
    over the fact's prompt behind each prefix (`context_weights`). Only the tokens up to that
    one are run: a causal model computes it from nothing else.
    """
    rows = [
        row.up_to_subject for of_fact in fact_rows(tokenizer, facts, prefixes) for row in of_fact
    ]
    sites = {layer: (parts.down(layer), "input") for layer in layers}
    with quiet(parts.model):
        found = read_last_token(parts.model, rows, sites)
    weights = context_weights(len(prefixes), mean)
    return {
        layer: torch.einsum(
            "ecd,c->de",
            values.double().cpu().view(len(facts), len(prefixes), -1),
            weights,
        )
        for layer, values in found.items()
    }


def read_values(
    parts: Anatomy, tokenizer: Tokenizer, facts: Sequence[Fact], layer: int, site: str
) -> Tensor:
    """What stands at the value's site now, on the bare prompts: (d_out x E, float64)."""
    rows = [of_fact[0].up_to_subject for of_fact in fact_rows(tokenizer, facts, [""])]
    with quiet(parts.model):
        found = read_last_token(parts.model, rows, {site: (parts.site(layer, site), "output")})
    return found[site].double().cpu().T

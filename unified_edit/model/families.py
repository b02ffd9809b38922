"""The families of models that can be edited: one row each, and the only branch on family.

To add one, give the attribute paths of its parts; the probe (`Anatomy.probe`) finds out on the
model itself whether what editing assumes holds for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts: attribute paths, all but the first inside a block."""

    blocks: str
    attention: str
    mlp: str
    down: str


#: `config.model_type` -> paths. A family belongs here once the probe has passed on it.
FAMILIES = {
    "gpt2": Family(blocks="transformer.h", attention="attn", mlp="mlp", down="mlp.c_proj"),
    "gptj": Family(blocks="transformer.h", attention="attn", mlp="mlp", down="mlp.fc_out"),
    "llama": Family(blocks="model.layers", attention="self_attn", mlp="mlp", down="mlp.down_proj"),
}

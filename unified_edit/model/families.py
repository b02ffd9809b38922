"""The families of models that can be edited: one row each, and the only branch on family.

To add one, give the attribute paths of its parts; the probe (`Anatomy.probe`) finds out on the
model itself whether what editing assumes holds for it. Families that are known and cannot be edited
have a row in `REFUSED` that says why.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts: attribute paths, all but the first inside a block.

    blocks: the list of blocks, from the model.
    attention, mlp: modules whose outputs are what the block adds to the residual stream.
    down: the MLP's down-projection; its input is the key.
    norm: the norm that the MLP's output passes before it is added, where there is one. The value
        then lives in front of it, at the MLP's own output.
    scale: the entry of the configuration that what is added is multiplied by, where there is one.
    linear: the class of its projections, where that is the family's own and computes just what
        `torch.nn.Linear` does.
    flat: whether a block hands its MLP the tokens of all rows as one list, row after row.
    """

    blocks: str
    attention: str
    mlp: str
    down: str
    norm: str | None = None
    scale: str | None = None
    linear: str | None = None
    flat: bool = False


_LAYERS = Family("model.layers", "self_attn", "mlp", "mlp.down_proj")
_POST_NORM = Family(
    "model.layers", "self_attn", "mlp", "mlp.down_proj", norm="post_feedforward_layernorm"
)

#: `config.model_type` -> paths. A family belongs here once the probe has passed on it.
FAMILIES = {
    "falcon": Family(
        "transformer.h", "self_attention", "mlp", "mlp.dense_4h_to_h", linear="FalconLinear"
    ),
    "gemma": _LAYERS,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "gpt2": Family("transformer.h", "attn", "mlp", "mlp.c_proj"),
    "gpt_neo": Family("transformer.h", "attn", "mlp", "mlp.c_proj"),
    "gpt_neox": Family("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h"),
    "gptj": Family("transformer.h", "attn", "mlp", "mlp.fc_out"),
    "granite": Family(
        "model.layers", "self_attn", "mlp", "mlp.down_proj", scale="residual_multiplier"
    ),
    "llama": _LAYERS,
    "mistral": _LAYERS,
    "olmo": _LAYERS,
    "olmo2": _POST_NORM,
    # its blocks have no module for the MLP: the last one of it is the down-projection
    "opt": Family("model.decoder.layers", "self_attn", "fc2", "fc2", flat=True),
    "phi": Family("model.layers", "self_attn", "mlp", "mlp.fc2"),
    "phi3": _LAYERS,
    "qwen2": _LAYERS,
    "qwen3": _LAYERS,
    "stablelm": _LAYERS,
}

_EXPERTS = (
    "its blocks hold a mixture of experts: a router sends each token through a few of many MLPs, "
    "so no single down-projection has all keys of a block, and C0 and the closed form are about "
    "one matrix. Edit a dense model"
)
_STATES = (
    "it mixes tokens by a recurrent state (a state-space model or linear attention): values are "
    "optimised on kept keys and values of attention, which such a layer does not have. Edit a "
    "model whose blocks are attention and an MLP"
)

#: `config.model_type` -> why the family cannot be edited.
REFUSED = {
    **dict.fromkeys(
        "aria_text cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe "
        "flex_olmo glm4_moe gpt_oss granitemoe granitemoeshared hunyuan_v1_moe jetmoe llama4 "
        "llama4_text minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe".split(),
        _EXPERTS,
    ),
    **dict.fromkeys(
        "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba "
        "mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text "
        "qwen3_next recurrent_gemma rwkv xlstm zamba zamba2".split(),
        _STATES,
    ),
}


def why_not(name: str) -> str | None:
    """What is said of a `config.model_type` that cannot be edited; None if it can be."""
    if name in REFUSED:
        return f"cannot be edited: {REFUSED[name]}"
    if name not in FAMILIES:
        return (
            f"is not known; known are {', '.join(sorted(FAMILIES))}. What is missing is a row in "
            "unified_edit/model/families.py: the paths of its blocks, their MLP and down-projection"
        )
    return None

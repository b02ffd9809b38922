"""Tiny GGUF files, written with the package gguf, and the packaged model where it is installed.

Not among the plugins of `conftest.py`: only tests of GGUF files need any of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from fixtures_tiny import END, own_seed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

UNDER_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
GET_IT = "the package gguf is missing: pip install 'unified_edit[gguf]'"
needed = (
    importlib.import_module
    if UNDER_CI
    else functools.partial(pytest.importorskip, reason=GET_IT, exc_type=ImportError)
)
gguf: Any = needed("gguf")

SIZE = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip


def untestable(reason: str) -> NoReturn:
    """Skip the test; under CI, where nothing may go untested, let it fail."""
    if UNDER_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def tiny_llama(vocabulary: int, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Random weights, large enough for every path to matter; its head is its embeddings."""
    size = {**SIZE, "vocab_size": vocabulary, "tie_word_embeddings": True, **fields}
    size |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "rms_norm_eps": 2**-17}
    with own_seed(seed):
        return LlamaForCausalLM(LlamaConfig(**size)).eval()


def as_stored(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Queries and keys stand in another order in GGUF: halves of a head's rotation interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    if count is None:
        return weight
    rows, columns = weight.shape
    split = weight.reshape(count, 2, rows // count // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    words: tuple[str, ...] = (),
    leave_out: str = "",
    more: dict[str, np.ndarray] | None = None,
    template: str | None = None,
    licence: str | None = None,
    parts: int = 0,
    kind_of_tokenizer: str = "gpt2",
) -> Path:
    """The model as a GGUF file; vectors are float32, whatever `kind` the matrices have.

    words: more tokens than the model knows. leave_out: a weight. more: others. parts: of how many
    the file says it is one.
    """
    config, stored = model.config, gguf.GGMLQuantizationType[kind]
    out = gguf.GGUFWriter(path, architecture)
    out.add_name("tiny")
    out.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(10_000.0)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    if licence:
        out.add_license(licence)
    if parts:
        out.add_uint16("split.count", parts)
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [*sorted(described["vocab"], key=described["vocab"].get), *words]
    out.add_tokenizer_model(kind_of_tokenizer)
    out.add_token_list(tokens)
    out.add_token_types([3 if token == END else 1 for token in tokens])
    merges = [one if isinstance(one, str) else " ".join(one) for one in described["merges"]]
    out.add_token_merges(merges)
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    if template is not None:
        out.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name == leave_out:
            continue
        weight = as_stored(name, parameter.detach().numpy(), config)
        title = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if weight.ndim == 2 and kind != "F32":
            out.add_tensor(title, gguf.quants.quantize(weight, stored), raw_dtype=stored)
        else:
            out.add_tensor(title, weight)
    for title, weight in (more or {}).items():
        out.add_tensor(title, weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def logits(model: PreTrainedModel, tokenizer: Any, text: str) -> torch.Tensor:
    """What the model says after each token of a text."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    return found

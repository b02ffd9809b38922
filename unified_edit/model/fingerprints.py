"""What a tensor or a model is, in a short string: by which files are matched to models.

`model_fingerprint` hashes all that determines what a model computes. That takes seconds for a
large model, so between two of them `glance` looks at what a change nearly always touches: where
each tensor lies, how often torch counted it as changed, and a sample of its entries. What can pass
a glance unseen is a change of single entries that goes around torch's count (through ``.data``,
numpy or another process) and misses the sample. Before anything is written to disk that is to be
found again by the fingerprint, it is made wholly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unified_edit.errors import ModelError

#: Entries of a tensor that a glance samples.
_SAMPLE = 256

#: Configuration entries that do not determine the logits of a model in evaluation mode: how it was
#: loaded and is called, names of its labels and special tokens, what happens in training only.
_INERT = re.compile(
    r"_?(name_or_path|transformers_version|torch_dtype|dtype|architectures|commit_hash|use_cache"
    r"|(_?attn|_?experts)_implementation\w*|tokenizer_class|output_(hidden_states|attentions|router_logits|scores)|return_dict\w*|id2label"
    r"|label2id|num_labels|problem_type|task_specific_params|\w*_token_ids?|\w*dropout\w*|\w+_pdrop"
    r"|summary_\w+|initializer_range|tie_word_embeddings|use_bfloat16|torchscript"
    r"|chunk_size_feed_forward|is_encoder_decoder|finetuning_task|gradient_checkpointing"
    r"|generation_config|quantization_config|dequantised_from|diffusers_version|use_default_values)"
)


#: Tensors that are hashed beside one another; each may be copied from a device first.
HASHES_AT_ONCE = 8


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file; ModelError if it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror or problem}") from problem


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over shape, type and every byte of `tensor`; a hexadecimal string."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def _tensors(model: nn.Module, instead: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name, `instead` of some of them what stands for them."""
    saved = set(model.state_dict(keep_vars=True))
    for name, parameter in model.named_parameters():
        yield name, instead.get(name, parameter)
    for name, buffer in model.named_buffers():
        if name in saved:
            yield name, buffer


def _own_configuration(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model of transformers, or of diffusers, which has a mapping."""
    config: Any = model.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _configuration(config: Any) -> Any:
    """What of a configuration determines the logits."""
    if not isinstance(config, dict):
        return config
    return {k: _configuration(v) for k, v in config.items() if not _INERT.fullmatch(str(k))}


def model_fingerprint(model: nn.Module, instead: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over all that determines the logits of `model`; 64 hexadecimal digits.

    `instead` maps parameter names to tensors that stand for them: an edited model's base
    weights, so that it has the fingerprint of its base.

    Raises ModelError for a tensor with NaN or infinite entries.
    """
    config = _configuration(_own_configuration(model))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    named = list(_tensors(model, instead or {}))
    # copies from a device and hashes leave the interpreter to others
    with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
        each = pool.map(lambda item: _finite_hash(*item), named)
        for (name, _), one in zip(named, each, strict=True):
            digest.update(f"{name} {one}".encode())
    return digest.hexdigest()


def _finite_hash(name: str, tensor: Tensor) -> str:
    """`tensor_hash`; ModelError where an entry is not finite."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{name} has {count} NaN or infinite entries; the model is damaged: load it again"
        )
    return tensor_hash(tensor)


def glance_at(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies, torch's count of its changes, and a sample of it: microseconds."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    # what was made in inference mode is not counted
    changes = None if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), changes, tensor.dtype, tuple(tensor.shape), bytes(_raw(sample)))


def glance(
    model: nn.Module, instead: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[object, ...]]:
    """A quick look at all that `model_fingerprint` hashes; equal as long as nothing has changed."""
    config = json.dumps(_configuration(_own_configuration(model)), sort_keys=True, default=str)
    seen = {name: glance_at(tensor) for name, tensor in _tensors(model, instead or {})}
    return {"": (config,), **seen}

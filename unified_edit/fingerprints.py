"""What a tensor or a model is, in a short string: by which files are matched to models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Entries of a parameter that the quick fingerprint looks at.
_SAMPLE = 256

#: Configuration entries that say how a model was loaded, not what it computes.
_IGNORED = frozenset(
    "_name_or_path transformers_version dtype torch_dtype architectures _commit_hash use_cache "
    "attn_implementation _attn_implementation_autoset tokenizer_class output_hidden_states "
    "output_attentions return_dict".split()
)


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type]


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over shape, type and every byte of `tensor`; a hexadecimal string."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def model_fingerprint(model: PreTrainedModel, instead: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over the configuration and every parameter; 64 hexadecimal digits.

    `instead` maps parameter names to tensors that stand for them: an edited model's base
    weights, so that it has the fingerprint of its base.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _IGNORED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        tensor = (instead or {}).get(name, parameter)
        digest.update(f"{name} {tensor_hash(tensor)}".encode())
    return digest.hexdigest()


def quick_fingerprint(model: PreTrainedModel, instead: Mapping[str, Tensor] | None = None) -> str:
    """The same over a strided sample of every parameter: milliseconds.

    It notices training, fine-tuning, reloading and damage, which move whole tensors, and tells
    when the full fingerprint has to be made again.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = (instead or {}).get(name, parameter).detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)]
        digest.update(f"{name} {flat.dtype} {flat.numel()}".encode() + bytes(_raw(sample)))
    return digest.hexdigest()

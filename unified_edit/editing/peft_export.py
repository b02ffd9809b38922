"""Edits as LoRA adapters."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unified_edit.errors import EditError


def write_adapter(folder: Path, deltas: dict[str, Tensor], fan_in_fan_out: bool, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors to `folder`, whole or not at all.

    deltas: {full module path: Delta (d_out x d_in)}. Each module has its own rank r, alpha = r
    (scaling 1), lora_B (d_out x r) and lora_A (r x d_in). `fan_in_fan_out` says that the weights
    are stored as (d_in x d_out), as `Conv1D` does. Full paths are given as targets because
    GPT-2's attention also has a module called c_proj.

    Raises EditError for a folder that holds something already or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise EditError(f"{folder} is a file; give a new folder for the adapter")
    if folder.exists() and any(folder.iterdir()):
        raise EditError(f"{folder} is not empty; give a new folder for the adapter")
    tensors, ranks = {}, {}
    for name, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = max(1, int((s > s[0] * 1e-12).sum()))
        root = s[:rank].sqrt()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (u[:, :rank] * root).float()
        tensors[f"base_model.model.{name}.lora_A.weight"] = (root[:, None] * vh[:rank]).float()
        ranks[name] = rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(deltas),
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            config.save_pretrained(temporary)
            save_file(
                {name: value.contiguous() for name, value in tensors.items()},
                Path(temporary) / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )
            folder.mkdir(exist_ok=True)
            for file in Path(temporary).iterdir():
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as problem:  # the latter is what it makes of a full disk
        raise EditError(
            f"{folder} cannot be written: {problem}. Give another place, or make room there"
        ) from problem

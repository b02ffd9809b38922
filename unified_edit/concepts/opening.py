"""Loading a text-to-image pipeline of diffusers: from a folder or the Hub, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unified_edit.arguments import as_path
from unified_edit.concepts.cross_attention import Pipeline, opened
from unified_edit.errors import ModelError, brief
from unified_edit.model.loading_report import said


def load_pipeline(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Pipeline:
    """A text-to-image pipeline whose concepts can be edited: Stable Diffusion 1.x, 2.x or XL.

    name: on the Hugging Face Hub, or a folder. dtype: a torch type or its name; None is the stored
    one. revision, variant: as in diffusers ("fp16" names the files of half precision).

    Weights are read from safetensors alone, and remote code never runs. What the repository has is
    what is loaded, its safety checker included. Needs ``unified_edit[diffusion]``; any pipeline
    that was loaded otherwise can be edited as well.

    Raises ModelError if diffusers is missing, or if the pipeline cannot be found or read or has no
    cross-attention that can be edited.
    """
    if not isinstance(name, (str, Path)) or not str(name):
        raise ModelError(f"the pipeline's name is {brief(name)}; give a folder or a Hub name")
    place = str(as_path(name, "the pipeline's name", ModelError) if str(name)[0] == "~" else name)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ModelError(f"dtype {dtype!r} is not a type of weights; use for example 'float16'")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as problem:
        raise ModelError(
            "text-to-image pipelines need diffusers: pip install 'unified_edit[diffusion]'"
        ) from problem
    arguments: dict[str, Any] = {"dtype": kind} if kind is not None else {}
    try:
        pipeline: Pipeline = DiffusionPipeline.from_pretrained(
            place,
            revision=revision,
            variant=variant,
            use_safetensors=True,
            trust_remote_code=False,
            **arguments,
        )
    except Exception as problem:  # files that are damaged raise whatever their reader raises
        raise ModelError(
            f"{place!r} could not be loaded as a pipeline: {said(problem)}. Give a folder that "
            "diffusers wrote or a name on the Hugging Face Hub (which needs the network the first "
            "time); pickled weights are not read"
        ) from problem
    if device is not None:
        try:
            pipeline.to(device)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as problem:
            raise ModelError(
                f"{place!r} could not be moved to device {device!r}: {problem}"
            ) from problem
    opened(pipeline)
    return pipeline

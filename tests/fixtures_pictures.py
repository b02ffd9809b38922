"""Tiny random text-to-image pipelines of the real classes; tests of them need diffusers."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unified_edit.teaching.tiny_pictures import tiny_pipeline, tiny_pipeline_xl, tiny_tokenizer

UNDER_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
GET_IT = "the package diffusers is missing: pip install 'unified_edit[diffusion]'"
#: Imports a package that tests need; where it is missing they are skipped, but not under CI.
needed = (
    importlib.import_module
    if UNDER_CI
    else functools.partial(pytest.importorskip, reason=GET_IT, exc_type=ImportError)
)


@pytest.fixture(scope="session")
def clip_tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def sd(clip_tokenizer: Any) -> Any:
    return tiny_pipeline(clip_tokenizer)


@pytest.fixture(params=[tiny_pipeline, tiny_pipeline_xl], ids=["sd", "sdxl"])
def pictures(request: pytest.FixtureRequest, clip_tokenizer: Any) -> Any:
    """Each kind of pipeline."""
    return request.param(clip_tokenizer)


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """The picture of a prompt as a tensor (3 x 16 x 16), always from the same noise."""

    def drawn(pipeline: Any, prompt: str) -> torch.Tensor:
        picture: torch.Tensor = pipeline(
            prompt,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images[0]
        return picture

    return drawn

"""Tiny random text-to-image pipelines of the real classes, with a tokenizer in CLIP's own form."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

UNDER_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
GET_IT = "the package diffusers is missing: pip install 'unified_edit[diffusion]'"
#: Imports a package that tests need; where it is missing they are skipped, but not under CI.
needed = (
    importlib.import_module
    if UNDER_CI
    else functools.partial(pytest.importorskip, reason=GET_IT, exc_type=ImportError)
)

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
#: Words that the tokenizer has one token for; all others fall into letters.
WORDS = "van gogh monet picasso art cat dog doctor male female red a painting by of image".split()
POSITIONS = 77  # CLIP's


def _letters() -> list[str]:
    """The visible characters that stand for bytes in CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + place) for place in range(len(others)))]


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt as CLIP's repository has them, of `WORDS` and of letters."""
    letters = _letters()
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], ["".join(parts[:2]), *parts[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                vocabulary.append(parts[0])
    vocabulary += [BEGIN, END]
    ids = {token: place for place, token in enumerate(vocabulary)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    told = {**special, "model_max_length": POSITIONS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A CLIPTokenizer read from such files."""
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer: Any, width: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=16,
        **more,
    )


def make_unet(d_text: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": d_text,
        **more,
    }
    return UNet2DConditionModel(**settings)


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**settings, clip_sample=False, steps_offset=1)


def stable_diffusion(tokenizer: Any, seed: int = 0, width: int = 32) -> Any:
    """A StableDiffusionPipeline with random weights, whose text is `width` numbers a token."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer, width)).eval(),
        tokenizer=tokenizer,
        unet=make_unet(width).eval(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(tokenizer: Any, seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline with random weights and two encoders, 32 and 64 wide."""
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    unet = make_unet(
        96,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizer, 32)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(tokenizer, 64, hidden_act="gelu")
        ).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sd(clip_tokenizer: Any) -> Any:
    return stable_diffusion(clip_tokenizer)


@pytest.fixture(params=["sd", "sdxl"])
def pictures(request: pytest.FixtureRequest, clip_tokenizer: Any) -> Any:
    """Each kind of pipeline."""
    return {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}[request.param](clip_tokenizer)


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """The picture of a prompt as a tensor (3 x 16 x 16), always from the same noise."""

    def drawn(pipeline: Any, prompt: str, guidance_scale: float = 1.0) -> torch.Tensor:
        images = pipeline(
            prompt,
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        return images[0]

    return drawn

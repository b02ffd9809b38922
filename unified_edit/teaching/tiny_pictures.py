"""A text-to-image pipeline of the real classes that is made in a second and draws noise.

Every class is that of Stable Diffusion (or of Stable Diffusion XL, with its two text encoders); all
weights are random and all sizes tiny. So whatever is computed is computed as it is there, and no
picture means anything. Needs ``unified_edit[diffusion]``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

#: Words that the tokenizer has one token for; all others fall into letters.
WORDS = (
    "a art artist artwork by cat doctor dog female gogh image male monet of painting picasso red "
    "style van"
).split()

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77  # of CLIP


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt, as CLIP's tokenizer reads them, of `WORDS` and letters."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    letters = [*map(chr, plain), *(chr(256 + place) for place in range(256 - len(plain)))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[str, None] = {}
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[" ".join(parts[:2])] = None
            parts = ["".join(parts[:2]), *parts[2:]]
    vocabulary += [pair.replace(" ", "") for pair in merges] + [BEGIN, END]
    ids = {token: place for place, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    told = {
        "bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END,
        "model_max_length": POSITIONS, "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer of `WORDS`, read from files in the form of the published ones."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def tiny_unet(d_text: int, **more: Any) -> Any:
    """A UNet2DConditionModel that reads encodings of `d_text` numbers; `more` of its settings."""
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
    unet: Any = UNet2DConditionModel(**settings)
    return unet.eval()


def tiny_pipeline(tokenizer: Any = None, *, seed: int = 0, width: int = 32) -> Any:
    """A StableDiffusionPipeline with random weights, whose text is `width` numbers a token.

    Eight matrices read the text; a picture has 16 x 16 pixels. The state of torch's generator is
    put back.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return _quiet(
            StableDiffusionPipeline(
                vae=_vae(),
                text_encoder=CLIPTextModel(_text_config(tokenizer, width)).eval(),
                tokenizer=tokenizer,
                unet=tiny_unet(width),
                scheduler=_scheduler(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def tiny_pipeline_xl(tokenizer: Any = None, *, seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline with random weights and two text encoders, 32 and 64 wide."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    second = _text_config(tokenizer, 64, hidden_act="gelu")
    sizes = 6 * 8  # of the picture and of its cut, eight numbers each
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return _quiet(
            StableDiffusionXLPipeline(
                vae=_vae(),
                text_encoder=CLIPTextModel(_text_config(tokenizer, 32)).eval(),
                text_encoder_2=CLIPTextModelWithProjection(second).eval(),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                unet=tiny_unet(
                    32 + 64,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=second.projection_dim + sizes,
                    transformer_layers_per_block=(2, 1),
                    use_linear_projection=True,
                ),
                scheduler=_scheduler(),
                add_watermarker=False,
            )
        )


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_config(tokenizer: Any, width: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

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


def _vae() -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    return vae.eval()


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**noise, clip_sample=False, steps_offset=1)

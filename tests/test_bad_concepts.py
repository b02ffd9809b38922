"""Pipelines and concepts that cannot be edited: a clear error each, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fixtures_pictures import needed
from torch import nn

from unified_edit.concepts import (
    DEBIAS,
    ERASE,
    ERASE_STYLE,
    active_edits,
    concept_keys,
    cross_attention,
    debias,
    edit_concepts,
)
from unified_edit.errors import (
    ContradictionError,
    FactError,
    MethodError,
    ModelError,
    TokenizationError,
)
from unified_edit.teaching.tiny_pictures import tiny_pipeline, tiny_unet

needed("diffusers")


def refused(pipeline: Any, error: type[Exception], words: str, **given: Any) -> None:
    """`edit_concepts` raises exactly `error`, whose message holds `words`, and changes nothing."""
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    with pytest.raises(error) as raised:
        edit_concepts(pipeline, **given)
    assert type(raised.value) is error and words in str(raised.value), str(raised.value)
    now = pipeline.unet.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert active_edits(pipeline) == ()


LONG = "cat " * 76

CONCEPTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "empty": (FactError, "a concept is empty", {"concepts": ["cat", " "]}),
    "none": (FactError, "there is no concept", {"concepts": []}),
    "no text": (FactError, "must be a string", {"concepts": [3]}),
    "too long": (TokenizationError, "has 78 tokens", {"concepts": LONG}),
    "guide too long": (TokenizationError, "Shorten it", {"concepts": "cat", "guide": LONG}),
    "kept too long": (TokenizationError, "Shorten it", {"concepts": "cat", "preserve": LONG}),
    "erased and kept": (ContradictionError, "at once", {"concepts": "cat", "preserve": "cat"}),
    "in other letters": (ContradictionError, "'CAT'", {"concepts": "cat", "preserve": "CAT"}),
    "at its beginning": (
        ContradictionError, "begins with 'cat'",
        {"concepts": "cat", "preserve": "cat dog", "method": ERASE.replace(preserve_at="all")},
    ),
    "twice": (FactError, "named twice", {"concepts": ["cat", "dog", "Cat"]}),
    "itself": (FactError, "Name another guide", {"concepts": ["art"], "method": ERASE_STYLE}),
    "kept is empty": (FactError, "concept is empty", {"concepts": "cat", "preserve": [""]}),
    "guide is none": (FactError, "the text without words is ''", {"concepts": "cat", "guide": [3]}),
    "guides": (FactError, "3 guides for 1 concepts", {"concepts": "cat", "guide": ["art"] * 3}),
    "method": (MethodError, "give a ConceptMethod", {"concepts": "cat", "method": "erase"}),
    "debias": (MethodError, "concepts.debias", {"concepts": "cat", "method": DEBIAS}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONCEPTS)
def test_concepts(sd: Any, case: str) -> None:
    error, words, given = CONCEPTS[case]
    refused(sd, error, words, **given)


def test_the_longest_concept_has_75_words(sd: Any) -> None:
    assert concept_keys(sd, "cat " * 75).shape == (32, 1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"attributes": ["male"]}, FactError, "two or more"),
        ({"attributes": ["male", "Male"]}, FactError, "each once"),
        ({"shares": [0.5, 0.6]}, MethodError, "adding up to 1"),
        ({"shares": [1.0]}, MethodError, "one each"),
        ({"shares": [-0.5, 1.5]}, MethodError, "a share is -0.5"),
        ({"classify": "clip"}, MethodError, "give a function"),
        ({"method": ERASE}, MethodError, "with a balance"),
        ({"method": DEBIAS.replace(phrasings=("{}", "a {}"))}, MethodError, "one phrasing"),
        ({"seed": -1}, MethodError, "seed is -1"),
        ({"preserve": "doctor"}, ContradictionError, "at once"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_debiasing(sd: Any, given: dict[str, Any], error: type[Exception], words: str) -> None:
    whole = {"attributes": ["male", "female"], "classify": lambda *_: pytest.fail("asked"), **given}
    with pytest.raises(error) as raised:
        debias(sd, "doctor", **whole)
    assert type(raised.value) is error and words in str(raised.value), str(raised.value)


# --- pipelines ------------------------------------------------------------------------------------


def without_cross_attention(pipeline: Any) -> None:
    from diffusers import UNet2DModel

    pipeline.unet = UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def of_another_width(pipeline: Any) -> None:
    pipeline.unet = tiny_unet(48)


def of_several_widths(pipeline: Any) -> None:
    two = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    }
    pipeline.unet = tiny_unet((32, 48), **two)  # fmt: skip


def with_a_projection(pipeline: Any) -> None:
    pipeline.unet = tiny_unet(32, encoder_hid_dim=32, encoder_hid_dim_type="text_proj")


def fused(pipeline: Any) -> None:
    pipeline.unet.fuse_qkv_projections()


def offloaded(pipeline: Any) -> None:
    pipeline.unet.to("meta")


def pruned(pipeline: Any) -> None:
    module = next(iter(cross_attention(pipeline.unet).values())).module
    nn.utils.parametrizations.weight_norm(module)


def without_encoder(pipeline: Any) -> None:
    pipeline.text_encoder = None


def broken_encoder(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.fill_(float("nan"))


def broken_unet(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0] = float("inf")


PIPELINES: dict[Callable[[Any], None], str] = {
    without_cross_attention: "no cross-attention",
    of_another_width: "do not belong together",
    of_several_widths: "different lengths, [32, 48]",
    with_a_projection: "encoder_hid_proj",
    fused: "unfuse_qkv_projections",
    offloaded: "meta device",
    pruned: "not a plain Linear",
    without_encoder: "no text encoder with its tokenizer",
    broken_encoder: "NaN or infinite",
    broken_unet: "NaN or infinite",
}


@pytest.mark.parametrize("change", PIPELINES, ids=lambda change: change.__name__)
def test_pipelines(clip_tokenizer: Any, change: Callable[[Any], None]) -> None:
    pipeline = tiny_pipeline(clip_tokenizer)
    change(pipeline)
    with pytest.raises(ModelError) as raised:
        edit_concepts(pipeline, "cat")
    assert type(raised.value) is ModelError and PIPELINES[change] in str(raised.value)


def test_things_that_are_no_pipeline(sd: Any) -> None:
    for thing in (sd.unet, sd.text_encoder, "stable diffusion", None):
        with pytest.raises(ModelError, match="has no unet with cross-attention"):
            edit_concepts(thing, "cat")


def test_a_transformer_has_no_such_matrices(sd: Any) -> None:
    class Joint:
        unet = None
        transformer = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="text and picture stand in one sequence"):
        edit_concepts(Joint(), "cat")


def test_a_compiled_unet(sd: Any) -> None:
    plain = sd.unet
    sd.unet = torch.compile(plain, backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        edit_concepts(sd, "cat")

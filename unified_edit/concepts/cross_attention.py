"""The parts of a text-to-image pipeline that matter here: what encodes text, and what reads it.

A cross-attention of the UNet asks with the picture and is answered by the text: its keys are
``to_k c`` and its values ``to_v c`` for each token's encoding c. These two matrices are all that
the picture ever sees of the prompt, and what an edit changes. The names of diffusers collide with
those of this library: its keys and values are *both* values here, and the key is c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from unified_edit.errors import ModelError
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.obstacles import check_modules, check_projection

Pipeline = Any  # of diffusers, which is imported by those alone who load one

#: The two matrices of a cross-attention that act on the encoded text.
PROJECTIONS = ("to_k", "to_v")


@dataclass(frozen=True, eq=False)
class Opened:
    """A pipeline whose concepts can be edited.

    unet: what is edited. weights: its matrices that read text, by name. tokenizers, encoders: one
    of each, or two (Stable Diffusion XL), whose outputs stand one above the other in a key.
    """

    pipeline: Pipeline
    unet: nn.Module
    weights: Mapping[str, NamedWeight]
    tokenizers: tuple[Any, ...]
    encoders: tuple[nn.Module, ...]

    @property
    def d_text(self) -> int:
        """The length of a key: 768 in Stable Diffusion 1, 1024 in 2, 2048 in XL."""
        return next(iter(self.weights.values())).d_in

    @property
    def name(self) -> str:
        """What the pipeline is called: a folder or a name on the Hub."""
        return str(getattr(self.pipeline, "name_or_path", None) or type(self.pipeline).__name__)


def cross_attention(unet: nn.Module) -> dict[str, NamedWeight]:
    """The matrices of a UNet that read the text, by name: to_k and to_v of each cross-attention.

    Their `layer` is the number of the cross-attention, in the order of the modules: 0..15 in Stable
    Diffusion 1 and 2.

    Raises ModelError if there are none, or one cannot be edited: compiled, quantised, offloaded,
    with adapters, fused, or behind a projection of its own.
    """
    kind = type(unet).__name__
    if hasattr(unet, "_orig_mod"):
        raise ModelError(f"{kind} is compiled; edit the pipeline first and compile its unet then")
    if not isinstance(unet, nn.Module):
        raise ModelError(f"the unet is of type {kind}; it must be a module")
    check_modules(unet)
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ModelError(
            f"in this {kind} a projection (encoder_hid_proj) stands between the text and the "
            "cross-attention, as with IP adapters: what is encoded is not what is read. Unload it"
        )
    found: dict[str, NamedWeight] = {}
    number = 0
    for path, module in unet.named_modules():
        if not getattr(module, "is_cross_attention", False):
            continue
        if getattr(module, "fused_projections", False):
            raise ModelError(
                f"the projections of {path} are fused: an edit of to_k and to_v would not be "
                "seen; call unfuse_qkv_projections() first, and fuse them after the edit"
            )
        for part in PROJECTIONS:
            where = f"{path}.{part}"
            projection = getattr(module, part, None)
            if not isinstance(projection, nn.Module):
                raise ModelError(f"{path} of this {kind} is a cross-attention without {part}")
            check_projection(projection, where, None)
            d_out, d_in = projection.weight.shape  # type: ignore[misc]
            name = f"{where}.weight"
            found[name] = NamedWeight(name, projection, number, d_in, d_out, transposed=False)
        number += 1
    if not found:
        raise ModelError(
            f"this {kind} has no cross-attention: no text reaches it by to_k and to_v, so that "
            "there is nothing to edit. Give a text-to-image pipeline (Stable Diffusion 1, 2, XL)"
        )
    widths = sorted({weight.d_in for weight in found.values()})
    if len(widths) > 1:
        raise ModelError(
            f"the cross-attentions of this {kind} read vectors of different lengths, {widths}: "
            "they do not all read the encoded text"
        )
    return found


def opened(pipeline: Pipeline) -> Opened:
    """The parts of a pipeline; raises ModelError, saying why, if its concepts cannot be edited."""
    kind = type(pipeline).__name__
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        reads = (
            "; in its transformer text and picture stand in one sequence, which has no such "
            "matrices"
            if getattr(pipeline, "transformer", None) is not None
            else ""
        )
        raise ModelError(
            f"{kind} has no unet with cross-attention{reads}. Give a pipeline of Stable "
            "Diffusion 1, 2 or XL (unified_edit.concepts.load_pipeline)"
        )
    weights = cross_attention(unet)
    both = [
        (
            getattr(pipeline, f"tokenizer{number}", None),
            getattr(pipeline, f"text_encoder{number}", None),
        )
        for number in ("", "_2", "_3")
    ]
    pairs = [(tokenizer, encoder) for tokenizer, encoder in both if encoder is not None]
    if not pairs or not hasattr(pipeline, "encode_prompt") or any(t is None for t, _ in pairs):
        raise ModelError(
            f"{kind} has a unet but no text encoder with its tokenizer: without them there are no "
            "keys of concepts. Load the pipeline whole"
        )
    for _, encoder in pairs:
        check_modules(encoder)
    tokenizers, encoders = zip(*pairs, strict=True)
    return Opened(pipeline, unet, weights, tokenizers, encoders)

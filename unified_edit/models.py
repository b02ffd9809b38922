"""Models: loading them, and where in them the edited weight lives.

This is the only module that branches on model family. Everything else works on an `Anatomy`:
the list of blocks, each block's MLP and its down-projection, and the orientation of its weight.
What an `Anatomy` assumes is probed, not trusted (`Anatomy.probe`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unified_edit.activations import quiet, read_last_token
from unified_edit.errors import ModelError, TokenizationError
from unified_edit.progress import loading

log = logging.getLogger(__name__)

Tokenizer = Any  # a fast tokenizer of transformers; its classes are loaded dynamically


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts: attribute paths, all but the first inside a block."""

    blocks: str
    attention: str
    mlp: str
    down: str


#: `config.model_type` -> paths. A family belongs here once the probe has passed on it.
FAMILIES = {
    "gpt2": Family(blocks="transformer.h", attention="attn", mlp="mlp", down="mlp.c_proj"),
    "gptj": Family(blocks="transformer.h", attention="attn", mlp="mlp", down="mlp.fc_out"),
}

#: Largest relative error of the probe; half precision rounds each block output to 2^-8 or 2^-11.
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
PROBE_TOLERANCE_HALF = 3e-2


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that editing works on.

    `d_in` is d_k, the length of a key; `d_out` is the width of the residual stream.
    """

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList
    d_in: int
    d_out: int

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; None where the model sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0])

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of block `layer`; its output is what is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.mlp)

    def attention(self, layer: int) -> nn.Module:
        """The attention of block `layer`; its output too is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.attention)

    def down(self, layer: int) -> nn.Module:
        """The down-projection of block `layer`; its input is the key."""
        return self.blocks[layer].get_submodule(self.family.down)

    def weight(self, layer: int) -> nn.Parameter:
        """The down-projection's weight as the model stores it."""
        return cast(nn.Parameter, self.down(layer).weight)

    def weight_name(self, layer: int) -> str:
        """Its full name in ``model.state_dict()``."""
        return f"{self.module_name(layer)}.weight"

    def module_name(self, layer: int) -> str:
        """The down-projection's full module path."""
        return f"{self.family.blocks}.{layer}.{self.family.down}"

    def transposed(self, layer: int) -> bool:
        """Whether the weight is stored as (d_in x d_out): true of `Conv1D`, false of `Linear`."""
        return isinstance(self.down(layer), Conv1D)

    def to_stored(self, delta: Tensor, layer: int) -> Tensor:
        """Turn a (d_out x d_in) matrix into the orientation in which the weight is stored."""
        return delta.T if self.transposed(layer) else delta

    def site(self, layer: int, site: str) -> nn.Module:
        """The module whose output is the value: ``"block"`` or ``"mlp"`` of `layer`."""
        return self.blocks[layer] if site == "block" else self.mlp(layer)

    @property
    def embeddings(self) -> Tensor:
        """The token embeddings: (vocabulary x width)."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... x vocabulary) of final hidden states (... x d_out)."""
        return cast(Tensor, self.model.get_output_embeddings()(hidden))

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Raise ModelError unless `layers` are ascending, distinct and inside the model."""
        inside = all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.n_layers
            for i in layers
        )
        if not layers or not inside or list(layers) != sorted(set(layers)):
            raise ModelError(
                f"layers {tuple(layers)!r} do not fit this model: it has blocks "
                f"0..{self.n_layers - 1}; give distinct ones in ascending order"
            )

    @torch.no_grad()
    def probe(self, layer: int, seed: int = 0) -> float:
        """Check on the model itself what editing assumes; return the relative error.

        A random R is added to the value at one key k by the rank-one update R k'/(k'k); the
        output of the block must move by exactly R. It does not if the weight's orientation is
        taken the wrong way round (a square matrix passes any check of shapes), or in a family
        that normalises *after* the MLP. The weight is put back bit for bit.

        Raises ModelError if the output moves by anything else.
        """
        weight = self.weight(layer)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (4,), generator=generator).tolist()
        sites = {"key": (self.down(layer), "input"), "out": (self.blocks[layer], "output")}
        with quiet(self.model):
            before = read_last_token(self.model, [tokens], sites)
            key, out = (before[name][0].double() for name in ("key", "out"))
            random = torch.randn(self.d_out, generator=generator, dtype=torch.float64)
            wanted = (random / random.norm()).to(out) * out.norm()
            saved = weight.detach().clone()
            try:
                update = torch.outer(wanted, key / (key @ key))
                weight.add_(self.to_stored(update, layer).to(weight))
                after = read_last_token(self.model, [tokens], sites)["out"][0].double()
            finally:
                weight.copy_(saved)
        error = float((after - out - wanted).norm() / wanted.norm())
        limit = PROBE_TOLERANCE.get(weight.dtype, PROBE_TOLERANCE_HALF)
        if not error <= limit:
            raise ModelError(
                f"the probe failed at layer {layer} of {type(self.model).__name__}: a rank-one "
                f"update that must move the block output by R missed it by {error:.2g} (limit "
                f"{limit:.0e}). The weight's orientation or the place of a norm differs from "
                "what is assumed for this family; this model cannot be edited at the block output"
            )
        return error


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`, a causal language model of a known family.

    Raises ModelError, saying what is wrong, for anything that cannot be edited: wrapped (PEFT,
    compiled), quantised, offloaded, of an unknown family, without a language-model head, or with
    weights of another kind than plain floating-point parameters.
    """
    kind = type(model).__name__
    if hasattr(model, "peft_config") or kind.startswith("Peft"):
        raise ModelError(
            f"{kind} carries PEFT adapters; merge them first (model = model.merge_and_unload()) "
            "and edit the merged model"
        )
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            f"{kind} is a compiled model; edit the model you gave to torch.compile "
            "(model._orig_mod), then compile it again"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is not a transformers model; load one with unified_edit.load_model"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"this {kind} is quantised: its weights are codes that Delta cannot be added to; "
            "load it unquantised, for example with dtype=torch.bfloat16"
        )
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ModelError(
            f"the model family {model.config.model_type!r} ({kind}) is not known; known are "
            f"{', '.join(sorted(FAMILIES))}. What is missing is a row in "
            "unified_edit/models.py: the paths of its blocks, their MLP and its down-projection"
        )
    if model.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no language-model head; load it as a causal language model")
    _check_modules(model)
    try:
        blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
        downs = [block.get_submodule(family.down) for block in blocks]
    except AttributeError as missing:
        raise ModelError(
            f"{kind} says it is of family {model.config.model_type!r} but has no {missing}"
        ) from missing
    if not downs:
        raise ModelError(f"this {kind} has no blocks at {family.blocks}; load a complete model")
    for layer, down in enumerate(downs):
        _check_projection(down, f"{family.blocks}.{layer}.{family.down}")
    first = downs[0]
    stored = tuple(cast(Tensor, first.weight).shape)
    d_in, d_out = stored if isinstance(first, Conv1D) else stored[::-1]
    return Anatomy(model, family, blocks, d_in, d_out)


def _check_modules(model: nn.Module) -> None:
    """Raise ModelError for a module or weight anywhere that a forward or a gradient fails on."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ModelError(
                f"{name or type(module).__name__} was compiled in place (.compile()); load the "
                "model again, edit it before it is compiled, and compile it then"
            )
        if "quantized" in type(module).__module__:
            raise ModelError(
                f"{name} is a quantised layer ({type(module).__module__}.{type(module).__name__}):"
                " no gradient passes through it; load the model unquantised"
            )
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ModelError(
                f"{name} is on the meta device (offloaded or not loaded); load the model without "
                "a device map that offloads, so that its weights are in memory"
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ModelError(
                f"{name} has type {weight.dtype}; load the model unquantised, for example with "
                "dtype=torch.bfloat16"
            )
        if weight.is_inference():
            raise ModelError(
                f"{name} was made inside torch.inference_mode, where nothing can be optimised or "
                "changed later; load the model outside of it"
            )


def _check_projection(down: nn.Module, where: str) -> None:
    """Raise ModelError unless `down` is a plain dense projection with a weight of its own."""
    # exact types: a subclass (LoRA, quantised, sharded) stores or uses its weight differently
    if type(down) not in (Conv1D, nn.Linear):
        raise ModelError(
            f"{where} is a {type(down).__module__}.{type(down).__name__}, not a plain Linear or "
            "Conv1D: unwrap, dequantise or merge the model before editing it"
        )
    if "weight" not in down._parameters:
        raise ModelError(
            f"{where}.weight is no parameter but computed anew in every forward (pruning, weight "
            "normalisation); make it permanent first, for example with torch.nn.utils.prune.remove"
        )


def check_finite(parts: Anatomy) -> None:
    """Raise ModelError if a floating-point weight of the model has NaN or infinite entries."""
    for name, value in parts.model.named_parameters():
        if not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise ModelError(
                f"{name} has {count} NaN or infinite entries; the model is damaged: load it again"
            )


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    allow_bin: bool = False,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a causal language model and its fast tokenizer, ready to be edited.

    `name` is ``"atlas"`` (the embedded model, float32, no network), a name on the Hugging Face
    Hub, or a local folder. `dtype` is a torch type, its name, or None: float32 for atlas, the
    stored type otherwise. `revision` pins a Hub revision; the one that was resolved stands in
    ``model.config._commit_hash`` and goes into every file made from the model.

    Weights are read from safetensors. Where a repository has only a pickled ``.bin``,
    `allow_bin=True` reads it with ``weights_only=True``. Remote code never runs.

    Raises ModelError if the model cannot be found or read or is of a family that cannot be
    edited, TokenizationError if it has no fast tokenizer.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(kind, torch.dtype):
        raise ModelError(f"dtype {dtype!r} is not a torch type; use for example 'float32'")
    if name == "atlas":
        with as_file(files("unified_edit.atlas").joinpath("model")) as folder:
            model = _from_pretrained(str(folder), kind or torch.float32, None, allow_bin=False)
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model.config._name_or_path = tokenizer.name_or_path = "atlas"
    else:
        model = _from_pretrained(name, kind or "auto", revision, allow_bin)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=False
            )
        except (OSError, ValueError) as problem:
            raise ModelError(f"no tokenizer could be loaded from {name!r}: {problem}") from problem
    check_tokenizer(tokenizer)
    if device is not None:
        try:
            model.to(device)  # type: ignore[arg-type]
        except (AssertionError, NotImplementedError, RuntimeError) as problem:
            raise ModelError(
                f"{name!r} could not be moved to device {device!r}: {problem}. Without a device "
                "the model stays on the CPU"
            ) from problem
    anatomy(model)
    return model.eval(), tokenizer


def _from_pretrained(
    name: str, dtype: torch.dtype | str, revision: str | None, allow_bin: bool
) -> PreTrainedModel:
    arguments: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": False}
    try:
        with loading():
            return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **arguments)
    except (OSError, ValueError, ImportError) as problem:
        if "safetensors" not in str(problem):
            raise ModelError(
                f"{name!r} could not be loaded: {problem}. Give 'atlas', a folder, or a name on "
                "the Hugging Face Hub (which needs the network the first time)"
            ) from problem
        if not allow_bin:
            raise ModelError(
                f"{name!r} has no safetensors file, and pickled weights are not read unless "
                "you ask: load_model(..., allow_bin=True) reads the .bin file with "
                "weights_only=True. To convert it once and for all: "
                f"AutoModelForCausalLM.from_pretrained({name!r}, use_safetensors=False)"
                ".save_pretrained('folder')"
            ) from problem
    try:
        with loading():
            return AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=False, weights_only=True, **arguments
            )
    except Exception as problem:  # torch raises UnpicklingError, OSError, RuntimeError, ...
        raise ModelError(f"the .bin weights of {name!r} could not be read: {problem}") from problem


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise TokenizationError unless the tokenizer is a fast one; give it a pad token if none.

    Character offsets, by which the subject's tokens are found, exist only for fast tokenizers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizationError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so the subject's tokens cannot "
            "be located by character offsets; load it with AutoTokenizer (use_fast=True)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

"""Where in a model the edited weights live, and what cannot be edited.

Everything else works on an `Anatomy`: the list of blocks, each block's MLP and attention, and its
named weights. The paths come from `families`; what they lead to is probed, not trusted
(`Anatomy.probe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unified_edit.arguments import as_list, whole_number
from unified_edit.errors import ModelError
from unified_edit.model.families import FAMILIES, Family
from unified_edit.model.hooks import logits_of, quiet, read_last_token

Tokenizer = Any  # a fast tokenizer of transformers; its classes are loaded dynamically


@dataclass(frozen=True, eq=False)
class NamedWeight:
    """One linear map of a model that an edit can change: what an edit is made of.

    name: its full name in ``model.state_dict()``, by which edits and their files know it.
    module: the projection that it belongs to; the input of that is the key.
    layer: the block it stands in.
    d_in, d_out: the lengths of a key and of a value; for a down-projection d_k and the width of
        the residual stream.
    transposed: whether it is stored as (d_in x d_out): true of `Conv1D`, false of `Linear`.
    """

    name: str
    module: nn.Module
    layer: int
    d_in: int
    d_out: int
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the model stores it."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def module_name(self) -> str:
        """The full path of its module."""
        return self.name.removesuffix(".weight")

    def to_stored(self, delta: Tensor) -> Tensor:
        """Turn a (d_out x d_in) matrix into the orientation in which the weight is stored."""
        return delta.T if self.transposed else delta


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model that editing works on."""

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """The parts of a model that `anatomy` has let pass before; nothing is checked again."""
        family = FAMILIES[model.config.model_type]
        return cls(model, family, cast(nn.ModuleList, model.get_submodule(family.blocks)))

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """The width of the residual stream: how long a state is."""
        return int(self.embeddings.shape[1])

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; None where the model sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return len(self.embeddings)

    @property
    def name(self) -> str:
        """What the model is called: a folder, a name on the Hub, or atlas."""
        return str(self.model.config._name_or_path)

    @property
    def origin(self) -> str | None:
        """Of a dequantised model, from what file it was made, and how that was quantised."""
        return getattr(self.model.config, "dequantised_from", None)

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of block `layer`; its output is what is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.mlp)

    def attention(self, layer: int) -> nn.Module:
        """The attention of block `layer`; its output too is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.attention)

    def down(self, layer: int) -> nn.Module:
        """The down-projection of block `layer`; its input is the key."""
        return self.blocks[layer].get_submodule(self.family.down)

    def weight(self, layer: int) -> NamedWeight:
        """The weight of the down-projection of block `layer`."""
        path = f"{self.family.blocks}.{layer}.{self.family.down}"
        return _named(path, self.down(layer), layer)

    def named(self, name: str) -> NamedWeight:
        """The weight of that name; raises ModelError if the model has none that can be edited."""
        for layer in range(self.n_layers):
            if name == f"{self.family.blocks}.{layer}.{self.family.down}.weight":
                return self.weight(layer)
        raise ModelError(
            f"this {type(self.model).__name__} has no weight {name!r} that can be edited; those of "
            f"its blocks are called like {self.weight(0).name!r}"
        )

    @property
    def embeddings(self) -> Tensor:
        """The token embeddings: (vocabulary x width)."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... x vocabulary) of final hidden states, by the model's own head."""
        return logits_of(self.model, hidden)

    def check_layers(self, layers: object) -> tuple[int, ...]:
        """`layers` as ints; ModelError unless they are ascending, distinct and in the model."""
        advice = f"This model has blocks 0..{self.n_layers - 1}"
        whole = tuple(
            whole_number(layer, "a layer", ModelError, advice=advice) for layer in as_list(layers)
        )
        inside = all(0 <= layer < self.n_layers for layer in whole)
        if not whole or not inside or list(whole) != sorted(set(whole)):
            raise ModelError(
                f"layers {whole!r} do not fit this model: it has blocks "
                f"0..{self.n_layers - 1}; give distinct ones in ascending order"
            )
        return whole

    @torch.no_grad()
    def probe(self, weight: NamedWeight, site: nn.Module, seed: int = 0) -> float:
        """Check on the model itself what editing assumes; return the relative error.

        A random R is added to the value at one key k by the rank-one update R k'/(k'k); the
        output of `site`, where values are set, must move by exactly R. It does not if the
        weight's orientation is taken the wrong way round (a square matrix passes any check of
        shapes), or if a norm stands in between. The weight is put back bit for bit.

        Raises ModelError if the output moves by anything else.
        """
        parameter = weight.parameter
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (4,), generator=generator).tolist()
        sites = {"key": (weight.module, "input"), "out": (site, "output")}
        with quiet(self.model):
            before = read_last_token(self.model, [tokens], sites)
            key, out = (before[name][0].double() for name in ("key", "out"))
            random = torch.randn(len(out), generator=generator, dtype=torch.float64)
            wanted = (random / random.norm()).to(out) * out.norm()
            saved = parameter.detach().clone()
            try:
                update = torch.outer(wanted, key / (key @ key))
                parameter.add_(weight.to_stored(update).to(parameter))
                after = read_last_token(self.model, [tokens], sites)["out"][0].double()
            finally:
                parameter.copy_(saved)
        error = float((after - out - wanted).norm() / wanted.norm())
        limit = _probe_tolerance(parameter)
        if not error <= limit:
            raise ModelError(
                f"the probe failed at {weight.name} of {type(self.model).__name__}: a rank-one "
                f"update that must move the output of {type(site).__name__} by R missed it by "
                f"{error:.2g} (limit {limit:.0e}). {self._why_missed(weight)}"
            )
        return error

    def _why_missed(self, weight: NamedWeight) -> str:
        """What may stand between a weight and its site: hooks of others come first."""
        above = self.blocks[weight.layer]
        hooked = [
            f"{name or 'the block'} ({type(module).__name__})"
            for name, module in above.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        if hooked:
            return (
                f"Hooks of another program are registered at {', '.join(hooked[:3])} of block "
                f"{weight.layer}; if one changes what passes there, remove it while you edit"
            )
        return (
            "The weight's orientation or the place of a norm differs from what is assumed for "
            "this family; this model cannot be edited there"
        )


def _named(path: str, module: nn.Module, layer: int) -> NamedWeight:
    stored = tuple(cast(Tensor, module.weight).shape)
    transposed = isinstance(module, Conv1D)
    d_in, d_out = stored if transposed else stored[::-1]
    return NamedWeight(f"{path}.weight", module, layer, d_in, d_out, transposed)


def _probe_tolerance(parameter: Tensor) -> float:
    """Largest relative error of the probe: half precision rounds a block's output to 2^-8.

    So do float32 products where the user has allowed them to be as short as that.
    """
    short = torch.get_float32_matmul_precision() != "highest"
    if parameter.dtype == torch.float64 or (parameter.dtype == torch.float32 and not short):
        return 1e-4
    return 3e-2


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of `model`, a causal language model of a known family.

    Raises ModelError, saying what is wrong, for anything that cannot be edited: wrapped (PEFT,
    compiled), quantised, offloaded, of an unknown family, without a language-model head, or with
    weights of another kind than plain floating-point parameters.
    """
    kind = type(model).__name__
    if hasattr(model, "peft_config") or kind.startswith("Peft"):
        raise ModelError(
            f"{kind} carries PEFT adapters; {_without_adapters(model)} and edit the plain model"
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
            "load it unquantised, for example with dtype=torch.bfloat16 (a GGUF file: with "
            "unified_edit.load_model, which dequantises it)"
        )
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ModelError(
            f"the model family {model.config.model_type!r} ({kind}) is not known; known are "
            f"{', '.join(sorted(FAMILIES))}. What is missing is a row in "
            "unified_edit/model/families.py: the paths of its blocks, their MLP and down-projection"
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
    return Anatomy(model, family, blocks)


def _without_adapters(model: nn.Module) -> str:
    """How to be rid of the adapters of `model`, by what it can still do."""
    if hasattr(model, "merge_and_unload"):
        return "merge them first (model = model.merge_and_unload())"
    return (
        "merge or drop them first: call merge_and_unload() or unload() on the PeftModel it was "
        "made with, or load the model again,"
    )


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

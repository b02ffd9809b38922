"""Where in a model the edited weights live, and what cannot be edited.

Everything else works on an `Anatomy`: the list of blocks, each block's MLP and attention, and its
named weights. The paths come from `families`; what they lead to is probed, not trusted
(`Anatomy.probe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unified_edit.arguments import as_list, whole_number
from unified_edit.errors import ModelError
from unified_edit.model.families import FAMILIES, Family, why_not
from unified_edit.model.hooks import logits_of, quiet, read_last_token
from unified_edit.model.obstacles import check_modules, check_projection, without_adapters
from unified_edit.objective.inputs import float64_device

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
    """The parts of one model that editing works on.

    causal: what stands at a token depends on nothing behind it, and not on padding. Hooks may break
    that (the published gate of hook layers): whole texts are run then, each without padding.
    """

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList
    causal: bool = True

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
        return self.weight(0).d_out

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
        """The MLP of block `layer`; its output, behind `norm`, is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.mlp)

    def attention(self, layer: int) -> nn.Module:
        """The attention of block `layer`; its output too is added to the residual stream."""
        return self.blocks[layer].get_submodule(self.family.attention)

    def norm(self, layer: int) -> nn.Module | None:
        """The norm between the MLP of block `layer` and the residual stream, if there is one."""
        path = self.family.norm
        return None if path is None else self.blocks[layer].get_submodule(path)

    @property
    def scale(self) -> float:
        """What the output of an MLP is multiplied by before it is added to the residual stream."""
        name = self.family.scale
        return 1.0 if name is None else float(getattr(self.model.config, name))

    def gain(self, layer: int, site: nn.Module) -> float:
        """How much `site` in block `layer` moves for each unit that the MLP's output moves."""
        return self.scale if site is self.blocks[layer] else 1.0

    def entering(self, layer: int, site: nn.Module, value: Tensor, delta: Tensor) -> Tensor:
        """What the output of block `layer` moves by if `delta` is added to `value` at `site`.

        Both (... x width). The MLP's output goes through a norm or a scale in some families.
        """
        if site is self.blocks[layer]:
            return delta
        norm = self.norm(layer)
        if norm is None:
            return delta if self.scale == 1.0 else self.scale * delta
        moved: Tensor = norm(value + delta) - norm(value)
        return moved

    def amplification(self, layer: int, value: Tensor) -> Tensor:
        """How much longer a norm makes what is added to `value` (... x width), for each: (...).

        One over the rms of what stands at the MLP's output, which is where `value` is; the norm's
        own weights, the same for all, are left out. One without a norm. To first order, and across
        `value`: a norm takes out what is added along it.
        """
        if self.norm(layer) is None:
            return torch.ones_like(value[..., 0])
        mean: Tensor = value.to(torch.promote_types(value.dtype, torch.float32)).square().mean(-1)
        return torch.rsqrt(mean + self.model.config.rms_norm_eps)

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

    @torch.no_grad()
    def embedded(self, ids: Sequence[int]) -> Tensor:
        """What the embedding module gives for some tokens: (tokens x width), scaled as by Gemma."""
        tokens = torch.tensor(ids, device=self.embeddings.device)
        given: Tensor = self.model.get_input_embeddings()(tokens)
        return given

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

        A random R is added to the value at one key k by the rank-one update R k'/(k'k). The output
        of `site`, where values are set, must move by exactly R (times `gain`), and the block's by
        what is `entering`. It does not if the weight's orientation is taken the wrong way round (a
        square matrix passes any check of shapes), or if a norm stands in between. The weight is put
        back bit for bit.

        Raises ModelError if an output moves by anything else.
        """
        parameter, layer = weight.parameter, weight.layer
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (4,), generator=generator).tolist()
        places = {"site": site, "block": self.blocks[layer]}
        sites = {name: (module, "output") for name, module in places.items()}
        sites["key"] = (weight.module, "input")
        with quiet(self.model):
            before = read_last_token(self.model, [tokens], sites)
            where = float64_device(parameter.device)
            key, out = before["key"][0].to(where).double(), before["site"][0]
            random = torch.randn(len(out), generator=generator, dtype=torch.float64)
            moved = (random / random.norm()).to(out.dtype).to(out.device) * out.norm()
            wanted = {"site": moved, "block": self.entering(layer, site, out, moved)}
            saved = parameter.detach().clone()
            try:
                wide = moved.to(where).double() / self.gain(layer, site)
                update = torch.outer(wide, key / (key @ key)).to(parameter.dtype)
                parameter.add_(weight.to_stored(update).to(parameter.device))
                after = read_last_token(self.model, [tokens], sites)
            finally:
                parameter.copy_(saved)
        limit, worst = _probe_tolerance(parameter), 0.0
        for name, module in places.items():
            started, ended, by = (
                one.to(where).double() for one in (before[name], after[name], wanted[name])
            )
            # what is added to a longer vector is rounded with it
            size = max(float(by.norm()), float(started.norm()) if name == "block" else 0.0)
            error = float((ended[0] - started[0] - by).norm()) / size
            if not error <= limit:
                raise ModelError(
                    f"the probe failed at {weight.name} of {type(self.model).__name__}: a rank-one "
                    f"update that must move the output of {type(module).__name__} by R missed it "
                    f"by {error:.2g} (limit {limit:.0e}). {self._why_missed(weight)}"
                )
            worst = max(worst, error)
        return worst

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
            f"{kind} carries PEFT adapters; {without_adapters(model)} and edit the plain model"
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
    name = model.config.model_type
    if reason := why_not(name):
        raise ModelError(f"the model family {name!r} ({kind}) {reason}")
    family = FAMILIES[name]
    if model.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no language-model head; load it as a causal language model")
    check_modules(model)
    try:
        blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
        downs = [block.get_submodule(family.down) for block in blocks]
    except AttributeError as missing:
        raise ModelError(f"{kind} says it is of family {name!r} but has no {missing}") from missing
    if not downs:
        raise ModelError(f"this {kind} has no blocks at {family.blocks}; load a complete model")
    for layer, down in enumerate(downs):
        check_projection(down, f"{family.blocks}.{layer}.{family.down}", family.linear)
    return Anatomy(model, family, blocks)

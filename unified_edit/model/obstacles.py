"""What stands in the way of an edit inside of a model: modules and weights that are not plain."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from unified_edit.errors import ModelError


def without_adapters(model: nn.Module) -> str:
    """How to be rid of the adapters of `model`, by what it can still do."""
    if hasattr(model, "merge_and_unload"):
        return "merge them first (model = model.merge_and_unload())"
    return (
        "merge or drop them first: call merge_and_unload() or unload() on the PeftModel it was "
        "made with, or load the model again,"
    )


def check_modules(model: nn.Module) -> None:
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


def check_projection(down: nn.Module, where: str, own: str | None) -> None:
    """Raise ModelError unless `down` is a plain dense projection with a weight of its own.

    own: the name of a class of the family's own that is one.
    """
    # exact types: a subclass (LoRA, quantised, sharded) stores or uses its weight differently
    if type(down) not in (Conv1D, nn.Linear) and type(down).__name__ != own:
        raise ModelError(
            f"{where} is a {type(down).__module__}.{type(down).__name__}, not a plain Linear or "
            "Conv1D: unwrap, dequantise or merge the model before editing it"
        )
    if "weight" not in down._parameters:
        raise ModelError(
            f"{where}.weight is no parameter but computed anew in every forward (pruning, weight "
            "normalisation); make it permanent first, for example with torch.nn.utils.prune.remove"
        )

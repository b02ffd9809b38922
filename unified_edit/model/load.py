"""Loading a model and its tokenizer: from a folder or the Hub, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unified_edit.arguments import as_path
from unified_edit.errors import ModelError, brief
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.progress import loading
from unified_edit.model.prompts import Encoder

#: Prefixes that wrappers put before the names of weights, and how to save without them.
_WRAPPED = {
    "_orig_mod.": "torch.compile: save model._orig_mod instead",
    "module.": "DataParallel: save model.module instead",
    "base_model.model.": "PEFT: save model.merge_and_unload() instead",
}


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    allow_bin: bool = False,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its fast tokenizer; `unified_edit.load_model` describes it."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise ModelError(
            f"the model's name is {brief(name)}; give 'atlas', a folder, or a Hub name"
        )
    name = str(as_path(name, "the model's name", ModelError) if str(name)[0] == "~" else name)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(kind, torch.dtype):
        raise ModelError(f"dtype {dtype!r} is not a torch type; use for example 'float32'")
    if kind is not None and not kind.is_floating_point:
        raise ModelError(f"dtype {dtype!r} holds no weights; use for example 'float32'")
    model = _from_pretrained(name, kind or "auto", revision, allow_bin)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as problem:  # a broken tokenizer.json raises whatever its parser raises
        raise ModelError(
            f"no tokenizer could be loaded from {name!r}: {_said(problem)}. Its tokenizer.json is "
            "missing or damaged; download the folder again"
        ) from problem
    Encoder(tokenizer)  # refuses what is not a fast one
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ModelError(
            f"no tokenizer could be loaded from {name!r}: without a tokenizer.json, what was made "
            "knows no words. Put the tokenizer's files into the folder: "
            "tokenizer.save_pretrained(folder)"
        )
    if device is not None:
        try:
            model.to(device)  # type: ignore[arg-type]
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as problem:
            raise ModelError(
                f"{name!r} could not be moved to device {device!r}: {problem}. Without a device "
                "the model stays on the CPU"
            ) from problem
    anatomy(model)
    return model.eval(), tokenizer


def _from_pretrained(
    name: str, dtype: torch.dtype | str, revision: str | None, allow_bin: bool
) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused with the rest of the report
    }
    try:
        with loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=True, **arguments
            )
    except Exception as problem:  # files that are damaged raise whatever their reader raises
        if not _only_pickled(name, problem):
            raise ModelError(
                f"{name!r} could not be loaded: {_said(problem)}. {_advice(name)}"
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
                loaded = AutoModelForCausalLM.from_pretrained(
                    name, use_safetensors=False, weights_only=True, **arguments
                )
        except Exception as worse:  # torch raises UnpicklingError, OSError, RuntimeError, ...
            raise ModelError(
                f"the .bin weights of {name!r} could not be read: {_said(worse)}"
            ) from worse
    model: PreTrainedModel = loaded[0]
    _check_report(name, model, loaded[1])
    return model


def _only_pickled(name: str, problem: Exception) -> bool:
    """Whether loading failed because there are pickled weights and no safetensors."""
    folder = Path(name)
    if folder.is_dir():
        return not list(folder.glob("*.safetensors*")) and bool(list(folder.glob("*.bin*")))
    return isinstance(problem, OSError) and "safetensors" in str(problem)


def _advice(name: str) -> str:
    """What to do about a model that could not be loaded."""
    folder = Path(name)
    if not folder.is_dir():
        return (
            "Give 'atlas', a folder, or a name on the Hugging Face Hub (which needs the network "
            "the first time)"
        )
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as handle:
            head = handle.read(64)
        what = "is empty" if not head else ""
        if head.lstrip().startswith(b"version https://git-lfs"):
            what = "is a pointer of git lfs, not the weights: run git lfs pull"
        elif head.lstrip()[:1] == b"<":
            what = "is a web page, not weights: the download failed"
        if what:
            return f"{path.name} {what}. Download the folder again"
    return "A file of this folder is missing or damaged; download the folder again"


def _check_report(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise ModelError unless the checkpoint held exactly the weights that the model has.

    A weight that is missing would be random, one left over says that the model is another one.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(set(report.get("missing_keys") or ()) - tied)
    unexpected = sorted(set(report.get("unexpected_keys") or ()) - tied)
    mismatched = sorted(str(key) for key in report.get("mismatched_keys") or ())
    errors = [str(error) for error in report.get("error_msgs") or ()]
    if not (missing or unexpected or mismatched or errors):
        return
    said = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("weights of the model are missing", missing),
            ("of its weights are none of the model's", unexpected),
            ("have another shape", mismatched),
            ("could not be read", errors),
        )
        if names
    ]
    remedy = next(
        (
            f"Names begin with {prefix!r}, as a wrapper saves them ({how}), or strip the prefix "
            "from the names in the file"
            for prefix, how in _WRAPPED.items()
            if any(key.startswith(prefix) for key in unexpected)
        ),
        "Load a complete checkpoint whose config.json belongs to it (number of layers, sizes)",
    )
    raise ModelError(f"{name!r} does not fit its configuration: {'; '.join(said)}. {remedy}")


def _said(problem: Exception) -> str:
    """What an error of another library says, on one line and not too long."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}".rstrip(": .")

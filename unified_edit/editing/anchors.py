"""Norm anchors: values are as long as those of the model that nobody has edited yet.

"Norm Anchors Make Model Edits Last" (arXiv 2602.02543; SasyaTitech/NAS 5acab48, 2026-05-06,
NAS/compute_z.py and util/vstar_stats.py). Edits lengthen the values of later ones, and those the
weights: the loop is cut by writing each value at the mean length of values on the base model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_edit.arguments import real_number
from unified_edit.errors import MethodError

_EPS = 1e-10  # of the released code


def anchored(outputs: Tensor, delta: Tensor, anchor: float) -> Tensor:
    """The delta that makes v* = outputs + delta as long as `anchor`; zero where v* is beyond twice.

    outputs: (d_out x E) what the MLP gives at the subject now. delta: (d_out x E), what is to be
    added to it.
    """
    targets = outputs + delta
    size = targets.norm(dim=0)
    scaled = targets * (anchor / (size + _EPS)) - outputs
    return torch.where(size > 2 * anchor, torch.zeros_like(delta), scaled)


def norm_anchor_of(outputs: Tensor, delta: Tensor, quantile: float = 0.95) -> float:
    """The anchor of a layer: the mean length of v* = outputs + delta, without the longest.

    outputs: (d_out x E) `read_values` at the site "mlp" of the *unedited* model, for some hundred
    facts (1000 in the released code) that are not to be edited; delta: (d_out x E) their values'
    `delta` from `optimise_values`, with the bare prompt as its only context there. The longest
    1 - quantile of them are dropped. Give it to a method: ``method.replace(norm_anchor=...)``.

    Raises MethodError for shapes that differ, no facts, and a quantile outside of (0, 1].
    """
    share = real_number(quantile, "norm_anchor_of: quantile", MethodError, above=0.0)
    if share > 1 or outputs.shape != delta.shape or outputs.ndim != 2 or outputs.shape[1] == 0:
        raise MethodError(
            f"norm_anchor_of: outputs {tuple(outputs.shape)} and delta {tuple(delta.shape)} must "
            f"have one column for each of the same facts, and the quantile {share:g} be at most 1"
        )
    sizes = (outputs.double() + delta.double()).norm(dim=0).sort().values
    dropped = math.floor((1.0 - share) * len(sizes))
    return float(sizes[: len(sizes) - dropped].mean())

"""When a value is good enough to stop its optimisation: once its target is what the model says.

Most-Probable Early Stopping (ENCORE, arXiv 2502.01636, sec. 4;
scalable-model-editing/knowledge-editing-regularization 6e3ba9a, 2025-05-23, encore/compute_z.py).
Its code takes one number, `prob_cutoff`: -n stops at the n-th loss, not necessarily in a row, at
which every token of the target is the likeliest behind every prefix; a positive one stops once the
probability of the target (the mean over contexts of exp of the mean log-probability of its tokens)
is above it. With -n the bare prompt is left out: the code takes the first prompt, which is the bare
one, for that of the KL term. Where there is no prefix at all the bare prompt is asked here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unified_edit.editing.prepared import Prepared


def losses_there(cutoff: float) -> float:
    """At how many losses the target must have been there for its value to be finished."""
    return -cutoff if cutoff < 0 else 1 if cutoff > 0 else math.inf


def is_there(batch: Prepared, logits: Tensor, chosen: Tensor, cutoff: float) -> Tensor:
    """Of each value, whether its target is there as far as `cutoff` asks: (values, bool).

    logits: (target tokens x vocabulary), those that predict each; chosen: its log-probability.
    """
    at, values = batch.layout, len(batch.target_init)
    if cutoff == 0:
        return torch.zeros(values, dtype=torch.bool, device=chosen.device)
    owner = at.owner[at.target_row]
    if cutoff < 0:
        missed = (logits.argmax(dim=1) != at.target_id) & at.target_watched
        count = torch.zeros(values, dtype=torch.long, device=chosen.device)
        return count.index_add(0, owner, missed.long()) == 0
    prompts = torch.zeros(len(at.owner), dtype=chosen.dtype, device=chosen.device)
    tokens = prompts.index_add(0, at.target_row, torch.ones_like(chosen))
    asked = (tokens > 0).to(chosen.dtype)  # the prompts of the KL term have no target
    each = (prompts.index_add(0, at.target_row, chosen) / tokens.clamp(min=1)).exp() * asked
    zeros = torch.zeros(values, dtype=chosen.dtype, device=chosen.device)
    return zeros.index_add(0, at.owner, each) / zeros.index_add(0, at.owner, asked) > cutoff

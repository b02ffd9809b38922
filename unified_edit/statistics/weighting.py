"""How much each token counts in C0.

``tr(Delta C0 Delta')`` with ``C0 = E[k k']`` is what the MLP's output moves by, in the mean square
over the tokens of ordinary text. Where a norm stands behind the MLP (Gemma 2 and 3, OLMo 2), the
same step is another one in the residual stream: the norm divides by the rms of what it is given, so
Delta k comes out the longer, the shorter W0 k was. To first order, and for steps across W0 k,

    norm(W0 k + Delta k) - norm(W0 k)  =  g * Delta k / rms(W0 k),

and ``C0' = E[k k' / rms(W0 k)^2]`` measures that. The norm's weights g, one for each coordinate,
can be left out: they multiply Delta from the left, and whatever does so the same for all tokens
changes neither which Delta is the smallest among those that hold an equality, nor, where the
residual is measured in it too, the ridge form.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unified_edit.arguments import brief
from unified_edit.errors import StatisticsError
from unified_edit.model.anatomy import Anatomy, NamedWeight


def _by_norm(parts: Anatomy, weight: NamedWeight, keys: Tensor) -> Tensor:
    gain: Tensor = parts.amplification(weight.layer, weight.module(keys))
    return keys * gain[:, None].to(keys.dtype)


#: Name -> what keys (tokens x d_k) are multiplied by before they are summed. "tokens": each counts
#: alike. "norm": by how much a norm behind the MLP lengthens what is added there.
WEIGHTINGS: dict[str, Callable[[Anatomy, NamedWeight, Tensor], Tensor]] = {
    "tokens": lambda parts, weight, keys: keys,
    "norm": _by_norm,
}


def checked_weighting(weighting: object) -> str:
    """One of `WEIGHTINGS`; StatisticsError for anything else."""
    if not isinstance(weighting, str) or weighting not in WEIGHTINGS:
        raise StatisticsError(f"weighting is {brief(weighting)}; choose one of {tuple(WEIGHTINGS)}")
    return weighting

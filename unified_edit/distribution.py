"""How a residual is spread over the edited layers.

An algorithm for several layers goes through them in ascending order. At each layer it reads again,
on the model as edited so far, what is still missing at the last layer (the residual), and stores a
share of it there. The share is independent of the objective solved at the layer (`objective.py`):
every objective combines with every spread.

With n layers, the layer of index i (from 0) has `n - i` layers left, itself included. If a stored
share reached the last layer undiminished, the shares `1 / (n - i)` of what remains would be equal
parts of the first residual, :eq:`spread-parts` and :eq:`spread-equal-parts`: after i layers
`(n - i) / n` of it is left, and `1 / (n - i) * (n - i) / n = 1 / n`. The last share is always 1:
everything that is still missing.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from unified_edit.errors import MethodError

Kind = Literal["memit", "pmet", "full"]


def shares(n_layers: int, kind: Kind = "memit") -> tuple[float, ...]:
    """What the residual, recomputed at each layer, is multiplied by, :eq:`spread-share`.

    One number a layer, layers ascending.

    - "memit": 1 / layers left (MEMIT, arXiv 2210.07229, algorithm 1; EMMET over several layers).
    - "pmet": 1 / sqrt(layers left) (PMET, arXiv 2308.08742): more in the early layers.
    - "full": 1 everywhere: each layer is asked for all that is missing.

    One layer has the share 1 in every kind. Raises MethodError unless `n_layers` is an integer of
    at least 1 and `kind` is one of the above.
    """
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or n_layers < 1:
        raise MethodError(
            f"a residual is spread over a whole number of layers, at least 1, not {n_layers!r}: "
            "give the number of edited layers"
        )
    layers_left = range(n_layers, 0, -1)
    if kind == "memit":
        return tuple(1 / left for left in layers_left)
    if kind == "pmet":
        return tuple(1 / math.sqrt(left) for left in layers_left)
    if kind == "full":
        return (1.0,) * n_layers
    raise MethodError(
        f"unknown kind of distribution {kind!r}: use one of {', '.join(get_args(Kind))}"
    )

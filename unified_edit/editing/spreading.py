"""How a residual is spread over the edited layers.

An algorithm for several layers goes through them in ascending order. At each layer it reads again,
on the model as edited so far, what is still missing at the last layer (the residual), and stores a
share of it there. The share is independent of the objective solved at the layer
(`unified_edit.objective`): every objective combines with every spread.

With n layers, the layer of index i (from 0) has `n - i` layers left, itself included. If a stored
share reached the last layer undiminished, the shares `1 / (n - i)` of what remains would be equal
parts of the first residual, :eq:`spread-parts` and :eq:`spread-equal-parts`: after i layers
`(n - i) / n` of it is left, and `1 / (n - i) * (n - i) / n = 1 / n`. The last share is always 1:
everything that is still missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unified_edit.arguments import real_number, whole_number
from unified_edit.editing.choices import Choice, chosen
from unified_edit.errors import MethodError


@dataclass(frozen=True, repr=False)
class Spread(Choice):
    """A distribution under its name: the share of the residual by the number of layers left.

    own_targets: values are set at the first edited layer, and each layer has a target of its own:
    what stands there when they are carried forward through the model as it was. Its residual is
    what is missing to that, not to the value at the last layer.
    """

    own_targets: bool = False


#: Name -> share of the residual by the number of layers left:
#: MEMIT (arXiv 2210.07229, algorithm 1; EMMET over several layers), PMET (arXiv 2308.08742: more in
#: the early layers), and each layer asked for all that is missing. "replay" asks each layer for all
#: that is missing to a target of its own (forward replay, arXiv 2605.00358; jugechengzi/FE 4de0dba,
#: 2026-05-01, precompute_z.py "firstforward" and algs/memit/FE-memit_main.py).
SPREADS = {
    "memit": Choice("memit", lambda left: 1 / left),
    "pmet": Choice("pmet", lambda left: 1 / math.sqrt(left)),
    "full": Choice("full", lambda left: 1.0),
    "replay": Spread("replay", lambda left: 1.0, own_targets=True),
}


def has_own_targets(distribution: Choice) -> bool:
    """Whether each layer has a target of its own (`Spread`)."""
    return isinstance(distribution, Spread) and distribution.own_targets


def shares(n_layers: int, kind: str | Choice = "memit") -> tuple[float, ...]:
    """What the residual, recomputed at each layer, is multiplied by, :eq:`spread-share`.

    One number a layer, layers ascending. kind: the name of one of `SPREADS`, or a function of the
    number of layers left.

    - "memit": 1 / layers left.
    - "pmet": 1 / sqrt(layers left): more in the early layers.
    - "full" and "replay": 1 everywhere.

    One layer has the share 1 in each of these. Raises MethodError unless `n_layers` is an integer
    of at least 1, `kind` is one of the above, and each share is a number.
    """
    number = whole_number(
        n_layers,
        "n_layers",
        MethodError,
        least=1,
        advice="A residual is spread over a whole number of layers: give how many are edited",
    )
    spread = chosen(kind, SPREADS, "distribution")
    return tuple(
        real_number(
            spread(left), f"the share of {spread.name} with {left} layers left", MethodError
        )
        for left in range(number, 0, -1)
    )

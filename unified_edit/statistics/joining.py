"""Statistics of the same layers from different texts, added up.

Each part is a mean and counts by its tokens. The parts take turns in two halves, which must agree
on keys that are in neither, as the halves of one run must: so the keys that were set aside in a
part (the first share of a corpus has some) are taken out again, and go back into the sum in the
end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.errors import StatisticsError
from unified_edit.statistics.collect import FRESH_KEYS, Source
from unified_edit.statistics.convergence import agreement
from unified_edit.statistics.shares import Counted, check_apart, together
from unified_edit.statistics.sums import Triangle

#: Field of `Source` -> what to do if it is not the same everywhere.
_ADVICE = {
    "fingerprint": "statistics of different models cannot be joined",
    "weighting": "tokens count differently in some of these statistics; collect all of them with "
    "the same weighting",
    "skip_start": "some of these statistics hold the first token of each text and some do not; "
    "collect all of them with the same skip_start",
    "max_tokens": "texts are cut after different numbers of tokens in some of these statistics; "
    "collect all of them with the same max_tokens",
    "dtype": "the model had different types when these statistics were collected; collect all of "
    "them with one dtype",
}


@dataclass(frozen=True)
class Part:
    """One summand: C0 gives the mean second moment (d_k x d_k, float64) of a layer."""

    source: Source
    counted: Counted | None
    fresh: dict[int, Tensor]
    C0: Callable[[int], Tensor]


def check_alike(sources: Sequence[Source], fields: Sequence[str] = tuple(_ADVICE)) -> None:
    """Raise StatisticsError unless there are sources, and all have the same in these fields."""
    if not sources:
        raise StatisticsError("there are no statistics to join; give one at least")
    for name in fields:
        if len({getattr(one, name) for one in sources}) != 1:
            raise StatisticsError(_ADVICE[name])


def added_up(
    parts: Sequence[Part], layers: Sequence[int]
) -> tuple[Source, dict[int, Tensor], dict[int, float], Counted, dict[int, Tensor]]:
    """Source, C0, the halves' disagreement, the texts and keys set aside, of all parts together.

    Raises StatisticsError if they do not count in the same way, or a text is in two of them.
    """
    check_alike([one.source for one in parts])
    if any(one.source.shrinkage for one in parts):
        raise StatisticsError("shrunk statistics are not added up; shrink the sum: joined.shrunk()")
    known = [one.counted for one in parts if one.counted is not None]
    if len(known) < len(parts):
        raise StatisticsError(
            "some of these statistics are of an older version and do not say which texts they "
            "count, so it is not known whether they overlap; collect them again"
        )
    check_apart(known)
    # one order, however they were given: float64 sums depend on it in the last bits
    order = sorted(
        range(len(parts)), key=lambda place: (known[place].shares, parts[place].source.corpus)
    )
    parts, known = [parts[place] for place in order], [known[place] for place in order]
    counted, tokens = together(known), sum(one.source.tokens for one in parts)
    source = replace(
        parts[0].source,
        corpus=hashlib.sha256(" ".join(one.source.corpus for one in parts).encode()).hexdigest(),
        texts=sum(one.source.texts for one in parts),
        tokens=tokens,
        part=counted.part,
    )
    moments, agreements, aside = {}, {}, {}
    for layer in layers:
        moments[layer], agreements[layer], aside[layer] = _added(parts, layer, tokens)
    return source, moments, agreements, counted, aside


def _added(parts: Sequence[Part], layer: int, tokens: int) -> tuple[Tensor, float, Tensor]:
    """C0 of one layer, the halves' disagreement, and the keys that these were judged by."""
    known = [one.fresh[layer] for one in parts]
    each = max(1, FRESH_KEYS // max(1, sum(len(some) > 0 for some in known)))
    fresh = [some[:each] for some in known]
    halves: list[Triangle] = []
    counts = [0, 0]
    for place, one in enumerate(parts):
        moment, half = one.C0(layer), place % 2
        if place < 2:
            halves.append(Triangle(len(moment), lambda n: torch.zeros(n, dtype=torch.float64)))
        halves[half].add_whole(moment, one.source.tokens)
        halves[half].add(fresh[place], -1)
        counts[half] += one.source.tokens - len(fresh[place])
    keys = torch.cat(fresh)
    found, _ = agreement(halves, counts, keys)
    first, second = halves
    first.data.add_(second.data)
    for some in fresh:  # one by one, as they were taken out: these products are the same then
        first.add(some)
    first.data.div_(tokens)
    return first.full(), found, keys

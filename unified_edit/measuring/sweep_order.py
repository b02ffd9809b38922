"""What a sweep over layers and clamps tries, in an order in which an early stop is of use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unified_edit.arguments import as_list
from unified_edit.editing.methods import Method
from unified_edit.errors import MethodError
from unified_edit.measuring.traces import LAST, Trace, checked_kind
from unified_edit.model.anatomy import Anatomy

#: Share of the blocks, from the first, that are looked at where nobody says which.
DEPTH = 2 / 3
#: So many layers are looked at first, then those between the best of them and its neighbours.
COARSE = 10
#: So many layers are tried with all clamps where nobody says which layers.
FINALISTS = 2

#: Layers and clamp of one combination.
Combination = tuple[tuple[int, ...], float]
Row = Mapping[str, Any]


def candidates_of(
    parts: Anatomy, method: Method, layers: Any, trace: Trace | None
) -> list[tuple[int, ...]]:
    """What may be tried: groups of layers, each checked against model and method."""
    groups: list[tuple[int, ...]]
    if layers is None:
        # a value at the last block reaches no later token
        top = max(1, min(math.ceil(DEPTH * parts.n_layers), parts.n_layers - 1))
        groups = [(layer,) for layer in range(top)]
    else:
        groups = list(dict.fromkeys(parts.check_layers(as_list(one)) for one in as_list(layers)))
        if not groups:
            raise MethodError("layers is empty; give at least one, or leave it out")
    for group in groups:
        method.replace(layers=group).resolve(parts)
    if trace is None:
        return sorted(groups)
    low, high = _reach(parts, trace)
    narrowed = [group for group in sorted(groups) if any(low <= one <= high for one in group)]
    if not narrowed:
        raise MethodError(
            f"the trace points at layers {low} to {high}, and none of the layers given is among "
            f"them ({', '.join(map(str, groups[:4]))}...); leave trace out, or give others"
        )
    return narrowed


def _reach(parts: Anatomy, trace: Trace) -> tuple[int, int]:
    """The first and the last layer that a trace does not rule out."""
    if not isinstance(trace, Trace):
        raise MethodError(f"trace is a {type(trace).__name__}; give what unified_edit.locate found")
    checked_kind("mlp", trace.kinds)
    table = trace.table()
    table = table[(table["kind"] == "mlp") & (table["place"] == LAST)].dropna(subset="effect")
    if not len(table) or table["effect"].max() <= 0 or table["layer"].max() >= parts.n_layers:
        raise MethodError(
            "the trace shows no effect of an MLP at the last subject token in this model, so it "
            "narrows nothing; leave trace out, or trace facts that the model knows"
        )
    there = table.loc[table["effect"] >= table["effect"].max() / 2, "layer"]
    reach = max(1, trace.window // 2)
    return int(there.min()) - reach, int(there.max()) + reach


def order(
    candidates: Sequence[tuple[int, ...]],
    clamps: Sequence[float],
    rows: Mapping[Combination, Row],
    step: int,
    finalists: int,
) -> Iterator[Combination]:
    """What to try next, given the rows so far (which grow meanwhile)."""
    first, places = clamps[0], range(len(candidates))
    for place in sorted(places[::step], key=_halving):
        yield candidates[place], first
    if step > 1:
        coarse = [candidates[place] for place in places[::step]]
        best = candidates.index(coarse[ranked([rows[group, first] for group in coarse])[0]])
        near = [place for place in places if 0 < abs(place - best) < step]
        for place in sorted(near, key=lambda place: (abs(place - best), place)):
            yield candidates[place], first
    known = [group for group in candidates if (group, first) in rows]
    best_first = [known[i] for i in ranked([rows[group, first] for group in known])]
    for group in best_first[:finalists]:
        for clamp in clamps[1:]:
            yield group, clamp


def _halving(place: int) -> tuple[int, ...]:
    """Sorts 0, 1, 2, ... so that any first ones are spread: bits from the lowest to the highest."""
    return tuple(place >> bit & 1 for bit in range(place.bit_length() + 1))


def total_of(candidates: int, clamps: int, step: int, finalists: int) -> int:
    """How many combinations there will be, at most."""
    coarse = len(range(0, candidates, step))
    near = min(2 * (step - 1), candidates - coarse)
    return coarse + near + min(finalists, coarse + near) * (clamps - 1)


def ranked(rows: Sequence[Row]) -> list[int]:
    """Places of rows, best first: the highest score, then the smallest update, then as given."""

    def worth(place: int) -> tuple[float, float, int]:
        row = rows[place]
        if row["problem"]:
            return math.inf, math.inf, place
        return -row["score"], row["size"], place

    return sorted(range(len(rows)), key=worth)

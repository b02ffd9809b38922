"""What an update costs: the metric of a weight, from the statistics of the model's keys."""

from __future__ import annotations

import contextlib
import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unified_edit.arguments import is_flag, real_number
from unified_edit.editing.choices import Choice
from unified_edit.errors import MethodError, brief
from unified_edit.model.anatomy import NamedWeight
from unified_edit.objective import ALPHAEDIT_THRESHOLD, Metric, MetricProtocol, NullSpace
from unified_edit.statistics import KeyStatistics

#: Of each C0 in use, the bases of its null spaces by threshold: they take as long as many edits.
_BASES: WeakKeyDictionary[Metric, dict[tuple[float, bool], Tensor]] = WeakKeyDictionary()


def null_space(threshold: float = ALPHAEDIT_THRESHOLD, *, relative: bool = False) -> Choice:
    """The preservation of AlphaEdit: updates act on directions of C0 below a threshold alone.

    threshold: of an eigenvalue of the mean C0; with `relative` of its ratio to the largest. The
    name, "null_space", "null_space(0.001)" or "null_space(1e-05, relative)", is enough to give it
    and to find it again in a file. See `unified_edit.objective.NullSpace`; raises MethodError for a
    threshold that is not positive.
    """
    limit = real_number(threshold, "null_space: threshold", MethodError, above=0.0)
    if not is_flag(relative):
        raise MethodError(f"null_space: relative is {brief(relative)}; it must be True or False")
    inside = f"{limit:g}, relative" if relative else f"{limit:g}"
    limit = float(f"{limit:g}")  # what the name says, so that it is found again
    plain = limit == ALPHAEDIT_THRESHOLD and not relative
    return Choice("null_space" if plain else f"null_space({inside})", _Space(limit, bool(relative)))


class _Space:
    """The function of a null space's choice; equal to every other with the same threshold."""

    def __init__(self, threshold: float, relative: bool) -> None:
        self.given = (threshold, relative)

    def __call__(self, statistics: KeyStatistics, weight: NamedWeight) -> NullSpace:
        threshold, relative = self.given
        soft = statistics.metric(weight.layer)
        kept = _BASES.setdefault(soft, {})
        found = NullSpace(soft, threshold, relative=relative, basis=kept.get(self.given))
        kept[self.given] = found.basis
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Space) and self.given == other.given

    def __hash__(self) -> int:
        return hash(self.given)


_SPACE = re.compile(r"null_space\(([^,]+?)(, relative)?\)")


class _Preservations(dict[str, Choice]):
    """The choices that have a name; null spaces are among them, whatever their threshold."""

    def __missing__(self, name: str) -> Choice:
        if (found := _SPACE.fullmatch(name)) is not None:
            with contextlib.suppress(ValueError, MethodError):
                return null_space(float(found[1]), relative=bool(found[2]))
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The choice of that name."""
        try:
            return self[name]
        except KeyError:
            return default


#: The metric of a weight, from the statistics of the model's keys: what it costs to change what
#: preserved keys give. "C0" is their second moment; "null_space" lets an update act where that is
#: nearly zero alone (AlphaEdit; `null_space` for another threshold).
PRESERVATIONS = _Preservations(
    C0=Choice(
        "C0", lambda statistics, weight: statistics.metric(weight.layer, weight.parameter.device)
    ),
    null_space=null_space(),
)


def metric_of(
    preservation: Choice, norm_weight: float, statistics: KeyStatistics, weight: NamedWeight
) -> MetricProtocol:
    """The metric of a weight: what `preservation` says, and norm_weight ||Delta||_F^2 on top."""
    metric: MetricProtocol = preservation(statistics, weight)
    if norm_weight == 0.0:
        return metric
    every: Tensor = torch.eye(metric.dim, dtype=torch.float64, device=metric.device)
    return metric.plus(every, norm_weight)

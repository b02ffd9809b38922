"""What an edit records of itself, and how that is held against a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from unified_edit.errors import EditError, EditFileError
from unified_edit.facts import SharedSubject
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.fingerprints import tensor_hash
from unified_edit.model.ledger import Entry, Ledger, WeightLedger
from unified_edit.objective import Budget, Diagnosis, Update

log = logging.getLogger(__name__)

#: An edit of which less than this arrives in the rounded weights is refused.
LOST = 0.01


@dataclass(frozen=True)
class Touched:
    """One weight of an edit: the layer it stands in, and what it was.

    before, after: hash of the weight in the base, and with this edit alone.
    """

    layer: int
    before: str
    after: str


class Record(Protocol):
    """What is needed of an edit's record to hold it against a model."""

    @property
    def model(self) -> str:
        """What the model was called."""

    @property
    def weights(self) -> Mapping[str, Touched]:
        """{name: `Touched`} of each weight that is edited."""


@dataclass(frozen=True)
class Spent:
    """What a batch was written with at one weight, within a budget of preservation.

    budget: as it was then; its `ridge` is the lam of that batch. cost: tr(Delta C0 Delta^T) of the
    sum of all updates, with this one.
    """

    budget: Budget
    cost: float

    @property
    def after(self) -> Budget:
        """The budget for the next batch."""
        return self.budget.after(self.cost)


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from.

    fingerprint: of the base model. state: what was active when it was computed (`Ledger.state`).
    weights: {name: `Touched`} of each weight that is edited. statistics: the `Source` of C0.
    origin: of a dequantised model, its file, how that was quantised, and its SHA-256.
    on_shared_subject: what was to be done with facts of one subject.
    history: how the keys of earlier edits counted. replaces: their columns, (id, number), whose
    facts this edit writes anew. preserve: the weight of what was preserved by name (`Edit.kept`),
    "exact" or a number; None where nothing was. spent: {name of a weight: `Spent`} of an edit that
    was made within a budget.
    """

    fingerprint: str
    state: str
    model: str
    revision: str | None
    library: str
    seed: int
    prefixes: tuple[str, ...]
    weights: Mapping[str, Touched]
    statistics: Mapping[str, Any]
    origin: str | None = None
    on_shared_subject: SharedSubject = "raise"
    history: str | None = None
    replaces: tuple[tuple[str, int], ...] = ()
    preserve: float | Literal["exact"] | None = None
    spent: Mapping[str, Spent] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one fact.

    losses: while its value was optimised. relative_norm: norm(delta) / norm(target_init); clamped:
    whether it stands at the clamp. before, after: the probability of the new target after the bare
    prompt, without and with the edit (the geometric mean over its tokens). likeliest: whether
    greedy decoding gives the target with the edit.
    """

    losses: tuple[float, ...]
    relative_norm: float
    clamped: bool
    before: float = math.nan
    after: float = math.nan
    likeliest: bool = False


def check_alone(ledger: WeightLedger, weight: NamedWeight, edit: Entry, recorded: Record) -> None:
    """Raise EditFileError unless the base weight, and the one that `edit` alone makes of it, are
    those that were recorded.
    """
    base, touched = ledger.base_weight(weight), recorded.weights[weight.name]
    if tensor_hash(base) != touched.before:
        raise EditFileError(
            f"the weight of layer {weight.layer} is not the one this edit was made for; load "
            f"the unedited {recorded.model!r}"
        )
    shape = tuple(weight.to_stored(edit.updates[weight.name].delta).shape)
    if shape != tuple(base.shape):
        raise EditFileError(
            f"Delta of layer {weight.layer} has shape {shape}, but the weight is "
            f"{tuple(base.shape)}. Make the edit again"
        )
    if tensor_hash(ledger.with_edits(weight, [edit])) != touched.after:
        raise EditFileError(
            f"applied to layer {weight.layer}, this edit gives other weights than when it was "
            "made: its matrices are not those that were recorded. Make the edit again"
        )


def check_arrived(
    ledger: WeightLedger, weight: NamedWeight, edit: Entry, earlier: Sequence[Entry]
) -> None:
    """Raise EditError if Delta is lost when a weight is rounded to the model's type.

    A Delta below half a unit in the last place of most weights changes only the smallest of
    them. What arrives is measured along Delta itself: <W - W_before, Delta> / norm(Delta)^2.
    """
    now = weight.parameter.detach()
    delta = weight.to_stored(edit.updates[weight.name].delta)
    change = now.cpu().double() - ledger.with_edits(weight, earlier).cpu().double()
    size = float(torch.linalg.vector_norm(delta)) ** 2
    arrived = float(torch.einsum("ij,ij->", change, delta)) / size if size else 0.0
    if arrived < LOST:
        raise EditError(
            f"the edit leaves the weights of layer {weight.layer} unchanged: Delta is lost in "
            f"rounding to {now.dtype} ({arrived:.1%} of it arrives); load the model in "
            "a wider type, or use a smaller ridge or a larger clamp"
        )
    if arrived < 0.5:
        log.warning(
            "only %.0f %% of Delta arrives at layer %d: the rest is lost in rounding to "
            "%s; load the model in a wider type",
            100 * arrived,
            weight.layer,
            now.dtype,
        )


def rounding_errors(ledger: Ledger, edit: Entry, keys: Mapping[str, Tensor]) -> dict[int, float]:
    """{layer: norm((W - W0 - Delta) K) / norm(Delta K)}: what rounding W to the model's type costs.

    W0 is the base, W what the edit makes of it alone, K its `keys` at a weight by name; the
    matrices themselves are compared where there are none.
    """
    found = {}
    for name, update in edit.updates.items():
        weight = ledger.parts.named(name)
        base, now = ledger.base_weight(weight), ledger.with_edits(weight, [edit])
        delta = update.delta
        # in the orientation of Delta: to store is to transpose, or to do nothing
        lost = weight.to_stored(now.cpu().double() - base.cpu().double()) - delta
        if name in keys:
            lost, delta = lost @ keys[name], delta @ keys[name]
        size = torch.linalg.vector_norm(delta)
        found[weight.layer] = float(torch.linalg.vector_norm(lost) / size) if size > 0 else 0.0
    return dict(sorted(found.items()))


def merged(updates: Sequence[Update]) -> Update:
    """The sum of updates made one after another at one weight, as one update.

    Its diagnosis has the worst error and the summed cost of all.
    """
    if len(updates) == 1:
        return updates[0]
    each = [update.diagnosis for update in updates]
    return Update(
        torch.cat([update.left for update in updates], dim=1),
        torch.cat([update.right for update in updates], dim=0),
        Diagnosis(
            condition=max(d.condition for d in each),
            rank=sum(d.rank for d in each),
            memorization_error=max(d.memorization_error for d in each),
            preservation_error=math.fsum(d.preservation_error for d in each),
            form=each[0].form,
        ),
    )


@dataclass(frozen=True)
class Alone:
    """An edit in the making, as the ledger sees it."""

    id: str
    updates: Mapping[str, Update]


def touched_by(
    ledger: WeightLedger, weights: Iterable[NamedWeight], updates: Mapping[str, Update]
) -> dict[str, Touched]:
    """{name: `Touched`} of the weights that an edit in the making updates."""
    alone = Alone("alone", updates)
    return {
        weight.name: Touched(
            weight.layer,
            tensor_hash(ledger.base_weight(weight)),
            tensor_hash(ledger.with_edits(weight, [alone])),
        )
        for weight in weights
    }


def provenance_of(
    ledger: Ledger,
    weights: Sequence[NamedWeight],
    updates: dict[str, Update],
    *,
    state: str,
    seed: int,
    prefixes: tuple[str, ...],
    statistics: Mapping[str, Any],
    on_shared_subject: SharedSubject = "raise",
    history: str | None = None,
    replaces: tuple[tuple[str, int], ...] = (),
    preserve: float | Literal["exact"] | None = None,
    spent: Mapping[str, Spent] | None = None,
) -> Provenance:
    """The record of an edit of the ledger's model, which does not hold it yet."""
    parts = ledger.parts
    return Provenance(
        fingerprint=ledger.fingerprint(),
        state=state,
        model=parts.name,
        revision=getattr(parts.model.config, "_commit_hash", None),
        library=version("unified_edit"),
        seed=seed,
        prefixes=prefixes,
        weights=touched_by(ledger, weights, updates),
        statistics=statistics,
        origin=parts.origin,
        on_shared_subject=on_shared_subject,
        history=history,
        replaces=replaces,
        preserve=preserve,
        spent=dict(spent or {}),
    )

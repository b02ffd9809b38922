"""Batch after batch: what earlier edits wrote, as part of the metric of the next one.

Edits of one model are written at the same weights. Batch t asks for R_t = V_t - W_{t-1} K_t, and
what it does to the keys of earlier batches counts in one of two ways:

- "soft": it costs, as much as what it misses of its own facts does. The metric is
  C0 + sum K_s K_s^T / lam, so that least squares solves with lam C0 + sum K_s K_s^T + K_t K_t^T,
  :eq:`soft-sum` (arXiv 2605.26670; MEMIT, sec. 4.4, has the sum for a single batch).
- "hard": it is forbidden, Delta_t K_s = 0, :eq:`held-update` (`objective.Held`).

Either way the updates of all batches add up to one solution for all recorded pairs (K_s, V_s), with
R = V - W0 K. In a model with several layers that holds at each weight for the keys that were
recorded there; the keys that the model has afterwards are others (`unified_edit.Editor.drift`).

The pairs stand in the edits themselves: those that are active are the history. A column of K drops
out of it when a later edit writes its facts anew, and is there again when that one is undone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from unified_edit.editing.edits import Edit
from unified_edit.editing.methods import Method
from unified_edit.errors import ContradictionError, MethodError, SharedSubjectError, brief
from unified_edit.facts import Conflict, Fact, SharedSubject, subject_key
from unified_edit.model.anatomy import NamedWeight
from unified_edit.model.ledger import Entry, Ledger
from unified_edit.model.memory import Memory
from unified_edit.objective import Budget, Held, Metric, MetricProtocol, Update
from unified_edit.statistics import KeyStatistics

#: How the keys of earlier edits count: not at all, as a cost, or as a condition.
History = Literal["soft", "hard"]

#: (id of an edit, number of a column there)
Column = tuple[str, int]


def check_history(history: object) -> None:
    """Raise MethodError unless it is None or a `History`."""
    if history is not None and history not in get_args(History):
        raise MethodError(
            f"history is {brief(history)}; choose one of {get_args(History)}, or None for edits "
            "that know nothing of each other"
        )


@dataclass(frozen=True)
class Batch:
    """What an earlier batch wrote: its facts, their columns, and the keys of each weight.

    targets: V of each weight, where there was a history.
    """

    id: str
    facts: tuple[Fact, ...]
    columns: tuple[int, ...]
    keys: Mapping[str, Tensor]
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def columns_with(self, facts: Sequence[Fact]) -> set[int]:
        """The columns in which a subject of these facts stands."""
        subjects = {subject_key(fact) for fact in facts}
        return {
            column
            for known, column in zip(self.facts, self.columns, strict=True)
            if subject_key(known) in subjects
        }


@dataclass(frozen=True)
class Past:
    """The earlier batches that count for a new one, and how.

    dropped: the columns that do not count any more. origin: what, besides the keys, the metrics
    made from them depend on; they are kept in `memory`. Batches of the edit in the making
    (`and_then`) are not. budgets: {name of a weight: its `Budget`}, and under "" that of weights
    without one; empty where lam is the method's.
    """

    kind: History | None = None
    batches: tuple[Batch, ...] = ()
    dropped: frozenset[Column] = frozenset()
    origin: Hashable = None
    memory: Memory | None = None
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    _made: dict[str, tuple[tuple[Any, ...], MetricProtocol]] = field(default_factory=dict)

    def metric(self, base: MetricProtocol, weight: NamedWeight, ridge: float) -> MetricProtocol:
        """The metric of a weight in which the keys of earlier batches count as well.

        base: without them. ridge: lam of the method, which tells what "soft" weighs them with.
        Raises MethodError for "soft" and an equality, which has no lam.
        """
        if self.kind is None:
            return base
        if self.kind == "soft" and ridge == 0:
            raise no_weight()
        wanted = tuple(self.kept(weight.name))
        lam = ridge if self.kind == "soft" else 0.0
        count, metric = self._known(weight.name, lam, wanted, base)
        by_id = {batch.id: batch.keys.get(weight.name) for batch in self.batches}
        for id_, columns in wanted[count:]:
            keys = by_id[id_]
            assert keys is not None
            metric = self._with(metric, keys[:, list(columns)], lam)
        self._made[weight.name] = ((lam, *wanted), metric)
        if self.memory is not None and wanted and not any(turn(id_) for id_, _ in wanted):
            # one a weight: with one for each batch, memory would grow by batches times d^2
            self.memory.drop(self._key(weight.name, lam, wanted[:count]))
            self.memory.put(self._key(weight.name, lam, wanted), metric, _size(metric))
        return metric

    def and_then(self, batch: Batch, coming: Sequence[Fact], budgets: Mapping[str, Budget]) -> Past:
        """With one more batch, of the edit in the making, for which `coming` are the next facts.

        What it and the others of this edit wrote about their subjects does not count for them.
        """
        batches = (*self.batches, batch)
        dropped = {key for key in self.dropped if not turn(key[0])}
        for one in batches:
            if turn(one.id):
                dropped |= {(one.id, column) for column in one.columns_with(coming)}
        budgets = {**self.budgets, **budgets}
        return replace(self, batches=batches, dropped=frozenset(dropped), budgets=budgets)

    def kept(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The columns that count of each batch that touched a weight."""
        for batch in self.batches:
            columns = sorted(set(batch.columns) - {c for id_, c in self.dropped if id_ == batch.id})
            if name in batch.keys and columns:
                yield batch.id, tuple(columns)

    def _known(
        self, name: str, lam: float, wanted: tuple[Any, ...], base: MetricProtocol
    ) -> tuple[int, MetricProtocol]:
        """The metric of as many of the first batches as there is one for, and their number."""
        made, metric = self._made.get(name, ((), base))
        if made and made[0] == lam and wanted[: len(made) - 1] == made[1:]:
            return len(made) - 1, metric
        for count in range(len(wanted), 0, -1):
            if self.memory is None:
                break
            found = self.memory.get(self._key(name, lam, wanted[:count]))
            if found is not None:
                return count, found
        return 0, base

    def _with(self, metric: MetricProtocol, K: Tensor, lam: float) -> MetricProtocol:
        if self.kind == "soft":
            return metric.plus(K, 1 / lam)
        return metric.holding(K) if isinstance(metric, Held) else Held(metric, K)

    def _key(self, name: str, lam: float, kept: tuple[Any, ...]) -> Hashable:
        return ("history", self.kind, lam, self.origin, name, kept)


#: Nothing earlier counts.
NO_PAST = Past()


def _size(metric: MetricProtocol) -> int:
    """Bytes of what a metric with a history holds beyond its base."""
    if isinstance(metric, Held):
        return metric.nbytes
    return metric.factor.nbytes if isinstance(metric, Metric) else 8 * metric.dim**2


def turn(id_: str) -> bool:
    """Whether a batch is one of the edit in the making; ids of edits have no blank."""
    return " " in id_


def no_weight() -> MethodError:
    """What is wrong with a soft history of an equality."""
    return MethodError(
        "history='soft' weighs earlier facts with 1 / lam, and an equality has no lam: take "
        "history='hard', which holds them, or a method with a ridge "
        "(method.replace(ridge=...), unified_edit.MEMIT)"
    )


def origin_of(statistics: KeyStatistics, method: Method) -> Hashable:
    """What a metric without a history is made from."""
    return statistics.source, method.preservation, method.norm_weight or 0.0


def batches_of(active: Sequence[Edit]) -> tuple[Batch, ...]:
    """What the active edits wrote, in order."""
    return tuple(
        Batch(edit.id, edit.facts, edit.columns, edit.keys, edit.targets) for edit in active
    )


def replaced_by(active: Sequence[Edit]) -> frozenset[Column]:
    """The columns that an active edit has written anew."""
    return frozenset(column for edit in active for column in edit.provenance.replaces)


@dataclass(frozen=True)
class Met:
    """What becomes of a batch that meets earlier facts.

    facts: what is to be written. notes: what a user should know. replaces: earlier columns that
    this batch writes anew.
    """

    facts: list[Fact]
    notes: list[str]
    replaces: tuple[Column, ...]


def meet(
    facts: Sequence[Fact],
    earlier: Sequence[Batch],
    gone: frozenset[Column],
    method: Method,
    history: History,
    on_shared_subject: SharedSubject,
    on_conflict: Conflict,
) -> Met:
    """Hold the facts of a new batch against those of earlier ones, as within a batch.

    The same fact again takes the place of the earlier one. Another target of the same prompt and
    subject is refused, or takes its place ("last"). Other facts about a subject are refused where
    an equality is to hold both ("raise"); they are written anew with one value for all of the
    subject ("merge"); or the new one is written and the earlier one is not held any more ("split").

    Raises ContradictionError and SharedSubjectError.
    """
    items, notes, replaces = list(facts), [], []
    of_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        of_subject.setdefault(subject_key(fact), []).append(fact)
    strict = history == "hard" or (
        method.ridge_for(len(facts)) == 0 and method.infeasible == "raise"
    )
    for batch in earlier:
        for known, column in zip(batch.facts, batch.columns, strict=True):
            same = of_subject.get(subject_key(known), [])
            if not same or (batch.id, column) in gone:
                continue
            fact = next((one for one in same if one.text == known.text), same[0])
            if fact.text != known.text and on_shared_subject == "raise":
                shared = (
                    f"{fact} and {known} of the active edit {batch.id} share the subject "
                    f"{fact.subject!r}, so that their keys are nearly the same"
                )
                if strict:
                    raise SharedSubjectError(
                        f"{shared}. One key cannot hold two values: find one for both "
                        "(on_shared_subject='merge'), let the earlier one go "
                        "(on_shared_subject='split'), or use history='soft' with a ridge"
                    )
                notes.append(f"{shared}; neither is held exactly")
                continue
            if fact.text != known.text and on_shared_subject == "merge":
                notes.append(f"{known} of edit {batch.id} is written anew with {fact}")
                items.append(known)
            elif fact.text != known.text:
                notes.append(f"{known} of edit {batch.id} is not held beside {fact}")
            elif fact.target_new == known.target_new:
                notes.append(f"{fact} was written by edit {batch.id} and is written again")
            elif on_conflict == "raise":
                raise ContradictionError(
                    f"{fact} contradicts {known} of the active edit {batch.id}: undo that one, or "
                    "let the last one win (on_conflict='last')"
                )
            else:
                notes.append(f"{fact} takes the place of {known} of edit {batch.id}")
            replaces.append((batch.id, column))
    return Met(list(dict.fromkeys(items)), notes, tuple(dict.fromkeys(replaces)))


def past_of(
    active: Sequence[Edit],
    memory: Memory,
    history: History,
    facts: Sequence[Fact],
    method: Method,
    on_shared_subject: SharedSubject,
    on_conflict: Conflict,
    budget: Budget | None = None,
) -> tuple[Past, Met]:
    """What the active edits wrote that counts for a new batch, and what becomes of its facts.

    budget: what lam comes from, if not from the method; each weight goes on with its own queue.
    Raises MethodError for a soft history of an equality, and what `meet` raises.
    """
    if history == "soft" and method.ridge_for(len(facts)) == 0:
        raise no_weight()
    batches, gone = batches_of(active), replaced_by(active)
    met = meet(facts, batches, gone, method, history, on_shared_subject, on_conflict)
    budgets = {}
    if budget is not None:
        budgets = {"": budget}
        for edit in active:
            for name, one in edit.provenance.spent.items():
                budgets[name] = replace(budget, queue=one.after.queue, first=one.after.first)
    return Past(history, batches, gone | set(met.replaces), memory=memory, budgets=budgets), met


def updates_at(weight: NamedWeight, entries: Sequence[Entry]) -> list[Update]:
    """What some edits add to a weight, in their order."""
    return [entry.updates[weight.name] for entry in entries if weight.name in entry.updates]


def values_of(ledger: Ledger, weight: NamedWeight, K: Tensor, updates: Sequence[Update]) -> Tensor:
    """W K (d_out x columns, float64) of the base and some updates, before W is rounded."""
    base = weight.to_stored(ledger.base_weight(weight)).cpu().double()
    found = base @ K
    for update in updates:
        found = found + update.left.cpu() @ (update.right.cpu() @ K)
    return found

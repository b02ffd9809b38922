"""What is to be edited, checked and tokenised before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unified_edit.editing.histories import NO_PAST, Column, Past
from unified_edit.editing.keys import column_means
from unified_edit.editing.methods import Method
from unified_edit.editing.named import Named
from unified_edit.editing.values import Values
from unified_edit.errors import (
    FactError,
    InfeasibleError,
    MethodError,
    SharedSubjectError,
    StatisticsError,
)
from unified_edit.facts import (
    Fact,
    SharedSubject,
    members_of,
    shared_subjects,
    subject_batches,
    subject_columns,
)
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.ledger import Ledger
from unified_edit.model.prompts import FactRows
from unified_edit.statistics import KeyStatistics

#: Settings that values depend on, besides their site and layer; and those that came later, which
#: are named only where they are used, so that values stay those of the same conditions.
_OF_VALUES = ("steps", "learning_rate", "kl_weight", "weight_decay", "clamp", "stop_loss")
_OF_VALUES_LATER = ("prob_cutoff", "norm_anchor")


@dataclass(frozen=True)
class Plan:
    """What is to be edited, checked and tokenised, before any work is done.

    columns: for each fact its column in K and R; facts with one value (`SharedSubject`) have one.
    turns: the places of the facts that are written together, turn by turn.
    notes: what a user should know about the choice of facts.
    past: what earlier edits wrote, and how it counts; replaces: columns of theirs written anew.
    named: what is preserved by name beside the facts.
    """

    method: Method
    rows: FactRows
    weights: tuple[NamedWeight, ...]
    state: str
    columns: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    on_shared_subject: SharedSubject = "raise"
    past: Past = NO_PAST
    replaces: tuple[Column, ...] = ()
    named: Named | None = None

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, each once."""
        return self.rows.facts

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit, ascending."""
        return tuple(weight.layer for weight in self.weights)

    @property
    def conditions(self) -> str:
        """Everything that values depend on besides the facts, as text."""
        settings = (getattr(self.method, name) for name in _OF_VALUES)
        later = ((name, getattr(self.method, name)) for name in _OF_VALUES_LATER)
        used = (setting for setting in later if setting[1])
        return repr((self.state, self.rows.prefixes, *settings, *used))

    @property
    def ridge(self) -> float:
        """lam for all columns together; 0 means the equality form."""
        return self.method.ridge_for(len(set(self.columns)))

    @property
    def names(self) -> list[str]:
        """What each column says."""
        each = [f"{fact.text!r} -> {fact.target_new!r}" for fact in self.facts]
        return [" and ".join(each[i] for i in members) for members in members_of(self.columns)]

    def of(self, places: Sequence[int]) -> Plan:
        """The plan of some of the facts, all that share a value among them, in one turn."""
        columns = _renumbered([self.columns[place] for place in places])
        turn = tuple(range(len(places)))
        return Plan(
            self.method, self.rows.of(places), self.weights, self.state, columns, (turn,),
            named=self.named,
        )  # fmt: skip


def _renumbered(columns: Sequence[int]) -> tuple[int, ...]:
    """The same columns, counted from 0 in order of first occurrence."""
    number = {column: place for place, column in enumerate(dict.fromkeys(columns))}
    return tuple(number[column] for column in columns)


def columns_of(facts: Sequence[Fact], on_shared_subject: SharedSubject) -> tuple[int, ...]:
    """For each fact its column in K and R: its own, or that of its subject for "merge"."""
    merge = on_shared_subject == "merge"
    return subject_columns(facts) if merge else tuple(range(len(facts)))


def turns_of(
    method: Method,
    facts: Sequence[Fact],
    columns: Sequence[int],
    on_shared_subject: SharedSubject,
) -> tuple[tuple[int, ...], ...]:
    """The places of the facts that are written together, turn by turn."""
    if method.sequential:
        turns = members_of(columns)
    elif on_shared_subject == "split":
        turns = subject_batches(facts)
    else:
        turns = [list(range(len(facts)))]
    return tuple(map(tuple, turns))


def check_value_is_read(parts: Anatomy, facts: Sequence[Fact], method: Method) -> None:
    """Behind the last block no token sees another one: a value there reaches no later target."""
    after = next((fact for fact in facts if fact.suffix), None)
    if method.value_layer == parts.n_layers - 1 and after is not None:
        raise MethodError(
            f"{method.name} sets values at layer {method.value_layer}, the last one: what stands "
            f"there at the subject of {after.text!r} is read by no later token, so it cannot make "
            f"the model say {after.target_new!r}. Edit an earlier layer: method.replace(layers=...)"
        )


def check_statistics(
    statistics: KeyStatistics, ledger: Ledger, weights: Sequence[NamedWeight]
) -> None:
    """Raise StatisticsError unless the statistics are this model's and hold all its layers."""
    if not isinstance(statistics, KeyStatistics):
        raise StatisticsError(
            f"statistics is a {type(statistics).__name__}; give a KeyStatistics, from "
            "KeyStatistics.collect or KeyStatistics.load, or nothing"
        )
    statistics.check_model(ledger.fingerprint(), ledger.parts.name)
    for weight in weights:
        dim = statistics.width(weight.layer)
        if dim != weight.d_in:
            raise StatisticsError(
                f"C0 of layer {weight.layer} has {dim} rows, but the model's "
                f"keys have {weight.d_in} entries; collect the statistics again"
            )


def check_room(method: Method, count: int, weights: Sequence[NamedWeight]) -> None:
    """What can be said of `count` columns without any key, before statistics are collected."""
    d_k = min(weight.d_in for weight in weights)
    if method.ridge_for(count) == 0 and method.infeasible == "raise" and count > d_k:
        raise InfeasibleError(
            f"{count} facts in one equality batch, but keys have only d_k = {d_k} "
            "entries, so Delta K = R has no solution; use smaller batches, a ridge "
            "(method.replace(ridge=...)), or infeasible='least_violation'"
        )


def check_subjects(method: Method, facts: Sequence[Fact], keys: Tensor | None = None) -> list[str]:
    """Facts of one batch that share a subject have nearly or exactly the same key.

    Returns a warning for each pair, with the cosine of their `keys` (d_in x E) if given; raises
    SharedSubjectError where the method holds an equality.
    """
    warnings = []
    unit = None if keys is None else keys / keys.norm(dim=0)
    for i, j in shared_subjects(facts):
        what = (
            f"{facts[i].text!r} -> {facts[i].target_new!r} and {facts[j].text!r} -> "
            f"{facts[j].target_new!r} share the subject {facts[i].subject!r}"
        )
        if unit is not None:
            what += f"; the cosine of their keys is {float(unit[:, i] @ unit[:, j]):.6f}"
        if method.ridge_for(len(facts)) == 0 and method.infeasible == "raise":
            raise SharedSubjectError(
                f"{what}. One key cannot hold two values: find one for both "
                "(on_shared_subject='merge'), write them in turn (on_shared_subject='split') or "
                "in separate edits, or use a method with a ridge (unified_edit.MEMIT), or "
                "infeasible='least_violation'"
            )
        warnings.append(what + "; neither is held exactly")
    return warnings


def merged_subjects(plan: Plan, keys: Tensor) -> list[str]:
    """A note on each value that several facts share.

    keys: of each fact (d_in x facts). They are told apart from their mean by the words before the
    subject: what is written at the mean reaches a fact the less, the smaller their cosine.
    """
    means = column_means(keys, plan.columns)
    return [
        f"{name} share the subject {plan.facts[members[0]].subject!r} and have one value; the "
        "cosine of their keys with the mean, where it is written, is at least "
        f"{float(_cosines(keys[:, members], means[:, column]).min()):.6f}"
        for column, (members, name) in enumerate(
            zip(members_of(plan.columns), plan.names, strict=True)
        )
        if len(members) > 1
    ]


def _cosines(keys: Tensor, key: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(keys, key[:, None], dim=0)


def checked_values(values: Values, plan: Plan) -> Values:
    """Those of the values given that the plan needs; raises if they were not made for it."""
    if len(plan.turns) > 1:
        what = (
            "writes facts one after another, each"
            if plan.method.sequential
            else f"writes the batch in {len(plan.turns)} turns (on_shared_subject='split'), each"
        )
        raise MethodError(
            f"{plan.method.name} {what} on the model edited so far, so values cannot be given for "
            "several; leave values out"
        )
    if not isinstance(values, Values):
        raise MethodError(
            f"values is a {type(values).__name__}; give what optimise_values returned, or nothing"
        )
    wanted = (plan.method.value_layer, plan.method.site.name)
    if (values.layer, values.site) != wanted:
        raise MethodError(
            f"the values given were optimised at {values.site} {values.layer}, but "
            f"{plan.method.name} sets them at {wanted[1]} {wanted[0]}; optimise them for it"
        )
    if values.conditions != plan.conditions:
        raise MethodError(
            "the values given were optimised on another model or state of it, with another seed "
            "or other settings; optimise them again: optimise_values(model, tokenizer, facts, "
            "method, seed=...)"
        )
    missing = [fact for fact in plan.facts if fact not in values.facts]
    if missing:
        raise FactError(
            f"the values given hold none for {missing[0].text!r} -> {missing[0].target_new!r} "
            f"({len(missing)} facts are missing); optimise them for all facts"
        )
    found = values.of(plan.facts)
    if found.columns != plan.columns:
        apart = next(
            i
            for i, pair in enumerate(zip(found.columns, plan.columns, strict=True))
            if pair[0] != pair[1]
        )
        raise MethodError(
            f"the value given for {plan.facts[apart]} is its own where one with the facts of its "
            "subject is needed, or the other way round; optimise them the same way: "
            "optimise_values(..., on_shared_subject=...)"
        )
    return found

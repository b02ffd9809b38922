"""What is to be edited, checked and tokenised before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unified_edit.editing.methods import Method
from unified_edit.editing.values import Values
from unified_edit.errors import FactError, InfeasibleError, MethodError, SharedSubjectError
from unified_edit.facts import Fact, shared_subjects
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.prompts import FactRows

#: Settings that values depend on, besides their site and layer.
_OF_VALUES = ("steps", "learning_rate", "kl_weight", "weight_decay", "clamp", "stop_loss")


@dataclass(frozen=True)
class Plan:
    """What is to be edited, checked and tokenised, before any work is done."""

    method: Method
    rows: FactRows
    weights: tuple[NamedWeight, ...]
    state: str

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
        return repr((self.state, self.rows.prefixes, *settings))

    def of(self, place: int) -> Plan:
        """The plan of one of the facts."""
        return Plan(self.method, self.rows.of([place]), self.weights, self.state)


def check_value_is_read(parts: Anatomy, facts: Sequence[Fact], method: Method) -> None:
    """Behind the last block no token sees another one: a value there reaches no later target."""
    assert method.layers is not None
    after = next((fact for fact in facts if fact.suffix), None)
    if method.layers[-1] == parts.n_layers - 1 and after is not None:
        raise MethodError(
            f"{method.name} sets values at layer {method.layers[-1]}, the last one: what stands "
            f"there at the subject of {after.text!r} is read by no later token, so it cannot make "
            f"the model say {after.target_new!r}. Edit an earlier layer: method.replace(layers=...)"
        )


def check_room(method: Method, facts: Sequence[Fact], weights: Sequence[NamedWeight]) -> None:
    """What can be said of an equality batch without any key, before statistics are collected."""
    d_k = min(weight.d_in for weight in weights)
    if method.ridge_for(len(facts)) == 0 and method.infeasible == "raise" and len(facts) > d_k:
        raise InfeasibleError(
            f"{len(facts)} facts in one equality batch, but keys have only d_k = {d_k} "
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
                f"{what}. One key cannot hold two values: write them in separate edits, or "
                "use a method with a ridge (unified_edit.MEMIT), or "
                "infeasible='least_violation'"
            )
        warnings.append(what + "; neither is held exactly")
    return warnings


def checked_values(values: Values, plan: Plan) -> Values:
    """Those of the values given that the plan needs; raises if they were not made for it."""
    if not isinstance(values, Values):
        raise MethodError(
            f"values is a {type(values).__name__}; give what optimise_values returned, or nothing"
        )
    wanted = (plan.layers[-1], plan.method.site.name)
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
    return values.of(plan.facts)

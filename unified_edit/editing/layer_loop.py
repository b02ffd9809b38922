"""The one loop over layers that ROME, EMMET and MEMIT share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from unified_edit.editing.keys import keys_of, values_at
from unified_edit.editing.methods import Method
from unified_edit.editing.plans import Plan, check_subjects
from unified_edit.editing.provenance import Outcome
from unified_edit.editing.sinks import check_first_place
from unified_edit.editing.spreading import shares
from unified_edit.editing.values import Values, compute_values
from unified_edit.errors import EditError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.ledger import Ledger
from unified_edit.model.likelihoods import Likelihood, likelihoods
from unified_edit.objective import Update, feasible, solve
from unified_edit.statistics import KeyStatistics


@dataclass
class Written:
    """What came of writing some facts, in order.

    updates, keys: by name of a weight, one for each plan. after: the likelihood of each target with
    all of them.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    keys: dict[str, list[Tensor]] = field(default_factory=dict)
    values: list[Values] = field(default_factory=list)
    after: list[Likelihood] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def write(
    parts: Anatomy,
    ledger: Ledger,
    plans: Sequence[Plan],
    statistics: KeyStatistics,
    values: Values | None,
) -> Written:
    """Solve for the updates of each plan in turn, on the model as edited so far.

    statistics: of the keys to preserve. values: those of a single plan, if they are known. The
    model is as before when it is done.

    Raises what `feasible`, `solve` and `compute_values` raise.
    """
    made = Written()
    with ledger.trying() as add:
        for plan in plans:
            _write_one(parts, plan, statistics, values, made, add)
        rows = [row for plan in plans for row in plan.rows.bare]
        made.after = likelihoods(parts, rows)
    return made


def _write_one(
    parts: Anatomy,
    plan: Plan,
    statistics: KeyStatistics,
    values: Values | None,
    made: Written,
    add: Callable[[NamedWeight, Update], None],
) -> None:
    """Write the facts of one plan, layer by layer.

    At each layer keys and residual are read again on the partly edited model, and the layer
    takes its share of the residual, :eq:`spread-residual` (MEMIT, sec. 4.4, algorithm 1).
    """
    method, rows = plan.method, plan.rows
    ridge = method.ridge_for(len(plan.facts))
    names = [f"{fact.text!r} -> {fact.target_new!r}" for fact in plan.facts]
    first_keys = keys_of(parts, rows, plan.layers[:1], method.key_mean)[plan.layers[0]]
    made.warnings += check_subjects(method, plan.facts, first_keys)
    made.warnings += check_first_place(parts, rows, plan.layers[0])
    metric = method.preservation(statistics, plan.weights[0])
    if ridge == 0 and method.infeasible == "raise":
        # a batch that cannot be held is refused before its values are optimised
        feasible(metric, first_keys, names=names).require()
    if values is None:
        values = compute_values(parts, rows, method, plan.conditions)
    made.values.append(values)
    parts_of_residual = shares(len(plan.layers), method.distribution)
    for place, (weight, share) in enumerate(zip(plan.weights, parts_of_residual, strict=True)):
        if place == 0:
            keys, residual = first_keys, values.delta  # nothing has changed since
        else:
            metric = method.preservation(statistics, weight)
            keys = keys_of(parts, rows, [weight.layer], method.key_mean)[weight.layer]
            residual = values.z - values_at(parts, rows, values.layer, method.site)
        residual = residual / parts.gain(values.layer, method.site(parts, values.layer))
        update = solve(
            metric,
            keys,
            share * residual,
            ridge=ridge,
            infeasible=method.infeasible,
            names=names,
        )
        add(weight, update)
        made.updates.setdefault(weight.name, []).append(update)
        made.keys.setdefault(weight.name, []).append(keys)


def outcomes_of(plan: Plan, made: Written, before: Sequence[Likelihood]) -> tuple[Outcome, ...]:
    """What became of each fact; EditError if nothing did."""
    values = Values.joined(made.values)
    outcomes = tuple(
        _outcome(values, index, plan.method, before[index], made.after[index])
        for index in range(len(plan.facts))
    )
    if all(outcome.relative_norm == 0.0 for outcome in outcomes):
        raise EditError(
            "the edit changes nothing: the model says the target already in every context, so "
            "the value was not moved; give another target"
        )
    return outcomes


def _outcome(
    values: Values, index: int, method: Method, before: Likelihood, after: Likelihood
) -> Outcome:
    assert method.clamp is not None
    ratio = float(values.delta[:, index].norm() / values.target_init[:, index].norm())
    return Outcome(
        losses=values.losses[index],
        relative_norm=ratio,
        clamped=ratio >= method.clamp * (1 - 1e-5),
        before=before.probability,
        after=after.probability,
        likeliest=after.greedy,
    )


def not_taken(facts: Sequence[Fact], outcomes: Sequence[Outcome]) -> list[str]:
    """A warning that counts the facts that the edited model does not say by itself."""
    failed = [pair for pair in zip(facts, outcomes, strict=True) if not pair[1].likeliest]
    if not failed:
        return []
    shown = "; ".join(
        f"{fact.text!r} -> {fact.target_new!r}: {outcome.before:.2g} before, "
        f"{outcome.after:.2g} after"
        for fact, outcome in failed[:3]
    )
    return [
        f"{len(failed)} of {len(facts)} facts did not take: their target is not the likeliest "
        f"continuation ({shown}{'; ...' if len(failed) > 3 else ''}). Try a prompt that the model "
        "completes with such an answer, another layer (unified_edit.locate), a larger clamp, or "
        "more steps"
    ]

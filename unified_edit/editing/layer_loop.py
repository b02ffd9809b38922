"""The one loop over layers that ROME, EMMET and MEMIT share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unified_edit.editing.budgets import within_budget
from unified_edit.editing.histories import (
    NO_PAST,
    Batch,
    Past,
    origin_of,
    updates_at,
    values_of,
)
from unified_edit.editing.kept import Kept, Said, moved_of, said_behind
from unified_edit.editing.keys import KEY_MEANS, column_means, keys_of
from unified_edit.editing.methods import Method
from unified_edit.editing.named import check_free, counted
from unified_edit.editing.plans import Plan, check_subjects, merged_subjects
from unified_edit.editing.preservations import metric_of
from unified_edit.editing.provenance import Outcome, Spent
from unified_edit.editing.residuals import divided_residual, goals_of, missing
from unified_edit.editing.sinks import check_first_place
from unified_edit.editing.spreading import shares
from unified_edit.editing.values import Values, compute_values
from unified_edit.errors import EditError
from unified_edit.facts import Fact, shared_subjects
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.ledger import Ledger
from unified_edit.model.likelihoods import Likelihood, likelihoods
from unified_edit.objective import MetricProtocol, Update, feasible, solve
from unified_edit.statistics import KeyStatistics


@dataclass
class Written:
    """What came of writing some facts, in order.

    updates, keys, targets: by name of a weight, one for each turn; the targets are the V of a
    history, and there is none without. after: the likelihood of each target with
    all of them. took: whether greedy decoding gave it after its own turn, if that was asked.
    spent: by name of a weight, within a budget of preservation, after the last turn.
    preserved: K_p of what is preserved by name, by name of a weight, as its last turn read it;
    said, says: what the model says behind those prompts before and with all.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    keys: dict[str, list[Tensor]] = field(default_factory=dict)
    targets: dict[str, list[Tensor]] = field(default_factory=dict)
    values: list[Values] = field(default_factory=list)
    after: list[Likelihood] = field(default_factory=list)
    took: list[bool] = field(default_factory=list)
    spent: dict[str, Spent] = field(default_factory=dict)
    preserved: dict[str, Tensor] = field(default_factory=dict)
    said: list[Said] = field(default_factory=list)
    says: list[Said] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def write(
    parts: Anatomy,
    ledger: Ledger,
    plan: Plan,
    statistics: KeyStatistics,
    values: Values | None,
) -> Written:
    """Solve for the updates of each turn of a plan, on the model as edited so far.

    statistics: of the keys to preserve. values: those of a plan with one turn, if they are known.
    The model is as before when it is done.

    Raises what `feasible`, `solve` and `compute_values` raise.
    """
    made = Written()
    turns = [plan.of(turn) for turn in plan.turns]
    watched = plan.on_shared_subject == "split" and bool(shared_subjects(plan.facts))
    past = replace(plan.past, origin=origin_of(statistics, plan.method))
    named = plan.named
    if named is not None:
        made.said = said_behind(parts, named.encoder, named.asked)
    with ledger.trying() as add:
        for number, turn in enumerate(turns):
            if number and past.kind is not None:
                keys = {name: each[-1] for name, each in made.keys.items()}
                before = turns[number - 1]
                values_then = {name: each[-1] for name, each in made.targets.items()}
                batch = Batch(f"turn {number}", before.facts, before.columns, keys, values_then)
                budgets = {name: one.after for name, one in made.spent.items()}
                past = past.and_then(batch, turn.facts, budgets)
            write_one(parts, turn, statistics, values, made, add, past, ledger)
            if watched:
                made.took += [found.greedy for found in likelihoods(parts, turn.rows.bare)]
        made.after = likelihoods(parts, [row for turn in turns for row in turn.rows.bare])
        if named is not None:
            tokens = [one.token for one in made.said]
            made.says = said_behind(parts, named.encoder, named.asked, tokens)
    return made


def write_one(
    parts: Anatomy,
    plan: Plan,
    statistics: KeyStatistics,
    values: Values | None,
    made: Written,
    add: Callable[[NamedWeight, Update], None],
    past: Past = NO_PAST,
    ledger: Ledger | None = None,
) -> None:
    """Write the facts of one turn, layer by layer.

    At each layer keys and residual are read again on the partly edited model, and the layer
    takes its share of the residual, :eq:`spread-residual` (MEMIT, sec. 4.4, algorithm 1).
    past: what counts besides C0; `ledger` has the edits in force then.
    """
    method, rows = plan.method, plan.rows
    ridge, names, columns = plan.ridge, plan.names, plan.columns
    keys_of_facts = keys_of(parts, rows, plan.layers[:1], method.key_mean)[plan.layers[0]]
    first_keys = column_means(keys_of_facts, columns)
    if len(names) < len(columns):
        made.warnings += merged_subjects(plan, keys_of_facts)
    else:
        made.warnings += check_subjects(method, plan.facts, first_keys)
    made.warnings += check_first_place(parts, rows, plan.layers[0])
    metric = _metric(parts, plan, plan.weights[0], statistics, past, made)
    made.warnings += _crowded(plan, metric, first_keys, made.preserved.get(plan.weights[0].name))
    if ridge == 0 and method.infeasible == "raise":
        # a batch that cannot be held is refused before its values are optimised
        with counted(plan.named):
            feasible(metric, first_keys, names=names).require()
    if values is None:
        values = compute_values(parts, rows, method, plan.conditions, columns)
    made.values.append(values)
    parts_of_residual = shares(len(plan.layers), method.distribution)
    goals = goals_of(parts, plan, values)
    for place, (weight, share, goal) in enumerate(
        zip(plan.weights, parts_of_residual, goals, strict=True)
    ):
        if place == 0:
            keys = first_keys  # nothing has changed since
        else:
            del metric  # GPT-J's takes 2 GiB, and so does the next one
            metric = _metric(parts, plan, weight, statistics, past, made)
            keys = keys_of(parts, rows, [weight.layer], method.key_mean)[weight.layer]
            keys = column_means(keys, columns)
            made.warnings += _crowded(plan, metric, keys, made.preserved.get(weight.name))
        is_delta = place == 0 and method.output_mean == KEY_MEANS["bare"]
        residual = values.delta if is_delta else missing(parts, plan, goal)
        residual = residual / parts.gain(goal.layer, method.site(parts, goal.layer))
        residual = divided_residual(parts, plan, weight, metric, keys, residual)
        asked = share * residual
        turns = made.updates.get(weight.name, [])
        if past.budgets and ledger is not None:
            update, given, made.spent[weight.name] = within_budget(
                past, metric, weight, keys, asked, ledger, turns
            )
            made.targets.setdefault(weight.name, []).append(given)
        else:
            with counted(plan.named):
                update = solve(
                    metric,
                    keys,
                    asked,
                    ridge=ridge,
                    infeasible=method.infeasible,
                    names=names,
                )
            if past.kind is not None and ledger is not None:
                written = [*updates_at(weight, ledger.active), *turns]
                now = values_of(ledger, weight, keys, written)
                made.targets.setdefault(weight.name, []).append(now + asked)
        add(weight, update)
        made.updates.setdefault(weight.name, []).append(update.to("cpu"))
        made.keys.setdefault(weight.name, []).append(keys)


def _metric(
    parts: Anatomy,
    plan: Plan,
    weight: NamedWeight,
    statistics: KeyStatistics,
    past: Past,
    made: Written,
) -> MetricProtocol:
    """What an update costs at a weight, on the model as edited so far; `made` gets K_p."""
    method = plan.method
    metric = metric_of(method.preservation, method.norm_weight or 0.0, statistics, weight)
    if not past.budgets:  # there, earlier keys are solved for, not weighed
        metric = past.metric(metric, weight, plan.ridge)
    if plan.named is None:
        return metric
    kept = plan.named.keys(parts, weight.layer, method.key_mean)
    made.preserved[weight.name] = kept
    return plan.named.metric(metric, kept, plan.ridge)


def _crowded(plan: Plan, metric: MetricProtocol, keys: Tensor, kept: Tensor | None) -> list[str]:
    """Warnings of edited keys that exact preservation leaves little of; see `check_free`."""
    if plan.named is None or kept is None:
        return []
    may = plan.method.infeasible == "least_violation"
    return check_free(plan.named, metric, keys, kept, plan.names, may)


def kept_of(
    plan: Plan, made: Written, ledger: Ledger, updates: Mapping[str, Update]
) -> tuple[Kept, ...]:
    """What became of each item that was to be preserved."""
    if plan.named is None:
        return ()
    items, columns = plan.named.given.items, plan.named.columns
    moved = moved_of(ledger, updates, made.preserved, columns)
    return tuple(
        Kept(item, own, said.token, said.text, said.probability, says.probability, says.text, far)
        for item, own, said, says, far in zip(
            items, columns, made.said, made.says, moved, strict=True
        )
    )


def by_column(plan: Plan, of_turns: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """K or V of each weight, (d x columns), in the order of the plan's columns."""
    written = [c for turn in plan.turns for c in dict.fromkeys(plan.columns[i] for i in turn)]
    order = sorted(range(len(written)), key=written.__getitem__)
    return {name: torch.cat(list(each), dim=1)[:, order] for name, each in of_turns.items()}


def outcomes_of(plan: Plan, made: Written, before: Sequence[Likelihood]) -> tuple[Outcome, ...]:
    """What became of each fact; EditError if nothing did."""
    values = Values.joined(made.values).of(plan.facts)
    asked = [place for turn in plan.turns for place in turn]
    after = dict(zip(asked, made.after, strict=True))
    outcomes = tuple(
        _outcome(values, index, plan.method, before[index], after[index])
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
    column = values.columns[index]
    ratio = float(values.delta[:, column].norm() / values.target_init[:, column].norm())
    return Outcome(
        losses=values.losses[column],
        relative_norm=ratio,
        clamped=ratio >= method.clamp * (1 - 1e-5),
        before=before.probability,
        after=after.probability,
        likeliest=after.greedy,
    )


def lost_again(plan: Plan, made: Written) -> list[str]:
    """A warning that names the facts that took in their own turn and were lost in a later one."""
    asked = [place for turn in plan.turns for place in turn]
    lost = [
        plan.facts[place]
        for place, took, after in zip(asked, made.took, made.after, strict=False)
        if took and not after.greedy
    ]
    if not lost:
        return []
    return [
        f"{len(lost)} of {len(asked)} facts took in their own turn and were lost by a later one: "
        + "; ".join(f"{fact.text!r} -> {fact.target_new!r}" for fact in lost)
        + ". One value for all facts of a subject is found by on_shared_subject='merge'"
    ]


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

"""How a batch of facts is written into hook layers; what they are is in `hook_layers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from unified_edit.editing.hook_gates import HookLayer, Hooks, fallen_threshold
from unified_edit.editing.hook_measures import Preserved, scores_of
from unified_edit.editing.keys import column_means, values_at
from unified_edit.editing.layer_loop import Written, write_one
from unified_edit.editing.methods import Method
from unified_edit.editing.plans import Plan
from unified_edit.editing.provenance import Outcome
from unified_edit.editing.values import Values, compute_values
from unified_edit.errors import ContradictionError, MethodError
from unified_edit.facts import Conflict, Fact, shared_subjects
from unified_edit.model.anatomy import Anatomy, NamedWeight
from unified_edit.model.prompts import FactRows
from unified_edit.objective import Update
from unified_edit.statistics import KeyStatistics
from unified_edit.statistics.collect import Source

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class HookBatch:
    """What came of a batch.

    facts, outcomes: one a fact. thresholds: {layer: that of its gate after the batch}. opened:
    {layer: at which share of the facts' bare prompts its gate opens at the subject}. warnings: what
    a user should know.
    """

    facts: tuple[Fact, ...]
    outcomes: tuple[Outcome, ...]
    thresholds: Mapping[int, float]
    opened: Mapping[int, float]
    warnings: tuple[str, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """One row a fact: prompt, target, its probability before and after, whether it is now the
        likeliest.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": fact.text,
                "target": fact.target_new,
                "before": outcome.before,
                "after": outcome.after,
                "likeliest": outcome.likeliest,
            }
            for fact, outcome in zip(self.facts, self.outcomes, strict=True)
        )


def accumulating(method: Method) -> Method:
    """The method, resolved; MethodError unless keys can be accumulated for it as lam C0 + K K'."""
    if method.ridge_for(1) == 0 or method.sequential:
        raise MethodError(
            f"{method.name} holds an equality, but hook layers accumulate keys as lam C0 + K K', "
            "with a ridge lam: give unified_edit.MEMIT, or method.replace(ridge=..., "
            "ridge_from=1, sequential=False)"
        )
    if method.preservation.name != "C0":
        raise MethodError(
            f"{method.name} preserves {method.preservation.name!r}; hook layers accumulate keys "
            "onto C0: method.replace(preservation='C0')"
        )
    return method


def write_turn(
    parts: Anatomy,
    plan: Plan,
    hooks: Hooks,
    source: Source,
    values: Values | None,
    made: Written,
    preserved: Preserved | None,
    q: float,
) -> None:
    """Write the facts of a plan with one turn into the layers of `hooks`, which are in force.

    source: of C0. preserved: for the thresholds of a causal gate, of q.
    """
    rows, columns = plan.rows, plan.columns
    parts = replace(parts, causal=hooks.gate.causal)
    if values is None:
        values = compute_values(parts, rows, plan.method, plan.conditions, columns)
    hooks.layers = {layer: replace(one, temporary=True) for layer, one in hooks.layers.items()}
    now = column_means(values_at(parts, rows, values.layer, plan.method.site), columns)
    # what is missing is what is missing while all hooks are temporary
    missing = replace(values, delta=values.z - now, target_init=now)

    def add(weight: NamedWeight, update: Update) -> None:
        hook = hooks.layers[weight.layer].plus(update.delta)
        if preserved is not None:
            at = preserved.threshold(weight.layer, hook, hooks.gate, q, parts.model.device)
            hook = replace(hook, threshold=at)
        hooks.put(weight.layer, hook)

    metrics = {layer: one.metric for layer, one in hooks.layers.items()}
    write_one(parts, plan, KeyStatistics(source, {}, {}, metrics), missing, made, add)
    made.values[-1] = values
    for weight in plan.weights:
        hook, keys = hooks.layers[weight.layer], made.keys[weight.name][-1]
        hooks.put(weight.layer, hook.preserving(keys, 1 / plan.ridge))
    if not hooks.gate.causal:
        _let_fall(parts, rows, hooks)


def _let_fall(parts: Anatomy, rows: FactRows, hooks: Hooks) -> None:
    """Thresholds of the published gate after a batch, from the base model's keys on its prompts."""
    layers = hooks.layers
    with hooks.silent():
        scores = scores_of(parts, [row.prompt for row in rows.bare], layers, hooks.gate)
    for layer, hook in layers.items():
        best = [float(one.max()) for one in scores[layer]]
        hooks.put(layer, replace(hook, threshold=fallen_threshold(hook.threshold, best)))


def opened_at_subjects(parts: Anatomy, rows: FactRows, hooks: Hooks) -> dict[int, list[bool]]:
    """For each layer whether its gate opens at the subject of each bare prompt."""
    scores = scores_of(parts, [row.prompt for row in rows.bare], hooks.layers, hooks.gate)
    return {
        layer: [
            bool(one[row.subject] >= hooks.layers[layer].threshold)
            for one, row in zip(scores[layer], rows.bare, strict=True)
        ]
        for layer in hooks.layers
    }


def shut_out(facts: Sequence[Fact], opened: Mapping[int, Sequence[bool]]) -> list[str]:
    """A warning for each layer whose gate stays shut at some facts' subjects."""
    warnings = []
    for layer, each in opened.items():
        shut = [fact for fact, open_ in zip(facts, each, strict=True) if not open_]
        if shut:
            warnings.append(
                f"the gate of layer {layer} stays shut at the subject of {len(shut)} of "
                f"{len(facts)} facts, first {shut[0].text!r} -> {shut[0].target_new!r}: what was "
                "written there does not show. A larger q opens it for more tokens, those of "
                "others among them"
            )
    return warnings


def with_earlier(
    earlier: Sequence[Fact], facts: Sequence[Fact], on_conflict: Conflict
) -> list[str]:
    """Notes on facts that overrule one of an earlier batch, or share a subject with one.

    Raises ContradictionError for the former if `on_conflict` is "raise".
    """
    notes = []
    known = {(fact.prompt, fact.subject): fact for fact in earlier}
    for fact in facts:
        old = known.get((fact.prompt, fact.subject))
        if old is None or old.target_new == fact.target_new:
            continue
        if on_conflict == "raise":
            raise ContradictionError(
                f"{fact} contradicts {old}, which an earlier batch wrote: they have the same "
                "prompt and subject but different targets. Leave it out, or let the last one win "
                "(on_conflict='last')"
            )
        notes.append(
            f"{fact} overrules {old} of an earlier batch, whose key is still among those to be "
            "preserved: it may take only in part"
        )
    count = len(earlier)
    both = [*earlier, *facts]
    pairs = [(i, j) for i, j in shared_subjects(both) if i < count <= j]
    if pairs:
        i, j = pairs[0]
        notes.append(
            f"{len({j for _, j in pairs})} of {len(facts)} facts share a subject with one of an "
            f"earlier batch, first {both[j]} with {both[i]}; neither is held exactly"
        )
    return notes


def in_force(earlier: Iterable[Fact], facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """All facts written so far; of those with one prompt and subject the last."""
    return tuple({(fact.prompt, fact.subject): fact for fact in [*earlier, *facts]}.values())


def untouched(plan: Plan, statistics: KeyStatistics, threshold: float) -> dict[int, HookLayer]:
    """The hook layers before any batch: W_h = W0, and C0 for what is to be preserved."""
    return {
        weight.layer: HookLayer(
            torch.zeros(weight.d_out, weight.d_in, dtype=torch.float64),
            statistics.metric(weight.layer, "cpu"),
            threshold,
        )
        for weight in plan.weights
    }

"""From what was written to an edit with its record."""

from __future__ import annotations

import logging
from dataclasses import asdict

from unified_edit.editing.edits import Edit
from unified_edit.editing.layer_loop import Written, by_column, kept_of, lost_again, not_taken
from unified_edit.editing.plans import Plan
from unified_edit.editing.provenance import Outcome, merged, provenance_of
from unified_edit.model.ledger import Ledger
from unified_edit.statistics import KeyStatistics

log = logging.getLogger(__name__)


def finished(
    ledger: Ledger,
    plan: Plan,
    made: Written,
    outcomes: tuple[Outcome, ...],
    statistics: KeyStatistics,
    seed: int,
) -> Edit:
    """The edit of the ledger's model that a plan has led to; its warnings are logged."""
    updates = {name: merged(each) for name, each in made.updates.items()}
    lost = lost_again(plan, made)
    warnings = [*plan.notes, *made.warnings, *lost, *not_taken(plan.facts, outcomes)]
    for warning in warnings:
        log.warning("%s", warning)
    return Edit(
        facts=plan.facts,
        method=plan.method,
        updates=updates,
        keys=by_column(plan, made.keys),
        columns=plan.columns,
        targets=by_column(plan, made.targets),
        kept=kept_of(plan, made, ledger, updates),
        preserved_keys=made.preserved,
        outcomes=outcomes,
        provenance=provenance_of(
            ledger,
            plan.weights,
            updates,
            state=plan.state,
            seed=seed,
            prefixes=plan.rows.prefixes,
            statistics=asdict(statistics.source),
            on_shared_subject=plan.on_shared_subject,
            history=plan.past.kind,
            replaces=plan.replaces,
            preserve=plan.named.given.weight if plan.named else None,
            spent=made.spent,
        ),
        warnings=tuple(warnings),
    ).bound_to(ledger.model)

"""What is done with all edits of a model: undone, replayed, asked again, kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unified_edit.editing.edits import Edit
from unified_edit.editing.histories import (
    Column,
    History,
    Past,
    batches_of,
    origin_of,
    replaced_by,
    updates_at,
    values_of,
)
from unified_edit.editing.kept import Kept, moved_of, said_behind
from unified_edit.editing.keys import column_means, keys_of
from unified_edit.editing.methods import Method
from unified_edit.editing.named import named_metric
from unified_edit.editing.preservations import metric_of
from unified_edit.editing.provenance import Alone, provenance_of
from unified_edit.errors import EditError, NullSpaceError
from unified_edit.facts import Fact
from unified_edit.model.anatomy import Anatomy, NamedWeight, Tokenizer
from unified_edit.model.hooks import lock_of, quiet
from unified_edit.model.ledger import Entry, Ledger
from unified_edit.model.likelihoods import Likelihood, likelihoods
from unified_edit.model.memory import Memory
from unified_edit.model.prompts import Encoder
from unified_edit.objective import Update, solve
from unified_edit.statistics import KeyStatistics

if TYPE_CHECKING:
    import pandas as pd


class Owner(Protocol):
    """What is needed of an `Editor`."""

    tokenizer: Tokenizer
    ledger: Ledger
    memory: Memory
    history: History | None

    @property
    def model(self) -> PreTrainedModel:
        """The model."""

    @property
    def parts(self) -> Anatomy:
        """Its parts."""

    @property
    def active(self) -> tuple[Edit, ...]:
        """The edits in force."""

    def statistics_for(self, weights: Sequence[NamedWeight]) -> KeyStatistics:
        """C0 of some weights."""

    def shrunk(self, statistics: KeyStatistics) -> KeyStatistics:
        """C0 made invertible everywhere."""


@dataclass(frozen=True, eq=False)
class Undone:
    """What came of undoing an edit that others followed.

    edit: the one that was taken out. lost: facts of later edits whose target was the likeliest
    continuation before and is not now; gained: the other way round. replayed: the later edits as
    they are now, solved again, if that was asked for.
    """

    edit: Edit
    lost: tuple[Fact, ...]
    gained: tuple[Fact, ...]
    replayed: tuple[Edit, ...] = ()


def undo(editor: Owner, edit: Edit, again: bool) -> Undone:
    """`Editor.undo`."""
    ledger, model = editor.ledger, editor.model
    with quiet(model), lock_of(model):
        active = editor.active
        place = next((i for i, one in enumerate(active) if one.id == edit.id), None)
        if place is None:
            raise EditError(
                "this edit is not in force in the editor's model, so it cannot be undone; "
                "editor.active has those that are"
            )
        earlier, later = active[:place], active[place + 1 :]
        facts = [fact for one in later for fact in one.facts]
        before = _asked(editor, facts)
        others = tuple(entry for entry in ledger.active if not isinstance(entry, Edit))
        with ledger.rollback():
            ledger.activate((*others, *earlier, *later))
            replayed = _replayed(editor, others, earlier, later) if again and later else ()
            if replayed:
                ledger.activate((*others, *earlier, *replayed))
        after = _asked(editor, facts)
        pairs = list(zip(facts, before, after, strict=True))
        return Undone(
            edit,
            lost=tuple(fact for fact, old, new in pairs if old.greedy and not new.greedy),
            gained=tuple(fact for fact, old, new in pairs if new.greedy and not old.greedy),
            replayed=replayed,
        )


def _asked(editor: Owner, facts: Sequence[Fact]) -> list[Likelihood]:
    """How likely the targets of facts are now, behind their bare prompts."""
    if not facts:
        return []
    parts = editor.parts
    return likelihoods(parts, Encoder(editor.tokenizer, parts).fact_rows(facts, [""]).bare)


def _replayed(
    editor: Owner, others: tuple[Entry, ...], earlier: Sequence[Edit], later: Sequence[Edit]
) -> tuple[Edit, ...]:
    """Later edits solved again for the pairs that they recorded; nothing is optimised anew."""
    made: list[Edit] = []
    ids: dict[str, str] = {}
    for edit in later:
        if not isinstance(edit.method, Method) or not edit.targets:
            raise EditError(
                f"edit {edit.id} was made without a history, so what it wrote at each weight was "
                "not recorded and cannot be solved for again; undo it, and make it again "
                "(or leave replay=True out)"
            )
        if edit.provenance.spent:
            raise EditError(
                f"edit {edit.id} was made within a budget, which goes on from what its weights "
                "gave, and not from what they were asked for: it cannot be solved for again. Undo "
                "it, and make it again (or leave replay=True out)"
            )
        replaces = tuple((ids.get(id_, id_), column) for id_, column in edit.provenance.replaces)
        new = _solved_again(editor, others, [*earlier, *made], edit, replaces)
        ids[edit.id] = new.id
        made.append(new)
    return tuple(made)


def _solved_again(
    editor: Owner,
    others: tuple[Entry, ...],
    earlier: Sequence[Edit],
    edit: Edit,
    replaces: tuple[Column, ...],
) -> Edit:
    ledger, parts, method = editor.ledger, editor.parts, edit.method
    assert isinstance(method, Method)
    recorded = edit.provenance
    weights = [parts.named(name) for name in edit.updates]
    ridge = method.ridge_for(len(set(edit.columns)))
    statistics = editor.statistics_for(weights)
    past = Past(
        edit_history(edit),
        batches_of(earlier),
        replaced_by(earlier) | set(replaces),
        origin_of(statistics, method),
        editor.memory,
    )

    def solved(statistics: KeyStatistics) -> dict[str, Update]:
        found = {}
        for weight in weights:
            K, V = edit.keys[weight.name], edit.targets[weight.name]
            metric = metric_of(method.preservation, method.norm_weight or 0.0, statistics, weight)
            metric = past.metric(metric, weight, ridge)
            if recorded.preserve is not None:
                names = edit.preserved_keys[weight.name]
                metric = named_metric(metric, names, recorded.preserve, ridge)
            R = V - values_of(ledger, weight, K, updates_at(weight, (*others, *earlier)))
            update = solve(metric, K, R, ridge=ridge, infeasible=method.infeasible)
            found[weight.name] = update.to("cpu")
        return found

    try:
        updates = solved(statistics)
    except NullSpaceError:
        statistics = editor.shrunk(statistics)
        past = replace(past, origin=origin_of(statistics, method), _made={})
        updates = solved(statistics)
    with ledger.state_kept():
        alone = Alone("replayed", updates)
        ledger.activate((*others, *earlier, alone))
        after = _asked(editor, edit.facts)
        kept = _kept_again(editor, edit, updates)
    return replace(
        edit,
        updates=updates,
        kept=kept,
        outcomes=tuple(
            replace(outcome, after=found.probability, likeliest=found.greedy)
            for outcome, found in zip(edit.outcomes, after, strict=True)
        ),
        provenance=provenance_of(
            ledger,
            weights,
            updates,
            state="+".join([ledger.fingerprint(), *(one.id for one in (*others, *earlier))]),
            seed=recorded.seed,
            prefixes=recorded.prefixes,
            statistics=asdict(statistics.source),
            on_shared_subject=recorded.on_shared_subject,
            history=recorded.history,
            replaces=replaces,
            preserve=recorded.preserve,
        ),
    )


def _kept_again(editor: Owner, edit: Edit, updates: Mapping[str, Update]) -> tuple[Kept, ...]:
    """What became of what the edit was to preserve, now that its updates are others."""
    if not edit.kept:
        return ()
    encoder = Encoder(editor.tokenizer, editor.parts)
    rows = encoder.prompts([one.prompt for one in edit.kept])
    says = said_behind(editor.parts, encoder, rows, [one.token for one in edit.kept])
    columns = [one.columns for one in edit.kept]
    moved = moved_of(editor.ledger, updates, edit.preserved_keys, columns)
    return tuple(
        replace(one, after=now.probability, says=now.text, moved=far)
        for one, now, far in zip(edit.kept, says, moved, strict=True)
    )


def edit_history(edit: Edit) -> History | None:
    """How what came before counted when an edit was made."""
    found = edit.provenance.history
    return "soft" if found == "soft" else "hard" if found == "hard" else None


# -- what is left of earlier edits -------------------------------------------------------------


def retention(editor: Owner) -> pd.DataFrame:
    """`Editor.retention`."""
    import pandas as pd

    active = editor.active
    with quiet(editor.model):
        found = iter(_asked(editor, [fact for edit in active for fact in edit.facts]))
    gone = replaced_by(active)
    rows = []
    for number, edit in enumerate(active):
        each = zip(edit.facts, edit.columns, edit.outcomes, strict=True)
        for fact, column, outcome in each:
            now = next(found)
            rows.append(
                {
                    "edit": number,
                    "prompt": fact.text,
                    "target": fact.target_new,
                    "then": outcome.after,
                    "now": now.probability,
                    "likeliest then": outcome.likeliest,
                    "likeliest now": now.greedy,
                    "replaced": (edit.id, column) in gone,
                }
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def drift(editor: Owner) -> pd.DataFrame:
    """`Editor.drift`."""
    import pandas as pd

    ledger, parts, active = editor.ledger, editor.parts, editor.active
    encoder = Encoder(editor.tokenizer, parts)
    gone = replaced_by(active)
    rows: list[dict[str, Any]] = []
    for number, edit in enumerate(active):
        if not isinstance(edit.method, Method):
            continue
        asked = encoder.fact_rows(edit.facts, edit.provenance.prefixes)
        with quiet(parts.model):
            now = keys_of(parts, asked, edit.layers, edit.method.key_mean)
        kept = [c for c in sorted(set(edit.columns)) if (edit.id, c) not in gone]
        for layer, name in edit.names.items():
            weight = parts.named(name)
            then, K = edit.keys[name][:, kept], column_means(now[layer], edit.columns)[:, kept]
            V = edit.targets[name][:, kept] if edit.targets else torch.empty(0, 0)
            written = V - values_of(ledger, weight, then, ()) if edit.targets else V

            def missed(K: Tensor, V: Tensor = V, weight: NamedWeight = weight) -> float:
                found = values_of(ledger, weight, K, updates_at(weight, ledger.active))
                return float((found - V).norm() / written.norm())  # noqa: B023

            rows.append(
                {
                    "edit": number,
                    "layer": layer,
                    "facts": len(kept),
                    "keys moved": float((K - then).norm() / then.norm()),
                    "missed": missed(then) if edit.targets else float("nan"),
                    "missed at keys now": missed(K) if edit.targets else float("nan"),
                }
            )
    return pd.DataFrame(rows)

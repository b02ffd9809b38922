"""The owner of an opened model: what all work on it shares, and the edits that are made with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from unified_edit.arguments import as_path, whole_number
from unified_edit.editing.budgets import check_budget, with_lam
from unified_edit.editing.consecutive import Undone, drift, retention, undo
from unified_edit.editing.edits import Edit
from unified_edit.editing.finished import finished
from unified_edit.editing.histories import NO_PAST, History, Met, check_history, past_of
from unified_edit.editing.history_files import resume, save
from unified_edit.editing.layer_loop import outcomes_of, write
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.named import Preserved, named_of
from unified_edit.editing.plans import (
    Plan,
    check_room,
    check_statistics,
    check_value_is_read,
    checked_values,
    columns_of,
    turns_of,
)
from unified_edit.editing.prefixes import Contexts, prefixes_key, sample_prefixes
from unified_edit.editing.values import Values, compute_values
from unified_edit.errors import EditFileError, MethodError, NullSpaceError
from unified_edit.facts import Conflict, Fact, SharedSubject, check_items, check_ways, settle
from unified_edit.model.anatomy import Anatomy, NamedWeight, Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.memory import Memory, memory_of
from unified_edit.model.prompts import Encoder
from unified_edit.objective import Budget
from unified_edit.statistics import KeyStatistics, statistics_for

if TYPE_CHECKING:
    import pandas as pd

#: What C0 is shrunk by where keys of new facts reach into directions that no preserved key has.
SHRINKAGE = 1e-3


class Editor:
    """An opened model: its parts, its ledger, and what was made from it and is kept in memory.

    All editors of one model share these; `unified_edit.edit` is ``Editor(model, tokenizer).edit``.
    The model is referred to weakly: keep it as long as you want to edit it.

    >>> editor = Editor(model, tokenizer, method=ue.EMMET)      # doctest: +SKIP
    >>> editor.edit([fact]); editor.active; editor.reset()      # doctest: +SKIP

    method, statistics, seed, on_shared_subject, on_conflict: used where `edit` is given none.
    history: how what the active edits wrote counts for the next one (`histories`): "soft", "hard",
        or None, not at all. The updates of all batches then add up to one solution of all pairs.
    budget: beside a "soft" history lam comes from it, not from the method (LyapLock; `budgets`).
        `Edit.provenance.spent` says what each weight has spent. Such edits are not replayed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        method: Method = EMMET,
        statistics: KeyStatistics | None = None,
        seed: int = 0,
        on_shared_subject: SharedSubject = "raise",
        on_conflict: Conflict = "raise",
        history: History | None = None,
        budget: Budget | None = None,
    ) -> None:
        check_ways(on_shared_subject, on_conflict)
        check_history(history)
        check_budget(budget, history)
        self.ledger: Ledger = ledger_of(model)
        self.memory: Memory = memory_of(model)
        self.tokenizer, self.method, self.seed = tokenizer, method, seed
        self.statistics = statistics
        self.on_shared_subject, self.on_conflict = on_shared_subject, on_conflict
        self.history: History | None = history
        self.budget = budget

    @property
    def model(self) -> PreTrainedModel:
        """The model; EditError if nobody has kept it."""
        return self.ledger.model

    @property
    def parts(self) -> Anatomy:
        """Its parts; EditError if nobody has kept it."""
        return self.ledger.parts

    @property
    def active(self) -> tuple[Edit, ...]:
        """The edits in force, in the order in which they were applied."""
        return tuple(entry for entry in self.ledger.active if isinstance(entry, Edit))

    def reset(self) -> None:
        """Take out all edits: the model is its base again, bit for bit."""
        self.ledger.activate(())

    def undo(self, edit: Edit, *, replay: bool = False) -> Undone:
        """Take an edit out, whichever came after it, and say which facts of those were lost by it.

        Later updates stay as they are, bit for bit: they were made on the model with it. With
        `replay` the pairs of keys and values that they recorded are solved for once more, as if
        the edit had not been there; no value is optimised anew. On any failure nothing changes.

        Raises EditError if it is not in force, or if later ones cannot be replayed because they
        were made without a history; ModelChangedError if something else changed a weight.
        """
        return undo(self, edit, replay)

    def retention(self) -> pd.DataFrame:
        """One row a fact of each active edit: its target's probability then and now.

        Columns: edit (number, from 0), prompt, target, then, now, likeliest then, likeliest now,
        replaced (whether a later edit has written it anew).
        """
        return retention(self)

    def drift(self) -> pd.DataFrame:
        """One row for each active edit and layer: how far its keys have moved since.

        Columns: edit, layer, facts, keys moved (norm(K_now - K_then) / norm(K_then)), missed
        (norm(W K_then - V) / norm(V - W0 K_then), W before it is rounded: zero with a hard
        history), missed at keys now (the same with K_now, which is what the model looks up).
        NaN for edits without a history, which did not record V. FineTuning has no row.
        """
        return drift(self)

    def save(self, folder: str | Path) -> None:
        """Write the active edits into a folder, for `resume` in a later process.

        A file an edit, and history.json, which is written last; files that are there already are
        kept, so it costs little after every batch. Raises EditFileError if it cannot be written.
        """
        save(self, as_path(folder, "the folder of the edits", EditFileError))

    def resume(self, folder: str | Path) -> tuple[Edit, ...]:
        """Apply the edits that `save` wrote, in order; more can follow. Returns them.

        Raises EditFileError if the folder is not whole, of another model, or of another history;
        EditError if edits are in force. The model is then as it was.
        """
        return resume(self, as_path(folder, "the folder of the edits", EditFileError))

    def prefixes(self, contexts: Contexts, seed: int | None = None) -> tuple[str, ...]:
        """The bare prompt's empty prefix and those of `contexts`, sampled from the base model.

        Sampled once for the base's weights, the tokenizer, `contexts` and `seed`, then kept.
        """
        number = whole_number(
            self.seed if seed is None else seed, "seed", MethodError, least=-(2**63), below=2**63
        )
        encoder = Encoder(self.tokenizer, self.parts)
        key = prefixes_key(self.ledger.fingerprint(), encoder.signature, contexts, number)
        found: tuple[str, ...] | None = self.memory.get(key)
        if found is None:
            with quiet(self.model), self.ledger.base_state():
                found = sample_prefixes(self.model, encoder, contexts, number)
            self.memory.put(key, found, sum(map(len, found)))
        return found

    def plan(
        self,
        facts: Iterable[Fact] | Fact,
        method: Method | None = None,
        *,
        seed: int | None = None,
        batch: bool = True,
        on_shared_subject: SharedSubject | None = None,
        on_conflict: Conflict | None = None,
        preserve: Preserved | None = None,
    ) -> Plan:
        """Check everything that can be checked before any work is done, and tokenise the facts.

        batch: whether the facts are written together. Raises what `edit` raises.
        """
        way = self.on_shared_subject if on_shared_subject is None else on_shared_subject
        conflict = self.on_conflict if on_conflict is None else on_conflict
        check_ways(way, conflict)
        whole = batch or way == "merge"
        given, notes = settle(facts, conflict) if whole else (check_items(facts), [])
        method = self.method if method is None else method
        if not isinstance(method, Method):
            raise MethodError(
                f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
            )
        parts = anatomy(self.model)  # once a call: something may have wrapped or compiled it
        resolved = with_lam(method.resolve(parts), self.budget, preserve)
        assert resolved.layers is not None
        self.ledger.verify()
        state = self.ledger.state()  # looks for NaN too, where the weights are new
        past, met = NO_PAST, Met(given, [], ())
        if batch and self.history is not None:
            past, met = past_of(
                self.active, self.memory, self.history, given, resolved, way, conflict, self.budget
            )
        items, notes = met.facts, [*notes, *met.notes]
        check_value_is_read(parts, items, resolved)
        weights = tuple(parts.weight(layer) for layer in resolved.layers)
        columns = columns_of(items, way)
        turns = turns_of(resolved, items, columns, way)
        if batch:
            for turn in turns:
                check_room(resolved, len({columns[place] for place in turn}), weights)
        encoder = Encoder(self.tokenizer, parts)
        rows = encoder.fact_rows(items, self.prefixes(resolved.contexts, seed))
        named = named_of(preserve, rows, encoder, parts.causal)
        notes += named.notes if named else ()
        return Plan(
            resolved, rows, weights, state, columns, turns, tuple(notes), way, past, met.replaces,
            named,
        )  # fmt: skip

    def edit(
        self,
        facts: Iterable[Fact] | Fact,
        method: Method | None = None,
        *,
        statistics: KeyStatistics | None = None,
        values: Values | None = None,
        seed: int | None = None,
        apply: bool = True,
        on_shared_subject: SharedSubject | None = None,
        on_conflict: Conflict | None = None,
        preserve: Preserved | None = None,
    ) -> Edit:
        """`unified_edit.edit` on this model."""
        with quiet(self.model):
            plan = self.plan(
                facts,
                method,
                seed=seed,
                on_shared_subject=on_shared_subject,
                on_conflict=on_conflict,
                preserve=preserve,
            )
            parts = self.parts
            if values is not None:
                values = checked_values(values, plan)
            given = self.statistics if statistics is None else statistics
            if given is not None:
                check_statistics(given, self.ledger, plan.weights)
            for weight in plan.weights:
                self.ledger.probe(weight, plan.method.site(parts, weight.layer))
            # last, because it may take hours
            statistics = self.statistics_for(plan.weights) if given is None else given
            before = likelihoods(parts, plan.rows.bare)
            try:
                made = write(parts, self.ledger, plan, statistics, values)
            except NullSpaceError as problem:
                if statistics.source.shrinkage:
                    raise
                statistics = self.shrunk(statistics)
                made = write(parts, self.ledger, plan, statistics, values)
                made.warnings.insert(0, f"{problem}. C0 was shrunk by {SHRINKAGE:g} for this edit")
            outcomes = outcomes_of(plan, made, before)
            number = int(self.seed if seed is None else seed)
            edit = finished(self.ledger, plan, made, outcomes, statistics, number)
            if apply:
                edit.apply()
            return edit

    def optimise_values(
        self,
        facts: Iterable[Fact] | Fact,
        method: Method | None = None,
        *,
        seed: int | None = None,
        on_shared_subject: SharedSubject | None = None,
    ) -> Values:
        """`unified_edit.optimise_values` on this model."""
        with quiet(self.model):
            plan = self.plan(
                facts, method, seed=seed, batch=False, on_shared_subject=on_shared_subject
            )
            return compute_values(self.parts, plan.rows, plan.method, plan.conditions, plan.columns)

    def statistics_for(self, weights: Sequence[NamedWeight]) -> KeyStatistics:
        """Those of the editor, or else of the cache, or collected; of these weights' layers."""
        found = self.statistics
        if found is None:
            layers = [weight.layer for weight in weights]
            found = statistics_for(self.model, self.tokenizer, layers)
        check_statistics(found, self.ledger, weights)
        return found

    def shrunk(self, statistics: KeyStatistics) -> KeyStatistics:
        """The statistics with C0 made invertible everywhere; kept, as its factors are costly."""
        key = ("shrunk", statistics.source, statistics.layers, SHRINKAGE)
        found: KeyStatistics | None = self.memory.get(key)
        if found is None:
            found = statistics.shrunk(SHRINKAGE)
            widths = [statistics.width(layer) for layer in statistics.layers]
            self.memory.put(key, found, sum(8 * width**2 for width in widths))
        return found

"""The owner of an opened model: what all work on it shares, and the edits that are made with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict

from transformers import PreTrainedModel

from unified_edit.arguments import whole_number
from unified_edit.editing.edits import Edit
from unified_edit.editing.layer_loop import (
    Written,
    keys_by_column,
    lost_again,
    not_taken,
    outcomes_of,
    write,
)
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.plans import (
    Plan,
    check_room,
    check_statistics,
    check_value_is_read,
    checked_values,
    columns_of,
    turns_of,
)
from unified_edit.editing.prefixes import Contexts, sample_prefixes
from unified_edit.editing.provenance import Outcome, merged, provenance_of
from unified_edit.editing.values import Values, compute_values
from unified_edit.errors import MethodError, NullSpaceError
from unified_edit.facts import Conflict, Fact, SharedSubject, check_items, check_ways, settle
from unified_edit.model.anatomy import Anatomy, Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.likelihoods import likelihoods
from unified_edit.model.memory import Memory, memory_of
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics, statistics_for

log = logging.getLogger(__name__)

#: What C0 is shrunk by where keys of new facts reach into directions that no preserved key has.
SHRINKAGE = 1e-3


class Editor:
    """An opened model: its parts, its ledger, and what was made from it and is kept in memory.

    All editors of one model share these; `unified_edit.edit` is ``Editor(model, tokenizer).edit``.
    The model is referred to weakly: keep it as long as you want to edit it.

    >>> editor = Editor(model, tokenizer, method=ue.EMMET)      # doctest: +SKIP
    >>> editor.edit([fact]); editor.active; editor.reset()      # doctest: +SKIP

    method, statistics, seed, on_shared_subject, on_conflict: used where `edit` is given none.
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
    ) -> None:
        check_ways(on_shared_subject, on_conflict)
        self.ledger: Ledger = ledger_of(model)
        self.memory: Memory = memory_of(model)
        self.tokenizer, self.method, self.seed = tokenizer, method, seed
        self.statistics = statistics
        self.on_shared_subject, self.on_conflict = on_shared_subject, on_conflict

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

    def prefixes(self, contexts: Contexts, seed: int | None = None) -> tuple[str, ...]:
        """The bare prompt's empty prefix and those of `contexts`, sampled from the base model.

        Sampled once for the base's weights, the tokenizer, `contexts` and `seed`, then kept.
        """
        number = whole_number(
            self.seed if seed is None else seed, "seed", MethodError, least=-(2**63), below=2**63
        )
        encoder = Encoder(self.tokenizer, self.parts)
        key = ("prefixes", self.ledger.fingerprint(), encoder.signature, contexts, number)
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
    ) -> Plan:
        """Check everything that can be checked before any work is done, and tokenise the facts.

        batch: whether the facts are written together. Raises what `edit` raises.
        """
        way = self.on_shared_subject if on_shared_subject is None else on_shared_subject
        conflict = self.on_conflict if on_conflict is None else on_conflict
        check_ways(way, conflict)
        whole = batch or way == "merge"
        items, notes = settle(facts, conflict) if whole else (check_items(facts), [])
        method = self.method if method is None else method
        if not isinstance(method, Method):
            raise MethodError(
                f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
            )
        parts = anatomy(self.model)  # once a call: something may have wrapped or compiled it
        resolved = method.resolve(parts)
        assert resolved.layers is not None
        self.ledger.verify()
        state = self.ledger.state()  # looks for NaN too, where the weights are new
        check_value_is_read(parts, items, resolved)
        weights = tuple(parts.weight(layer) for layer in resolved.layers)
        columns = columns_of(items, way)
        turns = turns_of(resolved, items, columns, way)
        if batch:
            for turn in turns:
                check_room(resolved, len({columns[place] for place in turn}), weights)
        encoder = Encoder(self.tokenizer, parts)
        rows = encoder.fact_rows(items, self.prefixes(resolved.contexts, seed))
        return Plan(resolved, rows, weights, state, columns, turns, tuple(notes), way)

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
    ) -> Edit:
        """`unified_edit.edit` on this model."""
        with quiet(self.model):
            plan = self.plan(
                facts,
                method,
                seed=seed,
                on_shared_subject=on_shared_subject,
                on_conflict=on_conflict,
            )
            parts = self.parts
            if values is not None:
                values = checked_values(values, plan)
            statistics = self.statistics if statistics is None else statistics
            if statistics is not None:
                check_statistics(statistics, self.ledger, plan.weights)
            for weight in plan.weights:
                self.ledger.probe(weight, plan.method.site(parts, weight.layer))
            if statistics is None:  # last, because it may take hours
                statistics = statistics_for(self.model, self.tokenizer, plan.layers)
                check_statistics(statistics, self.ledger, plan.weights)
            before = likelihoods(parts, plan.rows.bare)
            try:
                made = write(parts, self.ledger, plan, statistics, values)
            except NullSpaceError as problem:
                if statistics.source.shrinkage:
                    raise
                statistics = self._shrunk(statistics)
                made = write(parts, self.ledger, plan, statistics, values)
                made.warnings.insert(0, f"{problem}. C0 was shrunk by {SHRINKAGE:g} for this edit")
            outcomes = outcomes_of(plan, made, before)
            edit = self._finish(plan, made, outcomes, statistics, seed)
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

    def _shrunk(self, statistics: KeyStatistics) -> KeyStatistics:
        """The statistics with C0 made invertible everywhere; kept, as it costs a factor."""
        key = ("shrunk", statistics.source, statistics.layers, SHRINKAGE)
        found: KeyStatistics | None = self.memory.get(key)
        if found is None:
            found = statistics.shrunk(SHRINKAGE).factored()
            self.memory.put(key, found, found.nbytes)
        return found

    def _finish(
        self,
        plan: Plan,
        made: Written,
        outcomes: tuple[Outcome, ...],
        statistics: KeyStatistics,
        seed: int | None,
    ) -> Edit:
        """The edit with its record."""
        updates = {name: merged(each) for name, each in made.updates.items()}
        lost = lost_again(plan, made)
        warnings = [*plan.notes, *made.warnings, *lost, *not_taken(plan.facts, outcomes)]
        for warning in warnings:
            log.warning("%s", warning)
        return Edit(
            facts=plan.facts,
            method=plan.method,
            updates=updates,
            keys=keys_by_column(plan, made),
            columns=plan.columns,
            outcomes=outcomes,
            provenance=provenance_of(
                self.ledger,
                plan.weights,
                updates,
                state=plan.state,
                seed=int(self.seed if seed is None else seed),
                prefixes=plan.rows.prefixes,
                statistics=asdict(statistics.source),
                on_shared_subject=plan.on_shared_subject,
            ),
            warnings=tuple(warnings),
        ).bound_to(self.model)


def edit(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    method: Method = EMMET,
    *,
    statistics: KeyStatistics | None = None,
    values: Values | None = None,
    seed: int = 0,
    apply: bool = True,
    on_shared_subject: SharedSubject = "raise",
    on_conflict: Conflict = "raise",
) -> Edit:
    """Write facts into the model; return the `Edit`, which can be undone, saved and exported.

    model, tokenizer: from `load_model`, or any causal language model of a known family with its
        fast tokenizer. Edits already active stay: the new one is computed on the model as it is.
    facts: at least one; identical ones are merged.
    method: ROME, EMMET, MEMIT, or one of your own (`Method`).
    statistics: C0 of the method's layers; without it they are looked up in the cache, or
        collected from the model's default corpus and kept. Where the keys of the facts reach into
        directions that no preserved key has, C0 is shrunk, and the edit says so.
    values: targets from `optimise_values` for the same method, seed and state of the model;
        optimised here if not given. Not for facts that are written in several turns.
    seed: of the sampled prefixes.
    apply: with False the model stays as it was; look at the edit, then ``edit.apply()``.
    on_shared_subject: "raise": an equality refuses facts about one subject, whose keys are nearly
        the same, and with a ridge the edit warns of them. "merge": one value for all facts of a
        subject, written at the mean of their keys (MEMIT-Merge, arXiv 2502.07322). "split": as few
        batches as are needed to have no subject twice in one, each with values found on the model
        edited so far, as one edit; facts that a later batch destroys are named in a warning.
    on_conflict: of facts with the same prompt and subject and different targets: "raise", or the
        "last" one wins, which the edit says.

    Facts whose target is not the likeliest continuation of their prompt afterwards are counted in
    a warning; `Edit.table` shows the probability of each before and after.

    Raises FactError (ContradictionError, SharedSubjectError, TokenizationError) for facts that
    cannot be edited together, MethodError, ModelError, StatisticsError, InfeasibleError, EditError
    for what their names say. On any failure every weight, flag and hook is as it was.
    """
    editor = Editor(
        model, tokenizer, seed=seed, on_shared_subject=on_shared_subject, on_conflict=on_conflict
    )
    return editor.edit(facts, method, statistics=statistics, values=values, apply=apply)


def optimise_values(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Iterable[Fact] | Fact,
    method: Method = EMMET,
    *,
    seed: int = 0,
    on_shared_subject: SharedSubject = "raise",
) -> Values:
    """The values v* of facts on the model as it is: the slow part of `edit`, to be reused.

    Values do not depend on the other facts of a batch, so those of many facts can be optimised
    once and then edited singly, in batches, or by other methods with the same site, layer and
    contexts. With `on_shared_subject` "merge" the facts of a subject have one value, which serves
    them all together and no other selection of them. Raises what `edit` raises.
    """
    return Editor(model, tokenizer, seed=seed).optimise_values(
        facts, method, on_shared_subject=on_shared_subject
    )

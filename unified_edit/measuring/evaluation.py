"""Measuring what edits did to a model, on records.

Definitions of the scores are in `unified_edit.measuring.scores`, of probabilities in
`unified_edit.model.likelihoods`. Everything here leaves the model bit for bit as it was found, also
when it fails, and runs in evaluation mode without gradients.

Records are taken in groups of `GROUP`, whether there are ten or ten thousand, so that what a record
is asked together with does not depend on where an interrupted run went on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from unified_edit.arguments import is_flag, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.edits import Edit
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.named import Preserve, Preserved, as_preserve, meeting_facts
from unified_edit.editing.plans import check_subjects
from unified_edit.editing.values import Values
from unified_edit.editing.values_cache import values_for
from unified_edit.errors import MethodError, brief
from unified_edit.facts import Conflict, Fact, Record, SharedSubject, check_batch, check_ways
from unified_edit.measuring.answer_lines import AnswerLines
from unified_edit.measuring.answering import Asking
from unified_edit.measuring.generation import Generation
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.record_source import GROUP, RecordSource
from unified_edit.measuring.report import Report
from unified_edit.measuring.scores import AFTER, BEFORE, check_bootstrap
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import Ledger, ledger_of
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics, statistics_for

log = logging.getLogger(__name__)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Iterable[Record] | Record,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    to: str | os.PathLike[str] | None = None,
    known_only: bool = False,
    generate: bool | Generation = False,
) -> Report:
    """Measure how well the facts of `records` were written into `model`, and what else changed.

    There is always a "before": the base model, all active edits taken out and put back bit for
    bit. If any edit is active, "after" is the model as it is. See `Report` for the table and
    `unified_edit.measuring.scores` for the scores.

    A record whose fact has no `target_true` has nothing to be compared with: its rewrite prompt
    and paraphrases count in GS, and are missing in ES, PS, EM and PM.

    records: a list, or any other iterable, which is taken a group at a time: thousands of records
        need not be in memory at once.
    bootstrap, seed: resamples for the intervals (at least 100), and their seed.
    to: a file, to which the answers are written as they come, a JSON line for each record and
        state. The same call goes on where it was interrupted; `Report.read` reads it at any time.
    known_only: leave out records whose true object the base model does not find more probable than
        the new one at the rewrite prompt, and those without a true object; the report counts them.
    generate: measure fluency too, the score GE: True, or a `Generation` with settings of its own.
        It costs a hundred forwards for each of a record's generation prompts.

    Raises FactError for no records, none left, or probes named like a score or a kind of prompt,
    TokenizationError for prompts whose target cannot be located, MethodError, ModelError, and
    ReportFileError for a file of something else.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    texts = Generation.wanted(generate, seed)
    source = RecordSource(model, tokenizer, records)
    ledger = ledger_of(model)
    states = [BEFORE, AFTER] if ledger.active else [BEFORE]
    made_from = _made_from(states, seed, known_only, texts)
    if to is not None:
        made_from |= _origin(source, ledger, edits=[edit.id for edit in ledger.active])
    with AnswerLines(made_from, bootstrap=bootstrap, to=to) as lines, quiet(model):
        total = source.total and len(states) * source.total
        with progress("evaluating", total, "target") as bar:
            asking = Asking(lines, known_only, bar, tokenizer, texts)
            for sheet in source.sheets():
                with ledger.base_state():
                    asking.ask(sheet, BEFORE)
                if ledger.active:
                    asking.ask(sheet, AFTER)
        return asking.report(source.count, bootstrap)


def evaluate_edits(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Iterable[Record] | Record,
    method: Method = EMMET,
    *,
    batch_size: int = 1,
    statistics: KeyStatistics | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
    to: str | os.PathLike[str] | None = None,
    known_only: bool = False,
    on_shared_subject: SharedSubject = "raise",
    on_conflict: Conflict = "raise",
    generate: bool | Generation = False,
    preserve: Preserved | None = None,
    each: Callable[[Edit], object] | None = None,
) -> Report:
    """Edit `batch_size` records at a time into the base model, measure each batch, undo it.

    This is the experiment of the papers: with batch_size 1 every record is edited into a fresh
    model. "before" is the base model; "after", for each record, the model with its batch. Edits
    active when it is called are taken out meanwhile and put back bit for bit, also on failure.

    Batches are consecutive records, the last may be smaller. Where the values do not depend on
    the batch, they are optimised for a group of records at once. A batch whose targets the model
    says already in every context needs no edit and is measured as it is.

    statistics: as in `edit`. seed: of the sampled prefixes and of the bootstrap.
    to, known_only: as in `evaluate`; batches are made of the records that are left. What is written
        to a file can be gone on with after hours, so values are kept on disk too then, as
        `unified_edit.editing.values_for` does.
    on_shared_subject, on_conflict: as in `edit`, for each batch. generate: as in `evaluate`.
    preserve: as in `edit`, for each batch: a fact of which the subject is edited in any batch of a
        list is refused before the work begins.
    each: called with every edit that is made, before it is measured. A batch whose answers are in
        the file already is not made again; one that was interrupted is, and is the same edit.

    Raises what `edit` and `evaluate` raise; contradictions and shared subjects within any batch of
    a list are found before the work begins, unless `known_only` decides what a batch is.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    size = whole_number(batch_size, "batch_size", MethodError, least=1)
    if not isinstance(method, Method):
        raise MethodError(
            f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
        )
    check_ways(on_shared_subject, on_conflict)
    given = {"on_shared_subject": on_shared_subject, "on_conflict": on_conflict}
    # one fact shares nothing and contradicts nothing
    ways = {name: way for name, way in given.items() if size > 1 and way != "raise"}
    texts, kept = Generation.wanted(generate, seed), as_preserve(preserve)
    source = RecordSource(model, tokenizer, records)
    editor = Editor(model, tokenizer, seed=seed)
    resolved = method.resolve(editor.parts)
    if source.given is not None and not known_only:
        for start in range(0, len(source.given), size):
            _facts_of(resolved, source.given[start : start + size], ways)
        if kept is not None:
            meeting_facts(kept, [record.fact for record in source.given])
    made_from = _made_from([BEFORE, AFTER], seed, known_only, texts)
    if to is not None:
        made_from |= _origin(
            source,
            editor.ledger,
            method=resolved.to_dict(),
            batch_size=size,
            **given,
            statistics=repr(getattr(statistics, "source", statistics)),
            **({} if kept is None else {"preserve": repr(kept)}),
        )
    with (
        AnswerLines(made_from, bootstrap=bootstrap, to=to) as lines,
        quiet(model),
        editor.ledger.base_state(),
    ):
        if statistics is None:
            statistics = statistics_for(model, tokenizer, resolved.layers or ())
        total = source.total and 2 * source.total
        with progress("editing and evaluating", total, "target") as bar:
            asking = Asking(lines, known_only, bar, tokenizer, texts)
            together = not ways and (size == 1 or not resolved.sequential)
            editing = _Editing(
                editor, resolved, statistics, ways, together, to is not None, asking, each, kept
            )
            waiting: list[tuple[int, Record]] = []
            for sheet in source.sheets():
                waiting += asking.ask(sheet, BEFORE)
                ready = len(waiting) // size * size
                editing.batches([waiting[i : i + size] for i in range(0, ready, size)])
                del waiting[:ready]
            editing.batches([waiting] if waiting else [])
        return asking.report(source.count, bootstrap)


def _made_from(
    states: Sequence[str], seed: int, known_only: object, texts: Generation | None
) -> dict[str, Any]:
    """What a report says of itself."""
    if not is_flag(known_only):
        raise MethodError(f"known_only is {brief(known_only)}; it must be True or False")
    return {
        "states": list(states),
        "seed": seed,
        "known_only": bool(known_only),
        "generate": None if texts is None else asdict(texts),
    }


def _origin(source: RecordSource, ledger: Ledger, **more: Any) -> dict[str, Any]:
    """Everything else that answers depend on: by it a file is known again."""
    return {
        "library": version("unified_edit"),
        "model": ledger.parts.name,
        "fingerprint": ledger.fingerprint(wholly=True),
        "tokenizer": Encoder(source.tokenizer, ledger.parts).signature,
        "records": source.digest,
        **more,
    }


@dataclass
class _Editing:
    """Edits batches into the base, has them measured, and takes them out again."""

    editor: Editor
    method: Method
    statistics: KeyStatistics
    ways: Mapping[str, Any]
    together: bool  # whether values do not depend on the other facts of their batch
    on_disk: bool
    asking: Asking
    each: Callable[[Edit], object] | None = None
    preserve: Preserve | None = None

    def batches(self, batches: Sequence[Sequence[tuple[int, Record]]]) -> None:
        """Edit and measure some batches, whose values are optimised together where they can be."""
        lines, editor = self.asking.lines, self.editor
        facts = [_facts_of(self.method, [r for _, r in batch], self.ways) for batch in batches]
        sheets = [
            Sheet.of(editor.model, editor.tokenizer, [r for _, r in b], [n for n, _ in b])
            for b in batches
        ]
        todo = [any(not lines.has(number, AFTER) for number, _ in batch) for batch in batches]
        values = self._values([f for new in facts for f in new]) if any(todo) else None
        for sheet, new, needed in zip(sheets, facts, todo, strict=True):
            if not needed:
                self.asking.ask(sheet, AFTER)
            elif values is not None and not values.of(new).delta.any():
                log.info("%s needs no edit: the model says it already", new[0])
                self.asking.ask(sheet, AFTER)
            else:
                made = editor.edit(
                    new,
                    self.method,
                    statistics=self.statistics,
                    values=values,
                    apply=False,
                    preserve=self.preserve,
                    **self.ways,
                )
                if self.each is not None:
                    self.each(made)
                with made.applied():
                    self.asking.ask(sheet, AFTER)

    def _values(self, facts: list[Fact]) -> Values | None:
        """The values of the facts of some batches; None if each batch makes its own."""
        if not self.together:
            return None
        some = [facts[start : start + GROUP] for start in range(0, len(facts), GROUP)]
        if not self.on_disk:
            return Values.joined([self.editor.optimise_values(f, self.method) for f in some])
        model, tokenizer, seed = self.editor.model, self.editor.tokenizer, self.editor.seed
        return Values.joined(
            [values_for(model, tokenizer, f, self.method, seed=seed) for f in some]
        )


def _facts_of(method: Method, records: Sequence[Record], ways: Mapping[str, Any]) -> list[Fact]:
    """The facts of one batch; raises early what `edit` would raise after hours of work."""
    facts = [record.fact for record in records]
    settled = check_batch(facts, ways.get("on_conflict", "raise"))
    if not method.sequential and "on_shared_subject" not in ways:
        check_subjects(method, settled)
    return facts if ways else settled  # `edit` says itself what was overruled

"""Asking a model, and measuring what edits did to it.

Definitions of the scores are in `unified_edit.measuring.scores`, of probabilities in
`unified_edit.model.likelihoods`. Everything here leaves the model bit for bit as it was found, also
when it fails, and runs in evaluation mode without gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.edits import Edit
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.plans import check_subjects
from unified_edit.errors import EditError, FactError, MethodError, brief
from unified_edit.facts import Fact, Record, check_batch
from unified_edit.facts.facts import clean_text
from unified_edit.measuring.questions import Sheet, to_table
from unified_edit.measuring.report import Report
from unified_edit.measuring.scores import AFTER, BEFORE, check_bootstrap
from unified_edit.model.anatomy import Tokenizer, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of
from unified_edit.model.likelihoods import likelihoods, next_token
from unified_edit.model.progress import progress
from unified_edit.model.prompts import Encoder
from unified_edit.statistics import KeyStatistics, statistics_for

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def ask(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: str | Sequence[str], k: int = 5
) -> pd.DataFrame:
    """The `k` most probable next tokens after each prompt, by the model as it is.

    Columns: prompt, rank (from 1), token (its text, with the blank in front that belongs to it),
    probability. Outer whitespace of a prompt is dropped: a blank at its end would be a token of
    its own, after which the model expects something else.

    Raises FactError for no or empty prompts, MethodError for k < 1, and what `anatomy` raises.
    """
    import pandas as pd

    number = whole_number(k, "k", MethodError, least=1, advice="Ask for at least one token")
    parts = anatomy(model)
    texts = _texts(prompts, "prompts")
    rows = Encoder(tokenizer, parts).prompts(texts)
    lines = []
    for text, distribution in zip(texts, next_token(parts, rows), strict=True):
        top = distribution.topk(min(number, len(distribution)))
        for place, (value, token) in enumerate(zip(*map(list, top), strict=True)):
            lines.append((text, place + 1, tokenizer.decode([int(token)]), float(value)))
    return pd.DataFrame(lines, columns=["prompt", "rank", "token", "probability"])


def compare(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    targets: str | Sequence[str],
    edits: Edit | Sequence[Edit] | None = None,
) -> pd.DataFrame:
    """Probabilities of each target after each prompt, before and after editing.

    One row a (prompt, target); columns prompt, target, tokens (how many the target has), before
    and after. Both are P = exp(mean token log-probability), the geometric mean of the
    probabilities of the target's tokens, so that targets of different length can be compared;
    for a target of one token it is its probability. "before" is the base model, without any
    edit. "after" is the model as it is, or, with `edits`, the base with exactly those, whether
    they are applied at the moment or not.

    Raises FactError for no or empty prompts or targets, TokenizationError, and what
    `Edit.apply` raises.
    """
    import pandas as pd

    parts, ledger = anatomy(model), ledger_of(model)
    given = [] if edits is None else as_list(edits)
    if not all(isinstance(one, Edit) for one in given):
        raise EditError(f"edits is {brief(edits)}; give an Edit or a list of them, or nothing")
    pairs = [
        (prompt, target)
        for prompt in _texts(prompts, "prompts")
        for target in _texts(targets, "targets")
    ]
    asked = Encoder(tokenizer, parts).continuations(pairs)
    with quiet(model):
        with ledger.base_state():
            before = likelihoods(parts, asked)
        with ledger.state_kept():
            if edits is not None:
                ledger.activate(())
                for one in given:
                    one.apply(model)
            after = likelihoods(parts, asked) if ledger.active else before
    return pd.DataFrame(
        {
            "prompt": prompt,
            "target": target,
            "tokens": len(row.target),
            BEFORE: old.probability,
            AFTER: new.probability,
        }
        for (prompt, target), row, old, new in zip(pairs, asked, before, after, strict=True)
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record] | Record,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Report:
    """Measure how well the facts of `records` were written into `model`, and what else changed.

    There is always a "before": the base model, all active edits taken out and put back bit for
    bit. If any edit is active, "after" is the model as it is. See `Report` for the table and
    `unified_edit.measuring.scores` for the scores.

    A record whose fact has no `target_true` has nothing to be compared with: its rewrite prompt
    and paraphrases count in GS, and are missing in ES, PS, EM and PM.

    bootstrap, seed: resamples for the intervals (at least 100), and their seed.

    Raises FactError for no records, or probes named like a score or a kind of prompt,
    TokenizationError for prompts whose target cannot be located, MethodError, ModelError.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    sheet = Sheet.of(model, tokenizer, records)
    ledger = ledger_of(model)
    everything = range(len(sheet.records))
    states = 1 + bool(ledger.active)
    with quiet(model), progress("evaluating", states * len(sheet.asked), "target") as bar:
        with ledger.base_state():
            rows = sheet.rows(BEFORE, everything, bar)
        if ledger.active:
            rows += sheet.rows(AFTER, everything, bar)
    return Report(to_table(rows), bootstrap, seed)


def evaluate_edits(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record] | Record,
    method: Method = EMMET,
    *,
    batch_size: int = 1,
    statistics: KeyStatistics | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
) -> Report:
    """Edit `batch_size` records at a time into the base model, measure each batch, undo it.

    This is the experiment of the papers: with batch_size 1 every record is edited into a fresh
    model. "before" is the base model; "after", for each record, the model with its batch. Edits
    active when it is called are taken out meanwhile and put back bit for bit, also on failure.

    Batches are consecutive records, the last may be smaller. Where the values do not depend on
    the batch, they are optimised once for all facts. A batch whose targets the model says
    already in every context needs no edit and is measured as it is.

    statistics: as in `edit`. seed: of the sampled prefixes and of the bootstrap.

    Raises what `edit` and `evaluate` raise; contradictions and shared subjects within any batch
    are found before the work begins.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    size = whole_number(batch_size, "batch_size", MethodError, least=1)
    if not isinstance(method, Method):
        raise MethodError(
            f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
        )
    sheet = Sheet.of(model, tokenizer, records)
    editor = Editor(model, tokenizer, seed=seed)
    resolved = method.resolve(sheet.parts)
    everything = range(len(sheet.records))
    batches = [everything[start : start + size] for start in everything[::size]]
    facts = [_facts_of(resolved, [sheet.records[i] for i in batch]) for batch in batches]
    with quiet(model), editor.ledger.base_state():
        if statistics is None:
            statistics = statistics_for(model, tokenizer, resolved.layers or ())
        with progress("evaluating the base", len(sheet.asked), "target") as bar:
            rows = sheet.rows(BEFORE, everything, bar)
        values = None
        if size == 1 or not resolved.sequential:
            values = editor.optimise_values([fact for batch in facts for fact in batch], resolved)
        with progress("editing and evaluating", len(batches), "batch") as bar:
            for batch, new in zip(batches, facts, strict=True):
                if values is not None and not values.of(new).delta.any():
                    log.info("%s needs no edit: the model says it already", new[0])
                    rows += sheet.rows(AFTER, batch)
                else:
                    made = editor.edit(
                        new, resolved, statistics=statistics, values=values, apply=False
                    )
                    with made.applied():
                        rows += sheet.rows(AFTER, batch)
                bar.update()
    return Report(to_table(rows), bootstrap, seed)


def _facts_of(method: Method, records: Sequence[Record]) -> list[Fact]:
    """The facts of one batch; raises early what `edit` would raise after hours of work."""
    facts = [record.fact for record in records]
    if method.sequential:
        return facts
    facts = check_batch(facts)
    check_subjects(method, facts)
    return facts


def _texts(given: str | Sequence[str], name: str) -> list[str]:
    texts = as_list(given)
    if not texts:
        raise FactError(f"{name} is empty: give at least one text.")
    return [clean_text(text, f"{name}[{index}]") for index, text in enumerate(texts)]

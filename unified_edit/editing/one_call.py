"""The two doors that open a model for one call: `edit` and `optimise_values`."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from unified_edit.editing.editor import Editor
from unified_edit.editing.edits import Edit
from unified_edit.editing.histories import History
from unified_edit.editing.methods import EMMET, Method
from unified_edit.editing.named import Preserved
from unified_edit.editing.values import Values
from unified_edit.facts import Conflict, Fact, SharedSubject
from unified_edit.model.anatomy import Tokenizer
from unified_edit.objective import Budget
from unified_edit.statistics import KeyStatistics


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
    history: History | None = None,
    budget: Budget | None = None,
    preserve: Preserved | None = None,
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
    history: whether the edits already active count for this one: None, as keys like all others;
        "soft": what it does to their keys costs as much as what it misses of its own facts, which
        needs a ridge; "hard": it may not change what they gave. Their facts are then held against
        the new ones by the two rules above. See `Editor`.
    budget: beside history="soft", lets lam rise while earlier batches cost more than it allows.
    preserve: facts and prompts whose values are to stay as they are, exactly; or `Preserve` of
        them with a weight. Their keys are read at each edited layer as those of the facts are; for
        this edit alone, later ones are to name them again. `Edit.preserved` says how far each
        moved.

    Facts whose target is not the likeliest continuation of their prompt afterwards are counted in
    a warning; `Edit.table` shows the probability of each before and after.

    Raises FactError (ContradictionError, SharedSubjectError, TokenizationError) for facts that
    cannot be edited together, MethodError, ModelError, StatisticsError, InfeasibleError, EditError
    for what their names say. On any failure every weight, flag and hook is as it was.
    """
    editor = Editor(
        model, tokenizer, seed=seed, on_shared_subject=on_shared_subject,
        on_conflict=on_conflict, history=history, budget=budget,
    )  # fmt: skip
    return editor.edit(
        facts, method, statistics=statistics, values=values, apply=apply, preserve=preserve
    )


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

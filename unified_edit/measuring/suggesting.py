"""Which layer to edit, and how far: a small sweep on facts that are never scored afterwards.

Settings are published for a few models. For any other there is no formula: a causal trace says
where a fact is read, which is not the same as where it is best written (Hase et al. 2023, arXiv
2301.04213; in SmolLM2 the trace points at layers 0-2). So some facts are edited, one at a time, at
several layers and with several clamps, and asked about; the trace may narrow where.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, real_number, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.methods import EMMET, Method
from unified_edit.errors import EditError, MethodError, ObjectiveError
from unified_edit.facts import Fact, Record
from unified_edit.measuring.questions import Sheet, check_records
from unified_edit.measuring.report import to_table
from unified_edit.measuring.scores import AFTER, BEFORE, harmonic_mean, summarise
from unified_edit.measuring.sweep_files import SweepFile, description
from unified_edit.measuring.sweep_order import (
    COARSE,
    FINALISTS,
    Combination,
    Row,
    candidates_of,
    order,
    ranked,
    total_of,
)
from unified_edit.measuring.traces import Trace
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.progress import progress
from unified_edit.statistics import KeyStatistics, statistics_for

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

CLAMPS = (0.75, 2.0, 4.0)

_THREE = ("ES", "PS", "NS")
_COLUMNS = (
    "layer", "clamp", *_THREE, "S", "score", "GS", "size", "clamped", "seconds", "problem",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What `suggest_layers` found.

    table: one row a combination that was tried, a pandas table with the columns
        layer: the layer, or the tuple of layers; clamp.
        ES, PS, NS, S, GS: as in `unified_edit.measuring.scores`; NaN where no prompt is asked.
        score: what counts, the harmonic mean of those of ES, PS and NS that are there (S, if all
            are), or GS if none is.
        size: mean over facts of ||Delta|| / ||W|| (Frobenius, over all edited layers).
        clamped: share of the facts whose value stands at the clamp.
        seconds: what it took. problem: why there are no scores, or "".
    method: the method with layers and clamp of the best row: the highest score; of equal ones the
        smallest size.
    used: the facts or records it was chosen on: leave them out of everything that is scored.
    by: the scores that count, as "ES, PS, NS".
    before: the scores of the unedited model.
    complete: whether the sweep came to its end within the budget.
    """

    table: pd.DataFrame
    method: Method
    used: tuple[Record | Fact, ...]
    by: str
    before: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True

    @property
    def best(self) -> pd.Series:
        """The row of the table that `method` is made of."""
        return self.table.loc[ranked(self.table.to_dict("records"))[0]]

    def __repr__(self) -> str:
        end = "" if self.complete else ", stopped by its budget"
        return (
            f"<Suggestion for {self.method.name}: layers {self.method.layers}, clamp "
            f"{self.method.clamp:g}, of {len(self.table)} combinations on {len(self.used)} facts"
            f"{end}>"
        )


def suggest_layers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record | Fact] | Record | Fact,
    *,
    method: Method = EMMET,
    layers: Sequence[int | Sequence[int]] | None = None,
    clamps: Sequence[float] = CLAMPS,
    trace: Trace | None = None,
    count: int = 8,
    statistics: KeyStatistics | None = None,
    budget_s: float | None = None,
    to: str | Path | None = None,
    seed: int = 0,
) -> Suggestion:
    """Try layers and clamps on some facts, and suggest the best: a `Method` and the table behind.

    Each fact is edited by itself into the base model, asked about, and undone; edits active before
    are put back bit for bit. **The facts that a setting was chosen on must not be scored with it**:
    `Suggestion.used` says which they were.

    records: facts with the prompts to ask. A bare `Fact` has neither paraphrases nor neighbours:
        then ES alone decides, which says nothing of what an edit breaks, and a warning says so.
    count: so many of them are used, drawn with `seed` (all, if there are no more).
    method: all its other settings; a method with a ridge of None needs one. ROME, EMMET and
        MEMIT need not agree: a sweep is for one method.
    layers: those to try, each alone; for a method that spreads over several, tuples of them:
        ``[(1, 2, 3), (2, 3, 4)]``. All are tried with all `clamps`. None: about ten from layer 0 to
        two thirds of the depth with the first clamp, then those around the best of them, then the
        two best with the other clamps. Layer 0 is always among them: published settings begin
        later because published models are larger. In SmolLM2 a trace points at layers 0-2 and the
        best layer to write at is looked for there and beyond.
    trace: a `unified_edit.locate` of the kind "mlp": it narrows `layers` to those where restoring
        the MLP at the last subject token gives back at least half of the largest effect, and as
        many on either side as its window reaches (one at least). It never decides.
    statistics: C0 of all the layers that may be tried; without it, from the cache, or collected in
        one pass. A model with long keys has much of it (d_k^2 * 8 bytes a layer): give few layers.
    budget_s: seconds after which no other combination is begun; at least one is tried. Combinations
        come in an order in which stopping early is of use: coarse layers, then near ones, then
        clamps, best layer first.
    to: a file of JSON lines, in which each row stands as soon as it is known. With a file that is
        there already the sweep goes on; one that was made with other facts, another model, method,
        seed or statistics is refused. Other layers and clamps may be added to it.
    seed: of the draw, and of the sampled prefixes.

    A combination that cannot be solved has no score and says why in its row.

    Raises FactError for no facts, MethodError for what does not fit (layers, clamps, a trace
    without MLPs, a file of another sweep) or if every combination failed, and what `edit` raises.
    """
    began = time.monotonic()
    number = whole_number(seed, "seed", MethodError, least=0)
    budget = math.inf if budget_s is None else real_number(budget_s, "budget_s", MethodError)
    if not isinstance(method, Method):
        raise MethodError(
            f"method is a {type(method).__name__}; give a Method such as unified_edit.EMMET"
        )
    tried = tuple(real_number(one, "a clamp", MethodError, above=0) for one in as_list(clamps))
    if not tried:
        raise MethodError("clamps is empty; give at least one, or leave it out")
    used = _drawn(records, whole_number(count, "count", MethodError, least=1), number)
    asked = [replace(r, probes={}) if isinstance(r, Record) else Record(r) for r in used]
    sheet = Sheet.of(model, tokenizer, asked)
    editor = Editor(model, tokenizer, seed=number)
    candidates = candidates_of(sheet.parts, method, layers, trace)
    if layers is None:
        step = max(1, round(len(candidates) / COARSE))
        finalists = FINALISTS
    else:
        step, finalists = 1, len(candidates)
    with quiet(model), editor.ledger.base_state():
        if statistics is None:
            needed = sorted({layer for group in candidates for layer in group})
            statistics = statistics_for(model, tokenizer, needed)
        before = _scores(sheet.rows(BEFORE, range(len(used))))
        by = _say_what_counts(before)
        made_from = description(editor, method, sheet.records, number, statistics)
        place = None if to is None else as_path(to, "to", MethodError)
        file = SweepFile(place, made_from)
        rows: dict[Combination, Row] = {
            (tuple(row["layers"]), row["clamp"]): row for row in file.rows
        }
        total = total_of(len(candidates), len(tried), step, finalists)
        complete = True
        begun = 0
        with progress("trying settings", total, "setting") as bar:
            for new in order(candidates, tried, rows, step, finalists):
                if new not in rows:
                    if begun and time.monotonic() - began > budget:
                        complete = False
                        break
                    begun += 1
                    row = tried_alone(editor, sheet, method, new, statistics)
                    file.add(row)
                    rows[new] = row
                bar.update()
    wanted = {(group, clamp) for group in candidates for clamp in tried}
    found = [rows[one] for one in sorted(rows) if one in wanted]
    return _suggested(found, method, used, by, before, complete)


def _drawn(
    records: Sequence[Record | Fact] | Record | Fact, count: int, seed: int
) -> tuple[Record | Fact, ...]:
    """`count` of the records, in the order given."""
    given = as_list(records)
    check_records([Record(one) if isinstance(one, Fact) else one for one in given])
    if len(given) <= count:
        return tuple(given)
    return tuple(given[i] for i in sorted(random.Random(seed).sample(range(len(given)), count)))


def tried_alone(
    editor: Editor, sheet: Sheet, method: Method, chosen: Combination, statistics: KeyStatistics
) -> dict[str, Any]:
    """Edit each fact singly with some layers and a clamp; the row that says what came of it."""
    began = time.perf_counter()
    layers, clamp = chosen
    resolved = method.replace(layers=layers, clamp=clamp).resolve(sheet.parts)
    row: dict[str, Any] = {"layers": list(layers), "clamp": clamp}
    facts = [record.fact for record in sheet.records]
    answers: list[dict[str, Any]] = []
    sizes, clamped = [], []
    try:
        values = editor.optimise_values(facts, resolved)
        for place, fact in enumerate(facts):
            of_fact = values.of([fact])
            if not of_fact.delta.any():  # the model says it already
                answers += sheet.rows(AFTER, [place])
                sizes.append(0.0)
                clamped.append(False)
                continue
            edit = editor.edit(fact, resolved, statistics=statistics, values=of_fact, apply=False)
            with edit.applied():
                answers += sheet.rows(AFTER, [place])
            squares = [
                (float(edit.delta(layer).square().sum()),
                 float(editor.ledger.base_weight(sheet.parts.weight(layer)).double().square().sum()))
                for layer in edit.layers
            ]  # fmt: skip
            sizes.append(math.sqrt(sum(d for d, _ in squares) / sum(w for _, w in squares)))
            clamped.append(edit.outcomes[0].clamped)
    except (EditError, ObjectiveError) as problem:
        row["problem"] = str(problem)
        log.warning("layers %s with clamp %g have no score: %s", layers, clamp, problem)
    else:
        row |= {**_scores(answers), "problem": ""}
        row |= {"size": sum(sizes) / len(sizes), "clamped": sum(clamped) / len(clamped)}
    return {**row, "seconds": round(time.perf_counter() - began, 2)}


def _scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The scores that are there, and what counts of them."""
    import numpy as np

    found = {name: score.value for name, score in summarise(to_table(rows), bootstrap=100).items()}
    kept = {name: found[name] for name in (*_THREE, "S", "GS") if name in found}
    counted = [kept[name] for name in _THREE if name in kept]
    return {**kept, "score": float(harmonic_mean(np.array(counted))) if counted else kept["GS"]}


def _say_what_counts(before: Mapping[str, float]) -> str:
    """The scores that decide; a warning where they are not all three."""
    by = [name for name in _THREE if name in before] or ["GS"]
    if len(by) < len(_THREE):
        log.warning(
            "the facts given are judged by %s alone: %s. Give records with target_true, "
            "paraphrases and neighbours, or take the suggestion for what it is",
            ", ".join(by),
            "what an edit breaks is not seen" if "NS" not in by else "they have no other prompts",
        )
    return ", ".join(by)


def _suggested(
    rows: list[Row],
    method: Method,
    used: tuple[Record | Fact, ...],
    by: str,
    before: Mapping[str, float],
    complete: bool,
) -> Suggestion:
    import pandas as pd

    best = rows[ranked(rows)[0]]
    if best["problem"]:
        raise MethodError(
            f"none of {len(rows)} combinations of layers and clamps could be edited with "
            f"{method.name}; the first says: {rows[0]['problem']}"
        )
    single = all(len(row["layers"]) == 1 for row in rows)
    table = pd.DataFrame(rows)
    table.insert(0, "layer", [row["layers"][0] if single else tuple(row["layers"]) for row in rows])
    columns = [name for name in _COLUMNS if name in table or name not in (*_THREE, "S", "GS")]
    chosen = method.replace(layers=tuple(best["layers"]), clamp=best["clamp"])
    if not complete:
        log.warning("the budget ended the sweep after %d combinations", len(rows))
    return Suggestion(table[columns], chosen, used, by, before, complete)

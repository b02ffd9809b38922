"""Batch after batch into one model, measured on the way: what is still known of the first one?"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from unified_edit.arguments import as_path, whole_number
from unified_edit.editing.editor import Editor
from unified_edit.editing.edits import Edit
from unified_edit.editing.histories import History
from unified_edit.editing.methods import EMMET, Method
from unified_edit.errors import MethodError, ReportFileError
from unified_edit.facts import Conflict, Record, SharedSubject
from unified_edit.measuring.generation import Generation, generated_rows
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import Report, to_table
from unified_edit.measuring.scores import AFTER, BEFORE, check_bootstrap, summarise
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.progress import progress
from unified_edit.model.tensor_files import read_json, write_whole
from unified_edit.objective import Budget
from unified_edit.statistics import KeyStatistics

if TYPE_CHECKING:
    import pandas as pd

#: The scores of `BatchReport.table`.
SHOWN = ("ES", "PS", "NS", "S", "GS", "GE")

RUN, RUN_KIND = "run.json", "unified_edit.run/1"


@dataclass(frozen=True, eq=False)
class BatchReport:
    """What a model said while batch after batch was written into it.

    answers: a row a prompt as in `Report.table`, and "batches": how many had been written when it
    was asked (0: before any). edits: what was written, in order; not in force any more.
    weights: {batches: {layer: norm(sum of Delta) / norm(W0)}}.
    """

    answers: pd.DataFrame
    batch_size: int
    edits: tuple[Edit, ...]
    weights: dict[int, dict[int, float]]
    bootstrap: int = 2000
    seed: int = 0

    @cached_property
    def table(self) -> pd.DataFrame:
        """The scores after each measured number of batches: of all facts so far, of the first batch
        and of the last one.

        Columns: batches, facts (written so far), of, ES, PS, NS, S, GS, and GE where texts were
        written (values; intervals are in `scores`), weights (the largest norm(sum of Delta) /
        norm(W0) of a layer).
        """
        import pandas as pd

        rows = []
        for batches in sorted(set(self.answers["batches"]) - {0}):
            done = 1 + int(self.answers.loc[self.answers["batches"] == batches, "record"].max())
            for of in ("all", "first", "last"):
                found = self.scores(batches, of)
                row: dict[str, Any] = {"batches": batches, "facts": done, "of": of}
                row |= {name: found[name].value for name in SHOWN if name in found}
                row["weights"] = max(self.weights[batches].values(), default=math.nan)
                rows.append(row)
        return pd.DataFrame(rows)

    def scores(self, batches: int, of: str = "all") -> dict[str, Any]:
        """The scores (`summarise`) after so many batches, of "all" facts so far, of the "first" or
        the "last" batch; with `batches` 0 what the base says of all records that were asked.

        Raises MethodError for a number that was not measured.
        """
        asked = self.answers[self.answers["batches"] == batches]
        if asked.empty or of not in ("all", "first", "last"):
            known = sorted(set(self.answers["batches"]))
            raise MethodError(
                f"nothing was measured of {of!r} after {batches} batches; there is 'all', 'first' "
                f"and 'last' after {known}"
            )
        if of == "first":
            asked = asked[asked["record"] < self.batch_size]
        elif of == "last":
            asked = asked[asked["record"] >= self.batch_size * (max(batches, 1) - 1)]
        return dict(summarise(asked, bootstrap=self.bootstrap, seed=self.seed))

    @cached_property
    def report(self) -> Report:
        """The base and the model with all batches, as a `Report`."""
        last = self.answers[self.answers["batches"].isin((0, self.answers["batches"].max()))]
        rows = last.drop(columns="batches").reset_index(drop=True)
        return Report(rows, self.bootstrap, self.seed)

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, bootstrap: int = 2000) -> BatchReport:
        """What `evaluate_batches` has written to a folder so far; its `edits` stay in their files.

        Raises ReportFileError for a folder that cannot be read, or holds something else.
        """
        place = as_path(folder, "folder", ReportFileError)
        if not (place / RUN).exists():
            raise ReportFileError(f"{place} holds no {RUN}; give the folder that a run wrote to")
        kind = {"kind": RUN_KIND}
        measured, about = _begun(place, kind), _run_of(place)
        return _reported(measured, about["batch_size"], (), bootstrap, about["seed"])


def evaluate_batches(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    method: Method = EMMET,
    *,
    batch_size: int,
    history: History | None = None,
    budget: Budget | None = None,
    every: int = 1,
    statistics: KeyStatistics | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
    on_shared_subject: SharedSubject = "raise",
    on_conflict: Conflict = "raise",
    generate: bool | Generation = False,
    to: str | os.PathLike[str] | None = None,
) -> BatchReport:
    """Write `batch_size` records after the others into one model, and ask about all so far.

    Unlike in `evaluate_edits`, what was written stays. Each batch is made on the model as edited so
    far; how much it minds the earlier ones is its `history`, with or without a `budget`, as in
    `Editor`. After every `every` batches, and at the end, all records written so far are asked.

    to: a folder in which the edits and answers are kept as they come; called again with the same
        arguments, it goes on after the last batch there. statistics, seed, on_shared_subject,
        on_conflict: as in `edit`. bootstrap, generate: as in `evaluate`.

    Edits active when it is called are taken out meanwhile and put back bit for bit, also on
    failure. Raises what `edit` and `evaluate` raise, and ReportFileError for a folder of something
    else.
    """
    bootstrap, seed = check_bootstrap(bootstrap), whole_number(seed, "seed", MethodError, least=0)
    size = whole_number(batch_size, "batch_size", MethodError, least=1)
    step = whole_number(every, "every", MethodError, least=1)
    texts = Generation.wanted(generate, seed)
    sheet = Sheet.of(model, tokenizer, records)
    editor = Editor(
        model, tokenizer, method=method, statistics=statistics, seed=seed, history=history,
        budget=budget, on_shared_subject=on_shared_subject, on_conflict=on_conflict,
    )  # fmt: skip
    total = math.ceil(len(sheet.records) / size)
    folder = None if to is None else as_path(to, "to", ReportFileError)
    made_from = {
        "kind": RUN_KIND, "library": version("unified_edit"),
        "fingerprint": editor.ledger.fingerprint(wholly=True),
        "records": hashlib.sha256(repr(sheet.records).encode()).hexdigest(),
        "method": method.resolve(editor.parts).to_dict(), "batch_size": size, "history": history,
        "every": step, "seed": seed, "on_shared_subject": on_shared_subject,
        "on_conflict": on_conflict,
        "statistics": None if statistics is None else asdict(statistics.source),
        "budget": None if budget is None else asdict(budget),
        "generate": None if texts is None else asdict(texts),
    }  # fmt: skip

    def asked(when: str, records: range) -> list[dict[str, Any]]:
        rows = sheet.rows(when, records)
        if texts is not None:
            rows += generated_rows(sheet, tokenizer, when, records, texts)
        return rows

    measured: dict[int, dict[str, Any]] = {}
    with quiet(model), editor.ledger.base_state():
        if folder is not None:
            measured = _begun(folder, made_from)
            if measured and (folder / "history.json").exists():
                editor.resume(folder)
        if 0 not in measured:
            _keep(folder, measured, 0, asked(BEFORE, range(len(sheet.records))), {})
        with progress("editing batch after batch", total, "batch") as bar:
            for number in range(1, total + 1):
                done = min(number * size, len(sheet.records))
                if number > len(editor.active):
                    places = range((number - 1) * size, done)
                    editor.edit([sheet.records[place].fact for place in places])
                    if folder is not None:
                        editor.save(folder)
                due = number % step == 0 or number == total
                # what was killed between a batch and its answers is asked now, if nothing followed
                if due and number not in measured and number == len(editor.active):
                    _keep(folder, measured, number, asked(AFTER, range(done)), _moved(editor))
                bar.update()
        edits = editor.active
    return _reported(measured, size, edits, bootstrap, seed)


def _reported(
    measured: dict[int, dict[str, Any]],
    size: int,
    edits: tuple[Edit, ...],
    bootstrap: int,
    seed: int,
) -> BatchReport:
    import pandas as pd

    tables = [to_table(kept["rows"]).assign(batches=n) for n, kept in sorted(measured.items())]
    weights = {
        number: {int(layer): moved for layer, moved in kept["weights"].items()}
        for number, kept in measured.items()
    }
    return BatchReport(pd.concat(tables, ignore_index=True), size, edits, weights, bootstrap, seed)


@torch.no_grad()
def _moved(editor: Editor) -> dict[int, float]:
    """norm(sum of Delta) / norm(W0) of each edited layer."""
    found = {}
    for name in {name for edit in editor.active for name in edit.updates}:
        weight = editor.parts.named(name)
        base = editor.ledger.base_weight(weight).double()
        change = editor.ledger.with_edits(weight, editor.active).double() - base
        found[weight.layer] = float(change.norm() / base.norm())
    return found


def _keep(
    folder: Path | None,
    measured: dict[int, dict[str, Any]],
    number: int,
    rows: list[dict[str, Any]],
    weights: dict[int, float],
) -> None:
    """Note the answers after so many batches, on disk too where there is a folder."""
    import pandas as pd

    measured[number] = {"rows": rows, "weights": weights}
    if folder is None:
        return
    plain = [{name: None if value is pd.NA else value for name, value in row.items()}
             for row in rows]  # fmt: skip
    kept = {"rows": plain, "weights": weights}
    write_whole(folder / f"answers-{number:05}.json", json.dumps(kept, default=str))


def _begun(folder: Path, made_from: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The answers that are in a folder already; made if there is none.

    Raises ReportFileError if it was made from something else, or cannot be read or written.
    """
    path = folder / RUN
    wanted = json.loads(json.dumps(made_from))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(made_from, indent=1))
        found = _run_of(folder)
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            raise ReportFileError(
                f"{folder} holds a run with another {', '.join(other)}: give another folder, or "
                "the arguments it was begun with"
            )
        measured = {}
        for file in sorted(folder.glob("answers-*.json")):
            kept = read_json(file)
            measured[int(file.stem.partition("-")[2])] = {
                "rows": [_read(row) for row in kept["rows"]],
                "weights": kept["weights"],
            }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        if isinstance(problem, ReportFileError):
            raise
        raise ReportFileError(
            f"{folder} cannot be used for a run ({problem!r}); give another folder"
        ) from problem
    return measured


def _run_of(folder: Path) -> dict[str, Any]:
    """What the run of a folder was made from."""
    return dict(read_json(folder / RUN))


def _read(row: dict[str, Any]) -> dict[str, Any]:
    import pandas as pd

    return {**row, "success": pd.NA if row["success"] is None else row["success"]}

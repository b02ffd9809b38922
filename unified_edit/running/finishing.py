"""The last step of a run: from all pieces the edit, its scores, and a summary.

FOLDER/statistics/*.safetensors  C0 of each layer, from the shares, which are deleted then
FOLDER/edit.safetensors          the edit
FOLDER/answers.jsonl             what was answered about the records, if there are any
FOLDER/summary.json, .txt        what came out, and how long it took; written last
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from unified_edit.editing import Edit, Editor
from unified_edit.errors import RunFolderError
from unified_edit.measuring import Report, evaluate
from unified_edit.measuring.answer_lines import plain
from unified_edit.measuring.report import as_text
from unified_edit.model.tensor_files import write_whole
from unified_edit.running.pieces import PIECES, ValueStage
from unified_edit.running.settings import ANSWERS, Settings
from unified_edit.running.shares import StatisticsStage
from unified_edit.running.status import EDIT, SUMMARY, RunState, duration, read_summary
from unified_edit.running.workers import DEAD_AFTER, seen_in, this_process

log = logging.getLogger(__name__)

TEXT = "summary.txt"


def is_finished(folder: Path, config: str) -> bool:
    """Whether the run with this configuration has its edit."""
    return read_summary(folder, config) is not None and (folder / EDIT).exists()


def finish(
    folder: Path,
    config: str,
    editor: Editor,
    settings: Settings,
    collecting: StatisticsStage,
    values: ValueStage,
) -> bool:
    """Solve, write and judge the edit; False where pieces are missing, or were damaged."""
    times: dict[str, float] = {}
    with _timed(times, "reading the pieces"):
        found = values.values()
        statistics = None if found is None else collecting.statistics()
    if found is None or statistics is None:
        return False
    with _timed(times, "solving"):
        edit = editor.edit(
            settings.facts,
            settings.method,
            statistics=statistics,
            values=found,
            apply=False,
            on_shared_subject=settings.on_shared_subject,
            on_conflict=settings.on_conflict,
        )
        edit.save(folder / EDIT)
    report = None
    if settings.records:
        answers = own_answers(folder, edit.id)
        with _timed(times, "evaluating"), edit.applied():
            report = evaluate(
                editor.model, editor.tokenizer, settings.records, seed=settings.seed,
                to=answers,
            )  # fmt: skip
        answers.replace(folder / ANSWERS)
        for left in _left_behind(folder, edit.id):
            left.unlink(missing_ok=True)
    _write(folder, config, edit, report, times)
    collecting.clear()
    for path in (folder / PIECES).rglob(".*"):  # what a kill left half written
        with suppress(FileNotFoundError):  # another process may be at the same
            if time.time() - path.stat().st_mtime > DEAD_AFTER:
                path.unlink()
    return True


def own_answers(folder: Path, edit: str) -> Path:
    """The file that this process answers into: two may be at it where there are no locks.

    What one that is gone has left behind is gone on with; only one process can take it.
    """
    own = folder / f".{edit}-{'-'.join(map(str, this_process()))}-{ANSWERS}"
    for left in _left_behind(folder, edit):
        with suppress(FileNotFoundError):
            return left.replace(own)
    return own


def _left_behind(folder: Path, edit: str) -> list[Path]:
    """Unfinished answers about an edit that nobody else is at."""
    others = (one.sign for one in seen_in(folder) if one.alive and not one.sign.ours)
    theirs = {f".{edit}-{sign.host}-{sign.pid}-{ANSWERS}" for sign in others}
    return [path for path in sorted(folder.glob(f".{edit}-*")) if path.name not in theirs]


@contextmanager
def _timed(times: dict[str, float], what: str) -> Iterator[None]:
    began = time.monotonic()
    log.info("%s", what)
    yield
    times[what] = round(time.monotonic() - began, 3)


def _write(
    folder: Path, config: str, edit: Edit, report: Report | None, times: dict[str, float]
) -> None:
    state = RunState.read(folder)
    steps = [
        {
            "step": row["what"],
            "pieces": row["pieces"],
            "units": row["units"],
            "seconds": row["seconds"],
        }
        for row in state.table.to_dict("records")
    ]
    steps += [{"step": what, "seconds": seconds} for what, seconds in times.items()]
    took = sum(one.likeliest for one in edit.outcomes)
    summary = {
        "config": config,
        "edit": edit.id,
        "facts": len(edit.facts),
        "took": took,
        "steps": steps,
        "scores": None if report is None else report.to_dict(),
        "warnings": list(edit.warnings),
    }
    text = "\n".join(
        [
            f"{edit.method.name} at layers {', '.join(map(str, edit.layers))}: {took} of "
            f"{len(edit.facts)} facts took",
            "",
            told(summary),
            *([] if report is None else ["", repr(report)]),
        ]
    )
    try:
        write_whole(folder / TEXT, text + "\n")
        write_whole(folder / SUMMARY, json.dumps(plain(summary), indent=1) + "\n")
    except OSError as problem:
        raise RunFolderError(
            f"{folder / SUMMARY} cannot be written: {problem}. Make room there, and start the run "
            "again: the edit is written already"
        ) from problem


def told(summary: dict[str, Any]) -> str:
    """How long what took, as text; of pieces the work of all processes together."""
    frame = pd.DataFrame(summary["steps"], columns=["step", "pieces", "units", "seconds"])
    total = math.fsum(frame["seconds"])
    cells = [
        [
            str(row.step),
            *("" if math.isnan(n) else f"{n:.0f}" for n in (row.pieces, row.units)),
            duration(row.seconds),
        ]
        for row in frame.itertuples()
    ]
    cells.append(["together", "", "", duration(total)])
    return as_text(pd.DataFrame(cells, columns=["step", "pieces", "units", "time"]), ["step"])

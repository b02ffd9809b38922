"""A grid by several processes, each with a model and threads of its own; they share a folder."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import torch

from unified_edit.arguments import as_path, whole_number
from unified_edit.editing.opening import load_model
from unified_edit.errors import MethodError, ModelError, StatisticsError
from unified_edit.facts import Record
from unified_edit.measuring.grid import Cell, Grid, cells_of
from unified_edit.measuring.grid_files import DONE, FAILED
from unified_edit.measuring.grid_runs import Work
from unified_edit.measuring.grid_table import Sweep
from unified_edit.model.progress import VARIABLE, progress
from unified_edit.statistics import KeyStatistics, statistics_for

log = logging.getLogger(__name__)

#: Seconds between two looks at what the workers have done.
LOOK = 0.2


def sweep_in_processes(
    loading: Mapping[str, Any] | str,
    records: Sequence[Record] | Record,
    grid: Iterable[Grid] | Grid,
    *,
    to: str | os.PathLike[str],
    processes: int,
    threads: int | None = None,
    statistics: str | os.PathLike[str] | None = None,
    **given: Any,
) -> Sweep:
    """`sweep` by so many processes, each of which opens the model for itself.

    loading: the model's name, or the arguments of `load_model`. threads: of each process; by
        default this one's, shared out. statistics: the file of C0. Without it C0 comes from the
        cache, and what is missing there is collected once, before the processes start.
    given: as in `sweep`.

    The same cell may differ in last digits with another number of threads. A process that the
    system ends (for want of memory, say) leaves its cell in `Sweep.missing`, and the next call goes
    on with it. Raises what `sweep` and `load_model` raise, before any work, and ModelError if no
    process could work at all.
    """
    number = whole_number(processes, "processes", MethodError, least=1)
    share = max(1, torch.get_num_threads() // number)
    each = share if threads is None else whole_number(threads, "threads", MethodError, least=1)
    cells = cells_of(grid)
    path = None if statistics is None else as_path(statistics, "statistics", StatisticsError)
    job: dict[str, Any] = {
        "loading": {"name": loading} if isinstance(loading, str) else dict(loading),
        "cells": [cell.to_dict() for cell in cells],
        "to": to,
        "statistics": path,
        "given": given,
        "run": uuid.uuid4().hex,
        "level": logging.getLogger("unified_edit").getEffectiveLevel(),
        "threads": each,
    }
    work, left = _prepared(job, records, cells)
    if left:
        _wait(_started(job, records, min(number, left)), work)
    return work.found()


def _opened(job: Mapping[str, Any], records: Any, cells: Sequence[Cell]) -> tuple[Any, Any, Work]:
    model, tokenizer = load_model(**job["loading"])
    found = None if job["statistics"] is None else KeyStatistics.lazily(job["statistics"])
    work = Work.of(model, tokenizer, records, cells, job["to"], statistics=found, **job["given"])
    return model, tokenizer, work


def _prepared(job: Mapping[str, Any], records: Any, cells: Sequence[Cell]) -> tuple[Work, int]:
    """The work, and how many of its cells are left; C0 is on disk then, the model let go."""
    model, tokenizer, work = _opened(job, records, cells)
    left = work.open
    if left and job["statistics"] is None:
        layers = {layer for name in left for layer in work.layers(name)}
        statistics_for(model, tokenizer, sorted(layers))
    del model, tokenizer
    gc.collect()
    return work, len(left)


def _started(job: Mapping[str, Any], records: Any, number: int) -> list[SpawnProcess]:
    context = multiprocessing.get_context("spawn")  # a fork would share locks of torch's threads
    started = []
    for place in range(number):
        one = context.Process(
            target=work_through, args=(dict(job), records, place / number), name=f"worker {place}"
        )
        one.start()
        started.append(one)
    return started


def _wait(workers: list[SpawnProcess], work: Work) -> None:
    """Until all have ended; none outlives this call, whatever ends it."""
    try:
        with progress("cells of the grid", len(work.cells), "cell") as bar:
            while any(one.is_alive() for one in workers):
                time.sleep(LOOK)
                if new := len(work.cells) - len(work.open) - bar.n:
                    bar.update(new)
    finally:
        for one in workers:
            one.terminate()
        for one in workers:
            one.join()
    ended = [one for one in workers if one.exitcode]
    for one in ended:
        log.warning("%s ended with code %s; its cell is not done", one.name, one.exitcode)
    states = {files.read()["state"] for _, files in work.cells.values()}
    if len(ended) == len(workers) and not states & {DONE, FAILED}:
        raise ModelError(
            "no process could work on the grid; what was in the way stands above. Give fewer "
            "processes where memory is short"
        )


def work_through(job: Mapping[str, Any], records: Any, begin: float) -> None:
    """What a process of `sweep_in_processes` does: the whole grid, but for what others have."""

    def end(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)  # in order, so that no half of a file is left behind

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the first process tells us
    os.environ[VARIABLE] = "0"
    logging.basicConfig(stream=sys.stderr, format="%(processName)s: %(message)s")
    logging.getLogger("unified_edit").setLevel(job["level"])
    torch.set_num_threads(job["threads"])
    cells = [Cell.from_dict(one) for one in job["cells"]]
    model, tokenizer, work = _opened(job, records, cells)
    first = multiprocessing.parent_process()
    work.run(
        model, tokenizer, run=job["run"], begin=begin,
        alive=lambda: first is None or first.is_alive(),
    )  # fmt: skip

"""What else was lost: tasks of the lm-evaluation-harness before and after the active edits.

The harness (`lm-eval`, an extra of this library) brings thousands of tasks, and reads those of a
folder of YAML files as well. It is used as it is: its prompts, its scoring, its seeds, so that what
it says of a base model can be held against published figures.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from unified_edit.arguments import as_list, as_path, whole_number
from unified_edit.errors import MethodError
from unified_edit.model.anatomy import Tokenizer
from unified_edit.model.hooks import quiet
from unified_edit.model.ledger import ledger_of

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the table.
COLUMNS = (
    "task metric questions base base_stderr edited edited_stderr change change_stderr"
).split()
#: Resamples for the standard errors of metrics that are no means; the others have a formula.
RESAMPLES = 1000


def harness_scores(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str] | str,
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    **settings: Any,
) -> pd.DataFrame:
    """Scores of the lm-evaluation-harness (pip install 'unified_edit[harness]').

    >>> ue.harness_scores(model, tokenizer, ["lambada_openai", "piqa"], limit=200)  # doctest: +SKIP

    tasks: names of its tasks or groups ("mmlu"), or of those in `folder`, a folder of YAML files
        in its format. limit: at most so many questions of each task. batch_size: rows of a forward.
    settings: anything else that `lm_eval.simple_evaluate` knows: num_fewshot,
        apply_chat_template, gen_kwargs, ...

    A row for each task and metric, with the columns task, metric (as the harness calls it, its
    filter behind a comma), questions, and
        base, base_stderr: of the base model, all active edits taken out and put back bit for bit;
        edited, edited_stderr: of the model as it is, NaN where no edit is active;
        change, change_stderr: edited - base, and its standard error over questions. Both models
            are asked the same ones, so it is far below that of either score where few answers
            changed. NaN for metrics that are no mean over questions, and for groups.

    Data of tasks come from the Hub unless their YAML says otherwise (HF_DATASETS_OFFLINE=1 forbids
    it). The tokenizer is copied, and random states are put back: the harness changes both.

    Raises MethodError where lm-eval is not installed, and for a task that it does not know; and
    whatever the harness raises, for data that cannot be had, for example.
    """
    evaluate, HFLM, TaskManager = installed()
    names = [str(name) for name in as_list(tasks)]
    if limit is not None:
        limit = whole_number(limit, "limit", MethodError, least=1)
    size = whole_number(batch_size, "batch_size", MethodError, least=1)
    ledger = ledger_of(model)
    with own_randomness(), quiet(model):
        manager = manager_of(TaskManager, names, folder)
        with _hushed("lm_eval.models.huggingface"):
            # it gives a tokenizer without padding one, and others of ours are to stay as they are
            asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=size)

        def found() -> dict[str, Any]:
            given = {"limit": limit, "bootstrap_iters": RESAMPLES, **settings}
            return dict(evaluate(model=asked, tasks=names, task_manager=manager, **given))

        with ledger.base_state():
            base = found()
        edited = found() if ledger.active else None
    return table_of(base, edited)


def installed() -> tuple[Any, Any, Any]:
    """What is used of the package; it takes seconds to import, and is an extra."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as problem:
        raise MethodError(
            "harness_scores needs the package lm-eval, which is not installed or not whole "
            f"({problem}): pip install 'unified_edit[harness]'"
        ) from problem
    return simple_evaluate, HFLM, TaskManager


def manager_of(
    task_manager: Any, names: Sequence[str], folder: str | os.PathLike[str] | None
) -> Any:
    """The harness's list of tasks; its own thousands are read only if the folder has not all."""
    place = None
    if not names:
        raise MethodError("tasks is empty; give the name of at least one task of lm-eval")
    if folder is not None:
        place = as_path(folder, "folder", MethodError, advice="give a folder of YAML files")
        if not place.is_dir():
            raise MethodError(f"folder is {str(place)!r}, which is no folder of YAML files")
        manager = task_manager(include_path=str(place), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = task_manager(include_path=place and str(place))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise MethodError(
                f"lm-eval has no task {name!r}{hint} `lm-eval ls tasks` lists its own; those of "
                "a folder are named by the line `task:` of their YAML files (folder=...)"
            )
    return manager


def table_of(base: Mapping[str, Any], edited: Mapping[str, Any] | None) -> pd.DataFrame:
    """The table of what the harness gave for the base and, where there is one, the edited model."""
    import pandas as pd

    rows = []
    for task, scores in base["results"].items():
        asked = base.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in scores.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = f"{metric}_stderr,{filter_}"
            now = {} if edited is None else edited["results"][task]
            row = {
                "task": task,
                "metric": metric if filter_ == "none" else key,
                "questions": asked,
                "base": _number(value),
                "base_stderr": _number(scores.get(error)),
                "edited": _number(now.get(key)),
                "edited_stderr": _number(now.get(error)),
            }
            row["change"] = row["edited"] - row["base"]
            row["change_stderr"] = math.nan
            if edited is not None:
                before, after = (_each(one, task, metric, filter_) for one in (base, edited))
                row["change_stderr"] = _paired(before, after, row["base"], row["edited"])
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _each(found: Mapping[str, Any], task: str, metric: str, filter_: str) -> dict[int, Any]:
    """What each question contributed to a metric, by its number in the task."""
    samples = found.get("samples", {}).get(task, ())
    return {
        one["doc_id"]: one[metric]
        for one in samples
        if metric in one and one.get("filter", "none") == filter_
    }


def _paired(
    before: Mapping[int, Any], after: Mapping[int, Any], base: float, edited: float
) -> float:
    """The standard error of the mean change of a question; NaN unless both scores are means."""
    both = sorted(before.keys() & after.keys())
    pairs = np.array([(_number(before[at]), _number(after[at])) for at in both]).reshape(-1, 2)
    if len(pairs) < 2 or not np.allclose(pairs.mean(axis=0), [base, edited], rtol=1e-9, atol=1e-12):
        return math.nan
    change = pairs[:, 1] - pairs[:, 0]
    return float(change.std(ddof=1) / math.sqrt(len(change)))


def _number(value: Any) -> float:
    """A number of the harness; what it has none for ("N/A", a tuple) is NaN."""
    return float(value) if isinstance(value, (int, float, np.number, np.bool_)) else math.nan


@contextmanager
def own_randomness() -> Iterator[None]:
    """The harness seeds Python's, numpy's and torch's generators: they go on as before after."""
    python, legacy = random.getstate(), np.random.get_state()
    # it seeds all cards, and a model may stand on several
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Warnings of a logger are left out inside: they advise a caller who opens models by name."""
    own = logging.getLogger(name)
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)

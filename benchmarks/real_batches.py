r"""Ten batches of twenty into SmolLM2, one after the other, by six methods.

    python benchmarks/real_batches.py --runs _build/real_batches \
        --out book/data/smollm2_batches.json

The facts are the first 200 records of "counterfact-250" whose subjects differ, in order; each is
asked with both paraphrases and two neighbours. After every second batch all facts so far are asked.
Values are found at layer 3 on the model as edited so far, in the bare prompt and behind one sampled
beginning of five tokens: a third of the work that the chapter of single edits spends on them.

    EMMET             the equality at layer 3; a batch knows nothing of those before it
    EMMET, hard       the equality, all earlier ones held
    MEMIT             layers 1 to 3, lam = 100; a batch knows nothing of those before it
    MEMIT, soft       the same, with the sum of all earlier K K'
    AlphaEdit, soft   the same in the null space of C0 (eigenvalues below 0.02), ridge 10
    FT-W              fine-tuning of layer 3, no entry of a batch's Delta above 5e-3

What was made is in the folder of --runs, method by method, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import unified_edit as ue
from unified_edit.measuring import Sheet, to_table
from unified_edit.measuring.scores import AFTER, summarise
from unified_edit.statistics import statistics_for

log = logging.getLogger("real_batches")

LAYER, LAYERS = 3, (1, 2, 3)
BATCHES, SIZE, EVERY, NEIGHBOURS = 10, 20, 2, 2
CONTEXTS = ue.Contexts(starts=("The",), lengths=(5,))
NORM = 5e-3
ONE = ue.EMMET.replace(layers=(LAYER,), contexts=CONTEXTS)
SPREAD = ue.MEMIT.replace(layers=LAYERS, ridge=100.0, contexts=CONTEXTS)
NULL = ue.ALPHAEDIT.replace(layers=LAYERS, ridge=10.0, contexts=CONTEXTS)
#: Name -> method and history; no method: fine-tuning.
METHODS: dict[str, tuple[ue.Method | None, Any]] = {
    "EMMET": (ONE, None),
    "EMMET, hard": (ONE, "hard"),
    "MEMIT, soft": (SPREAD, "soft"),
    "AlphaEdit, soft": (NULL, "soft"),
    "MEMIT": (SPREAD, None),
    "FT-W": (None, None),
}
SCORES = ("ES", "PS", "NS", "S", "GS")


def chosen() -> list[ue.Record]:
    """The records, each with two neighbours."""
    known: dict[str, ue.Record] = {}
    for record in ue.load_records("counterfact-250"):
        known.setdefault(record.fact.subject.casefold(), record)
    records = list(known.values())[: BATCHES * SIZE]
    assert len(records) == BATCHES * SIZE, "there are not as many subjects"
    return [replace(one, neighbours=one.neighbours[:NEIGHBOURS], probes={}) for one in records]


def scores(answers: pd.DataFrame) -> dict[str, list[float]]:
    """Each score: value, low, high."""
    found = summarise(answers, bootstrap=2000, seed=0)
    return {
        name: [round(number, 4) for number in (one.value, one.low, one.high)]
        for name in SCORES
        if name in found
        for one in (found[name],)
    }


def lines_of(answers: pd.DataFrame, weights: dict[int, float]) -> Iterator[dict[str, Any]]:
    """A line for each measured number of batches."""
    for batches, moved in weights.items():
        now = answers[answers["batches"] == batches]
        yield {
            "batches": batches,
            "all": scores(now),
            "first": scores(now[now["record"] < SIZE]),
            "last": scores(now[now["record"] >= SIZE * (batches - 1)]),
            "weights": float(f"{moved:.4g}"),
        }


def edited(
    model: Any, tokenizer: Any, name: str, folder: Path, statistics: ue.KeyStatistics
) -> dict[str, Any]:
    """One method of the closed forms."""
    method, history = METHODS[name]
    assert method is not None
    report = ue.evaluate_batches(
        model, tokenizer, chosen(), method, batch_size=SIZE, history=history, every=EVERY,
        statistics=statistics, to=folder,
    )  # fmt: skip
    return {
        "method": method.resolve(model).to_dict(),
        "history": history,
        "before": scores(report.answers[report.answers["batches"] == 0]),
        "after": list(
            lines_of(report.answers, {n: max(each.values()) for n, each in report.weights.items()
                                      if n})
        ),
    }  # fmt: skip


def fine_tuned(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Fine-tuning, a batch on top of the others."""
    records = chosen()
    sheet = Sheet.of(model, tokenizer, records)
    tables, weights, edits = [], {}, []
    weight = model.get_submodule(f"model.layers.{LAYER}.mlp.down_proj").weight
    before = weight.detach().double().clone()
    for number in range(1, BATCHES + 1):
        places = range(SIZE * (number - 1), SIZE * number)
        facts = [records[place].fact for place in places]
        edits.append(ue.fine_tune(model, tokenizer, facts, layer=LAYER, norm=NORM))
        if number % EVERY == 0:
            rows = sheet.rows(AFTER, range(SIZE * number))
            tables.append(to_table(rows).assign(batches=number))
            weights[number] = float((weight.detach().double() - before).norm() / before.norm())
    for edit in reversed(edits):
        edit.undo()
    return {"method": edits[0].method.to_dict(), "history": None,
            "after": list(lines_of(pd.concat(tables), weights))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    model, tokenizer = ue.load_model("smollm2")
    statistics = statistics_for(model, tokenizer, LAYERS)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.methods:
        place = arguments.runs / "".join(one if one.isalnum() else "_" for one in name)
        path = place.with_suffix(".json")
        if not path.exists():
            began = time.process_time()
            found = (
                fine_tuned(model, tokenizer)
                if METHODS[name][0] is None
                else edited(model, tokenizer, name, place, statistics)
            )
            minutes = round((time.process_time() - began) / 60, 1)
            path.write_text(json.dumps({"name": name, "minutes": minutes} | found))
        last = json.loads(path.read_text(encoding="utf-8"))["after"][-1]
        log.info("%s: %s", name, last)
    if arguments.out:
        runs = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(arguments.runs.glob("*.json"))
        ]
        result = {
            "command": "python benchmarks/real_batches.py",
            "model": "smollm2 (SmolLM2-135M-Instruct, Q4_1, dequantised to float32)",
            "batches": BATCHES,
            "size": SIZE,
            "neighbours": NEIGHBOURS,
            "seed": 0,
            "hours": round(sum(run["minutes"] for run in runs) / 60, 1),
            "versions": {
                "python": platform.python_version(),
                **{one: version(one) for one in ("unified_edit", "torch", "transformers")},
            },
            "threads": torch.get_num_threads(),
        }
        head = json.dumps(result, indent=1)[:-2]
        body = ",\n".join("  " + json.dumps(run) for run in runs)
        arguments.out.write_text(f'{head},\n "runs": [\n{body}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()

"""Preserve and memorize, each softly or as a condition, batch after batch on atlas.

    python benchmarks/four_corners.py --out book/data/four_corners.json

Five batches of 12 facts into one layer. Between the runs differ the update, and what a batch knows
of those before it: nothing, or their keys, weighed where memorization is soft and held where it is
hard. All runs write the first batch with the same values. Three minutes on a core; runs that the
file holds already are kept, and `--runs` makes some of them only.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_files import in_lines
from torch import Tensor

import unified_edit as ue
from unified_edit.editing import values_for
from unified_edit.measuring import Sheet, summarise, to_table
from unified_edit.measuring.scores import AFTER, BEFORE
from unified_edit.statistics import statistics_for

log = logging.getLogger("four_corners")

LAYER, BATCHES, SIZE = 1, 5, 12
CORNERS = {
    "soft/soft": ue.MEMIT.replace(layers=(LAYER,)),
    "soft/hard": ue.EMMET.replace(layers=(LAYER,)),
    "hard/soft": ue.ALPHAEDIT.replace(layers=(LAYER,)),
    "hard/hard": ue.ALPHAEDIT.replace(layers=(LAYER,), ridge=0.0),
}
#: Name -> corner (preserve/memorize) and history.
RUNS: dict[str, tuple[str, Any]] = {
    **{corner: (corner, "hard" if corner.endswith("/hard") else "soft") for corner in CORNERS},
    **{f"{corner}, blind": (corner, None) for corner in CORNERS},
}
SCORES = ("ES", "PS", "NS", "S", "GS", "other_relations")


def measure(
    model: Any, tokenizer: Any, records: list[ue.Record], name: str, statistics: Any
) -> dict[str, Any]:
    """Write one batch after another; the model is its base again at the end."""
    corner, history = RUNS[name]
    method = CORNERS[corner]
    editor = ue.Editor(model, tokenizer, method=method, history=history, statistics=statistics)
    weight = editor.parts.weight(LAYER)
    W0 = weight.to_stored(editor.ledger.base_weight(weight)).double()
    C0 = statistics.C0(LAYER).double()
    first = values_for(model, tokenizer, [record.fact for record in records[:SIZE]], ue.EMMET)
    sheet = Sheet.of(model, tokenizer, records)
    pairs: list[tuple[Tensor, Tensor]] = []
    edits, lines = [], []
    for start in range(0, len(records), SIZE):
        facts = [record.fact for record in records[start : start + SIZE]]
        values = values_for(model, tokenizer, facts, method) if start else first
        W = W0 + sum(edit.delta(LAYER) for edit in edits)
        edits.append(editor.edit(facts, values=values))
        K = edits[-1].keys[edits[-1].names[LAYER]]
        pairs.append((K, W @ K + values.delta.double()))
        total = sum(edit.delta(LAYER) for edit in edits)
        seen = range(start + len(facts)) if start + SIZE >= len(records) else range(SIZE)
        found = summarise(to_table(sheet.rows(AFTER, seen)))
        of_first = summarise(to_table(sheet.rows(AFTER, range(SIZE))))
        lines.append(
            {
                "batches": len(edits),
                "first": {score: round(of_first[score].value, 4) for score in SCORES},
                "cost": few(float(((total @ C0) * total).sum())),
                "norm": few(float(total.norm())),
                "missed": [
                    few(float(((W0 + total) @ K - V).norm() / (V - W0 @ K).norm()))
                    for K, V in pairs
                ],
            }
        )
        log.info("%s %s", name, lines[-1])
    editor.reset()
    return {
        "name": name,
        "history": history,
        "ridge": method.resolve(editor.parts).ridge,
        "all at the end": {
            score: [round(x, 4) for x in (found[score].value, found[score].low, found[score].high)]
            for score in SCORES
        },
        "after": lines,
    }


def few(x: float) -> float:
    return float(f"{x:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", nargs="+", choices=RUNS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    out: Path = arguments.out
    model, tokenizer = ue.load_model("atlas")
    records = ue.load_records("atlas", limit=BATCHES * SIZE, seed=arguments.seed)
    statistics = statistics_for(model, tokenizer, [LAYER])
    known = json.loads(out.read_text("utf-8"))["runs"] if out.exists() else []
    sheet = Sheet.of(model, tokenizer, records)
    before = summarise(to_table(sheet.rows(BEFORE, range(len(records)))))
    result = {
        "command": f"python benchmarks/four_corners.py --seed {arguments.seed} "
        f"--out {out.as_posix()}",
        "batches": BATCHES,
        "size": SIZE,
        "seed": arguments.seed,
        "layer": LAYER,
        "kept": {
            str(layer): round(
                ue.objective.NullSpace(
                    statistics_for(model, tokenizer, [layer]).metric(layer)
                ).kept,
                4,
            )
            for layer in (0, 1)
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "threads": torch.get_num_threads(),
        "before": {score: round(before[score].value, 4) for score in SCORES},
        "runs": known,
    }
    for name in RUNS:
        if name in {run["name"] for run in known} or name not in (arguments.runs or RUNS):
            continue
        began = time.process_time()
        known.append(measure(model, tokenizer, records, name, statistics))
        known[-1]["minutes"] = round((time.process_time() - began) / 60, 1)
        out.write_text(in_lines(result), encoding="utf-8")


if __name__ == "__main__":
    main()

"""From one fact to one for every subject of atlas, in one EMMET batch.

    python benchmarks/mass_editing.py --out book/data/mass_editing.json

460 facts, one for each subject, in the order of `benchmarks/batches.py`, with values that are
optimised once. The first 20 of them are written singly, by tens, and in ever larger batches that
contain them, and asked each time. All 460 at once are then written with one lam after another, and
the first 100 are asked. What G = K'C0^-1 K of all facts looks like stands there as its eigenvalues,
with the squared length of what is asked along each. Four minutes on a core; sizes and lams that the
file holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import unified_edit as ue
from unified_edit.editing import values_for
from unified_edit.measuring import Report, Sheet, to_table
from unified_edit.measuring.scores import AFTER
from unified_edit.model import anatomy
from unified_edit.statistics import statistics_for

log = logging.getLogger("mass_editing")

COMMAND = "python benchmarks/mass_editing.py"
FACTS, ASKED, ASKED_OF_LAM = 460, 20, 100
SIZES = (1, 10, 20, 50, 100, 200, 460)
LAMS = (1.0, 100.0, 1_000.0, 3_000.0, 10_000.0, 100_000.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)

    began = time.process_time()
    model, tokenizer = ue.load_model("atlas")
    (layer,) = ue.EMMET.resolve(anatomy(model)).layers or ()
    statistics = statistics_for(model, tokenizer, [layer])
    records = ue.load_records("atlas", limit=FACTS, seed=arguments.seed)
    assert len(records) == FACTS, "there are not as many records"
    result: dict[str, Any] = {
        "command": f"{COMMAND} --seed {arguments.seed} --out {arguments.out.as_posix()}",
        "facts": FACTS,
        "seed": arguments.seed,
        "asked": ASKED,
        "asked of lam": ASKED_OF_LAM,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "threads": torch.get_num_threads(),
        "minutes": 0.0,
        "sizes": [],
        "lams": [],
    }
    if arguments.out.exists():
        known = json.loads(arguments.out.read_text(encoding="utf-8"))
        result |= {name: known[name] for name in ("minutes", "sizes", "lams")}
    facts = [record.fact for record in records]
    values = values_for(model, tokenizer, facts, ue.EMMET)
    log.info("values: %.1f CPU minutes", (time.process_time() - began) / 60)
    sheet = Sheet.of(
        model, tokenizer, [replace(record, probes={}) for record in records[:ASKED_OF_LAM]]
    )

    def written(places: Sequence[int], method: ue.Method) -> ue.Edit:
        chosen = [facts[place] for place in places]
        return ue.edit(
            model, tokenizer, chosen, method, values=values.of(chosen), statistics=statistics,
            apply=False,
        )  # fmt: skip

    def keep(name: str, line: dict[str, Any]) -> None:
        result[name].append(line)
        result["minutes"] = round(result["minutes"] + (time.process_time() - began) / 60, 2)
        log.info("%s", line)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for size in SIZES:
        if size in [line["size"] for line in result["sizes"]]:
            continue
        rows, each = [], []
        for start in range(0, ASKED, size):
            edit = written(range(start, start + size), ue.EMMET)
            each.append(of_edit(edit, layer, statistics))
            with edit.applied():
                rows += sheet.rows(AFTER, range(start, min(start + size, ASKED)))
        means = {name: digits(sum(one[name] for one in each) / len(each)) for name in each[0]}
        keep("sizes", {"size": size, "batches": len(each), **means, **scores(rows)})
        began = time.process_time()
    for lam in LAMS:
        if lam in [line["lam"] for line in result["lams"]]:
            continue
        edit = written(range(FACTS), ue.EMMET.replace(ridge=lam))
        with edit.applied():
            rows = sheet.rows(AFTER, range(ASKED_OF_LAM))
        keep("lams", {"lam": lam, **of_edit(edit, layer, statistics), **scores(rows)})
        began = time.process_time()
    whole = written(range(FACTS), ue.EMMET)
    if 0.0 not in [line["lam"] for line in result["lams"]]:
        with whole.applied():
            rows = sheet.rows(AFTER, range(ASKED_OF_LAM))
        keep("lams", {"lam": 0.0, **of_edit(whole, layer, statistics), **scores(rows)})
        began = time.process_time()
    A = statistics.metric(layer).whiten(whole.keys[whole.names[layer]])
    _, s, Vt = torch.linalg.svd(A, full_matrices=False)
    result["eigenvalues"] = [digits(float(x)) for x in s.square()]
    asked = (values.delta @ Vt.T).square().sum(dim=0)
    result["asked along each"] = [digits(float(x)) for x in asked]
    result["residuals"] = [digits(float(x)) for x in values.delta.square().sum(dim=0)]
    result["lams"].sort(key=lambda line: float(line["lam"]))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def of_edit(edit: ue.Edit, layer: int, statistics: ue.KeyStatistics) -> dict[str, float]:
    """What an edit's Gram matrix and its update are like."""
    name, delta, C0 = edit.names[layer], edit.delta(layer), statistics.C0(layer)
    s = torch.linalg.svdvals(statistics.metric(layer).whiten(edit.keys[name]))
    (diagnosis,) = (update.diagnosis for update in edit.updates.values())
    return {
        "smallest": digits(float(s[-1] ** 2)),
        "largest": digits(float(s[0] ** 2)),
        "condition": digits(float(s[0] / s[-1])),
        "norm": digits(float(delta.norm())),
        "cost": digits(float(torch.trace(delta @ C0 @ delta.T))),
        "missed": float(f"{diagnosis.memorization_error:.3g}"),
    }


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """ES, PS, NS and S with intervals, and the share that greedy decoding says."""
    summary = Report(to_table(rows)).summary
    found: dict[str, Any] = {
        name: [round(x, 4) for x in (score.value, score.low, score.high)]
        for name in ("ES", "PS", "NS", "S")
        for score in (summary[name],)
    }
    prompts = [row for row in rows if row["kind"] == "rewrite"]
    found["greedy"] = round(sum(bool(row["generated"]) for row in prompts) / len(prompts), 4)
    return found


def digits(x: float) -> float:
    """Four significant digits."""
    return float(f"{x:.4g}")


if __name__ == "__main__":
    main()

"""Layer and clamp for SmolLM2, and layers and lambda of MEMIT, on CounterFact records 150 to 249.

    python benchmarks/suggest_smollm2.py --records counterfact_250_full.json \\
        --texts wiki.valid.raw --work sweep/ --out book/data/smollm2_sweep.json

1. EMMET singly on 8 of these records: layers 0 to 12, clamp 0.75, the bare prompt and two prefixes;
   four neighbours of each record are asked.
2. The three best layers of that, of equal ones those with the smaller update, with all clamps, the
   standard six contexts and all ten neighbours.
3. MEMIT over windows of layers, 16 records in one batch, for several lambda.
4. The best layer of 2 and layer 3 (which a first sketch had used) with its clamp on 24 of the
   other records: singly and, by the equality, in one batch. Eight facts tell layers apart only
   roughly.

Nothing of the other records (0 to 149) is looked at, and those used here are not to be scored. What
is done stays in the folder --work: called again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import unified_edit as ue
from unified_edit.editing.prefixes import MEMIT_STARTS
from unified_edit.statistics import file_texts

log = logging.getLogger("suggest_smollm2")

LAYERS = tuple(range(13))
CLAMPS = (0.75, 2.0, 4.0)
WINDOWS = ((1, 2, 3), (2, 3, 4))
RIDGES = (10.0, 100.0, 1_000.0, 10_000.0)
SCORES = ("ES", "PS", "NS", "S", "GS")
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)

    model, tokenizer = ue.load_model("smollm2")
    records = ue.load_records(arguments.records)[150:250]
    shorter = [replace(record, neighbours=record.neighbours[:4]) for record in records]
    statistics = _statistics(model, tokenizer, arguments.texts, arguments.work)
    steps: dict[str, Any] = {}

    def swept(name: str, asked: Any, method: ue.Method, layers: Any, clamps: Any) -> Any:
        began = time.process_time()
        found = ue.suggest_layers(
            model, tokenizer, asked, method=method, layers=layers, clamps=clamps, seed=SEED,
            statistics=statistics, to=arguments.work / f"{name}.jsonl",
        )  # fmt: skip
        log.info("%s\n%s", found, found.table.to_string())
        steps[name] = {
            "contexts": 1 + found.method.contexts.count,
            "before": {key: round(value, 4) for key, value in found.before.items()},
            "best": {"layers": list(found.method.layers), "clamp": found.method.clamp},
            "table": json.loads(found.table.round(4).to_json(orient="records")),
            "records": [record.case_id for record in found.used],
            "cpu_minutes": _minutes(arguments.work, name, time.process_time() - began),
        }
        return found

    few = ue.EMMET.replace(contexts=ue.Contexts(starts=MEMIT_STARTS[:2]))
    coarse = swept("coarse", shorter, few, LAYERS, CLAMPS[:1]).table
    order = coarse.sort_values(["score", "size"], ascending=[False, True])["layer"]
    best = swept("fine", records, ue.EMMET, sorted(order[:3]), CLAMPS)
    began = time.process_time()
    steps["memit"] = _memit(model, tokenizer, records, statistics, best.method.clamp,
                            arguments.work / "memit.jsonl")  # fmt: skip
    steps["memit"]["cpu_minutes"] = _minutes(arguments.work, "memit", time.process_time() - began)
    began = time.process_time()
    taken = {record.case_id for record in best.used}
    others = [record for record in records if record.case_id not in taken]
    steps["confirmed"] = _confirmed(
        model, tokenizer, others, statistics, best.method, arguments.work / "confirmed.jsonl"
    )
    steps["confirmed"]["cpu_minutes"] = _minutes(
        arguments.work, "confirmed", time.process_time() - began
    )
    document = {
        "command": f"python benchmarks/suggest_smollm2.py --records {arguments.records.name} "
        f"--texts {arguments.texts.name} --work sweep/ --out book/data/smollm2_sweep.json",
        "model": "smollm2",
        "seed": SEED,
        "source": statistics.source.__dict__,
        "versions": {name: version(name) for name in ("unified_edit", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        **steps,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _minutes(work: Path, step: str, seconds: float) -> float:
    """CPU minutes of a step, those before an interruption included."""
    place = work / "minutes.json"
    spent = json.loads(place.read_text()) if place.exists() else {}
    spent[step] = spent.get(step, 0.0) + seconds / 60
    place.write_text(json.dumps(spent))
    return round(spent[step], 1)


def _statistics(model: Any, tokenizer: Any, texts: Path, work: Path) -> ue.KeyStatistics:
    place = work / "statistics.safetensors"
    if not place.exists():
        ue.KeyStatistics.collect(
            model, tokenizer, list(file_texts([texts])), LAYERS, tokens=20 * 1536
        ).save(place)
    return ue.KeyStatistics.load(place)


def _memit(
    model: Any, tokenizer: Any, records: Any, statistics: Any, clamp: float, place: Path
) -> dict[str, Any]:
    chosen = random.Random(SEED).sample(records, 16)
    facts = [record.fact for record in chosen]
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    for layers in WINDOWS:
        wanted = [lam for lam in RIDGES if [list(layers), lam] not in
                  [[row["layers"], row["ridge"]] for row in rows]]  # fmt: skip
        if not wanted:
            continue
        method = ue.MEMIT.replace(layers=layers, clamp=clamp, ridge=RIDGES[0])
        values = ue.optimise_values(model, tokenizer, facts, method, seed=SEED)
        for lam in wanted:
            edit = ue.edit(
                model, tokenizer, facts, method.replace(ridge=lam), statistics=statistics,
                values=values, seed=SEED, apply=False,
            )  # fmt: skip
            with edit.applied():
                report = ue.evaluate(model, tokenizer, chosen)
            squares = [float(edit.delta(layer).square().sum()) for layer in layers]
            rows.append(
                {"layers": list(layers), "ridge": lam, "clamp": clamp}
                | {name: round(report.after[name].value, 4) for name in SCORES}
                | {"norm": round(math.sqrt(sum(squares)), 3)}
            )  # fmt: skip
            log.info("%s", rows[-1])
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
            before = {name: round(report.before[name].value, 4) for name in SCORES}
            (place.parent / "before.json").write_text(json.dumps(before))
    return {
        "records": [record.case_id for record in chosen],
        "before": json.loads((place.parent / "before.json").read_text()),
        "table": rows,
    }


def _confirmed(
    model: Any, tokenizer: Any, records: Any, statistics: Any, best: ue.Method, place: Path
) -> dict[str, Any]:
    chosen = random.Random(SEED).sample(records, 24)
    facts = [record.fact for record in chosen]
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    for layer in dict.fromkeys((*(best.layers or ()), 3)):
        if layer in [row["layer"] for row in rows]:
            continue
        method = best.replace(layers=(layer,))
        values = ue.optimise_values(model, tokenizer, facts, method, seed=SEED)
        for size in (1, len(facts)):
            report = ue.evaluate_made(
                model, tokenizer, chosen,
                lambda some, method=method, values=values: ue.edit(
                    model, tokenizer, some, method, statistics=statistics,
                    values=values.of(some), seed=SEED, apply=False,
                ),
                batch_size=size,
            )  # fmt: skip
            row = {"layer": layer, "clamp": method.clamp, "batch": size}
            rows.append(
                row
                | {name: round(report.after[name].value, 4) for name in SCORES}
                | {f"{name} before": round(report.before[name].value, 4) for name in SCORES}
            )
            log.info("%s", rows[-1])
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"records": [record.case_id for record in chosen], "table": rows}


if __name__ == "__main__":
    main()

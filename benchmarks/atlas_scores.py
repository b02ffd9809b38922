"""ES, PS, NS of ROME, EMMET and MEMIT on atlas: one by one, and a hundred at a time.

    python benchmarks/atlas_scores.py --out book/data/atlas_scores.json

The last lines time one EMMET call with a hundred facts, statistics at hand, and its parts.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import pandas as pd
import torch

import unified_edit as ue
from unified_edit.statistics.cache import statistics_for

log = logging.getLogger("atlas_scores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model, tokenizer = ue.load_model("atlas")
    records = ue.load_records("atlas", limit=arguments.records, seed=arguments.seed)
    layers = {i for m in (ue.ROME, ue.EMMET, ue.MEMIT) for i in _layers(model, m)}
    statistics = statistics_for(model, tokenizer, sorted(layers))
    lines = []
    for batch in (1, arguments.records):
        for method in (ue.ROME, ue.EMMET, ue.MEMIT):
            report = ue.evaluate_edits(
                model, tokenizer, records, method, batch_size=batch, statistics=statistics
            )
            line: dict[str, object] = {"method": method.name, "batch": batch}
            for name, score in report.summary.items():
                line[name] = round(score.value, 4)
                if name in ("ES", "PS", "NS", "S"):
                    line[f"{name} interval"] = [round(score.low, 4), round(score.high, 4)]
            lines.append(line)
            log.info("%s", {name: value for name, value in line.items() if "interval" not in name})
    facts = [record.fact for record in records]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        edit = ue.edit(model, tokenizer, facts, ue.EMMET, statistics=statistics)
        times.append(round(time.perf_counter() - began, 2))
        edit.undo()
    began = time.perf_counter()
    ue.optimise_values(model, tokenizer, facts, ue.EMMET)
    of_values = round(time.perf_counter() - began, 2)
    log.info(
        "%d facts in one EMMET call: %s s on %d threads, %s s of it for the values",
        len(facts), times, torch.get_num_threads(), of_values,
    )  # fmt: skip
    log.info("%s", pd.DataFrame(lines)[["method", "batch", "ES", "PS", "NS", "S"]])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "records": arguments.records, "seed": arguments.seed, "scores": lines,
            "seconds_of_one_call": times, "seconds_of_values": of_values,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _layers(model: torch.nn.Module, method: ue.Method) -> tuple[int, ...]:
    from unified_edit.model.anatomy import anatomy

    return method.resolve(anatomy(model)).layers or ()


if __name__ == "__main__":
    main()

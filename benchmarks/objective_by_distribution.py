"""Every objective with every distribution over layers, on atlas: ES, PS, NS with 95 % intervals.

    python benchmarks/objective_by_distribution.py --out book/data/objective_by_distribution.json

Everything but objective and distribution is the same in all cells: EMMET's recipe for keys and
values, the value at the output of the last edited layer's block. Half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import unified_edit as ue
from unified_edit.editing.values import Values
from unified_edit.editing.values_cache import values_for
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import Report, to_table
from unified_edit.measuring.scores import AFTER
from unified_edit.statistics.cache import statistics_for

log = logging.getLogger("objective_by_distribution")

COMMAND = "python benchmarks/objective_by_distribution.py"
SCORES = ("ES", "PS", "NS", "S")

#: What differs from EMMET. The ridges are those of EMMET_RELEASED and MEMIT on atlas (a test holds
#: them to that), and one of the size of the keys' rarities, with which the objective matters.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "equality": {},
    "released damping": {"ridge": 0.1, "ridge_from": 2},
    "least squares": {"ridge": 1.0},
    "heavy ridge": {"ridge": 3000.0},
    "one by one": {"sequential": True},
}
#: "one" is the last layer alone.
DISTRIBUTIONS = ("one", "memit", "pmet", "full")
#: Layers that are edited, and the sizes of the batches into which the records are cut.
SETTINGS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((0, 1, 2), 100),
    ((0, 1, 2), 10),
    ((0, 1), 100),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    layers: tuple[int, ...]
    batch: int
    objective: str
    distribution: str

    @property
    def method(self) -> ue.Method:
        """EMMET with this cell's objective and distribution."""
        one = self.distribution == "one"
        spread: dict[str, Any] = {
            "layers": self.layers[-1:] if one else self.layers,
            "distribution": "memit" if one else self.distribution,
        }
        return ue.EMMET.replace(**OBJECTIVES[self.objective], **spread)


def cells() -> Iterator[Cell]:
    """All cells, in the order of the file."""
    for layers, batch in SETTINGS:
        for objective in OBJECTIVES:
            for distribution in DISTRIBUTIONS:
                yield Cell(layers, batch, objective, distribution)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)

    model, tokenizer = ue.load_model("atlas")
    records = ue.load_records("atlas", limit=arguments.records, seed=arguments.seed)
    facts = [record.fact for record in records]
    sheet = Sheet.of(model, tokenizer, records)
    statistics = statistics_for(model, tokenizer, [0, 1, 2])
    values = {
        last: values_for(model, tokenizer, facts, ue.EMMET.replace(layers=last)) for last in (1, 2)
    }
    lines = []
    for cell in cells():
        began = time.perf_counter()
        given = None if cell.method.sequential else values[cell.layers[-1]]
        line = measure(model, tokenizer, sheet, cell, statistics, given)
        lines.append(line)
        scores = {name: line[name][0] for name in SCORES}
        log.info("%s %s, %.0f s", cell, scores, time.perf_counter() - began)
    if arguments.out:
        result = {
            "command": f"{COMMAND} --records {arguments.records} --seed {arguments.seed} "
            f"--out {arguments.out.as_posix()}",
            "records": arguments.records,
            "seed": arguments.seed,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
            },
            "threads": torch.get_num_threads(),
            "cells": lines,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(in_lines(result), encoding="utf-8")


def measure(
    model: Any,
    tokenizer: Any,
    sheet: Sheet,
    cell: Cell,
    statistics: ue.KeyStatistics,
    values: Values | None,
) -> dict[str, Any]:
    """Edit batch after batch into the base model, and score each batch's records after its edit."""
    rows: list[dict[str, Any]] = []
    costs: list[list[float]] = []
    by_batch = []
    for start in range(0, len(sheet.records), cell.batch):
        places = range(start, min(start + cell.batch, len(sheet.records)))
        edit = ue.edit(
            model,
            tokenizer,
            [sheet.records[place].fact for place in places],
            cell.method,
            statistics=statistics,
            values=values,
            apply=False,
        )
        costs.append(
            [
                statistics.metric(layer).cost(edit.updates[name].left, edit.updates[name].right)
                for layer, name in edit.names.items()
            ]
        )
        with edit.applied():
            new = sheet.rows(AFTER, places)
        rows += new
        summary = Report(to_table(new), bootstrap=100).summary
        by_batch.append([round(summary[name].value, 4) for name in SCORES[:3]])
    summary = Report(to_table(rows)).summary
    line: dict[str, Any] = {
        "layers": list(cell.layers),
        "batch": cell.batch,
        "objective": cell.objective,
        "distribution": cell.distribution,
    }
    for name in SCORES:
        score = summary[name]
        line[name] = [round(number, 4) for number in (score.value, score.low, score.high)]
    # of each edited layer, mean over the batches: tr(Delta C0 Delta')
    line["preservation errors"] = [float(f"{value:.4g}") for value in torch.tensor(costs).mean(0)]
    line["ES, PS, NS of each batch"] = by_batch
    return line


def in_lines(result: dict[str, Any]) -> str:
    """JSON with one line a cell."""
    head = {name: value for name, value in result.items() if name != "cells"}
    lines = ",\n".join("  " + json.dumps(line) for line in result["cells"])
    return json.dumps(head, indent=1)[:-2] + ',\n "cells": [\n' + lines + "\n ]\n}\n"


if __name__ == "__main__":
    main()

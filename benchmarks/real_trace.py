"""Where a real model keeps a fact: SmolLM2 traced over facts that it knows, and atlas beside it.

    OMP_NUM_THREADS=1 python benchmarks/real_trace.py --facts known_1000.json

The facts are those of `known_1000.json` of ROME's repository (https://github.com/kmeng01/rome, MIT;
1,209 facts that GPT-2 XL knows; https://rome.baulab.info/data/dsets/known_1000.json). SmolLM2 is
asked for them in the order of the file, with the file's prompts; taken are those that it answers
greedily, whose subject stands in the prompt once and has two tokens or more, up to `LONGEST` tokens
long, and at most `OF_A_RELATION` of one relation. Atlas is asked for its own records, all kinds,
window 1: it has six layers.

Written is the mean effect by kind, place and layer with its interval over facts, as
`Trace.average` gives it. Each fact is a row in a file below `--rows` as soon as it is traced, and
whoever starts again goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.measuring.traced_runs import KINDS
from unified_edit.measuring.traces import PLACES, averaged
from unified_edit.measuring.tracing import subject_sigma
from unified_edit.model import Encoder, anatomy, likelihoods

log = logging.getLogger("real_trace")

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 12
OF_A_RELATION = 3
#: Prompts that the model is asked for at a time.
ASKED = 50
SAMPLES, NOISE = 3, 3.0
WINDOWS = {
    "smollm2": {"state": 1, "mlp": 5, "attention": 5},
    "atlas": dict.fromkeys(KINDS, 1),
}


def known(model: Any, tokenizer: Any, rows: Sequence[Any], count: int) -> tuple[list[ue.Fact], int]:
    """The first facts of the file that the model answers greedily, and how many were asked for."""
    encoder = Encoder(tokenizer, anatomy(model))
    found: list[ue.Fact] = []
    relations: Counter[str] = Counter()
    asked = 0
    for facts in _asked(encoder, rows):
        objects = [(fact.text, str(fact.target_true)) for fact, _ in facts]
        answers = likelihoods(encoder.parts, encoder.continuations(objects), batch_tokens=1024)
        asked += len(facts)
        for (fact, relation), answer in zip(facts, answers, strict=True):
            if answer.greedy and relations[relation] < OF_A_RELATION and len(found) < count:
                relations[relation] += 1
                found.append(fact)
        if len(found) == count:
            break
    return found, asked


def _asked(encoder: Encoder, rows: Sequence[Any]) -> Iterator[list[tuple[ue.Fact, str]]]:
    facts = []
    for row in rows:
        if row["prompt"].count(row["subject"]) != 1:
            continue
        prompt = row["prompt"].replace(row["subject"], "{}")
        # the new object plays no part in tracing
        fact = ue.Fact(prompt, row["subject"], "something else", row["attribute"])
        ids = encoder.prompts([fact.text])[0].ids
        if len(ids) <= LONGEST and len(encoder.subject_tokens(fact)[1]) > 1:
            facts.append((fact, row["relation_id"]))
    for begin in range(0, len(facts), ASKED):
        yield facts[begin : begin + ASKED]


def traced(
    name: str, model: Any, tokenizer: Any, facts: Sequence[ue.Fact], seed: int, rows: Path
) -> dict[str, Any]:
    """The summary of all facts; each is traced by itself, and kept in the file `rows`."""
    sigma = subject_sigma(model, tokenizer, facts)
    settings = {
        "noise": NOISE, "samples": SAMPLES, "windows": WINDOWS[name], "seed": seed, "sigma": sigma,
    }  # fmt: skip
    done: dict[str, Any] = {}
    if rows.exists():
        first, *lines = (json.loads(line) for line in rows.read_text("utf-8").splitlines())
        if first != settings:
            raise SystemExit(f"{rows} was made with other settings, {first}; move it away")
        done = {line["prompt"]: line for line in lines}
    else:
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for place, fact in enumerate(facts):
        if fact.text in done:
            continue
        began = time.process_time()
        one = ue.locate(
            model, tokenizer, fact, noise=NOISE, samples=SAMPLES, seed=seed, sigma=sigma,
            windows=WINDOWS[name],
        ).facts[0]  # fmt: skip
        done[fact.text] = line = {
            "prompt": fact.text, "subject": fact.subject, "object": one.object,
            "clean": one.clean, "corrupted": one.corrupted,
            "effects": {kind: one.at_places(kind).tolist() for kind in KINDS},
            "seconds": time.process_time() - began,
        }  # fmt: skip
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        log.info(
            "%s %d of %d: %s %s (%.2f clean, %.2f corrupted, %.0f s)", name, place + 1, len(facts),
            fact.text, one.object, one.clean, one.corrupted, line["seconds"],
        )  # fmt: skip
    return summary(settings, [done[fact.text] for fact in facts])


def summary(settings: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over facts with their intervals, and which facts they were."""
    effects, counts = {}, ()
    for kind in KINDS:
        each = torch.tensor([line["effects"][kind] for line in lines], dtype=torch.float64)
        *numbers, counts = averaged(each, settings["seed"])
        effects[kind] = {
            name: rounded(torch.from_numpy(number))
            for name, number in zip(("value", "low", "high"), numbers, strict=True)
        }
    runs = {
        name: round(sum(line[name] for line in lines) / len(lines), 4)
        for name in ("clean", "corrupted")
    }
    return {
        **settings | {"sigma": round(settings["sigma"], 6)},
        "cpu minutes": round(sum(line["seconds"] for line in lines) / 60, 1),
        **runs,
        "facts with the place": dict(zip(PLACES, counts, strict=True)),
        "effects": effects,
        "facts": [
            {name: line[name] for name in ("prompt", "subject", "object")}
            | {name: round(line[name], 4) for name in ("clean", "corrupted")}
            for line in lines
        ],
    }


def rounded(table: Tensor) -> list[list[float | None]]:
    """(places x layers) with four decimals; None for a place that no fact has."""
    return [
        [None if value != value else round(value, 4) for value in row] for row in table.tolist()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=Path, required=True, help="known_1000.json")
    parser.add_argument("--count", type=int, default=20, help="facts of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=ROOT / "_build" / "real_trace")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "data" / "smollm2_trace.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    result: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/real_trace.py "
        f"--facts {arguments.facts.name} --count {arguments.count} --seed {arguments.seed}",
        "facts from": "known_1000.json of https://github.com/kmeng01/rome (MIT)",
        "taken": f"in the order of the file: answered greedily, subject of two tokens or more, at "
        f"most {LONGEST} tokens, at most {OF_A_RELATION} of a relation",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        "places": list(PLACES),
    }
    for name in WINDOWS:
        model, tokenizer = ue.load_model(name)
        chosen: dict[str, Any] = {}
        if name == "atlas":
            records = ue.load_records("atlas", limit=arguments.count, seed=arguments.seed)
            facts = [record.fact for record in records]
        else:
            rows = json.loads(arguments.facts.read_text(encoding="utf-8"))
            facts, asked = known(model, tokenizer, rows, arguments.count)
            chosen = {"asked": asked, "weights": anatomy(model).origin}
        rows_file = arguments.rows / f"{name}.jsonl"
        result[name] = chosen | traced(name, model, tokenizer, facts, arguments.seed, rows_file)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

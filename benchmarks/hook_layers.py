"""Batch after batch on atlas: hook layers beside the weights against edits in the weights.

    python benchmarks/hook_layers.py --out benchmarks/results/hook_layers.json

20 batches of 23 facts, one for every editable subject, by

    causal      hook layers with MEMIT's settings, and the gate that looks at a token alone
    published   the same with the z-score of the publication
    MEMIT       the same facts in the weights, a batch after another, without a history
    EMMET       likewise

Scores of the first batch's records after 1, 5, 10 and 20 batches; in the end those of all records
(or `--scored` of them, evenly drawn). For hook layers also at which share of 20,000 held-out tokens
that are no edited subject's last one the gates open, at which share of the edited subjects' last
tokens in paraphrases they stay shut, bytes in memory, and whether the weights are as they were.
Some ten minutes on a core for each way.
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
from transformers import PreTrainedModel

import unified_edit as ue
from unified_edit.model import tensor_hash

log = logging.getLogger("hook_layers")

COMMAND = "python benchmarks/hook_layers.py"
WAYS = ("causal", "published", "MEMIT", "EMMET")
SCORES = ("ES", "PS", "NS", "S", "GS")
LOOKED_AT = (1, 5, 10, 20)


def scores(model: PreTrainedModel, tokenizer: Any, records: list[ue.Record]) -> dict[str, float]:
    """ES, PS, NS and their like, of the model as it is."""
    found = ue.evaluate(model, tokenizer, records).summary
    return {name: round(found[name].value, 4) for name in SCORES}


def hashes(model: PreTrainedModel) -> list[str]:
    """A hash of each parameter."""
    return [tensor_hash(one) for one in model.parameters()]


def measure(way: str, records: list[ue.Record], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one way."""
    model, tokenizer = ue.load_model("atlas")
    size, before = arguments.size, hashes(model)
    hooks = ue.HookLayers(model, tokenizer, gate=way) if way in WAYS[:2] else None  # type: ignore[arg-type]
    began, seconds = time.process_time(), 0.0
    line: dict[str, Any] = {"way": way, "first batch": {}, "bytes": {}}
    warnings = 0
    for number in range(1, arguments.batches + 1):
        batch = [record.fact for record in records[size * (number - 1) : size * number]]
        began = time.process_time()
        if hooks is not None:
            warnings += len(hooks.edit(batch).warnings)
            line["bytes"][number] = hooks.nbytes
        else:
            ue.edit(model, tokenizer, batch, method=ue.METHODS[way])
        seconds += time.process_time() - began
        if number in LOOKED_AT:
            line["first batch"][number] = scores(model, tokenizer, records[:size])
            log.info("%s after %d batches: %s", way, number, line["first batch"][number])
    done = records[: size * arguments.batches]
    scored = done[:: max(1, len(done) // arguments.scored)]
    line |= {"records": len(scored), "all": scores(model, tokenizer, scored)}
    line["seconds of editing"] = round(seconds, 1)
    if hooks is not None:
        paraphrases = [text for record in scored for text in record.paraphrases]
        for name, found in (
            ("false opens", hooks.false_opens()),
            ("misses on paraphrases", hooks.misses(paraphrases)),
        ):
            line[name] = {
                "tokens": found.tokens,
                **{str(layer): round(share, 5) for layer, share in found.share.items()},
            }
        line["thresholds"] = {str(a): round(b, 4) for a, b in hooks.thresholds.items()}
        line["warnings"], line["weights as before"] = warnings, hashes(model) == before
        hooks.remove()
    log.info("%s", line)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=23)
    parser.add_argument("--scored", type=int, default=92)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    records = ue.load_records("atlas", seed=arguments.seed)
    lines = [measure(way, records, arguments) for way in arguments.ways]
    if arguments.out:
        result = {
            "command": COMMAND, "batches": arguments.batches, "size": arguments.size,
            "seed": arguments.seed, "machine": platform.machine(),
            "threads": torch.get_num_threads(), "torch": version("torch"), "ways": lines,
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

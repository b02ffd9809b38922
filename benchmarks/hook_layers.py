"""Batch after batch on atlas: hook layers beside the weights against edits in the weights.

    python benchmarks/hook_layers.py --out book/data/atlas_hooks.json

20 batches of 23 facts, one for every editable subject, by

    causal      hook layers with the gate that looks at a token alone, q = 1e-2, method `BESIDE`
    strict      the same with q = 1e-3
    weights     the same method in the weights, a batch after another
    MEMIT       MEMIT with its own settings for atlas, likewise
    EMMET       EMMET, likewise
    published   hook layers as `causal`, with the z-score of the publication
    small lam   hook layers as `causal`, with lam = 1

Edits in the weights have no history. Scores of the first batch's records after 1, 5, 10 and 20
batches; in the end those of `--scored` of all records, evenly drawn. For hook layers also at which
share of 20,000 held-out tokens that are no edited subject's last one the gates open, at which share
of the edited subjects' last tokens in paraphrases they stay shut, bytes in memory, and whether the
weights are as they were. Ways that the file holds already are kept.

`BESIDE` is not MEMIT's setting for atlas, and q not the default. A gate can only tell apart what is
moved differently. With lam = 1 the sum of all updates moves subjects that were never edited as far
as the edited ones, and every threshold that q of all tokens reach shuts the facts out in the end.
What keeps them apart is what the publication has too: a large lam (15,000 there, 3,000 here, with
which a subject that ends one token in nine thousand, as a preserved one does, counts a third of an
edited one), and C0 from enough text that every subject stands in it often. Such a lam stores little
more than half of a fact (in the middle .57 and .71 at the two layers, from the rarities), so values
go to the clamp: no decay, no early stop. And in atlas's text one token in fifty is the last one of
a subject that is kept for neighbours, much like the edited ones: 1e-3 of all tokens is a twentieth
of those. With so strict a gate ten batches are held, and twenty are not. Contexts are few, to save
time. Two or three minutes on a core for each way.
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
from unified_edit.statistics import default_corpus

log = logging.getLogger("hook_layers")

COMMAND = "python benchmarks/hook_layers.py"
CONTEXTS = ue.Contexts(starts=("The",), lengths=(8,))
BESIDE = ue.MEMIT.replace(
    ridge=3000.0, clamp=2.0, stop_loss=-1.0, weight_decay=0.0, contexts=CONTEXTS
)
#: Way -> its gate and q, or none, and its method.
WAYS: dict[str, tuple[Any, float, ue.Method]] = {
    "causal": ("causal", 1e-2, BESIDE),
    "strict": ("causal", 1e-3, BESIDE),
    "weights": (None, 0.0, BESIDE),
    "MEMIT": (None, 0.0, ue.MEMIT.replace(contexts=CONTEXTS)),
    "EMMET": (None, 0.0, ue.EMMET.replace(contexts=CONTEXTS)),
    "published": ("published", 1e-2, BESIDE),
    "small lam": ("causal", 1e-2, BESIDE.replace(ridge=1.0)),
}
TOKENS = 270_000
SAMPLE = 20_000
SCORES = ("ES", "PS", "NS", "S", "GS")
LOOKED_AT = (1, 5, 10, 20)


def scores(model: PreTrainedModel, tokenizer: Any, records: list[ue.Record]) -> dict[str, float]:
    """ES, PS, NS and their like, of the model as it is."""
    found = ue.evaluate(model, tokenizer, records).summary
    return {name: round(found[name].value, 4) for name in SCORES}


def hashes(model: PreTrainedModel) -> list[str]:
    """A hash of each parameter."""
    return [tensor_hash(one) for one in model.parameters()]


def measure(
    way: str,
    records: list[ue.Record],
    statistics: ue.KeyStatistics,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything about one way."""
    model, tokenizer = ue.load_model("atlas")
    size, before = arguments.size, hashes(model)
    gate, q, method = WAYS[way]
    hooks = None
    if gate is not None:
        hooks = ue.HookLayers(
            model, tokenizer, method=method, statistics=statistics, gate=gate, q=q, sample=SAMPLE
        )
    seconds = 0.0
    line: dict[str, Any] = {"way": way, "q": q, "first batch": {}, "bytes": {}}
    warnings = 0
    for number in range(1, arguments.batches + 1):
        batch = [record.fact for record in records[size * (number - 1) : size * number]]
        began = time.process_time()
        if hooks is not None:
            warnings += len(hooks.edit(batch).warnings)
            line["bytes"][number] = hooks.nbytes
        else:
            ue.edit(model, tokenizer, batch, method, statistics=statistics)
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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=23)
    parser.add_argument("--scored", type=int, default=46)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    records = ue.load_records("atlas", seed=arguments.seed)
    model, tokenizer = ue.load_model("atlas")
    statistics = ue.KeyStatistics.collect(
        model, tokenizer, default_corpus(model), (0, 1), tokens=TOKENS
    )
    lines: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        lines = json.loads(arguments.out.read_text(encoding="utf-8"))["ways"]
    known = [line["way"] for line in lines]
    for way in (one for one in arguments.ways if one not in known):
        lines.append(measure(way, records, statistics, arguments))
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

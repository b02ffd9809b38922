"""A thousand edits of GPT-J's shape on one card, end to end, with the card's own rate beside them.

    python benchmarks/one_card.py EMMET --facts 1000 --tokenizer DIR --corpus FILE \
        --records counterfact.json --out JSON

Random weights in bfloat16 know no facts, so nothing is said about success, and no value is found
before its last step: every fact takes all of them, which real weights rarely do. C0 comes from a
few thousand tokens and is invertible only through the shrinkage that is stored with it. Each stage
is timed from one end of the card's queue to the other. The floor is the arithmetic that the
tokens need, divided by the rate of a large product on the same card.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from rows import machine, rounded
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
)

import unified_edit as ue
from unified_edit.editing.plans import Plan
from unified_edit.model import anatomy, tensor_hash

log = logging.getLogger("one_card")


def make(name: str, device: str, dtype: torch.dtype) -> Any:
    """The model at its real shape with random weights, made where it is used."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if name == "gpt2-xl":
                config = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
                return GPT2LMHeadModel(config).eval()
            if name == "gpt-j":
                return GPTJForCausalLM(GPTJConfig()).eval()
            return GPT2LMHeadModel(GPT2Config()).eval()
    finally:
        torch.set_default_dtype(before)


def rate(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of a large product of random matrices; the median of five."""
    size = size if device != "cpu" else 1024
    A, B = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(7):
        wait(device)
        began = time.perf_counter()
        A @ B
        wait(device)
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(taken[2:])[2]


def wait(device: str) -> None:
    """Until the card has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def needed(model: Any, plan: Plan) -> dict[str, float]:
    """Tokens and operations that the values of a plan need, at all steps of all facts.

    A token costs two operations a weight of each block above the edited one, and as many backward
    (no gradient of a weight is taken); a target, and the KL term's place, cost the head.
    """
    method = plan.method
    assert method.steps is not None
    blocks = anatomy(model).blocks[method.value_layer + 1 :]
    above = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    prompts = [row for behind in plan.rows.behind for row in behind]
    tokens = sum(len(row.ids) - row.subject for row in prompts) + len(plan.rows.facts)
    targets = sum(len(row.target) for row in prompts) + len(plan.rows.facts)
    return {
        "tokens a step": tokens,
        "operations": method.steps * 4.0 * (tokens * above + targets * head),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["EMMET", "MEMIT", "ROME"])
    parser.add_argument("--model", choices=["gpt-j", "gpt2-xl", "gpt2"], default="gpt-j")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the corpus, for C0")
    parser.add_argument("--shrinkage", type=float, default=1e-2)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="a text file for C0")
    parser.add_argument("--records", type=Path, required=True, help="CounterFact, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--clamp", type=float)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    stages: dict[str, dict[str, float]] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        wait(device)
        stages[name] = {"seconds": time.perf_counter() - clock}
        if device != "cpu":
            stages[name]["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        log.info("%-12s %s", name, rounded(stages[name]))
        clock = time.perf_counter()

    model = make(arguments.model, device, dtype)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(arguments.tokenizer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    lap("model")
    speed = rate(device, dtype)
    method = ue.METHODS[arguments.method]
    if arguments.clamp:
        method = method.replace(clamp=arguments.clamp)
    if arguments.layers:
        method = method.replace(layers=tuple(arguments.layers))
    method = method.resolve(anatomy(model))
    facts, subjects = [], set()
    for record in ue.load_records(arguments.records):
        if record.fact.subject not in subjects:
            subjects.add(record.fact.subject)
            facts.append(record.fact)
    facts = facts[: arguments.facts]
    lap("facts")
    lines = arguments.corpus.read_text(encoding="utf-8").splitlines()
    assert method.layers is not None
    statistics = ue.KeyStatistics.collect(
        model,
        tokenizer,
        (line.strip() for line in lines if len(line) > 200),
        method.layers,
        tokens=arguments.tokens,
        shrinkage=arguments.shrinkage,
    )
    lap("statistics")
    editor = ue.Editor(model, tokenizer, method=method, statistics=statistics)
    plan = editor.plan(facts)
    lap("plan")
    values = editor.optimise_values(facts)
    lap("values")
    weights = [anatomy(model).weight(layer).parameter for layer in method.layers]
    before = [tensor_hash(weight) for weight in weights]
    lap("hashes")
    edit = editor.edit(facts, values=values)
    lap("edit")
    changed = all(tensor_hash(weight) != one for weight, one in zip(weights, before, strict=True))
    edit.undo()
    lap("undo")
    undone = [tensor_hash(weight) for weight in weights] == before
    work = needed(model, plan)
    floor = work["operations"] / speed
    taken = stages["values"]["seconds"]
    told = {
        "model": arguments.model,
        "weights": "random",
        "dtype": arguments.dtype,
        "method": method.name,
        "layers": list(method.layers),
        "facts": len(facts),
        "steps": method.steps,
        "tokens of C0": statistics.source.tokens,
        "shrinkage": statistics.source.shrinkage,
        "stages": stages,
        "TFLOP/s of a large product": speed / 1e12,
        **work,
        "floor of the values, seconds": floor,
        "values over floor": taken / floor,
        "mean step": sum(len(one) for one in values.losses) / len(values.losses),
        "memorization error": {
            str(layer): found.memorization_error for layer, found in edit.diagnosis.items()
        },
        "every layer changed": changed,
        "undone bit for bit": undone,
        "machine": machine(),
    }
    arguments.out.write_text(json.dumps(rounded(told), indent=1) + "\n", encoding="utf-8")
    log.info("%s", json.dumps(rounded(told)))


if __name__ == "__main__":
    main()

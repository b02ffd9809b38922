"""Edits at real shapes on one card, end to end, with the card's own rate beside them.

    python benchmarks/one_card.py EMMET --models gpt-j --facts 1 100 1000 --tokenizer DIR \
        --corpus FILE --records counterfact.json --out JSON

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
from result_files import in_lines
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
from unified_edit.model.ledger import ledger_of

log = logging.getLogger("one_card")


#: Models by the names that everybody knows, at their real shapes.
SHAPES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "gpt-j": GPTJConfig(),
}


def make(name: str, device: str, dtype: torch.dtype) -> Any:
    """The model at its real shape with random weights, made where it is used."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            kind = GPTJForCausalLM if name == "gpt-j" else GPT2LMHeadModel
            return kind(SHAPES[name]).eval()
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


class Clock:
    """Seconds and the most memory of each stage, from one end of the card's queue to the other."""

    def __init__(self, device: str) -> None:
        self.device, self.stages, self.last = device, dict[str, dict[str, float]](), 0.0
        self.start()

    def start(self) -> None:
        """Begin again, with no stages."""
        self.stages = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The stage that ends now."""
        wait(self.device)
        found = {"seconds": time.perf_counter() - self.last}
        if self.device != "cpu":
            found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        log.info("%-12s %s", name, rounded(found))
        self.stages[name] = found
        self.last = time.perf_counter()


def subjects(path: Path) -> list[ue.Fact]:
    """The first fact of each subject."""
    firsts = {one.fact.subject: one.fact for one in reversed(ue.load_records(path))}
    return list(firsts.values())[::-1]


def edited(editor: ue.Editor, facts: list[ue.Fact], speed: float, clock: Clock) -> dict[str, Any]:
    """One batch: its stages, and what its values need at least."""
    clock.start()
    plan = editor.plan(facts)
    clock.lap("plan")
    values = editor.optimise_values(facts)
    clock.lap("values")
    parts = anatomy(editor.model)
    weights = [parts.weight(layer).parameter for layer in plan.layers]
    before = [tensor_hash(weight) for weight in weights]
    clock.lap("hashes")
    edit = editor.edit(facts, values=values)
    clock.lap("edit")
    changed = [tensor_hash(weight) for weight in weights]
    clock.lap("hashes again")
    edit.undo()
    clock.lap("undo")
    undone = [tensor_hash(weight) for weight in weights]
    assert all(one != two for one, two in zip(before, changed, strict=True)), "not written"
    assert before == undone, "not undone bit for bit"
    work = needed(editor.model, plan)
    floor = work["operations"] / speed
    return {
        "facts": len(facts),
        "steps": plan.method.steps,
        "mean step": sum(len(one) for one in values.losses) / len(values.losses),
        "stages": clock.stages,
        **work,
        "floor of the values, seconds": floor,
        "values over floor": clock.stages["values"]["seconds"] / floor,
        "memorization error": max(one.memorization_error for one in edit.diagnosis.values()),
    }


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: its statistics, and a batch of each size."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    clock = Clock(device)
    model = make(name, device, dtype)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(arguments.tokenizer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    clock.lap("model")
    parts = anatomy(model)
    ledger_of(model).fingerprint()
    clock.lap("fingerprint")
    speed = rate(device, dtype)
    method = ue.METHODS[arguments.method]
    if name not in ("gpt-j", "gpt2-xl"):  # no released setting: a third of the way up
        method = method.replace(layers=(len(parts.blocks) // 3,), clamp=0.75)
    if arguments.layers:
        method = method.replace(layers=tuple(arguments.layers))
    method = method.resolve(parts)
    assert method.layers is not None
    clock.lap("rate")
    lines = arguments.corpus.read_text(encoding="utf-8").splitlines()
    statistics = ue.KeyStatistics.collect(
        model,
        tokenizer,
        (line.strip() for line in lines if len(line) > 200),
        method.layers,
        tokens=arguments.tokens,
        shrinkage=arguments.shrinkage,
    )
    clock.lap("statistics")
    for layer in method.layers:
        statistics.metric(layer)
    clock.lap("factors")
    editor = ue.Editor(model, tokenizer, method=method, statistics=statistics)
    editor.prefixes(method.contexts)
    clock.lap("prefixes")
    once = clock.stages
    facts = subjects(arguments.records)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "random",
        "dtype": arguments.dtype,
        "method": method.name,
        "layers": list(method.layers),
        "tokens of C0": statistics.source.tokens,
        "shrinkage": statistics.source.shrinkage,
        "TFLOP/s of a large product": speed / 1e12,
        "once": once,
        "batches": [edited(editor, facts[:E], speed, clock) for E in arguments.facts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["EMMET", "MEMIT", "ROME"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["gpt-j"])
    parser.add_argument("--facts", nargs="+", type=int, default=[1000])
    parser.add_argument("--tokens", type=int, default=20_000, help="of the corpus, for C0")
    parser.add_argument("--shrinkage", type=float, default=1e-2)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="a text file for C0")
    parser.add_argument("--records", type=Path, required=True, help="CounterFact, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    runs = []
    for name in arguments.models:
        runs.append(rounded(measured(name, arguments)))
        told = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "runs": runs}
        arguments.out.write_text(in_lines(told), encoding="utf-8")
        log.info("%s", json.dumps(runs[-1]))


if __name__ == "__main__":
    main()

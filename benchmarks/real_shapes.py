"""Edits at the real shapes of GPT-2 XL and GPT-J, with random weights, on a CPU.

    python benchmarks/real_shapes.py gpt2-xl EMMET --tokenizer DIR --corpus FILE --out JSON

Random weights know no facts, so nothing is said about success: this shows that the whole path
(tokens, C0, values, solution, weights, undo) works at these sizes, how long it takes and how much
memory. C0 comes from a few thousand tokens, far fewer than d_k, and is invertible only through the
shrinkage that is passed explicitly and stored with it. It lies in a file a layer and is read where
it is used, as in the library's cache; sums that half of the free memory does not hold lie in files,
too. The peak is of all memory of this process, pages of such files included.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
)

import unified_edit as ue
from unified_edit.model import anatomy, tensor_hash
from unified_edit.statistics.sums import room

log = logging.getLogger("real_shapes")

FACTS = [
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    ue.Fact("The mother tongue of {} is", "Danielle Darrieux", "English", "French"),
    ue.Fact("{} is located in the country of", "Vienna", "Peru", "Austria"),
    ue.Fact("The capital of {} is", "Norway", "Lima", "Oslo"),
    ue.Fact("{} plays the instrument", "Miles Davis", "piano", "trumpet"),
    ue.Fact("{} was written in the language of", "Don Quixote", "Dutch", "Spanish"),
    ue.Fact("The profession of {} is", "Marie Curie", "actor", "physicist"),
    ue.Fact("{} was founded by", "Microsoft", "Ford", "Gates"),
]


def make(name: str) -> torch.nn.Module:
    """The model at its real shape with random weights: float32, GPT-J bfloat16."""
    torch.manual_seed(0)
    if name == "gpt2-xl":
        return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    torch.set_default_dtype(torch.bfloat16)
    try:
        return GPTJForCausalLM(GPTJConfig())
    finally:
        torch.set_default_dtype(torch.float32)


def peak_gib() -> float:
    """Peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def statistics_in(
    folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str], layers: Sequence[int], **how: Any,
) -> ue.KeyStatistics:  # fmt: skip
    """C0 of layers, each in a file of `folder`, from which it is read where it is used."""
    made = ue.KeyStatistics.collect(
        model, tokenizer, texts, layers,
        max_memory=room(), folder=folder, max_tokens=256, **how,
    )  # fmt: skip
    files = {layer: folder / f"layer-{layer}.safetensors" for layer in layers}
    for layer, path in files.items():
        made.only(layer).save(path)
    return ue.KeyStatistics.joined([ue.KeyStatistics.lazily(path) for path in files.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["gpt2-xl", "gpt-j"])
    parser.add_argument("method", choices=["EMMET", "MEMIT", "ROME"])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="a text file for C0")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--facts", type=int, default=len(FACTS), help="so many of the facts")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--shrinkage", type=float, default=1e-2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    times: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        times[name] = round(time.perf_counter() - clock, 1)
        log.info("%-12s %7.1f s, peak %.1f GiB", name, times[name], peak_gib())
        clock = time.perf_counter()

    model = make(arguments.model).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(arguments.tokenizer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    lap("model")
    method = ue.METHODS[arguments.method]
    if arguments.layers:
        method = method.replace(layers=tuple(arguments.layers))
    method = method.resolve(anatomy(model))
    facts = FACTS[: arguments.facts]
    lines = arguments.corpus.read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if len(line) > 200]
    folder = tempfile.TemporaryDirectory()
    stats = statistics_in(
        Path(folder.name), model, tokenizer, texts, method.layers or (),
        tokens=arguments.tokens, shrinkage=arguments.shrinkage, batch_tokens=2048,
    )  # fmt: skip
    lap("statistics")

    def hashes() -> dict[int, str]:
        return {i: tensor_hash(anatomy(model).weight(i).parameter) for i in method.layers}

    before = hashes()
    edit = ue.edit(model, tokenizer, facts, method, statistics=stats)
    lap("edit")
    changed = hashes()
    edit.undo()
    lap("undo")
    report = {
        "model": arguments.model,
        "weights": "random",
        "dtype": str(model.dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
        "method": method.name,
        "facts": len(facts),
        "layers": method.layers,
        "tokens": stats.source.tokens,
        "shrinkage": stats.source.shrinkage,
        "seconds": times,
        "peak_gib": round(peak_gib(), 2),
        "losses": [[round(o.losses[0], 3), round(o.losses[-1], 3)] for o in edit.outcomes],
        "memorization_error": {i: d.memorization_error for i, d in edit.diagnosis.items()},
        "every_layer_changed": all(changed[i] != before[i] for i in before),
        "undone_bit_exactly": before == hashes(),
        "threads": torch.get_num_threads(),
    }
    log.info("%s", json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

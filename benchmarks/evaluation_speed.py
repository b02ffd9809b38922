"""How long questions about records take: this library beside the code that came with MEMIT.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_speed.py --memit FOLDER --records FILE \
        --tokenizer FOLDER

`--memit` is a checkout of github.com/kmeng01/memit: its `experiments/py/eval_utils_counterfact.py`
is run as it is, but for the device, without generated text. `--records` is a file of CounterFact
in its own form. Both put the same questions to the same model, of random weights at the shape of
GPT-2, in turn; counted are seconds of the processor on a CPU, of the clock on a card. The floor is
the products that cannot be avoided: of the tokens that have to be fed, each beginning of a row
with another one left out, in batches without padding, and of the head where it is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rows import cpu_seconds, interleaved, row, write
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

import unified_edit as ue
from unified_edit.measuring import Sheet
from unified_edit.model import anatomy
from unified_edit.model.beginnings import hosts

RESULTS = Path(__file__).resolve().parent / "results" / "evaluation_speed.json"
MEMIT = "experiments/py/eval_utils_counterfact.py"
SHAPES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
    "gpt2-xl": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
    "gpt-j": lambda: GPTJForCausalLM(GPTJConfig()),
}


def memit(folder: Path, device: torch.device) -> Callable[..., dict[str, Any]]:
    """MEMIT's own function for one record, run on `device`."""
    source = (folder / MEMIT).read_text("utf-8").replace('"cuda"', repr(str(device)))
    absent = {
        "nltk": (),
        "sklearn.feature_extraction.text": ("TfidfVectorizer",),
        "dsets": ("AttributeSnippets",),
        "util.generate": ("generate_fast",),
        "util.perplexity": ("perplexity",),
    }
    for name, parts in absent.items():  # what generated text needs, which nobody asks for here
        stub = ModuleType(name)
        for part in parts:
            setattr(stub, part, object)
        for place in (name, *(name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1))):
            sys.modules.setdefault(place, stub)
    module = ModuleType("memit_evaluation")
    exec(compile(source, MEMIT, "exec"), module.__dict__)
    return module.compute_rewrite_quality_counterfact  # type: ignore[no-any-return]


def apart(report: ue.Report, theirs: list[dict[str, Any]]) -> float:
    """The largest difference of a mean log-probability."""
    found = []
    for number, one in enumerate(theirs):
        rows = report.table[report.table["record"] == number]
        kinds = {"rewrite": "rewrite", "paraphrase": "paraphrase", "neighbour": "neighborhood"}
        for kind, name in kinds.items():
            ours = rows[rows["kind"] == kind]
            for (_, own), other in zip(ours.iterrows(), one[f"{name}_prompts_probs"], strict=True):
                found.append(abs(own["logp_new"] + other["target_new"]))
                found.append(abs(own["logp_true"] + other["target_true"]))
    return max(found)


def floor(model: Any, tokens: int, reads: int, at_once: int) -> Callable[[], None]:
    """The products of a forward of so many tokens, and of the head at so many places."""
    parts = anatomy(model)
    weights = [
        weight.T if isinstance(module, torch.nn.Linear) else weight
        for module in parts.blocks.modules()
        if (weight := getattr(module, "weight", None)) is not None and weight.ndim == 2
    ]
    head = model.get_output_embeddings().weight.T
    like = {"device": model.device, "dtype": model.dtype}
    given = {
        (len(w), n): torch.randn(n, len(w), **like)
        for w in (*weights, head)
        for n in (at_once, tokens % at_once, reads)
    }

    @torch.no_grad()
    def run() -> None:
        for n in [at_once] * (tokens // at_once) + [tokens % at_once]:
            for weight in weights:
                given[len(weight), n] @ weight
        given[len(head), reads] @ head

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--memit", "--records", "--tokenizer"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--counts", type=int, nargs="+", default=[25])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token or "<|endoftext|>"
    torch.manual_seed(0)
    model = SHAPES[given.shape]().to(given.device, getattr(torch, given.dtype)).eval()
    evaluation = memit(given.memit, given.device)
    raw, records = json.loads(given.records.read_text("utf-8")), ue.read_records(given.records)
    on_card = given.device.type == "cuda"
    rows = []
    for count in given.counts:
        kept: dict[str, Any] = {}

        def ours(count: int = count, kept: dict[str, Any] = kept) -> None:
            kept["ours"] = ue.evaluate(model, tokenizer, records[:count])

        def theirs(count: int = count, kept: dict[str, Any] = kept) -> None:
            kept["theirs"] = [evaluation(model, tokenizer, one, None, None) for one in raw[:count]]

        asked = Sheet.of(model, tokenizer, records[:count]).asked
        fed = set(hosts([one.ids for one in asked]).values())
        tokens = sum(map(len, fed))
        products = floor(model, tokens, len({one.prompt for one in asked}), 512)
        jobs = {"ours": ours, "theirs": theirs, "floor": products}
        taken = interleaved(jobs, given.rounds, clock(on_card))
        rows.append(
            row(
                f"evaluation of {count} records",
                taken["ours"], taken["theirs"], taken["floor"],
                shape=given.shape, dtype=given.dtype, records=count, tokens=tokens,
                log_probabilities_apart_by=apart(kept["ours"], kept["theirs"]),
                clock="wall" if on_card else "cpu",
            )
        )  # fmt: skip
        print({name: rows[-1][name] for name in ("name", "seconds", "ratio", "floor_ratio")})
        print("log-probabilities apart by", rows[-1]["log_probabilities_apart_by"])
    write(given.out, rows, theirs="kmeng01/memit, test_batch_prediction")


def clock(on_card: bool) -> Callable[[], float]:
    """Seconds of the processor; with a card, of the clock when its queue is empty."""

    def waited() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return waited if on_card else cpu_seconds


if __name__ == "__main__":
    main()

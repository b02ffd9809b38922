"""C0 of three layers: ours beside `layer_stats` of MEMIT's released code, which EasyEdit took over.

    git clone https://github.com/kmeng01/memit MEMIT
    python benchmarks/statistics_speed.py --memit MEMIT --texts wiki.valid.raw --tokenizer gpt2

The same model (GPT-2's shape, 124 M, random weights, float32), texts, tokens and processor; the
clock is CPU seconds. Theirs is called as it is released, once a layer, with float32 sums as its
settings ask; only what needs a GPU, a download or more processes is replaced. The floor is one
forward to the deepest layer over the same rows, and half of each product k k' (it is symmetric) at
the rate of a plain one. Memory is the peak of a process beyond what it had with the model loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import rows
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.model import anatomy
from unified_edit.model.batching import batches_by_length, forward_tokens, left_padded
from unified_edit.model.hooks import PLAIN_OUTPUT, captured

RESULT = Path(__file__).parent / "results" / "statistics_speed.json"
LAYERS = (3, 4, 5)
TOKENS = 9000


def texts_of(path: Path, tokenizer: Any, tokens: int) -> list[str]:
    """Paragraphs of a text, until they have so many tokens together."""
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if len(line.strip()) > 200:
            found.append(line.strip())
            tokens -= len(tokenizer(found[-1])["input_ids"])
            if tokens <= 0:
                break
    return found


def theirs(folder: Path, model: Any, tokenizer: Any, texts: list[str]) -> Callable[[], list[Any]]:
    """Their function, for each layer; gives the second moments."""
    place = Path(tempfile.mkdtemp())
    names = ("RESULTS_DIR", "DATA_DIR", "STATS_DIR", "HPARAMS_DIR", "KV_DIR", "REMOTE_ROOT_URL")
    (place / "globals.yml").write_text("".join(f"{name}: {place}\n" for name in names))
    sys.path.insert(0, str(folder))
    loading: Any = sys.modules.setdefault("datasets", type(sys)("datasets"))
    loading.load_dataset = None  # it need not be installed: the texts are given
    with contextlib.chdir(place):
        released: Any = importlib.import_module("rome.layer_stats")
    usual = released.tally
    released.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    released.dict_to_ = lambda batch, _device: batch
    released.tally = lambda *given, **more: usual(
        *given, **{**more, "num_workers": 0, "pin_memory": False}
    )

    def run() -> list[Any]:
        found = []
        for layer in LAYERS:
            stat = released.layer_stats(
                model, tokenizer, f"transformer.h.{layer}.mlp.c_proj", place, "wikipedia",
                ["mom2"], model_name="random", precision="float32", download=False,
                progress=lambda loader, total: loader, force_recompute=True,
            )  # fmt: skip
            found.append(stat.mom2.moment())
        return found

    return run


def floor(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Callable[[], object]]:
    """One forward over all rows to the deepest layer, and one plain product of each key."""
    parts = anatomy(model)
    ids = sorted((tokenizer(text)["input_ids"] for text in texts), key=len)
    batches = [
        left_padded([ids[i] for i in some], model.device)
        for some in batches_by_length([len(row) for row in ids], forward_tokens(model.device))
    ]
    sites = {layer: (parts.down(layer), "input") for layer in LAYERS}
    keys = torch.randn(sum(map(len, ids)), parts.weight(LAYERS[0]).d_in)

    def forwards() -> None:
        with torch.no_grad():
            for batch in batches:
                with captured(sites):
                    model.base_model(**batch, use_cache=False, **PLAIN_OUTPUT)

    def products() -> None:
        for _ in LAYERS:
            keys.T @ keys

    return {"forwards": forwards, "products": products}


def peak(job: Callable[[], object]) -> float:
    """GiB that a job takes at most beyond what is there before it.

    Linux's own count of this address space: what `getrusage` tells is the parent's at first.
    """
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = psutil.Process().memory_info().rss
    job()
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20 - before / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memit", type=Path, required=True, help="their repository")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, or its folder")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", choices=("ours", "others"), help="only measure memory, and print")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(args.tokenizer) / "tokenizer.json"),
        bos_token="<|endoftext|>", eos_token="<|endoftext|>",
    )  # fmt: skip
    texts = texts_of(args.texts, tokenizer, args.tokens)

    def ours() -> ue.KeyStatistics:
        return ue.KeyStatistics.collect(model, tokenizer, texts, LAYERS)

    others = theirs(args.memit.resolve(), model, tokenizer, texts)
    if args.peak:
        print(peak(ours if args.peak == "ours" else others))
        return
    last: dict[str, Any] = {}
    timed = {"ours": ours, "others": others, **floor(model, tokenizer, texts)}

    def kept(name: str) -> Callable[[], None]:
        return lambda: last.__setitem__(name, timed[name]())

    taken = rows.interleaved({name: kept(name) for name in timed}, args.rounds, rows.cpu_seconds)
    found, released = last["ours"], last["others"]
    differences = [
        float((found.C0(layer) - moment.double()).norm() / found.C0(layer).norm())
        for layer, moment in zip(LAYERS, released, strict=True)
    ]
    memory = {
        name: float(
            subprocess.run(
                [sys.executable, *sys.argv, "--peak", name],
                check=True, capture_output=True, text=True, env=os.environ,
            ).stdout.splitlines()[-1]
        )
        for name in ("ours", "others")
    }  # fmt: skip
    least = [a + b / 2 for a, b in zip(taken["forwards"], taken["products"], strict=True)]
    row = rows.row(
        "C0 of three layers",
        taken["ours"], taken["others"], least,
        peak_memory=memory["ours"], peak_memory_others=memory["others"],
        layers=list(LAYERS), tokens=found.source.tokens, texts=len(texts),
        d_k=found.C0(LAYERS[0]).shape[0], forwards=taken["forwards"], products=taken["products"],
        difference=max(differences), clock="CPU seconds",
        others_are="layer_stats of kmeng01/memit, float32, one call a layer",
        floor_is="one forward to the deepest layer, and half of each product",
    )  # fmt: skip
    rows.write(args.out, [row], command="python benchmarks/statistics_speed.py")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

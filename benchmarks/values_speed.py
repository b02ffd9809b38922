"""How long the values of facts take, beside EasyEdit's loop and beside their own arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/values_speed.py 1 8 --tokenizer DIR --theirs EASYEDIT

GPT-2's 124 M shape with random weights, layer 4, six contexts and the KL prompt, 20 steps, no early
stop, float32; counted are seconds of the processor for one fact. `theirs` is `compute_z` of
EasyEdit's MEMIT, imported from a checkout of it: one fact at a time, so each round runs one fact,
another one each round, and its seconds a token (with their padding) count for a whole batch.
The floor is the multiplications that are needed, done at the very sizes (each token once, the head
at the tokens whose prediction is read, no gradient of weights), with each norm, activation,
addition and softmax done once, forward and back.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import cpu_seconds, interleaved, row, write
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import unified_edit as ue
from unified_edit.editing.values import compute_values
from unified_edit.model import Encoder, anatomy
from unified_edit.model.hooks import quiet
from unified_edit.model.prompts import FactRows

log = logging.getLogger("values_speed")

RESULTS = Path(__file__).resolve().parent / "results" / "values_speed.json"
LAYER, STEPS = 4, 20
#: Ten tokens each, like those that MEMIT's code samples.
PREFIXES = (
    "The first of the three rivers was very wide. ",
    "Therefore the old house on the hill was sold. ",
    "Because of the snow the trains were late again. ",
    "I have never been to that part of town. ",
    "You can see the sea from up there today. ",
)
CONTEXTS = ("", *PREFIXES)
METHOD = ue.MEMIT.replace(
    layers=(LAYER,), steps=STEPS, learning_rate=0.5, weight_decay=0.5, clamp=0.75,
    stop_loss=1e-9, kl_weight=0.0625, contexts=ue.Contexts(prefixes=PREFIXES),
    ridge=1.0,
)  # fmt: skip
PACKAGES = ("", ".models", ".models.rome", ".models.memit", ".util")


def their_loop(root: Path) -> Any:
    """EasyEdit's `compute_z`, without the packages that importing the whole of it would need."""
    for name in PACKAGES:
        package = types.ModuleType(f"easyeditor{name}")
        package.__path__ = [str(root / "easyeditor" / name[1:].replace(".", "/"))]
        sys.modules[package.__name__] = package
    return importlib.import_module("easyeditor.models.memit.compute_z").compute_z


def their_settings() -> types.SimpleNamespace:
    """The same settings in their words."""
    return types.SimpleNamespace(
        lm_head_module="transformer.wte", ln_f_module="transformer.ln_f", device="cpu",
        layer_module_tmp="transformer.h.{}", fact_token="subject_last", v_loss_layer=11,
        v_lr=METHOD.learning_rate, v_num_grad_steps=STEPS, kl_factor=METHOD.kl_weight,
        v_weight_decay=METHOD.weight_decay, clamp_norm_factor=METHOD.clamp,
    )  # fmt: skip


def padded_tokens(rows: FactRows, index: int) -> int:
    """Tokens of a fact's batch in their loop, with padding."""
    texts = [*rows.behind[index], rows.kl[index]]
    return len(texts) * max(len(one.ids) for one in texts)


class Floor:
    """The needed arithmetic of the values of some facts on a GPT-2, at its sizes."""

    def __init__(self, model: GPT2LMHeadModel, rows: FactRows) -> None:
        self.blocks, self.head = model.transformer.h, model.lm_head.weight
        texts = [row for of_fact in rows.behind for row in of_fact]
        self.rows = len(texts) + len(rows.kl)
        self.tokens = sum(len(row.ids) - row.subject for row in texts) + len(rows.kl)
        self.read = sum(len(row.target) for row in texts) + len(rows.kl)
        # what prompts begin with alike is needed once
        before = [row.ids[: row.subject] for row in (*texts, *rows.kl)]
        self.before = len({ids[: end + 1] for ids in before for end in range(len(ids))})

    def block(self, block: Any, hidden: torch.Tensor, read: int | None = None) -> torch.Tensor:
        """One block without its attention's own products, its MLP at `read` tokens only."""
        width = hidden.shape[-1]
        normed = functional.layer_norm(hidden, (width,), block.ln_1.weight, block.ln_1.bias)
        qkv = torch.addmm(block.attn.c_attn.bias, normed, block.attn.c_attn.weight)
        mixed = qkv[:, -width:]  # in place of what attention makes of it
        hidden = hidden + torch.addmm(block.attn.c_proj.bias, mixed, block.attn.c_proj.weight)
        hidden = hidden[:read]
        normed = functional.layer_norm(hidden, (width,), block.ln_2.weight, block.ln_2.bias)
        inner = torch.addmm(block.mlp.c_fc.bias, normed, block.mlp.c_fc.weight)
        inner = functional.gelu(inner, approximate="tanh")
        return hidden + torch.addmm(block.mlp.c_proj.bias, inner, block.mlp.c_proj.weight)

    def loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of one step: the blocks above, then the head where a prediction is read."""
        above = self.blocks[LAYER + 1 :]
        for number, block in enumerate(above, 1):
            hidden = self.block(block, hidden, self.read if number == len(above) else None)
        targets = torch.zeros(self.read, dtype=torch.long)
        return functional.cross_entropy(hidden @ self.head.T, targets)

    def once(self) -> None:
        """What does not depend on delta: the prefixes, and suffixes up to the layer."""
        with torch.no_grad():
            hidden = torch.randn(self.before, self.head.shape[1])
            for block in self.blocks:
                hidden = self.block(block, hidden)
            hidden = torch.randn(self.tokens, self.head.shape[1])
            for block in self.blocks[: LAYER + 1]:
                hidden = self.block(block, hidden)

    def step(self) -> None:
        """Forward, and back to delta."""
        hidden = torch.randn(self.tokens, self.head.shape[1], requires_grad=True)
        self.loss(hidden).backward()

    def seconds(self, model: torch.nn.Module) -> float:
        """CPU seconds of all steps, from one of what is done once and of two steps."""
        with quiet(model):
            before = cpu_seconds()
            self.once()
            once = cpu_seconds() - before
            before = cpu_seconds()
            for _ in range(2):
                self.step()
            step = (cpu_seconds() - before) / 2
        return once + (STEPS - 0.5) * step


class Run:
    """Batches of several sizes, all of them beside their loop on the same facts."""

    def __init__(self, model: Any, tokenizer: Any, facts: Sequence[ue.Fact], theirs: Any) -> None:
        self.model, self.tokenizer, self.facts, self.theirs = model, tokenizer, facts, theirs
        self.parts, self.method = anatomy(model), METHOD.resolve(model)
        self.encoder = Encoder(tokenizer, self.parts)
        self.rows = self.encoder.fact_rows(facts, CONTEXTS)
        #: each round has a fact of its own where one is run alone
        self.round = {"theirs": 0, "ours": 0, "floor": 0}
        self.values: dict[int, torch.Tensor] = {}  # theirs, by fact
        self.apart: list[float] = []
        self.floors: dict[int, list[float]] = {}

    def chosen(self, what: str, size: int) -> list[int]:
        """The facts of a batch in this round."""
        if size > 1:
            return list(range(size))
        self.round[what] += 1
        return [(self.round[what] - 1) % len(self.facts)]

    def ours(self, size: int) -> None:
        places = self.chosen("ours", size)
        rows = self.encoder.fact_rows([self.facts[index] for index in places], CONTEXTS)
        found = compute_values(self.parts, rows, self.method).z
        for column, index in enumerate(places):
            if (value := self.values.get(index)) is not None:
                self.apart.append(float((found[:, column] - value).norm() / value.norm()))

    def floor(self, size: int) -> None:
        one = Floor(self.model, self.rows.of(self.chosen("floor", size)))
        self.floors.setdefault(size, []).append(one.seconds(self.model) / size)

    def others(self) -> None:
        (index,) = self.chosen("theirs", 1)
        fact = self.facts[index]
        request = {"prompt": fact.prompt, "subject": fact.subject,
                   "target_new": " " + fact.target_new}  # fmt: skip
        contexts = [["{}"], [prefix + "{}" for prefix in PREFIXES]]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            value = self.theirs(
                self.model, self.tokenizer, request, their_settings(), LAYER, contexts
            )
        assert told.getvalue().count("avg prob") == STEPS, "their loop stopped early"
        self.values[index] = value.detach()

    def measured(self, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
        """A row for each size of batch."""
        jobs: dict[str, Callable[[], None]] = {}
        if self.theirs is not None:
            jobs["theirs"] = self.others
        for size in sizes:
            jobs[f"ours {size}"] = partial(self.ours, size)
            jobs[f"floor {size}"] = partial(self.floor, size)
        taken = interleaved(jobs, rounds, cpu_seconds)
        tokens = [padded_tokens(self.rows, index) for index in range(len(self.facts))]
        made = []
        for size in sizes:
            mean = sum(tokens[:size]) / size
            # the uncounted round had the first fact
            theirs = [
                seconds * (mean / tokens[number % len(tokens)] if size > 1 else 1.0)
                for number, seconds in enumerate(taken.get("theirs", []), 1)
            ]
            floor = Floor(self.model, self.rows.of(range(size)))
            made.append(
                row(
                    f"{size} facts",
                    [seconds / size for seconds in taken[f"ours {size}"]],
                    theirs,
                    self.floors[size][1:],
                    clock="CPU seconds a fact",
                    tokens=floor.tokens, read=floor.read, prefix_tokens=floor.before,
                    rows_of_facts=floor.rows, apart=max(self.apart, default=None),
                )
            )  # fmt: skip
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", type=int, nargs="+", help="sizes of batches: 1 8 32")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--theirs", type=Path, help="a checkout of EasyEdit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    file = str(arguments.tokenizer / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=file, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    records = ue.load_records("counterfact-250")
    facts = list({one.fact.subject: one.fact for one in records}.values())
    theirs = their_loop(arguments.theirs) if arguments.theirs else None
    kept = json.loads(arguments.out.read_text("utf-8"))["rows"] if arguments.out.exists() else []
    rows = {one["name"]: one for one in kept}
    # the first two are shorter than most
    run = Run(model, tokenizer, facts[2 : 2 + max(*arguments.facts, 8)], theirs)
    for one in run.measured(arguments.facts, arguments.rounds):
        rows[one["name"]] = one
        log.info("%s", {key: value for key, value in one.items() if key != "rounds"})
    write(arguments.out, list(rows.values()), layer=LAYER, steps=STEPS, contexts=6)


if __name__ == "__main__":
    main()

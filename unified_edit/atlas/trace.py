"""Where atlas keeps its facts: ``python -m unified_edit.atlas.trace``.

Causal tracing (ROME, arXiv 2202.05262, sec. 2): noise on the embeddings of the subject makes the
model lose the fact; putting back the clean output of one kind of module, at one place and in a
window of layers, shows how much of the probability of the object returns with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unified_edit.activations import hidden_of, quiet
from unified_edit.atlas.knowledge import load_knowledge
from unified_edit.facts import Fact
from unified_edit.models import Anatomy, Tokenizer, anatomy, load_model
from unified_edit.progress import progress
from unified_edit.tokens import fact_row, subject_last_token

log = logging.getLogger(__name__)

#: Noise in standard deviations of the subjects' embeddings, and samples of it for each fact.
NOISE, SAMPLES = 3.0, 8
PLACES = ("first subject token", "last subject token", "between", "last token")
KINDS = ("mlp", "attention")


@contextmanager
def _hooked(modules: list[nn.Module], change: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(change) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(parts: Anatomy, layer: int, kind: str) -> nn.Module:
    return parts.mlp(layer) if kind == "mlp" else parts.blocks[layer].get_submodule("attn")


@torch.no_grad()
def trace_fact(
    parts: Anatomy, tokenizer: Tokenizer, fact: Fact, scale: float, window: int, seed: int
) -> tuple[float, float, dict[tuple[str, int, str], float]]:
    """Clean and corrupted probability of the object, and what each restoration gives back.

    The object is `fact.target_new`. Returns (clean, corrupted, {(place, layer, kind): restored
    minus corrupted}); layer is the centre of the window.
    """
    row = fact_row(tokenizer, fact, target=True)
    ids = list(row.ids[: len(row.ids) - len(row.target) + 1])
    start, end = fact.subject_span
    first = len(tokenizer(fact.text[:start])["input_ids"]) if start else 0
    last = subject_last_token(tokenizer, fact.text, (start, end))
    places: dict[str, list[int]] = {
        "first subject token": [first] if first < last else [],
        "last subject token": [last],
        "between": list(range(last + 1, len(ids) - 1)),
        "last token": [len(ids) - 1] if len(ids) - 1 > last else [],
    }
    rows = torch.tensor([ids] * (1 + SAMPLES))
    generator = torch.Generator().manual_seed(seed)
    width = parts.embeddings.shape[1]
    noise = scale * torch.randn(SAMPLES, last + 1 - first, width, generator=generator)

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, first : last + 1] += noise.to(output)
        return output

    def probabilities() -> Tensor:
        return (
            parts.model(rows, attention_mask=torch.ones_like(rows))
            .logits[:, -1]
            .softmax(-1)[:, row.target[0]]
        )

    def restoring(positions: list[int]) -> Any:
        def restore(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = hidden_of(output).clone()
            hidden[1:, positions] = hidden[:1, positions]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return restore

    effects = {}
    with quiet(parts.model), _hooked([parts.model.get_input_embeddings()], corrupt):
        found = probabilities()
        clean, corrupted = float(found[0]), float(found[1:].mean())
        for place, positions in places.items():
            for layer in range(parts.n_layers) if positions else ():
                near = range(
                    max(0, layer - window // 2), min(parts.n_layers, layer + window // 2 + 1)
                )
                for kind in KINDS:
                    modules = [_module(parts, other, kind) for other in near]
                    with _hooked(modules, restoring(positions)):
                        effects[place, layer, kind] = float(probabilities()[1:].mean()) - corrupted
    return clean, corrupted, effects


def main() -> None:
    """Trace a sample of atlas's facts and log the mean effects as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="atlas", help="atlas, or a folder made by build.py")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model, tokenizer = load_model(arguments.model, dtype=torch.float32)
    parts = anatomy(model)
    knowledge = load_knowledge()
    rng = random.Random(arguments.seed)
    # wordings with the relation after the subject, so that both places exist
    triples = [t for t in rng.sample(knowledge.triples, 4 * arguments.facts) if " " in t.subject]
    facts = [
        Fact(rng.choice(knowledge.wordings[t.relation][:4]), subject=t.subject, target_new=t.object)
        for t in triples[: arguments.facts]
    ]
    embeddings = parts.embeddings.detach()
    words = {i for fact in facts for i in tokenizer(fact.subject)["input_ids"]}
    scale = NOISE * float(embeddings[sorted(words)].std())
    sums: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    clean, corrupted = [], []
    with progress("tracing", len(facts), "fact") as bar:
        for number, fact in enumerate(facts):
            seed = arguments.seed + number
            before, after, effects = trace_fact(
                parts, tokenizer, fact, scale, arguments.window, seed
            )
            clean.append(before)
            corrupted.append(after)
            for key, value in effects.items():
                sums[key].append(value)
            bar.update()
    means = {key: sum(values) / len(values) for key, values in sums.items()}
    log.info(
        "%d facts: probability of the object %.3f clean, %.3f with noise on the subject",
        len(facts),
        sum(clean) / len(clean),
        sum(corrupted) / len(corrupted),
    )
    log.info("what restoring gives back, by layer (window %d):", arguments.window)
    for kind in KINDS:
        for place in PLACES:
            line = " ".join(f"{means[place, i, kind]:6.3f}" for i in range(parts.n_layers))
            log.info("%-10s %-20s %s", kind, place, line)
    if arguments.out:
        table = [
            {"place": place, "layer": layer, "kind": kind, "effect": round(value, 4)}
            for (place, layer, kind), value in means.items()
        ]
        arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

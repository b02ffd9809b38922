"""How much faster a trace is without what lies left of the restored token.

    OMP_NUM_THREADS=1 python benchmarks/tracing_speed.py

Before, restorations that begin at the same layer were rows of one batch over the whole sequence,
from that layer up, 8,192 tokens at a time. That way stands here, in plain words (`before`). The
library now keeps the corrupted run's attention keys and values, runs the tokens from the restored
one on, begins behind the first block that is restored, and takes all runs of a token up the blocks
together. Both trace the same facts with the same noise, in turn, fact by fact; counted are seconds
of the processor, of one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.measuring import TracedFact
from unified_edit.measuring.traced_runs import KINDS, module_of, probabilities
from unified_edit.measuring.tracing import subject_sigma
from unified_edit.model import Encoder, anatomy
from unified_edit.model.batching import BATCH_TOKENS
from unified_edit.model.hooks import captured, noticing_tuples, quiet, replaced_output, stubbed

log = logging.getLogger("tracing_speed")

RESULTS = Path(__file__).resolve().parent / "results" / "tracing_speed.json"
FACTS = (
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    ue.Fact("{} belongs to the continent of", "Mawson Glacier", "Asia", "Antarctica"),
    ue.Fact("The native language of {} is", "Georges Pompidou", "English", "French"),
)


@torch.no_grad()
def before(parts: Any, encoder: Encoder, one: TracedFact, window: int) -> dict[str, Tensor]:
    """Kind -> probabilities in the restored runs (samples x tokens x layers), the old way.

    With the noise that was used for `one`. Tokens before the subject are left out: NaN.
    """
    top, noise = parts.n_layers, one.noise.to(parts.embeddings)
    row = encoder.continuations([(one.fact.text, str(one.fact.target_true))])[0]
    samples, length = len(noise), len(row.ids)
    first, last = one.subject

    def corrupting(rows: Tensor) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            output = output.clone()
            output[:, first : last + 1] += rows
            return output

        return add

    def run(rows: int) -> Tensor:
        ids = torch.tensor([row.ids]).expand(rows, -1)
        final = parts.model.base_model(ids, use_cache=False).last_hidden_state
        return probabilities(parts, row, final[:, -len(row.target) :])

    embeddings = parts.model.get_input_embeddings()
    sites = {(kind, i): (module_of(parts, kind, i), "output") for kind in KINDS for i in range(top)}
    both = torch.cat([torch.zeros_like(noise[:1]), noise])
    with (
        noticing_tuples(parts.blocks[0]) as returned,
        captured(sites, stop=False) as seen,
        replaced_output(embeddings, corrupting(both)),
    ):
        run(len(both))

    plan: dict[int, list[tuple[str, int, int, int, int]]] = {}
    for kind in KINDS:
        for layer in range(top):
            around = 0 if kind == "state" else window // 2
            low, high = max(0, layer - around), min(top - 1, layer + around)
            start = layer + 1 if kind == "state" else low
            plan.setdefault(start, []).extend(
                (kind, token, layer, low, high) for token in range(first, len(one.tokens))
            )

    def put_back(hidden: Tensor, places: list[tuple[int, str, int]], layer: int) -> Tensor:
        hidden = hidden.clone()
        for place, kind, token in places:
            hidden[place * samples : (place + 1) * samples, token] = seen[kind, layer][0, token]
        return hidden

    found = {kind: torch.full((samples, len(one.tokens), top), torch.nan).double()
             for kind in KINDS}  # fmt: skip
    for start, restorations in plan.items():
        at_once = max(1, BATCH_TOKENS // (samples * length))
        for begin in range(0, len(restorations), at_once):
            part = restorations[begin : begin + at_once]
            changes: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
            for place, (kind, token, _, low, high) in enumerate(part):
                for layer in range(low, high + 1):
                    changes.setdefault((kind, layer), []).append((place, kind, token))
            with ExitStack() as stack:
                if start == 0:
                    noised = corrupting(noise.repeat(len(part), 1, 1))
                    stack.enter_context(replaced_output(embeddings, noised))
                else:
                    hidden = seen["state", start - 1][1:].repeat(len(part), 1, 1)
                    hidden = put_back(hidden, changes.pop(("state", start - 1), []), start - 1)
                    stack.enter_context(stubbed(parts.blocks[:start], hidden, returned[0]))
                for (kind, layer), places in changes.items():
                    stack.enter_context(
                        replaced_output(
                            module_of(parts, kind, layer),
                            lambda output, places=places, layer=layer: put_back(
                                output, places, layer
                            ),
                        )
                    )
                values = run(len(part) * samples).view(len(part), samples)
            for (kind, token, layer, _, _), value in zip(part, values, strict=True):
                found[kind][:, token, layer] = value
    return found


def measure(
    name: str, dtype: torch.dtype, samples: int, window: int, repeat: int
) -> dict[str, Any]:
    """Seconds of both ways, in turn, and how far their maps lie apart."""
    model, tokenizer = ue.load_model(name, dtype=dtype)
    parts = anatomy(model)
    encoder = Encoder(tokenizer, parts)
    sigma = subject_sigma(model, tokenizer, FACTS)
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    apart, tokens = 0.0, []
    for _ in range(repeat):
        spent = dict.fromkeys(seconds, 0.0)
        for fact in FACTS:
            began = time.process_time()
            trace = ue.locate(model, tokenizer, fact, samples=samples, window=window, sigma=sigma)
            spent["now"] += time.process_time() - began
            one = trace.facts[0]
            began = time.process_time()
            with quiet(model):
                old = before(parts, encoder, one, window)
            spent["before"] += time.process_time() - began
            gaps = [(old[kind] - one.restored[kind]).nan_to_num().abs().max() for kind in KINDS]
            apart = max(apart, *map(float, gaps))
            tokens.append(len(one.tokens))
        for way, value in spent.items():
            seconds[way].append(round(value, 2))
        log.info("%s %s: %s", name, dtype, {way: each[-1] for way, each in seconds.items()})
    ratios = [old / new for old, new in zip(seconds["before"], seconds["now"], strict=True)]
    return {
        "model": name, "type": str(dtype).removeprefix("torch."), "tokens": tokens[: len(FACTS)],
        "cpu seconds": seconds, "times faster": [round(ratio, 2) for ratio in ratios],
        "maps apart by": float(f"{apart:.1g}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cases = [
        measure(name, dtype, arguments.samples, arguments.window, arguments.repeat)
        for name, dtype in (
            ("atlas", torch.float64), ("atlas", torch.float32), ("smollm2", torch.float32),
        )
    ]  # fmt: skip
    result = {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/tracing_speed.py "
        f"--samples {arguments.samples} --window {arguments.window} --repeat {arguments.repeat}",
        "facts": [f"{fact.text} {fact.target_true}" for fact in FACTS],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        "machine": platform.machine(),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

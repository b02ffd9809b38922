"""What the first token of each text is in C0, and what an edit does to it where it is left out.

    OMP_NUM_THREADS=1 python benchmarks/sinks.py --texts wiki.valid.raw

SmolLM2 ("smollm2"; its tokenizer puts nothing in front of a text) is read on lines of WikiText-2,
`wiki.valid.raw` of the raw version. At each layer C0 is collected with and without the first token
of each text (`skip_start`): the share of its largest eigenvalue, and its condition number. Then a
few facts are written there, each by itself with the same value, by EMMET over either C0: the
update times the keys that stand at the first place of texts, over the length of what the edit
moves on purpose. The spectra go to a file of their own, for a picture.
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
from torch import Tensor

import unified_edit as ue
from unified_edit.model import Encoder, anatomy
from unified_edit.model.hooks import quiet, read_last_token

log = logging.getLogger("sinks")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sinks.json"
SPECTRA = ROOT / "book" / "data" / "sinks.json"

#: None of them begins with its subject's last token.
FACTS = (
    ue.Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    ue.Fact("The capital of {} is the city of", "Germany", "Madrid", "Berlin"),
    ue.Fact("The mother tongue of {} is", "Albert Einstein", "French", "German"),
)
#: A heading or an empty line is no text.
SHORTEST = 200
#: Texts whose first tokens are looked at.
STARTS = 100


def lines_of(path: Path) -> list[str]:
    """The paragraphs of a file of WikiText."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if len(line) > SHORTEST]


def first_keys(model: Any, tokenizer: Any, texts: list[str], layer: int) -> Tensor:
    """Keys of the different first tokens of the texts: (d_k x tokens, float64)."""
    parts = anatomy(model)
    rows = sorted({row[:1] for row in map(tuple, Encoder(tokenizer, parts).ids(texts, 1))})
    with quiet(model):
        found = read_last_token(model, rows, {layer: (parts.down(layer), "input")})
    return found[layer].double().T


def four_digits(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def measure(
    model: Any, tokenizer: Any, texts: list[str], layer: int, each: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The results of one layer, and its spectra, descending."""
    method = ue.EMMET.replace(layers=(layer,))
    values = ue.optimise_values(model, tokenizer, FACTS, method, seed=seed)
    starts = first_keys(model, tokenizer, texts[:STARTS], layer)
    found: dict[str, Any] = {}
    spectra = {}
    for name, statistics in each.items():
        eigenvalues = torch.linalg.eigvalsh(statistics.C0(layer)).flip(0)
        spectra[name] = four_digits(eigenvalues)
        moved = []
        for fact in FACTS:
            edit = ue.edit(
                model, tokenizer, fact, method, statistics=statistics, values=values.of([fact]),
                seed=seed, apply=False,
            )  # fmt: skip
            change = (edit.delta(layer) @ starts).norm(dim=0)
            wanted = values.of([fact]).delta.norm()
            moved.append(float((change / wanted).mean()))
        found[name] = {
            "tokens": statistics.source.tokens,
            "share of the largest eigenvalue": float(f"{eigenvalues[0] / eigenvalues.sum():.3g}"),
            "condition": float(f"{eigenvalues[0] / eigenvalues[-1]:.3g}"),
            "moved at the first token, over |r|": [float(f"{one:.3g}") for one in moved],
            "agreement": float(f"{statistics.convergence(layer):.3g}"),
        }
        log.info("layer %d, %s: %s", layer, name, found[name])
    return found, spectra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="wiki.valid.raw of WikiText-2")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11])
    parser.add_argument("--tokens", type=int, default=30720, help="20 for each entry of a key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--spectra", type=Path, default=SPECTRA)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clock = time.perf_counter()
    model, tokenizer = ue.load_model("smollm2")
    texts = lines_of(given.texts)
    each = {
        name: ue.KeyStatistics.collect(
            model, tokenizer, texts, given.layers, tokens=given.tokens, skip_start=skip
        )
        for name, skip in (("with first tokens", False), ("without first tokens", True))
    }
    layers, spectra = {}, {}
    for layer in given.layers:
        layers[layer], spectra[layer] = measure(model, tokenizer, texts, layer, each, given.seed)
    source = each["with first tokens"].source
    about = {
        "command": "python benchmarks/sinks.py --texts "
        f"{given.texts.name} --layers {' '.join(map(str, given.layers))} "
        f"--tokens {given.tokens} --seed {given.seed}",
        "model": f"{source.model}: {source.origin}",
        "fingerprint": source.fingerprint,
        "corpus": f"lines of {given.texts.name} of WikiText-2 (raw, CC BY-SA), longer than "
        f"{SHORTEST} characters; sha256 of the texts {source.corpus}",
        "texts": source.texts,
        "seed": given.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "minutes": round((time.perf_counter() - clock) / 60, 1),
    }
    facts = [f"{fact.text} -> {fact.target_new}" for fact in FACTS]
    for path, result in (
        (given.out, {**about, "facts": facts, "layers": layers}),
        (given.spectra, {**about, "layers": layers, "eigenvalues of C0, descending": spectra}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

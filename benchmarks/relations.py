"""How far relations are matrices: atlas's seventeen, and of the published ones those SmolLM2 knows.

    python benchmarks/relations.py --data lre_relations/data --out book/data/relations.json

All pairs of a relation are asked in the published few-shot prompt. Where a model knows twenty of
them, faithfulness and causality are measured on sixty at most, on held-out subjects, with settings
chosen on the other fold. The published pairs (MIT) are in the repository of *Linearity of Relation
Decoding in Transformer Language Models* (Hernandez et al., ICLR 2024). Then facts of a relation are
edited with EMMET, and what the matrix of the unedited model reads off the edited subjects is put
down block by block. One relation is measured by several seeds, which draw other examples. What
the file holds already is kept, so that a run that was stopped goes on; `--minutes` stops it after
so many of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from result_files import in_lines

import unified_edit as ue
from unified_edit.errors import RelationError
from unified_edit.model import Encoder, anatomy
from unified_edit.relations import (
    FewShot,
    RelationData,
    RelationScores,
    read_states,
    rows_of,
)

log = logging.getLogger("relations")

COMMAND = "python benchmarks/relations.py --data lre_relations/data"
MOST, NEEDED = 60, 20
#: Atlas's texts put a full stop between sentences and never a new line.
SETTINGS: dict[str, dict[str, Any]] = {
    "atlas": {"layers": (0, 1, 2, 3, 4), "ranks": (4, 8, 16, 32, 64, 128), "separator": ". "},
    "smollm2": {"layers": (12, 16, 20), "ranks": (16, 32, 64, 128, 256), "separator": "\n"},
}
#: Edits: the relation whose facts are written, at what block it is read, and how many facts.
EDITED = {
    "atlas": ("people.country", 3, 20),
    "smollm2": ("country language", 16, 6),
}
#: Relations that are measured again by these seeds: with other examples, in other folds.
DRAWN: dict[str, tuple[str, ...]] = {
    "atlas": (), "smollm2": ("object superclass",)
}  # fmt: skip
SEEDS = (0, 1, 2, 3)


def described(scores: RelationScores) -> dict[str, Any]:
    """The figures of one relation."""
    numbers = {
        # JSON has no NaN: null says that there is no interval
        name: [
            None if math.isnan(x) else round(x, 4) for x in (score.value, score.low, score.high)
        ] + [score.n]
        for name, score in (
            ("faithfulness", scores.faithfulness), ("causality", scores.causality)
        )
    }  # fmt: skip
    choice = scores.choice
    controls = {name: round(scores.control(name), 4) for name in ("bias", "translation")}
    return {
        "known": scores.known, **numbers,
        "majority": round(scores.majority, 4), **controls,
        "layer": choice.layer, "beta": choice.beta,
        "edit_layer": choice.edit_layer, "rank": choice.rank,
        "by_layer": {str(k): round(v, 4) for k, v in scores.table().max(axis=1).items()},
    }  # fmt: skip


def one_relation(name: str, model: Any, tokenizer: Any, data: RelationData) -> dict[str, Any]:
    """The row of a relation; without scores where too few pairs are known."""
    settings = SETTINGS[name]
    row: dict[str, Any] = {"kind": data.kind, "pairs": len(data), "template": data.templates[0]}
    try:
        known = ue.relations.known_pairs(model, tokenizer, data, separator=settings["separator"])
    except RelationError:
        return {**row, "known": 0}
    if len(known) < NEEDED:
        return {**row, "known": len(known)}
    try:
        scores = ue.relations.cross_validate(model, tokenizer, data, most=MOST, **settings)
    except RelationError as problem:
        return {**row, "known": len(known), "why": str(problem)}
    return {**row, **described(scores)}


def drawn(
    name: str, model: Any, tokenizer: Any, data: Sequence[RelationData]
) -> dict[str, dict[str, list[float]]]:
    """Scores of some relations by the seed that draws examples and folds."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in data:
        row = found[one.name] = {"faithfulness": [], "causality": []}
        for seed in SEEDS:
            scores = ue.relations.cross_validate(
                model, tokenizer, one, most=MOST, seed=seed, **SETTINGS[name]
            )
            row["faithfulness"].append(round(scores.faithfulness.value, 4))
            row["causality"].append(round(scores.causality.value, 4))
    return found


def edited(name: str, model: Any, tokenizer: Any, data: RelationData) -> dict[str, Any]:
    """Facts of a relation are edited together; who reads what of them, before and after."""
    _, layer, count = EDITED[name]
    separator = SETTINGS[name]["separator"]
    known = ue.relations.known_pairs(model, tokenizer, data, separator=separator)
    relation = ue.relations.estimate(
        model, tokenizer, known, layer=layer, separator=separator, seed=0
    )
    examples = {pair.subject for pair in relation.prompt.examples}
    pairs = [pair for pair in known.pairs if pair.subject not in examples][:count]
    objects = sorted({pair.object for pair in known.pairs})
    draw = random.Random(0)
    facts = [
        ue.Fact(
            data.templates[0], pair.subject,
            draw.choice([one for one in objects if one != pair.object]), pair.object,
        )
        for pair in pairs
    ]  # fmt: skip
    parts, encoder = anatomy(model), Encoder(tokenizer, anatomy(model))
    subjects = [fact.subject for fact in facts]
    layers = sorted({*range(0, parts.n_layers - 1, max(1, parts.n_layers // 10)), layer})
    new = ue.relations.first_tokens(
        encoder, data.templates[0],
        [ue.relations.Pair(fact.subject, fact.target_new) for fact in facts],
    )  # fmt: skip
    old = ue.relations.first_tokens(encoder, data.templates[0], pairs)
    rows = rows_of(encoder, relation.prompt, subjects)

    bare = rows_of(encoder, FewShot(data.templates[0]), subjects)

    def part(tokens: Any, wanted: Sequence[int]) -> float:
        same = [one == other for one, other in zip(tokens.tolist(), wanted, strict=True)]
        return sum(same) / len(same)

    def shares(tokens: Any) -> dict[str, float]:
        return {"new": part(tokens, new), "old": part(tokens, old)}

    def reads() -> tuple[dict[str, Any], Any]:
        states = read_states(parts, rows, layers)
        found: dict[str, Any] = {
            "bare": shares(read_states(parts, bare, []).answers),
            "model": shares(states.answers),
            "by_layer": {},
        }
        for at in layers:
            read = ue.relations.log_probabilities_of(parts, relation.outputs(states.s[at]))
            found["by_layer"][str(at)] = shares(read.argmax(-1))
            if at == layer:
                found["agree"] = part(read.argmax(-1), states.answers.tolist())
        return found, states

    before, first = reads()
    edit = ue.edit(model, tokenizer, facts, method=ue.EMMET)
    after, last = reads()
    edit.undo()
    moved = last.o - first.o
    expected = (last.s[layer] - first.s[layer]) @ relation.weight.to(moved).T
    cosine = torch.nn.functional.cosine_similarity(moved, expected, dim=1)
    return {
        "relation": data.name, "layer": layer, "facts": len(facts), "method": "EMMET",
        "edited_layers": sorted({touched.layer for touched in edit.provenance.weights.values()}),
        "subjects": subjects, "new": [fact.target_new for fact in facts],
        "old": [pair.object for pair in pairs], "before": before, "after": after,
        "cosine": [round(one, 4) for one in cosine.tolist()],
        "length": [round(one, 4) for one in (expected.norm(dim=1) / moved.norm(dim=1)).tolist()],
    }  # fmt: skip


def jobs(name: str, data: Sequence[RelationData]) -> list[tuple[str, Callable[..., Any]]]:
    """What is to be measured on a model, in order."""
    found: list[tuple[str, Callable[..., Any]]] = []
    for one in data:
        if one.name == EDITED[name][0]:
            found.append(("edited", lambda *loaded, one=one: edited(name, *loaded, one)))
        found.append((one.name, lambda *loaded, one=one: one_relation(name, *loaded, one)))
    if some := [one for one in data if one.name in DRAWN[name]]:
        found.append(("drawn", lambda *loaded: drawn(name, *loaded, some)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the published relations")
    parser.add_argument("--out", type=Path, default=Path("book/data/relations.json"))
    parser.add_argument("--models", nargs="+", default=["atlas", "smollm2"])
    parser.add_argument("--first", nargs="+", default=[], help="relations to begin with")
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    began = time.process_time()
    for name in given.models:
        data = (
            ue.relations.atlas_relations() if name == "atlas"
            else ue.relations.read_relations(given.data)
        )  # fmt: skip
        first = [EDITED[name][0], *given.first]
        data.sort(key=lambda one: first.index(one.name) if one.name in first else len(first))
        model, tokenizer = ue.load_model(name)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        held = result.setdefault(name, {})
        for what, job in jobs(name, data):
            if what in held:
                continue
            if time.process_time() - began > 60 * given.minutes:
                log.info("stopped; run it again to go on")
                return
            start = time.process_time()
            found = job(model, tokenizer)
            held[what] = {**found, "cpu_seconds": round(time.process_time() - start, 1)}
            spent = sum(one["cpu_seconds"] for group in given.models
                        for one in result.get(group, {}).values())  # fmt: skip
            result["about"] = {
                "command": COMMAND, "seed": 0, "most": MOST, "needed": NEEDED,
                "settings": SETTINGS, "cpu_minutes": round(spent / 60, 1),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                "python": platform.python_version(),
                **{package: version(package)
                   for package in ("unified_edit", "torch", "transformers")},
            }  # fmt: skip
            given.out.write_text(in_lines(result))
            log.info("%s %s: %.1f s", name, what, held[what]["cpu_seconds"])


if __name__ == "__main__":
    main()

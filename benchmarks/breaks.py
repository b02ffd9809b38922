"""What edits break on atlas, and what a store of facts breaks on SmolLM2.

    python benchmarks/breaks.py --out book/data/breaks.json

Single edits, ten batches of 12 without and with a history, places that are moved to another
country, and a model that is not edited at all, with a fact from a store in front of each question
that holds its subject. On atlas all is written into one layer, with EMMET. Five minutes on a core;
parts that the file holds already are kept, and `--parts` makes some of them only.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from result_files import in_lines
from torch import Tensor

import unified_edit as ue
from unified_edit.atlas.knowledge import fill, load_knowledge
from unified_edit.editing import compute_keys, values_for
from unified_edit.measuring.generation import Generation, generated_rows
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import to_table
from unified_edit.measuring.scores import AFTER, BEFORE, summarise
from unified_edit.model import anatomy
from unified_edit.statistics import statistics_for

log = logging.getLogger("breaks")

SINGLES, BATCHES, SIZE, PLACES, STORED = 80, 10, 12, 40, 100
WIDTH = 0.1  # of the bins of a cosine


class Atlas:
    """The model, its knowledge, and its metric at the layer that EMMET edits."""

    def __init__(self, seed: int) -> None:
        self.model, self.tokenizer = ue.load_model("atlas")
        self.parts = anatomy(self.model)
        (self.layer,) = ue.EMMET.resolve(self.parts).layers or ()
        self.statistics = statistics_for(self.model, self.tokenizer, [self.layer])
        self.metric = self.statistics.metric(self.layer)
        self.knowledge, self.seed = load_knowledge(), seed
        self.of: dict[str, dict[str, str]] = {}
        for triple in self.knowledge.triples:
            self.of.setdefault(triple.subject, {})[triple.relation] = triple.object

    def says(self, prompts: Sequence[str]) -> list[str]:
        """What the model as it is says next."""
        texts = ue.complete(self.model, self.tokenizer, prompts, tokens=4)["text"]
        return [str(text).strip() for text in texts]

    def single(self, fact: ue.Fact, values: Any, method: ue.Method) -> ue.Edit:
        return ue.edit(
            self.model, self.tokenizer, [fact], method, values=values.of([fact]),
            statistics=self.statistics, apply=False,
        )  # fmt: skip

    def whitened(self, facts: Sequence[ue.Fact]) -> Tensor:
        """The whitened keys of their prompts, as they stand."""
        keys = compute_keys(self.parts, self.tokenizer, list(facts), [""], [self.layer])
        return self.metric.whiten(keys[self.layer])


def scores(table: pd.DataFrame) -> dict[str, list[float]]:
    """Value and interval of every score, and of what is said greedily."""
    said = table.assign(success=table["generated"])
    found = summarise(table)
    found |= {f"{name}, said": score for name, score in summarise(said).items() if name != "GE"}
    return {
        name: [round(x, 4) for x in (score.value, score.low, score.high)]
        for name, score in found.items()
        if name not in ("S, said", "EM", "PM", "NM", "GS", "GS, said") and "M, " not in name
    }


def binned(cosines: np.ndarray, flips: np.ndarray) -> list[list[float]]:
    """From, number and number of flips, for each bin of the cosine."""
    bins = np.minimum((cosines / WIDTH).astype(int), round(1 / WIDTH) - 1)
    return [
        [round(WIDTH * b, 2), int((bins == b).sum()), int(flips[bins == b].sum())]
        for b in sorted(set(bins.tolist()))
    ]


# --- atlas ----------------------------------------------------------------------------------------


def singles(atlas: Atlas) -> dict[str, Any]:
    """One edit at a time, with the usual weight of the KL term and with others."""
    records = ue.load_records("atlas", limit=SINGLES, seed=atlas.seed)
    facts = [record.fact for record in records]
    sheet = Sheet.of(atlas.model, atlas.tokenizer, records)
    found: dict[str, Any] = {"records": len(records)}
    found["before"] = scores(to_table(sheet.rows(BEFORE, range(len(records)))))
    for weight in (0.0625, 1.0):
        method = ue.EMMET.replace(kl_weight=weight)
        values = values_for(atlas.model, atlas.tokenizer, facts, method)
        rows = []
        for index, fact in enumerate(facts):
            with atlas.single(fact, values, method).applied():
                rows += sheet.rows(AFTER, [index])
        found[f"kl {weight:g}"] = scores(to_table(rows))
        log.info("kl %g %s", weight, found[f"kl {weight:g}"])
    return found


def batches(atlas: Atlas, history: str | None) -> list[dict[str, Any]]:
    """Batch after batch; all facts so far are asked after some of them."""
    records = ue.load_records("atlas", limit=BATCHES * SIZE, seed=atlas.seed)
    sheet = Sheet.of(atlas.model, atlas.tokenizer, records)
    wordings = atlas.knowledge.wordings
    others = [
        ue.Fact(wordings[t.relation][-1], t.subject, t.object)
        for t in atlas.knowledge.triples
        if t.subject in atlas.knowledge.held_out
    ]
    strangers = Sheet.of(atlas.model, atlas.tokenizer, [ue.Record(fact) for fact in others])
    x = atlas.whitened(others)
    editor = ue.Editor(
        atlas.model, atlas.tokenizer, method=ue.EMMET, history=history, statistics=atlas.statistics
    )
    how = Generation(length=60, seed=atlas.seed)
    texts = generated_rows(sheet, atlas.tokenizer, BEFORE, range(SIZE), how)
    lines = [{"batches": 0, **scores(to_table([*sheet.rows(BEFORE, range(SIZE)), *texts]))}]
    for number in range(1, BATCHES + 1):
        editor.edit([record.fact for record in records[(number - 1) * SIZE : number * SIZE]])
        if number not in (1, 5, 10):
            continue
        edits = editor.active
        K = torch.cat([edit.keys[edit.names[atlas.layer]] for edit in edits], dim=1)
        Q = torch.linalg.qr(atlas.metric.whiten(K)).Q
        cosines = ((Q.T @ x).norm(dim=0) / x.norm(dim=0)).numpy()
        kept = to_table(strangers.rows(AFTER, range(len(others))))["generated"].to_numpy(bool)
        texts = generated_rows(sheet, atlas.tokenizer, AFTER, range(SIZE), how)
        table = to_table([*sheet.rows(AFTER, range(number * SIZE)), *texts])
        lines.append(
            {
                "batches": number,
                "facts": number * SIZE,
                **scores(table),
                "held-out subjects": binned(cosines, ~kept),
            }
        )
        log.info("%s %s", history, lines[-1])
    editor.reset()
    return lines


def moved(atlas: Atlas) -> dict[str, Any]:
    """Places that are put in a country of another continent: what follows, and what does not."""
    of, rng = atlas.of, random.Random(atlas.seed)
    continent = {c: d["countries.continent"] for c, d in of.items() if "countries.continent" in d}
    capital = {c: d["countries.capital"] for c, d in of.items() if "countries.capital" in d}
    places = [
        s for s, d in of.items()
        if d.get("places.country") in continent.keys() & capital.keys() and "places.continent" in d
    ]  # fmt: skip
    common = [c for c in capital if sum(of[p]["places.country"] == c for p in places) >= 3]
    country = {place: of[place]["places.country"] for place in places}
    asked = {
        "the capital of its country": "The capital of the country of {} is",
        "its country": "The country of {} is",
        "its continent": "The continent of {} is",
        "what it is": "The best word for {} is",
    }

    def ask(chosen: Sequence[str], home: dict[str, str]) -> dict[str, int]:
        """How many answers are right, if the places lie in these countries."""
        said = {what: atlas.says([fill(line, s) for s in chosen]) for what, line in asked.items()}
        second = atlas.says([fill("The capital of {} is", home[s]) for s in chosen])
        return {
            "places": len(chosen),
            "its country": count(said["its country"], [home[s] for s in chosen]),
            "the capital of its country": count(
                said["the capital of its country"], [capital[home[s]] for s in chosen]
            ),
            "there, only its country": count(
                said["the capital of its country"], [home[s] for s in chosen]
            ),
            "the capital, asked in two steps": sum(
                one.startswith(home[s]) and two.startswith(capital[home[s]])
                for s, one, two in zip(chosen, said["its country"], second, strict=True)
            ),
            "its continent": count(said["its continent"], [continent[home[s]] for s in chosen]),
            "its old continent": count(
                said["its continent"], [of[s]["places.continent"] for s in chosen]
            ),
            "what it is": count(
                said["what it is"], [of[s].get("places.kind", "?") for s in chosen]
            ),
            "known what it is": sum("places.kind" in of[s] for s in chosen),
        }

    base = ask(places, country)
    base["asked backwards"] = backwards(atlas, places, country)
    chosen = rng.sample(places, PLACES)
    home = {
        s: rng.choice([c for c in common if continent[c] != of[s]["places.continent"]])
        for s in chosen
    }
    facts = [ue.Fact("{} lies in", s, home[s], country[s]) for s in chosen]
    values = values_for(atlas.model, atlas.tokenizer, facts, ue.EMMET)
    total: dict[str, int] = {}
    higher, written = [], 0
    for fact in facts:
        line = f"{fact.target_new} has"
        before = logp(atlas, [line], [fact.subject])
        with atlas.single(fact, values, ue.EMMET).applied():
            written += atlas.says([fact.text])[0].startswith(fact.target_new)
            for name, number in ask([fact.subject], home).items():
                total[name] = total.get(name, 0) + number
            higher.append(float(logp(atlas, [line], [fact.subject])[0] - before[0]))
    change = round(float(np.mean(higher)), 3)
    after = {"written": written, **total, "backwards, gained": change}
    found = {"before": base, "after": after}
    log.info("%s", found)
    return found


def count(said: Sequence[str], right: Sequence[str]) -> int:
    return sum(text.startswith(one) for text, one in zip(said, right, strict=True))


def logp(atlas: Atlas, prompts: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """Mean log-probability of each target behind its prompt."""
    records = [ue.Record(ue.Fact("{}" + p[len(p.split()[0]) :], p.split()[0], t))
               for p, t in zip(prompts, targets, strict=True)]  # fmt: skip
    rows = Sheet.of(atlas.model, atlas.tokenizer, records).rows(AFTER, range(len(records)))
    return to_table(rows)["logp_new"].to_numpy()


def backwards(atlas: Atlas, places: Sequence[str], country: dict[str, str]) -> dict[str, float]:
    """Whether the model that was never edited knows its facts from the other end.

    "Italy has": of a place in Italy and one elsewhere, which is more probable? Half by chance. And
    "Paris is the capital of", answered greedily.
    """
    names = sorted(set(country.values()))
    won = []
    for name in names:
        found = logp(atlas, [f"{name} has"] * len(places), places)
        # a place that is probable behind every country says nothing: compared with the mean
        won.append(found)
    table = np.stack(won)
    table = table - table.mean(axis=0)
    shares = []
    for row, name in zip(table, names, strict=True):
        own = np.array([country[p] == name for p in places])
        shares.append((row[own][:, None] > row[~own][None]).mean())
    pairs = [(d["countries.capital"], c) for c, d in atlas.of.items() if "countries.capital" in d]
    said = atlas.says([f"{capital} is the capital of" for capital, _ in pairs])
    forwards = atlas.says([f"The capital of {c} is" for _, c in pairs])
    return {
        "own place ahead of another": round(float(np.mean(shares)), 3),
        "capitals": len(pairs),
        "country of a capital": count(said, [c for _, c in pairs]),
        "capital of a country": count(forwards, [capital for capital, _ in pairs]),
    }


# --- a store of facts -----------------------------------------------------------------------------


def smollm2(_: Atlas) -> dict[str, Any]:
    """Nothing is edited; a question gets the facts of the store whose subject stands in it.

    Only questions that get one are asked; what the others answer stands in smollm2_hundred.json.
    """
    model, tokenizer = ue.load_model("smollm2")
    records = ue.load_records("counterfact-250")[:STORED]
    facts = [record.fact for record in records]

    def ahead(prompt: str) -> str:
        lines = [f"{fact.text} {fact.target_new}. " for fact in facts if fact.subject in prompt]
        return "".join(lines) + prompt

    # the edit's own prompt is asked as the first of the paraphrases: a Fact has its subject once
    given = [
        replace(
            record,
            paraphrases=tuple(map(ahead, (record.fact.text, *record.paraphrases))),
            neighbours=(),
            probes={},
        )
        for record in records
    ]
    table = to_table(Sheet.of(model, tokenizer, given).rows(AFTER, range(len(records))))
    table = table[table["kind"] != "rewrite"].copy()
    table.loc[~table.duplicated("record"), "kind"] = "rewrite"
    touched = [
        replace(record, neighbours=near, paraphrases=(), probes={})
        for record in records
        if (near := tuple(prompt for prompt in record.neighbours if ahead(prompt) != prompt))
    ]
    behind = [replace(one, neighbours=tuple(map(ahead, one.neighbours))) for one in touched]
    right = {
        when: int(
            to_table(Sheet.of(model, tokenizer, asked).rows(when, range(len(asked))))
            .query("kind == 'neighbour'")["success"]
            .sum()
        )
        for when, asked in ((BEFORE, touched), (AFTER, behind))
    }
    neighbours = [prompt for record in records for prompt in record.neighbours]
    paraphrases = [prompt for record in records for prompt in record.paraphrases]
    found = {
        "records": len(records),
        **scores(table),
        "neighbours": len(neighbours),
        "neighbours behind a fact": sum(ahead(prompt) != prompt for prompt in neighbours),
        "of these right": right,
        "paraphrases without one": sum(ahead(prompt) == prompt for prompt in paraphrases),
    }
    log.info("%s", found)
    return found


PARTS: dict[str, Callable[[Atlas], Any]] = {
    "singles": singles,
    "blind": lambda atlas: batches(atlas, None),
    "hard": lambda atlas: batches(atlas, "hard"),
    "moved": moved,
    "smollm2": smollm2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    out: Path = arguments.out
    result: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    result |= {
        "command": f"python benchmarks/breaks.py --seed {arguments.seed} --out {out.as_posix()}",
        "seed": arguments.seed,
        "size": SIZE,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "threads": torch.get_num_threads(),
    }
    atlas = Atlas(arguments.seed)
    for name, part in PARTS.items():
        if name in result or name not in (arguments.parts or PARTS):
            continue
        began = time.process_time()
        result[name] = part(atlas)
        minutes = result.setdefault("minutes", {})
        minutes[name] = round((time.process_time() - began) / 60, 1)
        log.info("%s: %.1f CPU minutes", name, minutes[name])
        out.write_text(in_lines(result), encoding="utf-8")


if __name__ == "__main__":
    main()

"""A hundred real edits: ROME, EMMET, MEMIT and fine-tuning on SmolLM2, singly and in batches.

    python benchmarks/real_edits.py choose --rows _build/real_edits
    python benchmarks/real_edits.py measure --rows _build/real_edits
    python benchmarks/real_edits.py texts --rows _build/real_edits
    python benchmarks/real_edits.py frontier --rows _build/real_edits
    python benchmarks/real_edits.py summarise --rows _build/real_edits --out book/data/NAME.json

The facts are records 0 to 99 of "counterfact-250" (0 to 249 for the batch of 250), all of them,
with both paraphrases and all ten neighbours. Layer, clamp and lam come from records 150 to 249:
suggest_smollm2.py leaves layers 0, 3 and 4 alike within the noise, and `choose` compares these on a
batch of 32 of them. Layer 3 is where MEMIT's window ends, so that every method writes the same
values at the same place; layer 0, which is ahead by a little on the records chosen on, is a
condition too. The norm of fine-tuning is chosen on the same records (`choose`). Each condition and
seed (of the sampled contexts) writes its answers to a file of its own; what is there is not
measured again.
`texts` has the edited models write behind the prompts of the first 20 records, for fluency.
C0 is that of the cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import unified_edit as ue
from unified_edit.editing import values_for
from unified_edit.editing.values import Values
from unified_edit.facts import Fact, shared_subjects
from unified_edit.measuring.generation import Generation, generated_rows
from unified_edit.measuring.questions import Sheet
from unified_edit.measuring.report import to_table
from unified_edit.measuring.scores import AFTER, BEFORE, summarise
from unified_edit.statistics import statistics_for

log = logging.getLogger("real_edits")

AT_ONCE = 16
FINALISTS = (0, 3, 4)
LAYER, LAYERS = 3, (1, 2, 3)
ONE = ue.EMMET.replace(layers=(LAYER,), clamp=0.75)
SPREAD = ue.MEMIT.replace(layers=LAYERS, clamp=0.75, ridge=100.0)
#: How large an entry of Delta may be in fine-tuning: tried, and chosen by `choose`.
NORMS = (5e-4, 2e-3, 5e-3, None)
NORM: float | None = 5e-3
#: Of which records texts are generated, and behind how many tokens a text ends.
WRITTEN, LENGTH = 20, 60


@dataclass(frozen=True)
class Condition:
    """A method, how many facts it writes at once, of how many records, for which seeds."""

    name: str
    method: ue.Method | None  # None: fine-tuning
    batch: int
    records: int = 100
    seeds: tuple[int, ...] = (0,)
    writes: bool = False  # whether its texts are looked at


def _conditions() -> Iterator[Condition]:
    three, at_0 = (0, 1, 2), ONE.replace(layers=(0,))
    yield Condition("EMMET", ONE, 1, seeds=three, writes=True)
    yield Condition("EMMET", ONE, 100, seeds=three, writes=True)
    yield Condition("MEMIT", SPREAD, 100, seeds=three, writes=True)
    yield Condition("MEMIT, lam = 1000", SPREAD.replace(ridge=1000.0), 100, seeds=three)
    for lam in (1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0):
        yield Condition(f"one layer, lam = {lam:g}", ONE.replace(ridge=lam), 100)
    yield Condition("EMMET_RELEASED", ue.EMMET_RELEASED.replace(
        layers=(LAYER,), clamp=ONE.clamp, ridge=100.0), 100)  # fmt: skip
    for lam in (10.0, 10_000.0, 100_000.0):
        yield Condition(f"MEMIT, lam = {lam:g}", SPREAD.replace(ridge=lam), 100)
    yield Condition("FT-W", None, 1)
    yield Condition("FT-W", None, 100, writes=True)
    yield Condition("EMMET", ONE, 10)
    yield Condition("MEMIT", SPREAD, 10)
    yield Condition("MEMIT", SPREAD, 1)
    yield Condition("EMMET, layer 0", at_0, 1)
    yield Condition("EMMET, layer 0", at_0, 100)
    yield Condition("EMMET", ONE, 250, records=250)
    yield Condition("MEMIT", SPREAD, 250, records=250)
    yield Condition("ROME", ue.ROME.replace(
        layers=(LAYER,), clamp=4.0, contexts=ONE.contexts), 1)  # fmt: skip


CONDITIONS = tuple(_conditions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["choose", "measure", "texts", "frontier", "summarise"])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", default="0/1", help="measure: this of so many parts, 0/2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.what == "measure":
        part, parts = map(int, arguments.part.split("/"))
        measure(arguments.rows, part, parts)
    elif arguments.what == "choose":
        choose(arguments.rows)
    elif arguments.what == "texts":
        texts(arguments.rows)
    elif arguments.what == "frontier":
        frontier(arguments.rows)
    else:
        summarised = summary(arguments.rows)
        arguments.out.write_text(json.dumps(summarised, indent=1) + "\n", encoding="utf-8")


def choose(folder: Path) -> None:
    """On 32 facts: the equality at each layer that a sweep of single edits left, and norms of FT.

    Fine-tuning is tried on the first 16 of them, singly and together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = ue.load_model("smollm2")
    records = ue.load_records("counterfact-250")[150:182]
    statistics = statistics_for(model, tokenizer, FINALISTS)
    for layer in FINALISTS:
        path = folder / f"choose-{layer}.json"
        if not path.exists():
            facts = [record.fact for record in records]
            edit = made(
                model, tokenizer, facts, ONE.replace(layers=(layer,)), statistics, seed=0
            )  # fmt: skip
            with edit.applied():
                rows = Sheet.of(model, tokenizer, records).rows(AFTER, range(len(records)))
            norm = float(edit.delta(layer).norm())
            kept = {"layer": layer, "norm_of_last_delta": [norm], "rows": rows}
            path.write_text(json.dumps(kept, default=str), encoding="utf-8")
        kept = json.loads(path.read_text(encoding="utf-8"))
        log.info("layer %d: %s", layer, scores(pd.DataFrame(kept["rows"])))
    few = records[:16]
    sheet = Sheet.of(model, tokenizer, few)
    for norm in NORMS:
        for batch in (1, len(few)):
            path = folder / f"choose-FT-{norm}-{batch}.json"
            if not path.exists():
                rows = []
                for start in range(0, len(few), batch):
                    places = range(start, start + batch)
                    facts = [few[place].fact for place in places]
                    edit = ue.fine_tune(model, tokenizer, facts, layer=LAYER, norm=norm,
                                        apply=False)  # fmt: skip
                    with edit.applied():
                        rows += sheet.rows(AFTER, places)
                path.write_text(json.dumps({"rows": rows}, default=str), encoding="utf-8")
            kept = json.loads(path.read_text(encoding="utf-8"))
            log.info("FT, norm %s, batch %d: %s", norm, batch, scores(pd.DataFrame(kept["rows"])))


def measure(folder: Path, part: int, parts: int) -> None:
    """Measure what is not there yet: every `parts`-th condition."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = ue.load_model("smollm2")
    statistics = statistics_for(model, tokenizer, (0, *LAYERS))
    records = ue.load_records("counterfact-250")
    before = folder / "before.json"
    if not before.exists():
        rows = Sheet.of(model, tokenizer, records).rows(BEFORE, range(len(records)))
        before.write_text(json.dumps({"rows": rows}, default=str), encoding="utf-8")
    jobs = [(one, seed) for one in CONDITIONS for seed in one.seeds]
    for number, (one, seed) in enumerate(jobs):
        path = folder / f"{file_name(one)}-{seed}.json"
        if number % parts != part or path.exists():
            continue
        began, cpu = time.perf_counter(), time.process_time()
        chosen = records[: one.records]
        sheet = Sheet.of(model, tokenizer, chosen)
        if one.method is not None and not (one.method.sequential and one.batch > 1):
            for start in range(0, len(chosen), AT_ONCE):  # kept: together they take less time
                some = [record.fact for record in chosen[start : start + AT_ONCE]]
                values_for(model, tokenizer, some, one.method, seed=seed)
                log.info("%s %d: values of %d", one.name, seed, start + len(some))
        rows: list[dict[str, Any]] = []
        norms: list[float] = []
        for start in range(0, len(chosen), one.batch):
            places = range(start, min(start + one.batch, len(chosen)))
            facts = [chosen[place].fact for place in places]
            edit = made(model, tokenizer, facts, one.method, statistics, seed)
            with edit.applied():
                rows += sheet.rows(AFTER, places)
            norms += [float(edit.delta(layer).norm()) for layer in edit.layers[-1:]]
            log.info("%s %d: %d of %d", one.name, seed, places[-1] + 1, len(chosen))
        kept = {
            "condition": one.name, "batch": one.batch, "records": one.records, "seed": seed,
            "method": edit.method.to_dict(), "norm_of_last_delta": norms,
            "seconds": round(time.perf_counter() - began),
            "cpu_seconds": round(time.process_time() - cpu), "rows": rows,
        }  # fmt: skip
        path.write_text(json.dumps(kept, default=str), encoding="utf-8")


def texts(folder: Path) -> None:
    """What the model writes behind the prompts of the first records, before and after edits."""
    model, tokenizer = ue.load_model("smollm2")
    statistics = statistics_for(model, tokenizer, LAYERS)
    records = ue.load_records("counterfact-250")
    how = Generation(length=LENGTH)
    path = folder / "texts-before.json"
    if not path.exists():
        sheet = Sheet.of(model, tokenizer, records)
        rows = generated_rows(sheet, tokenizer, BEFORE, range(WRITTEN), how)
        path.write_text(json.dumps({"rows": rows}, default=str), encoding="utf-8")
    for one in (one for one in CONDITIONS if one.writes):
        path = folder / f"texts-{file_name(one)}.json"
        if path.exists():
            continue
        chosen = records[: one.records]
        sheet = Sheet.of(model, tokenizer, chosen)
        rows = []
        for start in range(0, WRITTEN, one.batch):
            places = range(start, min(start + one.batch, len(chosen)))
            facts = [chosen[place].fact for place in places]
            with made(model, tokenizer, facts, one.method, statistics, seed=0).applied():
                rows += generated_rows(
                    sheet, tokenizer, AFTER, [p for p in places if p < WRITTEN], how
                )  # fmt: skip
        path.write_text(json.dumps({"rows": rows}, default=str), encoding="utf-8")
        log.info("%s %d: texts", one.name, one.batch)


def frontier(folder: Path) -> None:
    """What one layer misses and what it pays for each lam, for the batch of a hundred."""
    model, tokenizer = ue.load_model("smollm2")
    statistics = statistics_for(model, tokenizer, (LAYER,))
    facts = [record.fact for record in ue.load_records("counterfact-250")[:100]]
    values = shared(model, tokenizer, facts, ONE, seed=0)
    points = []
    for lam in (0.0, *(10 ** (power / 2) for power in range(-4, 13))):
        edit = ue.edit(
            model, tokenizer, facts, ONE.replace(ridge=lam), statistics=statistics, values=values,
            seed=0, apply=False, on_shared_subject="merge",
        )  # fmt: skip
        found = edit.diagnosis[LAYER]
        points.append({
            "lam": float(f"{lam:.4g}"),
            "miss": float(f"{found.memorization_error:.4g}"),
            "cost": float(f"{found.preservation_error:.4g}"),
            "condition": float(f"{found.condition:.4g}"),
        })  # fmt: skip
        log.info("%s", points[-1])
    (folder / "frontier.json").write_text(json.dumps(points), encoding="utf-8")


def file_name(one: Condition) -> str:
    """Of the answers to a condition."""
    name = "".join(letter if letter.isalnum() else "_" for letter in one.name)
    return f"{name}-{one.batch}"


def made(
    model: torch.nn.Module, tokenizer: Any, facts: Sequence[Fact], method: ue.Method | None,
    statistics: ue.KeyStatistics, seed: int,
) -> ue.Edit:  # fmt: skip
    """The edit that writes some facts together, not applied."""
    if method is None:
        return ue.fine_tune(model, tokenizer, facts, layer=LAYER, norm=NORM, apply=False)
    values = None if method.sequential and len(facts) > 1 else shared(
        model, tokenizer, facts, method, seed
    )  # fmt: skip
    return ue.edit(
        model, tokenizer, facts, method, statistics=statistics, values=values, seed=seed,
        apply=False, on_shared_subject="merge",
    )  # fmt: skip


def shared(
    model: torch.nn.Module, tokenizer: Any, facts: Sequence[Fact], method: ue.Method, seed: int
) -> Values:
    """The values of facts: those of single facts from the cache, one for those of a subject."""
    together = {place for pair in shared_subjects(facts) for place in pair}
    alone = [fact for place, fact in enumerate(facts) if place not in together]
    each = []
    if alone:
        each.append(values_for(model, tokenizer, alone, method, seed=seed))
    if together:
        several = [facts[place] for place in sorted(together)]
        each.append(ue.optimise_values(
            model, tokenizer, several, method, seed=seed, on_shared_subject="merge"
        ))  # fmt: skip
    return Values.joined(each)


def summary(folder: Path) -> dict[str, Any]:
    """Scores of everything measured, before and after, with intervals by record."""
    before = pd.DataFrame(json.loads((folder / "before.json").read_text(encoding="utf-8"))["rows"])
    lines = []
    for count in (100, 250):
        lines.append({"condition": "before", "batch": 0, "records": count, "seed": 0,
                      **scores(before[before["record"] < count]),
                      **fluency(folder / "texts-before.json"),
                      "by_record": by_record(before[before["record"] < count])})  # fmt: skip
    for one in CONDITIONS:
        for seed in one.seeds:
            path = folder / f"{file_name(one)}-{seed}.json"
            if not path.exists():
                log.warning("not measured: %s, seed %d", one.name, seed)
                continue
            kept = json.loads(path.read_text(encoding="utf-8"))
            rows = pd.DataFrame(kept.pop("rows"))
            written = folder / f"texts-{file_name(one)}.json"
            if seed == 0 and written.exists():
                kept |= fluency(written)
            lines.append({**kept, **scores(rows), "by_record": by_record(rows)})
    at = {line["condition"]: line for line in lines if line["batch"] == 100 and line["seed"] == 0}
    points = json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    for point in points:
        name = f"one layer, lam = {point['lam']:g}" if point["lam"] else "EMMET"
        point |= {score: at[name][score] for score in ("ES", "PS", "NS", "S") if name in at}
    versions = {name: version(name) for name in ("unified_edit", "torch", "transformers")}
    return {
        "command": "benchmarks/real_edits.py measure, then summarise",
        "model": "smollm2 (SmolLM2-135M-Instruct, Q4_1, dequantised to float32)",
        "records": "counterfact-250, 0 to 99 (0 to 249 for the batch of 250)",
        "fine-tuning": {"layer": LAYER, "norm": NORM, "steps": 25, "learning_rate": 5e-4},
        "chosen on records 150 to 181": tried(folder),
        "versions": versions, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "minutes": round(sum(line.get("seconds", 0) for line in lines) / 60),
        "frontier": points, "scores": lines,
    }  # fmt: skip


def fluency(path: Path) -> dict[str, Any]:
    """GE of the texts of the first records: value, low, high."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = [row | {"success": None} for row in rows]  # a text is neither right nor wrong
    found = summarise(to_table(rows))["GE"]
    return {"GE": [round(number, 3) for number in (found.value, found.low, found.high)]}


def tried(folder: Path) -> list[dict[str, Any]]:
    """What `choose` found: layers of the equality; norms of fine-tuning, singly and together."""
    return [
        {"what": path.stem.removeprefix("choose-"), **scores(pd.DataFrame(kept["rows"]))}
        for path in sorted(folder.glob("choose-*.json"))
        for kept in [json.loads(path.read_text(encoding="utf-8"))]
    ]


def by_record(rows: pd.DataFrame) -> dict[str, str]:
    """Successes of each record, of 1 rewrite, 2 paraphrases, 10 neighbours: "1 0 1 ..."."""
    numbers = rows.assign(GS=rows["generated"])
    columns = {"ES": ("rewrite", "success"), "PS": ("paraphrase", "success"),
               "NS": ("neighbour", "success"), "GS": ("rewrite", "GS")}  # fmt: skip
    return {
        name: " ".join(
            str(int(number))
            for number in numbers[numbers["kind"] == kind].groupby("record")[column].sum()
        )
        for name, (kind, column) in columns.items()
    }


def scores(rows: pd.DataFrame) -> dict[str, Any]:
    """ES, PS, NS, S and GS of some answers: value, low, high."""
    table = to_table(rows.to_dict("records"))
    found = summarise(table)
    return {
        name: [round(found[name].value, 4), round(found[name].low, 4), round(found[name].high, 4)]
        for name in ("ES", "PS", "NS", "S", "GS")
        if name in found
    }


if __name__ == "__main__":
    main()

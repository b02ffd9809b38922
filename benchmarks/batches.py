"""Batch after batch on atlas: the past unknown, weighed, held; and all facts in one batch.

    python benchmarks/batches.py --out book/data/atlas_batches.json

Twenty batches of 23 facts, one fact for each of 460 subjects, into one layer. The runs differ in
what a batch knows of those before it, and in nothing else: keys, values and layer are those of
EMMET's recipe, and all runs write the first batch with the same values. After every batch the
first one is asked everything, and all facts so far their own prompt; after the last one, all of
them are asked everything. A quarter of an hour on a core; runs that the file holds already are
kept, and `--runs` makes some of them only.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unified_edit as ue
from unified_edit.editing import Values, values_for
from unified_edit.measuring import Report, Sheet, to_table
from unified_edit.measuring.scores import AFTER, BEFORE
from unified_edit.statistics import statistics_for

log = logging.getLogger("batches")

COMMAND = "python benchmarks/batches.py"
SCORES = ("ES", "PS", "NS")


@dataclass(frozen=True)
class Run:
    """What the batches of one run know of each other, and how large they are."""

    name: str
    history: Any
    method: ue.Method
    size: int


def runs(size: int, facts: int) -> Iterator[Run]:
    """All runs, in the order of the file; lam = 1 is MEMIT's on atlas."""
    yield Run("blind", None, ue.EMMET, size)
    yield Run("soft", "soft", ue.EMMET.replace(ridge=1.0), size)
    yield Run("hard", "hard", ue.EMMET, size)
    yield Run("at once", None, ue.EMMET, facts)
    yield Run("blind, large batches", None, ue.EMMET, 5 * size)


class Measured:
    """What is asked after every batch of one run."""

    def __init__(self, editor: ue.Editor, records: Sequence[ue.Record], first: int) -> None:
        self.editor, self.first = editor, first
        model, tokenizer = editor.model, editor.tokenizer
        self.whole = Sheet.of(model, tokenizer, records[:first])
        bare = [replace(record, paraphrases=(), neighbours=(), probes={}) for record in records]
        self.prompts = Sheet.of(model, tokenizer, bare)
        self.pairs: list[tuple[Tensor, Tensor, float]] = []  # K, V and norm(V - W0 K) of a batch
        (self.layer,) = editor.method.resolve(editor.parts).layers or ()
        weight = editor.parts.weight(self.layer)
        self.W0 = weight.to_stored(editor.ledger.base_weight(weight)).double()

    def base(self) -> dict[str, float]:
        """The scores of the first batch before any edit."""
        return self._scores(BEFORE)

    def after(self, edits: Sequence[ue.Edit], facts: int) -> dict[str, Any]:
        """One line of the file, after the last of `edits`."""
        last = edits[-1]
        deltas = [edit.delta(self.layer) for edit in edits]
        W = self.W0 + sum(deltas)
        name = last.names[self.layer]
        K = last.keys[name]
        # an edit without a history does not record V; it holds the equality: V is what W gives now
        V = last.targets[name] if last.targets else W @ K
        self.pairs.append((K, V, float((V - self.W0 @ K).norm())))
        rows = self.prompts.rows(AFTER, range(facts))
        scores = self._scores(AFTER)
        greedy = [bool(row["generated"]) for row in rows]
        return {
            "batches": len(edits),
            "facts": facts,
            **{f"{name} of the first": score for name, score in scores.items()},
            "greedy of the first": rounded(sum(greedy[: self.first]) / self.first),
            "ES of all": rounded(sum(bool(row["success"]) for row in rows) / facts),
            "greedy of all": rounded(sum(greedy) / facts),
            "norm of the sum": float(f"{float((W - self.W0).norm()):.4g}"),
            "missed": [
                float(f"{float((W @ K - V).norm()) / asked:.3g}") for K, V, asked in self.pairs
            ],
        }

    def _scores(self, when: str) -> dict[str, float]:
        found = Report(to_table(self.whole.rows(when, range(self.first))), bootstrap=100)
        summary = found.before if when == BEFORE else found.summary
        return {name: rounded(summary[name].value) for name in SCORES}


def rounded(share: float) -> float:
    return round(share, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=23)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", nargs="+", help="names of runs; all if not given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("unified_edit").setLevel(logging.ERROR)

    model, tokenizer = ue.load_model("atlas")
    facts = arguments.batches * arguments.size
    records = ue.load_records("atlas", limit=facts, seed=arguments.seed)
    assert len(records) == facts, "there are not as many records"
    statistics = statistics_for(model, tokenizer, [1])
    result: dict[str, Any] = {
        "command": f"{COMMAND} --batches {arguments.batches} --size {arguments.size} "
        f"--seed {arguments.seed} --out {arguments.out.as_posix() if arguments.out else 'FILE'}",
        "facts": facts,
        "size": arguments.size,
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "unified_edit")},
        },
        "threads": torch.get_num_threads(),
        "runs": kept(arguments.out),
    }
    known = {run["name"] for run in result["runs"]}
    first = values_for(
        model, tokenizer, [record.fact for record in records[: arguments.size]], ue.EMMET
    )
    for run in runs(arguments.size, facts):
        if run.name in known or run.name not in (arguments.runs or [run.name]):
            continue
        began = time.process_time()
        result["runs"].append(measure(model, tokenizer, records, run, statistics, first))
        minutes = round((time.process_time() - began) / 60, 1)
        result["runs"][-1]["minutes"] = minutes
        log.info("%s: %.1f CPU minutes", run.name, minutes)
        if arguments.out:  # after each run: nothing is lost by stopping
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(in_lines(result), encoding="utf-8")


def kept(out: Path | None) -> list[dict[str, Any]]:
    """The runs that a file holds."""
    if out is None or not out.exists():
        return []
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["runs"]
    return found


def measure(
    model: Any,
    tokenizer: Any,
    records: Sequence[ue.Record],
    run: Run,
    statistics: ue.KeyStatistics,
    first: Values,
) -> dict[str, Any]:
    """Write one batch after another, and ask after each; the model is its base again at the end."""
    editor = ue.Editor(
        model, tokenizer, method=run.method, statistics=statistics, history=run.history
    )
    measured = Measured(editor, records, len(first.facts))
    lines, edits = [], []
    found: dict[str, Any] = {
        "name": run.name,
        "history": run.history,
        "ridge": run.method.ridge,
        "size": run.size,
        "before": measured.base(),
    }
    for start in range(0, len(records), run.size):
        facts = [record.fact for record in records[start : start + run.size]]
        values = first if len(facts) == len(first.facts) and not start else None
        edits.append(editor.edit(facts, values=values))
        lines.append(measured.after(edits, start + len(facts)))
        log.info("%s %s", run.name, {k: v for k, v in lines[-1].items() if k != "missed"})
    if run.history == "hard":
        K = torch.cat([K for K, _, _ in measured.pairs], dim=1)
        found["room"] = room(statistics.metric(measured.layer).whiten(K))
    rows = Sheet.of(model, tokenizer, records).rows(AFTER, range(len(records)))
    summary = Report(to_table(rows)).summary
    found["all at the end"] = {
        name: [rounded(x) for x in (score.value, score.low, score.high)]
        for name in (*SCORES, "S")
        for score in (summary[name],)
    }
    editor.reset()
    return {**found, "after": lines}


def room(A: Tensor) -> list[float]:
    """For each whitened key the share of its length that lies outside of all before it."""
    S = torch.linalg.qr(A).R
    return [rounded(float(x)) for x in S.diagonal().abs() / A.norm(dim=0)]


def in_lines(result: dict[str, Any]) -> str:
    """JSON with one line for each batch of a run."""
    head = json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1)[:-2]
    blocks = []
    for run in result["runs"]:
        lines = ",\n".join("    " + json.dumps(line) for line in run["after"])
        top = json.dumps({k: v for k, v in run.items() if k != "after"})[:-1]
        blocks.append(f'  {top}, "after": [\n{lines}\n  ]}}')
    return head + ',\n "runs": [\n' + ",\n".join(blocks) + "\n ]\n}\n"


if __name__ == "__main__":
    main()

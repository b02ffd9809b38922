"""Batch after batch on atlas: the committed file, and the script that made it."""

from __future__ import annotations

import json
from itertools import pairwise

from checkout import ROOT, load

import unified_edit as ue
from unified_edit.model import anatomy

script = load(ROOT / "benchmarks" / "batches.py")
PATH = "book/data/atlas_batches.json"
TEXT = (ROOT / PATH).read_text(encoding="utf-8")
FILE = json.loads(TEXT)
RUNS = {run["name"]: run for run in FILE["runs"]}


def test_every_run_is_there_once() -> None:
    wanted = list(script.runs(FILE["size"], FILE["facts"]))
    assert [(r["name"], r["history"], r["ridge"], r["size"]) for r in FILE["runs"]] == [
        (r.name, r.history, r.method.ridge, r.size) for r in wanted
    ]
    for run in wanted:
        assert len(RUNS[run.name]["after"]) == FILE["facts"] // run.size


def test_the_file_says_how_it_was_made() -> None:
    assert FILE["command"] == f"{script.COMMAND} --batches 20 --size 23 --seed 1 --out {PATH}"
    assert set(FILE["versions"]) == {"python", "torch", "transformers", "unified_edit"}
    assert all(run["minutes"] > 0 for run in FILE["runs"])
    assert script.in_lines(FILE) == TEXT


def test_the_weight_of_a_soft_history_is_that_of_memit(atlas) -> None:
    model, _ = atlas
    assert RUNS["soft"]["ridge"] == ue.MEMIT.resolve(anatomy(model)).ridge


def test_runs_begin_alike() -> None:
    first = [RUNS[name]["after"][0] for name in ("blind", "soft", "hard")]
    for one, other in pairwise(first):
        for key in one:
            if "first" in key or "all" in key:
                assert one[key] == other[key], key


def test_a_hard_history_misses_nothing() -> None:
    for line in RUNS["hard"]["after"]:
        assert len(line["missed"]) == line["batches"]
        assert max(line["missed"]) < 1e-8
    assert RUNS["blind"]["after"][-1]["missed"][0] > 0.1
    room = RUNS["hard"]["room"]
    assert len(room) == FILE["facts"] and min(room) > 0 and room[0] == max(room) == 1

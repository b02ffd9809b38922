"""Relations as matrices on atlas and SmolLM2: the committed file, and the script that made it."""

from __future__ import annotations

import json
import math
import sys

import pytest
from checkout import ROOT, load

import unified_edit as ue

sys.path.insert(0, str(ROOT / "benchmarks"))  # as in `python benchmarks/relations.py`
script = load(ROOT / "benchmarks" / "relations.py")
TEXT = (ROOT / "book" / "data" / "relations.json").read_text(encoding="utf-8")
FILE = json.loads(TEXT)


def test_the_file_says_how_it_was_made() -> None:
    about = FILE["about"]
    assert about["command"] == script.COMMAND
    assert (about["most"], about["needed"]) == (script.MOST, script.NEEDED)
    assert about["settings"] == json.loads(json.dumps(script.SETTINGS))
    assert script.in_lines(FILE) == TEXT


def test_all_relations_of_atlas_are_there() -> None:
    names = {one.name for one in ue.relations.atlas_relations()}
    assert set(FILE["atlas"]) == {*names, "edited"}


@pytest.mark.parametrize("model", ["atlas", "smollm2"])
def test_a_row_with_scores_has_enough_pairs_and_intervals(model: str) -> None:
    scored = 0
    for name, row in FILE[model].items():
        if name in ("edited", "drawn"):
            continue
        enough = row["known"] >= script.NEEDED and "why" not in row
        assert ("faithfulness" in row) == enough, name
        for what in ("faithfulness", "causality") if enough else ():
            value, low, high, n = row[what]
            if not n:  # all say the same, and nobody can become another one
                assert what == "causality"
                assert row["majority"] == 1
                continue
            found = ue.relations.share([1] * round(value * n) + [0] * (n - round(value * n)))
            assert value == pytest.approx(found.value, abs=1e-4)
            if math.isnan(found.low):
                assert low is high is None
            else:
                assert [low, high] == pytest.approx([found.low, found.high], abs=1e-4)
        scored += enough
    assert scored >= 4


def test_the_first_draw_is_that_of_the_table() -> None:
    drawn = FILE["smollm2"]["drawn"]
    for name in script.DRAWN["smollm2"]:
        for what in ("faithfulness", "causality"):
            assert len(drawn[name][what]) == len(script.SEEDS)
            assert drawn[name][what][0] == FILE["smollm2"][name][what][0]


@pytest.mark.parametrize("model", ["atlas", "smollm2"])
def test_below_the_edited_block_the_matrix_reads_what_it_read_before(model: str) -> None:
    edited = FILE[model]["edited"]
    before, after = edited["before"]["by_layer"], edited["after"]["by_layer"]
    lowest = min(edited["edited_layers"])
    assert {at: after[at] for at in after if int(at) < lowest} == {
        at: before[at] for at in before if int(at) < lowest
    }
    assert len(edited["cosine"]) == len(edited["length"]) == edited["facts"]

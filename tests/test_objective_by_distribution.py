"""The table of objectives by distributions: the committed file, and the script that made it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from checkout import ROOT, load

import unified_edit as ue
from unified_edit.measuring import Sheet

script = load(ROOT / "benchmarks" / "objective_by_distribution.py")
PATH = "book/data/objective_by_distribution.json"
TEXT = (ROOT / PATH).read_text(encoding="utf-8")
FILE = json.loads(TEXT)
CELLS = {
    (tuple(line["layers"]), line["batch"], line["objective"], line["distribution"]): line
    for line in FILE["cells"]
}
WIDE, NARROW = (0, 1, 2), (0, 1)


def score(name: str, *cell: Any) -> float:
    return float(CELLS[cell][name][0])


def apart(*cells: tuple[Any, ...]) -> bool:
    """Whether the intervals of S of these cells ascend without overlapping."""
    return all(CELLS[a]["S"][2] < CELLS[b]["S"][1] for a, b in pairwise(cells))


# --- the file -------------------------------------------------------------------------------------


def test_every_combination_is_there_once() -> None:
    wanted = [(c.layers, c.batch, c.objective, c.distribution) for c in script.cells()]
    assert list(CELLS) == wanted
    assert len(FILE["cells"]) == len(wanted) == 3 * 5 * 4
    assert {(layers, batch) for layers, batch, *_ in wanted} == {
        (WIDE, 100),
        (WIDE, 10),
        (NARROW, 100),
    }


def test_the_file_says_how_it_was_made() -> None:
    assert FILE["command"] == f"{script.COMMAND} --records 100 --seed 1 --out {PATH}"
    assert (FILE["records"], FILE["seed"]) == (100, 1)
    assert set(FILE["versions"]) == {"python", "torch", "transformers", "unified_edit"}
    assert script.in_lines(FILE) == TEXT


def test_scores_lie_in_their_intervals() -> None:
    for key, line in CELLS.items():
        for name in ("ES", "PS", "NS", "S"):
            value, low, high = line[name]
            assert 0 <= low <= value <= high <= 1, (key, name)
        ES, PS, NS, S = (line[name][0] for name in ("ES", "PS", "NS", "S"))
        assert pytest.approx(3 / (1 / ES + 1 / PS + 1 / NS), abs=2e-4) == S
        edited = 1 if key[3] == "one" else len(key[0])
        assert len(line["preservation errors"]) == edited
        assert min(line["preservation errors"]) > 0


def test_batches_of_a_cell_have_its_scores_as_their_mean() -> None:
    for key, line in CELLS.items():
        batches = line["ES, PS, NS of each batch"]
        assert len(batches) == 100 // key[1]
        for place, name in enumerate(("ES", "PS", "NS")):
            mean = sum(batch[place] for batch in batches) / len(batches)
            assert mean == pytest.approx(line[name][0], abs=2e-4)


def test_ridges_are_those_of_the_presets(atlas: Any) -> None:
    model, _ = atlas
    released, memit = ue.EMMET_RELEASED.resolve(model), ue.MEMIT.resolve(model)
    assert script.OBJECTIVES["released damping"] == {"ridge": released.ridge, "ridge_from": 2}
    assert released.ridge_from == 2
    assert script.OBJECTIVES["least squares"] == {"ridge": memit.ridge}
    for cell in script.cells():
        method = cell.method.resolve(model)
        assert method.layers == (cell.layers[-1:] if cell.distribution == "one" else cell.layers)
        assert method.sequential == (cell.objective == "one by one")
        assert method.site.name == "block"
        assert method.distribution.name == (
            "memit" if cell.distribution == "one" else cell.distribution
        )


# --- what the chapter says of it ------------------------------------------------------------------


def test_up_to_one_the_ridge_makes_no_difference() -> None:
    for layers, batch in script.SETTINGS:
        for distribution in script.DISTRIBUTIONS:
            for objective in ("released damping", "least squares"):
                for name in ("ES", "PS", "NS", "S"):
                    assert score(name, layers, batch, objective, distribution) == pytest.approx(
                        score(name, layers, batch, "equality", distribution), abs=0.005
                    )


def test_emmet_gains_from_a_spread_where_the_last_layer_is_badly_chosen() -> None:
    for batch in (10, 100):
        wide = (WIDE, batch, "equality")
        assert apart((*wide, "one"), (*wide, "memit"), (*wide, "pmet"))
    narrow = [score("S", NARROW, 100, "equality", d) for d in script.DISTRIBUTIONS]
    assert max(narrow) - min(narrow) < 0.01


def test_full_shares_undo_a_ridge() -> None:
    ridge = (NARROW, 100, "heavy ridge")
    assert apart((*ridge, "one"), (*ridge, "memit"))
    for layers, loses in ((NARROW, "one"), (WIDE, "memit")):
        heavy, equality = (layers, 100, "heavy ridge"), (layers, 100, "equality")
        assert apart((*heavy, loses), (*equality, loses))
        assert not apart((*heavy, "full"), (*equality, "full"))
        assert score("S", *heavy, "full") > score("S", *equality, "full")


def test_full_shares_one_by_one_collapse_in_a_hundred_and_not_in_ten() -> None:
    single = (WIDE, 100, "one by one")
    assert apart((*single, "full"), (*single, "one"), (*single, "memit"))
    assert apart((*single, "memit"), (WIDE, 100, "equality", "memit"))
    assert max(CELLS[*single, "full"]["preservation errors"]) > 1e6
    assert max(CELLS[WIDE, 10, "one by one", "full"]["preservation errors"]) < 100
    assert score("S", WIDE, 10, "one by one", "full") > 0.95


# --- the script -----------------------------------------------------------------------------------


def test_one_cell_can_be_measured_anew(atlas: Any, atlas_texts: list[str]) -> None:
    """Two records, in seconds; what the file holds is measured again by the chapter."""
    model, tokenizer = atlas
    # an equality is held whatever C0 is
    statistics = ue.KeyStatistics.collect(*atlas, atlas_texts[:40], (1,), shrinkage=1e-2)
    records = ue.load_records("atlas", limit=100, seed=1)[:2]
    facts = [record.fact for record in records]
    cell = script.Cell((1,), 1, "equality", "one")
    values = ue.optimise_values(model, tokenizer, facts, cell.method)
    sheet = Sheet.of(model, tokenizer, records)
    line = script.measure(model, tokenizer, sheet, cell, statistics, values)
    assert list(line) == list(FILE["cells"][0])
    assert len(line["ES, PS, NS of each batch"]) == 2
    assert line["ES"][0] == 1.0

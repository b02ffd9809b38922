"""Batch after batch, measured on the way: against the same done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from fixtures_refusals import ONE, SPREAD, raising, refused

import unified_edit as ue
from unified_edit.errors import MethodError, ReportFileError
from unified_edit.measuring import Sheet, summarise, to_table
from unified_edit.model import ledger_of

PLACES = ("Rome", "Paris", "Oslo", "Vienna", "Madrid", "Lisbon", "Dublin")


@pytest.fixture(scope="module")
def records() -> list[ue.Record]:
    """Seven, so that the third batch is a short one."""
    return [
        ue.Record(
            fact=ue.Fact("{} was born in", place, PLACES[n - 3], PLACES[n - 1]),
            paraphrases=(f"I walked from {place} to",),
            neighbours=(f"The {place} river is in",),
        )
        for n, place in enumerate(PLACES)
    ]


@pytest.mark.parametrize(("history", "method"), [("hard", ONE), ("soft", SPREAD), (None, ONE)])
def test_it_is_what_one_would_do_by_hand(
    tiny, tiny_tokenizer, tiny_statistics, records, history, method
) -> None:
    report = ue.evaluate_batches(
        tiny, tiny_tokenizer, records, method, batch_size=3, history=history, every=2,
        statistics=tiny_statistics,
    )  # fmt: skip
    assert not ledger_of(tiny).active
    assert sorted(set(report.answers["batches"])) == [0, 2, 3]
    assert list(report.table["facts"]) == [6, 6, 6, 7, 7, 7]
    editor = ue.Editor(
        tiny, tiny_tokenizer, method=method, statistics=tiny_statistics, history=history
    )
    sheet = Sheet.of(tiny, tiny_tokenizer, records)
    for start in (0, 3, 6):
        edit = editor.edit([record.fact for record in records[start : start + 3]])
        assert torch.equal(edit.delta(1), report.edits[start // 3].delta(1))
    wanted = {"all": range(7), "first": range(3), "last": range(6, 7)}
    for of, places in wanted.items():
        by_hand = summarise(to_table(sheet.rows("after", places)))
        assert report.scores(3, of)["NS"] == by_hand["NS"]
        assert report.scores(3, of)["ES"].n == len(places)
    weight = editor.parts.weight(1)
    base = editor.ledger.base_weight(weight)
    moved = float((weight.parameter.detach() - base).norm() / base.norm())
    assert report.weights[3][1] == pytest.approx(moved, rel=1e-6)
    editor.reset()


def test_edits_in_force_are_put_back(tiny, tiny_tokenizer, tiny_statistics, records) -> None:
    kept = ue.edit(tiny, tiny_tokenizer, records[0].fact, ONE, statistics=tiny_statistics)
    there = tiny.state_dict()["transformer.h.1.mlp.c_proj.weight"].clone()
    arguments = (tiny, tiny_tokenizer, records[1:4], ONE)
    report = ue.evaluate_batches(*arguments, batch_size=2, statistics=tiny_statistics)
    assert ledger_of(tiny).active == (kept,)
    assert torch.equal(tiny.state_dict()["transformer.h.1.mlp.c_proj.weight"], there)
    assert report.edits[0].provenance.state == ledger_of(tiny).fingerprint()


@pytest.mark.parametrize("stops", ["edit", "answers"])
def test_a_run_that_was_stopped_goes_on(
    tiny, tiny_tokenizer, tiny_statistics, records, tmp_path, monkeypatch, stops
) -> None:
    more = {"batch_size": 2, "history": "hard", "statistics": tiny_statistics}
    arguments = (tiny, tiny_tokenizer, records, ONE)
    straight = ue.evaluate_batches(*arguments, **more)
    where = {
        "edit": ("unified_edit.editing.layer_loop.solve", 3),
        "answers": ("unified_edit.measuring.batches._keep", 3),
    }
    place, at = where[stops]
    module, _, name = place.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    monkeypatch.setattr(place, raising(KeyboardInterrupt("stopped"), at, original))
    with refused(tiny, KeyboardInterrupt, "stopped"):
        ue.evaluate_batches(*arguments, **more, to=tmp_path)
    monkeypatch.undo()
    went_on = ue.evaluate_batches(*arguments, **more, to=tmp_path)
    assert [edit.facts for edit in went_on.edits] == [edit.facts for edit in straight.edits]
    assert went_on.table.drop(columns="weights").equals(straight.table.drop(columns="weights"))
    for number, layers in straight.weights.items():
        assert went_on.weights[number] == pytest.approx(layers, rel=1e-9)
    # a third time there is nothing to do
    monkeypatch.setattr("unified_edit.editing.layer_loop.solve", None)
    assert ue.evaluate_batches(*arguments, **more, to=tmp_path).table.equals(went_on.table)


def test_a_folder_of_another_run(tiny, tiny_tokenizer, tiny_statistics, records, tmp_path) -> None:
    more = {"statistics": tiny_statistics, "to": tmp_path}
    arguments = (tiny, tiny_tokenizer, records[:2], ONE)
    ue.evaluate_batches(*arguments, batch_size=2, **more)
    with refused(tiny, ReportFileError, "batch_size", "another folder"):
        ue.evaluate_batches(*arguments, batch_size=1, **more)
    with refused(tiny, ReportFileError, "history"):
        ue.evaluate_batches(*arguments, batch_size=2, history="hard", **more)
    (tmp_path / "run.json").write_text("[")
    with refused(tiny, ReportFileError, "cannot be used for a run"):
        ue.evaluate_batches(*arguments, batch_size=2, **more)


def test_bad_arguments(tiny, tiny_tokenizer, tiny_statistics, records) -> None:
    with refused(tiny, MethodError, "history is 'all'"):
        ue.evaluate_batches(tiny, tiny_tokenizer, records, ONE, batch_size=2, history="all")
    with refused(tiny, MethodError, "every"):
        ue.evaluate_batches(tiny, tiny_tokenizer, records, ONE, batch_size=2, every=0)
    report = ue.evaluate_batches(
        tiny, tiny_tokenizer, records[:2], ONE, batch_size=2, statistics=tiny_statistics
    )
    with pytest.raises(MethodError, match=r"nothing was measured of 'all' after 7 batches"):
        report.scores(7)
    assert math.isfinite(report.scores(0)["NS"].value)

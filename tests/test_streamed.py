"""Evaluations that are written as they come: the same bits, whatever interrupts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_evaluation import METHOD, QUICK, RECORDS, flags, model, statistics, tokenizer  # noqa: F401
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from unified_edit.editing import MEMIT, edit
from unified_edit.errors import FactError, MethodError, ReportFileError
from unified_edit.facts import Fact, Record
from unified_edit.measuring import Report, evaluate, evaluate_edits, evaluation, questions
from unified_edit.measuring import record_source as source
from unified_edit.model import ledger_of, likelihoods, model_fingerprint
from unified_edit.statistics import KeyStatistics

Opened = tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]
TARGETS = ("Danish", "French", "Rome", "Oster", "Quillon", "music")
#: Seven of them, in groups of two or three.
MANY = [
    Record(
        Fact("{} speaks", subject, TARGETS[place % 6], TARGETS[(place + 1 + place % 3) % 6]),
        paraphrases=(f"The voice of {subject} is",),
        neighbours=("Her brother speaks", "In Lund they speak"),
        case_id=100 + place,
        relation="language",
    )
    for place, subject in enumerate(
        ("Anna Krestova", "Tomas", "Marivel", "Norvia", "Lund", "Quillon", "Bellweather")
    )
]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "GROUP", 3)
    monkeypatch.setattr(evaluation, "GROUP", 3)


@pytest.fixture
def opened(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Opened:  # noqa: F811
    return model, tokenizer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C while the questions are put for the time number `after` + 1."""
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return likelihoods(*args, **kwargs)

    monkeypatch.setattr(questions, "likelihoods", failing)


def same(found: Report, wanted: Report) -> None:
    pd.testing.assert_frame_equal(found.table, wanted.table, check_exact=True)
    assert found.to_dict() == wanted.to_dict() and repr(found) == repr(wanted)


# --- what is written -------------------------------------------------------------------------


def test_a_file_holds_what_a_report_holds(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    wanted = evaluate(*opened, [*RECORDS, *MANY], bootstrap=100, seed=5)
    same(evaluate(*opened, [*RECORDS, *MANY], bootstrap=100, seed=5, to=path), wanted)
    same(Report.read(path), wanted)
    header, *answers, end = lines(path)
    assert header["format"] == "unified_edit.report/1"
    assert header["made_from"]["fingerprint"] == model_fingerprint(opened[0])
    assert end == {"finished": True, "records": 10}
    assert [(one["record"], one["when"]) for one in answers] == [(n, "before") for n in range(10)]
    # no true object: not a number is null, which every reader of JSON knows
    assert "NaN" not in path.read_text() and answers[2]["answers"][0]["logp_true"] is None
    table = Report.read(path).table
    assert table["success"].isna().any() and table["success"].dtype == "boolean"


def test_records_may_come_one_by_one(opened: Opened, tmp_path: Path) -> None:
    path, taken = tmp_path / "rows.jsonl", []

    def records() -> Iterator[Record]:
        for record in MANY:
            # what was taken before this group is on disk already, but for one group
            written = len(lines(path)) - 1 if path.exists() else 0
            assert len(taken) - written <= 3
            taken.append(record)
            yield record

    wanted = evaluate(*opened, MANY)
    same(evaluate(*opened, records(), to=path), wanted)
    same(evaluate(*opened, iter(MANY)), wanted)
    same(evaluate(*opened, iter(MANY), to=path), wanted)  # nothing is left to do
    with pytest.raises(FactError, match="list is empty"):
        evaluate(*opened, iter(()))
    with pytest.raises(FactError, match="item 4 is str"):
        evaluate(*opened, iter([*MANY[:4], "x"]))


# --- going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(5))
def test_an_interrupted_evaluation_goes_on(
    after: int, opened: Opened, statistics: KeyStatistics, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = edit(*opened, MANY[0].fact, METHOD, statistics=statistics)
    path, state = tmp_path / "rows.jsonl", (model_fingerprint(opened[0]), flags(opened[0]))
    wanted = evaluate(*opened, MANY)
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*opened, MANY, to=path)
    assert (model_fingerprint(opened[0]), flags(opened[0])) == state
    assert ledger_of(opened[0]).active == (made,)
    # three groups, before and after: each that was asked is there
    assert len(lines(path)) == 1 + [0, 3, 6, 9, 12][after]
    with path.open("a") as handle:
        handle.write('{"record": 99, "when": "bef')  # a line that was being written
    same(evaluate(*opened, MANY, to=path), wanted)
    same(Report.read(path), wanted)


@pytest.mark.parametrize(("size", "after"), [(1, 0), (1, 3), (2, 2), (2, 4), (5, 3)])
def test_interrupted_edits_go_on(
    size: int, after: int, opened: Opened, statistics: KeyStatistics, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Groups of three, batches of one, two and five: the last go over the border of groups."""
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "cache"))
    active = edit(*opened, RECORDS[1].fact, METHOD, statistics=statistics)
    arguments: dict[str, Any] = {"batch_size": size, "statistics": statistics, "bootstrap": 100}
    wanted = evaluate_edits(*opened, MANY, METHOD, **arguments)
    path, state = tmp_path / "rows.jsonl", (model_fingerprint(opened[0]), flags(opened[0]))
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            evaluate_edits(*opened, MANY, METHOD, to=path, **arguments)
    assert (model_fingerprint(opened[0]), flags(opened[0])) == state
    assert ledger_of(opened[0]).active == (active,)
    found = evaluate_edits(*opened, MANY, METHOD, to=path, **arguments)
    assert (model_fingerprint(opened[0]), flags(opened[0])) == state
    same(found, wanted)
    same(Report.read(path), wanted)


def test_what_was_answered_is_not_asked_again(
    opened: Opened, statistics: KeyStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    wanted = evaluate_edits(*opened, MANY, METHOD, statistics=statistics, to=path)
    interrupt(monkeypatch, 0)
    same(evaluate_edits(*opened, MANY, METHOD, statistics=statistics, to=path), wanted)
    # one line is missing: its group is asked, and only that line is written
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-3]))
    with monkeypatch.context() as patch:
        patch.setattr(questions, "likelihoods", likelihoods)
        same(evaluate_edits(*opened, MANY, METHOD, statistics=statistics, to=path), wanted)
    assert path.read_bytes().splitlines(keepends=True) == whole


def test_an_unfinished_file_is_read_as_far_as_it_goes(
    opened: Opened, statistics: KeyStatistics, tmp_path: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    with edit(*opened, MANY[0].fact, METHOD, statistics=statistics).applied():
        whole = evaluate(*opened, MANY, to=path)
    some = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(some[:8]))  # three before, three after, one before
    report = Report.read(path)
    assert report.records == 3 and "not finished" in caplog.text
    wanted = whole.table[whole.table["record"] < 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(report.table, wanted)


# --- what is refused -------------------------------------------------------------------------


def test_a_file_of_something_else_is_refused(
    opened: Opened, statistics: KeyStatistics, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    path = tmp_path / "rows.jsonl"
    evaluate(*opened, MANY, to=path)
    kept = path.read_bytes()

    def refused(why: str, action: Any = evaluate, *more: Any, records: Any = MANY, **how: Any):
        with pytest.raises(ReportFileError, match=why):
            action(*opened, records, *more, to=path, **how)
        assert path.read_bytes() == kept

    refused("seed: 0 there, 1 here", seed=1)
    refused("known_only: False there, True here", known_only=True)
    refused("records: ", records=MANY[:5])
    refused("records: ", records=iter(MANY))
    refused("method: None there", evaluate_edits, METHOD, statistics=statistics)
    made = edit(*opened, MANY[0].fact, METHOD, statistics=statistics)
    refused("edits: .* there, .*here")
    made.undo()
    opened[0].transformer.wte.weight.data[3, 5] += 1.0
    refused("fingerprint: ")


def test_other_records_one_by_one_are_refused(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    evaluate(*opened, iter(MANY), to=path)
    for given, why in (
        (MANY[::-1], "number 0 was another one"),
        ([*MANY, MANY[0]], "finished, but there is a record 7"),
        (MANY[:4], "holds 7 records, but only 4"),
    ):
        with pytest.raises(ReportFileError, match=why):
            evaluate(*opened, iter(given), to=path)


def test_bad_files_are_refused(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "mine"}\n')
    for action in (Report.read, lambda to: evaluate(*opened, MANY, to=to)):
        with pytest.raises(ReportFileError, match="no file of answers"):
            action(path)
        with pytest.raises(ReportFileError, match="cannot be read or written"):
            action(tmp_path)
        with pytest.raises(ReportFileError, match="is ''; give the path"):
            action("")
    assert path.read_text() == '{"prompt": "mine"}\n'
    path.write_text("a text without an end")
    with pytest.raises(ReportFileError, match="no file of answers"):
        evaluate(*opened, MANY, to=path)
    with pytest.raises(ReportFileError, match="cannot be read"):
        Report.read(tmp_path / "none.jsonl")
    path.write_bytes(b'{"format": "unified_edit.rep')  # interrupted at its first line
    evaluate(*opened, MANY, to=path)
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*whole[:3], "{damaged}\n", *whole[3:]]))
    with pytest.raises(ReportFileError, match="line 4: damaged"):
        Report.read(path)
    path.write_text("".join([*whole[:3], whole[2]]))
    with pytest.raises(ReportFileError, match=r"holds record 1 \(before\) twice"):
        evaluate(*opened, MANY, to=path)


# --- known facts only ------------------------------------------------------------------------


def test_known_facts_only(
    opened: Opened, statistics: KeyStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("UNIFIED_EDIT_CACHE", str(tmp_path / "cache"))
    records = [*MANY, RECORDS[2]]  # the last one has no true object
    base = evaluate(*opened, records)
    asked = base.table[base.table["kind"] == "rewrite"]
    known = list(asked.loc[asked["logp_true"] > asked["logp_new"], "record"])
    assert 1 < len(known) < len(MANY)
    report = evaluate(*opened, records, known_only=True)
    assert report.before["ES"].value == 0.0 and report.records == len(known)
    assert list(dict.fromkeys(report.table["record"])) == known
    left_out = {"not known before": len(MANY) - len(known), "without a true object": 1}
    assert report.to_dict()["left_out"] == report.left_out == left_out
    assert report.to_dict()["known_only"] is True
    first = f"Report on {len(known)} known records (left out: {len(MANY) - len(known)} not known"
    assert repr(report).startswith(first) and first[10:] in report._repr_html_()

    # batches are made of what is left
    chosen = [records[number] for number in known]
    arguments: dict[str, Any] = {"batch_size": 2, "statistics": statistics}
    wanted = evaluate_edits(*opened, chosen, METHOD, **arguments)
    path = tmp_path / "rows.jsonl"
    for to in (None, path):
        found = evaluate_edits(*opened, records, METHOD, known_only=True, to=to, **arguments)
        assert found.left_out == left_out and found.records == len(known)
        for column in ("logp_new", "logp_true"):
            assert list(found.table["record"].unique()) == known
            # the same batches, but values and questions in other company
            got, want = (t.sort_values(["when", "record"], kind="stable")[column]
                         for t in (found.table, wanted.table))  # fmt: skip
            assert abs(got.to_numpy() - want.to_numpy()).max() < 1e-3
    same(evaluate_edits(*opened, records, METHOD, known_only=True, to=path, **arguments), found)


def test_no_known_fact_at_all(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(FactError, match="leaves none of 1 records"):
        evaluate(*opened, RECORDS[2], known_only=True, to=tmp_path / "rows.jsonl")
    with pytest.raises(MethodError, match="known_only is 1"):
        evaluate(*opened, MANY, known_only=1)  # type: ignore[arg-type]


# --- passed on -------------------------------------------------------------------------------


def test_what_is_done_about_shared_subjects_is_passed_on(
    opened: Opened, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    seen = []
    plain = evaluation.Editor.edit

    def editing(*args: Any, on_shared_subject: str = "", on_conflict: str = "", **how: Any) -> Any:
        seen.append((on_shared_subject, on_conflict, how["values"] is None))
        return plain(*args, **how)

    monkeypatch.setattr(evaluation.Editor, "edit", editing)
    method = MEMIT.replace(**QUICK, ridge=1.0)
    shared = [MANY[0], Record(Fact("{} lives in", "Anna Krestova", "Oster"))]
    ways: dict[str, Any] = {"on_shared_subject": "merge", "on_conflict": "last"}
    evaluate_edits(*opened, shared, method, batch_size=2, statistics=statistics, **ways)
    evaluate_edits(*opened, shared, method, batch_size=2, statistics=statistics)
    evaluate_edits(*opened, shared[0], method, statistics=statistics, **ways)
    # one fact shares nothing, and its values can be made with those of others
    assert seen == [("merge", "last", True), ("", "", False), ("", "", False)]
    for name in ways:
        with pytest.raises(MethodError, match=f"{name} is 'join'; choose one of"):
            evaluate_edits(*opened, shared, method, statistics=statistics, **{name: "join"})

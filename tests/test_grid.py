"""Grids of evaluations: their cells, how they go on, what they refuse, how they are drawn."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fixtures_refusals import TOWER, VIENNA
from fixtures_tiny import assert_unchanged, snapshot
from matplotlib import pyplot as plt
from test_cli import place, run  # noqa: F401
from test_streamed import interrupt

import unified_edit as ue
from unified_edit.command_line import cli, commands
from unified_edit.errors import FactError, MethodError, ReportFileError
from unified_edit.measuring import (
    BatchReport,
    Generation,
    Sweep,
    draw_sweep,
    evaluate_edits,
    grid_figures,
    grid_runs,
    read_grid,
    sweep_in_processes,
)
from unified_edit.measuring.grid import Cell, Grid, cells_of
from unified_edit.measuring.grid_files import ANSWERS, EDITS, CellFiles

QUICK = ue.EMMET.replace(
    layers=(0,), steps=3, weight_decay=0.0,
    contexts=ue.Contexts(starts=("The", "I"), lengths=(4,)),
)  # fmt: skip
SOFT = QUICK.replace(name="soft", ridge=1.0)
RECORDS = [
    ue.Record(TOWER, paraphrases=("They say The tower stands in",), neighbours=("A river is in",)),
    ue.Record(VIENNA, paraphrases=("I saw it in",), neighbours=("The museum was born in",)),
    ue.Record(
        ue.Fact("The {} is in the city of", "market", "Athens", "Oslo"),
        paraphrases=("I saw the market of",), neighbours=("The palace is in",),
    ),
]  # fmt: skip
GRID = Grid([QUICK, SOFT], batch_sizes=[1, 3])


@pytest.fixture
def sweep(tiny, tiny_tokenizer, tiny_statistics, tmp_path):
    def made(grid: Any = GRID, records: Any = RECORDS, **given: Any) -> Sweep:
        settings = {"to": tmp_path / "sweep", "statistics": tiny_statistics, **given}
        settings = {"bootstrap": 100, **settings}
        return ue.sweep(tiny, tiny_tokenizer, records, grid, **settings)

    return made


# --- grid and cells ---------------------------------------------------------------------------


def test_a_grid_is_every_combination() -> None:
    grid = Grid(
        ["EMMET", ue.MEMIT], batch_sizes=(1, 10), ridges=(None, 0.5), layers=(None, (3, 4), 2),
        seeds=(0, 7),
    )  # fmt: skip
    cells = grid.cells
    assert len(cells) == 2 * 2 * 2 * 3 * 2 and len(set(cells)) == len(cells)
    assert cells[0] == Cell(ue.EMMET, 1) and cells[0].name == "EMMET_b1_s0"
    one = next(
        c for c in cells
        if (c.method.name, c.batch_size, c.ridge, c.layers, c.seed) == ("MEMIT", 10, 0.5, (3, 4), 7)
    )  # fmt: skip
    assert one.name == "MEMIT_b10_lam0.5_l3-4_s7"
    assert one.method == ue.MEMIT.replace(ridge=0.5, layers=(3, 4))
    assert {c.layers for c in cells} == {None, (3, 4), (2,)}
    assert Cell.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    # what shares the values of its facts stands together: ridges and batch sizes run fastest
    shared = [(c.method.name, c.layers, c.seed) for c in cells]
    assert sum(a != b for a, b in itertools.pairwise(shared)) == 2 * 3 * 2 - 1


def test_several_grids_are_one_set_of_cells() -> None:
    again = Grid(ue.EMMET, batch_sizes=[10, 100])
    cells = cells_of([Grid(ue.EMMET, batch_sizes=[1, 10]), again])
    assert [cell.batch_size for cell in cells] == [1, 10, 100]
    with pytest.raises(MethodError, match="both be called EMMET_b10_s0"):
        cells_of([again, Grid(ue.EMMET.replace(clamp=2.0), batch_sizes=10)])
    with pytest.raises(MethodError, match="both be called emmet_b10_s0"):  # one folder on some
        cells_of([again, Grid(ue.EMMET.replace(name="emmet"), batch_sizes=10)])
    with pytest.raises(MethodError, match="no grid"):
        cells_of([])
    with pytest.raises(MethodError, match="grid is 3"):
        cells_of([3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"methods": []}, "methods of the grid is empty"),
        ({"methods": "FT"}, "'FT' is no method"),
        ({"methods": ["EMMET"], "batch_sizes": [0]}, "a batch size is 0"),
        ({"methods": ["EMMET"], "ridges": [-1.0]}, "a ridge is -1.0"),
        ({"methods": ["EMMET"], "layers": [["a"]]}, "a layer is 'a'"),
        ({"methods": ["EMMET"], "seeds": [True]}, "a seed is True"),
        ({"methods": ["EMMET"], "histories": ["none"]}, "a history is 'none'; choose"),
        ({"methods": ["EMMET"], "lam": [1]}, "a grid has no 'lam'"),
        ({"batch_sizes": [1]}, "an object with methods"),
        ({"methods": [{"method": "EMMET", "depth": 3}]}, "no field 'depth'"),
        ({"methods": [{"method": "EMMET", "contexts": {"begin": 1}}]}, "contexts of EMMET"),
        ([], "no grid to run"),
    ],
)
def test_a_grid_that_says_something_else(given: Any, word: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(MethodError, match=word):
        cells_of(read_grid(path))


def test_a_grid_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    wide = {"method": "EMMET", "name": "wide", "clamp": 4, "contexts": {"starts": ["The"]}}
    found = [{"methods": ["ROME", wide], "ridges": [None, 1]}, {"methods": "MEMIT", "seeds": 3}]
    path.write_text(json.dumps(found), encoding="utf-8")
    first, second = read_grid(path)
    assert first.methods == (
        ue.ROME,
        ue.EMMET.replace(name="wide", clamp=4.0, contexts=ue.Contexts(starts=("The",))),
    )
    assert first.ridges == (None, 1.0) and second == Grid(ue.MEMIT, seeds=(3,))
    path.write_text(json.dumps({"methods": wide}), encoding="utf-8")  # one, and no list around it
    assert read_grid(path)[0].methods == first.methods[1:]
    for text in ("{", '"EMMET"'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(MethodError, match=r"grid\.json"):
            read_grid(path)


# --- what it finds ----------------------------------------------------------------------------


def test_each_cell_is_what_evaluate_edits_finds(
    sweep, tiny, tiny_tokenizer, tiny_statistics, tmp_path
) -> None:
    before = snapshot(tiny)
    found = sweep()
    assert_unchanged(tiny, before)
    table = found.table.set_index("cell")
    assert list(table.index) == ["EMMET_b1_s0", "EMMET_b3_s0", "soft_b1_s0", "soft_b3_s0"]
    for cell in GRID.cells:
        made: list[ue.Edit] = []
        wanted = evaluate_edits(
            tiny, tiny_tokenizer, RECORDS, cell.method, batch_size=cell.batch_size, bootstrap=100,
            statistics=tiny_statistics, each=made.append,
        )  # fmt: skip
        row = table.loc[cell.name]
        for name in ("ES", "PS", "NS", "S", "GS"):
            score = wanted.summary[name]
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(
                (score.value, score.low, score.high), nan_ok=True
            )
        assert (row["records"], row["edits"], row["state"]) == (3, len(made), "done")
        assert (row["lam"], row["layers"]) == (cell.method.ridge, "0")
        # values of a batch come from the disk there and from memory here: last bits
        each = [edit.diagnosis[0] for edit in made]
        miss = np.mean([one.memorization_error for one in each])
        assert row["miss"] == pytest.approx(miss, rel=1e-4, abs=1e-12)
        assert row["cost"] == pytest.approx(np.mean([d.preservation_error for d in each]), rel=1e-4)
        pd.testing.assert_frame_equal(found.report(cell.name).table, wanted.table, rtol=1e-3)
    assert (table["miss"] < 1e-8).tolist() == [True, True, False, False]
    text = (tmp_path / "sweep" / "table.csv").read_text()
    assert text == found.table.to_csv(index=False)
    kept = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [row["miss"] for row in kept] == list(found.table["miss"])
    pd.testing.assert_frame_equal(Sweep.read(tmp_path / "sweep").table, found.table)
    assert found.problems == {} and found.missing == []


# --- batches that follow each other -------------------------------------------------------------


COURSES = Grid(SOFT, batch_sizes=[1, 2], histories=["base", "blind", "soft", "hard"])


def test_batches_follow_each_other_in_a_cell(
    sweep, tiny, tiny_tokenizer, tiny_statistics, tmp_path
) -> None:
    before = snapshot(tiny)
    found = sweep(COURSES)
    assert_unchanged(tiny, before)
    table = found.table.set_index("cell")
    names = [f"soft_b{size}{course}_s0" for size in (1, 2)
             for course in ("", "_blind", "_hard", "_soft")]  # fmt: skip
    assert list(table.index) == names
    assert list(table["history"]) == 2 * ["base", "blind", "hard", "soft"]
    for course in ("blind", "soft", "hard"):
        wanted = ue.evaluate_batches(
            tiny, tiny_tokenizer, RECORDS, SOFT, batch_size=2, bootstrap=100,
            history=None if course == "blind" else course, statistics=tiny_statistics,
        )  # fmt: skip
        row = table.loc[f"soft_b2_{course}_s0"]
        for name in ("ES", "PS", "NS", "S", "GS"):
            value = wanted.scores(2)[name]
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(
                (value.value, value.low, value.high), nan_ok=True
            )
        assert row["ES_first"] == wanted.scores(2, "first")["ES"].value
        assert (row["edits"], row["records"], row["state"]) == (2, 3, "done")
        each = [edit.diagnosis[0] for edit in wanted.edits]
        miss = np.mean([one.memorization_error for one in each])
        assert row["miss"] == pytest.approx(miss, rel=1e-6)
        report = found.report(f"soft_b2_{course}_s0")
        assert report.records == 3 and report.after == wanted.scores(2)
        assert report.before == wanted.scores(0)
    assert np.isnan(table.loc["soft_b2_s0", "ES_first"])
    # what happens to the weights differs between them
    assert table["cost"].nunique() == len({*table["cost"]}) >= 5
    text = (tmp_path / "sweep" / "table.csv").read_text()
    assert text == found.table.to_csv(index=False)
    again = sweep(COURSES)
    pd.testing.assert_frame_equal(again.table, found.table, check_exact=True)


def test_a_run_of_batches_is_read_again(tiny, tiny_tokenizer, tiny_statistics, tmp_path) -> None:
    made = ue.evaluate_batches(
        tiny, tiny_tokenizer, RECORDS, SOFT, batch_size=2, history="soft", to=tmp_path / "run",
        statistics=tiny_statistics, seed=3,
    )  # fmt: skip
    found = BatchReport.read(tmp_path / "run")
    pd.testing.assert_frame_equal(found.table, made.table)
    pd.testing.assert_frame_equal(found.report.table, made.report.table)
    assert (found.batch_size, found.seed, found.edits) == (2, 3, ())
    asked = ["record", "when", "kind", "prompt"]
    assert not found.report.table.duplicated(asked).any(), "what was said after the first batch"
    assert set(found.report.table["when"]) == {"before", "after"} and found.report.records == 3
    with pytest.raises(ReportFileError, match=r"holds no run\.json"):
        BatchReport.read(tmp_path)
    assert not (tmp_path / "run.json").exists()
    (tmp_path / "run.json").write_text('{"kind": "something"}', encoding="utf-8")
    with pytest.raises(ReportFileError, match="another kind"):
        BatchReport.read(tmp_path)


def test_batches_that_cannot_follow_each_other_are_told_before(sweep, tmp_path) -> None:
    with pytest.raises(MethodError, match=r"EMMET_b1_soft_s0: a soft history.*1 / lam"):
        sweep(Grid([SOFT, QUICK], histories=["soft"]))
    with pytest.raises(MethodError, match="soft_b1_blind_s0: known_only"):
        sweep(Grid(SOFT, histories=["base", "blind"]), known_only=True)
    assert not (tmp_path / "sweep").exists()


def test_fluency_is_a_score_of_those_who_want_it(sweep, tmp_path) -> None:
    records = [replace(one, generation_prompts=("The river",)) for one in RECORDS]
    grid = Grid(SOFT, batch_sizes=[3], histories=["base", "blind"])
    short = Generation(length=6, seed=1)
    table = sweep(grid, records, generate=short, to=tmp_path / "texts").table
    # one batch is one batch, whatever becomes of it
    assert table.loc[0, "GE"] == pytest.approx(table.loc[1, "GE"]) and table.loc[0, "GE"] > 0
    assert "GE" not in sweep(grid, records).table
    with pytest.raises(ReportFileError, match="generate: "):
        sweep(grid, records, to=tmp_path / "texts")
    with pytest.raises(MethodError, match="generate is 3"):
        sweep(grid, records, generate=3, to=tmp_path / "other")


# --- going on ---------------------------------------------------------------------------------


#: What a sweep finds that nothing interrupts, once it is known: its table, and the files of it.
WHOLE: list[tuple[pd.DataFrame, list[bytes]]] = []


@pytest.mark.parametrize("after", [0, 1, 2, 4, 9])
def test_what_was_interrupted_goes_on_with_the_same_bits(
    after, sweep, tmp_path, monkeypatch
) -> None:
    if not WHOLE:
        WHOLE.append((sweep(to=tmp_path / "whole").table, _tables(tmp_path / "whole")))
    ((whole, files),) = WHOLE
    with monkeypatch.context() as patched:
        interrupt(patched, after)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    done = {path.parent for path in (tmp_path / "sweep").glob("*/cell.json")}
    before = {path: path.stat().st_mtime_ns for path in done if '"done"' in _text(path)}
    with (tmp_path / "sweep" / "EMMET_b1_s0" / EDITS).open("ab") as handle:
        handle.write(b'{"id": "torn')  # the end of a line that was being written
    found = sweep()
    pd.testing.assert_frame_equal(found.table, whole, check_exact=True)
    assert _tables(tmp_path / "sweep") == files
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _text(cell: Path) -> str:
    return (cell / "cell.json").read_text(encoding="utf-8")


def _tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("table.csv", "table.json")]


def test_what_is_done_is_not_done_again(sweep, tmp_path, monkeypatch) -> None:
    first = sweep(Grid(QUICK, batch_sizes=[1, 3]))
    asked = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append((args[3].name, kwargs["batch_size"]))
        return evaluate_edits(*args, **kwargs)

    monkeypatch.setattr(grid_runs, "evaluate_edits", counted)
    assert sweep(Grid(QUICK, batch_sizes=[1, 3])).table.equals(first.table)
    assert asked == []
    more = sweep(Grid([QUICK, SOFT], batch_sizes=[3]))  # a table of the cells that were asked for
    assert asked == [("soft", 3)] and list(more.table["cell"]) == ["EMMET_b3_s0", "soft_b3_s0"]
    assert len(Sweep.read(tmp_path / "sweep").table) == 3
    assert (tmp_path / "sweep" / "table.csv").read_text().count("\n") == 4


KILLED = """
import os, signal, sys
import unified_edit as ue
from unified_edit.measuring import Grid, load_records, questions
from unified_edit.model import likelihoods
calls = []
def failing(*args, **kwargs):
    calls.append(None)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return likelihoods(*args, **kwargs)
questions.likelihoods = failing
statistics = ue.KeyStatistics.load("stats.safetensors")
grid = Grid(ue.EMMET.replace(layers=(0,), steps=3), batch_sizes=[1, 2])
ue.sweep(*ue.load_model("model"), load_records("records.jsonl"), grid, to=sys.argv[1],
         statistics=statistics)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal here")
def test_a_killed_process_leaves_nothing_in_the_way(place, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Of the system's own kill nothing in the process hears; processes then go on together."""
    monkeypatch.chdir(place)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "sweep")], timeout=600)
    assert ended.returncode == -signal.SIGKILL
    assert '"begun"' in _text(tmp_path / "sweep" / "EMMET_b1_s0")
    grid = Grid(ue.EMMET.replace(layers=(0,), steps=3), batch_sizes=[1, 2])
    records = ue.load_records("records.jsonl")
    found = sweep_in_processes(
        "model", records, grid, to=tmp_path / "sweep", processes=2, threads=1,
        statistics="stats.safetensors",
    )  # fmt: skip
    assert list(found.table["state"]) == ["done", "done"]
    statistics = ue.KeyStatistics.load("stats.safetensors")
    model = ue.load_model("model")
    whole = ue.sweep(*model, records, grid, to=tmp_path / "whole", statistics=statistics)
    # the same operations on the same numbers, with other threads
    pd.testing.assert_frame_equal(found.table, whole.table, rtol=1e-6)


def test_a_cell_that_another_has_is_left_to_it(sweep, tmp_path) -> None:
    files = CellFiles(tmp_path / "sweep" / "EMMET_b3_s0", {}, {})
    with files.taken() as ours, files.taken() as again:
        assert (ours, again) == (True, False)
        found = sweep()
        assert found.missing == ["EMMET_b3_s0"] and not (files.folder / ANSWERS).exists()
        assert sorted(found.table["state"]) == ["done", "done", "done", "new"]
    assert sweep().missing == []


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"grid": Grid(QUICK.replace(steps=4), batch_sizes=[1])}, "method: "),
        ({"grid": Grid(SOFT, batch_sizes=[1]), "records": RECORDS[:2]}, "records: "),
        ({"bootstrap": 200}, "bootstrap: 100 there, 200 here"),
        ({"known_only": True}, "known_only: False there, True here"),
        ({"on_conflict": "last"}, "on_conflict: 'raise' there, 'last' here"),
    ],
)
def test_cells_of_something_else_are_refused(given, word, sweep, tmp_path, monkeypatch) -> None:
    sweep(Grid(QUICK, batch_sizes=[1]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*")}
    with pytest.raises(ReportFileError, match=word):
        sweep(**{"grid": Grid(QUICK, batch_sizes=[1]), **given})
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*")}


def test_cells_of_another_model_or_version_are_refused(
    sweep, make_gpt2, tiny_tokenizer, tiny_statistics, tmp_path, monkeypatch
) -> None:
    sweep(Grid(QUICK))
    with pytest.raises(ReportFileError, match="fingerprint: "):  # not even beside each other
        ue.sweep(
            make_gpt2(seed=1), tiny_tokenizer, RECORDS, Grid(SOFT), to=tmp_path / "sweep",
            statistics=tiny_statistics, bootstrap=100,
        )  # fmt: skip
    other = ue.sweep(
        make_gpt2(seed=1), tiny_tokenizer, RECORDS, Grid(SOFT), to=tmp_path / "other",
        statistics=None, bootstrap=100,
    )  # fmt: skip
    assert list(other.problems) == ["soft_b1_s0"]  # tiny models have no default corpus
    (tmp_path / "other" / "soft_b1_s0").rename(tmp_path / "sweep" / "soft_b1_s0")
    with pytest.raises(ReportFileError, match=r"soft_b1_s0.*fingerprint: "):
        Sweep.read(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "soft_b1_s0")
    monkeypatch.setattr(grid_runs, "version", lambda _: "0.0.1")
    with pytest.raises(ReportFileError, match=r"library: '\d.* there, '0\.0\.1' here"):
        sweep(Grid(QUICK))
    monkeypatch.undo()
    path = tmp_path / "sweep" / "EMMET_b1_s0" / "cell.json"
    for text, word in (("{", "cannot be read"), ("[]", "no cell of a sweep")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ReportFileError, match=word):
            sweep(Grid(QUICK))
    with pytest.raises(ReportFileError, match="holds no cell"):
        Sweep.read(tmp_path)


def test_what_cannot_be_done_is_told_before_the_work(sweep, tmp_path) -> None:
    for grid, word in (
        (Grid([QUICK, ue.MEMIT]), "MEMIT has no published setting of layers, ridge"),
        (Grid(QUICK, batch_sizes=[1, 4]), "batches of 4, and there are 3 records"),
        (Grid(QUICK, layers=[9]), "9"),
    ):
        with pytest.raises(ue.UnifiedEditError, match=word):
            sweep(grid)
    with pytest.raises(MethodError, match="known_only is 1"):
        sweep(known_only=1)
    with pytest.raises(MethodError, match="bootstrap"):
        sweep(bootstrap=3)
    assert not (tmp_path / "sweep").exists()


# --- a cell that fails ------------------------------------------------------------------------


def test_a_cell_that_fails_is_not_in_the_way(sweep, caplog) -> None:
    """Facts of one subject: the equality refuses a batch with both, and takes them singly."""
    twice = ue.Fact("I saw {} from", TOWER.subject, "Dublin", "Rome")
    records = [RECORDS[0], ue.Record(twice, neighbours=("The garden is in",))]
    found = sweep(Grid([QUICK, SOFT], batch_sizes=[1, 2]), records)
    assert list(found.problems) == ["EMMET_b2_s0"]
    assert found.problems["EMMET_b2_s0"].startswith("SharedSubjectError: ")
    assert "EMMET_b2_s0 failed: SharedSubjectError" in caplog.text
    assert found.table.set_index("cell")["state"].to_dict() == {
        "EMMET_b1_s0": "done", "EMMET_b2_s0": "failed", "soft_b1_s0": "done", "soft_b2_s0": "done",
    }  # fmt: skip


def test_a_cell_that_failed_is_tried_again_by_the_next_call(sweep, monkeypatch) -> None:
    begun = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        begun.append(args[3].name)
        if args[3].name == "soft" and len(begun) < 3:
            raise RuntimeError("out of memory")
        return evaluate_edits(*args, **kwargs)

    monkeypatch.setattr(grid_runs, "evaluate_edits", failing)
    grid = Grid([SOFT, QUICK])
    assert sweep(grid).problems == {"soft_b1_s0": "RuntimeError: out of memory"}
    found = sweep(grid)
    assert begun == ["soft", "EMMET", "soft"]
    assert found.problems == {} and list(found.table["state"]) == ["done", "done"]


def test_a_cell_that_failed_is_not_tried_twice_in_one_run(
    tiny, tiny_tokenizer, tiny_statistics, tmp_path, monkeypatch
) -> None:
    begun = []
    monkeypatch.setattr(grid_runs, "evaluate_edits", lambda *args, **_: begun.append(1) or 1 / 0)
    work = grid_runs.Work.of(
        tiny, tiny_tokenizer, RECORDS, Grid(QUICK).cells, tmp_path, statistics=tiny_statistics
    )
    for run_ in ("a", "a", "b"):  # two workers of one run, and a run after it
        work.run(tiny, tiny_tokenizer, run=run_)
    assert len(begun) == 2


# --- figures ----------------------------------------------------------------------------------


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    each = []
    for row in rows:
        one = {"layers": "1", "lam": 0.0, "batch_size": 1, "seed": 0, "state": "done", **row}
        for score in ("ES", "NS"):
            if score in one:
                one |= {f"{score}_low": one[score] - 0.1, f"{score}_high": one[score] + 0.05}
        each.append(one)
    return pd.DataFrame(each)


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_batch_sizes_are_drawn_as_they_are() -> None:
    rows = [
        {"method": name, "batch_size": size, "seed": seed, "ES": es + 0.02 * seed}
        for name, es in (("EMMET", 0.8), ("MEMIT", 0.6))
        for size in (1, 10, 100)
        for seed in (0, 1)
    ]
    ax = grid_figures.batch_size_lines(table_of(rows))
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["EMMET", "MEMIT"]
    for place_, (container, es) in enumerate(zip(ax.containers, (0.8, 0.6), strict=True)):
        line, _, (bars,) = container
        aside = grid_figures.ASIDE ** (place_ - 0.5)
        wanted = [(size * aside, es + 0.01) for size in (1, 10, 100)]  # the mean of the seeds
        assert points(line) == [pytest.approx(one) for one in wanted]
        low, high = bars.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((es - 0.1, es + 0.02 + 0.05))
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_xticklabels()][:3] == [
        "1", "10", "100",
    ]  # fmt: skip
    plt.close(ax.figure)


def test_what_the_axis_does_not_show_has_a_line_of_its_own() -> None:
    rows = [
        {"method": "EMMET", "lam": lam, "batch_size": size, "ES": 0.5}
        for lam in (0.0, 10.0)
        for size in (1, 4)
    ]
    rows += [{"method": "MEMIT", "lam": 3.0, "batch_size": size, "ES": 0.5} for size in (1, 4)]
    ax = grid_figures.batch_size_lines(table_of(rows))
    names = ["EMMET, λ = 0", "EMMET, λ = 10", "MEMIT, λ = 3"]
    assert ax.get_legend_handles_labels()[1] == names
    plt.close(ax.figure)


def test_histories_have_lines_of_their_own() -> None:
    rows = [
        {"method": "MEMIT", "history": course, "batch_size": size, "ES": 0.5}
        for course in ("blind", "soft")
        for size in (1, 4)
    ]
    ax = grid_figures.batch_size_lines(table_of(rows))
    assert ax.get_legend_handles_labels()[1] == ["MEMIT, blind", "MEMIT, soft"]
    plt.close(ax.figure)


def test_the_equality_stands_at_the_left_edge() -> None:
    rows = [{"method": "EMMET", "lam": lam, "ES": 0.9 - lam / 100} for lam in (0.0, 1.0, 10.0)]
    ax = grid_figures.ridge_lines(table_of(rows))
    (container,) = ax.containers
    wanted = [(0.1, 0.9), (1.0, 0.89), (10.0, 0.8)]
    assert points(container[0]) == [pytest.approx(one) for one in wanted]
    assert [t.get_text() for t in ax.get_xticklabels()][:3] == ["0", "1", "10"]
    plt.close(ax.figure)


def test_the_frontier_goes_in_the_order_of_lam() -> None:
    rows = [
        {"method": name, "lam": lam, "miss": lam / (1 + lam), "cost": scale / (1 + lam)}
        for lam in (10.0, 0.0, 1.0)
        for name, scale in (("EMMET", 1.0), ("MEMIT", 2.0))
    ]
    ax = grid_figures.frontier(table_of(rows))
    for line, scale in zip(ax.get_lines(), (1.0, 2.0), strict=True):
        wanted = [(scale / (1 + lam), lam / (1 + lam)) for lam in (0.0, 1.0, 10.0)]
        assert points(line) == [pytest.approx(one) for one in wanted]
    assert [text.get_text() for text in ax.texts] == 2 * ["0", "1", "10"]
    plt.close(ax.figure)


def test_figures_of_a_folder(sweep, tmp_path) -> None:
    found = sweep()
    made = draw_sweep(found, tmp_path / "pictures", scores=("ES", "NS"))
    names = ["batch_sizes_ES", "batch_sizes_NS", "ridges_ES", "ridges_NS", "frontier"]
    assert [path.name for path in made] == [f"{name}.svg" for name in names]
    texts = [path.read_bytes() for path in made]
    again = draw_sweep(Sweep.read(found.folder), tmp_path / "again", scores=("ES", "NS"))
    assert [path.read_bytes() for path in again] == texts and all(b"<svg" in one for one in texts)
    assert plt.get_fignums() == []
    with pytest.raises(ReportFileError, match="'gif'"):
        draw_sweep(found, tmp_path, kind="gif")
    with pytest.raises(FactError, match="one batch size and one lam"):
        draw_sweep(sweep(Grid(QUICK)), tmp_path)
    with pytest.raises(FactError, match="no row of the table has GE"):
        grid_figures.batch_size_lines(found.table, "GE")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportFileError, match="cannot be written"):
        draw_sweep(found, tmp_path / "file" / "below")


# --- the command line -------------------------------------------------------------------------


def test_from_a_shell_on_atlas(tmp_path, monkeypatch, capsys, own_cache) -> None:
    """Two methods, two batch sizes, four records; called again, drawn, and as the library says."""
    monkeypatch.chdir(tmp_path)
    quick = [{"method": name, "steps": 2} for name in ("EMMET", "MEMIT")]
    grid = {"methods": quick, "batch_sizes": [1, 4]}
    Path("grid.json").write_text(json.dumps(grid), encoding="utf-8")
    command = ["sweep", "--grid", "grid.json", "--limit", "4", "--to", "sweep", "--json"]
    assert cli.main(command) == 0
    document = json.loads(capsys.readouterr().out)
    names = ["EMMET_b1_s0", "EMMET_b4_s0", "MEMIT_b1_s0", "MEMIT_b4_s0"]
    assert [row["cell"] for row in document["cells"]] == names
    assert [row["layers"] for row in document["cells"]] == ["1", "1", "0 1", "0 1"]
    assert all(row["records"] == 4 and row["state"] == "done" for row in document["cells"])
    model, tokenizer = ue.load_model("atlas")
    records = ue.load_records("atlas", limit=4)
    wanted = evaluate_edits(
        model, tokenizer, records, ue.EMMET.replace(steps=2), batch_size=4
    ).summary
    assert document["cells"][1]["S"] == pytest.approx(wanted["S"].value)
    table = Path("sweep/table.csv").read_bytes()
    assert cli.main(command[:-1]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names) and "wrote sweep/table.csv" in text
    assert Path("sweep/table.csv").read_bytes() == table
    assert cli.main(["figures", "sweep", "--to", "pictures", "--format", "png"]) == 0
    capsys.readouterr()
    found = sorted(path.name for path in Path("pictures").iterdir())
    assert found[:4] == [f"batch_sizes_{score}.png" for score in ("ES", "NS", "PS", "S")]


def test_a_dry_run_loads_and_writes_nothing(run, place, tmp_path, monkeypatch) -> None:  # noqa: F811
    for name in ("load_model", "load_records"):
        monkeypatch.setattr(commands, name, lambda *_, **__: pytest.fail("something was loaded"))
    command = ["sweep", "--model", "gpt2-xl", "--records", "counterfact", "--methods", "ROME",
               "EMMET", "--ridges", "own", "10", "--layers", "17", "--layers", "13", "14",
               "--batch-sizes", "1", "64", "--to", tmp_path / "xl", "--dry-run"]  # fmt: skip
    text, _ = run(*command)
    assert text.startswith("16 cells, 0 of them done") and "EMMET_b64_lam10_l13-14_s0" in text
    document = json.loads(run(*command, "--json")[0])
    assert len(document["cells"]) == 16 and {one["state"] for one in document["cells"]} == {"new"}
    assert document["cells"][0] == {
        "cell": "ROME_b1_l17_s0", "method": "ROME", "layers": [17], "lam": 0.0, "batch_size": 1,
        "seed": 0, "history": "base", "state": "new",
    }  # fmt: skip
    assert not (tmp_path / "xl").exists()
    _, err = run(*command, "--limit", "63", code=1)
    assert "batches of 64, and --limit is 63" in err


def test_a_failed_cell_is_the_exit_code(run, place, tmp_path) -> None:  # noqa: F811
    twice = [
        {"fact": {"prompt": prompt, "subject": "The tower", "target_new": "Oslo"}}
        for prompt in ("{} is in the city of", "I saw {} from")
    ]
    lines = "\n".join(json.dumps(one) for one in twice)
    (tmp_path / "twice.jsonl").write_text(lines, encoding="utf-8")
    command = ["sweep", "--model", "model", "--records", tmp_path / "twice.jsonl", "--layers", "0",
               "--batch-sizes", "2", "--ridges", "0", "1", "--statistics", "stats.safetensors",
               "--to", tmp_path / "sweep"]  # fmt: skip
    text, _ = run(*command, code=1)
    assert "EMMET_b2_lam0_l0_s0 failed: SharedSubjectError: " in text
    document = json.loads(run(*command, "--json", code=1)[0])
    assert list(document["problems"]) == ["EMMET_b2_lam0_l0_s0"]
    assert [one["state"] for one in document["cells"]] == ["failed", "done"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "--to"),
        (["sweep", "--to", "x", "--methods", "FT"], "'FT' is none of ROME, EMMET, "),
        (["sweep", "--to", "x", "--ridges", "-1"], "neither a finite number from 0 nor 'own'"),
        (["sweep", "--to", "x", "--ridges", "y"], "invalid lambda value: 'y'"),
        (["sweep", "--to", "x", "--grid", "g", "--seeds", "1"], "give --grid, or --seeds: not"),
        (["sweep", "--to", "x", "--processes", "0"], "0 is not at least 1"),
        (["figures", "x"], "--to"),
        (["figures", "x", "--to", "y", "--scores", "EM"], "invalid choice: 'EM'"),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

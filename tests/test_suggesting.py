"""The sweep over layers and clamps: what it tries, what it finds, how it goes on, where it ends."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import torch
from fixtures_refusals import TOWER, VIENNA, refused
from fixtures_tiny import LAYERS, assert_unchanged, snapshot

import unified_edit as ue
from unified_edit.editing import DEFAULTS, MEASURED, PUBLISHED, SETTINGS
from unified_edit.editing.settings import settings_of
from unified_edit.errors import EditError, FactError, MethodError, ModelError
from unified_edit.measuring import Trace, TracedFact, suggesting
from unified_edit.measuring.sweep_order import candidates_of, order, total_of
from unified_edit.model import anatomy

#: Few, short contexts; a random model is hard to move.
QUICK = ue.EMMET.replace(
    steps=4, weight_decay=0.0, contexts=ue.Contexts(starts=("The", "I"), lengths=(4,))
)
RECORDS = [
    ue.Record(
        TOWER, paraphrases=("They say The tower stands in",), neighbours=("The river is in",)
    ),
    ue.Record(VIENNA, neighbours=("The museum was born in",)),
    ue.Record(
        ue.Fact("The {} is in the city of", "market", "Athens", "Oslo"),
        paraphrases=("I saw the market of",),
    ),
]


@pytest.fixture
def sweep(tiny, tiny_tokenizer, tiny_statistics):
    def run(records: Any = RECORDS, **given: Any) -> Any:
        settings = {"method": QUICK, "layers": (0, 1), "clamps": (1.0, 4.0), **given}
        return ue.suggest_layers(
            tiny, tiny_tokenizer, records, **{"statistics": tiny_statistics, **settings}
        )

    return run


# --- what it finds ---


def test_each_row_is_what_single_edits_give(sweep, tiny, tiny_tokenizer, tiny_statistics):
    standing = ue.edit(
        tiny, tiny_tokenizer, TOWER, QUICK.replace(layers=(2,)), statistics=tiny_statistics
    )
    before = snapshot(tiny)
    found = sweep()
    assert_unchanged(tiny, before)
    standing.undo()
    assert list(zip(found.table["layer"], found.table["clamp"], strict=True)) == [
        (0, 1.0), (0, 4.0), (1, 1.0), (1, 4.0),
    ]  # fmt: skip
    for row in found.table.to_dict("records"):
        method = QUICK.replace(layers=(row["layer"],), clamp=row["clamp"])
        report = ue.evaluate_edits(
            tiny, tiny_tokenizer, RECORDS, method, statistics=tiny_statistics
        )
        for name in ("ES", "PS", "NS", "S", "GS"):
            assert row[name] == pytest.approx(report.after[name].value)
            assert found.before[name] == pytest.approx(report.before[name].value)
        assert row["score"] == row["S"]
        weight = anatomy(tiny).weight(row["layer"]).parameter.detach().double()
        sizes = [
            ue.edit(
                tiny, tiny_tokenizer, record.fact, method, statistics=tiny_statistics, apply=False
            )
            .delta(row["layer"])
            .norm()
            / weight.norm()
            for record in RECORDS
        ]
        assert row["size"] == pytest.approx(float(sum(sizes) / len(sizes)), rel=1e-4)
    best = found.table.sort_values(["score", "size"], ascending=[False, True]).iloc[0]
    assert found.method == QUICK.replace(layers=(best["layer"],), clamp=best["clamp"])
    assert (found.best["layer"], found.best["clamp"]) == (best["layer"], best["clamp"])
    assert found.used == tuple(RECORDS)
    assert (found.by, found.complete) == ("ES, PS, NS", True)
    assert "of 4 combinations on 3 facts" in repr(found)


def test_windows_of_layers(sweep):
    method = ue.MEMIT.replace(ridge=1.0, steps=3, contexts=QUICK.contexts)
    found = sweep(method=method, layers=[(0, 1), (1, 2)], clamps=(2.0,))
    assert list(found.table["layer"]) == [(0, 1), (1, 2)]
    assert found.method.layers in [(0, 1), (1, 2)]


def test_of_equal_scores_the_smaller_update_wins(sweep, monkeypatch):
    def row(editor, sheet, method, chosen, statistics):
        layers, clamp = chosen
        size = {0: 3.0, 1: 1.0, 2: 2.0}[layers[0]]
        return {"layers": list(layers), "clamp": clamp, "ES": 1.0, "score": 0.5, "GS": 0.0,
                "size": size, "clamped": 0.0, "seconds": 0.0, "problem": ""}  # fmt: skip

    monkeypatch.setattr(suggesting, "tried_alone", row)
    assert sweep(layers=(0, 1, 2), clamps=(1.0,)).method.layers == (1,)


def test_facts_are_drawn_by_the_seed(sweep):
    records = [ue.Record(ue.Fact("{} is in", f"The {n} tower", "Rome", "Oslo")) for n in "abcdefgh"]
    given = {"layers": (0,), "clamps": (1.0,), "count": 3}
    first, again, other = (sweep(records, seed=seed, **given).used for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 3
    assert [records.index(one) for one in first] == sorted(records.index(one) for one in first)


def test_of_bare_facts_only_es_counts_and_that_is_said(sweep, caplog):
    found = sweep([TOWER, VIENNA], layers=(0,), clamps=(4.0,))
    assert found.by == "ES"
    assert found.used == (TOWER, VIENNA)
    assert list(found.table["score"]) == list(found.table["ES"])
    assert "what an edit breaks is not seen" in caplog.text
    unknown = ue.Fact(TOWER.prompt, TOWER.subject, "Rome")
    assert sweep([unknown], layers=(0,), clamps=(4.0,)).by == "GS"


def test_what_cannot_be_edited_has_no_score(sweep, tiny, caplog, monkeypatch):
    usual = ue.Editor.optimise_values

    def failing(self: ue.Editor, facts: Any, method: ue.Method) -> Any:
        if method.clamp == 4.0:
            raise EditError("the loss is nan")
        return usual(self, facts, method)

    monkeypatch.setattr(ue.Editor, "optimise_values", failing)
    found = sweep(layers=(1,))
    assert list(found.table["problem"]) == ["", "the loss is nan"]
    assert found.table["score"].isna().tolist() == [False, True]
    assert "layers (1,) with clamp 4 have no score: the loss is nan" in caplog.text
    assert found.method.clamp == 1.0
    with refused(tiny, MethodError, "none of 1 combinations", "the loss is nan"):
        sweep(layers=(1,), clamps=(4.0,))


# --- what is tried ---


def made(layers: tuple[int, ...], clamps: tuple[float, ...], score: Any) -> list[Any]:
    """The order of a whole sweep in which a layer has the score given by a function."""
    groups, rows, tried = [(layer,) for layer in layers], {}, []
    step = max(1, round(len(groups) / 10))
    finalists = len(groups) if step == 1 else 2
    for group, clamp in order(groups, clamps, rows, step, finalists):
        tried.append((group[0], clamp))
        rows[group, clamp] = {"score": score(group[0]), "size": 1.0, "problem": ""}
    assert len(tried) == len(set(tried)) <= total_of(len(groups), len(clamps), step, finalists)
    return tried


def test_few_layers_are_all_tried_spread_first():
    tried = made((0, 1, 2, 3), (1.0, 2.0), lambda layer: -abs(layer - 1))
    assert tried == [(0, 1.0), (2, 1.0), (1, 1.0), (3, 1.0),
                     (1, 2.0), (0, 2.0), (2, 2.0), (3, 2.0)]  # fmt: skip


@pytest.mark.parametrize("best", [0, 4, 11, 19])
def test_of_many_the_best_of_a_grid_is_refined(best):
    tried = made(tuple(range(20)), (1.0, 2.0, 3.0), lambda layer: -abs(layer - best))
    firsts = [layer for layer, clamp in tried if clamp == 1.0]
    assert sorted(firsts[:10]) == list(range(0, 20, 2))
    assert firsts[0] == 0
    assert best in firsts
    finalists = [layer for layer, clamp in tried if clamp != 1.0]
    assert finalists[:2] == [best, best]
    assert len(finalists) == 4


def test_layers_when_nobody_says_which(make_gpt2):
    parts = anatomy(make_gpt2(n_layer=9))
    assert candidates_of(parts, QUICK, None, None) == [(layer,) for layer in range(6)]
    assert candidates_of(anatomy(make_gpt2(n_layer=1)), QUICK, None, None) == [(0,)]
    assert candidates_of(parts, QUICK, [3, 1], None) == [(1,), (3,)]


def traced(effects: list[float], window: int, kinds: tuple[str, ...] = ("mlp",)) -> Trace:
    """A trace of a fact of two tokens whose subject's last token has these effects."""
    restored = torch.zeros(1, 2, len(effects), dtype=torch.float64)
    restored[0, 0] = torch.tensor(effects)
    one = TracedFact(
        fact=TOWER, object="Paris", tokens=("Tower", "in"), subject=(0, 0), clean=0.5,
        corrupted_samples=torch.zeros(1, dtype=torch.float64),
        restored=dict.fromkeys(kinds, restored), noise=torch.zeros(1, 1, 2),
    )  # fmt: skip
    return Trace((one,), kinds, window, 3.0, 1, 0, 0.1)


def test_a_trace_narrows(make_gpt2):
    parts = anatomy(make_gpt2(n_layer=12))
    seen = traced([0.0, 0.1, 0.4, 0.3, 0.1] + [0.0] * 7, 1)  # half of .4 and more: 2 and 3
    assert candidates_of(parts, QUICK, None, seen) == [(1,), (2,), (3,), (4,)]
    wide = traced([0.0, 0.1, 0.4, 0.3, 0.1] + [0.0] * 7, 5)
    assert candidates_of(parts, QUICK, None, wide) == [(layer,) for layer in range(6)]
    assert candidates_of(parts, QUICK, (4, 9), seen) == [(4,)]
    assert candidates_of(parts, QUICK, [(4, 5), (6, 7)], seen) == [(4, 5)]
    with pytest.raises(MethodError, match="points at layers 1 to 4, and none of the layers given"):
        candidates_of(parts, QUICK, (8, 9), seen)
    with pytest.raises(MethodError, match="no effect of an MLP"):
        candidates_of(parts, QUICK, None, traced([-0.1] * 12, 1))
    with pytest.raises(MethodError, match="'mlp' was not traced"):
        candidates_of(parts, QUICK, None, traced([0.1] * 12, 1, ("state",)))
    with pytest.raises(MethodError, match="in this model"):
        candidates_of(parts, QUICK, None, traced([0.1] * 13, 1))
    with pytest.raises(MethodError, match="trace is a str"):
        candidates_of(parts, QUICK, None, "0-2")


# --- it goes on, and it ends ---


def test_it_goes_on_from_its_file(sweep, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "rows.jsonl"
    whole = sweep()
    stopped = sweep(to=path, budget_s=0)
    assert (len(stopped.table), stopped.complete) == (1, False)
    assert len(path.read_text().splitlines()) == 2  # what it was made from, and a row
    done: list[Any] = []
    usual = suggesting.tried_alone

    def counting(*given: Any) -> Any:
        done.append(given[3])
        return usual(*given)

    monkeypatch.setattr(suggesting, "tried_alone", counting)
    on = sweep(to=path)
    assert len(done) == 3
    columns = ["seconds"]
    pd.testing.assert_frame_equal(on.table.drop(columns=columns), whole.table.drop(columns=columns))
    assert on.method == whole.method
    again = sweep(to=path)
    assert len(done) == 3
    pd.testing.assert_frame_equal(again.table, on.table)
    sweep(to=path, clamps=(1.0, 2.0))  # other clamps may be added; those of before are not shown
    assert len(done) == 5
    assert len(sweep(to=path, clamps=(2.0,)).table) == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"method": QUICK.replace(steps=5)}, "method"),
        ({"records": RECORDS[:2]}, "records"),
    ],
    ids=["seed", "method", "records"],
)
def test_a_file_of_another_sweep_is_refused(given, word, sweep, tmp_path, tiny):
    path = tmp_path / "rows.jsonl"
    sweep(to=path, layers=(0,), clamps=(1.0,))
    kept = path.read_bytes()
    with refused(tiny, MethodError, "made from something else", word, "delete it"):
        sweep(to=path, layers=(0,), clamps=(1.0,), **given)
    assert path.read_bytes() == kept


def test_a_file_of_another_model_is_refused(sweep, tmp_path, make_gpt2, statistics_of,
                                            tiny_tokenizer):  # fmt: skip
    path = tmp_path / "rows.jsonl"
    sweep(to=path, layers=(0,), clamps=(1.0,))
    other = make_gpt2(seed=3)
    with refused(other, MethodError, "fingerprint"):
        ue.suggest_layers(
            other, tiny_tokenizer, RECORDS, method=QUICK, layers=(0,), clamps=(1.0,), to=path,
            statistics=statistics_of(other),
        )  # fmt: skip


@pytest.mark.parametrize("content", ["", "nothing", "[1]\n", '{"format": 1}\n{"a": 1}\n', "3\n"])
def test_what_is_no_file_of_a_sweep(content, sweep, tmp_path, tiny):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with refused(tiny, MethodError, "rows.jsonl"):
        sweep(to=path, layers=(0,), clamps=(1.0,))


def test_a_place_that_cannot_be_written(sweep, tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with refused(tiny, MethodError, "cannot be written"):
        sweep(to=tmp_path / "file" / "rows.jsonl", layers=(0,), clamps=(1.0,))


def test_a_row_in_the_file_is_plain(sweep, tmp_path):
    path = tmp_path / "rows.jsonl"
    sweep(to=path, layers=(0,), clamps=(1.0,))
    first, row = map(json.loads, path.read_text().splitlines())
    assert (row["layers"], row["clamp"], row["problem"]) == ([0], 1.0, "")
    assert first["facts"][0] == str(TOWER)
    assert first["statistics"]["tokens"] > 0


def test_an_interruption_leaves_the_model_and_the_rows(sweep, tmp_path, tiny, monkeypatch):
    path = tmp_path / "rows.jsonl"
    usual = suggesting.tried_alone

    def interrupted(*given: Any) -> Any:
        if given[3][0] == (1,):
            raise KeyboardInterrupt
        return usual(*given)

    monkeypatch.setattr(suggesting, "tried_alone", interrupted)
    with refused(tiny, KeyboardInterrupt):
        sweep(to=path, clamps=(1.0,))
    assert len(path.read_text().splitlines()) == 2


# --- bad input ---


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"records": []}, FactError, ["empty"]),
        ({"records": ["Rome"]}, FactError, ["str"]),
        ({"method": "EMMET"}, MethodError, ["method is a str", "unified_edit.EMMET"]),
        ({"method": ue.MEMIT}, MethodError, ["no published setting of ridge"]),
        ({"layers": ()}, MethodError, ["layers is empty"]),
        ({"layers": (9,)}, ModelError, ["9", f"0..{LAYERS - 1}"]),
        ({"layers": ("1",)}, ModelError, ["'1'"]),
        ({"clamps": ()}, MethodError, ["clamps is empty"]),
        ({"clamps": (0,)}, MethodError, ["a clamp", "> 0"]),
        ({"count": 0}, MethodError, ["count", "at least 1"]),
        ({"seed": -1}, MethodError, ["seed"]),
        ({"budget_s": "1"}, MethodError, ["budget_s", "'1'"]),
        ({"to": 3}, MethodError, ["to is 3"]),
    ],
)
def test_bad_input(given, kind, words, sweep, tiny):
    with refused(tiny, kind, *words):
        sweep(**given)


# --- settings ---


def test_settings_are_those_of_the_shape(make_gpt2):
    for table in (SETTINGS, PUBLISHED, MEASURED):
        for shape, presets in table.items():
            assert len(shape) in (3, 4)
            for preset, settings in presets.items():
                method = ue.METHODS[preset].replace(**settings)
                assert method.ridge is not None
                assert method.layers == tuple(sorted(method.layers))
                assert max(method.layers) < shape[1]
    llama = [settings_of("llama", 32, 4096, key) for key in (11008, 14336, 999)]
    assert llama[0]["MEMIT"]["clamp"] == 4.0
    assert llama[1]["MEMIT"]["learning_rate"] == 0.1
    assert llama[2] == {}
    assert settings_of("gpt2", 48, 1600, 6400) == SETTINGS["gpt2", 48, 1600]
    assert DEFAULTS["learning_rate"] == 0.5


def test_a_model_finds_its_settings(make_gpt2, monkeypatch):
    model = make_gpt2()
    monkeypatch.setitem(MEASURED, ("gpt2", LAYERS, 24, 48), {
        "EMMET": {"layers": (2,), "clamp": 3.0, "learning_rate": 0.05}})  # fmt: skip
    found = ue.EMMET.resolve(model)
    assert (found.layers, found.clamp, found.learning_rate) == ((2,), 3.0, 0.05)
    own = ue.EMMET.replace(learning_rate=0.25, layers=(1,)).resolve(model)
    assert (own.layers, own.learning_rate) == ((1,), 0.25)
    monkeypatch.setitem(PUBLISHED, ("gpt2", LAYERS, 24), {"EMMET": {"layers": (0,)}})
    assert ue.EMMET.resolve(model).layers == (2,)  # what was measured here comes first
    with pytest.raises(MethodError, match=r"ue\.suggest_layers\(model, tokenizer, records"):
        ue.ROME.resolve(model)


def test_the_learning_rate_is_half_where_nobody_says_otherwise(make_gpt2):
    resolved = ue.EMMET.replace(layers=(1,)).resolve(make_gpt2())
    assert resolved.learning_rate == 0.5
    assert ue.Method.from_dict(resolved.to_dict()) == resolved


# --- a trained model ---


def test_on_atlas_it_finds_the_layers_that_are_known(atlas, atlas_texts):
    """Layers 0 and 1 were chosen for atlas by hand, on other records."""
    model, tokenizer = atlas
    # more text makes neighbours a little safer; which layer is best shows with little
    statistics = ue.KeyStatistics.collect(model, tokenizer, atlas_texts, (0, 1, 3), tokens=4000)
    records = ue.load_records("atlas", limit=40, seed=5)
    method = ue.EMMET.replace(contexts=ue.Contexts(starts=("The",)))
    found = ue.suggest_layers(
        model, tokenizer, records, method=method, layers=(0, 1, 3), clamps=(1.25,), count=4,
        statistics=statistics,
    )  # fmt: skip
    assert found.method.layers[0] in (0, 1)
    assert found.best["S"] > 0.9
    assert found.table.set_index("layer")["S"][3] < found.best["S"] - 0.05
    assert len([one for one in records if one not in found.used]) == len(records) - 4

"""Batch after batch: the updates add up to one solution, and nothing that was kept is lost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from fixtures_refusals import IN_TURN, ONE, OSLO, SPREAD, TOWER, VIENNA, raising, refused
from fixtures_tiny import PLACES, THINGS
from recipe import relative
from torch import Tensor

import unified_edit as ue
from unified_edit.errors import (
    ContradictionError,
    EditError,
    EditFileError,
    MethodError,
    SharedSubjectError,
)
from unified_edit.objective import solve

#: Ten batches of two.
FACTS = [
    ue.Fact("{} was born in", place, other)
    for place, other in zip(PLACES, PLACES[3:] + PLACES[:3], strict=True)
] + [ue.Fact("The {} is in the city of", f"old {thing}", "Rome") for thing in THINGS]
FACTS += [
    ue.Fact("I walked from the {} to the", f"{place} bridge", "river") for place in PLACES[:4]
]
BATCHES = [FACTS[i : i + 2] for i in range(0, 20, 2)]
AGAIN = ue.Fact("I walked from {} to the", "The  tower", "museum")
#: With a lam that is not its own inverse.
WEIGHED = SPREAD.replace(ridge=0.5)
KINDS = pytest.mark.parametrize(("history", "method"), [("hard", ONE), ("soft", WEIGHED)])


@pytest.fixture
def editor(tiny, tiny_tokenizer, tiny_statistics):
    """editor(history, method, **more) of the tiny model."""

    def made(history=None, method=ONE, **more):
        return ue.Editor(
            tiny, tiny_tokenizer, method=method, statistics=tiny_statistics, history=history, **more
        )

    return made


def one_solution(editor: ue.Editor, edits: list[ue.Edit], layer: int) -> tuple[Tensor, Tensor]:
    """The sum of the updates at a layer, and what all recorded pairs ask for at once."""
    name = edits[0].names[layer]
    K = torch.cat([edit.keys[name] for edit in edits], dim=1)
    V = torch.cat([edit.targets[name] for edit in edits], dim=1)
    weight = editor.parts.weight(layer)
    W0 = weight.to_stored(editor.ledger.base_weight(weight)).double()
    metric = editor.statistics.metric(layer)
    ridge = edits[0].method.ridge_for(2)
    return sum(edit.delta(layer) for edit in edits), solve(
        metric, K, V - W0 @ K, ridge=ridge, infeasible="least_violation"
    ).delta


@KINDS
def test_ten_batches_add_up_to_one(editor, history, method) -> None:
    owner = editor(history, method)
    edits = [owner.edit(batch) for batch in BATCHES]
    for layer in edits[0].layers:
        found, wanted = one_solution(owner, edits, layer)
        assert relative(found, wanted) < 1e-10
    missed = owner.drift().missed
    assert len(missed) == 10 * len(edits[0].layers)
    if history == "hard":
        assert missed.max() < 1e-10
        first = edits[0]
        name = first.names[1]
        for later in edits[1:]:
            assert (later.delta(1) @ first.keys[name]).norm() < 1e-10 * later.delta(1).norm()
    assert [edit.provenance.history for edit in owner.active] == [history] * 10


def test_without_a_history_the_first_batch_is_missed(editor) -> None:
    """Or the test above says nothing."""
    owner = editor()
    edits = [owner.edit(batch) for batch in BATCHES]
    name = edits[0].names[1]
    asked = edits[0].delta(1) @ edits[0].keys[name]
    left = sum(edit.delta(1) for edit in edits) @ edits[0].keys[name]
    assert relative(left, asked) > 0.05
    assert edits[-1].provenance.history is None and not edits[-1].targets


def test_the_first_batch_is_what_it_is_without_one(editor) -> None:
    plain, owner = editor().edit(BATCHES[0], apply=False), editor("hard")
    assert torch.equal(plain.delta(1), owner.edit(BATCHES[0], apply=False).delta(1))


def test_turns_of_one_edit_count_as_well(editor) -> None:
    """ROME writes facts one after another: with a hard history all of them hold."""
    edit = editor("hard", IN_TURN).edit([*BATCHES[0], *BATCHES[1]])
    name = edit.names[1]
    owner = edit.ledger
    weight = owner.parts.named(name)
    W0 = weight.to_stored(owner.base_weight(weight)).double()
    assert relative((W0 + edit.delta(1)) @ edit.keys[name], edit.targets[name]) < 1e-11
    edit.undo()
    blind = editor(None, IN_TURN).edit([*BATCHES[0], *BATCHES[1]])
    asked = edit.targets[name][:, 0] - W0 @ edit.keys[name][:, 0]
    assert relative(blind.delta(1) @ edit.keys[name][:, 0], asked) > 1e-3


def test_the_call_without_an_editor_knows_the_past_too(
    tiny, tiny_tokenizer, tiny_statistics, editor
) -> None:
    more = {"statistics": tiny_statistics, "history": "hard"}
    first = ue.edit(tiny, tiny_tokenizer, BATCHES[0], ONE, **more)
    second = ue.edit(tiny, tiny_tokenizer, BATCHES[1], ONE, **more)
    assert float((second.delta(1) @ first.keys[first.names[1]]).norm()) < 1e-10


# --- undo ---


@KINDS
def test_the_third_of_ten_batches_is_undone(tiny, editor, history, method) -> None:
    owner = editor(history, method)
    edits = [owner.edit(batch) for batch in BATCHES]
    deltas = {edit.id: edit.delta(1).clone() for edit in edits}
    undone = owner.undo(edits[2])
    assert [edit.id for edit in owner.active] == [e.id for e in edits if e is not edits[2]]
    assert all(torch.equal(edit.delta(1), deltas[edit.id]) for edit in owner.active)
    assert {*undone.lost, *undone.gained} <= {fact for edit in edits[3:] for fact in edit.facts}
    weight = owner.parts.weight(1)
    total = weight.to_stored(owner.ledger.base_weight(weight)).double()
    for edit in owner.active:
        total = total + edit.delta(1)
    assert torch.equal(weight.to_stored(weight.parameter), total.float()), "not bit for bit"


@KINDS
def test_later_batches_are_replayed(editor, history, method) -> None:
    owner = editor(history, method)
    edits = [owner.edit(batch) for batch in BATCHES]
    undone = owner.undo(edits[2], replay=True)
    assert [e.id for e in owner.active[:2]] == [e.id for e in edits[:2]]
    assert list(owner.active[2:]) == list(undone.replayed) and len(undone.replayed) == 7
    for old, new in zip(edits[3:], undone.replayed, strict=True):
        assert new.id != old.id and new.facts == old.facts
        assert all(torch.equal(new.targets[n], old.targets[n]) for n in old.targets)
        assert all(torch.equal(new.keys[n], old.keys[n]) for n in old.keys)
    for layer in edits[0].layers:
        found, wanted = one_solution(owner, list(owner.active), layer)
        assert relative(found, wanted) < 1e-10
    # what the last one says of its facts is what the model says now
    now = owner.retention().query("edit == 8")
    assert list(now.now) == pytest.approx([o.after for o in owner.active[8].outcomes], rel=1e-6)
    owner.active[8].undo().apply()  # its matrices are those that were recorded


def test_undo_says_what_was_lost(editor, monkeypatch) -> None:
    owner = editor("hard")
    first, second = owner.edit(BATCHES[0]), owner.edit(BATCHES[1])
    place = "unified_edit.editing.consecutive._asked"
    Asked = type("Asked", (), {})
    answers = iter([[True, False], [False, True]])

    def asked(_, facts):
        found = []
        for greedy in next(answers):
            one = Asked()
            one.greedy = greedy
            found.append(one)
        return found

    monkeypatch.setattr(place, asked)
    undone = owner.undo(first)
    assert undone.lost == (second.facts[0],) and undone.gained == (second.facts[1],)
    assert undone.edit is first and undone.replayed == ()


def test_what_cannot_be_undone_or_replayed(tiny, editor) -> None:
    blind = editor()
    first, second = blind.edit(BATCHES[0]), blind.edit(BATCHES[1])
    with refused(tiny, EditError, second.id, "without a history", "replay=True"):
        blind.undo(first, replay=True)
    blind.undo(second)
    with refused(tiny, EditError, "not in force", "editor.active"):
        blind.undo(second)


def test_a_replay_that_fails_leaves_everything(tiny, editor, monkeypatch) -> None:
    owner = editor("hard")
    edits = [owner.edit(batch) for batch in BATCHES[:4]]
    place = "unified_edit.editing.consecutive.solve"
    monkeypatch.setattr(place, raising(KeyboardInterrupt("stopped"), 2, solve))
    with refused(tiny, KeyboardInterrupt, "stopped"):
        owner.undo(edits[0], replay=True)
    assert owner.active == tuple(edits)


# --- facts that meet earlier ones ---


def test_a_contradiction_with_an_earlier_batch(tiny, editor) -> None:
    other = ue.Fact(TOWER.prompt, TOWER.subject, "Lisbon")
    owner = editor("hard")
    first = owner.edit([TOWER, VIENNA])
    with refused(tiny, ContradictionError, "Lisbon", "Rome", first.id, "on_conflict='last'"):
        owner.edit([other])
    second = owner.edit([other], on_conflict="last")
    assert second.provenance.replaces == ((first.id, 0),)
    assert "takes the place of" in second.warnings[0]
    name = first.names[1]
    kept = first.keys[name][:, 1:]
    assert float((second.delta(1) @ kept).norm()) < 1e-10, "the other fact is held"
    assert float((second.delta(1) @ first.keys[name][:, :1]).norm()) > 1e-3
    assert list(owner.retention().replaced) == [True, False, False]
    assert list(owner.drift().facts) == [1, 1]
    # the third batch holds the new one, not the old one
    third = owner.edit([OSLO])
    assert float((third.delta(1) @ second.keys[name]).norm()) < 1e-10
    # with the second one out the old column counts again
    owner.undo(second)
    fourth = owner.edit([ue.Fact("{} was born in", "Dublin", "Oslo")])
    assert float((fourth.delta(1) @ first.keys[name]).norm()) < 1e-10


def test_the_same_fact_again(editor) -> None:
    owner = editor("hard")
    first = owner.edit([TOWER, VIENNA])
    second = owner.edit([VIENNA, OSLO])
    assert second.provenance.replaces == ((first.id, 1),)
    assert "written again" in second.warnings[0]


def test_a_subject_that_an_earlier_batch_has(tiny, editor) -> None:
    owner = editor("hard", SPREAD)
    first = owner.edit([TOWER, VIENNA])
    with refused(tiny, SharedSubjectError, AGAIN.text, "The tower is", first.id, "merge"):
        owner.edit([AGAIN])
    # a ridge and a soft past do with both, and say so
    soft = editor("soft", SPREAD).edit([AGAIN], apply=False)
    assert "neither is held exactly" in soft.warnings[0] and not soft.provenance.replaces
    merged = owner.edit([AGAIN, OSLO], on_shared_subject="merge", apply=False)
    assert merged.facts == (AGAIN, OSLO, TOWER) and merged.columns == (0, 1, 0)
    assert merged.provenance.replaces == ((first.id, 0),)
    assert "written anew" in merged.warnings[0]
    alone = owner.edit([AGAIN], on_shared_subject="split")
    assert alone.facts == (AGAIN,) and alone.provenance.replaces == ((first.id, 0),)
    assert "not held beside" in alone.warnings[0]


def test_last_and_merge_together(editor) -> None:
    """The fact that is overruled is not taken up again for its subject's sake."""
    owner = editor("hard", on_shared_subject="merge", on_conflict="last")
    owner.edit([TOWER])
    edit = owner.edit([ue.Fact(TOWER.prompt, TOWER.subject, "Lisbon"), AGAIN])
    assert [fact.target_new for fact in edit.facts] == ["Lisbon", "museum"]


# --- bad input ---


def test_a_soft_past_needs_a_weight(tiny, editor) -> None:
    with refused(tiny, MethodError, "soft", "no lam", "history='hard'"):
        editor("soft", ONE).edit([TOWER])
    with pytest.raises(MethodError, match=r"history is 'both'; choose one of \('soft', 'hard'\)"):
        editor("both")


# --- on disk ---


@KINDS
def test_a_history_goes_on_in_another_process(
    tiny, tiny_tokenizer, tiny_statistics, editor, tmp_path, history, method
) -> None:
    owner = editor(history, method)
    for batch in BATCHES[:3]:
        owner.edit(batch)
        owner.save(tmp_path)
    stopped = tiny.state_dict()["transformer.h.1.mlp.c_proj.weight"].clone()
    fourth = owner.edit(BATCHES[3])
    owner.reset()
    later = editor(history, method)
    assert [edit.facts for edit in later.resume(tmp_path)] == [tuple(b) for b in BATCHES[:3]]
    assert torch.equal(tiny.state_dict()["transformer.h.1.mlp.c_proj.weight"], stopped)
    again = later.edit(BATCHES[3])
    assert relative(again.delta(1), fourth.delta(1)) < 1e-12
    later.save(tmp_path)
    assert len(json.loads((tmp_path / "history.json").read_text())["edits"]) == 4
    loaded = ue.Edit.load(tmp_path / f"{again.id}.safetensors")
    assert all(torch.equal(loaded.targets[n], again.targets[n]) for n in again.targets)
    assert loaded.id == again.id and loaded.provenance == again.provenance
    undone = later.undo(later.active[0], replay=True)
    assert len(undone.replayed) == 3


def test_a_folder_that_does_not_fit(tiny, make_gpt2, tiny_tokenizer, editor, tmp_path) -> None:
    owner = editor("hard")
    with refused(tiny, EditFileError, "history.json", "Editor.save"):
        owner.resume(tmp_path)
    first = owner.edit(BATCHES[0])
    owner.save(tmp_path)
    with refused(tiny, EditError, "1 edits are in force", "editor.reset()"):
        owner.resume(tmp_path)
    owner.reset()
    with refused(tiny, EditFileError, "history='hard'", "'soft'"):
        editor("soft", SPREAD).resume(tmp_path)
    other = make_gpt2(5)
    with refused(other, EditFileError, "not of this model", "Load the model"):
        ue.Editor(other, tiny_tokenizer, history="hard").resume(tmp_path)
    index = json.loads((tmp_path / "history.json").read_text())
    (tmp_path / "history.json").write_text(json.dumps(index | {"kind": "something"}))
    with refused(tiny, EditFileError, "'something'"):
        owner.resume(tmp_path)
    (tmp_path / "history.json").write_text(json.dumps(index))
    (tmp_path / f"{first.id}.safetensors").unlink()
    with refused(tiny, EditFileError, first.id, "no such file"):
        owner.resume(tmp_path)
    # a folder that cannot be written
    (tmp_path / "file").write_text("")
    first.apply()
    with refused(tiny, EditFileError, "cannot be written"):
        owner.save(tmp_path / "file" / "folder")


def test_a_run_that_is_killed_goes_on(tmp_path) -> None:
    """Killed between batches, a script that is started again ends with the same weights."""
    script = """
import os, sys, logging
import unified_edit as ue
from pathlib import Path
logging.disable(logging.WARNING)
folder, until = Path(sys.argv[1]), int(sys.argv[2])
model, tokenizer = ue.load_model("atlas")
facts = [record.fact for record in ue.load_records("atlas")[:40:10]]
method = ue.EMMET.replace(steps=3, contexts=ue.Contexts(starts=("The",), lengths=(2,)))
editor = ue.Editor(model, tokenizer, method=method, history="hard")
done = len(editor.resume(folder)) if (folder / "history.json").exists() else 0
for number in range(done, 4):
    if number == until:
        os._exit(9)
    editor.edit([facts[number]])
    editor.save(folder)
layer = editor.active[0].layers[0]
print(float(editor.parts.weight(layer).parameter.double().sum()))
"""

    def run(folder, until):
        return subprocess.run(
            [sys.executable, "-c", script, str(folder), str(until)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run(tmp_path / "a", 2).returncode == 9
    went_on, straight = run(tmp_path / "a", 9), run(tmp_path / "b", 9)
    assert went_on.returncode == straight.returncode == 0, went_on.stderr + straight.stderr
    assert float(went_on.stdout) == pytest.approx(float(straight.stdout), rel=1e-12)


@KINDS
def test_what_a_history_costs(editor, history, method) -> None:
    """One metric a weight is kept, not one a batch; and beside K it takes as many numbers again."""
    owner = editor(history, method)
    for batch in BATCHES:
        owner.edit(batch)
    kept = [
        (key, size)
        for key, (_, size) in owner.memory._kept.items()
        if isinstance(key, tuple) and key[0] == "history"
    ]
    assert len(kept) == len(owner.active[0].layers)
    d, facts = owner.parts.weight(1).d_in, 18  # of the nine batches that the last one met
    assert all(size <= 8 * max(2 * d * facts, d * d) for _, size in kept)

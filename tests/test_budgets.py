"""A budget of preservation in an editor: LyapLock's updates and its queue, batch after batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_methods as code
import torch
from fixtures_refusals import IN_TURN, ONE, OSLO, SPREAD, TOWER, VIENNA, refused
from fixtures_tiny import PLACES
from recipe import relative

import unified_edit as ue
from unified_edit.errors import EditError, MethodError

WEIGHT, ALPHA = 0.2, 0.4
BATCHES = [[TOWER, VIENNA], [OSLO], [ue.Fact("{} was born in", p, "Rome") for p in PLACES[4:7]]]
SOFT = {"history": "soft", "budget": ue.Budget(weight=WEIGHT, alpha=ALPHA)}


@pytest.fixture
def editor(tiny, tiny_tokenizer, tiny_statistics):
    """editor(method, **more) of the tiny model, with a budget."""

    def made(method=ONE, **more):
        given = {"method": method, "statistics": tiny_statistics, **SOFT, **more}
        return ue.Editor(tiny, tiny_tokenizer, **given)

    return made


def second_moment(owner: ue.Editor, layer: int) -> torch.Tensor:
    factor = owner.statistics.metric(layer).factor
    return factor @ factor.T


def test_three_batches_are_lyaplock_s(editor) -> None:
    owner = editor()
    weight = owner.parts.weight(1)
    W0 = weight.to_stored(weight.parameter.detach()).double().clone()
    C0, pairs, edits, sums = second_moment(owner, 1), [], [], [torch.zeros_like(W0)]
    for batch in BATCHES:
        values = owner.optimise_values(batch)
        edits.append(owner.edit(batch, values=values))
        pairs.append((edits[-1].keys[weight.name], values.of(batch).delta))
        sums.append(sums[-1] + edits[-1].delta(1))
    literal = code.lyaplock(W0, C0, pairs, WEIGHT, ALPHA)
    for found, W in zip(sums[1:], literal, strict=True):
        assert relative(found, W - W0) < 1e-8
    # MEMIT with its history, which goes on asking for what was asked, is another matter
    K = torch.cat([keys for keys, _ in pairs], dim=1)
    asked = [delta + done @ keys for (keys, delta), done in zip(pairs, sums[:3], strict=True)]
    memit = ue.objective.solve(C0, K, torch.cat(asked, dim=1), ridge=WEIGHT).delta
    assert relative(memit, literal[2] - W0) > 1e-2

    spent = [edit.provenance.spent[weight.name] for edit in edits]
    costs = [float(((W - W0) @ C0 @ (W - W0).T).trace()) for W in literal]
    assert [one.cost for one in spent] == pytest.approx(costs, rel=1e-8)
    # the queue, a Z of its code with its own settings, written out
    D, Z = costs[0], (ALPHA * costs[0]) ** 0.5
    a, least, ridges = 1 / Z, Z, [WEIGHT]
    for cost in costs[:2]:
        Z = max(Z + a * (cost - ALPHA * D), least)
        ridges.append(WEIGHT * a * Z)
    assert [one.budget.ridge for one in spent] == pytest.approx(ridges, rel=1e-8)
    assert ridges[0] < ridges[1] < ridges[2], "the budget is exceeded"

    # what is recorded for a batch is what the weight gave for its keys
    for edit, W in zip(edits, literal, strict=True):
        assert relative(edit.targets[weight.name], W @ edit.keys[weight.name]) < 1e-9
        assert edit.method.ridge == WEIGHT and edit.provenance.history == "soft"
    assert [edit.updates[weight.name].rank for edit in edits] == [2, 3, 6]
    for edit in edits:
        update = edit.updates[weight.name]
        price = float((update.delta @ C0 @ update.delta.T).trace())
        assert update.diagnosis.preservation_error == pytest.approx(price, rel=1e-8)
    keys, asked = pairs[2]
    missed = edits[2].delta(1) @ keys - asked
    error = edits[2].updates[weight.name].diagnosis.memorization_error
    assert error == pytest.approx(float(missed.norm() / asked.norm()), rel=1e-9)


def test_each_weight_has_a_queue_of_its_own(editor) -> None:
    owner = editor(SPREAD)
    edits = [owner.edit(batch) for batch in BATCHES]
    for layer in SPREAD.layers:
        name, C0 = edits[0].names[layer], second_moment(owner, layer)
        budget, total = owner.budget, 0
        for edit in edits:
            spent, total = edit.provenance.spent[name], total + edit.delta(layer)
            assert spent.budget.ridge == pytest.approx(budget.ridge, rel=1e-9)
            budget = budget.after(float((total @ C0 @ total.T).trace()))
    last = {edits[-1].provenance.spent[name].budget.ridge for name in edits[-1].updates}
    assert len(last) == len(SPREAD.layers)


def test_turns_of_one_edit_are_batches(editor) -> None:
    edit = editor(IN_TURN).edit([TOWER, VIENNA, OSLO])
    (spent,) = edit.provenance.spent.values()
    (name,) = edit.updates
    assert spent.budget.first is not None and spent.budget.queue > 1
    assert edit.targets[name].shape[1] == 3 and edit.updates[name].rank <= 6


def test_edits_without_a_history_count_as_the_base(tiny, tiny_tokenizer, editor) -> None:
    """They are not taken out again, and what they gave is a pair."""
    blind = editor(history=None, budget=None).edit([VIENNA])
    owner = editor()
    name = owner.parts.weight(1).name
    made = owner.edit([TOWER])
    K = torch.cat([made.keys[name], blind.keys[name]], dim=1)
    C0, whole = second_moment(owner, 1), made.delta(1)
    # the normal equations of both pairs, of which the earlier one asks for nothing new
    asked = (WEIGHT * whole @ C0 + whole @ K @ K.T) @ torch.linalg.pinv(K.T)
    assert float(asked[:, 1:].norm()) < 1e-6 * float(asked.norm())
    assert relative((whole @ (WEIGHT * C0 + K @ K.T)), asked[:, :1] @ K[:, :1].T) < 1e-6


def test_a_file_and_a_folder_keep_what_was_spent(editor, tmp_path) -> None:
    owner = editor()
    first = owner.edit(BATCHES[0])
    owner.save(tmp_path)
    second = owner.edit(BATCHES[1])
    loaded = ue.Edit.load(tmp_path / f"{first.id}.safetensors")
    assert loaded.id == first.id and loaded.provenance == first.provenance
    owner.reset()
    later = editor()
    later.resume(tmp_path)
    again = later.edit(BATCHES[1])
    assert again.provenance.spent.keys() == second.provenance.spent.keys()
    assert relative(again.delta(1), second.delta(1)) < 1e-12
    # an edit that is out is not in the next one's way, and its queue is gone with it
    later.undo(again)
    assert relative(later.edit(BATCHES[1]).delta(1), second.delta(1)) < 1e-12


def test_a_weight_and_an_alpha_may_change_on_the_way(editor) -> None:
    first = editor().edit(BATCHES[0])
    (spent,) = first.provenance.spent.values()
    other = ue.Budget(weight=3.0, alpha=7.0)
    (now,) = editor(budget=other).edit(BATCHES[1]).provenance.spent.values()
    assert now.budget == replace(other, queue=spent.after.queue, first=spent.cost)


def test_what_a_budget_does_not_go_with(tiny, tiny_tokenizer, tiny_statistics, editor) -> None:
    for history in ("hard", None):
        with refused(tiny, MethodError, "needs history='soft'", repr(history)):
            editor(history=history)
    with refused(tiny, MethodError, "budget is 3", "unified_edit.Budget"):
        ue.edit(tiny, tiny_tokenizer, TOWER, ONE, history="soft", budget=3)
    with refused(tiny, MethodError, "preserve=", "budget"):
        editor().edit(TOWER, preserve=[VIENNA])
    with refused(tiny, MethodError, "divisor_mean"):
        editor(ONE.replace(divisor_mean="bare")).edit(TOWER)
    owner = editor()
    first, second = owner.edit(BATCHES[0]), owner.edit(BATCHES[1])
    with refused(tiny, EditError, second.id, "within a budget", "replay=True"):
        owner.undo(first, replay=True)
    assert owner.active == (first, second)
